"""trace: what it says of an element's place is where a session puts it, and nothing is said that is not seen."""

from math import prod

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_ir.passes import common

from qgraph import axes


@st.composite
def moves(draw):
    """Sizes of three axes, and up to six operators that move them."""
    start = draw(st.lists(st.sampled_from([1, 2, 3, 4, 6, 12]), min_size=3, max_size=3))
    shape, steps = list(start), []
    for _ in range(draw(st.integers(1, 6))):
        kind = draw(st.sampled_from(["Transpose", "Reshape", "Unsqueeze", "Squeeze", "Gather"]))
        if kind == "Transpose":
            order = draw(st.permutations(range(len(shape))))
            steps.append((kind, order))
            shape = [shape[axis] for axis in order]
        elif kind == "Reshape":
            left, after = prod(shape), []
            while left > 1 and len(after) < 4:
                after.append(draw(st.sampled_from([n for n in range(1, left + 1) if left % n == 0])))
                left //= after[-1]
            after.append(left)
            steps.append((kind, after))
            shape = list(after)
        elif kind == "Unsqueeze":
            axis = draw(st.integers(0, len(shape)))
            steps.append((kind, [axis]))
            shape.insert(axis, 1)
        elif kind == "Squeeze" and 1 in shape:
            axis = shape.index(1)
            steps.append((kind, [axis]))
            del shape[axis]
        elif kind == "Gather" and len(shape) > 1:
            axis = draw(st.integers(0, len(shape) - 1))
            steps.append((kind, [axis, draw(st.integers(-shape[axis], shape[axis] - 1))]))
            del shape[axis]
    return start, steps


def built(start, steps):
    """The last value of a graph of these steps, and the array that a counting source becomes."""
    x = ir.val("x", ir.DataType.FLOAT, start)
    array, value, nodes, constants = np.arange(prod(start)).reshape(start), x, [], []

    def constant(numbers):
        made = ir.Value(name=f"c{len(constants)}", const_value=ir.tensor(np.array(numbers, np.int64)))
        constants.append(made)
        return made

    for kind, numbers in steps:
        attributes, inputs = [], [value]
        if kind == "Transpose":
            attributes, array = [ir.AttrInt64s("perm", numbers)], array.transpose(numbers)
        elif kind == "Gather":
            attributes, array = [ir.AttrInt64("axis", numbers[0])], np.take(array, numbers[1], numbers[0])
            inputs.append(constant(numbers[1]))
        else:
            inputs.append(constant(numbers))
            wanted = {"Reshape": lambda a, n: a.reshape(n), "Unsqueeze": np.expand_dims, "Squeeze": np.squeeze}[kind]
            array = wanted(array, tuple(numbers))
        node = ir.Node("", kind, inputs, attributes)
        value = node.outputs[0]
        value.shape, value.type = ir.Shape(array.shape), ir.TensorType(ir.DataType.FLOAT)
        nodes.append(node)
    ir.Graph([x], [value], nodes=nodes, initializers=constants)
    return value, array, x


@settings(max_examples=300, deadline=None)
@given(moves())
def test_what_is_said_is_so(case):
    """Taken apart, chosen from, and put in the order of the result, the source is the result."""
    value, expected, source = built(*case)
    moved = axes.trace(value, 3)
    if moved is None:
        return
    atoms = [atom for axis in moved.before for atom in axis]
    origin = source if moved.source is source else None
    if origin is None:
        # A later tensor of three axes: count from there.
        steps = case[1][: len(case[1]) - len(moved.steps)]
        _, array, _ = built(case[0], steps)
    else:
        array = np.arange(prod(case[0]))
    array = array.reshape([atom.size for atom in atoms])
    array = array[tuple(slice(None) if atom.index is None else atom.index for atom in atoms)]
    kept = [atom for atom in atoms if atom.index is None]
    order = [atom for axis in moved.after for atom in axis]
    assert sorted(map(id, order)) == sorted(map(id, kept))
    array = array.transpose([kept.index(atom) for atom in order])
    sizes = [prod(atom.size for atom in axis) for axis in moved.after]
    assert np.array_equal(array.reshape(sizes), expected)


@settings(max_examples=100, deadline=None)
@given(moves())
def test_transposes_and_splits_are_always_seen(case):
    """What needs no luck: every reshape only takes axes apart."""
    start, steps = case
    steps = [step for step in steps if step[0] in ("Transpose", "Unsqueeze")]
    rank, kept = 3, []
    for kind, numbers in steps:
        if kind == "Transpose" and len(numbers) == rank:
            kept.append((kind, numbers))
        elif kind == "Unsqueeze" and numbers[0] <= rank:
            kept.append((kind, numbers))
            rank += 1
    if kept:
        assert axes.trace(built(start, kept)[0], 3) is not None


@pytest.mark.parametrize(
    "target, seen",
    [("L, NH, 4", True), ("L, N, 3, 4", True), ("NL, 12", True), ("N, L, 12", False), ("5, 5, 4", False)],
)
def test_free_sizes(target, seen):
    """They are told by name, and one at most by all others; what only a run could tell is not seen."""
    x = ir.val("x", ir.DataType.FLOAT, ["L", "N", 12])
    dims = [int(dim) if dim.isdigit() else dim for dim in target.split(", ")]
    shape = ir.val("s", ir.DataType.INT64, [len(dims)])
    node = ir.Node("", "Reshape", [x, shape])
    node.outputs[0].shape = ir.Shape(dims)
    ir.Graph([x, shape], node.outputs, nodes=[node])
    moved = axes.trace(node.outputs[0], 3)
    assert (moved is not None) == seen
    if moved is not None:
        assert sum(map(len, moved.after)) == (4 if "4" in target else 3)


def test_sizes_that_say_nothing():
    """None at all, and shapes that are not known."""
    for start, to in (([5, 0, 36], [10, 0, 3, 4]), ([1, 1, 1], None)):
        x = ir.val("x", ir.DataType.FLOAT, start)
        shape = ir.Value(name="s", const_value=ir.tensor(np.array(to, np.int64))) if to else ir.val("s")
        node = ir.Node("", "Reshape", [x, shape], [ir.AttrInt64("allowzero", 1)])
        node.outputs[0].shape = None if to is None else ir.Shape(to)
        given = [shape] if to else []
        ir.Graph([x, *([] if to else [shape])], node.outputs, nodes=[node], initializers=given)
        assert axes.trace(node.outputs[0], 3) is None


@pytest.mark.parametrize(
    "target, seen",
    [
        ("N * 3, any, 4", [2, 1, 1]),  # As a size times a number.
        ("any, 3 * L, 4", [1, 2, 1]),
        ("any, N * L, 4", None),  # No neighbours.
        ("flat, 12", [3, 1]),  # As the size of something that was seen on the way.
    ],
)
def test_sizes_that_are_computed(model_kit, target, seen):
    """[N, L, 12] -> [N, 3, L, 4], and on."""
    parts = {
        "N * 3, any, 4": "c = Mul (n, three)  t = Concat <axis = 0> (c, any, four)",
        "any, 3 * L, 4": "c = Mul (l, three)  t = Concat <axis = 0> (any, c, four)",
        "any, N * L, 4": "c = Mul (l, n)  t = Concat <axis = 0> (any, c, four)",
        "flat, 12": "b = Reshape (u, join)  d = Shape <end = 1> (b)  t = Concat <axis = 0> (d, any)",
    }[target]
    out = "A, B" if target == "flat, 12" else "A, B, C"
    last = "b" if target == "flat, 12" else "u"
    model = model_kit.text(
        f"""g (float[N, L, 12] x) => (float[{out}] y) {{
            n = Shape <start = 0, end = 1> (x)  l = Shape <start = 1, end = 2> (x)
            v = Reshape (x, heads)  u = Transpose <perm = [0, 2, 1, 3]> (v)  {parts}  y = Reshape ({last}, t)
        }}""",
        heads=np.array([0, 0, 3, 4]),
        join=np.array([-1, 4]),
        three=np.array([3]),
        four=np.array([4]),
        any=np.array([-1]),
    )
    common.ShapeInferencePass()(model)
    model.graph.outputs[0].shape = None
    moved = axes.trace(model.graph.outputs[0], 3)
    assert (None if moved is None else [len(axis) for axis in moved.after]) == seen
