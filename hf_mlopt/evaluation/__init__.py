"""Measuring a language model: perplexity the way the papers do, and tasks of lm-eval from the Hub or local files."""

from hf_mlopt.evaluation.perplexity import PerplexityResult, perplexity
from hf_mlopt.lazy import lazy_names


# lm-eval is imported when it is needed: it takes seconds.
_LAZY = {
    "LoadedTasks": "hf_mlopt.evaluation.harness",
    "LocalTask": "hf_mlopt.evaluation.tasks",
    "evaluate_tasks": "hf_mlopt.evaluation.harness",
    "load_tasks": "hf_mlopt.evaluation.harness",
    "perplexity_metric": "hf_mlopt.evaluation.metric",
    "write_tasks": "hf_mlopt.evaluation.tasks",
}

_lazy, __getattr__ = lazy_names(__name__, _LAZY)
# Bound after its submodule of the same name was loaded: `hf_mlopt.evaluation.perplexity` is the function.
__all__ = ["PerplexityResult", "perplexity", *_lazy]
