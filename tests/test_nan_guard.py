"""NanGuard: guards of finite scores go, others move behind the product; infinite masks give the same numbers."""

import numpy as np
import onnx_ir as ir
import pytest
from qgraph.passes import nan_guard
from qgraph.passes.canonicalize import Canonicalize
from qgraph.passes.nan_guard import NanGuard

LOWEST = float(np.finfo(np.float32).min)
GRAPH = """g (float[N, 2, S, 4] q, float[N, 2, 4, T] k, float[N, 2, T, 4] v{more}) => (float[N, 2, S, 4] y{outputs}) {{
    p = MatMul (q, k)  {scores}
    w = Softmax <axis = -1> (s)  n = IsNaN (w)  g = Where (n, zero, w)  y = MatMul (g, v)
}}"""
BOOLEAN = "bias = Where (mask, zero, low)  s = Add (p, bias)"


def attention(kit, scores=BOOLEAN, low=LOWEST, more=", bool[N, 1, S, T] mask", outputs="", zero=0.0, **weights):
    given = {"zero": np.array(zero, np.float32), "low": np.array(low, np.float32), **weights}
    text = GRAPH.format(scores=scores, more=more, outputs=outputs)
    model = kit.text(text, **{name: a for name, a in given.items() if f"{name}" in text})
    Canonicalize(21)(model)
    return model


def feeds(kit, masked=True, n=2, s=3, t=5):
    """Left padding: the first query sees nothing."""
    mask = np.ones((n, 1, s, t), bool)
    if masked:
        mask[-1, 0, 0] = False
        mask[:, :, 1:, -1] = False
    return [{"q": kit.normal(n, 2, s, 4), "k": kit.normal(n, 2, 4, t), "v": kit.normal(n, 2, t, 4), "mask": mask}]


def test_a_finite_mask_needs_no_guard(model_kit):
    model = attention(model_kit)
    after = model.clone()
    assert NanGuard()(after).modified
    assert model_kit.ops(after) == ["MatMul", "Where", "Add", "Softmax", "MatMul"]
    model_kit.same(model, after, feeds(model_kit))


def test_no_mask_needs_no_guard(model_kit):
    model = attention(model_kit, "half = Mul (p, low)  s = Div (half, low)", low=0.5, more="")
    NanGuard()(model)
    assert "IsNaN" not in model_kit.ops(model)


def test_the_guard_of_an_infinite_mask_moves(model_kit):
    model = attention(model_kit, low=-np.inf)
    after = model.clone()
    assert NanGuard()(after).modified
    assert model_kit.ops(after) == ["MatMul", "Where", "Add", "Softmax", "MatMul", "IsNaN", "Where"]
    assert after.graph.outputs[0].name == "y"
    model_kit.same(model, after, feeds(model_kit))
    (feed,) = feeds(model_kit)
    assert not model_kit.run(after, feed)["y"][-1, :, 0].any()


@pytest.mark.parametrize(
    "scores, more",
    [
        # Two lowest numbers make infinity.
        ("bias = Where (mask, zero, low)  a = Add (p, bias)  s = Add (a, bias)", ", bool[N, 1, S, T] mask"),
        # What a caller passes may be anything.
        ("s = Add (p, mask)", ", float[N, 1, S, T] mask"),
        ("f = Cast <to = 1> (mask)  b = Mul (f, low)  s = Add (p, b)", ", int64[N, 1, S, T] mask"),
        ("l = Log (p)  s = Add (l, p)", ""),
    ],
)
def test_scores_that_may_be_infinite_keep_a_guard(model_kit, scores, more):
    model = attention(model_kit, scores, more=more)
    NanGuard()(model)
    assert "IsNaN" in model_kit.ops(model)


@pytest.mark.parametrize(
    "change",
    [
        {"zero": 1.0},
        {"outputs": ", float[N, 2, S, T] g"},
    ],
    ids=str,
)
def test_other_choices_stay(model_kit, change):
    model = attention(model_kit, low=-np.inf, **change)
    assert not NanGuard()(model).modified


def test_a_softmax_over_another_axis_stays(model_kit):
    model = attention(model_kit)
    softmax = next(node for node in model.graph if node.op_type == "Softmax")
    softmax.attributes.add(ir.AttrInt64("axis", 1))
    assert not NanGuard()(model).modified


def test_one_mask_of_many_layers_is_looked_at_once(model_kit, monkeypatch):
    layers = 6
    body = "bias = Where (mask, zero, low)  x0 = Identity (x)"
    for i in range(layers):
        body += f"""  t{i} = Transpose <perm = [0, 2, 1]> (x{i})  p{i} = MatMul (x{i}, t{i})  s{i} = Add (p{i}, bias)
            w{i} = Softmax <axis = -1> (s{i})  n{i} = IsNaN (w{i})  g{i} = Where (n{i}, zero, w{i})
            x{i + 1} = MatMul (g{i}, x{i})"""
    model = model_kit.text(
        f"g (float[N, S, 4] x, bool[S, S] mask) => (float[N, S, 4] x{layers}) {{ {body} }}",
        zero=np.array(0, np.float32),
        low=np.array(LOWEST, np.float32),
    )
    seen = []
    magnitude = nan_guard._magnitude
    monkeypatch.setattr(nan_guard, "_magnitude", lambda value, *more: seen.append(value) or magnitude(value, *more))
    after = model.clone()
    NanGuard()(after)
    assert len(seen) == len(set(seen))
    assert "IsNaN" not in model_kit.ops(after)
    model_kit.same(model, after, [{"x": model_kit.normal(2, 3, 4), "mask": np.tril(np.ones((3, 3), bool))}])
