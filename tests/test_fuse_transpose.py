"""MatMul with a transposed constant reads it as it lies; all else stays."""

import numpy as np
import pytest
from qgraph.passes.fuse_transpose import FuseTranspose
from qgraph.passes.tie_head import TieHead

from qgraph import registry


def fused(model):
    return FuseTranspose(registry.target("x86-vnni"))(model).modified


@pytest.mark.parametrize("shape", ["n, 8", "b, n, 8"])
@pytest.mark.parametrize("order", ["", "<perm = [1, 0]>"])
def test_a_tied_head(model_kit, shape, order):
    """The table is read by both, and the transpose is gone."""
    table = model_kit.normal(20, 8)
    model = model_kit.text(
        f"""g (float[{shape}] x, int64[m] ids) => (float[{shape.replace("8", "20")}] y, float[m, 8] rows)
        {{ rows = Gather (T, ids) [turn] t = Transpose {order} (T) [head] y = MatMul (x, t) }}""",
        T=table,
    )
    before = model.clone()
    assert fused(model)
    assert model_kit.ops(model) == ["Gather", "FusedMatMul"]
    assert model.graph[1].name == "head"
    assert model.graph[1].inputs[1] is model.graph[0].inputs[0]
    model_kit.same(before, model)


@pytest.mark.parametrize(
    "text, constants",
    [
        ("g (float[n, 8] x, float[20, 8] T) => (float[n, 20] y) { t = Transpose (T) y = MatMul (x, t) }", False),
        ("g (float[n, 8] x) => (float[n, 20] y, float[8, 20] t) { t = Transpose (T) y = MatMul (x, t) }", True),
        ("g (float[n, 20] x) => (float[n, 8] y) { t = Transpose <perm = [0, 1]> (T) y = MatMul (x, t) }", True),
        ("g (float[n, 20] x) => (float[20, 20] y) { t = Transpose (T) y = MatMul (T, t) z = Relu (x) }", True),
    ],
)
def test_what_stays(model_kit, text, constants):
    """Weights that are inputs, turned weights that are outputs, other orders; a constant on the left is no matter."""
    model = model_kit.text(text, **({"T": np.ones((20, 8), np.float32)} if constants else {}))
    assert fused(model) == ("MatMul (T, t)" in text)


@pytest.mark.parametrize("change", [None, 0, 77, 199])
def test_a_head_that_is_a_copy_of_the_table(model_kit, change):
    """It is read from the table, where each of its numbers is that of the table."""
    table = model_kit.normal(200, 96)
    head = table.T.copy()
    if change is not None:
        head[5, change] += 1e-3
    model = model_kit.text(
        """g (float[n, 96] x, int64[m] ids) => (float[n, 200] y, float[m, 96] rows)
        { rows = Gather (T, ids) [head] y = MatMul (x, W) }""",
        T=table,
        W=head,
    )
    before = model.clone()
    assert TieHead(registry.target("x86-vnni"))(model).modified == (change is None)
    assert model_kit.ops(model) == ["Gather", "FusedMatMul" if change is None else "MatMul"]
    assert len(model.graph.initializers) == (1 if change is None else 2)
    model_kit.same(before, model)
