"""Where `evaluate.load` finds this package's perplexity."""

from pathlib import Path


def perplexity_metric() -> str:
    """
    Folder of a metric module for `evaluate.load` and `evaluate.combine`, which need no network for it.

    Returns:
        `str`: To be passed as the first argument, with `model_id` and the options of [`perplexity`] as keywords.
    """
    return str(Path(__file__).parent / "windowed_perplexity")
