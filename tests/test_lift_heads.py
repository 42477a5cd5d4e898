"""LiftHeads: attention of torch.bmm gets its heads in an axis of their own, with the same numbers at any size."""

import numpy as np
import pytest
from qgraph.passes import Canonicalize, FoldShapes, FuseAttention, LiftHeads

from qgraph import graph, registry

TARGET = registry.target("x86-vnni")
SIZES = """s = Shape (x)  n = Gather (s, zero)  m = Gather (s, one)  c = Mul (n, count)
    n1 = Unsqueeze (n, front)  m1 = Unsqueeze (m, front)  c1 = Unsqueeze (c, front)
    apart = Concat <axis = 0> (n1, many, each)  flat = Concat <axis = 0> (c1, any, size)
    square = Concat <axis = 0> (n1, heads, m1, any)  rows = Concat <axis = 0> (c1, m1, any)
    back = Concat <axis = 0> (n1, heads, m1, size)"""
HEADS = """q0 = Mul (x, root)
    q1 = Reshape (q0, apart)  q2 = Transpose <perm = [0, 2, 1, 3]> (q1)  q = Reshape (q2, flat)
    k1 = Reshape ({keys}, apart)  k2 = Transpose <perm = [0, 2, 1, 3]> (k1)  k3 = Reshape (k2, flat)
    k = Transpose <perm = [0, 2, 1]> (k3)
    v1 = Reshape ({values}, apart)  v2 = Transpose <perm = [0, 2, 1, 3]> (v1)  v = Reshape (v2, flat)"""
PRODUCTS = "p = MatMul (q, k){mask}  w = Softmax <axis = {axis}> ({scores})  o = MatMul (w, v)"
BACK = "o1 = Reshape (o, back)  o2 = Transpose <perm = [0, 2, 1, 3]> (o1)  y = Reshape (o2, joined)"
IN_FOUR = "  p1 = Reshape (p, square)  a1 = Add (p1, mask)  a = Reshape (a1, rows)"
"""What transformers up to 4.4x export for BART's attention of 3 heads of 4 channels, between its projections."""


def bart(
    kit,
    mask="",
    form=IN_FOUR,
    back=BACK,
    axis=-1,
    out="",
    other="x",
    more="",
    batch="N",
    turn="[0, 2, 1, 3]",
    **numbers,
):
    products = PRODUCTS.format(mask=form if mask else "", scores="a" if mask else "p", axis=axis)
    heads = HEADS.format(keys=other, values=other).replace("[0, 2, 1, 3]", turn)
    out = out or f"float[{batch}, M, 12] y"
    inputs = f"float[{batch}, M, 12] x" + (", float[N, K, 12] z" if other == "z" else "")
    given = f", float[{mask}] mask" if mask else ""
    text = f"g ({inputs}{given}) => ({out}) {{ {SIZES} {heads} {products} {back} {more} }}"
    constants = {
        "zero": np.array(0),
        "one": np.array(1),
        "count": np.array(3),
        "front": np.array([0]),
        "any": np.array([-1]),
        "many": np.array([-1, 3]),
        "heads": np.array([3]),
        "size": np.array([4]),
        "each": np.array([4]),
        "root": np.array(0.5, np.float32),
        "joined": np.array([0, 0, 12]),
        "lower": np.array(-3e38, np.float32),
        **{name: np.array(number) for name, number in numbers.items()},
    }
    return kit.text(text, **{name: value for name, value in constants.items() if name in text})


def lifted(model):
    after = model.clone()
    Canonicalize(TARGET.min_opset, True)(after)
    FoldShapes()(after)
    return after, LiftHeads(TARGET)(after).modified


def feeds(kit, model, **sizes):
    shapes = {v.name: [d if isinstance(d, int) else sizes[str(d)] for d in v.shape] for v in model.graph.inputs}
    return [{name: kit.normal(*shape, seed=k) for k, (name, shape) in enumerate(shapes.items())}]


def same(kit, model, after, **sizes):
    """The same numbers before and behind `FuseAttention`, which finds one attention."""
    given = feeds(kit, model, **sizes)
    kit.same(model, after, given)
    fused = after.clone()
    FuseAttention(TARGET)(fused)
    assert kit.ops(fused).count("Attention") == 1 and "Softmax" not in kit.ops(fused)
    kit.same(model, fused, given)


@pytest.mark.parametrize("n, m", [(1, 1), (1, 5), (4, 1), (2, 7)])
@pytest.mark.parametrize(
    "mask, form",
    [
        ("", ""),
        # In four axes, as an Add between two Reshapes, once or twice.
        ("N, 1, M, M", IN_FOUR),
        ("1, 1, M, M", IN_FOUR),
        ("N, 1, 1, M", IN_FOUR),
        ("N, 1, M, M", f"{IN_FOUR.replace(' a =', ' a2 =')}  a3 = Reshape (a2, square)  a4 = Add (a3, mask)"
         "  a = Reshape (a4, rows)"),
        ("N, 1, M, M", IN_FOUR.replace("a = Reshape (a1, rows)", "a2 = Max (a1, lower)  a = Reshape (a2, rows)")),
        # Added as it is.
        ("M, M", "  a = Add (mask, p)"),
        ("1, M, M", "  a = Add (p, mask)"),
        # Batch and heads in one axis, too.
        ("N, 3, 1, M", "  u = Shape <start = 3> (mask)  t = Concat <axis = 0> (c1, one1, u)"
         "  f = Reshape (mask, t)  a = Add (p, f)"),
    ],
)  # fmt: skip
def test_masks(model_kit, mask, form, n, m):
    model = bart(model_kit, mask, form, one1=[1])
    after, changed = lifted(model)
    assert changed
    same(model_kit, model, after, N=n, M=m)


@pytest.mark.parametrize("mask", ["6, M, M", "6, 1, M"])
def test_a_mask_of_as_many_as_the_scores(model_kit, mask):
    """Whoever made it, there is one for each head of each batch."""
    model = bart(model_kit, mask, "  a = Add (p, mask)", batch="2")
    after, changed = lifted(model)
    assert changed
    same(model_kit, model, after, M=5)


@pytest.mark.parametrize("axis", [-1, 2])
def test_other_keys(model_kit, axis):
    """Keys and values from elsewhere; that they have the batch of the queries is what the model says of its inputs."""
    model = bart(model_kit, other="z", axis=axis)
    after, changed = lifted(model)
    assert changed
    same(model_kit, model, after, N=2, M=3, K=5)


ALONE = """q0 = Reshape (x, flat)  q = Transpose <perm = [1, 0, 2]> (q0)
    k0 = Reshape ({other}, flat2)  k = Transpose <perm = [1, 2, 0]> (k0)
    v0 = Reshape ({other}, flat2)  v = Transpose <perm = [1, 0, 2]> (v0)
    q1 = Mul (q, root)  p = MatMul (q1, k)  w = Softmax <axis = -1> (p)  o = MatMul (w, v)
    o1 = Transpose <perm = [1, 0, 2]> (o)  y = Reshape (o1, joined)"""
"""What torch exports for nn.MultiheadAttention if its weights are wanted, though nobody reads them."""


@pytest.mark.parametrize("inputs, other", [("float[5, N, 12] x", "x"), ("float[5, N, 12] x, float[7, K, 12] z", "z")])
@pytest.mark.parametrize("joined, out", [([-1, 12], "m, 12"), ([5, -1, 12], "5, N, 12"), ([5, -1, 3, 4], "5, N, 3, 4")])
def test_positions_first(model_kit, inputs, other, joined, out):
    """Batches of two names: of several heads, the product repeats none, so they are one number."""
    model = model_kit.text(
        f"g ({inputs}) => (float[{out}] y) {{ {ALONE.format(other=other)} }}",
        flat=np.array([5, -1, 4]),
        flat2=np.array([5 if other == "x" else 7, -1, 4]),
        root=np.array(0.5, np.float32),
        joined=np.array(joined),
    )
    after, changed = lifted(model)
    assert changed == (joined[-1] == 12)
    if changed:
        for n in (1, 3):
            same(model_kit, model, after, N=n, K=n)


@pytest.mark.parametrize(
    "changes",
    [
        # Weights or scores that are given away.
        {"out": "float[N, M, 12] y, float[A, B, C] w"},
        {"out": "float[N, M, 12] y, float[A, B, C] r", "more": "r = Relu (p)"},
        # Masks that repeat scores, or may: for other queries, for more batches, a row for each batch and head or one.
        {"mask": "K, 1, M, M"},
        {"mask": "N, 1, 9, M"},
        {"mask": "K, M, M", "form": "  a = Add (p, mask)"},
        # No mask at all.
        {"mask": "1, M, M", "form": "  a = Mul (p, mask)"},
        # Heads that are beside one another in each row, not one behind the other.
        {"turn": "[0, 3, 1, 2]", "many": [-1, 4], "each": [3]},
        # A 0 that would copy something else.
        {"joined": [0, 0, 3, 4], "out": "float[N, M, 3, 4] y"},
        # Joined in another order.
        {"back": "o1 = Reshape (o, back)  o2 = Transpose <perm = [0, 2, 3, 1]> (o1)  y = Reshape (o2, joined)"},
    ],
)  # fmt: skip
def test_what_is_not_seen_stays(model_kit, changes):
    _, changed = lifted(bart(model_kit, **changes))
    assert not changed


def test_one_head_stays(model_kit):
    """A product of two stacks of one matrix each, or of one and many, repeats."""
    _, changed = lifted(bart(model_kit, many=[-1, 1], heads=[1], each=[12], size=[12], count=1))
    assert not changed


def test_a_target_without_attention_stays_as_it_is(model_kit):
    after = bart(model_kit)
    Canonicalize(TARGET.min_opset, True)(after)
    FoldShapes()(after)
    assert not LiftHeads(registry.target("qnn"))(after).modified


def test_names_go_along(model_kit):
    """Reports tell of the nodes that a person knows."""
    model = bart(model_kit, "N, 1, M, M")
    for node in model.graph:
        node.name = f"my_{node.outputs[0].name}"
    after, _ = lifted(model)
    FuseAttention(TARGET)(after)
    [attention] = [node for node in after.graph if node.op_type == "Attention"]
    assert {"my_p", "my_w", "my_o", "my_a1"} <= {name for name, _ in attention.meta[graph.ORIGINS]}
