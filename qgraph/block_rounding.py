"""Codes of a weight in blocks whose output error is small together, and scales that suit them.

The squared error of a product's output is `tr(E^T H E)`, with `E` the weights' error and `H` the second moment of the
inputs. A first solution takes the inputs one by one, those of most power first, each taking over the errors of those
before it (Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2022,
section 3, with its act-order, in the form of Chee et al., "QuIP: 2-Bit Quantization of Large Language Models With
Guarantees", 2023, section 3: one Cholesky factor of `H`, no inverse; the two are the same algorithm). Rounds follow in
which each block's scale takes its best value with all else fixed, and then each code does (Behdin et al., "QuantEase:
Optimization-based Quantization for Language Models", 2023, section 3); no step can make the error larger.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qgraph.block_scales import Codes, Floats, Levels, searched

__all__ = ["damped", "output_error", "round_blocks"]

_STRIP = 64
"""Inputs whose errors are handed on one at a time; to those behind them they go in one product of matrices."""
_COLUMNS = 2048
"""Output columns that are solved at a time: they are independent of each other."""
_ALIKE = 0.1
"""How much of the damping is the same for all inputs: the rest is in proportion, lest outliers drown the others."""
_TINY = float(np.finfo(np.float32).tiny)


def damped(moment: NDArray[np.float64], share: float) -> NDArray[np.float64]:
    """A copy of `moment` with a share of its diagonal added to it: positive definite, whatever was seen.

    Args:
        moment: [inputs, inputs].
        share: what the data has not shown may still happen; of each input's own power, and a tenth of that of the mean.
    """
    found = np.array(moment, np.float64)
    diagonal = np.einsum("ii->i", found)
    diagonal += share * (diagonal + _ALIKE * diagonal.mean()) + np.finfo(np.float32).tiny
    # An input that never was seen to differ from zero.
    diagonal += np.where(diagonal <= 1e-12 * diagonal.max(), 1e-12 * diagonal.max(), 0.0)
    return found


def output_error(error: NDArray[np.floating], moment: NDArray[np.float64]) -> NDArray[np.float64]:
    """`e^T H e` of each output, [outputs].

    Args:
        error: [inputs, outputs].
        moment: `H`, [inputs, inputs].
    """
    wide = error.astype(np.float64)
    return np.asarray(((moment @ wide) * wide).sum(axis=0))


def round_blocks(
    target: NDArray[np.floating],
    moment: NDArray[np.float64],
    levels: Levels,
    sweeps: int = 3,
    start: Codes | None = None,
) -> Codes:
    """Codes and scales near `target` with a small error behind the product.

    Args:
        target: the weights wanted, [inputs, outputs].
        moment: second moment of the inputs, [inputs, inputs], positive definite.
        levels: what codes there are.
        sweeps: how often scales and codes are bettered in turn.
        start: scales and zero points to begin with; those of `searched` unless given.

    Returns:
        In no column is `output_error` larger than that of the nearest codes on the scales begun with.
    """
    wanted = np.ascontiguousarray(target, np.float32)
    nearest = searched(wanted, levels, np.diagonal(moment)) if start is None else start
    order = np.argsort(np.diagonal(moment), kind="stable")
    factor = np.linalg.cholesky(moment[np.ix_(order, order)])
    factor /= np.diagonal(factor).copy()
    shares = np.asarray(factor.T, np.float32, order="C")
    del factor
    small = np.asarray(moment, np.float32)
    found = Codes(np.empty_like(wanted), nearest.scale.copy(), nearest.zero.copy(), levels)
    for left in range(0, wanted.shape[1], _COLUMNS):
        columns = slice(left, left + _COLUMNS)
        part = Codes(
            np.empty_like(wanted[:, columns]),
            nearest.scale[:, columns].copy(order="C"),
            nearest.zero[:, columns].copy(order="C"),
            levels,
        )
        aim = np.ascontiguousarray(wanted[:, columns])
        _one_by_one(aim, shares, order, part)
        for _ in range(sweeps):
            _sweep(aim, small, part)
        found.codes[:, columns], found.scale[:, columns] = part.codes, part.scale
    return _best(wanted, moment, found, nearest)


def _best(wanted: Floats, moment: NDArray[np.float64], found: Codes, nearest: Codes) -> Codes:
    """Of each column the better one."""
    worse = output_error(wanted - found.real, moment) > output_error(wanted - nearest.real, moment)
    if worse.any():
        found.codes[:, worse], found.scale[:, worse] = nearest.codes[:, worse], nearest.scale[:, worse]
    return found


def _one_by_one(target: Floats, shares: Floats, order: NDArray[np.intp], into: Codes) -> None:
    """From the last input in `order` to the first, each rounded after it has taken over the errors of those before.

    With `H = L L^T` in that order, the error is a sum over inputs i of `(l_ii e_i + sum over j > i of l_ji e_j)^2`, so
    input i can make its own term small whatever the later ones are.
    """
    lowest, highest = np.float32(into.levels.lowest), np.float32(into.levels.highest)
    error = np.zeros_like(target)  # in `order`
    block = (order // into.levels.size).tolist()
    for stop in range(len(target), 0, -_STRIP):
        start = max(0, stop - _STRIP)
        wanted = target[order[start:stop]]
        if stop < len(target):
            wanted += shares[start:stop, stop:] @ error[stop:]
        for i in range(stop - 1, start - 1, -1):
            value = wanted[i - start]
            if i + 1 < stop:
                value += shares[i, i + 1 : stop] @ error[i + 1 : stop]
            scale, zero = into.scale[block[i]], into.zero[block[i]]
            code = value / scale
            np.rint(code, out=code)
            code += zero
            np.clip(code, lowest, highest, out=code)
            into.codes[order[i]] = code
            code -= zero
            code *= scale
            np.subtract(target[order[i]], code, out=error[i])


def _sweep(target: Floats, moment: Floats, of: Codes) -> None:
    """Block by block, the best scale with all else fixed, then the best code of each input with all else fixed."""
    levels, error = of.levels, target - of.real
    lowest, highest = np.float32(levels.lowest), np.float32(levels.highest)
    for block, start in enumerate(range(0, len(target), levels.size)):
        rows = slice(start, min(start + levels.size, len(target)))
        slope = moment[rows] @ error
        here = moment[rows, rows]
        steps = of.codes[rows] - of.zero[block]
        curved = here @ steps
        bend = np.einsum("kn,kn->n", steps, curved)
        change = np.einsum("kn,kn->n", steps, slope) / np.maximum(bend, _TINY)
        # A scale stays positive; where all codes stand for zero it has no say.
        change = np.where((bend > _TINY) & (of.scale[block] + change > _TINY), change, np.float32(0.0))
        of.scale[block] += change
        curved *= change
        slope -= curved
        steps *= change
        error[rows] -= steps
        scale = of.scale[block]
        moves = np.zeros_like(slope)
        for i in range(len(slope)):
            pull = slope[i]
            if i:
                pull += here[i, :i] @ moves[:i]
            pull /= here[i, i] * scale
            code = of.codes[start + i]
            pull += code
            np.rint(pull, out=pull)
            np.clip(pull, lowest, highest, out=pull)
            np.subtract(code, pull, out=moves[i])
            moves[i] *= scale
            code[:] = pull
        error[rows] += moves
