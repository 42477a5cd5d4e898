"""The pass alone: networks in 16 bits become float32, with their numbers, and what tells types apart stays."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qgraph import graph, narrowing, passes
from qgraph.widened import Widened

HALF, BF16, FLOAT = ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.FLOAT


def checked(model):
    """`model`, whose types fit together by ONNX's own checker, with weights as they would be written."""
    proto = ir.to_proto(narrowing.narrowed(model))
    onnx.checker.check_model(proto, full_check=True)
    return model


def converted(model, **options):
    """(the model as it was, it in float32, the pass)."""
    before = model.clone()
    one = passes.ToFloat(**options)
    one(model)
    return before, checked(model), one


def halves_in(model):
    """Names of the values in 16 bits, those of bodies included."""
    found = []
    for one in graph.all_graphs(model.graph):
        values = (*one.inputs, *one.initializers.values(), *(v for node in one for v in node.outputs))
        found += [v.name for v in values if v.type is not None and v.type.dtype in (HALF, BF16)]
    return sorted(set(found))


def half(array):
    return np.asarray(array, np.float16)


def test_all_of_a_network(mlp, kinds, model_kit):
    before, model, one = converted(mlp(model_kit))
    assert model_kit.ops(model) == ["Cast", "Gemm", "Relu", "MatMul", "Cast"]
    assert kinds(model) == {"x": HALF, "y": HALF}
    assert halves_in(model) == ["x", "y"]
    assert one.refused == {}
    assert "computes in float16" in one.notes[0]
    # Weights keep their names; large ones are views, and exact.
    assert isinstance(model.graph.initializers["A"].const_value, Widened)
    for name, array in model_kit.tensors(before).items():
        assert np.array_equal(model_kit.tensors(model)[name], array.astype(np.float32))
    # The runtime computes the original in float32, too, so that only the outputs are rounded.
    model_kit.same(before, model, model_kit.feeds(before, 4), tolerance=1e-3)
    # There is nothing left to do.
    again = passes.ToFloat()
    assert not again(model.clone()).modified or halves_in(model) == ["x", "y"]


def test_models_in_float32_are_not_touched(model_kit):
    model = model_kit.text("g (float[2] x) => (float[2] y) { y = Relu (x) }")
    one = passes.ToFloat()
    assert not one(model).modified
    assert one.notes == ()
    assert not passes.NarrowWeights()(model).modified
    assert not passes.DropCasts()(model).modified


def test_mixed_models_lose_the_casts_between(kinds, model_kit):
    """As exporters write them: a normalization in float32 amid float16."""
    text = """g (float16[2, 32] x, float[2, 32] z) => (float16[2, 32] y, float[2, 32] w, float[2, 1] e) {
        f = Cast <to = 1> (x)  e = ReduceMean <keepdims = 1> (f, axes)  c = Sub (f, e)  h = Cast <to = 10> (c)
        p = MatMul (h, A)  q = Cast <to = 1> (p)  w = Add (q, z)  y = Cast <to = 10> (w) }"""
    model = model_kit.text(text, A=half(model_kit.normal(32, 32) / 6), axes=np.array([1]))
    before, model, _ = converted(model)
    assert model_kit.ops(model) == ["Cast", "ReduceMean", "Sub", "MatMul", "Add", "Cast"]
    assert kinds(model) == kinds(before)
    model_kit.same(before, model, tolerance=1e-3)


def test_an_output_that_is_another_value_too(kinds, model_kit):
    """Inputs that go straight out, an output that is read on, and one that only a Cast made."""
    text = """g (float16[2, 4] x, float[2, 4] u) => (float16[2, 4] x, float16[2, 4] y, float[2, 4] z, float16[2, 4] k) {
        y = Mul (x, x)  z = Cast <to = 1> (y)  k = Cast <to = 10> (u) }"""
    before, model, _ = converted(model_kit.text(text))
    assert kinds(model) == kinds(before)
    model_kit.same(before, model, tolerance=1e-3)


def test_bodies_of_if_loop_and_scan(model_kit):
    text = """g (float16[3] x, bool c, int64 trips) => (float16[3] y, float16[k, 3] all, float16[3] last) {
        h = If (c) <
            then_branch = one () => (float16[3] a) {
                k = Constant <value = float[3] {0.5, 1.5, 2.5}> ()  l = Cast <to = 10> (k)  a = Mul (x, l) },
            else_branch = two () => (float16[3] d) { d = Erf (x) }
        >
        y, all = Loop (trips, yes, h) <body = step (int64 i, bool on, float16[3] v)
            => (bool go, float16[3] w, float16[3] o) {
            go = Identity (on)  w = Add (v, x)  o = Mul (v, v) }>
        last, sums = Scan <num_scan_inputs = 1, body = add (float16[3] s, float16[3] t)
            => (float16[3] n, float16[3] r) {
            n = Add (s, t)  r = Cast <to = 10> (n) }> (x, all)
    }"""
    before, model, one = converted(model_kit.text(text, yes=np.array(True)))
    assert one.refused == {}
    assert halves_in(model) == ["all", "last", "x", "y"]
    for c in (True, False):
        feed = {"x": half([0.25, -1, 3]), "c": np.array(c), "trips": np.array(3)}
        model_kit.same(before, model, [feed], tolerance=2e-3)


def test_functions_are_inlined(model_kit):
    text = """<ir_version: 10, opset_import: ["" : 21, "own" : 1]>
        g (float16[2, 4] x) => (float16[2, 4] y) { h = own.twice (x)  y = Relu (h) }
        <opset_import: ["" : 21], domain: "own"> twice (a) => (b) { b = Add (a, a) }"""
    before, model, one = converted(model_kit.text(text))
    assert one.refused == {} and not model.functions
    assert model_kit.ops(model) == ["Cast", "Add", "Relu", "Cast"]
    model_kit.same(before, model, tolerance=1e-3)


def test_attributes_that_name_a_type(model_kit):
    text = """g (float16[2, 3] x, int64[2] s, int64 n) => (float16[2, 3] y, float16[m] r, float16[2, 3] d) {
        z = ConstantOfShape <value = float[1] {0.5}> (s)  i = Shape (x)  f = Cast <to = 10> (i)
        t = Slice (f, a, b)  u = Mul (x, t)  y = Add (u, z)  r = Cast <to = 10> (n1)  n1 = Unsqueeze (n, a)
        e = EyeLike <dtype = 10> (x)  d = Add (e, x) }""".replace(
        "r = Cast <to = 10> (n1)  n1 = Unsqueeze (n, a)", "n1 = Unsqueeze (n, a)  r = Cast <to = 10> (n1)"
    )
    model = model_kit.text(text, a=np.array([0]), b=np.array([1]))
    # The text form has no numbers in float16.
    filler = next(node for node in model.graph if node.op_type == "ConstantOfShape")
    filler.attributes.add(ir.AttrTensor("value", ir.Tensor(half([0.5]))))
    before, model, one = converted(model)
    assert one.refused == {}
    assert halves_in(model) == ["d", "r", "x", "y"]
    feed = {"x": half(model_kit.normal(2, 3)), "s": np.array([2, 3]), "n": np.array(7)}
    # The runtime has no EyeLike in float16 that it would not compute the same.
    model_kit.same(before, model, [feed], tolerance=2e-3)


def test_random_operators_change_type(model_kit):
    text = """g (float16[2, 3] x) => (float16[2, 3] y) {
        a = RandomNormal <dtype = 10, shape = [2, 3]> ()  b = RandomUniformLike (x)  c = Add (a, b)  y = Mul (c, x) }"""
    _, model, one = converted(model_kit.text(text))
    assert one.refused == {} and halves_in(model) == ["x", "y"]
    found = model_kit.run(model, {"x": half(np.ones((2, 3)))})["y"]
    assert found.dtype == np.float16 and np.isfinite(found).all()


def test_sequences(model_kit):
    text = """g (float16[2, 4] x) => (float16[2, 4] y) {
        s = SplitToSequence <axis = 1> (x, two)  e = SequenceAt (s, one)  q = SequenceInsert (s, e)
        c = ConcatFromSequence <axis = 1> (q)  y = Slice (c, a, b, i) }"""
    constants = {"two": np.array(2), "one": np.array(1), "a": np.array([2]), "b": np.array([6]), "i": np.array([1])}
    before, model, one = converted(model_kit.text(text, **constants))
    assert one.refused == {} and halves_in(model) == ["x", "y"]
    model_kit.same(before, model, tolerance=1e-3)


def test_sequences_at_the_ends_stay(model_kit):
    text = "g (float16[2, 4] x) => (seq(float16[2, 2]) y) { y = SplitToSequence <axis = 1> (x, two) }"
    model = model_kit.text(text, two=np.array(2))
    one = passes.ToFloat()
    assert not one(model).modified
    assert one.refused == {"g": "'y' holds several tensors of that type"}
    assert "not brought to float32" in one.notes[0]


def test_initializers_that_are_inputs_too(kinds, model_kit):
    """A caller may override them, in the type that they had."""
    text = "g (float16[2, 32] x, float16[32, 32] A) => (float16[2, 32] y) { y = MatMul (x, A) }"
    model = model_kit.text(text, A=half(model_kit.normal(32, 32) / 6))
    before, model, _ = converted(model)
    assert kinds(model) == kinds(before)
    assert model.graph.initializers["A"].const_value.dtype == HALF
    x = half(model_kit.normal(2, 32))
    for feed in ({"x": x}, {"x": x, "A": half(np.eye(32))}):
        model_kit.same(before, model, [feed], tolerance=1e-3)


def test_shared_weights_stay_shared(model_kit):
    text = """g (int64[2, n] i) => (float16[2, n, 40] y) {
        x = Gather (T, i)  t = Transpose <perm = [1, 0]> (T)  y = MatMul (x, t) }"""
    model = model_kit.text(text, T=half(model_kit.normal(40, 32) / 6))
    before, model, _ = converted(model)
    assert len(model.graph.initializers) == 1
    passes.NarrowWeights()(model)
    assert sorted(model_kit.ops(model)) == ["Cast", "Cast", "Gather", "MatMul", "Transpose"]
    assert {v.const_value.dtype for v in model.graph.initializers.values()} == {HALF}
    model_kit.same(before, model, tolerance=1e-3)


def test_what_tells_the_types_apart_stays(model_kit):
    """65504 is the end of float16: a number beyond is infinite to IsInf there, and would not be in float32."""
    text = "g (float16[4] x) => (bool[4] y, float16[4] z) { s = Mul (x, x)  y = IsInf (s)  z = Sqrt (s) }"
    before, model, one = converted(model_kit.text(text))
    assert one.refused == {
        graph.label(n): "IsInf is about the numbers of float16" for n in model.graph if n.op_type == "IsInf"
    }
    feed = {"x": half([1, 200, 300, 1000])}
    assert model_kit.run(model, feed)["y"].tolist() == [False, False, True, True]
    assert np.array_equal(model_kit.run(before, feed)["y"], model_kit.run(model, feed)["y"])


def test_masks_stay_masks(model_kit):
    text = """g (float16[2, 4, 4] x, bool[2, 1, 4] m) => (float16[2, 4, 4] y) {
        s = Where (m, zero, low)  k = Add (x, s)  y = Softmax (k) }"""
    model = model_kit.text(text, zero=half(0), low=half(-65504))
    before, model, _ = converted(model)
    feed = {"x": half(model_kit.normal(2, 4, 4)), "m": np.array([[[True, False, True, True]], [[False] * 4]])}
    found = model_kit.run(model, feed)["y"]
    assert np.isfinite(found).all()
    assert (found[0, :, 1] == 0).all()
    model_kit.same(before, model, [feed], tolerance=1e-3)


def test_operators_of_unknown_domains_stay(model_kit):
    text = """<ir_version: 10, opset_import: ["" : 21, "other" : 1]>
        g (float16[2, 4] x) => (float16[2, 4] y) <float16[2, 4] h> {
            r = Relu (x)  h = other.Thing (r)  y = Relu (h) }"""
    model = model_kit.text(text)
    one = passes.ToFloat()
    one(model)
    assert list(one.refused.values()) == ["it is not known whether other.Thing takes float32"]
    assert model_kit.ops(model) == ["Cast", "Relu", "Cast", "Thing", "Cast", "Relu", "Cast"]
    thing = next(node for node in model.graph if node.op_type == "Thing")
    assert thing.inputs[0].dtype == thing.outputs[0].dtype == HALF


def test_the_runtimes_own_operators(model_kit):
    text = """<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
        g (float16[2, 3, 16] x) => (float16[2, 3, 16] y) {
            h, a, b, s = com.microsoft.SkipSimplifiedLayerNormalization (x, x, W)  g1 = com.microsoft.FastGelu (h)
            y = Add (g1, s) }"""
    model = model_kit.text(text, W=half(model_kit.normal(16)))
    node = next(iter(model.graph))
    node.outputs[1].name = node.outputs[2].name = ""
    before = model.clone()
    one = passes.ToFloat()
    one(model)
    assert one.refused == {} and halves_in(model) == ["x", "y"]
    model_kit.same(before, model, tolerance=2e-3)


APPEND = """g (float16[1, 2, p, 8] past, float16[1, 2, s, 8] x)
    => (float16[1, 2, t, 8] present, float16[1, 2, s, t] y) {
    k = Mul (x, x)  present = Concat <axis = 2> (past, k)  w = Transpose <perm = [0, 1, 3, 2]> (present)
    y = MatMul (x, w)  z = Shape (past) }"""


@pytest.mark.parametrize("caches", [True, False])
def test_caches_are_appended_to_as_they_are(model_kit, caches):
    before, model, one = converted(model_kit.text(APPEND), caches=caches)
    feed = {"past": half(model_kit.normal(1, 2, 5, 8)), "x": half(model_kit.normal(1, 2, 3, 8))}
    model_kit.same(before, model, [feed], tolerance=2e-3)
    concat = next(node for node in model.graph if node.op_type == "Concat")
    assert list(one.refused.values()) == ["it appends to a cache that the caller holds in float16"] * caches
    assert concat.outputs[0].dtype == (HALF if caches else FLOAT)
    if caches:
        # What was there before goes through bit by bit, and so does the model's own number.
        found = model_kit.run(model, feed)["present"]
        assert np.array_equal(found, model_kit.run(before, feed)["present"])
    shape = next((node for node in model.graph if node.op_type == "Shape"), None)
    assert shape is None or shape.inputs[0].name == "past", "no cache is widened to look at its shape"
