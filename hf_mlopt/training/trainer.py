"""One step over `Trainer`: the seams that the methods of this package share."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache

import torch
from torch.distributed.fsdp import StateDictType
from transformers import Trainer

from hf_mlopt.communication.saef import SAEFOptimizer
from hf_mlopt.errors import ConfigurationError
from hf_mlopt.optimizers import DOMO
from hf_mlopt.training.arguments import MLOptTrainingArguments
from hf_mlopt.training.callbacks import EvaluationPointCallback, KeepZerosCallback
from hf_mlopt.training.combinations import refusal
from hf_mlopt.training.compression import CompressionCallback, compression_config
from hf_mlopt.training.local_steps import LocalState, LocalStepsCallback, unwrapped
from hf_mlopt.training.optimizer_table import optimizer_cls_and_kwargs
from hf_mlopt.training.rank_state import RankState, load_rank_state, save_rank_state
from hf_mlopt.training.saef import SAEFCallback
from hf_mlopt.training.silos import keep_whole
from hf_mlopt.training.weights import load_converted_weights


class MLOptTrainer(Trainer):
    """
    `Trainer` with optimizers by name, state that each rank keeps for itself, checkpoints that generate with a cache as
    before, and a resume that restores fused experts.

    Args:
        model (`PreTrainedModel`, *optional*): The model; or pass `model_init`, as to `Trainer`.
        args (`TrainingArguments`, *optional*): With [`MLOptTrainingArguments`], `mlopt_optim` names the optimizer.
        **kwargs: Whatever `Trainer` takes.

    Raises:
        ConfigurationError: If `mlopt_optim` is given and an optimizer is passed as well.
    """

    def __init__(self, model=None, args=None, **kwargs):
        if isinstance(args, MLOptTrainingArguments) and args.mlopt_optim is not None:
            if kwargs.get("optimizer_cls_and_kwargs") or kwargs.get("optimizers", (None, None))[0]:
                raise ConfigurationError("mlopt_optim", args.mlopt_optim, "leave it out when passing an optimizer")
            kwargs["optimizer_cls_and_kwargs"] = optimizer_cls_and_kwargs(
                args.mlopt_optim, args.mlopt_optim_args, args
            )
        self._rank_states: dict[str, RankState] = {}
        self._source_use_cache = _use_cache(model)
        super().__init__(model=model, args=args, **kwargs)
        self._set_up_two_points()
        self._compression = self._set_up_compression()
        self._kept = self._hold_zeros() if getattr(self.args, "keep_zeros", False) else None

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if self._compression is not None and "loss" in logs:
            logs = {**logs, **self._compression.logs()}
        super().log(logs, *args, **kwargs)

    def _set_up_compression(self) -> CompressionCallback | SAEFCallback | None:
        """What codes gradients or updates on their way between ranks."""
        if not isinstance(self.args, MLOptTrainingArguments):
            return None
        config, callback = compression_config(self.args), None
        if issubclass(self._optimizer_class(), SAEFOptimizer):
            callback = SAEFCallback(self)
        elif config is not None and self._has_rounds():  # passed, so that the arguments could not know
            raise refusal("local-steps", "codec", config.grad_codec, optimizer=self._optimizer_class().__name__)
        elif config is not None:
            callback = CompressionCallback(self, config)
        if callback is not None:
            self.register_rank_state(type(callback).rank_state, callback)
            self.add_callback(callback)
        return callback

    def _hold_zeros(self) -> KeepZerosCallback | None:
        """What holds the zeros of the weights that are trained; of adapters none, as those of others are zero."""
        from peft import PeftModel  # takes a second

        if isinstance(self.model, PeftModel):
            from hf_mlopt.training.adapters import mask_adapters

            mask_adapters(self.model)
            return None
        kept = KeepZerosCallback()
        self.add_callback(kept)
        return kept

    def _set_up_two_points(self) -> None:
        """For optimizers that train at one point and are evaluated at another."""
        callbacks = self.callback_handler.callbacks
        if self._has_rounds():
            self.register_rank_state("local_steps", LocalState(self))
            # Right after the one that decides what a step ends with, before those of the user.
            callbacks.insert(1, LocalStepsCallback(self))
        callbacks.insert(2, EvaluationPointCallback())

    def _has_rounds(self) -> bool:
        return issubclass(self._optimizer_class(), DOMO) or getattr(self.args, "local_steps", 1) > 1

    def _optimizer_class(self) -> type:
        """Of the optimizer that was passed, or named; that of all optimizers where Trainer chooses one."""
        if self.optimizer is not None:
            return type(unwrapped(self.optimizer))
        named = self.optimizer_cls_and_kwargs
        return torch.optim.Optimizer if named is None else named[0]

    def get_train_dataloader(self):
        dataloader = super().get_train_dataloader()
        if getattr(self.args, "per_rank_data", False):
            keep_whole(dataloader)
        return dataloader

    def to_evaluation_point(self) -> None:
        """Has the model stand where it is evaluated and saved; the next training step moves it back."""
        switch = getattr(self.optimizer, "eval", None)
        if callable(switch):
            switch()

    def register_rank_state(self, name: str, state: RankState) -> None:
        """
        Has a state saved with every checkpoint, once per rank, and restored bit-exactly on resuming.

        Args:
            name (`str`): Its key in the file.
            state (`RankState`): An object with `state_dict` and `load_state_dict`; its tensors come back on the CPU.

        Raises:
            ValueError: If the name is taken.
        """
        if name in self._rank_states:
            raise ValueError(f"a rank state named {name!r} is registered already")
        self._rank_states[name] = state

    def call_model_init(self, trial=None):
        model = super().call_model_init(trial)
        self._source_use_cache = _use_cache(model)
        return model

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        self.to_evaluation_point()  # a checkpoint comes without an evaluation before it
        # Trainer turns `use_cache` off to train; written to disk, it would slow down every later generation.
        while_training = _use_cache(self.model)
        _set_use_cache(self.model, self._source_use_cache)
        try:
            with nullcontext() if _internal_call else self._in_one_piece():
                super().save_model(output_dir, _internal_call=_internal_call)
        finally:
            _set_use_cache(self.model, while_training)

    @contextmanager
    def _in_one_piece(self) -> Iterator[None]:
        """Where FSDP writes its checkpoints in shards, `Trainer` saves a model as an empty folder."""
        if not self.is_fsdp_enabled:
            yield
            return
        plugin = self.accelerator.state.fsdp_plugin
        as_configured, plugin.state_dict_type = plugin.state_dict_type, StateDictType.FULL_STATE_DICT
        try:
            yield
        finally:
            plugin.state_dict_type = as_configured

    # Trainer calls these two on every rank, with the resolved folder, and not for `save_only_model`. `on_save` would
    # come too late: after the folder is pushed, and never for the checkpoint of a job that is being preempted.
    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        save_rank_state(self._rank_states, output_dir, self.args.process_index, self.args.world_size)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.args.device.type == "cpu":
            _accept_numbered_cpus()
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and getattr(self.args, "reset_local_state", False):
            for state in self._rank_states.values():
                state.reset()
        elif checkpoint is not None:
            load_rank_state(self._rank_states, checkpoint, self.args.process_index, self.args.world_size)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        if self.is_fsdp_enabled or not load_converted_weights(self.model, resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        self.to_evaluation_point()  # where the best weights were, so that nothing moves them afterwards
        is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if is_sharded or not load_converted_weights(self.model, self.state.best_model_checkpoint):
            super()._load_best_model()


@cache
def _accept_numbered_cpus() -> None:
    """Has `torch.load` take `cpu:1`, to which transformers 5.17 maps the optimizer of the second CPU process."""
    torch.serialization.register_package(
        0, lambda storage: None, lambda storage, location: storage if location.startswith("cpu:") else None
    )


def _use_cache(model) -> bool | None:
    return getattr(getattr(model, "config", None), "use_cache", None)


def _set_use_cache(model, value: bool | None) -> None:
    config = getattr(model, "config", None)
    if value is not None:
        config.use_cache = value
    elif hasattr(config, "use_cache"):  # the source had none: Trainer added it
        del config.use_cache
