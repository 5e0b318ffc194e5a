"""What compresses the gradients of a distributed run."""

import logging
import math
from dataclasses import asdict, dataclass, field
from typing import Literal, get_args

from hf_mlopt.communication.quantizers import Codec
from hf_mlopt.communication.quantizers.registry import codec
from hf_mlopt.errors import ConfigurationError


logger = logging.getLogger(__name__)

EXEMPT = ("1d", "embeddings", "head")


@dataclass
class CompressionConfig:
    """
    Compression of gradients; [`compress`] takes it.

    Args:
        grad_codec (`str`): What a rank sends: `bingrad-b`, `orq-9`, `orq-5-optimal`, `sign`, `top-k-0.01`, `bf16`, ...
        grad_codec_down (`str`, *optional*): What the owner of a shard of the mean sends back; by default the same.
            Its error is not averaged over the ranks, so it should have at least as many bits.
        grad_codec_args (`dict`, *optional*): Settings of both codecs, such as `{"block": 1024}`.
        error_feedback (`str`, *optional*, defaults to `"none"`): `none`; `classic` adds to every gradient what was not
            sent before; `step-ahead` also takes the gradient where the unsent part would lead.
        step_ahead (`float`, *optional*, defaults to 0.1): Coefficient α of that shift, in [0, 1]; 0 is `classic`.
        error_average_period (`int`, *optional*, defaults to 0): Steps between two averages of the unsent parts over
            the ranks; 0 is never.
        error_average_codec (`str`, *optional*, defaults to `"bf16"`): What these are sent in.
        collective (`str`, *optional*, defaults to `"auto"`): `two-phase` (all-to-all, mean, all-gather), `all-gather`
            (every rank decodes all; one loss of precision instead of two), `hierarchical` (float32 inside a node, two
            coded phases between nodes), or `auto`: all-gather for two ranks, else two-phase.
        ranks_per_node (`int`, *optional*): For `hierarchical`; by default what the launcher started on this machine.
        warmup_steps_uncompressed (`int`, *optional*, defaults to 1): Steps before the first compressed one. Before the
            second, DDP holds all gradients in one bucket.
        min_bytes (`int`, *optional*, defaults to 16384): Gradients of a bucket smaller than this travel in float32.
        exempt (`list[str]`, *optional*, defaults to `["1d", "embeddings", "head"]`): Parameters that travel in
            float32: vectors, embeddings, the head, or parts of names.
        seed (`int`, *optional*, defaults to 0): Of stochastic rounding.

    Raises:
        ConfigurationError: For an unknown codec, a value out of range, or error feedback around a codec whose error
            may be larger than the gradient.
    """

    grad_codec: str = "bingrad-b"
    grad_codec_down: str | None = None
    grad_codec_args: dict = field(default_factory=dict)
    error_feedback: Literal["none", "classic", "step-ahead"] = "none"
    step_ahead: float = 0.1
    error_average_period: int = 0
    error_average_codec: str = "bf16"
    collective: Literal["auto", "two-phase", "all-gather", "hierarchical"] = "auto"
    ranks_per_node: int | None = None
    warmup_steps_uncompressed: int = 1
    min_bytes: int = 16384
    exempt: list[str] = field(default_factory=lambda: list(EXEMPT))
    seed: int = 0

    def __post_init__(self):
        for name, choices in (
            ("error_feedback", get_args(CompressionConfig.__annotations__["error_feedback"])),
            ("collective", get_args(CompressionConfig.__annotations__["collective"])),
        ):
            if getattr(self, name) not in choices:
                raise ConfigurationError(name, getattr(self, name), f"must be one of {', '.join(choices)}")
        for name in ("error_average_period", "warmup_steps_uncompressed", "min_bytes"):
            if getattr(self, name) < 0:
                raise ConfigurationError(name, getattr(self, name), "must be at least 0")
        if not (0 <= self.step_ahead <= 1 and math.isfinite(self.step_ahead)):
            raise ConfigurationError("step_ahead", self.step_ahead, "must be between 0 and 1")
        if self.ranks_per_node is not None and self.collective != "hierarchical":
            raise ConfigurationError("ranks_per_node", self.ranks_per_node, "needs collective hierarchical")
        if self.error_average_period and self.error_feedback == "none":
            raise ConfigurationError("error_average_period", self.error_average_period, "needs error_feedback")
        for name in ("up", "down", "of_errors"):
            getattr(self, name)  # their own checks
        if self.has_feedback:
            for name, used in (("grad_codec", self.up), ("grad_codec_down", self.down)):
                require_contractive(name, used)

    @property
    def has_feedback(self) -> bool:
        return self.error_feedback != "none"

    @property
    def up(self) -> Codec:
        """Codec of what a rank sends."""
        return self._codec("grad_codec", self.grad_codec, self.grad_codec_args)

    @property
    def down(self) -> Codec:
        """Codec of what is sent back."""
        return self._codec("grad_codec_down", self.grad_codec_down or self.grad_codec, self.grad_codec_args)

    @property
    def of_errors(self) -> Codec:
        """Codec of the averages of unsent parts."""
        return self._codec("error_average_codec", self.error_average_codec, {})

    def identity(self) -> dict:
        """What all ranks must have in common."""
        return asdict(self)

    def _codec(self, field_name: str, name: str, settings: dict) -> Codec:
        # Unset, the ends of ORQ follow the use: unbiased alone, of the smallest error under error feedback.
        if self.has_feedback and name.startswith("orq-") and "clip" not in settings and name.count("-") == 1:
            settings = {**settings, "clip": "optimal"}
        try:
            return codec(name, **settings)
        except ConfigurationError as error:
            where = field_name if error.field == "codec" else f"grad_codec_args.{error.field}"
            raise ConfigurationError(where, error.value, str(error).partition(": ")[2]) from None


def require_contractive(name: str, used: Codec) -> None:
    """Refuses, or warns of, a codec around which error feedback need not settle."""
    if used.contractive:
        return
    remedy = "errs by more than the gradient on some data, which error feedback piles up; take an -optimal codec"
    if getattr(used, "alphabet", 4) <= 3:
        raise ConfigurationError(name, used.name, f"{remedy}, or error_feedback none")
    logger.warning(f"{name}={used.name!r} {remedy}.")
