"""`hf-mlopt evaluate`: perplexity of a checkpoint on a named text."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from hf_mlopt.data.overlap import overlap
from hf_mlopt.data.text import load_text, tokenize_corpus
from hf_mlopt.errors import ConfigurationError, InputError
from hf_mlopt.hub import resolve_checkpoint
from hf_mlopt.workflows.loading import choose_device, context_length, load_model, load_tokenizer


# Below this, shared boilerplate explains what the two texts have in common.
_OVERLAP_WARNING = 0.05


@dataclass
class EvaluationConfig:
    """
    Evaluation of one checkpoint.

    Args:
        model (`str`): Local directory or Hub id.
        perplexity (`str`): Text to measure on. `wikitext` (WikiText-2 raw, the papers' choice), `embedded` (no
            network), a local .txt, .jsonl or .parquet file, or a data set on the Hub.
        split (`str`, *optional*, defaults to `"test"`): Split of a data set or of the embedded corpus.
        window (`int`, *optional*): Tokens per window. By default 2048, or the model's context if that is shorter.
        max_windows (`int`, *optional*): Measure on this many windows only, from the start.
        batch_size (`int`, *optional*, defaults to 8): Windows per forward pass.
        device (`str`, *optional*, defaults to `"auto"`): `auto` is the first GPU, else the CPU.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Whether to run modeling code of the checkpoint.
        output (`str`, *optional*): JSON file to write the result to.
    """

    model: str | None = None
    perplexity: str | None = None
    split: str = "test"
    window: int | None = None
    max_windows: int | None = None
    batch_size: int = 8
    device: str = "auto"
    trust_remote_code: bool = False
    output: str | None = None

    def __post_init__(self):
        for name in ("model", "perplexity"):
            if not getattr(self, name):
                raise ConfigurationError(name, getattr(self, name), "is needed")
        for name, least in (("window", 2), ("max_windows", 1), ("batch_size", 1)):
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise ConfigurationError(name, getattr(self, name), f"must be at least {least}")


def evaluate_checkpoint(config: EvaluationConfig) -> dict:
    """
    Measures perplexity by the protocol of Wanda and MoE-Pruner: non-overlapping windows, the tail dropped.

    Returns:
        `dict`: `perplexity`, `nll` (nats per token), `tokens`, `windows`, `window`, `dataset`, and
        `calibration_overlap`, the fraction of sampled calibration text that also stands in the evaluation text (None
        if the checkpoint does not say what it was calibrated on).
    """
    checkpoint = resolve_checkpoint(config.model)
    if config.output and Path(config.output).exists():
        raise ConfigurationError("output", config.output, "exists already; name a new file")
    device = choose_device(config.device, checkpoint.weight_bytes or 0)
    tokenizer = load_tokenizer(checkpoint, config.trust_remote_code)
    if tokenizer is None:
        raise InputError(f"model={checkpoint.name!r} has no tokenizer; save one beside the weights.")
    documents, dataset = load_text(config.perplexity, config.split)
    token_ids = tokenize_corpus(documents, tokenizer)
    shared = _calibration_overlap(checkpoint.directory, token_ids)

    from hf_mlopt.evaluation import perplexity

    model = load_model(checkpoint, config.trust_remote_code)
    context = context_length(model.config)
    window = config.window or min(2048, context or 2048)
    if context is not None and window > context:
        raise ConfigurationError("window", window, f"is longer than the model's context of {context} tokens")
    token_ids = token_ids[: window * config.max_windows] if config.max_windows else token_ids
    result = perplexity(model.to(device), token_ids, window, config.batch_size)
    record = {"model": config.model, **asdict(result), "dataset": dataset, "calibration_overlap": shared}
    if config.output:
        Path(config.output).parent.mkdir(parents=True, exist_ok=True)
        Path(config.output).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def _calibration_overlap(directory: Path, token_ids) -> float | None:
    from transformers.utils import logging

    report = directory / "pruning_report.json"
    sketch = json.loads(report.read_text()).get("calibration", {}).get("sketch") if report.is_file() else None
    if not sketch:
        return None
    shared = overlap([int(number) for number in sketch.split()], token_ids)
    if shared > _OVERLAP_WARNING:
        logging.get_logger(__name__).warning(
            f"{100 * shared:.0f} % of the calibration text also stands in the evaluation text: this perplexity "
            "flatters the pruned model. Evaluate on another text, or read it as a training figure."
        )
    return shared
