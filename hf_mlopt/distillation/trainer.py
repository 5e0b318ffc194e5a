"""Distils a pruned mixture of experts, expert by expert, from the model it was pruned from."""

# T tokens   H hidden   K experts per token   V vocabulary   E experts   L layers

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from transformers import PreTrainedModel, set_seed
from transformers.utils import logging

from hf_mlopt.distillation.arguments import DistillationArguments
from hf_mlopt.distillation.compatibility import check_pair, require_supported, require_zeros
from hf_mlopt.distillation.lora import add_masked_lora, count_revived
from hf_mlopt.distillation.losses import expert_mse, expert_squared_error, logit_divergence, tokens_per_expert
from hf_mlopt.distillation.running_means import RunningMeans
from hf_mlopt.distillation.stored import StoredTargets
from hf_mlopt.distillation.teacher import ModelTeacher, Targets
from hf_mlopt.errors import ConfigurationError, InputError
from hf_mlopt.evaluation.undisturbed import undisturbed
from hf_mlopt.moe import moe_layers
from hf_mlopt.moe.expert_outputs import receive_expert_outputs, require_fused
from hf_mlopt.moe.layers import text_config
from hf_mlopt.training import MLOptTrainer


logger = logging.get_logger(__name__)

_STATE = "distillation.json"  # of a training checkpoint
_TARGETS = "hf_mlopt_targets"  # key under which a batch carries what the teacher made of it


class ExpertDistillationTrainer(MLOptTrainer):
    r"""
    Trains a pruned student on L = L_CE + lmbda * sum over layers, sum over experts, MSE(E_teacher(x), E_student(x)),
    Eq. (10) of [MoE-Pruner](https://huggingface.co/papers/2410.12013), with its zeros held.

    Student and teacher each run on their own hidden states. The experts compared are those the teacher's router chose;
    cross-entropy follows the student's own routing. The error of an expert is averaged over all tokens it was sent in
    one optimizer step, whatever micro-batch and rank they were in. The load-balancing loss is the mean of those of the
    micro-batches. `eval_loss` is cross-entropy alone. Rows that fill up the last evaluation batch of several processes
    count in `eval_expert_mse`.

    Args:
        model ([`~transformers.PreTrainedModel`]): The student.
        teacher ([`~transformers.PreTrainedModel`], *optional*): The model it was pruned from, its [`StoredTargets`],
            or anything else with `targets(inputs)`. Needed unless `lmbda` and `logit_weight` are 0.
        args ([`DistillationArguments`]): With the weights of the losses.
        **kwargs: Whatever [`MLOptTrainer`] takes.

    Raises:
        InputError: If student and teacher do not fit, or the student has no zeros.
    """

    def __init__(self, model: PreTrainedModel, teacher=None, args: DistillationArguments | None = None, **kwargs):
        args = args or DistillationArguments()
        if not isinstance(args, DistillationArguments):
            raise ConfigurationError("args", type(args).__name__, "must be DistillationArguments")
        self._layers = moe_layers(model)
        require_fused(self._layers)
        self._needs_experts, self._needs_logits = args.lmbda != 0, args.logit_weight > 0
        if teacher is None and (self._needs_experts or self._needs_logits):
            raise ConfigurationError("teacher", None, "is needed unless lmbda and logit_weight are 0")
        if teacher is model:
            raise InputError("teacher: is the student itself, which will change; load the model a second time")
        if isinstance(teacher, PreTrainedModel):
            check_pair(model, teacher)
            teacher = ModelTeacher(teacher, self._needs_experts, self._needs_logits)
        elif isinstance(teacher, StoredTargets):
            if self._needs_logits:
                raise ConfigurationError("logit_weight", args.logit_weight, "must be 0: stored targets hold no logits")
            teacher.check(model, {name: kwargs.get(name) for name in ("train_dataset", "eval_dataset")})
        if not args.allow_dense:
            require_zeros(self._layers)
        if args.freeze_router:
            for layer in self._layers:
                layer.router.requires_grad_(False)
        config = text_config(model)
        self._hidden_size, self._vocab_size = config.hidden_size, config.vocab_size
        self._aux_coefficient = getattr(config, "router_aux_loss_coef", 0.0) if args.router_aux_loss else 0.0
        self.teacher, self.lmbda = teacher, args.lmbda
        self.seconds_before, self._started = 0.0, time.perf_counter()
        self._means, self._eval_errors = RunningMeans(), RunningMeans()
        self._tokens_LE: torch.Tensor | None = None
        if args.lora_rank is not None:
            set_seed(args.seed)  # as Trainer does, but before the adapters are made
            model = add_masked_lora(model, args.lora_rank, args.lora_alpha)
        super().__init__(model=model, args=args, **kwargs)
        require_supported(self.accelerator.state, self.args.n_gpu)
        self.loss_is_scaled_for_ga = True  # every term is divided by its count over the accumulated batch
        self.model_accepts_loss_kwargs = True  # has Trainer count the predicted tokens
        self._place_teacher()

    def _place_teacher(self) -> None:
        model = getattr(self.teacher, "model", None)
        if model is None:
            return
        if self.is_fsdp_enabled:  # a whole replica on every rank is what sharding the student avoids
            from accelerate.utils.fsdp_utils import fsdp2_prepare_model

            self.teacher.model = fsdp2_prepare_model(self.accelerator, model)
        else:
            model.to(self.args.device)

    # Targets of all micro-batches come before the first is trained on: an expert's error is divided by its tokens in
    # all of them, and those are known when the teacher has routed them.
    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, num_items
        if num_items is None:
            raise InputError("train_dataset: its batches have no labels; use a collator that makes them")
        self._micro_batches = len(batches)
        self._means.begin_step()
        if self._needs_experts or self._needs_logits:
            for batch in batches:
                batch[_TARGETS] = self._targets_of(batch)
        if self._needs_experts:
            self._tokens_LE = self._summed(sum(self._tokens_of(batch) for batch in batches))
            if self.lmbda is None:
                self.lmbda = self._first_ratio(batches, num_items)
        return batches, num_items

    def _targets_of(self, batch) -> Targets:
        # As precisely as the student, whose forward accelerate wraps; FSDP casts the weights of both instead.
        with nullcontext() if self.is_fsdp_enabled else self.accelerator.autocast():
            return self.teacher.targets(self._prepare_inputs(batch))

    def _tokens_of(self, batch) -> torch.Tensor:
        """Tokens the teacher sent to each expert, `[layers, experts]`."""
        index_TK, mask_T = batch[_TARGETS].index_TK, _token_mask(batch)
        rows = [tokens_per_expert(index_TK[layer.index], layer.num_experts, mask_T) for layer in self._layers]
        return torch.stack(rows)

    def _summed(self, value: torch.Tensor) -> torch.Tensor:
        """The sum over ranks."""
        return self.accelerator.reduce(value.to(self.args.device), reduction="sum")

    @torch.no_grad()
    def _first_ratio(self, batches, num_items) -> float:
        """`lmbda` of the paper: cross-entropy over expert error before the first step, on all of its batches."""
        means = RunningMeans()
        self.model_wrapped.eval()
        for batch in batches:
            inputs = self._prepare_inputs(batch)
            with self._errors_of_experts(inputs) as errors, self.compute_loss_context_manager():
                self._loss(self.model_wrapped, inputs, num_items, errors, means)
        self.model_wrapped.train()
        values = means.read(self._summed)
        error = sum(values["expert_mse"])
        if error == 0:
            logger.warning("The student's experts give what the teacher's give: there is nothing to distil.")
            return 0.0
        return values["ce"] / error

    @contextmanager
    def _errors_of_experts(self, inputs) -> Iterator[dict[int, torch.Tensor]]:
        """Collects the student's squared errors in forward passes inside: index of the layer to `[experts]`."""
        errors: dict[int, torch.Tensor] = {}
        targets, mask_T = inputs[_TARGETS], _token_mask(inputs)

        def receive(layer, index_TK, output_TKH):
            target_TKH = targets.output_TKH[layer.index]
            error_E = expert_squared_error(output_TKH, target_TKH, index_TK, layer.num_experts, mask_T)
            errors.setdefault(layer.index, error_E)  # gradient checkpointing comes by a second time

        with receive_expert_outputs(self._layers, receive, instead=targets.index_TK):
            yield errors

    def training_step(self, model, inputs, num_items_in_batch=None):
        # Around the backward pass too, in which gradient checkpointing runs the layers again.
        with self._errors_of_experts(inputs) if self._needs_experts else nullcontext({}) as self._errors:
            loss = super().training_step(model, inputs, num_items_in_batch)
        # May be gigabytes, and Trainer keeps its batches until it has those of the next step.
        inputs.pop(_TARGETS, None)
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if model.training:
            loss, outputs = self._loss(model, inputs, num_items_in_batch, self._errors, self._means)
        else:
            loss, outputs = self._evaluation_loss(model, inputs)
        return (loss, outputs) if return_outputs else loss

    def _loss(self, model, inputs, num_items, errors, means):
        """
        The loss of one micro-batch, times the number of ranks where it is a share of a sum, as DDP and FSDP average.
        Its parts are added to `means`.
        """
        inputs, ranks = dict(inputs), self.accelerator.num_processes
        targets, labels = inputs.pop(_TARGETS, None), inputs.pop("labels")
        if self._aux_coefficient:
            inputs["output_router_logits"] = True
        outputs = model(**inputs)
        if self._aux_coefficient and not torch.is_tensor(outputs.aux_loss):
            logger.warning(
                "The student gives no load-balancing loss in this version of transformers: trained without."
            )
            self._aux_coefficient = 0.0
        share = self._cross_entropy(model, outputs.logits, labels, num_items)
        means.add("ce", share)
        if errors:
            error_LE = torch.stack([errors[layer.index] for layer in self._layers])
            mse_L = expert_mse(error_LE, self._tokens_LE, self._hidden_size).sum(dim=1)
            means.add("expert_mse", mse_L)
            share = share + (self.lmbda or 0.0) * mse_L.sum()
        if self._needs_logits:
            student_TV, teacher_TV = (logits[:, :-1].flatten(0, 1) for logits in (outputs.logits, targets.logits_BSV))
            labels_T, temperature = labels[:, 1:].flatten(), self.args.temperature
            divergence = logit_divergence(student_TV, teacher_TV, labels_T, temperature) / num_items
            means.add("logit_kl", divergence)
            share = share + self.args.logit_weight * divergence
        loss = share * ranks
        if self._aux_coefficient:
            aux_loss = outputs.aux_loss / self._micro_batches
            means.add("aux_loss", aux_loss / ranks)
            loss = loss + self._aux_coefficient * aux_loss
        return loss, outputs

    def _cross_entropy(self, model, logits, labels, num_items=None) -> torch.Tensor:
        loss_function = self.accelerator.unwrap_model(model).loss_function
        return loss_function(logits, labels, self._vocab_size, num_items_in_batch=num_items)

    def _evaluation_loss(self, model, inputs):
        labels = inputs["labels"]
        if not self._needs_experts:
            outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
            return self._cross_entropy(model, outputs.logits, labels), outputs
        inputs = {**inputs, _TARGETS: self._targets_of(inputs)}
        with self._errors_of_experts(inputs) as errors:
            outputs = model(**{name: value for name, value in inputs.items() if name not in (_TARGETS, "labels")})
        self._eval_errors.add("error", torch.stack([errors[layer.index] for layer in self._layers]))
        self._eval_errors.add("tokens", self._tokens_of(inputs))
        return self._cross_entropy(model, outputs.logits, labels), outputs

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        with undisturbed(self.model):  # a DataLoader draws a seed even if nothing is shuffled
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        sums = self._eval_errors.read(self._summed)
        if sums:
            error_LE, tokens_LE = (torch.tensor(sums[name], dtype=torch.float64) for name in ("error", "tokens"))
            mse_LE = expert_mse(error_LE, tokens_LE, self._hidden_size)
            output.metrics[f"{metric_key_prefix}_expert_mse"] = mse_LE.sum().item()
        return output

    def log(self, logs, start_time=None):
        if "loss" in logs:
            logs.update(self._read_means())
        super().log(logs, start_time)

    def _read_means(self) -> dict[str, float]:
        values = self._means.read(self._summed)
        for layer, value in zip(self._layers, values.get("expert_mse", []), strict=False):
            values[f"expert_mse_layer_{layer.index}"] = value
        if self._needs_experts:
            values |= {"expert_mse": sum(values["expert_mse"]), "lmbda": self.lmbda}
        revived = self._kept.violations() if self._kept is not None else count_revived(self.model)
        violations = torch.tensor(revived, device=self.args.device)
        return values | {"mask_violations": int(self._summed(violations))}

    # What `lmbda` was found to be at the first step belongs to the run; so does the time it has taken.
    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            state = {"lmbda": self.lmbda, "seconds": self.seconds_before + time.perf_counter() - self._started}
            (Path(output_dir) / _STATE).write_text(json.dumps(state) + "\n", encoding="utf-8")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and (Path(checkpoint) / _STATE).is_file():
            state = json.loads((Path(checkpoint) / _STATE).read_text(encoding="utf-8"))
            self.seconds_before = state["seconds"]
            if self.args.lmbda is None:
                self.lmbda = state["lmbda"]


def _token_mask(inputs) -> torch.Tensor | None:
    """False where padding, `[tokens]`; None if there can be none."""
    mask_BS = inputs.get("attention_mask")
    return None if mask_BS is None else mask_BS.reshape(-1).bool()
