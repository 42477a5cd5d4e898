"""Weights in 16 bits: views that are widened as they are read, and stored as what they were."""

import numpy as np
import onnx_ir as ir
import pytest

from qgraph import modelio, narrowing, passes, registry, widened
from qgraph.pipeline import Context
from qgraph.session import Session, SessionOptions
from qgraph.strips import Strips
from qgraph.targets import FOLDED
from qgraph.widened import Widened

HALF, BF16, FLOAT = ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.FLOAT


def external(array, kind, folder):
    (folder / "w.data").write_bytes(array.tobytes())
    return ir.ExternalTensor(
        "w.data", 0, array.nbytes, kind, shape=ir.Shape(array.shape), name="W", base_dir=str(folder)
    )


@pytest.mark.parametrize("kind", [HALF, BF16])
def test_weights_are_views(tmp_path, kind):
    array = np.random.default_rng(0).standard_normal((70, 33)).astype(kind.numpy())
    tensor = widened.widened(external(array, kind, tmp_path))
    assert isinstance(tensor, Widened)
    assert tensor.dtype == FLOAT and tensor.nbytes == 4 * array.size
    assert np.array_equal(tensor.numpy(), array.astype(np.float32))
    for rows in (slice(None), slice(3, 9), slice(60, 99)):
        assert np.array_equal(Strips(tensor).window(rows, slice(2, 20)), array[rows, 2:20].astype(np.float32))
    assert not isinstance(widened.widened(ir.Tensor(array[0], dtype=kind)), Widened)


def test_what_stays_float_is_stored_as_it_was(model_kit, mlp, tmp_path):
    """Behind a Cast that the runtime folds."""
    context = Context(registry.target("cpu"), registry.target("cpu").scheme("fp32"), None)
    before = mlp(model_kit)
    model = registry.pipeline("float")(context)(before.clone()).model
    stored = {name: v.const_value for name, v in model.graph.initializers.items() if v.const_value.size > 100}
    assert sorted(stored) == ["A_float16", "B_float16"]
    assert {tensor.dtype for tensor in stored.values()} == {HALF}
    assert len([node for node in model.graph if FOLDED in node.meta]) == 2
    with Session(model, SessionOptions(optimized=tmp_path / "o.onnx")):
        pass
    optimized = ir.load(tmp_path / "o.onnx")
    assert [node.op_type for node in optimized.graph if node.op_type == "Cast"] == ["Cast", "Cast"], "of x and of y"
    model_kit.same(before, model, tolerance=1e-3)


def test_models_in_memory_share_their_tensors(mlp, model_kit):
    """The original keeps its names and types, however often it is narrowed."""
    before = mlp(model_kit)
    for _ in range(2):
        model = before.clone()
        passes.ToFloat()(model)
        twin = narrowing.narrowed(model)
        assert twin is not model and "A_float16" in twin.graph.initializers
        assert isinstance(model.graph.initializers["A"].const_value, Widened)
        assert before.graph.initializers["A"].const_value.name == "A"
    model_kit.run(before, model_kit.feeds(before, 1)[0])


def test_views_are_spilled_as_what_they_are(model_kit, mlp, tmp_path, monkeypatch):
    monkeypatch.setattr(modelio, "_SPILL_BYTES", 1000)
    model = mlp(model_kit, A=model_kit.normal(32, 64))
    before = model.clone()
    passes.ToFloat()(model)
    with modelio.Workspace() as workspace:
        folder = workspace.spill(model)
        tensor = model.graph.initializers["A"].const_value
        assert isinstance(tensor, Widened)
        assert isinstance(tensor.source, ir.ExternalTensor) and tensor.source.dtype == HALF
        assert (folder / "weights.data").stat().st_size < 12_000
        with Session(model, SessionOptions(threads=1), folder) as session:
            feed = model_kit.feeds(before, 1)[0]
            np.testing.assert_allclose(session.run(feed)["y"], model_kit.run(before, feed)["y"], atol=5e-3)
