"""bfloat16, which no numpy type stands for."""

import numpy as np
import onnx_ir as ir
import pytest

import qgraph
from qgraph import widened
from qgraph.session import Session, SessionOptions

BF16 = ir.DataType.BFLOAT16


def brain(decoder, path, style="plain"):
    """A tiny decoder in bfloat16, its ends too."""
    model = decoder.build("tiny", style, "bfloat16")
    ir.save(model, path)
    return path


@pytest.mark.usefixtures("model_free_cpu")
@pytest.mark.parametrize("style", ["plain", "fused"])
def test_bfloat16(kinds, decoder, tmp_path, style):
    """The runtime cannot run the original: the same numbers in float32 stand for it, and this is said."""
    path = brain(decoder, tmp_path / "m.onnx", style)
    options = {
        "scheme": "int8-weights",
        "block_size": 32,
        "bench_seconds": 0.01 * (style == "plain"),
        "force": True,
        "time_limit": 5,
    }
    result = qgraph.optimize(path, tmp_path / "o.onnx", **options)
    report = result.report
    assert any("the same model in float32" in note for note in report.notes)
    assert kinds(ir.load(tmp_path / "o.onnx")) == kinds(ir.load(path))
    assert report.fidelity.outputs["logits"].sqnr > 20
    if style == "plain":
        assert report.speed
    else:
        assert len(report.quantized) > 10


def test_bfloat16_at_both_ends_of_a_session(model_kit):
    """float32 goes in, rounded, and comes out, exact."""
    text = """g (bfloat16[n, 4] x, float s) => (bfloat16[n, 4] y, float[n, 4] z) {
        z = Cast <to = 1> (x)  m = Mul (z, s)  y = Cast <to = 16> (m) }"""
    model = model_kit.text(text)
    x = model_kit.normal(3, 4)
    with Session(model, SessionOptions(threads=1)) as session:
        found = session.run({"x": x, "s": np.array(2, np.float32)})
        session.call({"x": x, "s": np.array(2, np.float32)})
        only = session.run({"x": x, "s": np.array(2, np.float32)}, ["z"])
    rounded = x.astype(BF16.numpy()).astype(np.float32)
    assert list(only) == ["z"]
    assert np.array_equal(found["z"], rounded) and np.array_equal(found["y"], 2 * rounded)


def test_what_computes_in_bfloat16(model_kit):
    weight = np.ones((4, 4), BF16.numpy())
    stored = "g (float[n, 4] x) => (float[n, 4] y) { w = Cast <to = 1> (W)  y = MatMul (x, w) }"
    computed = (
        "g (float[n, 4] x) => (float[n, 4] y) { h = Cast <to = 16> (x)  m = MatMul (h, W)  y = Cast <to = 1> (m) }"
    )
    found = []
    for text in (stored, computed):
        model = model_kit.text(text)
        value = ir.Value(
            name="W",
            type=ir.TensorType(BF16),
            shape=ir.Shape([4, 4]),
            const_value=ir.Tensor(weight, dtype=BF16, name="W"),
        )
        for node in model.graph:
            for position, one in enumerate(node.inputs):
                if one.name == "W":
                    node.replace_input_with(position, value)
        model.graph.register_initializer(value)
        found.append(widened.brains(model))
    assert found == [False, True]
