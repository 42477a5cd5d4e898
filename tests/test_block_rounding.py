"""Codes found together: the laws of the solver, on random problems."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qgraph import block_rounding
from qgraph.block_rounding import damped, output_error, round_blocks
from qgraph.block_scales import Levels, searched

LEVELS = {
    "uint4": Levels(0, 15, None, 4, 32),
    "uint2": Levels(0, 3, None, 2, 32),
    "int4": Levels(0, 15, 8, 4, 16),
    "int8": Levels(1, 255, 128, 8, 32),
}


def problem(inputs, outputs, seed, rows=None):
    """Weights and the second moment of inputs that depend on each other, some much larger than others."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((inputs, inputs)) * np.exp(rng.normal(0, 1, inputs)) / np.sqrt(inputs)
    x = rng.standard_normal((rows or 3 * inputs, inputs)) @ mix
    return rng.standard_normal((inputs, outputs)).astype(np.float32), x.T @ x / len(x)


@given(st.integers(0, 1000), st.integers(1, 80), st.integers(1, 6), st.sampled_from(sorted(LEVELS)), st.integers(0, 3))
def test_no_output_errs_more_than_with_the_nearest_codes(seed, inputs, outputs, name, sweeps):
    weight, moment = problem(inputs, outputs, seed)
    moment = damped(moment, 0.01)
    levels = LEVELS[name]
    nearest = searched(weight, levels, np.diagonal(moment))
    found = round_blocks(weight, moment, levels, sweeps)
    before, after = (output_error(weight - one.real, moment) for one in (nearest, found))
    assert np.all(after <= before * (1 + 1e-5))
    assert found.codes.min() >= levels.lowest
    assert found.codes.max() <= levels.highest
    assert np.array_equal(found.codes, np.rint(found.codes))


@given(st.integers(0, 1000), st.integers(2, 80), st.sampled_from(sorted(LEVELS)))
def test_a_sweep_never_makes_the_error_larger(seed, inputs, name):
    weight, moment = problem(inputs, 4, seed)
    moment = damped(moment, 0.01)
    codes = searched(weight, LEVELS[name])
    last = output_error(weight - codes.real, moment)
    for _ in range(4):
        block_rounding._sweep(weight, moment.astype(np.float32), codes)
        now = output_error(weight - codes.real, moment)
        assert np.all(now <= last * (1 + 1e-4) + 1e-9)
        assert np.all(codes.scale > 0)
        last = now


@pytest.mark.parametrize(("name", "gain"), [("uint4", 3.0), ("uint2", 2.0)])
def test_errors_are_handed_on(name, gain):
    """Without feedback the gain over the nearest codes would be nothing; sweeps add to it."""
    weight, moment = problem(192, 64, 0)
    moment = damped(moment, 0.01)
    nearest = searched(weight, LEVELS[name], np.diagonal(moment))
    errors = [output_error(weight - nearest.real, moment).sum()]
    errors += [output_error(weight - round_blocks(weight, moment, LEVELS[name], n).real, moment).sum() for n in (0, 3)]
    first, second = (10 * np.log10(errors[0] / later) for later in errors[1:])
    assert first > gain
    assert second > first + 0.2


def test_it_is_the_solution_by_the_inverse():
    """One input at a time with the Cholesky factor of the inverse, as the paper has it, on scales that stay."""
    weight, moment = problem(48, 8, 3)
    moment = damped(moment, 0.01)
    levels = LEVELS["uint4"]
    start = searched(weight, levels, np.diagonal(moment))
    order = np.argsort(-np.diagonal(moment), kind="stable")
    factor = np.linalg.cholesky(np.linalg.inv(moment[np.ix_(order, order)])).T
    left, wanted = weight[order].astype(np.float64), np.empty((48, 8))
    for i, row in enumerate(order):
        scale, zero = (a[row // levels.size].astype(np.float64) for a in (start.scale, start.zero))
        wanted[row] = np.clip(np.rint(left[i] / scale) + zero, levels.lowest, levels.highest)
        error = (left[i] - (wanted[row] - zero) * scale) / factor[i, i]
        left[i:] -= np.outer(factor[i, i:], error)
    found = block_rounding.round_blocks(weight, moment, levels, 0, start).codes
    # Ties in float32 may fall otherwise, and then all behind them.
    assert np.mean(found == wanted) > 0.97


def test_inputs_never_seen_do_not_matter():
    weight, moment = problem(40, 4, 5)
    moment[7], moment[:, 7] = 0.0, 0.0
    found = round_blocks(weight, damped(moment, 0.01), LEVELS["uint4"])
    assert np.isfinite(found.real).all()
    found = round_blocks(weight, damped(np.zeros((40, 40)), 0.01), LEVELS["uint4"])
    assert np.abs(found.real - weight).max() < 0.5
