from fractions import Fraction

import pytest

from hf_mlopt.errors import ConfigurationError
from hf_mlopt.pruning.kept import num_kept, refuse_drop
from tests.command_line import python


@pytest.mark.parametrize("experts", (1, 8, 60, 64, 100, 128, 160, 256))
def test_the_number_kept_is_that_of_decimal_numbers(experts):
    for percent in range(100):
        exact = experts - int(Fraction(percent, 100) * experts)
        assert num_kept(experts, percent / 100) == exact


@pytest.mark.parametrize(
    "rule, message",
    [
        ((0.1, 8, 2), r"drop_experts=0\.1: keeps 8 of 8 experts.*at least 0\.125$"),
        ((0.9, 8, 2), r"drop_experts=0\.9: keeps 1 of 8 experts.* 2 to send a token to 2; drop at most 0\.75$"),
        ((0.5, 2, 2), r"keeps 1 of 2 .*can lose none$"),
        ((0.9, 12, 4), r"drop at most 0\.666667$"),
        ((0.9, 16, 4, 4, 2), r"needs 8 to send a token to 4 in 2 of 4 groups; drop at most 0\.5$"),
        ((0.9, 32, 6, 4, 2), r"needs 12 to send a token to 6 in 2 of 4 groups; drop at most 0\.625$"),
        ((0.35, 16, 4, 4, 2), r"keeps 11 of 16 experts, which its 4 groups cannot share evenly; .*multiple of 0\.25$"),
        ((0.95, 8, 1, 1, 1), r"keeps 1 of 8 experts, but the router needs 2 .*drop at most 0\.75$"),
    ],
)
def test_a_router_that_could_not_choose_is_refused(rule, message):
    with pytest.raises(ConfigurationError, match=message):
        refuse_drop(*rule)


def test_every_remedy_works():
    for experts in (6, 8, 12, 60, 64, 72, 160, 256):
        for top_k, groups, topk_groups in ((1, None, None), (2, None, None), (6, 1, 1), (4, 2, 1), (6, 4, 2)):
            if experts % (groups or 1):
                continue
            for drop in (0.001, 0.2, 0.3, 0.51, 0.999):
                try:
                    refuse_drop(drop, experts, top_k, groups, topk_groups)
                except ConfigurationError as error:
                    words = str(error).split()
                    if words[-1] != "none":
                        refuse_drop(float(words[-1]), experts, top_k, groups, topk_groups)


def test_the_rules_need_no_torch():
    assert python("import sys, hf_mlopt.pruning.kept; print('torch' in sys.modules)").strip() == "False"
