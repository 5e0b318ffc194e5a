"""The columns of one party, cut into batches once, with products that cost O(nnz)."""

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from hf_mlopt.errors import InputError
from hf_mlopt.vertical.updates.schedule import BatchSchedule


@dataclass(frozen=True, eq=False)
class Batch:
    """
    Some rows of a block.

    Args:
        rows (`np.ndarray`): Their numbers, `[B]`.
        columns (`slice` or `np.ndarray`): Features of the block that occur in them, C of d_l.
        features (`np.ndarray` or `sparse.csr_array`): `[B, C]`, float64.
    """

    rows: np.ndarray
    columns: slice | np.ndarray
    features: np.ndarray | sparse.csr_array

    def forward(self, weights: np.ndarray) -> np.ndarray:
        """X_B w, `[B, K]`, from the weights of `columns`, `[C, K]`."""
        return self.features @ weights

    def backward(self, theta: np.ndarray) -> np.ndarray:
        """X_Bᵀ θ, `[C, K]`, from `[B, K]`."""
        return self.features.T @ theta


class FeatureBlock:
    """
    A party's columns, pre-cut along a schedule; memory O(nnz) when sparse.

    Args:
        features (array or sparse array): `[n, d_l]`, real numbers.
        schedule ([`BatchSchedule`]): Of n rows.
        bias (`bool`, *optional*, defaults to `False`): Appends a column of ones, regularised like any other.

    Raises:
        InputError: If the features are no matrix of n rows or not finite.
    """

    def __init__(self, features, schedule: BatchSchedule, bias: bool = False):
        is_sparse = sparse.issparse(features)
        matrix = sparse.csr_array(features, dtype=np.float64) if is_sparse else np.asarray(features, np.float64)
        if matrix.ndim != 2 or matrix.shape[0] != schedule.num_rows:
            text = f"features: shape {list(matrix.shape)}, must be a matrix of {schedule.num_rows} rows"
            raise InputError(f"{text}; align the rows of all parties first")
        _refuse_non_finite(matrix)
        self.schedule, self.bias = schedule, bias
        self.num_rows, self.num_features = matrix.shape[0], matrix.shape[1] + bias
        self.batches = [self._cut(matrix, schedule.rows(number)) for number in range(schedule.num_batches)]

    def _cut(self, matrix, rows: np.ndarray) -> Batch:
        part = matrix[rows]
        if not sparse.issparse(part):
            part = np.hstack([part, np.ones((len(rows), 1))]) if self.bias else np.ascontiguousarray(part)
            return Batch(rows, slice(None), part)
        if self.bias:
            part = sparse.hstack([part, np.ones((len(rows), 1))], format="csr")
        columns = np.unique(part.indices)
        if 2 * len(columns) > self.num_features:  # gathering most of the columns costs more than taking all
            return Batch(rows, slice(None), sparse.csr_array(part))
        narrow = (part.data, np.searchsorted(columns, part.indices), part.indptr)
        return Batch(rows, columns, sparse.csr_array(narrow, shape=(len(rows), len(columns))))

    def scores(self, weights: np.ndarray) -> np.ndarray:
        """X_l w_l of all rows in their own order, `[n, K]`, from `[d_l, K]`."""
        scores = np.empty((self.num_rows, weights.shape[1]))
        for batch in self.batches:
            scores[batch.rows] = batch.forward(weights[batch.columns])
        return scores

    def transposed(self, theta: np.ndarray) -> np.ndarray:
        """X_lᵀ θ over all rows, `[d_l, K]`, from `[n, K]`."""
        total = np.zeros((self.num_features, theta.shape[1]))
        for batch in self.batches:
            total[batch.columns] += batch.backward(theta[batch.rows])
        return total


def _refuse_non_finite(matrix):
    data = matrix.data if sparse.issparse(matrix) else matrix
    if np.isfinite(data).all():
        return
    place = np.argwhere(~np.isfinite(data))[0]
    if sparse.issparse(matrix):
        row = int(np.searchsorted(matrix.indptr, place[0], side="right")) - 1
        place = (row, matrix.indices[place[0]])
    value = matrix[tuple(place)]
    raise InputError(f"features[{place[0]}, {place[1]}]={value}: must be finite; drop or impute it")
