"""Measuring a language model the way the papers do."""

# Bound after its submodule of the same name was loaded: `hf_mlopt.evaluation.perplexity` is the function.
from hf_mlopt.evaluation.perplexity import PerplexityResult, perplexity


__all__ = ["PerplexityResult", "perplexity"]
