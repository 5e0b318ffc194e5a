"""`hf-mlopt demo`: a small mixture of experts trained, pruned and judged on this machine, without a network."""
