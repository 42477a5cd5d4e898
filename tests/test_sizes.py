"""Arithmetic of shapes: what is told of each number is what a run computes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_ir.passes import common
from qgraph.passes import Canonicalize, FoldShapes

from qgraph.session import Session, SessionOptions
from qgraph.sizes import elements, factors, natural

SHAPE = (2, 3, 5, 7)


@st.composite
def arithmetic(draw):
    """Text of nodes that make a vector `out` of the sizes of x, and the constants they read."""
    count, lines, constants = 0, [], {}

    def new(kind):
        nonlocal count
        count += 1
        return f"{kind}{count}"

    def number(*values):
        name = new("c")
        constants[name] = np.array(values)
        return name

    def vector(depth):
        kind = draw(st.sampled_from(["shape", "constant"] if depth == 0 else ["gather", "slice", "concat", "one"]))
        name = new("v")
        if kind == "constant":
            constants[name] = np.array(draw(st.lists(st.integers(-1, 9), min_size=1, max_size=3)))
            return name
        if kind == "shape":
            start = draw(st.integers(-5, 3))
            end = draw(st.sampled_from(["", ", end = 3", ", end = -1", ", end = 9"]))
            lines.append(f"{name} = Shape <start = {start}{end}> (x)")
        elif kind == "gather":
            index = draw(st.lists(st.integers(-1, 0), min_size=1, max_size=3))
            lines.append(f"{name} = Gather ({vector(depth - 1)}, {number(*index)})")
        elif kind == "slice":
            first, last = draw(st.integers(-3, 2)), draw(st.sampled_from([-1, 1, 2, 9, 2**40]))
            lines.append(f"{name} = Slice ({vector(depth - 1)}, {number(first)}, {number(last)}, {number(0)})")
        elif kind == "concat":
            lines.append(f"{name} = Concat <axis = 0> ({vector(depth - 1)}, {vector(depth - 1)})")
        else:
            scalar, zero = new("s"), new("z")
            constants[zero] = np.array(0)
            source = vector(depth - 1)
            lines.append(f"{scalar} = Gather ({source}, {zero})  {name} = Unsqueeze ({scalar}, {number(0)})")
        return name

    result = vector(draw(st.integers(1, 3)))
    lines.append(f"out = Identity ({result})")
    return " ".join(lines), constants, result


@settings(max_examples=60, deadline=None)
@given(made=arithmetic())
def test_every_number_is_what_a_run_computes(model_kit, made):
    text, constants, result = made
    model = model_kit.text(f"g (float[A, B, C, D] x) => (int64[K] out) {{ {text} }}", **constants)
    common.ShapeInferencePass()(model)
    value = next(v for node in model.graph for v in node.inputs if v is not None and v.name == result)
    told = elements(value)
    try:
        with Session(model, SessionOptions(level="none")) as session:
            found = session.run({"x": np.zeros(SHAPE, np.float32)})["out"].tolist()
    except Exception:
        return  # An index beyond the end is an error of the graph's own.
    assert told is not None
    assert [SHAPE[one[1]] if isinstance(one, tuple) else one for one in told] == found
    assert natural(value) is False or min(found, default=0) >= 0


@pytest.mark.parametrize("text", ["out = Add (s, s)", "i = Size (x)  out = Unsqueeze (i, zero)", "out = Gather (s, n)"])
def test_other_arithmetic_is_not_followed(model_kit, text):
    text = f"g (float[A, B] x, int64[1] n) => (int64[K] out) {{ s = Shape (x)  {text} }}"
    model = model_kit.text(text, **({"zero": np.array([0])} if "zero" in text else {}))
    assert elements(model.graph.outputs[0]) is None


def test_a_dimension_that_is_copied_needs_no_name(model_kit):
    """The exporter's inference has lost what is equal here, and still it is one dimension of one value."""
    model = model_kit.text(
        """g (float[A, B, 4] x, float[C, D, 4] more) => (float[E, F, G, H] y) {
            s = Add (x, more)  a = Shape <start = 0, end = 1> (s)  b = Shape <start = 1, end = 2> (s)
            t = Concat <axis = 0> (a, b, rest)  r = Reshape (s, t)  y = Neg (r)
        }""",
        rest=np.array([2, -1]),
    )
    after = model.clone()
    Canonicalize(21)(after)
    FoldShapes()(after)
    assert "Shape" not in model_kit.ops(after)
    feeds = [{"x": model_kit.normal(n, m, 4), "more": model_kit.normal(1, m, 4, seed=2)} for n, m in ((1, 3), (3, 1))]
    model_kit.same(model, after, feeds)


def test_products_of_sizes(model_kit):
    """Numbers come together, and what is a product is no element."""
    model = model_kit.text(
        """g (float[A, B] x) => (int64[K] y) {
            s = Shape (x)  a = Gather (s, zero)  b = Gather (s, one)  ab = Mul (a, b)  six = Mul (three, ab)
            more = Mul (two, six)  p = Unsqueeze (more, front)  q = Unsqueeze (b, front)  y = Concat <axis = 0> (p, q)
        }""",
        zero=np.array(0),
        one=np.array(1),
        two=np.array(2),
        three=np.array(3),
        front=np.array([0]),
    )
    common.ShapeInferencePass()(model)
    x, y = model.graph.inputs[0], model.graph.outputs[0]
    assert factors(y) == [(6, (x, 0), (x, 1)), ((x, 1),)]
    assert elements(y) is None
