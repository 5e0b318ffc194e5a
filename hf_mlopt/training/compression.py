"""Compressed gradients in the Trainer: hook when training begins, state in checkpoints, traffic in the log."""

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback
from transformers.utils import logging

from hf_mlopt.communication.auto_off import Watch
from hf_mlopt.communication.config import CompressionConfig
from hf_mlopt.communication.ddp import Compression, compress
from hf_mlopt.communication.sharded import ShardedCompression, compress_sharded, require_for_shards
from hf_mlopt.errors import ConfigurationError, InputError
from hf_mlopt.training.callbacks import held_zeros
from hf_mlopt.training.combinations import NEEDS_CODEC, refusal
from hf_mlopt.training.optimizer_table import optimizer_entry


if TYPE_CHECKING:
    from hf_mlopt.training.trainer import MLOptTrainer

logger = logging.get_logger(__name__)


def compression_config(args) -> CompressionConfig | None:
    """
    What the arguments ask for; None without `grad_codec`.

    Args:
        args (`MLOptTrainingArguments`): The arguments.

    Raises:
        ConfigurationError: If a field has no codec to act on, or is out of range.
    """
    names = ("grad_codec_down", "error_feedback", "error_average_period", "grad_codec_args", "grad_collective")
    if args.grad_codec is None:
        for name in names:
            if getattr(args, name) not in (None, "none", 0, "auto"):
                raise ConfigurationError(name, getattr(args, name), NEEDS_CODEC)
        return None
    if args.mlopt_optim is not None and optimizer_entry(args.mlopt_optim).exchanges:
        raise refusal("codec", "saef", args.grad_codec)
    if args.mlopt_optim is not None and optimizer_entry(args.mlopt_optim).has_rounds:
        raise refusal("local-steps", "codec", args.grad_codec, optimizer=args.mlopt_optim)
    return CompressionConfig(
        grad_codec=args.grad_codec,
        grad_codec_down=args.grad_codec_down,
        grad_codec_args=args.grad_codec_args or {},
        error_feedback=args.error_feedback,
        collective=args.grad_collective,
        step_ahead=args.step_ahead,
        error_average_period=args.error_average_period,
        warmup_steps_uncompressed=args.warmup_steps_uncompressed,
        min_bytes=args.compress_min_bytes,
        exempt=list(args.compress_exempt),
        seed=args.seed,
    )


class CompressionCallback(TrainerCallback):
    """
    Sets compression up for the model that DDP has wrapped. It is a rank state as well: what a rank has not sent is
    saved with every checkpoint, and comes back bit by bit; for another number of ranks the files are averaged.

    Args:
        trainer (`MLOptTrainer`): The trainer.
        config (`CompressionConfig`): How gradients travel.
    """

    rank_state = "gradient_compression"

    def __init__(self, trainer: "MLOptTrainer", config: CompressionConfig):
        self.trainer, self.config = trainer, config
        self.compression: Compression | ShardedCompression | None = None
        self.watch: Watch | None = None
        self._loaded: dict[str, Any] | None = None
        if trainer.is_deepspeed_enabled:
            allowed = "does not act under DeepSpeed, which has no hook for gradients; take DDP or FSDP"
            raise ConfigurationError("grad_codec", config.grad_codec, allowed)
        if trainer.is_fsdp_enabled:
            require_for_shards(config)
            if trainer.args.keep_zeros and config.has_feedback:
                remedy = "keeps what was not sent in FSDP's own layout, where no mask reaches it; take none, or DDP"
                raise ConfigurationError("error_feedback", config.error_feedback, f"with keep_zeros {remedy}")
        if trainer.args.compress_auto_off and (trainer.is_fsdp_enabled or config.collective == "hierarchical"):
            remedy = "measures the link of DDP's ranks, which are not linked alike here; leave it out"
            raise ConfigurationError("compress_auto_off", True, remedy)

    def on_train_begin(self, args, state, control, **kwargs):
        wrapped = self.trainer.model_wrapped
        if self.trainer.args.world_size == 1:
            logger.warning(f"grad_codec={self.config.grad_codec!r}: one process sends no gradients; nothing is coded.")
        elif self.compression is None or self.compression.model is not wrapped:
            self._begin(wrapped, args.compress_auto_off)
        if self.compression is not None and self._loaded is not None:
            self.compression.load_state_dict(self._loaded)
        self._loaded = None

    def on_epoch_begin(self, args, state, control, **kwargs):
        # By now every callback has seen training begin, in whatever order, and masks have been read off the weights.
        if isinstance(self.compression, Compression):
            held, named = held_zeros(self.trainer), self.compression.model.module.named_parameters()
            self.compression.hold_zeros({name: held[weight] for name, weight in named if weight in held})

    def _begin(self, wrapped, auto_off: bool) -> None:
        if self.trainer.is_fsdp_enabled:
            self.compression = compress_sharded(wrapped, self.config)
            return
        if self.compression is not None:  # training begins again, with the model wrapped anew
            self.watch.close()
            self.compression.detach()
        self.compression = compress(wrapped, self.trainer.optimizer, self.config)
        self.watch = Watch(self.compression, auto_off)

    def logs(self) -> dict[str, float]:
        """What travelled since the last log line."""
        if self.compression is None:
            return {}
        return self.compression.logs()

    def state_dict(self) -> dict[str, Any]:
        return self.compression.state_dict() if self.compression is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict or None  # DDP is there, and the hook, when training begins

    def merge(self, state_dicts: list[dict[str, Any]]) -> dict[str, Any]:
        """One state out of those of all ranks of a run with another number of them."""
        written = [state for state in state_dicts if state]  # one process writes none
        if written and "units" in written[0]:
            raise InputError(
                f"what {len(written)} ranks have not sent under FSDP lies in shards and cannot be divided among "
                "another number; begin it afresh with reset_local_state"
            )
        return Compression.merged(written) if written else {}

    def reset(self) -> None:
        self._loaded = None
        if self.compression is not None:
            self.compression.reset()
