"""Streams: at every cut the values are those of the whole model and of its whole quantized twin."""

import numpy as np
import onnx_ir as ir
import pytest

from qgraph.data import inputs_of, load
from qgraph.session import Session, SessionOptions
from qgraph.streams import Streams

TEXT = """
g (float[n, 4] x, bool c) => (float[n, 4] y) {
    a = MatMul (x, W)
    b = Relu (a)
    s = Shape (x)
    d = MatMul (b, V)
    e = Add (d, x)
    f = If (c) <
        then_branch = t () => (float[n, 4] t1) { t1 = Add (e, b) },
        else_branch = u () => (float[n, 4] u1) { u1 = Identity (e) }
    >
    h = Reshape (f, s)
    y = MatMul (h, W)
}
"""


def doubled(model):
    """Every product's weight is twice as large: what a quantized stretch is in these tests."""
    main = model.graph
    for node in [n for n in main if n.op_type == "MatMul"]:
        twice = node.outputs[0]
        add = ir.Node("", "Add", [twice, twice])
        new = add.outputs[0]
        new.name, new.type, new.shape = twice.name, twice.type, twice.shape
        twice.name = f"{twice.name}_once"
        twice.replace_all_uses_with(new, replace_graph_outputs=True)
        add.replace_input_with(0, twice)
        add.replace_input_with(1, twice)
        main.insert_after(node, add)


@pytest.fixture
def streams(model_kit, tmp_path):
    model = model_kit.text(TEXT, W=model_kit.normal(4, 4), V=model_kit.normal(4, 4, seed=1))
    feeds = [{"x": model_kit.normal(2 + i, 4, seed=i), "c": np.array(i % 2 == 0)} for i in range(3)]
    data = load(feeds, inputs_of(model))
    with Streams(model, data, lambda n: n.op_type == "MatMul", doubled, scratch=tmp_path) as made:
        yield model, feeds, made


def whole(model, feeds, name):
    """The value in the whole model, run at once."""
    copy = model.clone()
    value = next(v for node in copy.graph for v in node.outputs if v.name == name)
    copy.graph.outputs.clear()
    copy.graph.outputs.append(value)
    with Session(copy, SessionOptions()) as session:
        return [session.run({k: feed[k] for k in feed})[name] for feed in feeds]


def test_both_streams_hold_what_whole_runs_give(model_kit, streams):
    model, feeds, made = streams
    twin = model.clone()
    doubled(twin)
    nodes = list(model.graph)
    for stop, name in ((2, "b"), (5, "e"), (7, "h")):
        made.advance(stop)
        value = next(v for node in nodes for v in node.outputs if v.name == name)
        assert made.differs(value)
        expected = zip(whole(model, feeds, name), whole(twin, feeds, name), strict=True)
        for (own, other), (first, second) in zip(made.pairs(value), expected, strict=True):
            np.testing.assert_allclose(own, first, rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(other, second, rtol=1e-5, atol=1e-5)


def test_what_no_quantized_node_has_touched_is_kept_once(streams, tmp_path):
    model, feeds, made = streams
    made.advance(3)
    x = model.graph.inputs[0]
    shape = next(n for n in model.graph if n.op_type == "Shape").outputs[0]
    assert not made.differs(x)
    assert not made.differs(shape)
    for (own, other), feed in zip(made.pairs(shape), feeds, strict=True):
        assert own is other
        assert own.tolist() == list(feed["x"].shape)


def test_what_is_dead_leaves_the_disk(streams, tmp_path):
    _, _, made = streams
    folder = next(tmp_path.iterdir())
    made.advance(2)
    before = len(list(folder.iterdir()))
    made.advance(7)
    assert before == 4  # x, c, and b twice
    assert len(list(folder.iterdir())) == 2  # h twice
    made.close()
    assert not list(tmp_path.iterdir())


def test_hidden_rows_are_left_out(model_kit):
    model = model_kit.text(
        "g (float[b, s, 4] x, int64[b, s] attention_mask) => (float[b, s, 4] y) { a = Relu (x) y = MatMul (a, W) }",
        W=model_kit.normal(4, 4),
    )
    mask = np.array([[1, 1, 0], [1, 0, 0]])
    x = model_kit.normal(2, 3, 4)
    data = load([{"x": x, "attention_mask": mask}], inputs_of(model))
    with Streams(model, data, lambda n: False, lambda m: None) as made:
        made.advance(1)
        own, other = next(made.pairs(next(iter(model.graph)).outputs[0]))
        assert own is other
        np.testing.assert_array_equal(own, np.maximum(x, 0)[mask.astype(bool)])


def test_what_a_router_sends_elsewhere_is_not_compared(model_kit, tmp_path):
    """Rows that are picked by what is computed differ in number and order between the streams, until put back."""
    text = """
    g (float[n, 4] x, int64[k] order) => (float[n, 4] y) {
        a = MatMul (x, W)
        same = Gather (a, order)
        size = Shape (a)
        whole = Slice (a, zero, size)
        left, right = Split <axis = 1> (a, widths)
        large = Greater (a, limit)
        places = NonZero (large)
        row = Gather <axis = 0> (places, first)
        some = Gather (a, row)
        b = Relu (some)
        wide = Unsqueeze (row, one)
        back = ScatterND (x, wide, b)
        y = Add (back, whole)
    }
    """
    ints = {"zero": [0, 0], "widths": [1, 3], "one": [1]}
    model = model_kit.text(
        text, W=model_kit.normal(4, 4), limit=np.float32(0.5), first=np.array(0),
        **{name: np.array(numbers) for name, numbers in ints.items()},
    )  # fmt: skip
    data = load([{"x": model_kit.normal(6, 4), "order": np.array([2, 0])}], inputs_of(model))
    values = {v.name: v for node in model.graph for v in node.outputs}
    with Streams(model, data, lambda n: n.op_type == "MatMul", doubled, scratch=tmp_path) as made:
        assert {name for name, value in values.items() if not made.aligned(value)} == {"some", "b"}
        made.advance(len(model.graph) - 1)
        ((own, other),) = made.pairs(values["back"])
        assert own.shape == other.shape
