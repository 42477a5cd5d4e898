import dataclasses

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qgraph import formats
from qgraph.errors import OptionError
from qgraph.formats import Int, UInt

TABLE = [
    (Int(2), "int2", -2, 1, 0, ir.DataType.INT2),
    (Int(4), "int4", -8, 7, 0, ir.DataType.INT4),
    (Int(7), "int7", -64, 63, 0, ir.DataType.INT8),
    (Int(8), "int8", -128, 127, 0, ir.DataType.INT8),
    (Int(8, narrow=True), "int8_narrow", -127, 127, 0, ir.DataType.INT8),
    (Int(16), "int16", -32768, 32767, 0, ir.DataType.INT16),
    (Int(32), "int32", -(2**31), 2**31 - 1, 0, ir.DataType.INT32),
    (UInt(4), "uint4", 0, 15, 8, ir.DataType.UINT4),
    (UInt(7), "uint7", 0, 127, 64, ir.DataType.UINT8),
    (UInt(8), "uint8", 0, 255, 128, ir.DataType.UINT8),
    (UInt(16), "uint16", 0, 65535, 32768, ir.DataType.UINT16),
]
FORMATS = [row[0] for row in TABLE]


@pytest.mark.parametrize(("fmt", "name", "lowest", "highest", "middle", "storage"), TABLE, ids=[r[1] for r in TABLE])
def test_facts(fmt, name, lowest, highest, middle, storage):
    assert fmt.name == name
    assert (fmt.lowest, fmt.highest, fmt.middle) == (lowest, highest, middle)
    assert fmt.steps == highest - lowest
    assert fmt.signed == (lowest < 0)
    assert fmt.storage == storage


@given(st.sampled_from(FORMATS), st.lists(st.floats(-(2.0**33), 2.0**33), min_size=1, max_size=20))
def test_project_gives_the_nearest_code(fmt, numbers):
    values = np.array(numbers)
    codes = fmt.project(values.copy())
    assert np.array_equal(codes, np.rint(codes))
    assert codes.min() >= fmt.lowest and codes.max() <= fmt.highest
    inside = (values >= fmt.lowest) & (values <= fmt.highest)
    assert np.all(np.abs(codes - values)[inside] <= 0.5)
    assert np.all(codes[values > fmt.highest] == fmt.highest)
    assert np.all(codes[values < fmt.lowest] == fmt.lowest)
    assert np.array_equal(fmt.project(codes.copy()), codes)


def test_project_rounds_ties_to_even_and_does_not_touch_its_argument():
    values = np.array([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    before = values.copy()
    assert formats.INT8.project(values).tolist() == [-2.0, -2.0, -0.0, 0.0, 2.0, 2.0]
    assert np.array_equal(values, before)


def test_a_scalar_stays_a_scalar():
    stored = formats.UINT8.encode(np.float64(300.0))
    assert stored.shape == () and stored.dtype == np.uint8 and stored == 255


def test_infinities_saturate():
    values = np.array([-np.inf, np.inf])
    assert formats.UINT8.encode(values).tolist() == [0, 255]
    assert formats.INT8.encode(values).tolist() == [-128, 127]


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_encode_stores_every_end_exactly_and_keeps_the_shape(fmt):
    codes = np.array([[fmt.lowest, 0.0], [fmt.highest, 1.0]])
    stored = fmt.encode(codes)
    assert stored.dtype == fmt.storage.numpy()
    assert stored.shape == (2, 2)
    assert np.array_equal(stored.astype(np.float64), codes)


def test_seven_bits_stay_in_seven_bits():
    codes = Int(7).encode(np.linspace(-500, 500, 10_001))
    assert codes.dtype == np.int8
    assert (codes.min(), codes.max()) == (-64, 63)
    assert len(np.unique(codes)) == 128


def test_formats_are_values():
    assert Int(8) == formats.INT8 and hash(Int(8)) == hash(formats.INT8)
    assert len({Int(8), UInt(8), Int(8, narrow=True), Int(8)}) == 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        formats.INT8.bits = 4  # type: ignore[misc]


@pytest.mark.parametrize("name", ["int8", "int16", "int32", "uint8", "uint16"])
def test_by_name(name):
    assert formats.by_name(name).name == name


def test_unknown_name_is_an_error_that_names_the_nearest():
    with pytest.raises(OptionError, match=r"Unknown format 'uint88'\. Did you mean 'uint8'\?"):
        formats.by_name("uint88")
