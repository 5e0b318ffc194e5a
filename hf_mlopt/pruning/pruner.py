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
from hf_mlopt.moe import decoder_layers
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
        batches = as_batches(calibration, self.config.batch_size, text_config(model)) if calibrated else []
        check_finite_weights(model)
        if self.config.sparsity == 0:
            logger.warning("sparsity=0 removes nothing: the weights stay as they are.")
        prefix, layers = decoder_layers(model)
        device = torch.device(device) if device is not None else next(layers.parameters()).device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        training = model.training
        model.eval()  # router jitter and dropout would disturb the statistics
        try:
            states, calls = capture(model, layers, batches, device) if batches else ([], LayerCalls())
            bar = partial(tqdm, desc=f"pruning {self.config.label}", unit="layer", disable=None if progress else True)
            reports = sweep(InMemory(prefix, layers, moe, device), states, calls, self.config, bar)
        finally:
            model.train(training)
        return PruningReport(
            config=self.config,
            experts_implementation="+".join(sorted({delegate_name(layer) for layer in moe if layer.is_fused}))
            or "module_list",
            layers=reports,
            totals=totals(model, reports),
            seconds=time.perf_counter() - started,
            peak_memory_bytes=_peak_memory(device),
        )


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB
