"""PlainHeads: heads from a flattened batch come by one Reshape and one Transpose, with the same numbers at any size."""

import numpy as np
import pytest
from qgraph.passes import CancelSwaps, Canonicalize, FoldShapes, FuseAttention, PlainHeads

from qgraph import registry

TARGET = registry.target("x86-vnni")
PACKED = """v = Reshape (x, apart)  u = Unsqueeze (v, zero)  t = Transpose <perm = [3, 1, 2, 0, 4]> (u)
    s = Squeeze (t, three)  q0 = Gather (s, n0)  k0 = Gather (s, n1)  v0 = Gather (s, n2)"""
FLAT = """q1 = Reshape (q0, flat)  q2 = Transpose <perm = [1, 0, 2]> (q1)  q3 = Reshape (q2, heads)
    k1 = Reshape (k0, flat)  k2 = Transpose <perm = [1, 0, 2]> (k1)  k3 = Reshape (k2, heads)
    v1 = Reshape (v0, flat)  v2 = Transpose <perm = [1, 0, 2]> (v1)  v3 = Reshape (v2, heads)"""
PARTS = """q4 = Mul (q3, root)  k4 = Transpose <perm = [0, 1, 3, 2]> (k3)  k5 = Mul (k4, root)
    p = MatMul (q4, k5){mask}  w = Softmax <axis = -1> ({scores})  o = MatMul (w, v3)"""
BACK = "o1 = Transpose <perm = [2, 0, 1, 3]> (o)  y = Reshape (o1, rows)"
"""What torch 2.13 exports for nn.MultiheadAttention(12, 3) with 5 positions, inside its projections."""


def attention(
    kit,
    packed=PACKED,
    back=BACK,
    out="float[m, 12] y",
    inputs="float[5, N, 36] x",
    mask="",
    turn="[1, 0, 2]",
    **numbers,
):
    parts = PARTS.format(mask=" a = Add (p, mask)" if mask else "", scores="a" if mask else "p")
    flat, masks = FLAT.replace("[1, 0, 2]", turn), f", float[{mask}] mask" if mask else ""
    text = f"g ({inputs}{masks}) => ({out}) {{ {packed} {flat} {parts} {back} }}"
    constants = {
        "apart": np.array([5, -1, 3, 12]),
        "zero": np.array([0]),
        "three": np.array([-2]),
        "n0": np.array(0),
        "n1": np.array(1),
        "n2": np.array(2),
        "flat": np.array([5, -1, 4]),
        "heads": np.array([-1, 3, 5, 4]),
        "root": np.array([4**-0.25], np.float32),
        "rows": np.array([-1, 12]),
        **{name: np.array(number) for name, number in numbers.items()},
    }
    return kit.text(text, **{name: value for name, value in constants.items() if name in text})


def plain(model):
    after = model.clone()
    Canonicalize(TARGET.min_opset, True)(after)
    FoldShapes()(after)
    return after, PlainHeads(TARGET)(after).modified


def feeds(kit, n=2, mask=None):
    return [{"x": kit.normal(5, n, 36), **({} if mask is None else {"mask": kit.normal(*mask)})}]


@pytest.mark.parametrize("n", [1, 2, 7])
@pytest.mark.parametrize("mask", ["", "N, 1, 1, 5", "5, 5"])
def test_as_torch_exports_it(model_kit, n, mask):
    model = attention(model_kit, mask=mask)
    after, changed = plain(model)
    assert changed
    given = feeds(model_kit, n, [n if dim == "N" else int(dim) for dim in mask.split(", ")] if mask else None)
    model_kit.same(model, after, given, tolerance=0)
    assert model_kit.ops(after).count("Split") == 1
    assert "Gather" not in model_kit.ops(after) and "Squeeze" not in model_kit.ops(after)
    FuseAttention(TARGET)(after)
    assert model_kit.ops(after).count("Attention") == 1
    model_kit.same(model, after, given)


@pytest.mark.parametrize(
    "changes",
    [
        # Positions first and nothing packed: three projections.
        {"packed": "q0 = Relu (x) k0 = Neg (x) v0 = Abs (x)", "inputs": "float[5, N, 12] x"},
        # Keys and values in one, queries from elsewhere, as between a decoder and its encoder.
        {
            "packed": """v = Reshape (z, apart)  t = Transpose <perm = [2, 0, 1, 3]> (v)
                k0 = Gather (t, n0)  v0 = Gather (t, n1)  q0 = Relu (x)""",
            "inputs": "float[5, N, 12] x, float[5, N, 24] z",
            "apart": [5, -1, 2, 12],
        },
        # Joined to three axes at once.
        {"rows": [5, -1, 12], "out": "float[5, N, 12] y"},
        {"rows": [0, 0, 12], "out": "float[5, N, 12] y"},
    ],
)
def test_other_ways(model_kit, changes):
    model = attention(model_kit, **changes)
    after, changed = plain(model)
    assert changed
    sizes = [tuple(dim if isinstance(dim, int) else 2 for dim in value.shape) for value in model.graph.inputs]
    given = [{v.name: model_kit.normal(*size) for v, size in zip(model.graph.inputs, sizes, strict=True)}]
    model_kit.same(model, after, given, tolerance=0)
    FuseAttention(TARGET)(after)
    assert model_kit.ops(after).count("Attention") == 1
    CancelSwaps()(after)
    model_kit.same(model, after, given)


@pytest.mark.parametrize(
    "changes",
    [
        # The heads are in front of the parts in each row.
        {
            "packed": PACKED.replace("[3, 1, 2, 0, 4]", "[4, 1, 2, 0, 3, 5]").replace("three", "far"),
            "apart": [5, -1, 3, 3, 4],
            "far": [3],
        },
        # Batch and positions do not go where they should.
        {"turn": "[0, 1, 2]", "heads": [5, 3, 5, 4], "inputs": "float[5, 5, 36] x"},
        # A 0 that would mean something else with the heads joined.
        {"rows": [-1, 4, 0, 4], "out": "float[m, 4, 3, 4] y"},
        # Heads that the model gives away.
        {"out": "float[m, 12] y, float[N, 3, 5, 4] v3"},
        # Masks that repeat the scores: for more batches, for more queries.
        {"mask": "K, 1, 1, 5", "inputs": "float[5, 1, 36] x"},
        {"mask": "N, 1, 7, 5"},
        # The result goes elsewhere, too.
        {"back": BACK + " z = Relu (o)", "out": "float[m, 12] y, float[N, 3, 5, 4] z"},
    ],
)
def test_what_is_not_seen_stays(model_kit, changes):
    """With the parts of each head beside one another, a Split would take the wrong columns."""
    _, changed = plain(attention(model_kit, **changes))
    assert not changed


def test_a_target_without_attention_stays_as_it_is(model_kit):
    model = attention(model_kit)
    assert not PlainHeads(registry.target("qnn"))(model).modified


def test_the_plain_way_stays(model_kit):
    """Once more changes nothing."""
    after, _ = plain(attention(model_kit))
    assert not PlainHeads(TARGET)(after).modified


def test_queries_that_serve_a_whole_batch_stay(model_kit):
    """One learned query, as in attention pooling: the product repeats it."""
    model = attention(
        model_kit,
        packed="q0 = Relu (u) k0 = Neg (x) v0 = Abs (x)",
        inputs="float[5, N, 12] x, float[5, 1, 12] u",
    )
    after, changed = plain(model)
    assert not changed
    given = [{"x": model_kit.normal(5, 3, 12), "u": model_kit.normal(5, 1, 12)}]
    FuseAttention(TARGET)(after)
    model_kit.same(model, after, given)
