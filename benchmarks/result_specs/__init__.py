"""What `docs/results.md` shows of each file of results: which kinds of row in which table, against which target."""

from result_specs import (
    communication,
    distillation,
    federated,
    federated_medical,
    optimizers,
    pipeline,
    pruning,
    vertical,
)


AREAS = (pruning, distillation, optimizers, communication, pipeline, federated, federated_medical, vertical)
SPECS = {name: spec for area in AREAS for name, spec in area.SPECS.items()}  # in the order of the page
