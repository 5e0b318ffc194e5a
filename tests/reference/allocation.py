"""
Allocation of sparsity in float64 and plain loops. Shares no code with the library.

S[i][j]: score of a weight, output neuron i, input channel j. An expert is a list of such matrices.
"""

import itertools
import math

from tests.reference.pruning import num_removed


def removed_energy(expert, p: float) -> float:
    """Sum of S_ij^2 over the floor(p d_in) smallest of every row of every matrix."""
    return sum(sum(s * s for s in sorted(row)[: num_removed(p, len(row))]) for S in expert for row in S)


def zeros(expert, p: float) -> int:
    return sum(num_removed(p, len(row)) for S in expert for row in S)


def best_allocations(experts, grid, p: float, uncovered=()):
    """Least energy, and every way to reach it, of all combinations with as many zeros as p gives everywhere."""
    E = [{p_e: removed_energy(expert, p_e) for p_e in grid} for expert in experts]
    Z = [{p_e: zeros(expert, p_e) for p_e in grid} for expert in experts]
    E = [{p_e: removed_energy(expert, p_e) for p_e in grid} for expert in experts]
    Z = [{p_e: zeros(expert, p_e) for p_e in grid} for expert in experts]
    budget = sum(zeros(expert, p) for expert in experts)
    least, best = math.inf, []
    for choice in itertools.product(grid, repeat=len(experts)):
        if any(choice[e] != p for e in uncovered):
            continue
        if sum(Z[e][p_e] for e, p_e in enumerate(choice)) != budget:
            continue
        energy = sum(E[e][p_e] for e, p_e in enumerate(choice))
        if energy < least * (1 - 1e-12):
            least, best = energy, []
        if energy <= least * (1 + 1e-12):
            best.append(list(choice))
    return least, best


def outlier_fraction(matrices, M: float) -> float:
    r"""Share of A_ij = \sqrt{Q_j} |W_ij| above M times their mean, over all matrices (W, Q) of a layer."""
    A = [abs(w) * math.sqrt(Q[j]) for W, Q in matrices for row in W for j, w in enumerate(row)]
    mean = sum(A) / len(A)
    return sum(a > M * mean for a in A) / len(A)


def owl(D, p: float, lmbda: float, sizes) -> list[float]:
    """Densities: D scaled to a width of 2 lambda, with mean 1 - p over all weights."""
    scaled = [(d - min(D)) / (max(D) - min(D)) * 2 * lmbda for d in D]
    every_weight = [value for value, size in zip(scaled, sizes, strict=True) for _ in range(size)]
    mean = sum(every_weight) / len(every_weight)
    return [1 - (value - mean + 1 - p) for value in scaled]
