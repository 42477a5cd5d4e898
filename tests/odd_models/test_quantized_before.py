"""Models that their author has quantized in part."""

import numpy as np
import onnx_ir as ir
import pytest

import qgraph

pytestmark = pytest.mark.usefixtures("model_free_cpu")


def test_an_already_quantized_model_is_left_as_it_is_or_extended(model_kit, compiled):
    n = model_kit.normal
    model = model_kit.text(
        """g (float[2, 8] x) => (float[2, 8] y) {
            q = QuantizeLinear (x, s, z)
            d = DequantizeLinear (q, s, z)
            wd = DequantizeLinear (w, ws, wz)
            h = MatMul (d, wd)
            r = Tanh (h)
            y = MatMul (r, V)
        }""",
        s=np.array(0.03, np.float32),
        z=np.array(128, np.uint8),
        w=np.random.default_rng(0).integers(-127, 127, (8, 8)).astype(np.int8),
        ws=np.array(0.01, np.float32),
        wz=np.array(0, np.int8),
        V=n(8, 8),
    )
    compiled(model)


@pytest.mark.parametrize("scheme", ["fp32", "int8", "int8-dynamic", "int8-weights", "auto"])
def test_what_its_author_quantized_stays_in_every_scheme(model_kit, tmp_path, scheme):
    """Also where a value that the author quantizes is quantized by us once more: names must not be given twice."""
    n = model_kit.normal
    model = model_kit.text(
        """g (float[2, 8] x) => (float[2, 8] y, float[2, 8] k) {
            q = QuantizeLinear (x, s, z)
            d = DequantizeLinear (q, s, z)
            wd = DequantizeLinear (w, ws, wz)
            h = MatMul (d, wd)
            a = Add (d, d)
            aq = QuantizeLinear (a, s, z)
            k = DequantizeLinear (aq, s, z)
            r = Tanh (h)
            y = MatMul (r, V)
        }""",
        s=np.array(0.03, np.float32),
        z=np.array(128, np.uint8),
        w=np.random.default_rng(0).integers(-127, 127, (8, 8)).astype(np.int8),
        ws=np.array(0.01, np.float32),
        wz=np.array(0, np.int8),
        V=n(8, 8),
    )
    ir.save(model, tmp_path / "in.onnx")
    feeds = model_kit.feeds(model)
    result = qgraph.optimize(
        tmp_path / "in.onnx", tmp_path / "out.onnx", data=feeds, scheme=scheme, max_loss="100%", bench_seconds=0,
        force=scheme == "int8-weights",
    )  # fmt: skip
    assert not [
        one for one in result.report.candidates if "cannot load" in one.verdict or "does not run" in one.verdict
    ]
    assert model_kit.sqnr(tmp_path / "in.onnx", tmp_path / "out.onnx", feeds) > 20
