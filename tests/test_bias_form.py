"""BiasForm: MatMul + row -> Gemm in two dimensions, a [1, 1, N] row in more; nothing else."""

import numpy as np
import pytest
from qgraph.passes import BiasForm, Canonicalize


@pytest.fixture
def formed(model_kit):
    """Applies the pass to a copy and checks the numbers."""

    def apply(model, feeds=None):
        after = model.clone()
        BiasForm()(after)
        model_kit.same(model, after, feeds)
        return after

    return apply


@pytest.mark.parametrize("add", ["Add (h, b)", "Add (b, h)"])
def test_two_dimensions_become_gemm(model_kit, formed, add):
    n = model_kit.normal
    model = model_kit.text(
        f"g (float[batch, 8] x) => (float[batch, 4] y) {{ h = MatMul (x, W)  y = {add} }}", W=n(8, 4), b=n(4)
    )
    model.graph[0].name = "/fc/MatMul"
    model.graph[0].metadata_props["layer"] = "fc"
    after = formed(model)
    assert model_kit.ops(after) == ["Gemm"]
    assert after.graph[0].name == "/fc/MatMul"
    assert after.graph[0].metadata_props["layer"] == "fc"
    assert [v.name for v in after.graph.outputs] == ["y"]


@pytest.mark.parametrize("add", ["Add (h, b)", "Add (b, h)"])
@pytest.mark.parametrize("lead", ["2, 3", "2, seq", "1, 2, 3"])
def test_more_dimensions_get_a_row_of_three(model_kit, formed, add, lead):
    n = model_kit.normal
    model = model_kit.text(
        f"g (float[{lead}, 8] x) => (float[{lead}, 4] y) {{ h = MatMul (x, W)  y = {add} }}", W=n(8, 4), b=n(4)
    )
    after = formed(model)
    assert model_kit.ops(after) == ["MatMul", "Add"]
    row = next(v for v in after.graph[1].inputs if v.is_initializer())
    assert tuple(row.const_value.shape) == (1, 1, 4)


@pytest.mark.parametrize("lead, shape", [("n", (1, 4)), ("n", (1, 1, 4)), ("2, n", (1, 1, 1, 1, 4))])
def test_a_row_with_axes_of_its_own(model_kit, formed, lead, shape):
    """They come behind the sum; onnxruntime's dynamic product, which adds the row, would leave them out."""
    n = model_kit.normal
    rank = max(len(shape), len(lead.split(",")) + 1)
    out = ", ".join(f"d{k}" for k in range(rank))
    model = model_kit.text(
        f"g (float[{lead}, 8] x) => (float[{out}] y) {{ h = MatMul (x, W)  s = Add (h, b)  y = Relu (s) }}",
        W=n(8, 4),
        b=n(*shape),
    )
    given = [{"x": n(*((5, 8) if lead == "n" else (2, 5, 8)))}]
    after = formed(model, given)
    wanted = ["Gemm"] if lead == "n" else ["MatMul", "Add"]
    more = rank > len(lead.split(",")) + 1
    assert model_kit.ops(after) == [*wanted, *(["Unsqueeze"] if more else []), "Relu"]


def test_a_name_that_is_taken(model_kit, formed):
    n = model_kit.normal
    model = model_kit.text(
        """g (float[2, 3, 4] x) => (float[2, 3, 4] y) {
            h = MatMul (x, W)
            a = Add (h, b)
            c_row = Mul (a, b_row)
            k = MatMul (x, W)
            e = Add (k, c)
            y = Add (c_row, e)
        }""",
        W=n(4, 4),
        b=n(4),
        c=n(4, seed=1),
        b_row=n(4, seed=2),
    )
    formed(model)


def test_a_shared_row_gets_one_new_form(model_kit, formed):
    n = model_kit.normal
    model = model_kit.text(
        """g (float[2, 3, 4] x) => (float[2, 3, 4] y, float[4] c) {
            h = MatMul (x, W)  a = Add (h, b)
            i = MatMul (a, W)  y = Add (i, b)
            c = Neg (b)
        }""",
        W=n(4, 4),
        b=n(4),
    )
    Canonicalize()(model)
    after = formed(model)
    rows = [v for v in after.graph.initializers.values() if tuple(v.const_value.shape) == (1, 1, 4)]
    assert len(rows) == 1 and len(rows[0].uses()) == 2
    assert "b" in after.graph.initializers


@pytest.mark.parametrize(
    "text, weights",
    [
        ("g (float[2, 8] x, float[4] b) => (float[2, 4] y) { h = MatMul (x, W)  y = Add (h, b) }", {"W": (8, 4)}),
        ("g (float[2, 8] x, float[8, 4] W) => (float[2, 4] y) { h = MatMul (x, W)  y = Add (h, b) }", {"b": (4,)}),
        ("g (float[2, 8] x) => (float[2, 4] y) { h = MatMul (x, W)  y = Add (h, b) }", {"W": (8, 4), "b": (1,)}),
        ("g (float[2, 8] x) => (float[2, 4] y) { h = MatMul (x, W)  y = Add (h, b) }", {"W": (8, 4), "b": ()}),
        ("g (float[4, 8] x) => (float[4, 4] y) { h = MatMul (x, W)  y = Add (h, b) }", {"W": (8, 4), "b": (4, 1)}),
        ("g (float[4, 8] x) => (float[4, 4] y) { h = MatMul (x, W)  y = Add (h, b) }", {"W": (8, 4), "b": (4, 4)}),
        ("g (float[2, 8] x) => (float[2, 4] y) { h = MatMul (x, W)  z = Add (h, b)  y = Add (z, h) }",
         {"W": (8, 4), "b": (4,)}),
        ("g (float[2, 8] x) => (float[2, 4] y, float[2, 4] h) { h = MatMul (x, W)  y = Add (h, b) }",
         {"W": (8, 4), "b": (4,)}),
        ("g (float[2, 3, 8] x) => (float[2, 3, 4] y) { h = MatMul (x, W)  y = Add (h, b) }",
         {"W": (2, 8, 4), "b": (4,)}),
        ("g (float[8] x) => (float[4] y) { h = MatMul (x, W)  y = Add (h, b) }", {"W": (8, 4), "b": (4,)}),
        ("g (float[2, 8] x) => (float[2, 8] y) { h = MatMul (W, W)  y = Add (x, x) }", {"W": (8, 8)}),
    ],
)  # fmt: skip
def test_refused(model_kit, formed, text, weights):
    model = model_kit.text(text, **{name: model_kit.normal(*shape) for name, shape in weights.items()})
    before = model_kit.ops(model)
    after = model.clone()
    assert not BiasForm()(after).modified
    assert model_kit.ops(after) == before
    assert set(after.graph.initializers) == set(model.graph.initializers)
    formed(model)


def test_unknown_rank_is_refused(model_kit, formed):
    model = model_kit.text(
        "g (float[] x) => (float[] y) { h = MatMul (x, W)  y = Add (h, b) }",
        W=model_kit.normal(8, 4),
        b=model_kit.normal(4),
    )
    after = formed(model, [{"x": model_kit.normal(2, 8)}, {"x": model_kit.normal(2, 3, 8)}])
    assert model_kit.ops(after) == ["MatMul", "Add"]


@pytest.mark.parametrize("kind", [np.int32, np.int64, np.float16, np.float64])
@pytest.mark.parametrize("lead", ["2", "2, 3"])
def test_other_types_are_left_alone(model_kit, kind, lead):
    name = np.dtype(kind).name.replace("float64", "double")
    model = model_kit.text(
        f"g ({name}[{lead}, 8] x) => ({name}[{lead}, 4] y) {{ h = MatMul (x, W)  y = Add (h, b) }}",
        W=np.ones((8, 4), kind),
        b=np.ones(4, kind),
    )
    assert not BiasForm()(model).modified
    assert model_kit.ops(model) == ["MatMul", "Add"]


def test_overridable_row_is_refused(model_kit, formed):
    model = model_kit.text(
        "g (float[2, 8] x) => (float[2, 4] y) { h = MatMul (x, W)  y = Add (h, b) }",
        W=model_kit.normal(8, 4),
        b=model_kit.normal(4),
    )
    model.graph.inputs.append(model.graph.initializers["b"])
    after = formed(model)
    assert model_kit.ops(after) == ["MatMul", "Add"]
    model_kit.same(model, after, [{"x": model_kit.normal(2, 8), "b": np.ones(4, np.float32)}])


def test_a_body_that_reads_the_sum(model_kit, formed):
    n = model_kit.normal
    model = model_kit.text(
        """g (float[2, 8] x, bool f) => (float[2, 4] y) {
            h = MatMul (x, W)
            s = Add (h, b)
            y = If (f) <
                then_branch = t () => (float[2, 4] a) { a = Neg (s) },
                else_branch = e () => (float[2, 4] c) { c = Relu (s) }
            >
        }""",
        W=n(8, 4),
        b=n(4),
    )
    assert model_kit.ops(formed(model)) == ["Gemm", "If"]


def test_a_body_that_reads_the_product(model_kit, formed):
    n = model_kit.normal
    model = model_kit.text(
        """g (float[2, 8] x, bool f) => (float[2, 4] y, float[2, 4] s) {
            h = MatMul (x, W)
            s = Add (h, b)
            y = If (f) <
                then_branch = t () => (float[2, 4] a) { a = Neg (h) },
                else_branch = e () => (float[2, 4] c) { c = Relu (h) }
            >
        }""",
        W=n(8, 4),
        b=n(4),
    )
    assert model_kit.ops(formed(model)) == ["MatMul", "Add", "If"]
