"""The entry point of pruning: a model and calibration tokens in, the same model with fewer weights out."""

import resource
import sys
import time
from functools import partial

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers.utils import logging

from hf_mlopt.errors import InputError
from hf_mlopt.moe import MoELayer, decoder_layers
from hf_mlopt.moe.layers import text_config
from hf_mlopt.moe.observation import delegate_name
from hf_mlopt.pruning.batches import as_batches
from hf_mlopt.pruning.config import PruningConfig
from hf_mlopt.pruning.report import PruningReport, totals
from hf_mlopt.pruning.scores import METHODS
from hf_mlopt.pruning.states import LayerCalls, capture
from hf_mlopt.pruning.sweep import InMemory, sweep
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

    def prune(self, model: nn.Module, calibration=None, *, device=None, progress: bool = True) -> PruningReport:
        """
        Prunes `model` in place.

        Args:
            model (`PreTrainedModel`): A causal language model with experts. It keeps its devices and training mode.
            calibration (*optional*): LongTensor `[samples, length]`, a list of token lists, or a `datasets` object
                with `input_ids`; may be left out for `magnitude`.
            device (`str` or `torch.device`, *optional*): Where layers are run, one at a time; the model's own device
                by default.
            progress (`bool`, *optional*, defaults to `True`): Whether to show a bar over the layers.

        Raises:
            InputError: For anything that cannot be pruned; before any forward pass, except activations that turn out
                not finite and experts not covered under `on_uncovered="error"`, where earlier layers are pruned
                already.
        """
        started = time.perf_counter()
        moe = validate(model, self.config)
        calibrated = METHODS[self.config.method].calibrated
        if calibrated and calibration is None:
            raise InputError(f"method={self.config.method!r} needs calibration data; only magnitude does without.")
        _refuse_offloaded(model)
        batches = as_batches(calibration, self.config.batch_size, text_config(model)) if calibrated else []
        _refuse_gathering(moe, batches)
        check_finite_weights(model)
        if self.config.sparsity == 0:
            logger.warning("sparsity=0 removes nothing: the weights stay as they are.")
        prefix, layers = decoder_layers(model, moe)
        device = torch.device(device) if device is not None else next(layers.parameters()).device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        training = {module: module.training for module in model.modules()}
        model.eval()  # router jitter and dropout would disturb the statistics
        try:
            states, calls = capture(model, layers, batches, device) if batches else ([], LayerCalls())
            bar = partial(tqdm, desc=f"pruning {self.config.label}", unit="layer", disable=None if progress else True)
            reports = sweep(InMemory(prefix, layers, moe, device), states, calls, self.config, bar)
        finally:
            for module, mode in training.items():
                module.training = mode
        return PruningReport(
            config=self.config,
            experts_implementation="+".join(sorted({delegate_name(layer) for layer in moe if layer.is_fused}))
            or "module_list",
            layers=reports,
            totals=totals(model, reports),
            seconds=time.perf_counter() - started,
            peak_memory_bytes=_peak_memory(device),
        )


def _refuse_offloaded(model: nn.Module) -> None:
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


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB
