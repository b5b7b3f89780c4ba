"""Rounding of a convolution's weights to integers.

weight (O, I, k, k) float64 in steps -> round_to_kernel_sums or round_with_covariance -> integers in +-largest_weight(bits)

By default weights have 7 bits. On processors without VNNI (all before about 2019, and many later ones) the 16-bit sum of two
products of 8 by 8 bits overflows.
"""

import numpy as np

MIN_STEP = 1e-9
_COLUMNS = 64  # inputs rounded between two matrix products
_DAMPING = 0.01  # of the mean variance: a covariance of few radiographs is inaccurate


def largest_weight(bits: int) -> int:
    """Return the largest weight: 63 of 7 bits (2 * 255 * 63 < 2**15, the 16-bit sum of two products), 127 of 8 bits."""
    return 2 ** (bits - 1) - 1


def round_to_kernel_sums(exact: np.ndarray, weight_max: int) -> np.ndarray:
    """Round (O, I, k, k) so that the sum of each kernel is the exact sum, rounded. The taps nearest to 1/2 are adjusted."""
    rounded = np.rint(exact)
    kernel_size = exact[0, 0].size
    for kernel, target in zip(rounded.reshape(-1, kernel_size), exact.reshape(-1, kernel_size), strict=True):
        error = target - kernel
        missing = int(np.rint(error.sum()))
        kernel[np.argsort(-error * np.sign(missing))[: abs(missing)]] += np.sign(missing)
    return np.clip(rounded, -weight_max, weight_max)


def round_with_covariance(exact: np.ndarray, covariance: np.ndarray, weight_max: int) -> np.ndarray:
    """Round (O, I, k, k) input by input, the input with the largest variance first.

    The weights that are not rounded yet compensate each error as far as their inputs correlate (GPTQ: arXiv 2210.17323,
    algorithm 1).

    Args:
        exact: Weights in steps.
        covariance: Of what a kernel reads, (I k k, I k k).
        weight_max: Largest integer, see `largest_weight`.
    """
    flat = exact.reshape(len(exact), -1)
    order = np.argsort(-covariance.diagonal())
    ordered = covariance[np.ix_(order, order)].astype(np.float64)
    ordered[np.diag_indices_from(ordered)] += _DAMPING * max(ordered.diagonal().mean(), MIN_STEP)
    upper = _inverse_root(ordered)
    remaining, rounded_columns = flat[:, order].copy(), np.empty_like(flat)
    for start in range(0, len(order), _COLUMNS):  # the columns behind a block are updated once per block
        stop = min(start + _COLUMNS, len(order))
        errors = np.empty((len(flat), stop - start))
        for column in range(start, stop):
            rounded_columns[:, column] = np.clip(np.rint(remaining[:, column]), -weight_max, weight_max)
            error = (remaining[:, column] - rounded_columns[:, column]) / upper[column, column]
            errors[:, column - start] = error
            remaining[:, column + 1 : stop] -= np.outer(error, upper[column, column + 1 : stop])
        remaining[:, stop:] -= errors @ upper[start:stop, stop:]
    rounded = np.empty_like(rounded_columns)
    rounded[:, order] = rounded_columns
    return rounded.reshape(exact.shape)


def _inverse_root(matrix: np.ndarray) -> np.ndarray:
    """Return an upper triangular U with U.T @ U = the inverse of a symmetric matrix.

    A matrix that rounding errors made indefinite gets a larger diagonal first.
    """
    damping = matrix.diagonal().mean()
    while True:
        try:
            return np.linalg.cholesky(np.linalg.inv(matrix)).T
        except np.linalg.LinAlgError:
            matrix = matrix + damping * np.eye(len(matrix))
            damping *= 10
