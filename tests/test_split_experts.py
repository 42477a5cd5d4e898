"""SplitExperts: products with a table of weights, one for each expert, have the numbers that they had."""

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qgraph.passes import pipelines
from qgraph.passes.plain_einsum import PlainEinsum
from qgraph.passes.split_experts import SplitExperts

from qgraph import audit, registry
from qgraph.data import inputs_of, load
from qgraph.modelio import read
from qgraph.pipeline import Context
from qgraph.targets import KERNEL

INNER, COLUMNS = 32, 8


def split(kit, model, scheme="int4", **options):
    """The model split (a copy), and the pass."""
    target = kit.free().in_blocks(32)
    copy = model.clone()
    one = SplitExperts(target, target.scheme(scheme), **options)
    one(copy)
    return copy, one


def declared(dims):
    return ", ".join(map(str, dims))


def products(model):
    return [n for n in model.graph if n.op_type in ("MatMul", "FusedMatMul")]


@st.composite
def broadcast(draw):
    """(batch of the table, shape of x, which of its dimensions are declared)."""
    batch = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=2)))
    rank = draw(st.integers(1, len(batch) + 4))
    lead = [draw(st.integers(1, 3)) for _ in range(max(0, rank - 2 - len(batch)))]
    own = [draw(st.sampled_from([1, size])) if size > 1 else draw(st.integers(1, 3)) for size in batch]
    dims = [*lead, *own[len(own) - max(0, rank - 2 - len(lead)) :]] if rank > 2 else []
    shape = [*dims, *([draw(st.integers(0, 4))] if rank > 1 else []), INNER]
    free = draw(st.lists(st.booleans(), min_size=len(shape), max_size=len(shape)))
    return (
        batch,
        shape,
        [f"d{i}" if f and i < len(shape) - 1 else d for i, (f, d) in enumerate(zip(free, shape, strict=True))],
    )


@settings(max_examples=60, deadline=None)
@given(case=broadcast(), turned=st.booleans(), left=st.booleans())
def test_every_expert_as_the_product_broadcasts(model_kit, case, turned, left):
    batch, shape, dims = case
    left = left and len(shape) > 1
    table = model_kit.normal(*batch, INNER, COLUMNS)
    if left:
        shape, dims = [*shape[:-2], shape[-1], shape[-2]], [*dims[:-2], dims[-1], dims[-2]]
    table = np.ascontiguousarray(table.swapaxes(-1, -2)) if turned != left else table
    order = [*range(len(batch)), len(batch) + 1, len(batch)]
    turn = f"v = Transpose <perm = {order}> (W)" if turned else "v = Identity (W)"
    inputs = "v, x" if left else "x, v"
    text = f"g (float[{declared(dims)}] x) => (float[] y) {{ {turn} y = MatMul ({inputs}) }}"
    model = model_kit.text(text, W=table)
    model.graph.outputs[0].shape = None
    if not turned:
        node = model.graph[1]
        node.replace_input_with(list(node.inputs).index(model.graph[0].outputs[0]), model.graph.initializers["W"])
    found, one = split(model_kit, model)
    assert not one.refused
    assert len(products(found)) == np.prod(batch)
    feeds = [{"x": model_kit.normal(*shape, seed=1)}]
    model_kit.same(model, found, feeds)


@st.composite
def picking(draw):
    """(shape of the ids, leading dimensions of x), which broadcast together; zero rows and one row are among them."""
    common = draw(st.lists(st.integers(0, 3), min_size=1, max_size=3))
    # The runtime itself does not broadcast one to none.
    ids = [draw(st.sampled_from([1, size])) if size else 0 for size in common]
    x = [draw(st.sampled_from([1, size])) if size else 0 for size in common]
    return ids, x[draw(st.integers(0, 0 if 0 in common else len(x))) :]


@settings(max_examples=60, deadline=None)
@given(
    shapes=picking(),
    rows=st.integers(0, 3),
    kind=st.sampled_from(["int64", "int32"]),
    turned=st.booleans(),
    left=st.booleans(),
    free=st.booleans(),
    data=st.data(),
)
def test_picked_experts(model_kit, shapes, rows, kind, turned, left, free, data):
    """Nobody's, everyone's, counted from the end; as many as x has rows, or broadcast with them."""
    ids, lead = shapes
    experts = data.draw(st.integers(1, 5))
    table = model_kit.normal(experts, INNER, COLUMNS)
    table = np.ascontiguousarray(table.swapaxes(-1, -2)) if turned != left else table
    shape = [*lead, *((INNER, rows) if left else (rows, INNER))]
    names = [f"d{i}" if free and size != INNER else size for i, size in enumerate(shape)]
    order = [*range(len(ids)), len(ids) + 1, len(ids)]
    body = f"p = Gather (W, i) v = Transpose <perm = {order}> (p)" if turned else "v = Gather (W, i)"
    text = (
        f"g (float[{declared(names)}] x, {kind}[{declared(ids)}] i) "
        f"=> (float[] y) {{ {body} y = MatMul ({'v, x' if left else 'x, v'}) }}"
    )
    model = model_kit.text(text, W=table)
    model.graph.outputs[0].shape = None
    found, one = split(model_kit, model)
    assert not one.refused
    assert len(products(found)) == experts
    count = int(np.prod(ids))
    picked = data.draw(st.lists(st.integers(-experts, experts - 1), min_size=count, max_size=count))
    feeds = [{"x": model_kit.normal(*shape, seed=2), "i": np.array(picked, kind).reshape(ids)}]
    model_kit.same(model, found, feeds)


@pytest.mark.parametrize("number", [0, 2, -1])
@pytest.mark.parametrize("turned", [False, True])
def test_one_expert_is_a_window_of_the_table(model_kit, number, turned):
    """How torch writes a loop over experts: the runtime would copy the weight."""
    table = model_kit.normal(4, COLUMNS, INNER) if turned else model_kit.normal(4, INNER, COLUMNS)
    turn = "v = Transpose <perm = [1, 0]> (p) y = MatMul (x, v)" if turned else "y = MatMul (x, p)"
    text = f"g (float[n, {INNER}] x) => (float[n, {COLUMNS}] y) {{ p = Gather (W, i) {turn} }}"
    model = model_kit.text(text, W=table, i=np.array(number))
    found, _ = split(model_kit, model)
    assert model_kit.ops(found) == ["FusedMatMul" if turned else "MatMul"]
    assert [a.shape for a in model_kit.tensors(found).values()] == [table.shape[1:]]
    model_kit.same(model, found)


def test_weights_stay_in_their_file(model_kit, tmp_path):
    """No table is read or copied: each product has the bytes of its expert."""
    table = model_kit.normal(3, INNER, COLUMNS)
    text = f"g (float[3, n, {INNER}] x) => (float[3, n, {COLUMNS}] y) {{ y = MatMul (x, W) }}"
    path = tmp_path / "model.onnx"
    ir.save(model_kit.text(text, W=table), path, external_data="model.data", size_threshold_bytes=0)
    found, _ = split(model_kit, read(path))
    weights = [node.inputs[1].const_value for node in products(found)]
    assert all(isinstance(one, ir.LazyTensor | ir.ExternalTensor) for one in weights)
    for number, one in enumerate(weights):
        np.testing.assert_array_equal(one.numpy(), table[number])
    large = model_kit.normal(3, 256, COLUMNS)
    ir.save(model_kit.text(text.replace(str(INNER), "256"), W=large), path, external_data="model.data")
    found, _ = split(model_kit, read(path))
    weights = [node.inputs[1].const_value for node in products(found)]
    assert [one.offset for one in weights] == [i * large[0].nbytes + weights[0].offset for i in range(3)]
    assert all(str(one.path) == str(tmp_path / "model.data") for one in weights)
    for number, one in enumerate(weights):
        np.testing.assert_array_equal(one.numpy(), large[number])


@pytest.mark.parametrize(
    "equation, x, table",
    [
        ("tk,ekn->ten", (5, INNER), (3, INNER, COLUMNS)),
        ("tk,enk->etn", (5, INNER), (3, COLUMNS, INNER)),
        ("etk,ekn->etn", (3, 5, INNER), (3, INNER, COLUMNS)),
        ("tek,enk->ten", (5, 3, INNER), (3, COLUMNS, INNER)),
        ("bsek, ekn -> nbse", (2, 5, 3, INNER), (3, INNER, COLUMNS)),
        ("ek,ekn->en", (3, INNER), (3, INNER, COLUMNS)),
        ("k,ekn->ne", (INNER,), (3, INNER, COLUMNS)),
        ("fghk,efkn->gefhn", (2, 4, 5, INNER), (3, 2, INNER, COLUMNS)),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_einsum(model_kit, equation, x, table, first):
    left, result = equation.split("->")
    a, b = left.split(",")
    equation, inputs = (equation, "x, W") if first else (f"{b},{a}->{result}", "W, x")
    text = f'g (float[{declared(x)}] x) => (float[] y) {{ y = Einsum <equation = "{equation}"> ({inputs}) }}'
    model = model_kit.text(text, W=model_kit.normal(*table))
    model.graph.outputs[0].shape = None
    plain = model.clone()
    PlainEinsum(model_kit.free())(plain)
    assert "Einsum" not in model_kit.ops(plain)
    found, _ = split(model_kit, plain)
    assert len(products(found)) == np.prod(table[:-2])
    model_kit.same(model, found)


@pytest.mark.parametrize("equation", ["tk,ken->ten", "tk,ekn->tn", "...k,ekn->...en", "te,ekn->tkn", "tk,ekn"])
def test_an_einsum_that_is_no_product_of_experts_stays(model_kit, equation):
    sizes = {"t": 5, "k": INNER, "e": 4, "n": COLUMNS}
    a, b = equation.split("->")[0].split(",")
    shapes = [declared(sizes.get(label, 5) for label in part.replace("...", "t")) for part in (a, b)]
    table = model_kit.normal(*(sizes[label] for label in b))
    text = f'g (float[{shapes[0]}] x) => (float[] y) {{ y = Einsum <equation = "{equation}"> (x, W) }}'
    model = model_kit.text(text, W=table)
    PlainEinsum(model_kit.free())(model)
    assert model_kit.ops(model) == ["Einsum"]


MIXTURE = """
g (float[b, t, 64] x) => (float[b, t, 64] y) {
    f = Reshape (x, flat)
    r = MatMul (f, R)
    top, i = TopK <axis = -1> (r, two)
    w = Softmax (top)
    u = Unsqueeze (f, one)
    v = Unsqueeze (u, one)
    g1 = Gather (A, i)
    a = MatMul (v, g1)
    c = Relu (a)
    g2 = Gather (B, i)
    o = MatMul (c, g2)
    s = Squeeze (o, before)
    m = Unsqueeze (w, last)
    p = Mul (s, m)
    q = ReduceSum <keepdims = 0> (p, one)
    shape = Shape (x)
    h = Reshape (q, shape)
    z = Add (h, x)
    y = MatMul (z, D)
}
"""


@pytest.fixture
def mixture(model_kit):
    """Two of four experts for each token; positive tokens never go to the last."""
    router = model_kit.normal(64, 4)
    router[:, 3] = router[:, :3].min(axis=1) - 1.0
    ints = {"flat": [-1, 64], "two": [2], "one": [1], "before": [-2], "last": [-1]}
    return model_kit.text(
        MIXTURE,
        R=router,
        A=model_kit.normal(4, 64, 96, scale=0.2),
        B=model_kit.normal(4, 96, 64, scale=0.2),
        D=model_kit.normal(64, 64, seed=3),
        **{name: np.array(numbers) for name, numbers in ints.items()},
    )


def positive(count, seed=0):
    """Feeds of positive numbers, which the router keeps from the last expert."""
    rng = np.random.default_rng(seed)
    return [{"x": np.abs(rng.standard_normal((2, 9, 64))).astype(np.float32)} for _ in range(count)]


def test_a_mixture_goes_into_blocks_expert_by_expert(model_kit, mixture, tmp_path):
    """Codes are learned from the tokens that an expert sees; who sees none is told."""
    target = model_kit.free().in_blocks(32)
    model = mixture.clone()
    data = load(positive(12), inputs_of(model))
    choices = {"a_*_expert_1": "int8-weights", "o_MatMul_expert_2": "float"}
    pipeline = pipelines.quantize(Context(target, target.scheme("int4"), data, choices=choices))
    model = pipeline(model).model
    ir.save(model, tmp_path / "out.onnx")
    plan = audit.plan_of(model)
    found = audit.audit(tmp_path / "out.onnx", plan, target)
    assert found.clean, found.summary
    bits = {n.name: n.attributes.get_int("bits", 0) for n in model.graph if n.op_type == "MatMulNBits"}
    assert {name: b for name, b in bits.items() if "expert" in name} == {
        **{f"a_MatMul_expert_{e}": 8 if e == 1 else 4 for e in range(4)},
        **{f"o_MatMul_expert_{e}": 4 for e in (0, 1, 3)},
    }
    refused = next(step.refused for step in pipeline.steps if step.name == "RoundBlocks")
    assert sorted(refused) == ["a_MatMul_expert_3", "o_MatMul_expert_3"]
    assert model_kit.sqnr(mixture, model, positive(4, seed=1)) > 15


def test_experts_too_small_to_pay_stay_whole(model_kit):
    model = model_kit.text(
        f"g (float[3, 4, {INNER}] x) => (float[3, 4, {COLUMNS}] y) {{ y = MatMul (x, W) }}",
        W=model_kit.normal(3, INNER, COLUMNS),
    )
    target = registry.target("x86-vnni").in_blocks(32)
    one = SplitExperts(target, target.scheme("int4"))
    assert not one(model).modified
    assert "no faster" in one.refused["MatMul(y)"]
    one = SplitExperts(target, target.scheme("int8"))
    assert not one(model).modified
    one = SplitExperts(model_kit.free().in_blocks(32), target.scheme("int4"), keep_float=["MatMul"])
    assert not one(model).modified
    assert "left in float" in one.refused["MatMul(y)"]
    assert not any(KERNEL in node.meta for node in model.graph)
