"""The tree mode: exact, uniform to each alone, refused where one party would learn a share, and broken by two."""

import itertools
import math

import numpy as np
import pytest

from hf_mlopt.errors import ConfigurationError
from hf_mlopt.secure_sum.fixed_point import FixedPoint
from hf_mlopt.secure_sum.tree import build_trees, climb, hops, leaves_of, mask_share, unmask, validate_trees
from tests.reference import secure_sum as reference


NAMES = tuple("abcdefghijklmnop")


def shares_of(names, size=50, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(0, 10, size) for name in names}


@pytest.mark.parametrize("num", [3, 4, 5, 8, 16])
def test_the_sum_is_exact_for_every_requester(num):
    names = NAMES[:num]
    point, shares = FixedPoint(num), shares_of(names)
    words = {name: [reference.encode(x, 24) for x in share.tolist()] for name, share in shares.items()}
    exact = [reference.decode(sum(column) % 2**64, 24) for column in zip(*words.values(), strict=True)]
    for requester in names:
        first, second = build_trees(names, requester, b"seed")
        assert sorted(leaves_of(first)) == sorted(leaves_of(second)) == list(names)
        parts = {name: mask_share(share, point) for name, share in shares.items()}
        masked = climb(first, {name: part[0] for name, part in parts.items()})
        masks = climb(second, {name: part[1] for name, part in parts.items()})
        assert unmask(masked, masks, point).tolist() == exact


@pytest.mark.parametrize("shape", [(), (0,), (2, 3)])
def test_shapes(shape):
    point = FixedPoint(3)
    values = np.full(shape, -1.5)
    masked, masks = mask_share(values, point)
    assert masked.shape == masks.shape == shape and masked.dtype == masks.dtype == np.uint64
    assert (unmask(masked, masks, point) == values).all()


def test_each_message_alone_is_uniform_and_no_mask_comes_twice():
    values, point = np.repeat([0.0, 1.0, -1.0, 1e6], 25_600), FixedPoint(3)
    seen = []
    for _ in range(2):
        for words in mask_share(values, point):
            counts = np.bincount(words.view(np.uint8), minlength=256)
            assert ((counts - 3200) ** 2 / 3200).sum() < 380  # 255 degrees of freedom, 5.5 standard deviations
            assert abs(np.corrcoef(values, words.astype(np.float64))[0, 1]) < 5 / math.sqrt(len(values))
            seen.append(words)
    # Of one share, masked word and mask are equal where the value is zero; no one holds both.
    pairs = [(0, 2), (0, 3), (1, 2), (1, 3)]
    assert not any((seen[one] == seen[other]).any() for one, other in pairs)


def test_seeding_the_generators_leaves_the_masks_changing(monkeypatch):
    masks = []
    for _ in range(2):
        np.random.seed(0)
        masks.append(mask_share(np.zeros(8), FixedPoint(3))[1])
    assert not (masks[0] == masks[1]).any()


def test_hops_are_in_an_order_in_which_they_can_be_sent():
    for tree in build_trees(NAMES, "c", b"seed"):
        held = {name: {name} for name in NAMES}
        for hop in hops(tree):
            assert held[hop.sender] == set(hop.leaves)
            held[hop.receiver] |= hop.leaves
        assert held["c"] == set(NAMES) and len(hops(tree)) == len(NAMES) - 1


def test_trees_follow_from_the_seed():
    for requester in "abc":
        assert build_trees("abcdef", requester, b"1") == build_trees("fedcba", requester, b"1")
    drawn = {build_trees("abcdef", "a", bytes([n])) for n in range(20)}
    assert len(drawn) > 15


# What one party learns: checked by brute force over small integer combinations of what it sees.


def learnt(first, second, party):
    """
    Combinations of shares that `party` can compute: sums of T1 and of T2 with the same coefficients, each from its own
    words and what it is sent. Coefficients from -1 to 1 are enough for few parties.
    """
    names = sorted(leaves_of(first))

    def reachable(tree):
        sets = [frozenset([party]), *(hop.leaves for hop in hops(tree) if hop.receiver == party)]
        combinations = itertools.product((-1, 0, 1), repeat=len(sets))
        return {tuple(sum(c for c, s in zip(cs, sets, strict=True) if n in s) for n in names) for cs in combinations}

    return names, reachable(first) & reachable(second)


def leaks(first, second, requester):
    for party in leaves_of(first):
        names, found = learnt(first, second, party)
        for coefficients in found:
            others = {c for n, c in zip(names, coefficients, strict=True) if n != party}
            if others != {0} and not (party == requester and len(others) == 1):
                return True
    return False


def all_trees(names):
    """Every binary tree over the names, with both orders of children."""
    if len(names) == 1:
        yield names[0]
        return
    for size in range(1, len(names)):
        for left in itertools.combinations(names, size):
            right = tuple(name for name in names if name not in left)
            yield from itertools.product(all_trees(left), all_trees(right))


def significantly_different(first, second):
    """The paper's definition, literally."""

    def subtrees(tree):
        return [tree] if isinstance(tree, str) else [tree, *subtrees(tree[0]), *subtrees(tree[1])]

    total = len(leaves_of(first))
    sets = [
        {frozenset(leaves_of(s)) for s in subtrees(tree) if 1 < len(leaves_of(s)) < total} for tree in (first, second)
    ]
    return not sets[0] & sets[1]


@pytest.mark.parametrize("names, step", [("abc", 1), ("abcd", 7)])
def test_the_validator_accepts_just_the_pairs_in_which_no_party_learns_a_sum(names, step):
    trees = [tree for tree in all_trees(tuple(names)) if leaves_of(tree)[0] == "a"]
    outcomes = []
    for first, second in list(itertools.product(trees, trees))[::step]:
        expected = significantly_different(first, second) and not leaks(first, second, "a")
        try:
            validate_trees(first, second, "a")
            accepted = True
        except ConfigurationError:
            accepted = False
        assert accepted == expected, (first, second)
        outcomes.append(accepted)
    assert 0 < sum(outcomes) < len(outcomes)


def test_equal_trees_and_shared_parents_are_refused():
    tree = (("a", "b"), ("c", "d"))
    with pytest.raises(ConfigurationError, match=r"not significantly different, .* leaves \['a', 'b'\]"):
        validate_trees(tree, tree, "a")
    # Significantly different by the paper's words, yet a sees both c's masked share and its mask.
    first, second = ((("a", "c"), "b"), "d"), ((("a", "d"), "c"), "b")
    assert significantly_different(first, second)
    with pytest.raises(ConfigurationError, match="party 'a' would learn a share or a partial sum"):
        validate_trees(first, second, "a")
    # No common parent of one leaf, yet b sees {c} + {d} in T1 and {c, d} in T2.
    first, second = ("a", (("b", "c"), "d")), ("a", ("b", ("c", "d")))
    with pytest.raises(ConfigurationError):
        validate_trees(first, second, "a")


@pytest.mark.parametrize(
    "first, second, requester, message",
    [
        (("a", "b"), ("b", "a"), "a", "parties=.*three names or more"),
        (("a", ("b", "c")), ("a", ("b", "d")), "a", r"both must have the parties \['a', 'b', 'c'\]"),
        (("a", ("b", "b")), ("a", ("b", "b")), "a", "each once"),
        (("a", ("b", "c")), (("a", "b"), "c"), "x", "requester='x'"),
        (("b", ("a", "c")), (("b", "a"), "c"), "a", "must end at the requester 'a'"),
    ],
)
def test_trees_that_are_none(first, second, requester, message):
    with pytest.raises(ConfigurationError, match=message):
        validate_trees(first, second, requester)
    with pytest.raises(ConfigurationError, match="three names or more"):
        build_trees("ab", "a", b"")


# Collusion.


def solve(shares, first, second, colluders, victim):
    """Least squares of the victim's share from all that the colluders see; the residual of the best combination."""
    names = sorted(shares)
    views = []
    for tree in (first, second):
        sets = [{name} for name in colluders]
        sets += [hop.leaves for hop in hops(tree) if hop.receiver in colluders]
        views.append(np.array([[float(name in leaves) for name in names] for leaves in sets]))
    both = np.hstack([views[0].T, np.zeros_like(views[1].T)]), np.hstack([views[0].T, -views[1].T])
    target = np.concatenate([[float(name == victim) for name in names], np.zeros(len(names))])
    found = np.linalg.lstsq(np.vstack(both), target, rcond=None)[0]
    return float(np.abs(np.vstack(both) @ found - target).max())


def test_two_colluders_one_a_tree_learn_a_share_and_one_does_not():
    point, shares = FixedPoint(5), shares_of("abcde")
    first, second = build_trees("abcde", "a", b"seed")
    parts = {name: mask_share(share, point) for name, share in shares.items()}
    sent = [{(hop.receiver, *hop.leaves) for hop in hops(tree) if len(hop.leaves) == 1} for tree in (first, second)]
    pairs = {(one, other, leaf) for (one, leaf), (other, again) in itertools.product(*sent) if leaf == again}
    assert pairs
    for one, other, leaf in pairs:
        assert one != other  # the validator sees to it
        received = parts[leaf]
        recovered = point.decode(received[0] - received[1])  # what one was sent, less what the other was sent
        assert np.abs(recovered - shares[leaf]).max() <= 2.0**-25
        assert solve(shares, first, second, {one, other}, leaf) < 1e-9
        assert solve(shares, first, second, {one}, leaf) > 0.1
        assert solve(shares, first, second, {other}, leaf) > 0.1
