"""The sum of vectors that no one else sees: pairwise masks, fixed point, key agreement. Arrays in, arrays out."""

from hf_mlopt.lazy import lazy_names


_PUBLIC = {
    "FixedPoint": "hf_mlopt.secure_sum.fixed_point",
    "IncompleteRound": "hf_mlopt.secure_sum.pairwise",
    "MaskedSum": "hf_mlopt.secure_sum.pairwise",
    "MaskedVector": "hf_mlopt.secure_sum.pairwise",
    "Party": "hf_mlopt.secure_sum.pairwise",
    "Request": "hf_mlopt.secure_sum.roster",
    "Roster": "hf_mlopt.secure_sum.roster",
    **dict.fromkeys(
        ("build_trees", "climb", "hops", "mask_share", "unmask", "validate_trees"), "hf_mlopt.secure_sum.tree"
    ),
}

__all__, __getattr__ = lazy_names(__name__, _PUBLIC)
