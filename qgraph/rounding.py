"""Codes of a weight whose output error is small together, not each nearest to its own number.

The squared error of a layer's output is `tr(E H E^T)` with `E` the weights' error and `H` the second moment of the
inputs: rounding one weight up can make good for another one rounded down (Nagel et al., "Up or Down? Adaptive Rounding
for Post-Training Quantization", 2020, section 3). A first solution takes the inputs one by one, each correcting what
those before it have left (Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", 2022, in the form of Chee et al., "QuIP: 2-Bit Quantization of Large Language Models With Guarantees",
2023, section 3, which needs one Cholesky factor and no inverse); sweeps of coordinate descent better it (Behdin et
al., "QuantEase: Optimization-based Quantization for Language Models", 2023, section 3).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["round_together", "weighted_error"]

_BLOCK = 64

Floats = NDArray[np.float32]


def round_together(
    scaled: NDArray[np.floating],
    moment: NDArray[np.float64],
    lowest: float,
    highest: float,
    sweeps: int = 4,
    reach: float = 1.0,
) -> Floats:
    """Integers near `scaled` with a small error behind the layer.

    Args:
        scaled: weights divided by their scales, [groups, inputs, outputs].
        moment: second moment of the inputs, [groups, inputs, inputs], positive definite.
        lowest: smallest integer allowed.
        highest: largest.
        sweeps: how often coordinate descent goes through all inputs.
        reach: by how much an integer may differ from its weight; 1 allows the two next to it.

    Returns:
        float32 of `scaled`'s shape. For no output is `weighted_error` larger than that of rounding to nearest.
    """
    scaled = np.asarray(scaled, np.float32)
    # By a power of two, which changes no digit: squares of what float32 holds need not fit into it.
    largest = np.einsum("gii->gi", moment).max(axis=1, initial=0.0)
    moment = np.ldexp(moment, -np.frexp(largest)[1][:, None, None])
    nearest = np.clip(np.rint(scaled), lowest, highest)
    # Inputs that matter most are rounded first, while all others are still free to make good for them.
    order = np.argsort(np.einsum("gii->gi", moment), axis=1, kind="stable")
    sorted_moment = np.take_along_axis(np.take_along_axis(moment, order[:, :, None], 1), order[:, None, :], 2)
    target = np.take_along_axis(scaled, order[:, :, None], 1)
    low = np.clip(np.ceil(target - reach), lowest, highest)
    high = np.clip(np.floor(target + reach), lowest, highest)
    codes = _one_by_one(target, sorted_moment, low, high)
    small = np.asarray(sorted_moment, np.float32)
    for _ in range(sweeps):
        if not _sweep(target, codes, small, low, high):
            break
    found = np.empty_like(codes)
    np.put_along_axis(found, order[:, :, None], codes, 1)
    better = weighted_error(scaled - found, moment) < weighted_error(scaled - nearest, moment)
    return np.where(better[:, None, :], found, nearest)


def weighted_error(error: NDArray[np.floating], moment: NDArray[np.float64]) -> NDArray[np.float64]:
    """`e^T H e` of each output, [groups, outputs].

    Args:
        error: [groups, inputs, outputs].
        moment: `H`, [groups, inputs, inputs].
    """
    wide = error.astype(np.float64)
    return np.asarray(((moment @ wide) * wide).sum(axis=1))


def _one_by_one(target: Floats, moment: NDArray[np.float64], low: Floats, high: Floats) -> Floats:
    """From the last input to the first, each rounded after it has taken over the errors of those behind it.

    With `H = L L^T`, the error is a sum over inputs i of `(l_ii e_i + sum over j > i of l_ji e_j)^2`, so input i can
    make its own term small whatever the later ones are.
    """
    factor = np.linalg.cholesky(moment)
    factor /= np.einsum("gii->gi", factor)[:, None, :].copy()
    shares = np.asarray(factor.transpose(0, 2, 1), np.float32, order="C")
    codes, error = np.empty_like(target), np.zeros_like(target)
    count = target.shape[1]
    for stop in range(count, 0, -_BLOCK):
        start = max(0, stop - _BLOCK)
        wanted = target[:, start:stop] + shares[:, start:stop, stop:] @ error[:, stop:]
        for i in range(stop - 1, start - 1, -1):
            value = wanted[:, i - start]
            if i + 1 < stop:
                value = value + (shares[:, i : i + 1, i + 1 : stop] @ error[:, i + 1 : stop])[:, 0]
            codes[:, i] = np.clip(np.rint(value), low[:, i], high[:, i])
            error[:, i] = target[:, i] - codes[:, i]
    return codes


def _sweep(target: Floats, codes: Floats, moment: Floats, low: Floats, high: Floats) -> bool:
    """Set each integer in turn to its best value with all others fixed; whether any of them moved."""
    error = target - codes
    diagonal = np.einsum("gii->gi", moment)
    moved = False
    for start in range(0, target.shape[1], _BLOCK):
        stop = min(start + _BLOCK, target.shape[1])
        slope = moment[:, start:stop] @ error
        change = np.zeros_like(slope)
        for i in range(start, stop):
            here = slope[:, i - start]
            if i > start:
                here = here + (moment[:, i : i + 1, start:i] @ change[:, : i - start])[:, 0]
            # The best real value lies slope / curvature away; the best integer is the one nearest to it.
            best = np.clip(np.rint(codes[:, i] + here / diagonal[:, i, None]), low[:, i], high[:, i])
            change[:, i - start] = codes[:, i] - best
            codes[:, i] = best
        if change.any():
            moved = True
            error[:, start:stop] += change
    return moved
