"""The table of `mutations.py` still fits the code; that tests notice every flip takes minutes, and is run by hand."""

from collections import Counter

import pytest
from mutations import ROOT, flips


@pytest.mark.parametrize("flip", flips(), ids=lambda flip: f"{flip.path}: {flip.before}")
def test_what_is_flipped_is_there_once_and_so_are_its_tests(flip):
    assert (ROOT / flip.path).read_text(encoding="utf-8").count(flip.before) == 1 and flip.after != flip.before
    file, _, function = flip.tests.partition("::")
    assert f"def {function or 'test_'}" in (ROOT / file).read_text(encoding="utf-8")


def test_every_method_has_flips_and_no_flip_is_there_twice():
    assert min(Counter(flip.method for flip in flips()).values()) >= 5
    assert len(set(flips())) == len(flips())
