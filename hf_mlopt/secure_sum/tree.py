r"""
A sum over two trees: masked values climb one, masks climb the other, after the aggregation of [Federated Doubly
Stochastic Kernel Learning for Vertically Partitioned Data](https://huggingface.co/papers/2008.06197) that AFSGD-VP
(2008.06233) uses.

Party l draws b_l, uniform in Z_2^64, and forms c_l = enc(x_l) + b_l. \xi = \sum c_l climbs tree T1 and \sum b_l climbs
T2; the requester, the root of both, takes z = \xi - \sum b_l. Limits:

- Two parties that collude, one in each tree, learn the share of any party whose c and b they are sent: this is weaker
  than [`pairwise`], which holds against all but one.
- The paper asks that no subtree of T1 and of T2, of more than one leaf and below the whole, have the same leaves. It
  misses a single leaf with one parent in both trees, and sums that a party can combine from several subtrees. The rule
  here covers all of these: no party may learn more from both trees than its role gives it.

A tree is a name (a leaf) or a tuple of trees. The first leaf of a tuple's first tree collects for the tuple: the first
leaf of each other tree sends it what it has collected.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hf_mlopt.errors import ConfigurationError
from hf_mlopt.secure_sum.fixed_point import FixedPoint
from hf_mlopt.secure_sum.keys import encode_parts


Tree = str | tuple
_LABEL = b"hf_mlopt/secure_sum/tree/1"
_TRIES = 10_000


@dataclass(frozen=True)
class Hop:
    """
    One message on the way up.

    Args:
        sender (`str`), receiver (`str`): Parties.
        leaves (`frozenset[str]`): Whose words the message adds up.
    """

    sender: str
    receiver: str
    leaves: frozenset[str]


def leaves_of(tree: Tree) -> tuple[str, ...]:
    """Names of a tree's leaves, from left to right."""
    return (tree,) if isinstance(tree, str) else tuple(name for child in tree for name in leaves_of(child))


def hops(tree: Tree) -> list[Hop]:
    """The messages of a tree in an order in which each can be sent once those before it have come."""
    if isinstance(tree, str):
        return []
    found = [hop for child in tree for hop in hops(child)]
    receiver = leaves_of(tree)[0]
    return found + [Hop(leaves_of(child)[0], receiver, frozenset(leaves_of(child))) for child in tree[1:]]


def build_trees(parties: Sequence[str], requester: str, seed: bytes) -> tuple[Tree, Tree]:
    """
    Two valid trees that every party derives alike from a public seed.

    Args:
        parties (sequence of `str`): All, at least 3.
        requester (`str`): Who gets the sum.
        seed (`bytes`): Public, such as the digest of the roster.

    Returns:
        `tuple`: T1 for the masked values and T2 for the masks.

    Raises:
        ConfigurationError: As in [`validate_trees`].
    """
    parties = tuple(sorted(parties))
    _check_parties(parties, requester)
    for attempt in range(_TRIES):
        first, second = (_random_tree(parties, requester, seed, attempt, which) for which in (1, 2))
        try:
            validate_trees(first, second, requester)
        except ConfigurationError:
            continue
        return first, second
    raise ConfigurationError("seed", seed.hex(), f"gives no valid trees in {_TRIES} tries: take another")


def validate_trees(first: Tree, second: Tree, requester: str):
    """
    Args:
        first (`Tree`), second (`Tree`): T1 and T2.
        requester (`str`): Who gets the sum.

    Raises:
        ConfigurationError: If the trees differ in parties, have fewer than 3, do not end at the requester, are not
            significantly different, or let one party learn a share or a partial sum.
    """
    parties = tuple(sorted(leaves_of(first)))
    _check_parties(parties, requester)
    if tuple(sorted(leaves_of(second))) != parties:
        raise ConfigurationError("trees", sorted(leaves_of(second)), f"both must have the parties {list(parties)}")
    for tree in (first, second):
        if leaves_of(tree)[0] != requester:
            raise ConfigurationError("trees", tree, f"must end at the requester {requester!r}, their first leaf")
    shared = {s for s in _subtrees(first) & _subtrees(second) if 1 < len(s) < len(parties)}
    if shared:
        leaves = sorted(min(shared, key=sorted))
        text = f"T1 and T2 are not significantly different, a subtree of both has the leaves {leaves}"
        raise ConfigurationError("trees", (first, second), f"{text}; draw them from another seed")
    for party in parties:
        known = [_known(tree, party, parties) for tree in (first, second)]
        common = sum(map(_rank, known)) - _rank(np.vstack(known))
        # Its own share, and for the requester the sum. With the sum alone, at two parties, both coincide.
        allowed = 1 + (party == requester)
        if common > allowed:
            text = (
                f"party {party!r} would learn a share or a partial sum of others, being parent of them in both trees"
            )
            raise ConfigurationError("trees", (first, second), f"{text}; draw them from another seed")


def mask_share(values, fixed_point: FixedPoint, field: str = "values") -> tuple[np.ndarray, np.ndarray]:
    """
    Args:
        values (array): Own share, real numbers of any shape.
        fixed_point ([`FixedPoint`]): Of all parties.
        field (`str`, *optional*, defaults to `"values"`): What errors call them.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: c for T1 and b for T2, uint64, of the shape of `values`; each
        alone is uniform.
    """
    words = fixed_point.encode(values, field)
    masks = np.frombuffer(os.urandom(8 * words.size), "<u8").astype(np.uint64).reshape(words.shape)
    return words + masks, masks


def climb(tree: Tree, words: Mapping[str, np.ndarray]) -> np.ndarray:
    """
    The sum modulo 2^64 that arrives at the root, hop by hop.

    Args:
        tree (`Tree`): T1 or T2.
        words (mapping of `str` to `np.ndarray`): Party to its words, uint64, of one shape.
    """
    held = {party: np.array(own, np.uint64) for party, own in words.items()}
    for hop in hops(tree):
        held[hop.receiver] = held[hop.receiver] + held[hop.sender]
    return held[leaves_of(tree)[0]]


def unmask(masked: np.ndarray, masks: np.ndarray, fixed_point: FixedPoint) -> np.ndarray:
    """z of \\xi and \\sum b_l, float64, at the requester."""
    return fixed_point.decode(np.asarray(masked - masks))


def _check_parties(parties: Sequence[str], requester: str):
    if len(parties) < 3 or len(set(parties)) != len(parties):
        remedy = "must be three names or more, each once: of two parties, each gets the other's share by subtraction"
        raise ConfigurationError("parties", list(parties), remedy)
    if requester not in parties:
        raise ConfigurationError("requester", requester, f"must be one of {list(parties)}")


def _subtrees(tree: Tree) -> set[frozenset[str]]:
    found = {frozenset(leaves_of(tree))}
    if not isinstance(tree, str):
        found = found.union(*(_subtrees(child) for child in tree))
    return found


def _known(tree: Tree, party: str, parties: Sequence[str]) -> np.ndarray:
    """Rows over the parties: which sums one party knows of a tree, its own words and what it is sent."""
    sets = [{party}, *(hop.leaves for hop in hops(tree) if hop.receiver == party)]
    return np.array([[float(name in leaves) for name in parties] for leaves in sets])


def _rank(rows: np.ndarray) -> int:
    # Leaf sets of two trees make a totally unimodular matrix: its rank over the reals is that over Z_2^64.
    return int(np.linalg.matrix_rank(rows))


def _random_tree(parties: Sequence[str], requester: str, seed: bytes, attempt: int, which: int) -> Tree:
    """A random binary tree whose first leaf is the requester; random numbers are hashes, alike on every machine."""
    counter = 0

    def draw(limit: int) -> int:
        nonlocal counter
        counter += 1
        numbers = (n.to_bytes(8, "big") for n in (attempt, which, counter))
        parts = encode_parts(_LABEL, seed, requester.encode(), *(name.encode() for name in parties), *numbers)
        return (
            int.from_bytes(hashlib.sha256(parts).digest(), "big") % limit
        )  # public: a bias of 2^-200 is of no weight

    forest: list[Tree] = list(parties)
    while len(forest) > 1:
        first = forest.pop(draw(len(forest)))
        second = forest.pop(draw(len(forest)))
        pair = (second, first) if requester in leaves_of(second) else (first, second)
        forest.append(pair)
    return forest[0]
