"""From ranges to scales and zero points, through codes and back, as the runtime does it, bit for bit."""

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qgraph.errors import QuantizationError
from qgraph.formats import INT8, INT16, UINT8, UINT16, Int, UInt
from qgraph.qparams import QParams, dequantize, fake_quantize, from_range, quantize
from qgraph.session import Session, SessionOptions
from qgraph.spec import PerAxis, PerBlock, PerTensor, QuantSpec

FORMATS = [INT8, UINT8, INT16, UINT16, Int(7), Int(8, narrow=True), UInt(7), Int(4), UInt(4)]
# Above the limit of the smallest scale for all formats.
FLOATS = st.floats(-(2.0**100), 2.0**100, width=32).map(lambda v: 0.0 if abs(v) < 1e-30 else v)
SPECS = st.builds(QuantSpec, st.sampled_from(FORMATS), symmetric=st.booleans())


@st.composite
def ranges(draw):
    low, high = sorted((draw(FLOATS), draw(FLOATS)))
    return low, high


def tolerance(values, params):
    """Half a step, and what float32 arithmetic adds: a few units in the last place of the values and of the ends."""
    ends = max(abs(end) for end in params.range)
    return np.asarray(params.scale, np.float64) / 2 + 2.0**-21 * np.maximum(np.abs(values), ends)


@given(ranges(), SPECS)
def test_the_range_is_covered_to_within_half_a_step(bounds, spec):
    params = from_range(*bounds, spec)
    ends = np.array(bounds)
    low, high = params.range
    limit = tolerance(ends, params)
    assert np.all(ends >= low - limit) and np.all(ends <= high + limit)
    assert params.scale.dtype == np.float32 and params.scale.shape == () and params.scale > 0


@given(ranges(), SPECS)
def test_zero_is_expressed_exactly(bounds, spec):
    params = from_range(*bounds, spec)
    assert params.zero_point == np.rint(params.zero_point)
    assert spec.format.lowest <= params.zero_point <= spec.format.highest
    assert fake_quantize(np.zeros(3, np.float32), params).tolist() == [0.0, 0.0, 0.0]


@given(ranges(), st.sampled_from(FORMATS))
def test_symmetric_zero_point_is_the_middle(bounds, fmt):
    params = from_range(*bounds, QuantSpec(fmt, symmetric=True))
    assert params.zero_point == fmt.middle
    assert params.zero_point == (0 if fmt.signed else 2 ** (fmt.bits - 1))


@pytest.mark.parametrize(
    ("fmt", "divisor"), [(INT8, 127.5), (Int(8, narrow=True), 127), (UINT8, 127.5), (Int(7), 63.5), (Int(4), 7.5)]
)
def test_symmetric_divisors(fmt, divisor):
    spec = QuantSpec(fmt, symmetric=True)
    assert from_range(-3.0, 1.0, spec).scale == np.float32(3.0 / divisor)
    assert from_range(-1.0, 3.0, spec).scale == np.float32(3.0 / divisor)


def test_affine_uses_all_codes():
    params = from_range(-1.0, 4.1, QuantSpec(UINT8))
    assert params.scale == np.float32(5.1 / 255)
    assert params.zero_point == 50
    params = from_range(-1.0, 4.1, QuantSpec(INT8))
    assert params.zero_point == 50 - 128


@given(st.floats(2.0**-90, 2.0**100, width=32), st.floats(0, 1), st.sampled_from(FORMATS))
def test_one_sided_ranges_start_at_the_outermost_code(high, share, fmt):
    assert from_range(high * share, high, QuantSpec(fmt)).zero_point == fmt.lowest
    assert from_range(-high, -high * share, QuantSpec(fmt)).zero_point == fmt.highest


@given(SPECS)
def test_an_all_zero_tensor_is_expressed_exactly(spec):
    params = from_range(0.0, 0.0, spec)
    assert params.scale == 1.0  # not tiny: scales are multiplied
    assert fake_quantize(np.zeros(1, np.float32), params) == 0


@pytest.mark.parametrize("reach", [5e-324, 1e-45, 1e-40, 1e-37, 3.4e38])
@given(spec=SPECS)
def test_extreme_ranges_have_a_normal_scale(reach, spec):
    for low, high in ((0.0, reach), (-reach, 0.0), (-reach, reach)):
        params = from_range(low, high, spec)
        assert np.finfo(np.float32).tiny <= params.scale < np.inf
        codes = quantize(np.array([low, 0.0, high], np.float32), params).astype(int)
        assert codes[0] <= params.zero_point == codes[1] <= codes[2]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bad", [(np.nan, 1.0), (0.0, np.nan), (-np.inf, 1.0), (0.0, np.inf), (np.nan, np.nan)])
def test_a_range_that_is_not_finite_is_an_error(bad, symmetric):
    with pytest.raises(QuantizationError, match="must be finite"):
        from_range(*bad, QuantSpec(UINT8, symmetric=symmetric))
    with pytest.raises(QuantizationError, match="must be finite"):
        from_range([-1.0, bad[0]], [1.0, bad[1]], QuantSpec(UINT8, PerAxis(0), symmetric))


@pytest.mark.parametrize("bounds", [(1.0, -1.0), (2.0, 1.0), (-1.0, -2.0)])
def test_a_reversed_range_is_an_error(bounds):
    with pytest.raises(QuantizationError, match="low end lies above"):
        from_range(*bounds, QuantSpec(UINT8))


def test_granularity_is_kept():
    ones = np.ones((2, 3))
    assert (from_range(0, 1, QuantSpec(INT8)).axis, from_range(0, 1, QuantSpec(INT8)).block) == (None, None)
    params = from_range(-ones[0], ones[0], QuantSpec(INT8, PerAxis(1)))
    assert (params.scale.shape, params.zero_point.shape, params.axis, params.block) == ((3,), (3,), 1, None)
    params = from_range(-ones, ones, QuantSpec(INT8, PerBlock(1, 16)))
    assert (params.scale.shape, params.axis, params.block) == ((2, 3), 1, 16)


@given(ranges(), SPECS, st.lists(st.floats(-0.2, 1.2), min_size=1, max_size=20), st.floats(0, 1))
def test_error_is_half_a_step_inside_and_saturates_outside(bounds, spec, shares, extra):
    params = from_range(*bounds, spec)
    low, high = params.range
    values = np.array([low + (high - low) * share for share in [*shares, extra]], np.float32)
    found = fake_quantize(values, params).astype(np.float64)
    inside = (values >= low) & (values <= high)
    assert np.all(np.abs(found - values)[inside] <= tolerance(values, params)[inside])
    limit = 2.0**-22 * max(abs(low), abs(high))
    assert np.all(np.abs(found[values > high] - high) <= limit)
    assert np.all(np.abs(found[values < low] - low) <= limit)


@given(ranges(), SPECS)
def test_every_code_comes_back(bounds, spec):
    params = from_range(*bounds, spec)
    codes = spec.format.encode(np.arange(spec.format.lowest, spec.format.highest + 1))
    assert np.array_equal(quantize(dequantize(codes, params), params), codes)


@given(ranges(), st.booleans())
def test_seven_bits_stay_in_seven_bits(bounds, symmetric):
    params = from_range(*bounds, QuantSpec(Int(7), symmetric=symmetric))
    codes = quantize(np.array([-3.4e38, *bounds, 3.4e38], np.float32), params)
    assert codes.dtype == np.int8
    assert codes.min() >= -64 and codes.max() <= 63


def test_rounding_is_half_to_even():
    params = QParams(np.float32(0.5), np.float64(10), UINT8)
    values = np.array([0.25, 0.75, 1.25, -0.25, -0.75], np.float32)
    assert quantize(values, params).tolist() == [10, 12, 12, 10, 8]


def test_huge_values_and_infinities_saturate_in_silence():
    params = from_range(0.0, 1e-37, QuantSpec(UINT8))
    assert quantize(np.array([3.4e38, -3.4e38, np.inf, -np.inf], np.float32), params).tolist() == [255, 0, 255, 0]


def test_per_axis_is_each_slice_alone():
    rng = np.random.default_rng(0)
    values = rng.standard_normal((3, 4, 5)).astype(np.float32) * np.array([1, 10, 100, 0], np.float32)[:, None]
    for axis in (1, -2):
        params = from_range(values.min((0, 2)), values.max((0, 2)), QuantSpec(UINT8, PerAxis(axis)))
        codes, back = quantize(values, params), fake_quantize(values, params)
        for channel in range(4):
            part = values[:, channel]
            alone = from_range(part.min(), part.max(), QuantSpec(UINT8))
            assert np.array_equal(codes[:, channel], quantize(part, alone))
            assert np.array_equal(back[:, channel], fake_quantize(part, alone))


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_per_block_is_each_block_alone(axis):
    size, rng = 4, np.random.default_rng(1)
    values = rng.standard_normal((10, 6)).astype(np.float32) * np.geomspace(1, 50, 10)[:, None].astype(np.float32)
    blocks = np.array_split(values, range(size, values.shape[axis], size), axis=axis)  # the last one is shorter
    low = np.stack([block.min(axis) for block in blocks], axis)
    high = np.stack([block.max(axis) for block in blocks], axis)
    params = from_range(low, high, QuantSpec(INT8, PerBlock(axis, size), symmetric=True))
    codes, back = quantize(values, params), fake_quantize(values, params)
    assert codes.shape == values.shape
    for number, block in enumerate(blocks):
        where = np.take(np.arange(values.shape[axis]), range(number * size, number * size + block.shape[axis]))
        scale = np.take(params.scale, [number], axis)
        assert np.array_equal(np.take(codes, where, axis), np.clip(np.rint(block / scale), -128, 127))
        assert np.array_equal(np.take(back, where, axis), np.clip(np.rint(block / scale), -128, 127) * scale)


ONNX_NAME = {INT8: "int8", UINT8: "uint8", INT16: "int16", UINT16: "uint16"}


def operators(fmt, shape, scale_shape, attributes):
    """A session of QuantizeLinear and DequantizeLinear with scale and zero point as inputs."""
    kind, scales = ONNX_NAME[fmt], f"[{', '.join(map(str, scale_shape))}]" if scale_shape else ""
    where = f"[{', '.join(map(str, shape))}]"
    text = f"""<ir_version: 10, opset_import: ["" : 21]>
        g (float{where} x, float{scales} scale, {kind}{scales} zero) => ({kind}{where} codes, float{where} back)
        {{ codes = QuantizeLinear{attributes}(x, scale, zero)
           back = DequantizeLinear{attributes}(codes, scale, zero) }}
    """
    return Session(ir.from_onnx_text(text), SessionOptions(threads=1, level="none"))


def hard_values(rng, shape, params):
    """Random values inside and outside the range, values halfway between codes, and their float32 neighbours."""
    scale = np.broadcast_to(np.asarray(params.scale, np.float64).max(), shape)
    codes = rng.integers(int(params.format.lowest) - 3, int(params.format.highest) + 3, shape) - params.zero_point.max()
    half = ((codes + 0.5) * scale).astype(np.float32)
    kinds = np.stack(
        [
            (rng.standard_normal(shape) * params.format.steps / 3 * scale).astype(np.float32),
            half,
            np.nextafter(half, np.float32(np.inf)),
            np.nextafter(half, np.float32(-np.inf)),
            (codes * scale).astype(np.float32),
        ]
    )
    return np.take_along_axis(kinds, rng.integers(0, len(kinds), (1, *shape)), 0)[0]


@pytest.mark.parametrize("fmt", list(ONNX_NAME), ids=ONNX_NAME.get)
@pytest.mark.parametrize("granularity", [PerTensor(), PerAxis(1), PerAxis(0), PerBlock(1, 16)], ids=str)
def test_folding_equals_the_runtime_bit_for_bit(fmt, granularity):
    rng, shape = np.random.default_rng(7), (8, 64)
    match granularity:
        case PerTensor():
            scale_shape, attributes = (), ""
        case PerAxis(axis=axis):
            scale_shape, attributes = (shape[axis],), f"<axis: int = {axis}>"
        case PerBlock(size=size):
            scale_shape, attributes = (shape[0], shape[1] // size), f"<axis: int = 1, block_size: int = {size}>"
    with operators(fmt, shape, scale_shape, attributes) as session:
        for magnitude in 10.0 ** rng.uniform(-20, 20, 12):
            for symmetric in (False, True):
                ends = np.sort(rng.standard_normal((2, *scale_shape)) * magnitude, axis=0)
                params = from_range(ends[0], ends[1], QuantSpec(fmt, granularity, symmetric))
                values = hard_values(rng, shape, params)
                feeds = {"x": values, "scale": params.scale, "zero": fmt.encode(params.zero_point)}
                found = session.run(feeds)
                assert np.array_equal(quantize(values, params), found["codes"])
                assert fake_quantize(values, params).tobytes() == found["back"].tobytes()
