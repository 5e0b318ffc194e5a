"""The change of the weights in fewer bytes, by the codecs that compress gradients."""

from collections.abc import Mapping
from typing import Any

import torch

from hf_mlopt.communication.config import CompressionConfig
from hf_mlopt.communication.quantizers import Codec
from hf_mlopt.errors import ConfigurationError, InputError
from hf_mlopt.federated.algorithms import Message
from hf_mlopt.federated.algorithms.message import Group
from hf_mlopt.federated.privacy.clipping import change, changed


# Smaller tensors travel as they are: the levels of a block would outweigh the gain.
_LEAST_BYTES = 1024
_CODES, _UNSENT = "update_codes", "update_unsent"


class UpdateCodec:
    """
    Sites send Q(Δ), Δ = end - start, and the server goes on from start + Q(Δ). Vectors and small tensors travel as
    they are, bit for bit, and so do buffers. With feedback a site sends Q(Δ + e) and keeps e = Δ + e - Q(Δ + e) for
    its next round, [Error Feedback Fixes SignSGD](https://huggingface.co/papers/1901.09847), Algorithm 2.

    Args:
        codec (`Codec`): Q; its random numbers follow from the seed in the message.
        feedback (`bool`): Whether sites keep what they have not sent.
    """

    def __init__(self, codec: Codec, feedback: bool):
        self.codec, self.feedback = codec, feedback

    def encode(self, sent: Message, reply: Message, state: Message | None) -> tuple[Message, dict[str, Group]]:
        """
        Args:
            sent (`Message`): What the server sent.
            reply (`Message`): What the site would answer.
            state (`Message`, *optional*): What the site has kept.

        Returns:
            `tuple`: The answer, and the group to keep; none without feedback.
        """
        start, end = sent.groups["weights"], reply.groups["weights"]
        coded = [name for name in end if self._is_coded(start[name])]
        unsent = state.groups.get(_UNSENT, {}) if state is not None else {}
        codes, left = {}, {}
        for number, name in enumerate(sorted(coded)):
            delta = change({name: start[name]}, {name: end[name]})[name].flatten()
            if name in unsent:
                delta += unsent[name]
            delta = delta.float()
            payload = self.codec.encode(delta, (sent.scalars["seed"], number))
            codes[name] = self.codec.to_bytes(payload)
            if self.feedback:
                left[name] = delta - self.codec.decode(payload)
        plain = {name: tensor for name, tensor in end.items() if name not in codes}
        answer = Message({**reply.groups, "weights": plain, _CODES: codes}, reply.scalars)
        return answer, {_UNSENT: left} if self.feedback else {}

    def decode(self, sent: Message, reply: Message) -> Message:
        """
        The reply with end weights that an algorithm expects.

        Raises:
            InputError: If codes and model do not fit together.
        """
        start, groups = sent.groups["weights"], dict(reply.groups)
        codes = groups.pop(_CODES, {})
        wanted = {name for name, tensor in start.items() if self._is_coded(tensor)}
        if set(codes) != wanted:
            raise InputError(
                f"{_CODES}: has {sorted(codes)} and should have {sorted(wanted)}; give all sites the server's "
                f"update_codec, {self.codec.name}"
            )
        ends = {name: self._end(name, start[name], codes[name]) for name in codes}
        return Message({**groups, "weights": {**groups.get("weights", {}), **ends}}, reply.scalars)

    def _end(self, name: str, start: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
        try:
            delta = self.codec.decode(self.codec.from_bytes(code, start.numel()))
        except (InputError, IndexError, RuntimeError) as error:  # such as an index beyond the tensor
            raise InputError(f"{_CODES}, {name!r}: is no {self.codec.name} of it ({error})") from error
        return changed({name: start}, {name: delta.view(start.shape)})[name]

    def _is_coded(self, tensor: torch.Tensor) -> bool:
        num_bytes = tensor.numel() * tensor.element_size()
        return tensor.dim() > 1 and num_bytes >= _LEAST_BYTES and self.codec.wire_bytes(tensor.numel()) < num_bytes


def make_update_codec(name: str, settings: Mapping[str, Any] | None, feedback: bool) -> UpdateCodec:
    """
    Args:
        name (`str`): Of a gradient codec, such as `orq-9`.
        settings (`Mapping`, *optional*): Of the codec, such as `{"block": 1024}`.
        feedback (`bool`): As in [`UpdateCodec`]; ORQ then takes the ends of smallest error.

    Raises:
        ConfigurationError: For an unknown codec or setting, or feedback around a codec that may err by more than Δ.
    """
    if name in ("none", "fp32"):
        raise ConfigurationError("update_codec", name, "saves nothing; leave it out")
    error_feedback = "classic" if feedback else "none"
    try:
        config = CompressionConfig(
            grad_codec=name, grad_codec_args=dict(settings or {}), error_feedback=error_feedback
        )
    except ConfigurationError as error:
        field = error.field.replace("grad_codec_down", "grad_codec").replace("grad_codec", "update_codec")
        text = str(error).partition(": ")[2].replace("error_feedback none", "update_feedback false")
        raise ConfigurationError(field, error.value, text) from None
    return UpdateCodec(config.up, feedback)
