"""BlockBias, JoinProducts, MaskRows: a decoder's glue, in fewer operators and with the same numbers."""

import itertools

import numpy as np
import onnx_ir as ir
import pytest
from qgraph.passes.block_bias import BlockBias
from qgraph.passes.canonicalize import Canonicalize
from qgraph.passes.fold_shapes import FoldShapes
from qgraph.passes.group_heads import GroupHeads
from qgraph.passes.infer_types import InferTypes
from qgraph.passes.join_products import JoinProducts
from qgraph.passes.mask_rows import MaskRows

from qgraph import graph, registry
from qgraph.blocks import nearest
from qgraph.formats import UINT4
from qgraph.pipeline import Context
from qgraph.spec import PerBlock, QuantSpec

HEADER = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>\n'


def blocks(kit, name, inner, columns, seed=0):
    made = nearest(kit.normal(inner, columns, seed=seed), QuantSpec(UINT4, PerBlock(0, 32)))
    return {f"{name}c": made.codes, f"{name}s": made.scale, f"{name}z": made.zero_point}


def product(name, columns, inner=64, level=4):
    how = f"K = {inner}, N = {columns}, bits = 4, block_size = 32, accuracy_level = {level}"
    return f"com.microsoft.MatMulNBits <{how}> (x, {name}c, {name}s, {name}z)"


# -- biases ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8,), (1, 8), (1, 1, 8)])
@pytest.mark.parametrize("order", ["p, b", "b, p"])
def test_a_bias_goes_into_the_product(model_kit, shape, order):
    text = f"g (float[1, n, 64] x) => (float[1, n, 8] y) {{ p = {product('w', 8)} y = Add ({order}) }}"
    model = model_kit.text(HEADER + text, **blocks(model_kit, "w", 64, 8), b=model_kit.normal(*shape))
    model = Canonicalize(21)(model.clone()).model
    InferTypes()(model)
    after = model.clone()
    assert BlockBias()(after).modified and model_kit.ops(after) == ["MatMulNBits"]
    assert after.graph.outputs[0].name == "y"
    model_kit.same(model, after)


@pytest.mark.parametrize(
    "body, b",
    [
        ("y = Add (p, b)", (1, 1, 1)),
        ("y = Add (p, b)", (5, 8)),
        ("y = Add (p, b)", (1, 1, 1, 8)),
        ("q = Add (p, b) y = Mul (q, p)", (8,)),
        ("y = Add (p, p)", None),
        ("y = Sub (p, b)", (8,)),
    ],
)
def test_what_is_no_bias_stays(model_kit, body, b):
    text = f"g (float[1, n, 64] x) => (float y) {{ p = {product('w', 8)} {body} }}"
    weights = blocks(model_kit, "w", 64, 8) | ({} if b is None else {"b": model_kit.normal(*b)})
    model = Canonicalize(21)(model_kit.text(HEADER + text, **weights)).model
    InferTypes()(model)
    before = model_kit.ops(model)
    assert not BlockBias()(model).modified and model_kit.ops(model) == before


def test_one_bias_is_enough(model_kit):
    text = f"g (float[n, 64] x) => (float[n, 8] y) {{ p = {product('w', 8)} q = Add (p, b) y = Add (q, c) }}"
    weights = blocks(model_kit, "w", 64, 8)
    model = model_kit.text(HEADER + text, **weights, b=model_kit.normal(8), c=model_kit.normal(8, seed=1))
    after = Canonicalize(21)(model.clone()).model
    InferTypes()(after)
    BlockBias()(after)
    assert model_kit.ops(after) == ["MatMulNBits", "Add"]
    model_kit.same(model, after)


# -- siblings -------------------------------------------------------------------------------------------------------


def siblings(kit, sizes=(16, 8, 8), bias=(True, False, True), level=(4, 4, 4), extra=""):
    weights = {}
    body = []
    for i, (n, one) in enumerate(zip(sizes, bias, strict=True)):
        weights |= blocks(kit, f"w{i}", 64, n, seed=i)
        call = product(f"w{i}", n, level=level[i])
        if one:
            weights[f"b{i}"] = kit.normal(n, seed=i)
            call = call[:-1] + f", , b{i})"
        body.append(f"[n{i}] y{i} = {call}")
    outputs = ", ".join(f"float[1, n, {size}] y{i}" for i, size in enumerate(sizes))
    return kit.text(f"{HEADER}g (float[1, n, 64] x) => ({outputs}) {{ {' '.join(body)} {extra} }}", **weights)


@pytest.mark.parametrize("bias", list(itertools.product([True, False], repeat=3)))
def test_small_siblings_are_one(model_kit, bias):
    model = siblings(model_kit, bias=bias)
    after = model.clone()
    assert JoinProducts()(after).modified and model_kit.ops(after) == ["MatMulNBits", "Split"]
    # The same codes and the same rounding of x: the same numbers, to the last bit or two.
    model_kit.same(model, after, tolerance=1e-6)
    assert graph.planned_names(next(iter(after.graph))) == ("n0", "n1", "n2")
    assert len(after.graph.initializers) == 4 + any(bias), "no array is stored twice"


def test_only_like_products_are_joined(model_kit):
    model = siblings(model_kit, level=(4, 0, 4))
    JoinProducts()(model)
    assert sorted(model_kit.ops(model)) == ["MatMulNBits", "MatMulNBits", "Split"]
    assert graph.planned_names(next(n for n in model.graph if n.op_type == "MatMulNBits" and n.name == "n0")) == (
        "n0",
        "n2",
    )


def test_large_siblings_stay_apart(model_kit, monkeypatch):
    from qgraph.passes import join_products

    monkeypatch.setattr(join_products, "_SMALL", 64 * 8)
    model = siblings(model_kit)
    assert not JoinProducts()(model).modified
    monkeypatch.setattr(join_products, "_SMALL", 64 * 8 + 1)
    assert JoinProducts()(model).modified, "one small sibling is enough"


def test_shared_codes_stay(model_kit):
    how = product("w0", 16)
    model = siblings(model_kit, extra=f"z = {how}")
    model.graph.outputs.append(next(v for n in model.graph for v in n.outputs if v.name == "z"))
    model.graph.outputs[-1].type, model.graph.outputs[-1].shape = (
        model.graph.outputs[0].type,
        model.graph.outputs[0].shape,
    )
    after = model.clone()
    JoinProducts()(after)
    assert model_kit.ops(after).count("MatMulNBits") == 3, "the two that read the same codes stay"
    model_kit.same(model, after, tolerance=1e-6)


def test_reports_name_every_product(model_kit, tmp_path):
    """Through the whole pipeline: three products, planned one by one, are one node and three lines."""
    from qgraph import built, outcome
    from qgraph.audit import audit, plan_of

    sizes = (64, 32, 32)
    weights = {f"W{i}": model_kit.normal(128, n, seed=i) for i, n in enumerate(sizes)}
    weights |= {f"b{i}": model_kit.normal(n, seed=i) for i, n in enumerate(sizes)}
    body = " ".join(f"[n{i}] p{i} = MatMul (x, W{i}) [a{i}] y{i} = Add (p{i}, b{i})" for i in range(3))
    outputs = ", ".join(f"float[1, n, {size}] y{i}" for i, size in enumerate(sizes))
    model = model_kit.text(f"g (float[1, n, 128] x) => ({outputs}) {{ {body} }}", **weights)
    target = model_kit.free()
    after = registry.pipeline("quantize")(Context(target, target.scheme("int4"), None))(model.clone()).model
    assert model_kit.ops(after) == ["MatMulNBits", "Split"]
    assert built.assignment_of(after) == dict.fromkeys(("n0", "n1", "n2"), "int4")
    ir.save(after, tmp_path / "after.onnx")
    found = audit(tmp_path / "after.onnx", plan_of(after), target)
    assert found.clean, found.summary
    named = [one.name for one in outcome.nodes(after, found) if one.kernel == "MatMulNBits"]
    assert named == ["n0", "n1", "n2"]
    assert model_kit.sqnr(model, after, model_kit.feeds(model)) > 15


REPEAT = """{0}n = Shape <start = 0, end = 1> ({0})  {0}l = Shape <start = 2, end = 3> ({0})
    {0}u = Unsqueeze ({0}, {axis})
    {0}s = Concat <axis = 0> ({0}n, groups, times, {0}l, size)  {0}e = Expand ({0}u, {0}s)
    {0}t = Concat <axis = 0> ({0}n, heads, {0}l, size)  {0}r = Reshape ({0}e, {0}t)"""


def attention(kit, groups=2, times=3, scale="", more="", outputs="", size=4):
    keys, values = (REPEAT.format(name, axis="axis") for name in "kv")
    wide = f"float[N, {groups * times}, S, {size}]"
    text = f"""g ({wide} q, float[N, {groups}, T, {size}] k, float[N, {groups}, T, {size}] v, float[N, 1, S, T] mask)
        => ({wide} y{outputs}) {{
        {keys} {values} turned = Transpose <perm = [0, 1, 3, 2]> (kr)
        {scale or "a = Identity (q)  b = Identity (turned)"}  p = MatMul (a, b)  m = Add (p, mask)
        w = Softmax <axis = -1> (m)  y = MatMul (w, vr) {more}
    }}"""
    numbers = {"groups": groups, "times": times, "heads": groups * times, "size": size, "axis": 2}
    constants = {name: np.array([n]) for name, n in numbers.items()}
    return kit.text(text, **constants, **({"root": np.array(0.5, np.float32)} if "root" in text else {}))


def feeds(kit, n=2, s=3, t=5, groups=2, times=3, size=4):
    return [
        {
            "q": kit.normal(n, groups * times, s, size),
            "k": kit.normal(n, groups, t, size),
            "v": kit.normal(n, groups, t, size, seed=1),
            "mask": np.triu(np.full((n, 1, s, t), -3.4e38, np.float32), 1),
        }
    ]


# -- masks ----------------------------------------------------------------------------------------------------------


def in_rows(model):
    after = Canonicalize(21)(model.clone()).model
    for one in (FoldShapes(), GroupHeads()):
        one(after)
    return after, MaskRows()(after).modified


@pytest.mark.parametrize("n, s, t, groups, times", [(1, 1, 7, 2, 3), (2, 3, 5, 2, 3), (1, 4, 4, 1, 4), (3, 2, 2, 3, 2)])
def test_masks_are_added_to_rows(model_kit, n, s, t, groups, times):
    model = attention(model_kit, groups, times)
    after, changed = in_rows(model)
    assert changed
    ops = model_kit.ops(after)
    assert ops.count("Tile") == 1 and ops.count("Reshape") == 2, "rows of queries, and heads of the result"
    model_kit.same(model, after, feeds(model_kit, n, s, t, groups, times))


@pytest.mark.parametrize("mask", [(1, 1, 3, 5), (2, 1, 1, 5), (1, 5), (3, 5), (1, 3, 5)])
def test_masks_that_broadcast(model_kit, mask):
    model = attention(model_kit)
    model.graph.inputs[3].shape = ir.Shape([1 if d == 1 else None for d in mask])
    feed = {**feeds(model_kit)[0], "mask": np.where(model_kit.normal(*mask) > 0.5, np.float32(-1e9), np.float32(0))}
    after, changed = in_rows(model)
    assert changed
    model_kit.same(model, after, [feed])


def test_a_size_that_is_not_known_may_be_one(model_kit):
    model = attention(model_kit)
    model.graph.inputs[3].shape = ir.Shape([None, 1, None, None])
    after, changed = in_rows(model)
    assert changed
    for rows in (3, 1):
        feed = {**feeds(model_kit)[0], "mask": model_kit.normal(2, 1, rows, 5)}
        model_kit.same(model, after, [feed])


def test_a_scale_between_is_kept(model_kit):
    text = attention(model_kit, scale="a = Identity (q) b = Identity (turned)")
    add = next(node for node in text.graph if node.op_type == "Add")
    half = graph.add_initializer(text.graph, ir.tensor(np.float32(0.5)), "half")
    scale = ir.node("Mul", [add.inputs[0], half])
    scale.outputs[0].name = "scaled"
    text.graph.insert_before(add, scale)
    add.replace_input_with(0, scale.outputs[0])
    after, changed = in_rows(text)
    assert changed and "Mul" in model_kit.ops(after)
    model_kit.same(text, after, feeds(model_kit))


def test_masks_of_each_head_stay(model_kit):
    for heads in (6, None):
        model = attention(model_kit)
        model.graph.inputs[3].shape = ir.Shape(["N", heads, "S", "T"])
        assert not in_rows(model)[1]


def test_scores_that_are_also_read_stay(model_kit):
    model = attention(model_kit, more="z = Identity (m)", outputs=", float[N, 6, S, T] z")
    after, changed = in_rows(model)
    assert not changed
    model_kit.same(model, after, feeds(model_kit))
