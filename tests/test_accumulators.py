"""Scales of biases, and of weights whose int32 accumulator provably cannot overflow."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qgraph.errors import QuantizationError
from qgraph.formats import INT8, INT32, UINT8, Int
from qgraph.qparams import QParams, bias_scale, dequantize, from_range, limit_accumulator, quantize
from qgraph.spec import PerAxis, PerTensor, QuantSpec


def test_bias_scale_is_the_product_of_the_scales():
    activation = from_range(-1.0, 3.0, QuantSpec(UINT8))
    weight = from_range([-1.0, -2.0], [1.0, 0.5], QuantSpec(INT8, PerAxis(0), symmetric=True))
    bias = bias_scale(activation, weight)
    assert bias.format == INT32 and bias.axis == 0
    assert bias.zero_point.tolist() == [0.0, 0.0]
    assert bias.scale.tolist() == (activation.scale.astype(np.float64) * weight.scale).astype(np.float32).tolist()
    single = bias_scale(activation, from_range(-1.0, 1.0, QuantSpec(INT8, symmetric=True)))
    assert single.axis is None and single.scale.shape == ()


def test_int32_codes_are_counted_beyond_float32():
    params = QParams(np.array([1.0], np.float32), np.zeros(1), INT32, 0)
    assert quantize(np.array([2.0**24 + 1]), params).tolist() == [2**24 + 1]
    assert quantize(np.array([1e30, -1e30]), params).tolist() == [2**31 - 1, -(2**31)]


def bounds_of(activation, weight, array, bias):
    """What each channel's accumulator may reach at most, in exact integers."""
    fmt = activation.format
    reach = int(max(fmt.highest - activation.zero_point, activation.zero_point - fmt.lowest))
    codes = quantize(array, weight).astype(object)
    sums = [reach * int(sum(abs(code) for code in row)) for row in codes]
    if bias is None:
        return sums
    bias_codes = quantize(bias, bias_scale(activation, weight))
    return [total + abs(int(code)) for total, code in zip(sums, bias_codes, strict=True)]


EXPONENTS = st.floats(-37, 15)


@st.composite
def layers(draw):
    """A weight, a bias and an input's range whose magnitudes have nothing to do with each other."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    channels, width = draw(st.integers(1, 4)), draw(st.sampled_from([1, 7, 300, 20_000]))
    magnitudes = 10.0 ** np.array(draw(st.lists(EXPONENTS, min_size=channels, max_size=channels)))
    array = rng.uniform(-1, 1, (channels, width)) if draw(st.booleans()) else rng.choice([-1.0, 1.0], (channels, width))
    array = np.clip(array * magnitudes[:, None], -1e37, 1e37).astype(np.float32)
    bias = None
    if draw(st.booleans()):
        bias = rng.choice([-1.0, 0.0, 1.0], channels) * 10.0 ** draw(st.floats(-37, 8))
        bias = bias.astype(np.float32)
    reach = 10.0 ** draw(EXPONENTS)
    low, high = draw(st.sampled_from([(0.0, 1.0), (-0.5, 1.0), (-1.0, 0.0), (-1.0, 0.1)]))
    activation = from_range(low * reach, high * reach, QuantSpec(draw(st.sampled_from([UINT8, INT8]))))
    return activation, array, bias


@settings(deadline=None, max_examples=150)
@given(layers(), st.booleans(), st.sampled_from([INT8, Int(7), Int(8, narrow=True)]))
def test_the_accumulator_provably_cannot_overflow(layer, per_axis, fmt):
    activation, array, bias = layer
    if per_axis:
        low, high, granularity = array.min(1), array.max(1), PerAxis(0)
    else:
        low, high, granularity = array.min(), array.max(), PerTensor()
    weight = from_range(low, high, QuantSpec(fmt, granularity, symmetric=True))
    sums = np.abs(array).astype(np.float64).sum(1)
    limited = limit_accumulator(activation, weight, sums, bias)
    assert max(bounds_of(activation, limited, array, bias)) < 2**31
    # Only ever wider, and only by as much as the bound asks for.
    assert np.all(limited.scale >= weight.scale)
    assert (limited.format, limited.axis, limited.zero_point.shape) == (
        weight.format,
        weight.axis,
        weight.zero_point.shape,
    )
    if np.array_equal(limited.scale, weight.scale):
        assert limited is weight
    # The bias has a scale of its own that float32 can express.
    assert np.all(bias_scale(activation, limited).scale > 0)


def test_a_tiny_scale_with_a_large_bias_is_widened_by_just_enough():
    """The known failure of other tools: scale_x * scale_w too small to hold the bias in 32 bits."""
    activation = from_range(0.0, 1.0, QuantSpec(UINT8))
    array = np.array([[1e-9, -1e-9], [0.5, 0.25]], np.float32)
    bias = np.array([3.0, 3.0], np.float32)
    weight = from_range(array.min(1), array.max(1), QuantSpec(INT8, PerAxis(0), symmetric=True))
    overflowing = np.rint(bias / bias_scale(activation, weight).scale.astype(np.float64))
    assert overflowing[0] > 2**31
    limited = limit_accumulator(activation, weight, np.abs(array).sum(1), bias)
    assert limited.scale[0] > weight.scale[0]
    assert limited.scale[1] == weight.scale[1]
    params = bias_scale(activation, limited)
    assert 0.95 * 2**31 < bounds_of(activation, limited, array, bias)[0] < 2**31
    np.testing.assert_allclose(dequantize(quantize(bias, params), params), bias, rtol=1e-6)


def test_ordinary_weights_stay_untouched():
    rng = np.random.default_rng(3)
    array = rng.standard_normal((16, 2048)).astype(np.float32)
    activation = from_range(-2.0, 6.0, QuantSpec(UINT8))
    for granularity, ends in (
        (PerAxis(0), (array.min(1), array.max(1))),
        (PerTensor(), (array.min(), array.max())),
    ):
        weight = from_range(*ends, QuantSpec(INT8, granularity, symmetric=True))
        for bias in (None, np.ones(16, np.float32)):
            assert limit_accumulator(activation, weight, np.abs(array).sum(1), bias) is weight


@pytest.mark.parametrize("ends", [(0.0, 1.0), (-1.0, 0.0)])
def test_a_sum_too_long_is_limited_without_a_bias(ends):
    activation = from_range(*ends, QuantSpec(UINT8))
    array = np.ones((1, 80_000), np.float32)
    weight = from_range([-1.0], [1.0], QuantSpec(INT8, PerAxis(0), symmetric=True))
    assert bounds_of(activation, weight, array, None)[0] > 2**31
    limited = limit_accumulator(activation, weight, np.abs(array).sum(1), None)
    assert 0.9 * 2**31 < bounds_of(activation, limited, array, None)[0] < 2**31


def test_a_bias_beyond_all_scales_is_an_error():
    activation = from_range(0.0, 1e-31, QuantSpec(UINT8))
    weight = from_range([-1.0], [1.0], QuantSpec(INT8, PerAxis(0), symmetric=True))
    with pytest.raises(QuantizationError, match="no scale can hold both"):
        limit_accumulator(activation, weight, np.array([7.0]), np.array([1e15], np.float32))


@given(st.floats(1e-38, 1e18), st.floats(1e-38, 1e18))
@example(1e-30, 1e-30)
def test_a_bias_of_zero_has_a_scale_however_small_the_product(x, w):
    activation = from_range(0.0, x, QuantSpec(UINT8))
    weight = from_range([-w], [w], QuantSpec(INT8, PerAxis(0), symmetric=True))
    zero = np.zeros(1, np.float32)
    params = bias_scale(activation, limit_accumulator(activation, weight, np.array([w]), zero))
    assert params.scale > 0
    assert quantize(zero, params).tolist() == [0]
