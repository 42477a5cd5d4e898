"""Codes rounded together: never worse behind the layer than nearest, and exact where the best is known."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qgraph.rounding import round_together, weighted_error


def problem(seed, groups, inputs, outputs, rows, spread=1.0, size=5.0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((groups, rows, inputs)) * np.exp(spread * rng.standard_normal((groups, 1, inputs)))
    x = x + 2.0 * rng.standard_normal((groups, rows, 1))  # inputs have something in common
    moment = x.transpose(0, 2, 1) @ x / rows
    diagonal = np.einsum("gii->gi", moment)
    diagonal += 0.01 * diagonal.mean(axis=1, keepdims=True)
    return (rng.standard_normal((groups, inputs, outputs)) * size).astype(np.float32), moment


def cost(scaled, codes, moment):
    return weighted_error(scaled - codes, moment)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    groups=st.integers(1, 3),
    inputs=st.integers(1, 150),
    outputs=st.integers(1, 5),
    rows=st.integers(1, 300),
    bounds=st.sampled_from([(-128, 127), (-64, 63), (-8, 7), (-1, 1)]),
    sweeps=st.integers(0, 3),
)
def test_never_worse_than_nearest(seed, groups, inputs, outputs, rows, bounds, sweeps):
    scaled, moment = problem(seed, groups, inputs, outputs, rows)
    codes = round_together(scaled, moment, *bounds, sweeps=sweeps)
    nearest = np.clip(np.rint(scaled), *bounds)
    assert np.all(cost(scaled, codes, moment) <= cost(scaled, nearest, moment))
    assert np.all(codes == np.rint(codes)) and codes.min() >= bounds[0] and codes.max() <= bounds[1]
    assert np.all(np.abs(codes - np.clip(scaled, *bounds)) <= 1.0), "one of the two integers next to it"


@pytest.mark.parametrize("seed", range(4))
def test_nearly_as_good_as_the_best_of_all(seed):
    scaled, moment = problem(seed, 1, 10, 40, 30)
    found = cost(scaled, round_together(scaled, moment, -128, 127), moment)[0]
    choices = np.array(list(itertools.product((0.0, 1.0), repeat=10)))
    best = np.empty(40)
    for column in range(40):
        errors = scaled[0, :, column] - (np.floor(scaled[0, :, column]) + choices)
        best[column] = np.einsum("ki,ij,kj->k", errors, moment[0], errors).min()
    assert np.all(best <= found * (1 + 1e-6))
    assert found.sum() < 1.1 * best.sum()
    assert cost(scaled, np.rint(scaled), moment).sum() > 1.2 * best.sum(), "there is something to gain"


def test_much_better_than_nearest_where_inputs_go_together():
    scaled, moment = problem(0, 1, 200, 40, 2000)
    nearest, found = np.rint(scaled), round_together(scaled, moment, -128, 127)
    assert cost(scaled, found, moment).sum() < 0.6 * cost(scaled, nearest, moment).sum()


def test_each_sweep_lowers_the_error():
    scaled, moment = problem(1, 2, 100, 20, 500)
    costs = [cost(scaled, round_together(scaled, moment, -128, 127, sweeps=n), moment).sum() for n in (0, 1, 2, 8)]
    assert costs == sorted(costs, reverse=True) and costs[0] > costs[-1]


def test_independent_inputs_are_rounded_to_nearest():
    scaled, _ = problem(2, 2, 70, 9, 100)
    moment = np.stack([np.diag(np.geomspace(1e-3, 1e3, 70))] * 2)
    np.testing.assert_array_equal(round_together(scaled, moment, -4, 3), np.clip(np.rint(scaled), -4, 3))


def test_groups_have_nothing_to_do_with_each_other():
    scaled, moment = problem(3, 3, 90, 4, 200)
    together = round_together(scaled, moment, -16, 15)
    for group in range(3):
        alone = round_together(scaled[group : group + 1], moment[group : group + 1], -16, 15)
        # Products of several matrices may differ from those of one in the last bit.
        assert np.mean(alone == together[group : group + 1]) > 0.99


def test_the_same_input_gives_the_same_codes():
    scaled, moment = problem(4, 1, 130, 30, 400)
    kept = scaled.copy(), moment.copy()
    first = round_together(scaled, moment, -128, 127)
    np.testing.assert_array_equal(first, round_together(scaled, moment, -128, 127))
    np.testing.assert_array_equal(scaled, kept[0])
    np.testing.assert_array_equal(moment, kept[1])
