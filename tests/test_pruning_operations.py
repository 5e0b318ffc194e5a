"""The work of a sweep is batched: the number of tensor operations does not grow with the number of experts."""

from collections import Counter

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from tests.families import make_family, token_ids
from tests.pruned import prune


class CountedOperations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[str(function)] += 1
        return function(*args, **(kwargs or {}))


def operations(num_experts, **settings):
    model = make_family("mixtral", num_local_experts=num_experts)
    with CountedOperations() as counted:
        report = prune(model, token_ids(16, 48), **settings)
    assert not report.uncovered  # those are run one after the other
    return counted.counts


@pytest.mark.parametrize(
    "settings",
    (
        {},
        {"pattern": "2:4"},
        {"method": "ria"},
        {"method": "sparsegpt"},
        {"method": "magnitude"},
        {"sparsity": 0.5, "drop_experts": 0.25},
    ),
    ids=str,
)
def test_no_loop_over_experts(settings):
    few, many = operations(4, **settings), operations(16, **settings)
    assert few == many
