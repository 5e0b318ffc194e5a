"""
Layer-wise distillation: one decoder layer of the teacher and one of the student at a time. The teacher's layer is run
on the teacher's states, the student's experts learn to give what the teacher's give there, and the teacher's outputs
are the states of the next layer, so that no error of an earlier layer is carried on.
"""

# N windows   S sequence   H hidden   K experts per token

import math
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers.utils import logging

from hf_mlopt import ranks
from hf_mlopt.distillation.compatibility import check_pair, require_zeros
from hf_mlopt.distillation.config import LayerwiseConfig
from hf_mlopt.distillation.expert_inputs import ExpertInputs, ExpertInputsOnDisk
from hf_mlopt.distillation.expert_training import ExpertWeights, measure, train, window_batches
from hf_mlopt.distillation.report import DistillationReport, DistilledLayer
from hf_mlopt.errors import ConfigurationError, InputError
from hf_mlopt.moe import MoELayer, decoder_layers, moe_layers
from hf_mlopt.moe.layers import text_config
from hf_mlopt.moe.observation import SeenEnough
from hf_mlopt.pruning.batches import as_batches
from hf_mlopt.pruning.pruner import first_states, peak_memory, refuse_offloaded
from hf_mlopt.pruning.states import LayerCalls
from hf_mlopt.pruning.sweep import InMemory, Journal, LayerSource, device_of
from hf_mlopt.pruning.validation import check_finite_weights, is_finite


logger = logging.get_logger(__name__)

LAYERWISE_FORMAT = 1  # raised when the same recipe would give other weights

_HOST = torch.device("cpu")  # where states are: on the device they would take the room of the optimizer
_MEASURED = 16  # windows trained on that errors are measured on, where there are no held-out ones to match


def distill_layerwise(
    student: nn.Module,
    teacher: nn.Module,
    token_ids: torch.Tensor,
    config: LayerwiseConfig,
    *,
    eval_samples: int = 0,
    logging_steps: int = 10,
    allow_dense: bool = False,
    device=None,
    progress: bool = True,
    sources: tuple[LayerSource, LayerSource] | None = None,
    journal: Journal | None = None,
    inputs: ExpertInputs | ExpertInputsOnDisk | None = None,
) -> DistillationReport:
    """
    Trains the experts of `student`, in place, to give what those of `teacher` give. Zeros of the student stay zero,
    and nothing but its experts changes. A layer that training made worse on the held-out windows is left as it was.

    Args:
        student (`PreTrainedModel`), teacher (`PreTrainedModel`): A pruned model, and the one it was pruned from.
        token_ids (`torch.LongTensor`): `[windows, length]`, without padding.
        config (`LayerwiseConfig`): How the layers are trained.
        eval_samples (`int`, *optional*, defaults to 0): The last so many windows are held out. Errors are reported on
            them and on as many of the others, before and after.
        logging_steps (`int`, *optional*, defaults to 10): Steps between two entries of a layer's curve.
        allow_dense (`bool`, *optional*, defaults to `False`): Whether a student without zeros is accepted.
        device (`str` or `torch.device`, *optional*): Where layers are run and trained, one at a time; the student's
            own device by default. `sources` have their own.
        progress (`bool`, *optional*, defaults to `True`): Whether to show a bar over the layers.
        sources (`tuple[LayerSource, LayerSource]`, *optional*): Where the layers of student and teacher are, if not
            in the models.
        journal (`Journal`, *optional*): Notes what is done and knows what was; its reports are `DistilledLayer`s.
        inputs (`ExpertInputs`, *optional*): Where the experts' inputs of a layer are kept; in memory by default.

    Returns:
        `DistillationReport`: What was done, without provenance.

    Raises:
        InputError: If the models do not fit each other, the student has no zeros, or a layer's output is not finite.
    """
    started = time.perf_counter()
    done_before = sum(layer.seconds for layer in journal.reports) if journal is not None else 0.0
    check_pair(student, teacher)
    if ranks.world_size() > 1:
        raise InputError("layer-wise distillation runs in one process; start it without accelerate launch or torchrun")
    num_train = _num_train(token_ids, eval_samples)
    batches = as_batches(token_ids, config.batch_size, text_config(teacher))
    length = _common_length(batches)
    if sources is None:
        device = torch.device(device) if device is not None else device_of(student)
        sources = _in_memory(student, device), _in_memory(teacher, device)
    if sources[0].device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(sources[0].device)
    if not allow_dense and not (journal is not None and journal.reports):
        _require_zeros(sources[0])
    inputs = inputs if inputs is not None else ExpertInputs(len(token_ids))
    layers = decoder_layers(teacher, moe_layers(teacher))[1]
    with _evaluating(student), _evaluating(teacher), closing(inputs):
        states, calls = first_states(teacher, layers, batches, _HOST, sources[1], journal)
        bar = partial(tqdm, desc="distilling", unit="layer", total=len(layers), disable=None if progress else True)
        with closing(states):
            run = _Run(sources, states, calls, inputs, config, num_train, len(token_ids) - num_train, logging_steps)
            reports = run.layers(bar, journal)
    trained = [report for report in reports if report.mse_before is not None]
    return DistillationReport(
        mode="layerwise",
        samples=num_train,
        eval_samples=eval_samples,
        sequence_length=length,
        epochs=config.epochs,
        tokens=trained[0].windows * length,
        steps=trained[0].steps,
        learning_rate=config.learning_rate,
        trained="experts",
        freeze_router=True,
        mask_violations=sum(report.mask_violations for report in trained),
        layers=trained,
        seconds=time.perf_counter() - started + done_before,  # of a run that was gone on with: also what was before
        peak_memory_bytes=peak_memory(sources[0].device),
    )


class _Run:
    """One pass over the layers of both models."""

    def __init__(self, sources, states, calls: LayerCalls, inputs, config, num_train, num_held_out, logging_steps):
        self.student, self.teacher = sources
        self.states, self.calls, self.inputs, self.config = states, calls, inputs, config
        self.num_train, self.logging_steps = num_train, logging_steps
        held_out = list(range(num_train, num_train + num_held_out))
        number = min(len(held_out) or _MEASURED, num_train)
        seen = [place * num_train // number for place in range(number)]  # spread over the text
        self.measured = [_chunks(windows, config.batch_size) for windows in (seen, held_out)]

    def layers(self, bar, journal: Journal | None) -> list[DistilledLayer]:
        """Goes through the layers that are not done yet; returns the reports of all."""
        reports = list(journal.reports) if journal is not None else []
        remaining = range(len(reports), len(self.teacher))
        for index in bar(remaining, initial=remaining.start):
            started = time.perf_counter()
            last = index + 1 == len(self.teacher)
            with _loaded(self.teacher, index, changed=False) as (name, decoder, teacher):
                self._run_teacher(name, index, decoder, teacher, last)
                with _loaded(self.student, index, changed=True) as (_, _, student):
                    report = DistilledLayer(index, student.name if student is not None else name)
                    if student is not None:
                        self._distill(teacher, student, report)
            self.states.advance()
            report.seconds = time.perf_counter() - started
            reports.append(report)
            if journal is not None:
                journal.record(index, report, self.states, last)
        return reports

    @torch.no_grad()
    def _run_teacher(self, name: str, index: int, decoder: nn.Module, moe: MoELayer | None, last: bool) -> None:
        """Keeps what the teacher's experts are given, and replaces the states by the outputs of the layer."""
        device, window, finite = self.teacher.device, 0, True

        def keep(_module, args):
            hidden_TH, index_TK = args[:2]  # every family hands them over by position
            hidden_BSH, index_BSK = hidden_TH.view(*shape, -1), index_TK.view(*shape, -1).int()
            self.inputs.write(window, hidden_BSH, index_BSK)
            if last:  # nobody reads what the last layer gives
                raise SeenEnough

        handle = moe.experts.register_forward_pre_hook(keep) if moe is not None else None
        try:
            for number in range(len(self.states)):
                state = self.states[number].to(device)
                shape = state.shape[:2]
                with suppress(SeenEnough):
                    output = self.calls(index, decoder, state)
                    finite = finite and is_finite(output)
                    self.states[number] = output.to(_HOST)
                window += len(state)
        finally:
            if handle is not None:
                handle.remove()
        if not finite:
            raise InputError(f"{name}: the teacher's output holds NaN or Inf; check the checkpoint and its dtype.")

    def _distill(self, teacher: MoELayer, student: MoELayer, report: DistilledLayer) -> None:
        """Trains the experts of one layer; they keep what helps on the held-out windows."""
        device = self.student.device

        def read(windows):
            hidden_TH, index_TK = self.inputs.read(windows, device)
            return hidden_TH, index_TK.long()

        def errors():
            return [measure(teacher, student, read, windows) for windows in self.measured]

        batches = window_batches(self.num_train, self.config, report.index)
        before = errors()
        if not all(math.isfinite(error) for error in before if error is not None):
            raise InputError(
                f"{report.name}: what its experts or the teacher's give is not finite; check their dtype."
            )
        weights = ExpertWeights(student, self.config.weight_decay)
        report.curve = train(teacher, student, weights, read, batches, self.config, self.logging_steps)
        weights.finish()
        after = errors()
        judged = 1 if after[1] is not None else 0
        report.kept = after[judged] <= before[judged]  # also false if it is not a number
        if not report.kept:
            logger.warning(
                f"{report.name}: training made the error of the experts worse on "
                f"{'held-out' if judged else 'its own'} windows, {before[judged]:.4g} -> {after[judged]:.4g}, so they "
                "stay as they were; lower learning_rate"
            )
            weights.restore()
            after = before
        report.mse_before, report.eval_mse_before = before
        report.mse_after, report.eval_mse_after = after
        report.steps, report.windows = len(batches), sum(map(len, batches))
        report.mask_violations = weights.violations()


@contextmanager
def _loaded(source: LayerSource, index: int, changed: bool) -> Iterator[tuple[str, nn.Module, MoELayer | None]]:
    """A layer on its device; when all went well it is stored, if it was `changed`."""
    loaded = source.load(index)
    try:
        yield loaded
    except BaseException:
        source.store(index, changed=False)
        raise
    source.store(index, changed=changed)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Without router jitter and dropout."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


def _in_memory(model: nn.Module, device: torch.device) -> InMemory:
    refuse_offloaded(model)
    check_finite_weights(model)
    moe = moe_layers(model)
    return InMemory(*decoder_layers(model, moe), moe, device)


def _require_zeros(source: LayerSource) -> None:
    """Refuses a student whose experts have no zeros in any layer."""
    dense = []
    for index in range(len(source)):
        with _loaded(source, index, changed=False) as (_, _, moe):
            if moe is not None:
                try:
                    return require_zeros([moe])
                except InputError as error:
                    dense.append(error)
    raise dense[0]


def _num_train(token_ids: torch.Tensor, eval_samples: int) -> int:
    if eval_samples >= len(token_ids):
        raise ConfigurationError(
            "eval_samples", eval_samples, f"leaves none of {len(token_ids)} windows to train on; give more samples"
        )
    return len(token_ids) - eval_samples


def _common_length(batches: list[torch.Tensor]) -> int:
    lengths = sorted({batch.shape[1] for batch in batches})
    if len(lengths) > 1:
        raise InputError(f"token_ids: windows have {lengths[0]} to {lengths[-1]} tokens; cut them to one length")
    return lengths[0]


def _chunks(windows: list[int], size: int) -> list[list[int]]:
    return [windows[start : start + size] for start in range(0, len(windows), size)]
