"""FuseAttention: attention in parts becomes one operator that computes the same numbers at any size."""

import re

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qgraph.passes.bound_masks import BoundMasks
from qgraph.passes.canonicalize import Canonicalize
from qgraph.passes.fold_shapes import FoldShapes
from qgraph.passes.fuse_attention import FuseAttention

from qgraph import registry

HEADS, SIZE = 3, 4
WIDTH = HEADS * SIZE
PARTS = """qs = Reshape (q, split)  qt = Transpose <perm = [0, 2, 1, 3]> (qs)
    ks = Reshape (k, split)  kt = Transpose <perm = [0, 2, 3, 1]> (ks)
    vs = Reshape (v, split)  vt = Transpose <perm = [0, 2, 1, 3]> (vs)
    {scores}  w = Softmax <axis = -1> (s)  o = MatMul (w, vt){guard}
    ot = Transpose <perm = [0, 2, 1, 3]> ({end})  y = Reshape (ot, join)"""
MASKED = "p = MatMul (qt, kt)  a = Mul (p, root)  s = Add (a, mask)"


def attention(
    kit,
    scores=MASKED,
    mask="N, 1, S, T",
    guard="",
    end="o",
    parts=PARTS,
    out="float[N, S, 12] y",
    batch="N",
    keys="T",
    more="",
    opset=21,
    **numbers,
):
    q, kv = (f"float[{batch}, {length}, {WIDTH}]" for length in ("S", keys))
    masks = more or (f", float[{mask}] mask" if "mask" in scores else "")
    text = f"g ({q} q, {kv} k, {kv} v{masks}) => ({out}) {{ {parts.format(scores=scores, guard=guard, end=end)} }}"
    constants = {
        "split": np.array([0, 0, HEADS, SIZE]),
        "join": np.array([0, 0, WIDTH]),
        "root": np.array(SIZE**-0.5, np.float32),
        "zero": np.array(0, np.float32),
        **{name: np.array(number) for name, number in numbers.items()},
    }
    return kit.text(text, opset=opset, **{name: value for name, value in constants.items() if name in text})


def feeds(kit, n=2, s=3, t=5, mask=None):
    given = {"q": kit.normal(n, s, WIDTH), "k": kit.normal(n, t, WIDTH, seed=1), "v": kit.normal(n, t, WIDTH, seed=2)}
    return [given if mask is None else {**given, "mask": kit.normal(*mask, seed=3)}]


def fused(model, name="x86-vnni"):
    target = registry.target(name)
    after = model.clone()
    Canonicalize(target.min_opset, target.attention is not None)(after)
    FoldShapes()(after)
    BoundMasks(target)(after)
    FuseAttention(target)(after)
    return after


@settings(max_examples=20, deadline=None)
@given(
    n=st.integers(1, 3),
    s=st.integers(1, 5),
    t=st.integers(1, 6),
    mask=st.sampled_from(
        ["N, 1, S, T", "N, 3, S, T", "1, 1, S, T", "N, 1, 1, T", "S, T", "1, T", "3, S, T", "1, 1, 1, 1"]
    ),
)
def test_masks_of_any_form(model_kit, n, s, t, mask):
    model = attention(model_kit, mask=mask)
    after = fused(model)
    assert model_kit.ops(after).count("Attention") == 1
    assert not {"MatMul", "Transpose", "Softmax"} & set(model_kit.ops(after))
    sizes = [{"N": n, "S": s, "T": t}.get(d, d) for d in mask.split(", ")]
    model_kit.same(model, after, feeds(model_kit, n, s, t, [int(d) for d in sizes]))


@pytest.mark.parametrize(
    "scores",
    [
        "s = MatMul (qt, kt)",
        "p = MatMul (qt, kt)  s = Div (p, root)",
        "a = Mul (qt, root)  s = MatMul (a, kt)",
        "a = Mul (root, qt)  b = Mul (kt, root)  s = MatMul (a, b)",
        "kf = Transpose <perm = [0, 1, 3, 2]> (kt)  kr = Mul (kf, root)  kb = Transpose <perm = [0, 1, 3, 2]> (kr)"
        "  s = MatMul (qt, kb)",
        "p = MatMul (qt, kt)  a = Mul (p, root)  s = Sum (mask, a)",
    ],
)
def test_spellings_of_the_scores(model_kit, scores):
    model = attention(model_kit, scores)
    after = fused(model)
    assert "Attention" in model_kit.ops(after) and "MatMul" not in model_kit.ops(after)
    model_kit.same(model, after, feeds(model_kit, mask=(2, 1, 3, 5) if "mask" in scores else None))


@pytest.mark.parametrize(
    "scores",
    [
        "p = MatMul (qt, kt)  m = Add (p, mask)  s = Mul (m, root)",  # Scales the mask, too.
        "p = MatMul (qt, kt)  a = Neg (p)  s = Add (a, mask)",
        "p = MatMul (qt, kt)  l = Add (p, mask)  m = Add (l, mask)  s = Add (m, mask)",
        "n = Neg (root)  p = MatMul (qt, kt)  s = Mul (p, n)",  # No scale of the operator's is negative.
        "p = MatMul (kt, qt)  m = Transpose <perm = [0, 1, 3, 2]> (p)  s = MatMul (m, p)",
    ],
)
def test_other_scores_stay(model_kit, scores):
    assert "Attention" not in model_kit.ops(fused(attention(model_kit, scores, keys="S")))


def test_weights_that_are_read_elsewhere_stay(model_kit):
    model = attention(model_kit, out="float[N, S, 12] y, float[N, 3, S, T] w")
    assert "Attention" not in model_kit.ops(fused(model))
    work = FuseAttention(registry.target("x86-vnni"))
    work(model)
    assert "read elsewhere" in " ".join(work.refused.values())


def test_values_as_keys_in_a_cache_stay_outputs(model_kit):
    model = attention(model_kit, out="float[N, S, 12] y, float[N, 3, T, 4] vt")
    after = fused(model)
    assert sorted(model_kit.ops(after)) == ["Attention", "Reshape", "Transpose"]
    model_kit.same(model, after, feeds(model_kit, mask=(2, 1, 3, 5)))


def test_a_mask_of_one_row_is_expanded_once_for_all_layers(model_kit):
    first = PARTS.format(scores=MASKED, guard="", end="o")
    second = (
        re.sub(r"\b([qkv][st]|[paswo]|ot)\b(?! = -1)", r"\g<1>2", first).replace("y =", "z =").replace("(q,", "(y,")
    )
    model = attention(model_kit, parts=f"{first} {second}", mask="N, 1, 1, T", out="float[N, S, 12] z")
    after = fused(model)
    assert model_kit.ops(after).count("Attention") == 2 and model_kit.ops(after).count("Expand") == 1
    model_kit.same(model, after, feeds(model_kit, mask=(2, 1, 1, 5)))


def test_a_full_mask_is_not_expanded(model_kit):
    assert model_kit.ops(fused(attention(model_kit))) == ["Attention"]


def test_the_guard_against_rows_without_any_key_stays(model_kit):
    guard = "  n = IsNaN (o)  g = Where (n, zero, o)"
    model = attention(model_kit, guard=guard, end="g")
    after = fused(model)
    assert sorted(model_kit.ops(after)) == ["Attention", "IsNaN", "Where"]
    given = feeds(model_kit, mask=(2, 1, 3, 5))
    given[0]["mask"][0, 0, 1] = -np.inf
    model_kit.same(model, after, given)


def test_rows_hidden_altogether_by_the_lowest_float(model_kit):
    """The operator would make them 0; in parts they are the mean of all values."""
    scores = "p = MatMul (qt, kt)  a = Mul (p, root)  m = Where (hidden, lowest, zero)  s = Add (a, m)"
    model = attention(model_kit, scores, more=", bool[N, 1, S, T] hidden", lowest=np.finfo(np.float32).min)
    given = feeds(model_kit)
    given[0]["hidden"] = np.zeros((2, 1, 3, 5), bool)
    given[0]["hidden"][0, 0, 1] = True
    given[0]["hidden"][1, 0, :, 2:] = True
    after = fused(model)
    assert sorted(model_kit.ops(after)) == ["Attention", "Where"]
    model_kit.same(model, after, given)


@pytest.mark.parametrize("out, more", [("", ""), (", float[N, S, 12] z", "  z = Max (q, lowest)")])
def test_scores_that_are_kept_from_below_where_two_masks_meet(model_kit, out, more):
    """As OPT does: without it, keys that both masks hide would be other than those that one hides."""
    scores = """p = MatMul (qt, kt)  m = Where (hidden, lowest, zero)  a = Add (p, m)
        l = Where (later, lowest, zero)  b = Add (a, l)  s = Max (lowest, b)"""
    inputs = ", bool[N, 1, S, T] hidden, bool[1, 1, S, T] later"
    # Where the constant is read elsewhere, it stays as it is, and the operator is not to see it.
    model = attention(
        model_kit, scores + more, more=inputs, out="float[N, S, 12] y" + out, lowest=np.finfo(np.float32).min
    )
    given = feeds(model_kit)
    given[0]["hidden"] = np.zeros((2, 1, 3, 5), bool)
    given[0]["hidden"][0, 0, 1] = True
    given[0]["later"] = np.triu(np.ones((1, 1, 3, 5), bool), 1)
    after = fused(model)
    assert model_kit.ops(after).count("Attention") == 1 and "Max" in model_kit.ops(after)
    model_kit.same(model, after, given)


@pytest.mark.parametrize("size, fits", [("Min(32, S)", True), ("Min(1, S)", False), ("Min(32, T)", False)])
def test_a_mask_that_is_cut_to_what_there_is(model_kit, size, fits):
    """torch's exporter names so what is cut from a mask for so many positions; of more, the scores could not be."""
    model = attention(model_kit, mask="1, 1, S, T")
    model.graph.inputs[3].shape = ir.Shape([1, 1, size, "T"])
    assert ("Attention" in model_kit.ops(fused(model))) == fits


def test_two_masks_are_added_once(model_kit):
    scores = "p = MatMul (qt, kt)  b = Add (bias, p)  s = Add (b, mask)"
    model = attention(model_kit, scores, more=", float[N, 1, 1, T] mask, float[1, 3, S, T] bias", mask="")
    after = fused(model)
    assert sorted(model_kit.ops(after)) == ["Add", "Attention"]
    given = feeds(model_kit, mask=(2, 1, 1, 5))
    model_kit.same(model, after, [{**given[0], "bias": model_kit.normal(1, 3, 3, 5, seed=7)}])


@pytest.mark.parametrize("target", [[0, 0, 0, 0], [0, HEADS, -1, SIZE], [-1, 0, 0, 0], [0, -1, 0, SIZE]])
def test_a_reshape_to_the_same_shape_is_passed_over(model_kit, target):
    again = "  z = Reshape (o, same)"
    model = attention(model_kit, guard=again, end="z", same=target)
    after = fused(model)
    assert model_kit.ops(after) == ["Attention"]
    model_kit.same(model, after, feeds(model_kit, mask=(2, 1, 3, 5)))


def test_a_reshape_to_another_shape_is_not(model_kit):
    again = "  z = Reshape (o, same)"
    model = attention(model_kit, guard=again, end="z", same=[0, 6, -1, 2], out="float[A, B, 12] y", join=[0, -1, WIDTH])
    assert "Attention" not in model_kit.ops(fused(model))


@pytest.mark.parametrize("join", [[-1, WIDTH], [0, -1], [0, 0, HEADS, SIZE], [0, 0, -1]])
def test_what_reads_the_heads_in_another_shape_goes_on(model_kit, join):
    out = "float[A, B] y" if len(join) == 2 else f"float[{', '.join('NSHD'[: len(join)])}] y"
    model = attention(model_kit, out=out, join=join)
    after = fused(model)
    assert "Attention" in model_kit.ops(after)
    model_kit.same(model, after, feeds(model_kit, mask=(2, 1, 3, 5)))


@pytest.mark.parametrize(("q", "k", "v"), [(1, "N", "N"), ("N", 1, 1), ("N", "N", 1), ("N", "M", "M")])
def test_batches_that_are_repeated_are_left(model_kit, q, k, v):
    text = attention(model_kit, "s = MatMul (qt, kt)").graph
    for value, batch in zip(text.inputs, (q, k, v), strict=True):
        value.shape = ir.Shape([batch, *value.shape[1:]])
    text.outputs[0].shape = ir.Shape(["B", "S", WIDTH])
    model = ir.Model(text, ir_version=10)
    assert "Attention" not in model_kit.ops(fused(model))


def test_what_stays_in_parts_has_a_reason(model_kit):
    for model, word in (
        (attention(model_kit, "s = MatMul (qt, kt)", batch=1, keys="T", mask=""), None),
        (attention(model_kit, mask="2, 1, S, T"), "mask"),
        (attention(model_kit, "p = MatMul (qt, kt)  m = Add (p, mask)  s = Mul (m, root)"), "form"),
    ):
        target = registry.target("x86-vnni")
        Canonicalize(target.min_opset, True)(model)
        work = FuseAttention(target)
        assert work(model).modified == (word is None)
        assert [word in reason for reason in work.refused.values()] == ([] if word is None else [True])


def test_a_target_that_a_caller_may_override_is_left(model_kit):
    model = attention(model_kit)
    model.graph.inputs.append(model.graph.initializers["split"])
    assert "Attention" not in model_kit.ops(fused(model))


def test_what_asks_for_the_shape_of_a_product_keeps_it(model_kit):
    out = "float[N, S, 12] y, int64[4] size"
    model = attention(model_kit, parts=PARTS + "  size = Shape (o)", out=out)
    assert "Attention" not in model_kit.ops(fused(model))


def test_what_is_beside_it_keeps_its_name_and_its_constants(model_kit):
    """The converter would write GroupNormalization's constants as nodes, at any later time."""
    more = "  g = GroupNormalization <num_groups = 2> (extra, gain, gain)"
    numbers = {"gain": np.ones(2, np.float32)}
    model = attention(
        model_kit, parts=PARTS + more, more=", float[N, 1, S, T] mask, float[N, 4, 3] extra",
        out="float[N, S, 12] y, float[N, 4, 3] g", opset=18, **numbers,
    )  # fmt: skip
    after = fused(model)
    assert "Attention" in model_kit.ops(after) and "Constant" not in model_kit.ops(after)
    given = [{**feeds(model_kit, mask=(2, 1, 3, 5))[0], "extra": model_kit.normal(2, 4, 3)}]
    model_kit.same(model, after, given)


@pytest.mark.parametrize(("batch", "mask"), [(1, "2, 1, S, T"), ("N", "2, 1, S, T"), (1, "M, 1, S, T")])
def test_a_mask_that_makes_the_batch_larger_is_left(model_kit, batch, mask):
    assert "Attention" not in model_kit.ops(
        fused(attention(model_kit, mask=mask, batch=batch, out="float[M, S, 12] y"))
    )


def test_heads_from_a_batch_that_is_split_are_left(model_kit):
    model = attention(
        model_kit,
    )
    model.graph.initializers["split"].const_value = ir.tensor(np.array([1, -1, HEADS, SIZE]), name="split")
    assert "Attention" not in model_kit.ops(fused(model))


@pytest.mark.parametrize("target", ["wasm", "openvino", "cuda"])
def test_targets_without_a_fast_one_keep_the_parts_and_the_opset(model_kit, target):
    model = attention(model_kit)
    after = fused(model, target)
    assert "Attention" not in model_kit.ops(after)
    assert after.graph.opset_imports[""] == max(17, model.graph.opset_imports[""])


def test_models_without_attention_keep_their_opset(model_kit):
    model = model_kit.text(
        "g (float[N, 4] x) => (float[N, 4] y) { a = MatMul (x, w)  y = Softmax (a) }", w=np.eye(4, dtype=np.float32)
    )
    target = registry.target("x86-vnni")
    before = model.graph.opset_imports[""]
    Canonicalize(target.min_opset, target.attention is not None)(model)
    assert model.graph.opset_imports[""] == max(before, target.min_opset)


def test_what_was_merged_is_remembered(model_kit):
    after = fused(attention(model_kit))
    node = after.graph[-1]
    kinds = {kind for _, kind in node.meta["qgraph.origins"]}
    assert {"MatMul", "Softmax", "Mul", "Add"} <= kinds
