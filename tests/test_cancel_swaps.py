"""CancelSwaps: what goes by rows is computed the other way round where that saves transposes, with the same numbers."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_ir.passes import common
from qgraph.passes import CancelSwaps

from qgraph import rowwise
from qgraph.swaps import Layout

SWAP = "Transpose <perm = [1, 0, 2]>"


def swaps(model):
    return sum(n.op_type == "Transpose" and list(n.attributes["perm"].value) == [1, 0, 2] for n in model.graph)


def changed(kit, model, free=3):
    after = model.clone()
    modified = CancelSwaps()(after).modified
    kit.same(model, after, kit.feeds(model, 2, free), tolerance=1e-6)
    return after, modified


@pytest.mark.parametrize(
    "between",
    [
        "b = Relu (a)",
        "b = MatMul (a, W)",
        "b = Add (a, r)",
        "b = Mul (s, a)",
        "b = LayerNormalization <axis = -1> (a, r)",
        "b = Softmax <axis = 2> (a)",
        "f = Reshape (a, flat) g = Gemm (f, W, r) b = Reshape (g, back)",
        "f = Reshape (a, flat) g = Gemm <transB = 1> (f, W) b = Reshape (g, free)",
        "p, q = Split <axis = 2, num_outputs = 2> (a) e = Relu (p) b = Sub (e, q)",
        "c = Erf (a) d = Add (c, a) b = Max (d, c)",
    ],
)
def test_what_goes_by_rows(model_kit, between):
    """Between two swaps; both are gone."""
    numbers = {
        "W": model_kit.normal(4, 4),
        "r": model_kit.normal(4),
        "s": np.array(2, np.float32),
        "flat": np.array([-1, 4]),
        "back": np.array([5, -1, 4]),
        "free": np.array([-1, 2, 4]),
    }
    words = between.replace(",", " ").replace(")", " ").replace("(", " ").split()
    used = {name: array for name, array in numbers.items() if name in words}
    made = "2" if "p, q" in between else "4"
    lead = "5, 2" if "free" in used else "5, N"
    back = ", ".join(lead.split(", ")[::-1])
    infer = "b" if "Reshape" not in between else "f"
    shapes = {"b": f"float[{lead}, {made}] b", "f": f"float[m, 4] f, float[m, 4] g, float[{lead}, 4] b"}[infer]
    extra = {"p, q": f", float[{lead}, 2] p, float[{lead}, 2] q, float[{lead}, 2] e"}.get(between[:4], "")
    extra += f", float[{lead}, 4] c, float[{lead}, 4] d" if "Erf" in between else ""
    model = model_kit.text(
        f"""g (float[{back}, 4] x) => (float[{back}, {made}] y) <float[{lead}, 4] a, {shapes}{extra}>
        {{ a = {SWAP} (x) {between} y = {SWAP} (b) }}""",
        **used,
    )
    after, modified = changed(model_kit, model)
    assert modified and swaps(after) == 0
    assert [str(dim) for dim in after.graph.outputs[0].shape] == [*back.split(", "), made]


@pytest.mark.parametrize(
    "between",
    [
        "b = Softmax <axis = 1> (a)",
        "b = Add (a, column)",
        "b = CumSum (a, axis)",
        "b = MatMul (a, stack)",
        "b = Concat <axis = 0> (a, a)",
        "b = LayerNormalization <axis = -1> (a, lifted)",
        "b = PRelu (a, column)",
        "f = Reshape (a, flat) g = Gemm <transB = 1> (f, f) b = Reshape (g, back)",
    ],
)
def test_what_looks_beyond_a_row_stays(model_kit, between):
    numbers = {
        "column": model_kit.normal(5, 1, 1),
        "axis": np.array(0),
        "stack": model_kit.normal(5, 4, 4),
        "lifted": model_kit.normal(5, 1, 4),
        "flat": np.array([-1, 4]),
        "back": np.array([5, 2, 10]),
    }
    used = {name: array for name, array in numbers.items() if f"{name})" in between}
    length, made = 10 if "Concat" in between else 5, 10 if "Gemm" in between else 4
    flat = ", float[10, 4] f, float[10, 10] g" if "Gemm" in between else ""
    model = model_kit.text(
        f"""g (float[2, 5, 4] x) => (float[2, {length}, {made}] y)
        <float[5, 2, 4] a, float[{length}, 2, {made}] b{flat}>
        {{ a = {SWAP} (x) {between} y = {SWAP} (b) }}""",
        **used,
    )
    after, modified = changed(model_kit, model)
    assert not modified and swaps(after) == 2


@pytest.mark.parametrize("sizes, left", [("s = Shape (b) sizes = Neg (s)", 1), ("sizes = Shape (b)", 2)])
def test_what_else_reads_the_turned_form_gets_it(model_kit, sizes, left):
    """Sizes are put in order afterwards, but where they are given away; a sum over positions has its swap."""
    model = model_kit.text(
        f"""g (float[N, 5, 4] x) => (float[N, 5, 16] y, int64[3] sizes, float[5, N, 4] z)
        <float[5, N, 4] a, float[5, N, 16] b, int64[3] s>
        {{ a = {SWAP} (x) b = MatMul (a, W) y = {SWAP} (b) {sizes} z = CumSum (a, axis) }}""",
        W=model_kit.normal(4, 16),
        axis=np.array(0),
    )
    after, modified = changed(model_kit, model)
    assert modified == (left == 1) and swaps(after) == left


def test_outputs_keep_names_and_order(model_kit):
    """Of what is turned round, and of an input that was swapped twice."""
    model = model_kit.text(
        f"""g (float[N, 5, 4] x) => (float[N, 5, 4] y, float[5, N, 4] z, float[N, 5, 4] same)
        <float[5, N, 4] a, float[5, N, 4] z, float[5, N, 4] c>
        {{ a = {SWAP} (x) z = Relu (a) c = MatMul (z, W) y = {SWAP} (c) same = {SWAP} (a) }}""",
        W=model_kit.normal(4, 4),
    )
    after, modified = changed(model_kit, model)
    assert modified and swaps(after) == 1
    assert [value.name for value in after.graph.outputs] == ["y", "z", "same"]


def test_outputs_keep_their_types(model_kit):
    """And the names of their sizes, with nothing inferred inside."""
    model = model_kit.text(
        f"""g (float[batch, 20] x) => (float[batch, 5, 4] w)
        {{ r = Reshape (x, to) a = {SWAP} (r) w = {SWAP} (a) }}""",
        to=np.array([-1, 5, 4]),
    )
    after = model.clone()
    CancelSwaps()(after)
    given, made = model.graph.outputs[0], after.graph.outputs[0]
    assert (made.name, made.type, made.shape) == (given.name, given.type, given.shape)
    model_kit.same(model, after, tolerance=0)


def test_an_output_in_between_keeps_its_shape(model_kit):
    """What is turned round inside is given away as it was declared."""
    model = model_kit.text(
        f"""g (float[a, b, 4] x) => (float[b, a, 4] m, float[a, b, 8] y) <float[b, a, 4] s, float[b, a, 8] t>
        {{ s = {SWAP} (x) m = Tanh (s) t = MatMul (m, W) y = {SWAP} (t) }}""",
        W=model_kit.normal(4, 8),
    )
    after, modified = changed(model_kit, model)
    assert modified
    assert [value.shape for value in after.graph.outputs] == [value.shape for value in model.graph.outputs]
    onnx.checker.check_model(ir.to_proto(after), full_check=True)


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_a_shape_that_is_computed(model_kit, batch):
    """A batch of none is none the other way round, too."""
    model = model_kit.text(
        f"""g (float[N, 5, 4] x) => (float[N, 5, 4] y)
        <float[5, N, 4] a, float[m, 4] f, float[m, 4] g, float[5, N, 4] b, int64[1] n>
        {{
            a = {SWAP} (x) f = Reshape (a, flat) g = Gemm (f, W) n = Shape <start = 0, end = 1> (x)
            s = Concat <axis = 0> (five, n, four) b = Reshape <allowzero = 1> (g, s) y = {SWAP} (b)
        }}""",
        W=model_kit.normal(4, 4),
        flat=np.array([-1, 4]),
        five=np.array([5]),
        four=np.array([4]),
    )
    after, modified = changed(model_kit, model, batch)
    assert modified and swaps(after) == 0


def test_costs_grow_with_the_graph(model_kit):
    """A value that many groups read is looked at once for each."""
    lines = " ".join(f"a{k} = Relu (t) b{k} = CumSum (a{k}, axis)" for k in range(400))
    shapes = ", ".join(f"float[5, 2, 4] a{k}, float[5, 2, 4] b{k}" for k in range(400))
    outputs = ", ".join(f"float[5, 2, 4] b{k}" for k in range(400))
    model = model_kit.text(
        f"g (float[2, 5, 4] x) => ({outputs}) <float[5, 2, 4] t, {shapes}> {{ t = {SWAP} (x) {lines} }}",
        axis=np.array(0),
    )
    layout = Layout(model.graph)
    asked = []
    users = layout.users
    layout.users = lambda value: asked.append(value) or users(value)
    layout.settle()
    assert len(asked) <= 2 * len(model.graph)


def test_old_opsets_stay(model_kit):
    """Softmax meant something else there."""
    model = model_kit.text(
        f"""g (float[2, 5, 4] x) => (float[2, 5, 4] y) <float[5, 2, 4] a, float[5, 2, 4] b>
        {{ a = {SWAP} (x) b = Softmax (a) y = {SWAP} (b) }}""",
        opset=12,
    )
    assert not CancelSwaps()(model).modified


def test_a_subgraph_that_reads_it_is_left_alone(model_kit):
    model = model_kit.text(
        f"""g (float[2, 5, 4] x, bool[1] c) => (float[2, 5, 4] y, float[5, 2, 4] z) <float[5, 2, 4] a, float[5, 2, 4] b>
        {{
            a = {SWAP} (x) b = Relu (a) y = {SWAP} (b)
            z = If (c) <then_branch = t () => (float[5, 2, 4] p) {{ p = Neg (b) }},
                else_branch = e () => (float[5, 2, 4] q) {{ q = Abs (a) }}>
        }}"""
    )
    _, modified = changed(model_kit, model)
    assert not modified


def test_layers_in_between_are_decided_together(model_kit):
    """A residual path through many layers, each of which swaps on its way in and out, as nn.MultiheadAttention's do."""
    lines, shapes, x = [], [], "x"
    for k in range(12):
        lines.append(f"i{k} = {SWAP} ({x}) m{k} = MatMul (i{k}, W) o{k} = {SWAP} (m{k}) s{k} = Add ({x}, o{k})")
        shapes += [f"float[5, N, 4] i{k}", f"float[5, N, 4] m{k}", f"float[N, 5, 4] o{k}", f"float[N, 5, 4] s{k}"]
        x = f"s{k}"
    model = model_kit.text(
        f"g (float[N, 5, 4] x) => (float[N, 5, 4] y) <{', '.join(shapes)}> {{ {' '.join(lines)} y = Relu ({x}) }}",
        W=model_kit.normal(4, 4, scale=0.1),
    )
    after, modified = changed(model_kit, model)
    assert modified and swaps(after) == 0
    assert model_kit.ops(after) == ["MatMul", "Add"] * 12 + ["Relu"]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_graph_keeps_its_numbers(model_kit, data):
    """Random graphs of swaps, row-wise operators and others: never more columns are transposed than before."""
    values, lines, shapes = [("x", False)], [], []
    for k in range(data.draw(st.integers(2, 10))):
        name, (source, turned) = f"v{k}", data.draw(st.sampled_from(values))
        kind = data.draw(st.sampled_from(["swap", "swap", "relu", "matmul", "add", "sum", "cumulate", "shape"]))
        partners = [other for other, way in values if way == turned]
        line = {
            "swap": f"{SWAP} ({source})",
            "relu": f"Relu ({source})",
            "matmul": f"MatMul ({source}, W)",
            "add": f"Add ({source}, r)",
            "sum": f"Add ({source}, {data.draw(st.sampled_from(partners))})",
            "cumulate": f"CumSum ({source}, axis)",
            "shape": f"Expand ({source}, size{k})",
        }[kind]
        lines.append((f"size{k} = Shape ({source}) " if kind == "shape" else "") + f"{name} = {line}")
        turned ^= kind == "swap"
        values.append((name, turned))
        shapes.append(f"float[{'5, N' if turned else 'N, 5'}, 4] {name}")
    given_away = data.draw(st.lists(st.sampled_from(values[1:]), min_size=1, max_size=3, unique=True))
    outputs = ", ".join(f"float[{'5, N' if turned else 'N, 5'}, 4] {name}" for name, turned in given_away)
    inner = ", ".join(shape for shape in shapes if shape.split()[-1] not in dict(given_away))
    inner = f"<{inner}>" if inner else ""
    text = f"g (float[N, 5, 4] x) => ({outputs}) {inner} {{ {' '.join(lines)} }}"
    used = {"W": model_kit.normal(4, 4), "r": model_kit.normal(4), "axis": np.array(0)}
    model = model_kit.text(text, **{name: array for name, array in used.items() if f" {name})" in text})
    common.RemoveUnusedNodesPass()(model)
    after, _ = changed(model_kit, model)
    assert swaps(after) <= swaps(model)


def test_a_column_of_biases_is_none_of_a_row(model_kit):
    """Gemm adds what broadcasts; a number for each row would change places with the axes."""
    model = model_kit.text(
        """g (float[5, 2, 4] x) => (float[5, 2, 4] y) <float[10, 4] f, float[10, 4] g>
        { f = Reshape (x, flat) g = Gemm (f, W, c) y = Reshape (g, back) }""",
        W=model_kit.normal(4, 4),
        c=model_kit.normal(10, 1),
        flat=np.array([-1, 4]),
        back=np.array([5, 2, 4]),
    )
    assert rowwise.rows(model.graph[0]) is None
