"""FoldShapes: shape arithmetic that cannot differ between runs becomes constant; what can differ stays."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qgraph.passes.canonicalize import Canonicalize
from qgraph.passes.fold_shapes import FoldShapes


def shapes(model):
    """The constant shapes of the Reshape nodes, None where one is computed."""
    found = [node.inputs[1].const_value for node in model.graph if node.op_type == "Reshape"]
    return [None if tensor is None else tensor.numpy().tolist() for tensor in found]


@pytest.fixture
def folded(model_kit):
    """Applies the pass to a copy and checks the numbers at several sizes."""

    def apply(model, sizes=((2, 3), (1, 5))):
        after = model.clone()
        Canonicalize(21)(after)
        FoldShapes()(after)
        feeds = []
        for n, s in sizes:
            free = {"N": n, "S": s}
            feeds.append(
                {v.name: model_kit.normal(*(free.get(str(d), d) for d in v.shape)) for v in model.graph.inputs}
            )
        model_kit.same(model, after, feeds)
        return after

    return apply


DIM = {"zero": np.array(0), "one": np.array(1), "at": np.array([0])}
HEADS = """g (float[N, S, 8] x) => (float[N, S, 2, 4] y) {
    s = Shape (x)  n0 = Gather (s, zero)  s0 = Gather (s, one)  n = Unsqueeze (n0, at)  l = Unsqueeze (s0, at)
    shape = Concat <axis = 0> (n, l, heads, size)  y = Reshape (x, shape)
}"""


@pytest.mark.parametrize("heads, size", [(2, 4), (-1, 4), (2, -1)])
def test_heads_of_a_dynamic_batch(model_kit, folded, heads, size):
    after = folded(model_kit.text(HEADS, **DIM, heads=np.array([heads]), size=np.array([size])))
    assert model_kit.ops(after) == ["Reshape"]
    assert shapes(after) == [[0, 0, 2, 4]]


def test_dimensions_of_another_value_of_the_same_symbols(model_kit, folded):
    model = model_kit.text(
        """g (float[N, S, 8] x, float[N, S] z) => (float[N, S, 2, 4] y) {
            n = Shape <start = 0, end = 1> (z)  l = Shape <start = 1> (z)
            shape = Concat <axis = 0> (n, l, rest)  y = Reshape <allowzero = 1> (x, shape)
        }""",
        rest=np.array([-1, 4]),
    )
    after = folded(model)
    assert model_kit.ops(after) == ["Reshape"]
    assert shapes(after) == [[0, 0, 2, 4]]
    assert "allowzero" not in after.graph[0].attributes


def test_two_dimensions_that_move_stay(model_kit, folded):
    model = model_kit.text(
        """g (float[N, S, 8] x) => (float[S, N, 8] y) {
            n = Shape <start = 0, end = 1> (x)  l = Shape <start = 1, end = 2> (x)
            shape = Concat <axis = 0> (l, n, rest)  y = Reshape (x, shape)
        }""",
        rest=np.array([8]),
    )
    assert shapes(folded(model)) == [None]


def test_one_dimension_that_moves_is_inferred(model_kit, folded):
    model = model_kit.text(
        """g (float[2, S, 8] x) => (float[S, 16] y) {
            l = Shape <start = 1, end = 2> (x)  shape = Concat <axis = 0> (l, rest)  y = Reshape (x, shape)
        }""",
        rest=np.array([16]),
    )
    assert shapes(folded(model)) == [[-1, 16]]


TORCH = """g (float[N, S, 4] x) => (float[N, 3, S, 4] y) {{
    u = Unsqueeze (x, one)  n = Shape <start = 0, end = 1> (x)  l = Shape <start = 1, end = 2> (x)
    dims = Concat <axis = 0> ({first}, three, l, four)
    filled = ConstantOfShape <value = int64[1] {{1}}> (rank)  minus = Mul (filled, sign)
    same = Equal (dims, minus)  shape = Where (same, filled, dims)  y = Expand (u, shape)
}}"""
EXPANDED = {"one": np.array([1]), "three": np.array([3]), "four": np.array([4]), "rank": np.array([4])}


def test_torchs_choice_of_dimensions_is_none(model_kit, folded):
    after = folded(model_kit.text(TORCH.format(first="n"), **EXPANDED, sign=np.array(-1)))
    assert model_kit.ops(after) == ["Unsqueeze", "Shape", "Shape", "Concat", "Expand"]


def test_where_the_choice_is_a_constant_it_is_made(model_kit, folded):
    more = {"sign": np.array(-1), "any": np.array([-1])}
    after = folded(model_kit.text(TORCH.format(first="any"), **EXPANDED, **more), sizes=((2, 3),))
    assert not {"Where", "Equal"} & set(model_kit.ops(after))


def test_a_choice_that_is_one_stays(model_kit, folded):
    text = TORCH.format(first="n")
    after = folded(model_kit.text(text, **EXPANDED, sign=np.array(-3)))
    assert "Where" in model_kit.ops(after)


def test_a_shape_that_is_an_output_is_kept(model_kit):
    model = model_kit.text(
        """g (float[N, 8] x) => (float[N, 2, 4] y, int64[3] shape) {
            n = Shape <start = 0, end = 1> (x)  shape = Concat <axis = 0> (n, rest)  y = Reshape (x, shape)
        }""",
        rest=np.array([2, 4]),
    )
    after = model.clone()
    FoldShapes()(after)
    model_kit.same(model, after, [{"x": model_kit.normal(3, 8)}])


def test_nothing_to_do(model_kit):
    model = model_kit.text("g (float[N, 8] x) => (float[N, 8] y) { y = Relu (x) }")
    assert not FoldShapes()(model).modified


@settings(max_examples=30)
@given(
    dims=st.lists(st.sampled_from(["N", "S", 2, 3, 4]), min_size=1, max_size=4, unique=True),
    order=st.randoms(use_true_random=False),
    n=st.integers(1, 3),
    s=st.integers(1, 3),
)
def test_any_reshape_to_permuted_dimensions(model_kit, dims, order, n, s):
    """Whatever is folded, the numbers and shapes of all runs stay."""
    target = list(range(len(dims)))
    order.shuffle(target)
    parts = "  ".join(f"d{i} = Shape <start = {i}, end = {i + 1}> (x)" for i in range(len(dims)))
    listed = ", ".join(f"d{i}" for i in target)
    model = model_kit.text(
        f"""g (float[{", ".join(map(str, dims))}] x) => (float[{", ".join(str(dims[i]) for i in target)}] y) {{
            {parts}  shape = Concat <axis = 0> ({listed})  y = Reshape (x, shape)
        }}"""
    )
    after = model.clone()
    Canonicalize(21)(after)
    FoldShapes()(after)
    sizes = {"N": n, "S": s}
    model_kit.same(model, after, [{"x": model_kit.normal(*(sizes.get(d, d) for d in dims))}])


def test_the_static_part_of_a_shape(model_kit, folded):
    """A causal mask as torch's exporter writes it, whose size is static while the batch is not."""
    model = model_kit.text(
        """g (float[N, 2, 3, 4] x) => (float[N, 2, 3, 4] y, float[3, 3] mask) {
            s = Shape (x)  row = Slice (s, two, three)  column = Gather (s, index)
            size = Concat <axis = 0> (row, column)  mask = Expand (number, size)  y = Relu (x)
        }""",
        two=np.array([-2]),
        three=np.array([-1]),
        index=np.array([2]),
        number=np.array(-1, np.float32),
    )
    after = folded(model)
    assert not {"Shape", "Slice", "Gather", "Concat"} & set(model_kit.ops(after))


def test_names_that_an_inference_does_not_find(model_kit, folded):
    """A Reshape that leaves one name, a count up to a dimension, a broadcast that -1 leaves alone: all of the input."""
    model = model_kit.text(
        """g (float[N, S, 4] x) => (float[N, S, 4] y, float[N, S] z) {
            s = Shape (x)  n0 = Gather (s, zero)  s0 = Gather (s, one)  n = Unsqueeze (n0, at)
            count = Range (zero, s0, one)  f = Cast <to = 1> (count)
            want = Concat <axis = 0> (n, any)  free = Equal (want, none)  size = Where (free, ones, want)
            z = Expand (f, size)  column = Unsqueeze (z, last)
            r = Reshape (x, target)  sum = Add (r, column)  y = Relu (sum)
        }""",
        **DIM,
        any=np.array([-1]),
        none=np.array([-1, -1]),
        ones=np.array([1, 1]),
        last=np.array([2]),
        target=np.array([-1, 0, 4]),
    )
    after = folded(model)
    named = {node.op_type: [str(dim) for dim in node.outputs[0].shape] for node in after.graph}
    assert "Where" not in named and "Equal" not in named
    assert named["Range"] == ["S"] and named["Add"] == ["N", "S", "4"]


@pytest.mark.parametrize("start, step", [(1, 1), (0, 2)])
def test_a_count_of_others_is_not_named(model_kit, folded, start, step):
    model = model_kit.text(
        """g (float[N, S, 4] x) => (int64[A] y) {
            s = Shape (x)  s0 = Gather (s, one)  count = Range (start, s0, step)  y = Neg (count)
        }""",
        one=np.array(1),
        start=np.array(start),
        step=np.array(step),
    )
    [count] = [node for node in folded(model).graph if node.op_type == "Range"]
    assert str(count.outputs[0].shape[0]) != "S"


def test_a_choice_that_makes_more_numbers_stays(model_kit, folded):
    """Where repeats a vector of one number as often as there are ones."""
    model = model_kit.text(
        """g (float[N, S, 4] x) => (float[A, B] y) {
            s = Shape <start = 0, end = 1> (x)  free = Equal (s, none)  size = Where (free, ones, s)
            y = Expand (number, size)
        }""",
        none=np.array([-1]),
        ones=np.array([1, 1]),
        number=np.array(1, np.float32),
    )
    folded(model)


@pytest.mark.parametrize(
    "text",
    [
        "free = Equal (ids, none)  out = Where (free, one, ids)",
        "s = Shape (x)  m = Max (s, one)  free = Equal (m, none)  out = Where (free, one, m)",
        "c = Concat <axis = 1> (pair, pair)  free = Equal (c, none)  out = Where (free, one, c)",
    ],
)
def test_a_choice_of_other_numbers_stays(model_kit, text):
    """It is a choice of shapes only where it is one of sizes and of constants, in a row."""
    model = model_kit.text(
        f"g (float[N, S] x, int64[A, B] ids) => (int64[{'C' if 'Shape' in text else 'C, D'}] out) {{ {text} }}",
        none=np.array([-1]),
        one=np.array([1]),
        **({"pair": np.array([[2, -1]])} if "pair" in text else {}),
    )
    after = model.clone()
    Canonicalize(21)(after)
    FoldShapes()(after)
    given = {"x": model_kit.normal(2, 3), "ids": np.array([[4, -1, 2]])}
    model_kit.same(model, after, [given])


def test_a_target_that_a_caller_may_override_is_no_shape(model_kit):
    """Inference knows the default only."""
    model = model_kit.text(
        "g (float[2, 6] x, int64[2] target) => (float[A, B] y) { r = Reshape (x, target)  y = Softmax (r) }",
        target=np.array([3, 4]),
    )
    after = model.clone()
    Canonicalize(21)(after)
    FoldShapes()(after)
    reshape = next(node for node in after.graph if node.op_type == "Reshape")
    assert reshape.inputs[1].is_initializer() and reshape.outputs[0].shape[0] != 3
    model_kit.same(model, after, [{"x": model_kit.normal(2, 6), "target": np.array([4, 3])}])
