"""Floating-point formats and codebooks, number by number: against a search among all codes, and against ml_dtypes."""

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qgraph import formats
from qgraph.errors import OptionError, QuantizationError
from qgraph.float_formats import ALL, BF16, E2M1, E4M3, E4M3FNUZ, E5M2, E5M2FNUZ, FP16, NF4
from qgraph.formats import BINARY, TERNARY

TYPES = {
    FP16: np.float16,
    BF16: ml_dtypes.bfloat16,
    E4M3: ml_dtypes.float8_e4m3fn,
    E4M3FNUZ: ml_dtypes.float8_e4m3fnuz,
    E5M2: ml_dtypes.float8_e5m2,
    E5M2FNUZ: ml_dtypes.float8_e5m2fnuz,
    E2M1: ml_dtypes.float4_e2m1fn,
}
SMALL = [fmt for fmt in TYPES if fmt.storage.bitwidth <= 8]
FACTS = [
    (FP16, "fp16", 65504.0, 2.0**-14, ir.DataType.FLOAT16),
    (BF16, "bf16", 3.3895313892515355e38, 2.0**-126, ir.DataType.BFLOAT16),
    (E4M3, "e4m3", 448.0, 2.0**-6, ir.DataType.FLOAT8E4M3FN),
    (E4M3FNUZ, "e4m3fnuz", 240.0, 2.0**-7, ir.DataType.FLOAT8E4M3FNUZ),
    (E5M2, "e5m2", 57344.0, 2.0**-14, ir.DataType.FLOAT8E5M2),
    (E5M2FNUZ, "e5m2fnuz", 57344.0, 2.0**-15, ir.DataType.FLOAT8E5M2FNUZ),
    (E2M1, "e2m1", 6.0, 1.0, ir.DataType.FLOAT4E2M1),
]


def codes_of(fmt):
    """All finite numbers of a small format with their bytes, by number; of the two zeros the positive one."""
    count = 2**fmt.storage.bitwidth
    numbers = np.arange(count, dtype=np.uint8).view(TYPES[fmt]).astype(np.float64)
    found = {float(n): i for i, n in reversed(list(enumerate(numbers))) if np.isfinite(n)}
    return dict(sorted(found.items()))


def nearest(fmt, x):
    """The nearest number, found by trying all; half way between two the one whose last bit is zero."""
    known = codes_of(fmt)
    gaps = {n: abs(n - x) for n in known}
    least = min(gaps.values())
    best = [n for n in known if gaps[n] == least]
    return best[0] if len(best) == 1 else next(n for n in best if known[n] % 2 == 0)


@pytest.mark.parametrize(("fmt", "name", "highest", "smallest", "storage"), FACTS, ids=[row[1] for row in FACTS])
def test_facts(fmt, name, highest, smallest, storage):
    assert (fmt.name, fmt.storage, fmt.smallest_normal) == (name, storage, smallest)
    assert (fmt.lowest, fmt.highest, fmt.middle, fmt.signed) == (-highest, highest, 0.0, True)
    assert formats.by_name(name, ALL) is fmt


@pytest.mark.parametrize("fmt", SMALL, ids=lambda f: f.name)
def test_every_number_every_tie_and_everything_between(fmt):
    numbers = np.array(list(codes_of(fmt)))
    ties = (numbers[1:] + numbers[:-1]) / 2
    near = np.concatenate([np.nextafter(ties, -np.inf), np.nextafter(ties, np.inf)])
    for x in np.concatenate([numbers, ties, near]):
        assert fmt.project(np.array(x)) == nearest(fmt, x), x


@given(st.sampled_from(SMALL), st.floats(-1e5, 1e5, width=32))
def test_small_formats_give_the_nearest_number(fmt, x):
    found = fmt.project(np.array([x], np.float32))
    assert found.dtype == np.float32
    assert found[0] == nearest(fmt, min(max(x, fmt.lowest), fmt.highest))


@given(st.sampled_from(list(TYPES)), st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=30))
def test_as_ml_dtypes_has_it_and_saturating(fmt, numbers):
    array = np.array(numbers, np.float32)
    codes = fmt.encode(array)
    assert codes.dtype == TYPES[fmt] and codes.shape == array.shape
    with np.errstate(over="ignore"):
        expected = array.astype(TYPES[fmt]).astype(np.float64)
    found = codes.astype(np.float64)
    inside = np.abs(array) <= fmt.highest
    assert np.array_equal(found[inside], expected[inside])
    assert np.array_equal(found[~inside], np.sign(array[~inside]) * fmt.highest)
    assert np.array_equal(fmt.project(fmt.project(array)), fmt.project(array))


@pytest.mark.parametrize("fmt", [FP16, BF16, E4M3, E5M2, E5M2FNUZ, E4M3FNUZ], ids=lambda f: f.name)
def test_subnormals_are_numbers_and_nan_stays_nan(fmt):
    assert np.isnan(fmt.project(np.array([np.nan]))).all()
    half = np.array([fmt.smallest_normal / 2])
    assert fmt.project(half) == half, "not flushed to zero"


@pytest.mark.parametrize("fmt", [E2M1, NF4], ids=lambda f: f.name)
def test_formats_without_nan_say_so(fmt):
    with pytest.raises(QuantizationError, match=f"{fmt.name} has no NaN"):
        fmt.encode(np.array([0.0, np.nan]))


# -- codebooks ------------------------------------------------------------------------------------------------------


def test_nf4_is_what_qlora_lists():
    assert len(NF4.numbers) == 16 and list(NF4.numbers) == sorted(NF4.numbers)
    assert (NF4.lowest, NF4.highest, NF4.numbers[7]) == (-1.0, 1.0, 0.0)
    # Quantiles of a normal distribution that is cut so that its last code is 1; seven below zero, eight above.
    from statistics import NormalDist

    cut = 0.9677083
    low = [NormalDist().inv_cdf(p) for p in np.linspace(cut, 0.5, 8)[:-1]]
    high = [NormalDist().inv_cdf(p) for p in np.linspace(cut, 0.5, 9)[:-1]]
    expected = sorted([-n for n in low] + [0.0] + high)
    np.testing.assert_allclose(NF4.numbers, np.array(expected) / max(expected), atol=2e-6)


@given(st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=50))
def test_codebooks_give_the_nearest_number(numbers):
    array = np.array(numbers, np.float32)
    distances = np.abs(array.astype(np.float64)[:, None] - np.array(NF4.numbers))
    found = NF4.places(array)
    assert np.array_equal(distances[np.arange(len(array)), found], distances.min(axis=1))
    np.testing.assert_array_equal(NF4.project(array), np.array(NF4.numbers)[found].astype(np.float32))


def test_codebooks_take_the_even_place_half_way():
    numbers = np.array(NF4.numbers)
    assert (NF4.places((numbers[1:] + numbers[:-1]) / 2) % 2 == 0).all()


def test_codebooks_saturate_and_store_places():
    stored = NF4.encode(np.array([[-np.inf, 0.0], [0.1, 9.0]]))
    assert stored.dtype == ir.DataType.UINT4.numpy() and stored.shape == (2, 2)
    assert stored.astype(int).tolist() == [[0, 7], [8, 15]]


# -- two and three values -------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=20))
def test_ternary_and_binary(numbers):
    array = np.array(numbers)
    assert np.array_equal(TERNARY.project(array), np.clip(np.rint(array), -1, 1))
    assert np.array_equal(BINARY.project(array), np.where(array < 0, -1, 1))
    for fmt in (TERNARY, BINARY):
        assert fmt.encode(array).dtype == ir.DataType.INT2.numpy()
        assert (fmt.lowest, fmt.highest, fmt.middle) == (-1, 1, 0)


def test_names():
    assert [formats.by_name(n).name for n in ("ternary", "binary")] == ["ternary", "binary"]
    assert TERNARY != BINARY and len({TERNARY, BINARY, formats.INT2}) == 3
    with pytest.raises(OptionError, match="Did you mean 'e5m2'"):
        formats.by_name("e4m2", ALL)
