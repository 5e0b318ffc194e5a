"""`PipelineTrainer`: a Trainer whose model is cut into blocks, one a process, that train with stale parameters."""

import atexit
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel
from transformers.trainer_utils import EvalLoopOutput, IntervalStrategy, SaveStrategy, get_last_checkpoint
from transformers.utils import logging

from hf_mlopt.communication.ddp import exempt_parameters
from hf_mlopt.errors import ConfigurationError, InputError
from hf_mlopt.pipeline.arguments import PipelineTrainingArguments, pipeline_config
from hf_mlopt.pipeline.assembly import FILE_NAME, Assembly, assemble, batch_shape_of, read_assembly
from hf_mlopt.pipeline.partition import merged_state_dict, num_layers, split
from hf_mlopt.pipeline.replay import require_replay
from hf_mlopt.pipeline.replicas import ReplicaMean
from hf_mlopt.pipeline.schedule import SYNCHRONOUS, parse
from hf_mlopt.pipeline.stand_ins import Shown, StageModel
from hf_mlopt.pipeline.telemetry import slow_stage
from hf_mlopt.pipeline.transport.base import Channels
from hf_mlopt.pipeline.transport.distributed import distributed_channels
from hf_mlopt.pipeline.updating import Update
from hf_mlopt.pipeline.worker import Worker
from hf_mlopt.training.combinations import STEP_AHEAD_IN_STAGES
from hf_mlopt.training.compression import compression_config
from hf_mlopt.training.rank_state import load_rank_state, save_rank_state
from hf_mlopt.training.trainer import MLOptTrainer


logger = logging.get_logger(__name__)


class PipelineTrainer(MLOptTrainer):
    """
    `Trainer` over several processes, each of which trains some consecutive layers of the model
    ([DSP](https://huggingface.co/papers/1909.02625) and its relatives). Callbacks, logging, evaluation and checkpoints
    are those of a Trainer; a checkpoint holds the whole model, as `from_pretrained` takes it.

    ```python
    args = PipelineTrainingArguments("out", pipeline="lag1", gradient_accumulation_steps=4)
    PipelineTrainer(model, args, train_dataset=data).train()  # under accelerate launch, a process for each stage
    ```

    Args:
        model (`PreTrainedModel`): The whole model, the same on all ranks; each keeps its block when training begins.
        args ([`PipelineTrainingArguments`]): With `pipeline`.
        **kwargs: What [`MLOptTrainer`] takes.

    Raises:
        ConfigurationError: For a model that cannot be cut, or what does not go with stages.
    """

    def __init__(self, model: PreTrainedModel, args: PipelineTrainingArguments, **kwargs):
        if getattr(args, "pipeline", None) is None:
            raise ConfigurationError("pipeline", None, "is needed, such as lag1, dsp or auto")
        for name in ("model_init", "compute_loss_func"):
            if kwargs.get(name) is not None:
                raise ConfigurationError(name, kwargs[name], "does not go with stages, which hold parts of a model")
        layers = num_layers(model)
        if args.stages > layers:
            raise ConfigurationError("stages", args.stages, f"the model has {layers} layers: take at most as many")
        self.stage, self.replica = args.process_index % args.stages, args.process_index // args.stages
        self.num_replicas = args.world_size // args.stages
        self.worker: Worker | None = None
        self.replicas: ReplicaMean | None = None
        self.assembly: Assembly | None = None
        self._grad_norm = 0.0
        super().__init__(model, args, **kwargs)
        self._set_signature_columns_if_needed()  # of the whole model
        self._whole = model
        self._groups = _make_groups(args.stages, self.num_replicas)
        self.register_rank_state("pipeline", _StageState(self))

    def close(self) -> None:
        """Ends the connections between stages, which all ranks do after their last training or evaluation."""
        if isinstance(self.worker, Worker):
            self.worker.channels.close()

    @property
    def is_last_stage(self) -> bool:
        return self.stage == self.args.stages - 1

    # Before training: every rank cuts the model and keeps its block.

    def train(self, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None):
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise InputError(f"resume_from_checkpoint=True: {self.args.output_dir!r} holds no checkpoint")
        self._assemble(resume_from_checkpoint or None)
        return super().train(resume_from_checkpoint or None, trial, ignore_keys_for_eval)

    def _assemble(self, checkpoint: str | None = None) -> None:
        if self.worker is not None or isinstance(self.model, StageModel):
            return
        args, model = self.args, self._whole
        config = pipeline_config(args)
        if checkpoint is not None:
            self.assembly = read_assembly(checkpoint, args)
        else:
            shape = batch_shape_of(self.train_dataset, args, model)
            self.assembly = assemble(model, config, args.pipeline_bounds, shape)
        blocks = split(model, self.assembly.bounds, moe_aux=config.moe_aux, tied=config.tied)
        if config.recompute != "no" and self.assembly.mode not in SYNCHRONOUS:
            model.train()
            require_replay(model, blocks)
        block = blocks[self.stage].to(args.device)
        block.train()
        self.config = pipeline_config(args, self.assembly.mode)
        self.model = self.model_wrapped = StageModel(block, model.num_parameters(), model.main_input_name)
        self._model_class, self._whole = type(model), None
        self.callback_handler.model = self.model

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        accelerator = self.accelerator
        # Stages are no replicas: nothing is wrapped in DDP, and nothing is gathered over them.
        prepare_model = accelerator.prepare_model
        accelerator.prepare_model = lambda model, **_: prepare_model(model, evaluation_mode=True)
        accelerator.gather_for_metrics = accelerator.pad_across_processes = _as_it_is
        self.gather_function = _as_it_is

    def _move_model_to_device(self, model, device):
        if isinstance(model, StageModel):
            super()._move_model_to_device(model, device)

    def _set_up_compression(self):
        config = compression_config(self.args)
        if config is None:
            return None
        if self.num_replicas == 1:
            raise ConfigurationError("grad_codec", config.grad_codec, "codes gradients between replicas: there is one")
        if config.error_feedback == "step-ahead":
            raise ConfigurationError("error_feedback", config.error_feedback, STEP_AHEAD_IN_STAGES)
        refused = {
            "grad_collective": (config.collective, "auto"),
            "error_average_period": (config.error_average_period, 0),
            "compress_auto_off": (self.args.compress_auto_off, False),
        }
        for name, (value, unset) in refused.items():
            if value != unset:
                raise ConfigurationError(name, value, "has no effect between replicas of a pipeline; leave it out")
        return None  # the worker's mean over replicas codes them

    # Data: the stages of a replica read the same batches.

    def _as_replica(self, dataloader):
        if dataloader.batch_sampler is None:
            raise ConfigurationError("train_dataset", None, "needs a length: stages count batches")
        return _shared_by(dataloader, self.num_replicas, self.replica)

    def get_train_dataloader(self):
        return self._as_replica(super().get_train_dataloader())

    def get_eval_dataloader(self, eval_dataset=None):
        return _shared_by(super().get_eval_dataloader(eval_dataset), 1, 0)

    def get_test_dataloader(self, test_dataset):
        return _shared_by(super().get_test_dataloader(test_dataset), 1, 0)

    def get_total_train_batch_size(self, args) -> int:
        return super().get_total_train_batch_size(args) // args.stages

    def _get_num_items_in_batch(self, batch_samples, device):
        count = super()._get_num_items_in_batch(batch_samples, device)
        if count is not None and self.num_replicas > 1:
            count = torch.as_tensor(count, device=device)
            dist.all_reduce(count, group=self._groups["replicas"])
        return count

    # The optimizer and the schedule of learning rates are the worker's, which steps them when a group is complete.

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            self.optimizer = Shown(super().create_optimizer())
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        if self.lr_scheduler is None:
            own = super().create_scheduler(num_training_steps, self.optimizer.inner)
            self._make_worker(own)
            self.lr_scheduler = Shown(own)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _make_worker(self, scheduler) -> None:
        args, block = self.args, self.model.block
        self.close()  # of a training, or an evaluation, before
        before_step = None
        if self.num_replicas > 1:
            config = compression_config(args)
            is_sum = self.model_accepts_loss_kwargs
            exempt = exempt_parameters(block.shell, config.exempt) if config is not None else ()
            self.replicas = before_step = ReplicaMean(block, self._groups["replicas"], is_sum, config, exempt)
        settings = {
            "config": self.config, "scheduler": scheduler, "before_step": before_step,
            "context": self.accelerator.autocast, "period": self._batches_of_epoch,
            "on_update": self._note_update,
        }  # fmt: skip
        if self.config.mode in SYNCHRONOUS:
            from hf_mlopt.pipeline.torch_pp import SynchronousWorker

            self.worker = SynchronousWorker(
                block, self.stage, args.stages, self.config.mode, self.optimizer.inner,
                ranks=self._ranks_of_pipe, device=args.device, **settings,
            )  # fmt: skip
            return
        schedule = parse(self.config.mode, args.stages)
        if args.stages == 1:
            channels = Channels()
        else:
            channels = distributed_channels(
                schedule, ranks=self._ranks_of_pipe, transport=self.config.transport, device=args.device,
                timeout=args.pipeline_timeout, free=self.config.queue == "free", tied=block.tied is not None,
                pauses=True,
            )  # fmt: skip
        self.worker = Worker(block, self.stage, args.stages, schedule, self.optimizer.inner, channels, **settings)
        atexit.register(channels.close)  # threads that outlive the interpreter would abort it

    def _note_update(self, update: Update) -> None:
        self._grad_norm = update.grad_norm

    @property
    def _ranks_of_pipe(self) -> list[int]:
        first = self.replica * self.args.stages
        return list(range(first, first + self.args.stages))

    def set_initial_training_values(self, args, dataloader):
        self._batches_of_epoch = len(dataloader)
        return super().set_initial_training_values(args, dataloader)

    # One local step a batch.

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        model.train()
        switch = getattr(self.optimizer, "train", None)
        if callable(switch):  # back from where it is evaluated, as Trainer does
            switch()
        batch = dict(self._prepare_inputs(inputs))
        counts = num_items_in_batch is not None and self.model_accepts_loss_kwargs
        batch["num_items_in_batch"] = num_items_in_batch if counts else None
        ends = self.accelerator.sync_gradients and self._empties_after(self.state.global_step + 1)
        loss = self.worker.advance(batch, is_last=ends)
        # Trainer logs the mean over all processes, of which one in each replica has a loss.
        factor = self.args.stages * (self.num_replicas if counts else 1)
        return torch.tensor((loss or 0.0) * factor, device=self.args.device)

    def _clip_grad_norm(self, model) -> None:
        """Nothing: the worker clips when a group is complete."""

    def _get_grad_norm(self, model, grad_norm=None) -> None:
        """None: each stage has one, see the telemetry."""

    def _empties_after(self, step: int) -> bool:
        """Whether it is known that the pipeline is emptied after this update."""
        args, state = self.args, self.state
        per_epoch = -(-self._batches_of_epoch // args.gradient_accumulation_steps)
        ends_epoch = step % per_epoch == 0

        def is_due(strategy, steps: int) -> bool:
            if strategy in (IntervalStrategy.STEPS, SaveStrategy.STEPS):
                return step % steps == 0
            return strategy in (IntervalStrategy.EPOCH, SaveStrategy.EPOCH) and ends_epoch

        saves = args.pipeline_drain and is_due(args.save_strategy, state.save_steps)
        return step >= state.max_steps or is_due(args.eval_strategy, state.eval_steps) or saves

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if self.worker is not None and "loss" in logs:
            logs = {**logs, **self._telemetry()}
        super().log(logs, *args, **kwargs)

    def _telemetry(self) -> dict[str, float]:
        """Of every stage: the part of its time that it waited, its mean version lag, the norm of its last gradient."""
        summary = self.worker.telemetry.summary()
        known = getattr(self, "_seconds_before", {})
        spent = {name: value - known.get(name, 0.0) for name, value in summary.items() if name.startswith("seconds")}
        self._seconds_before = {**known, **{name: summary[name] for name in spent}}
        own = {
            "wait": spent["seconds_wait"] / max(sum(spent.values()), 1e-9),
            "lag": summary.get("mean_lag", 0.0),
            "grad_norm": self._grad_norm,
        }
        everyone: list = [own] * self.args.stages
        if self.args.stages > 1:
            dist.all_gather_object(everyone, own, group=self._groups["pipe"])
        slowest = slow_stage([stage["wait"] for stage in everyone])
        if slowest is not None and self.config.mode not in SYNCHRONOUS and self.args.process_index == 0:
            first, last = self.assembly.bounds[slowest : slowest + 2]
            logger.warning_once(
                f"stage {slowest} (layers {first} to {last - 1}) is busy while the others wait a third of their time "
                "or more: give it fewer layers with pipeline_bounds"
            )
        return {f"stage_{k}_{name}": value for k, stage in enumerate(everyone) for name, value in stage.items()}

    def timeline(self) -> list[list[tuple]]:
        """Of every stage of this replica, what it did last: start, end (seconds), kind and batch; for all ranks."""
        own = [tuple(event) for event in self.worker.telemetry.events]
        everyone: list = [own] * self.args.stages
        if self.args.stages > 1:
            dist.all_gather_object(everyone, own, group=self._groups["pipe"])
        return everyone

    # Evaluation: batches go forward through an empty pipeline; the last stage has the results, and tells them.

    def _drain(self) -> None:
        if self.worker is not None:
            self.worker.drain()

    def evaluation_loop(self, dataloader, description, *args, **kwargs) -> EvalLoopOutput:
        self._assemble()
        if self.worker is None:  # nothing was trained: a schedule for what only goes forward
            self.create_optimizer()
            self._batches_of_epoch = len(dataloader)
            self.create_scheduler(1)
        self._drain()
        output = super().evaluation_loop(dataloader, description, *args, **kwargs)
        shared = [output]
        if self.args.stages > 1:
            dist.broadcast_object_list(shared, group_src=self.args.stages - 1, group=self._groups["pipe"])
        return shared[0]

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        batch = dict(self._prepare_inputs(inputs))
        labels = batch.get(self.label_names[0]) if self.label_names else None
        if self.model_accepts_loss_kwargs:  # as Trainer counts, which for some models is not what the loss is over
            batch["num_items_in_batch"] = super()._get_num_items_in_batch([batch], self.args.device)
        outputs = next(iter(self.worker.evaluate(lambda n: batch, 1)))
        if not self.is_last_stage:
            return None, None, None
        loss, *rest = outputs
        if prediction_loss_only or not rest:
            return loss, None, None
        return loss, rest[0], labels

    # Checkpoints: the whole model by the first rank, and what each stage needs to go on by itself.

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.worker is None:
            return super().save_model(output_dir, _internal_call)
        if self.args.pipeline_drain or not _internal_call:
            self._drain()
        self.to_evaluation_point()
        own = {name: value.cpu() for name, value in self.model.block.state_dict().items()}
        states: list = [own] * self.args.stages
        if self.replica == 0 and self.args.stages > 1:
            dist.gather_object(own, states if self.stage == 0 else None, group_dst=0, group=self._groups["pipe"])
        if self.args.should_save:
            output_dir = output_dir or self.args.output_dir
            self._write_whole(output_dir, merged_state_dict(states, self.model.block.tied))
            path = Path(output_dir) / FILE_NAME
            path.write_text(json.dumps(self.assembly.to_dict(), indent=1) + "\n", encoding="utf-8")
            if self.args.push_to_hub and not _internal_call:
                self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _write_whole(self, output_dir: str, state_dict: dict) -> None:
        stage_model = self.model
        with torch.device("meta"):
            self.model = self._model_class(stage_model.config)
        if self._source_use_cache is not None:
            self.model.config.use_cache = self._source_use_cache
        try:
            self._save(output_dir, state_dict=state_dict)
        finally:
            self.model = stage_model

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.args.pipeline_drain:
            self.worker.hold()
        save_rank_state(self._rank_states, output_dir, self.args.process_index, self.args.world_size)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_rank_state(self._rank_states, checkpoint, self.args.process_index, self.args.world_size)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        """Nothing: a stage's state has its block."""


class _StageState:
    """What a rank keeps for itself: its worker, and what its replica has not sent."""

    def __init__(self, trainer: PipelineTrainer):
        self.trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        replicas = self.trainer.replicas
        return {
            "worker": self.trainer.worker.state_dict(),
            "replicas": replicas.state_dict() if replicas is not None else None,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.trainer.worker.load_state_dict(state_dict["worker"])
        if self.trainer.replicas is not None:
            self.trainer.replicas.load_state_dict(state_dict["replicas"])

    def reset(self) -> None:
        """Nothing that could begin afresh: without its stages' states a checkpoint is a model to train from."""


def _make_groups(stages: int, replicas: int) -> dict[str, Any]:
    """This rank's pipeline, and the ranks that hold the same block; all ranks make all groups."""
    if stages * replicas == 1:
        return {"pipe": None, "replicas": None}
    rank, found = dist.get_rank(), {}
    parts = [("pipe", range(first, first + stages)) for first in range(0, stages * replicas, stages)]
    parts += [("replicas", range(stage, stages * replicas, stages)) for stage in range(stages)]
    for kind, ranks in parts:
        group = dist.new_group(list(ranks))
        if rank in ranks:
            found[kind] = group
    return found


def _shared_by(dataloader, replicas: int, replica: int):
    """With accelerate's division over processes undone: batches are divided over replicas."""
    sampler = dataloader.batch_sampler
    if hasattr(sampler, "num_processes"):  # absent in a single process
        sampler.num_processes, sampler.process_index = replicas, replica
        sampler.even_batches = replicas > 1  # else the last batch would be filled up with the first rows
    return dataloader


def _as_it_is(data, *args, **kwargs):
    return data
