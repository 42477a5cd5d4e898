"""Scales of blocks by least squares: never worse than the block's own range, and stored as they were found."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qgraph import blocks
from qgraph.block_scales import Levels, searched
from qgraph.formats import UINT2, UINT4, Int
from qgraph.spec import PerBlock, QuantSpec

FORMATS = (UINT4, UINT2, Int(8, narrow=True))


def spec_of(form, size=32, axis=0):
    return QuantSpec(form, PerBlock(axis, size), symmetric=form.signed, observer="minmax")


def fitted(weight, spec):
    """Blocks of the least squared error, all weights counted alike."""
    rows = weight if spec.granularity.axis == 0 else weight.T
    return searched(rows, Levels.of(spec)).packed()


def heavy(inputs, outputs, seed):
    return np.random.default_rng(seed).standard_t(3, (inputs, outputs)).astype(np.float32)


@given(
    st.integers(0, 1000), st.integers(1, 100), st.integers(1, 9), st.sampled_from(FORMATS), st.sampled_from([32, 64])
)
def test_no_block_errs_more_than_on_its_own_range(seed, inputs, outputs, form, size):
    weight, spec = heavy(inputs, outputs, seed), spec_of(form, size)
    own = np.square(blocks.nearest(weight, spec).real.T - weight)
    found = np.square(fitted(weight, spec).real.T - weight)
    for start in range(0, inputs, size):
        part = slice(start, start + size)
        assert np.all(found[part].sum(axis=0) <= own[part].sum(axis=0) * (1 + 1e-4) + 1e-10)


@given(st.integers(0, 1000), st.integers(33, 90), st.sampled_from(FORMATS))
def test_weighted_error_is_no_larger_than_without_weighting(seed, inputs, form):
    weight, levels = heavy(inputs, 5, seed), Levels.of(spec_of(form))
    power = np.exp(np.random.default_rng(seed).normal(0, 2, inputs)).astype(np.float32)
    own = blocks.nearest(weight, spec_of(form)).real.T
    found = searched(weight, levels, power).real
    for start in range(0, inputs, 32):
        part = slice(start, start + 32)
        before, after = (power[part] @ np.square(weight - w)[part] for w in (own, found))
        assert np.all(after <= before * (1 + 1e-4) + 1e-10)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("axis", [0, 1])
def test_what_is_packed_is_what_was_found(form, axis):
    weight = heavy(75, 11, 1)
    codes = searched(weight, Levels.of(spec_of(form)))
    packed = fitted(weight if axis == 0 else weight.T, spec_of(form, axis=axis))
    np.testing.assert_allclose(packed.real.T, codes.real, rtol=0, atol=1e-6)
    assert (packed.zero_point is None) == form.signed
    assert packed.inner == 75


def test_least_squares_gain_on_normal_weights():
    """At four bits about half a decibel over the range, at two bits much more."""
    weight = np.random.default_rng(0).standard_normal((256, 64)).astype(np.float32)
    for form, gain in ((UINT4, 0.3), (UINT2, 1.5)):
        before, after = (
            np.square(weight - found(weight, spec_of(form)).real.T).sum() for found in (blocks.nearest, fitted)
        )
        assert 10 * np.log10(before / after) > gain


@pytest.mark.parametrize("form", FORMATS)
def test_blocks_of_zeros_and_of_one_number_are_exact(form):
    weight = np.zeros((64, 4), np.float32)
    weight[:, 1], weight[32:, 2] = 0.25, -3.0
    np.testing.assert_allclose(fitted(weight, spec_of(form)).real.T, weight, rtol=2e-6)
    silent = searched(weight, Levels.of(spec_of(form)), np.zeros(64))
    np.testing.assert_allclose(silent.real, weight, rtol=2e-6)
