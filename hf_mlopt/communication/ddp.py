"""Compression in two lines, for a model that DDP has wrapped: plain loops, accelerate and Trainer alike."""

import hashlib
import json
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers.utils import logging

from hf_mlopt.communication.collectives import two_phase_mean
from hf_mlopt.communication.config import CompressionConfig
from hf_mlopt.communication.hierarchical import node_groups
from hf_mlopt.communication.hook import CompressionState, Traffic, compression_hook
from hf_mlopt.communication.step_ahead import Preconditioner, StepAhead, reach
from hf_mlopt.errors import ConfigurationError, InputError
from hf_mlopt.optimizers.two_points import TwoPointOptimizer


logger = logging.get_logger(__name__)


def compress(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    config: CompressionConfig | None = None,
    preconditioner: Preconditioner = reach,
    scaler: torch.amp.GradScaler | None = None,
    **settings,
) -> "Compression":
    """
    Has the gradients of a DDP model travel coded.

    ```python
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    compression = compress(model, optimizer, grad_codec="orq-9", error_feedback="step-ahead")
    ```

    Nothing else changes in the loop. With error feedback the weights are moved ahead in training forward passes, and
    are the clean ones in `optimizer.step()`, in evaluation and in `state_dict()`.

    Args:
        model (`DistributedDataParallel`): As DDP or accelerate has wrapped it, before its first backward pass.
        optimizer (`torch.optim.Optimizer`, *optional*): Needed for error feedback, whose state follows its steps.
        config (`CompressionConfig`, *optional*): How; or give its fields as keywords.
        preconditioner (`Callable`, *optional*): For an optimizer that step-ahead does not know, see [`reach`].
        scaler (`GradScaler`, *optional*): Of the loss, in a plain loop; accelerate's is found.

    Returns:
        [`Compression`]: To save, to read traffic from.

    Raises:
        ConfigurationError: If there is nothing to compress here, a hook is in place, or an option does not fit.
        InputError: If the ranks were given different settings.
    """
    config = config or CompressionConfig(**settings)
    if not isinstance(model, DistributedDataParallel):
        kind = type(model).__name__
        raise ConfigurationError(
            "model", kind, "gradients are coded on their way between DDP replicas; start several processes and pass "
            "the model that DDP or accelerate has wrapped. FSDP, DeepSpeed and tensor parallelism have no such way"
        )  # fmt: skip
    if getattr(model, "_comm_hooks", None):
        raise ConfigurationError(
            "model", "DistributedDataParallel", "has a communication hook already, and DDP takes one"
        )
    if config.has_feedback and optimizer is None:
        raise ConfigurationError("optimizer", None, "is needed for error feedback, which follows its steps")
    return Compression(model, optimizer, config, preconditioner, scaler)


class Compression:
    """What [`compress`] has set up. Its `state_dict` is that of this rank."""

    def __init__(self, model, optimizer, config: CompressionConfig, preconditioner: Preconditioner, scaler):
        self.model, self.config, self.optimizer = model, config, getattr(optimizer, "optimizer", optimizer)
        self._scaler = scaler or getattr(optimizer, "scaler", None)
        self._parameters = {name: p for name, p in model.module.named_parameters() if p.requires_grad}
        compare_over_ranks(config, self._parameters, model.process_group)
        self._device = next(iter(self._parameters.values())).device
        ranks = dist.get_process_group_ranks(model.process_group)
        options = {
            "timeout": _timeout(model.process_group, self._device),
            "use_local_synchronization": len(ranks) < dist.get_world_size(),  # the other ranks do not come by here
        }
        group = dist.new_group(ranks, **options)
        nodes = None
        if config.collective == "hierarchical":
            nodes = node_groups(config.ranks_per_node, model.process_group, **options)
        exempt = exempt_parameters(model.module, config.exempt)
        names = {id(p): n for n, p in self._parameters.items()}
        self.state = CompressionState(config, names, exempt, group, nodes)
        model.register_comm_hook(self.state, compression_hook)
        alpha = config.step_ahead if config.error_feedback == "step-ahead" else 0.0
        self._handles = []
        if self.optimizer is not None:
            self.ahead = StepAhead(self._parameters, self.optimizer, self.state.residuals, alpha, preconditioner)
            self._handles = [
                self.optimizer.register_step_pre_hook(lambda *_: self.before_step()),
                self.optimizer.register_step_post_hook(lambda *_: self.after_step()),
                model.module.register_forward_pre_hook(lambda module, _: self._before_forward(module)),
                model.module.register_state_dict_pre_hook(lambda *_: self.ahead.back()),
                model.module.register_load_state_dict_pre_hook(lambda *_: self.ahead.back()),
            ]
            if isinstance(self.optimizer, TwoPointOptimizer):  # it moves the weights itself, from the clean ones
                self._handles.append(self.optimizer.register_switch_pre_hook(self.ahead.back))
        self._averaged_at = -1

    def before_step(self) -> None:
        """Restores the clean weights; a step whose gradients are not finite on some rank becomes none on all."""
        self.ahead.back()
        if not self.state.is_finite:
            logger.warning_once("gradients were not finite: all ranks skip such steps, and keep what was not sent.")
            for parameter in self._parameters.values():
                parameter.grad = None
            self.state.discard()

    def after_step(self) -> None:
        """What was not sent in this step counts from now on."""
        self.state.commit({name for name, parameter in self._parameters.items() if parameter.grad is None})

    def detach(self) -> None:
        """Ends it: the model inside can be wrapped anew; this wrapped model trains no more, as DDP keeps its hook."""
        if self.optimizer is not None:
            self.ahead.back()
        for handle in self._handles:
            handle.remove()
        self.state.close()

    def hold_zeros(self, zeros: dict[str, torch.Tensor]) -> None:
        """
        Has weights that stay zero get no gradient: it is zero before it is coded, after it is decoded, and in what was
        not sent. What holds the weights themselves is another's matter, such as [`KeepZerosCallback`]'s.

        Args:
            zeros (`dict[str, torch.Tensor]`): Name of a parameter to a boolean tensor of its shape, true where it
                stays zero; in place of those of an earlier call.
        """
        self.state.zeros = dict(zeros)
        for residuals in (self.state.residuals, self.state.down_residuals):
            for name, held in zeros.items():
                if residuals.get(name) is not None:
                    residuals.get(name).masked_fill_(held.view(-1), 0)

    def take_traffic(self) -> Traffic:
        """What travelled since the last call."""
        traffic, self.state.traffic = self.state.traffic, Traffic()
        return traffic

    def _before_forward(self, module: torch.nn.Module) -> None:
        if not (module.training and torch.is_grad_enabled()):
            self.ahead.back()
            return
        if self._scaler is not None and self._scaler.is_enabled():
            self.state.loss_scale = self._scaler.get_scale()
        if self.state.residuals.has_pending and all(p.grad is None for p in self._parameters.values()):
            self.ahead.back()
            self.state.discard()  # of a step that was never taken
        if not self.ahead.is_ahead:
            self._average_errors()
            self.ahead.go()

    def _average_errors(self) -> None:
        """Every `error_average_period` steps all ranks go on with the mean of what they have not sent."""
        period, step = self.config.error_average_period, self.state.step
        if not period or (step + 1) % period or step == self._averaged_at or self.state.residuals.has_pending:
            return
        self._averaged_at = step
        codec = self.config.of_errors
        for number, names in enumerate(sorted(self.state.residuals.groups())):
            flat = self.state.residuals.groups()[names]
            result = two_phase_mean(
                flat, codec, codec, lambda phase, rank, n=number: (self.config.seed, step, n, 2 + phase, rank),
                self.state.group, want_sent=False,
            )  # fmt: skip
            traffic = self.state.traffic
            traffic.spread += float((flat - result.mean).square().sum())
            traffic.spread_of += float(flat.square().sum())
            flat.copy_(result.mean)
            self.state.mask(names, [self._parameters[name].numel() for name in names], flat)
            traffic.bytes_sent += result.bytes_sent

    def state_dict(self) -> dict:
        """Of this rank: the next step, the buckets, what it has not sent, what its shards of the mean lost."""
        return {
            "step": self.state.step,
            "averaged_at": self._averaged_at,
            "layout": [list(names) for names in self.state.layout or self.state.saved_layout],
            "residuals": self._shaped(self.state.residuals.state_dict()),
            "down_residuals": self._shaped(self.state.down_residuals.state_dict()),
        }

    def _shaped(self, residuals: dict) -> dict:
        shaped = {name: value.view(self._parameters[name].shape) for name, value in residuals["values"].items()}
        return {**residuals, "values": shaped}

    def load_state_dict(self, state_dict: dict) -> None:
        """
        Raises:
            InputError: If a parameter has another shape, or is not there any more.
        """
        for name, value in state_dict["residuals"]["values"].items():
            own = self._parameters.get(name)
            if own is None or own.shape != value.shape:
                shape = "has no such parameter" if own is None else f"has {list(own.shape)}"
                raise InputError(f"{name}: the checkpoint holds {list(value.shape)} unsent numbers, the model {shape}")
        self.state.step, self._averaged_at = state_dict["step"], state_dict["averaged_at"]
        self.state.saved_layout = [tuple(names) for names in state_dict["layout"]]
        self.state.residuals.load_state_dict(state_dict["residuals"], self._device)
        self.state.down_residuals.load_state_dict(state_dict["down_residuals"], self._device)

    @staticmethod
    def merged(state_dicts: list[dict]) -> dict:
        """
        The state that every rank of another number of ranks goes on with: the mean of what the ranks had not sent,
        and what the shards of the mean lost. The mean over the new ranks of what is still to come is what it was.

        Args:
            state_dicts (`list[dict]`): Of all ranks.
        """
        first = state_dicts[0]
        values = {
            name: sum(state["residuals"]["values"][name] for state in state_dicts) / len(state_dicts)
            for name in first["residuals"]["values"]
        }
        for state in state_dicts:
            for name, lost in state["down_residuals"]["values"].items():
                values[name] = values[name] + lost
        return {
            **first,
            "residuals": {**first["residuals"], "values": values},
            "down_residuals": {"groups": [], "values": {}},
        }

    def logs(self) -> dict[str, float]:
        """What travelled since the last call, as numbers for a log: bytes and seconds are those of a step."""
        traffic, world = self.take_traffic(), dist.get_world_size(self.state.group)
        logs = traffic.logs(2 * 2 * (world - 1) / world)  # a ring
        if self.state.nodes is not None:
            logs["grad_bytes_across_nodes"] = traffic.bytes_across / max(traffic.steps, 1)
        if self.config.has_feedback:
            logs |= traffic.feedback_logs()
        return logs

    def reset(self) -> None:
        """Forgets what was not sent."""
        for residuals in (self.state.residuals, self.state.down_residuals):
            residuals.load_state_dict({"groups": [], "values": {}})


def exempt_parameters(model: torch.nn.Module, exempt: list[str]) -> set[str]:
    """
    Names of the parameters that stay in float32.

    Args:
        model (`torch.nn.Module`): The model.
        exempt (`list[str]`): `1d`, `embeddings`, `head`, or parts of names.
    """
    found = set()
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    head = {id(parameter) for parameter in output.parameters()} if output is not None else set()
    for name, parameter in model.named_parameters():
        kinds = {"1d": parameter.dim() < 2, "embeddings": id(parameter) in embeddings, "head": id(parameter) in head}
        if any(kinds[what] if what in kinds else what in name for what in exempt):
            found.add(name)
    return found


def _timeout(group, device: torch.device) -> timedelta | None:
    """How long the collectives of a group wait; None where its backend does not say."""
    options = getattr(group._get_backend(device), "options", None)
    return getattr(options, "_timeout", None)


def compare_over_ranks(config: CompressionConfig, parameters: dict[str, torch.nn.Parameter], group) -> None:
    shapes = [[name, list(parameter.shape)] for name, parameter in parameters.items()]
    settings = config.identity()
    digest = hashlib.sha256(json.dumps([settings, shapes]).encode()).hexdigest()
    everyone: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, (digest, settings), group=group)
    if any(other != digest for other, _ in everyone):
        different = [name for name in settings if any(other[name] != settings[name] for _, other in everyone)]
        shown = {name: [other[name] for _, other in everyone] for name in different}
        raise InputError(f"the ranks disagree about {shown or 'the parameters'}; start all of them with the same")
