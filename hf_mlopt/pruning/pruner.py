"""The entry point of pruning: a model and calibration tokens in, the same model with fewer weights out."""

import re
import resource
import sys
import time
from contextlib import closing
from functools import partial
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers.utils import logging

from hf_mlopt import ranks
from hf_mlopt.errors import InputError
from hf_mlopt.moe import MoELayer, decoder_layers
from hf_mlopt.moe.layers import text_config
from hf_mlopt.moe.switching import delegate_name
from hf_mlopt.pruning.batches import as_batches
from hf_mlopt.pruning.config import PruningConfig
from hf_mlopt.pruning.kept import num_kept
from hf_mlopt.pruning.outliers import layer_sparsities
from hf_mlopt.pruning.removal import adopt_config_, smaller_model
from hf_mlopt.pruning.report import LayerReport, PruningReport, num_parameters, totals
from hf_mlopt.pruning.scores import METHODS
from hf_mlopt.pruning.states import LayerCalls, States, embed
from hf_mlopt.pruning.sweep import InMemory, Journal, LayerSource, device_of, sweep
from hf_mlopt.pruning.validation import check_finite_weights, validate


logger = logging.get_logger(__name__)

_MAX_GATHERED = 16e9  # bytes


class MoEPruner:
    """
    Prunes the experts of a mixture-of-experts model in one shot.

    ```python
    report = MoEPruner(PruningConfig(sparsity=0.5)).prune(model, token_ids)
    ```

    Args:
        config (`PruningConfig`): Method, pattern, scope.
    """

    def __init__(self, config: PruningConfig):
        self.config = config

    def prune(
        self,
        model: nn.Module,
        calibration=None,
        *,
        device=None,
        progress: bool = True,
        source: LayerSource | None = None,
        journal: Journal | None = None,
    ) -> PruningReport:
        """
        Prunes `model` in place.

        Under `accelerate launch` or `torchrun` every process runs its share of the calibration data and ends with the
        same weights.

        Args:
            model (`PreTrainedModel`): A causal language model with experts. It keeps its devices and training mode.
            calibration (*optional*): LongTensor `[samples, length]`, a list of token lists, or a `datasets` object
                with `input_ids`; may be left out for `magnitude`.
            device (`str` or `torch.device`, *optional*): Where layers are run, one at a time; the model's own device
                by default. A `source` has its own.
            progress (`bool`, *optional*, defaults to `True`): Whether to show a bar over the layers.
            source (`LayerSource`, *optional*): Where the weights of the decoder layers are, if not in `model`.
            journal (`Journal`, *optional*): Notes what is done and knows what was.

        Raises:
            InputError: For anything that cannot be pruned; before any forward pass, except activations that turn out
                not finite and experts not covered under `on_uncovered="error"`, where earlier layers are pruned
                already.
        """
        started = time.perf_counter()
        done_before = sum(layer.seconds for layer in journal.reports) if journal is not None else 0.0
        moe = validate(model, self.config)
        calibrated, parameters = self.config.needs_calibration, num_parameters(model)
        if calibrated and calibration is None:
            without = " or ".join(name for name, method in METHODS.items() if not method.calibrated)
            raise InputError(
                f"method={self.config.method!r} needs calibration data; only {without} does without, if no expert is "
                "removed and allocation is not owl."
            )
        batches = as_batches(calibration, self.config.batch_size, text_config(model)) if calibrated else []
        if 0 < len(batches) < ranks.world_size():
            raise InputError(
                f"calibration has {len(batches)} batches for {ranks.world_size()} processes; lower batch_size (now "
                f"{self.config.batch_size}) or give more samples."
            )
        batches = ranks.my_share(batches)
        _refuse_gathering(moe, batches)
        prefix, layers = decoder_layers(model, moe)
        if source is None:
            refuse_offloaded(model)
            check_finite_weights(model)
            device = torch.device(device) if device is not None else device_of(layers)
            source = InMemory(prefix, layers, moe, device, with_fewer_experts(model, moe, self.config))
        device = source.device
        if self.config.sparsity == 0:
            logger.warning("sparsity=0 removes nothing: the weights stay as they are.")
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        training = {module: module.training for module in model.modules()}
        model.eval()  # router jitter and dropout would disturb the statistics
        try:
            reports = self._sweep(model, layers, batches, device, source, journal, progress)
            if isinstance(source, InMemory) and source.smaller is not None:
                adopt_config_(model, source.smaller)
        finally:
            for module in model.modules():
                module.training = training.get(module, training[model])
        return PruningReport(
            config=self.config,
            experts_implementation="+".join(sorted({delegate_name(layer) for layer in moe if layer.is_fused}))
            or "module_list",
            layers=reports,
            totals=totals(source.smaller if source.smaller is not None else model, reports, parameters),
            # of a run that was gone on with: also the layers done before
            seconds=time.perf_counter() - started + done_before,
            peak_memory_bytes=peak_memory(device),
        )

    def _sweep(self, model, layers, batches, device, source, journal, progress) -> list[LayerReport]:
        def bar(indices, what=f"pruning {self.config.label}"):
            hidden = None if progress and ranks.rank() == 0 else True
            return tqdm(indices, desc=what, unit="layer", initial=indices.start, total=len(layers), disable=hidden)

        def begin():
            return first_states(model, layers, batches, device, source, journal)

        def measure_outliers():
            states, calls = begin()
            with closing(states):
                return layer_sparsities(source, states, calls, self.config, partial(bar, what="measuring outliers"))

        sparsities = None
        if self.config.allocation == "owl":
            sparsities = journal.remembered("owl", measure_outliers) if journal is not None else measure_outliers()
        states, calls = begin()
        with closing(states):
            return sweep(source, states, calls, self.config, bar, journal, sparsities)


def with_fewer_experts(model: nn.Module, moe: list[MoELayer], config: PruningConfig) -> nn.Module | None:
    """The model that is left when experts are removed, on the meta device; None if all stay."""
    if not config.drop_experts:
        return None
    return smaller_model(model, num_kept(moe[0].num_experts, config.drop_experts))


def first_states(model, layers, batches, device, source, journal):
    """
    The states a pass over the layers begins or goes on with.

    Args:
        model (`nn.Module`), layers (`nn.ModuleList`): The model and its decoder layers; these need no weights.
        batches (`list[torch.Tensor]`): Token ids, `[batch, length]`.
        device (`torch.device`): Where states are, or go when they are read from disk.
        source (`LayerSource`): Where the weights of `model` are.
        journal (`Journal`, *optional*): Knows whether there is a run to go on with.

    Returns:
        `tuple[States, LayerCalls]`: The states, and how the layers are called.
    """
    calls = LayerCalls()
    if not batches:
        return States(), calls
    with source.embedding():
        if journal is None:
            return States(embed(model, layers, batches, device, calls)), calls
        if journal.reports:  # only the calls are wanted, and those follow from the shape
            shapes = {tuple(batch.shape): batch for batch in batches}
            list(embed(model, layers, list(shapes.values()), device, calls))
            return journal.saved_states(device), calls
        shapes = [tuple(batch.shape) for batch in batches]
        return journal.first_states(embed(model, layers, batches, device, calls), shapes, device), calls


def refuse_offloaded(model: nn.Module) -> None:
    """Raises `InputError` where parameters of a model are on several devices, or not in memory."""
    meta = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
    if meta is not None or len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        raise InputError(
            f"the model is spread over devices or disk ({meta or 'hf_device_map'}); load it without device_map. "
            "Layers are moved to `device` one at a time."
        )


def _refuse_gathering(moe: list[MoELayer], batches: list[torch.Tensor]) -> None:
    """`batched_mm` copies the matrices of an expert for every token sent to it."""
    largest = max((batch.numel() for batch in batches), default=0)
    for layer in moe:
        if layer.is_fused and delegate_name(layer) == "batched_mm":
            matrix = max(layer.stacked(projection)[0].nbytes for projection in layer.projections)
            if largest * layer.top_k * matrix > _MAX_GATHERED:
                raise InputError(
                    f"{layer.name}: experts implementation {layer.experts.config._experts_implementation!r} would "
                    f"gather {largest * layer.top_k * matrix / 1e9:.0f} GB of weights for a batch; call "
                    'model.set_experts_implementation("grouped_mm"), or lower batch_size.'
                )
            return


def peak_memory(device: torch.device) -> int:
    """Peak resident memory of the process, or peak allocation on an accelerator, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:  # ru_maxrss begins at the size of the process that started this one
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return 1024 * int(re.search(r"^VmHWM:\s+(\d+) kB", status, flags=re.MULTILINE)[1])
    except (OSError, TypeError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, others KiB
