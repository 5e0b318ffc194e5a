"""Judging a model while it is trained."""

import re
from typing import TYPE_CHECKING

import torch
from transformers import Trainer, TrainerCallback

from hf_mlopt.errors import ConfigurationError, InputError
from hf_mlopt.evaluation import perplexity
from hf_mlopt.evaluation.perplexity import check_windows
from hf_mlopt.evaluation.undisturbed import undisturbed


if TYPE_CHECKING:
    from hf_mlopt.evaluation import LoadedTasks


class EvaluationCallback(TrainerCallback):
    """
    Measures perplexity and lm-eval tasks during training, into the Trainer's own logs. Training goes on as it would
    have without: the same batches, the same dropout, the same weights to the last bit.

    Add it with `trainer.add_callback(EvaluationCallback(trainer, ...))`. Under DDP the processes share the work.

    Args:
        trainer ([`~transformers.Trainer`]): Where it is added; with a tokenizer as `processing_class` for tasks.
        token_ids (`torch.LongTensor`, *optional*): Text for the perplexity, `[tokens]`; logged as `eval_perplexity`
            and `eval_nll`.
        window (`int`, *optional*, defaults to 2048): Tokens per window of it.
        tasks ([`~evaluation.LoadedTasks`], *optional*): Logged as `eval_{task}_{metric}`.
        limit (`float`, *optional*): Only so many documents of each task.
        every (`int`, *optional*): Steps between two measurements. By default whenever the Trainer evaluates; then
            `metric_for_best_model` may name what is measured here.
        batch_size (`int`, *optional*, defaults to 8): Windows or requests per forward pass.

    Raises:
        ConfigurationError: If there is nothing to measure, or the Trainer shards the model (FSDP, DeepSpeed).
    """

    def __init__(
        self,
        trainer: Trainer,
        *,
        token_ids: torch.LongTensor | None = None,
        window: int = 2048,
        tasks: "LoadedTasks | None" = None,
        limit: float | None = None,
        every: int | None = None,
        batch_size: int = 8,
    ):
        if token_ids is None and tasks is None:
            raise ConfigurationError("tasks", None, "give tasks, or token_ids for perplexity")
        if every is not None and every < 1:
            raise ConfigurationError("every", every, "must be at least 1")
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise InputError(
                "EvaluationCallback needs the whole model in every process: evaluate its checkpoints instead"
            )
        if tasks is not None and trainer.processing_class is None:
            raise ConfigurationError("processing_class", None, "tasks need the Trainer to have the tokenizer")
        if token_ids is not None:
            check_windows(len(token_ids), window)
        self.trainer, self.token_ids, self.window, self.every = trainer, token_ids, window, every
        self.tasks, self.limit, self.batch_size = tasks, limit, batch_size

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self.every is not None and state.global_step % self.every == 0:
            self._log(self._measure(model), control)

    def on_evaluate(self, args, state, control, model=None, metrics=None, **kwargs):
        if self.every is None:
            found = self._measure(model)
            if metrics is not None:
                metrics.update(found)  # what the Trainer picks its best model by
            self._log(found, control)

    def _measure(self, model: torch.nn.Module) -> dict[str, float]:
        distributed, found = self.trainer.args.world_size > 1, {}
        with undisturbed(model):
            if self.token_ids is not None:
                result = perplexity(model, self.token_ids, self.window, self.batch_size, distributed=distributed)
                found = {"eval_perplexity": result.perplexity, "eval_nll": result.nll}
            if self.tasks is not None:
                from hf_mlopt.evaluation import evaluate_tasks

                rows = evaluate_tasks(
                    model,
                    self.trainer.processing_class,
                    self.tasks,
                    batch_size=self.batch_size,
                    limit=self.limit,
                    distributed=distributed,
                )
                for row in rows:
                    name = re.sub(r"\W+", "_", f"eval_{row['task']}_{row['metric']}")
                    found[name] = row["value"]
        return found

    def _log(self, found: dict[str, float], control) -> None:
        # Logging clears what the Trainer has set for its own log of this step.
        should_log = control.should_log
        self.trainer.log(found)
        control.should_log = should_log
