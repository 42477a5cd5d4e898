"""Weights go from file to file a window at a time: memory does not grow with the model, or with its largest tensor."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import onnx_ir as ir
import pytest

from qgraph.blocks import nearest
from qgraph.errors import QuantizationError
from qgraph.formats import UINT2, UINT4, UINT8, Int
from qgraph.qparams import fake_quantize, of_blocks
from qgraph.spec import PerBlock, QuantSpec
from qgraph.strips import Strips

ROOT = Path(__file__).resolve().parent.parent

_PEAK = """
import resource, sys
import qgraph
from qgraph import registry
registry.pipeline("write")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if len(sys.argv) > 1:
    qgraph.optimize(sys.argv[1], sys.argv[2], scheme="int4", check=sys.argv[3])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def external(array, folder, offset=0):
    """An external tensor of `array`."""
    (folder / "w.data").write_bytes(bytes(offset) + array.tobytes())
    kind = ir.DataType.from_numpy(array.dtype)
    return ir.ExternalTensor(
        "w.data", offset, array.nbytes, kind, shape=ir.Shape(array.shape), name="w", base_dir=str(folder)
    )


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is counted in other units elsewhere")
@pytest.mark.parametrize("check", ["none", "parts"])
def test_memory_is_that_of_the_result_of_one_tensor(tmp_path, check):
    """192 MB of weights, of which one table takes 164 MB; its codes take 20 MB."""
    spec = importlib.util.spec_from_file_location("streamed_decoder", ROOT / "tools" / "decoder.py")
    decoder = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(decoder)
    shape = decoder.Decoder(2, 512, 8, 2, 2048, 80000, tied=True)
    path = decoder.write(tmp_path / "m.onnx", shape)
    assert path.with_suffix(".onnx.data").stat().st_size > 190e6
    command = [sys.executable, "-c", _PEAK, str(path), str(tmp_path / "out.onnx"), check]
    grown = 1024 * int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert (tmp_path / "out.onnx.data").stat().st_size < 28e6
    # Two cores' windows and the codes; where parts are run, the runtime's copy of the codes as well.
    assert grown < {"none": 70e6, "parts": 150e6}[check]


@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_windows(tmp_path, kind):
    """Of a file at any offset, and of memory; into a buffer, or not."""
    array = np.arange(70 * 33).reshape(70, 33).astype(kind)
    buffer = np.empty(4000, np.float32)
    for source in (array, ir.Tensor(array), external(array, tmp_path, 12)):
        strips = Strips(source)
        assert strips.shape == (70, 33)
        for rows in (slice(None), slice(3, 9), slice(60, 99), slice(5, 5)):
            for columns in (slice(None), slice(4, 11), slice(30, 40)):
                for into in (None, buffer):
                    found = strips.window(rows, columns, into)
                    assert found.dtype == np.float32
                    assert np.array_equal(found, array[rows, columns])
    with pytest.raises(ValueError, match="A matrix is read in strips"):
        Strips(np.zeros(3))


def test_a_file_that_ends_too_early(tmp_path):
    """Is an error, and no endless loop."""
    tensor = external(np.zeros((8, 8), np.float32), tmp_path)
    (tmp_path / "w.data").write_bytes(bytes(100))
    with pytest.raises(OSError, match="shorter"):
        Strips(tensor).window(slice(None))


@hypothesis.given(
    inner=st.integers(1, 300),
    columns=st.integers(1, 40),
    axis=st.sampled_from([0, 1]),
    size=st.sampled_from([16, 32, 64, 128]),
    kind=st.sampled_from([(UINT4, False), (UINT2, False), (UINT8, False), (Int(8, narrow=True), True), (Int(4), True)]),
    seed=st.integers(0, 99),
)
def test_nearest_is_what_the_codes_say(inner, columns, axis, size, kind, seed):
    """The blocks' numbers are those of the plain definition, element by element, however the windows fall."""
    weight = np.random.default_rng(seed).standard_normal((inner, columns) if axis == 0 else (columns, inner))
    weight = weight.astype(np.float32)
    kept = weight.copy()
    spec = QuantSpec(kind[0], PerBlock(axis, size), symmetric=kind[1])
    made = nearest(weight, spec)
    assert np.array_equal(weight, kept)
    expected = fake_quantize(weight, of_blocks(weight, spec))
    found = made.real.T if axis == 0 else made.real
    # The product with a reciprocal may round to the other neighbour where both are as near.
    assert np.abs(found - expected).max() < 1.01 * np.abs(made.scale).max()
    assert (np.abs(found - weight) <= np.abs(expected - weight) + 1e-5).all()
    assert made.inner == inner
    assert made.size == size


def test_windows_of_a_wide_weight_are_the_whole(tmp_path):
    """A weight of many windows, from a file, gives what it gives in memory."""
    rng = np.random.default_rng(5)
    for shape, axis in (((160, 70000), 0), ((9000, 300), 1)):
        weight = rng.standard_normal(shape, dtype=np.float32)
        spec = QuantSpec(UINT4, PerBlock(axis, 128))
        made = nearest(Strips(external(weight, tmp_path)), spec)
        rows = weight.T if axis == 0 else weight
        for part in (slice(0, 50), slice(len(rows) // 2, len(rows) // 2 + 50), slice(len(rows) - 50, len(rows))):
            alone = nearest(np.ascontiguousarray(rows[part]), QuantSpec(UINT4, PerBlock(1, 128)))
            assert np.array_equal(made.codes[part], alone.codes)
            assert np.array_equal(made.scale[part], alone.scale)
            assert np.array_equal(made.zero_point[part], alone.zero_point)


def test_weights_that_are_not_finite():
    """Are refused, wherever they stand."""
    weight = np.zeros((64, 8), np.float32)
    weight[40, 3] = np.nan
    with pytest.raises(QuantizationError, match="finite"):
        nearest(weight, QuantSpec(UINT4, PerBlock(0, 32)))
