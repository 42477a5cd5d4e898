"""Models that compute in 16-bit floats: the graph in float32, numbers, what stays, weights in 16 bits, every scheme."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import qgraph
from qgraph import graph, modelio, narrowing, passes, registry, widened
from qgraph.data import inputs_of, load
from qgraph.pipeline import Context
from qgraph.session import Session, SessionOptions
from qgraph.strips import Strips
from qgraph.targets import FOLDED
from qgraph.widened import Widened

ROOT = Path(__file__).resolve().parent.parent
HALF, BF16, FLOAT = ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.FLOAT


def loaded(name):
    """A tool as a module."""
    spec = importlib.util.spec_from_file_location(f"to_float_{name}", ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def decoder():
    """The script that makes language models."""
    return loaded("decoder")


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


def kinds(model):
    return {value.name: value.dtype for value in (*model.graph.inputs, *model.graph.outputs)}


MLP = "g (float16[n, 32] x) => (float16[n, 32] y) { h = Gemm (x, A, b)  r = Relu (h)  y = MatMul (r, B) }"


def half(array):
    return np.asarray(array, np.float16)


def mlp(kit, **changes):
    numbers = {"A": kit.normal(32, 64) / 6, "b": kit.normal(64), "B": kit.normal(64, 32) / 8, **changes}
    return kit.text(MLP, **{name: half(array) for name, array in numbers.items()})


# -- the pass alone -------------------------------------------------------------------------------------------------


def test_all_of_a_network(model_kit):
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


def test_mixed_models_lose_the_casts_between(model_kit):
    """As exporters write them: a normalization in float32 amid float16."""
    text = """g (float16[2, 32] x, float[2, 32] z) => (float16[2, 32] y, float[2, 32] w, float[2, 1] e) {
        f = Cast <to = 1> (x)  e = ReduceMean <keepdims = 1> (f, axes)  c = Sub (f, e)  h = Cast <to = 10> (c)
        p = MatMul (h, A)  q = Cast <to = 1> (p)  w = Add (q, z)  y = Cast <to = 10> (w) }"""
    model = model_kit.text(text, A=half(model_kit.normal(32, 32) / 6), axes=np.array([1]))
    before, model, _ = converted(model)
    assert model_kit.ops(model) == ["Cast", "ReduceMean", "Sub", "MatMul", "Add", "Cast"]
    assert kinds(model) == kinds(before)
    model_kit.same(before, model, tolerance=1e-3)


def test_an_output_that_is_another_value_too(model_kit):
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


def test_initializers_that_are_inputs_too(model_kit):
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


# -- caches ---------------------------------------------------------------------------------------------------------

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


@pytest.mark.parametrize("style", ["plain", "fused"])
def test_decoders_step_by_step(decoder, tmp_path, style):
    """Logits and caches of a prompt and a step are those of the original, in its types."""
    path = decoder.write(tmp_path / "m.onnx", "tiny", style, "float16")
    context = Context(registry.target("cpu"), registry.target("cpu").scheme("fp32"), None, tmp_path)
    model = registry.pipeline("float")(context)(modelio.read(path)).model
    ir.save(model, tmp_path / "o.onnx")
    tokens = np.random.default_rng(0).integers(0, 512, (1, 7))
    found = []
    for one in (path, tmp_path / "o.onnx"):
        with Session(one, SessionOptions(threads=1)) as session:
            feeds = decoder.feeds("tiny", tokens, style, 0, "float16")
            first = session.run(feeds)
            second = session.run(decoder.next_feeds(feeds, first, np.array([[3]])))
            found.append({**first, **{f"second {name}": array for name, array in second.items()}})
    for name, array in found[0].items():
        assert found[1][name].dtype == array.dtype == np.float16
        assert np.abs(found[1][name].astype(np.float32) - array).max() < 0.01, name
    attention = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
    assert len(attention) == (2 if style == "fused" else 0)
    assert all(node.inputs[3].is_graph_input() for node in attention)


# -- weights --------------------------------------------------------------------------------------------------------


def external(array, kind, folder):
    (folder / "w.data").write_bytes(array.tobytes())
    return ir.ExternalTensor(
        "w.data", 0, array.nbytes, kind, shape=ir.Shape(array.shape), name="W", base_dir=str(folder)
    )


@pytest.mark.parametrize("kind", [HALF, BF16])
def test_weights_are_views(tmp_path, kind):
    array = np.random.default_rng(0).standard_normal((70, 33)).astype(kind.numpy())
    tensor = widened.widened(external(array, kind, tmp_path))
    assert isinstance(tensor, Widened)
    assert tensor.dtype == FLOAT and tensor.nbytes == 4 * array.size
    assert np.array_equal(tensor.numpy(), array.astype(np.float32))
    for rows in (slice(None), slice(3, 9), slice(60, 99)):
        assert np.array_equal(Strips(tensor).window(rows, slice(2, 20)), array[rows, 2:20].astype(np.float32))
    assert not isinstance(widened.widened(ir.Tensor(array[0], dtype=kind)), Widened)


def test_what_stays_float_is_stored_as_it_was(model_kit, tmp_path):
    """Behind a Cast that the runtime folds."""
    context = Context(registry.target("cpu"), registry.target("cpu").scheme("fp32"), None)
    before = mlp(model_kit)
    model = registry.pipeline("float")(context)(before.clone()).model
    stored = {name: v.const_value for name, v in model.graph.initializers.items() if v.const_value.size > 100}
    assert sorted(stored) == ["A_float16", "B_float16"]
    assert {tensor.dtype for tensor in stored.values()} == {HALF}
    assert len([node for node in model.graph if FOLDED in node.meta]) == 2
    with Session(model, SessionOptions(optimized=tmp_path / "o.onnx")):
        pass
    optimized = ir.load(tmp_path / "o.onnx")
    assert [node.op_type for node in optimized.graph if node.op_type == "Cast"] == ["Cast", "Cast"], "of x and of y"
    model_kit.same(before, model, tolerance=1e-3)


def test_models_in_memory_share_their_tensors(model_kit):
    """The original keeps its names and types, however often it is narrowed."""
    before = mlp(model_kit)
    for _ in range(2):
        model = before.clone()
        passes.ToFloat()(model)
        twin = narrowing.narrowed(model)
        assert twin is not model and "A_float16" in twin.graph.initializers
        assert isinstance(model.graph.initializers["A"].const_value, Widened)
        assert before.graph.initializers["A"].const_value.name == "A"
    model_kit.run(before, model_kit.feeds(before, 1)[0])


def test_views_are_spilled_as_what_they_are(model_kit, tmp_path, monkeypatch):
    monkeypatch.setattr(modelio, "_SPILL_BYTES", 1000)
    model = mlp(model_kit, A=model_kit.normal(32, 64))
    before = model.clone()
    passes.ToFloat()(model)
    with modelio.Workspace() as workspace:
        folder = workspace.spill(model)
        tensor = model.graph.initializers["A"].const_value
        assert isinstance(tensor, Widened)
        assert isinstance(tensor.source, ir.ExternalTensor) and tensor.source.dtype == HALF
        assert (folder / "weights.data").stat().st_size < 12_000
        with Session(model, SessionOptions(threads=1), folder) as session:
            feed = model_kit.feeds(before, 1)[0]
            np.testing.assert_allclose(session.run(feed)["y"], model_kit.run(before, feed)["y"], atol=5e-3)


# -- whole compilations ---------------------------------------------------------------------------------------------

SCHEMES = [
    "fp32", "auto", "int8", "int8-dynamic", "int8-weights", "int4", "int2", "ternary-blocks", "weights", "fp16", "bf16",
    "fp8", "nf4",
]  # fmt: skip


@pytest.mark.usefixtures("model_free_cpu")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme(decoder, tmp_path, scheme):
    """In float16 the same layers are quantized as in float32, with the same loss; none is refused for its type."""
    shape = decoder.Decoder(1, 128, 4, 2, 256, 300, tied=True, bias=True)
    options = {"scheme": scheme, "bench_seconds": 0, "force": True, "time_limit": 1}
    if scheme in ("auto", "int8", "int8-dynamic"):
        options["data"] = [{"input_ids": row} for row in np.random.default_rng(1).integers(0, 300, (4, 1, 6))]
    reports = {}
    for dtype in ("float32", "float16"):
        path = decoder.write(tmp_path / f"{dtype}.onnx", shape, "plain", dtype)
        reports[dtype] = qgraph.optimize(path, tmp_path / "o.onnx", **options).report
        written = ir.load(tmp_path / "o.onnx")
        assert kinds(written) == kinds(ir.load(path))
        assert modelio.size_on_disk(tmp_path / "o.onnx") < 1.2 * modelio.size_on_disk(path)
    single, halved = reports.values()
    # What appends to the caches stays in float16.
    kernels = [
        sorted((node.name, node.scheme) for node in report.quantized if node.name.endswith("/MatMul"))
        for report in (single, halved)
    ]
    assert kernels[0] == kernels[1]
    assert bool(kernels[0]) == (scheme != "fp32")
    assert not [node for node in halved.refused if "float16" in node.reason and node.op_type not in ("Concat", "Cast")]
    assert any("computes in float16" in note for note in halved.notes)
    before, after = (report.fidelity.outputs["logits"].sqnr for report in (single, halved))
    # Caches and logits are rounded to float16 in both halved models.
    assert after > min(before, 50) - 1.5


@pytest.mark.usefixtures("model_free_cpu")
@pytest.mark.parametrize("check", ["whole", "parts", "none"])
def test_the_same_codes_as_from_float32(decoder, tmp_path, check):
    """Of the same numbers: weights that float16 holds exactly."""
    shape = decoder.Decoder(1, 128, 4, 2, 256, 300, tied=True, bias=True)
    model = decoder.build(shape, "plain", "float16")
    ir.save(model, tmp_path / "half.onnx")
    wide = modelio.read(tmp_path / "half.onnx")
    passes.ToFloat(caches=False)(wide)
    for value in wide.graph.initializers.values():
        value.const_value = ir.Tensor(np.array(value.const_value.numpy()), name=value.name)
    ir.save(wide, tmp_path / "single.onnx")
    codes = []
    for name in ("half", "single"):
        options = {"scheme": "int4", "block_size": 32, "check": check, "bench_seconds": 0.0, "force": check == "whole"}
        qgraph.optimize(tmp_path / f"{name}.onnx", tmp_path / f"{name}-int4.onnx", **options)
        written = ir.load(tmp_path / f"{name}-int4.onnx")
        nodes = [node for node in written.graph if node.op_type == "MatMulNBits"]
        codes.append({node.name: node.inputs[1].const_value.numpy() for node in nodes})
    assert codes[0].keys() == codes[1].keys() and len(codes[0]) == 5
    for name, array in codes[0].items():
        assert np.array_equal(array, codes[1][name]), name


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_caches_in_integers(decoder, tmp_path, bits):
    """They take the place of those in float16 at both ends."""
    path = decoder.write(tmp_path / "m.onnx", "tiny", "fused", "float16")
    tokens = np.random.default_rng(1).integers(0, 512, (4, 6))
    data = [{"input_ids": row[None]} for row in tokens]
    options = {"scheme": "fp32", "kv_cache": bits, "bench_seconds": 0, "force": True}
    report = qgraph.optimize(path, tmp_path / "o.onnx", data=data, **options).report
    written = ir.load(tmp_path / "o.onnx")
    expected = ir.DataType.INT8 if bits == "int8" else ir.DataType.UINT8
    assert {kind for name, kind in kinds(written).items() if "past" in name or "present" in name} == {expected}
    assert kinds(written)["logits"] == HALF
    single = decoder.write(tmp_path / "single.onnx", "tiny", "fused")
    wanted = qgraph.optimize(single, tmp_path / "s.onnx", data=data, **options).report
    assert abs(report.fidelity.outputs["logits"].sqnr - wanted.fidelity.outputs["logits"].sqnr) < 1


@pytest.mark.parametrize("target", ["cuda", "webgpu"])
@pytest.mark.parametrize("scheme", ["fp16", "int4"])
@pytest.mark.parametrize("style", ["plain", "fused"])
def test_targets_that_compute_in_halves(decoder, model_kit, tmp_path, target, scheme, style):
    """All is in float16 again, with no Cast between, and the numbers are those of the original."""
    shape = decoder.Decoder(1, 128, 4, 2, 256, 300, tied=True, bias=True)
    path = decoder.write(tmp_path / "m.onnx", shape, style, "float16")
    where = registry.target(target)
    tokens = np.random.default_rng(1).integers(0, 300, (4, 6))
    feeds = [decoder.feeds(shape, row[None], style, 0, "float16") for row in tokens]
    before = modelio.read(path)
    data = load(feeds, inputs_of(before))
    model = registry.pipeline("quantize")(Context(where, where.scheme(scheme), data, tmp_path))(before.clone()).model
    assert kinds(model) == kinds(before)
    large = [v for v in model.graph.initializers.values() if v.const_value.size >= 1024]
    assert large and not [v.name for v in large if v.dtype == FLOAT]
    attention = [node for node in model.graph if node.op_type in ("MatMul", "GroupQueryAttention", "MatMulNBits")]
    assert {node.outputs[0].dtype for node in attention} == {HALF}
    # From integers, and around what has no float16 form; none at a cache.
    ends = [node for node in model.graph if node.op_type == "Cast" and node.inputs[0].is_graph_input()]
    assert not [node for node in ends if "past" in node.inputs[0].name]
    if scheme == "int4":
        assert "MatMulNBits" in model_kit.ops(model)
    with Session(before, SessionOptions(threads=1), tmp_path) as first:
        wanted = first.run(feeds[0])
    with Session(model, SessionOptions(threads=1), tmp_path) as second:
        found = second.run(feeds[0])
    error = np.abs(found["logits"].astype(np.float32) - wanted["logits"]).max()
    assert error < (0.02 if scheme == "fp16" else 0.5) * np.abs(wanted["logits"]).max()


def test_a_gpu_keeps_the_float_graph_in_halves(decoder, tmp_path):
    """Scheme fp32 quantizes nothing: what computed in float16 there goes on to do so."""
    path = decoder.write(tmp_path / "m.onnx", "tiny", "fused", "float16")
    where = registry.target("cuda")
    model = registry.pipeline("float")(Context(where, where.scheme("fp32"), None, tmp_path))(modelio.read(path)).model
    assert {node.outputs[0].dtype for node in model.graph if node.op_type == "MatMul"} == {HALF}


# -- bfloat16 -------------------------------------------------------------------------------------------------------


def brain(decoder, path, style="plain"):
    """A tiny decoder in bfloat16, its ends too."""
    model = decoder.build("tiny", style, "bfloat16")
    ir.save(model, path)
    return path


@pytest.mark.usefixtures("model_free_cpu")
@pytest.mark.parametrize("style", ["plain", "fused"])
def test_bfloat16(decoder, tmp_path, style):
    """The runtime cannot run the original: the same numbers in float32 stand for it, and this is said."""
    path = brain(decoder, tmp_path / "m.onnx", style)
    options = {
        "scheme": "int8-weights",
        "block_size": 32,
        "bench_seconds": 0.01 * (style == "plain"),
        "force": True,
        "time_limit": 5,
    }
    result = qgraph.optimize(path, tmp_path / "o.onnx", **options)
    report = result.report
    assert any("the same model in float32" in note for note in report.notes)
    assert kinds(ir.load(tmp_path / "o.onnx")) == kinds(ir.load(path))
    assert report.fidelity.outputs["logits"].sqnr > 20
    if style == "plain":
        assert report.speed
    else:
        assert len(report.quantized) > 10


def test_bfloat16_at_both_ends_of_a_session(model_kit):
    """float32 goes in, rounded, and comes out, exact."""
    text = """g (bfloat16[n, 4] x, float s) => (bfloat16[n, 4] y, float[n, 4] z) {
        z = Cast <to = 1> (x)  m = Mul (z, s)  y = Cast <to = 16> (m) }"""
    model = model_kit.text(text)
    x = model_kit.normal(3, 4)
    with Session(model, SessionOptions(threads=1)) as session:
        found = session.run({"x": x, "s": np.array(2, np.float32)})
        session.call({"x": x, "s": np.array(2, np.float32)})
        only = session.run({"x": x, "s": np.array(2, np.float32)}, ["z"])
    rounded = x.astype(BF16.numpy()).astype(np.float32)
    assert list(only) == ["z"]
    assert np.array_equal(found["z"], rounded) and np.array_equal(found["y"], 2 * rounded)


def test_what_computes_in_bfloat16(model_kit):
    weight = np.ones((4, 4), BF16.numpy())
    stored = "g (float[n, 4] x) => (float[n, 4] y) { w = Cast <to = 1> (W)  y = MatMul (x, w) }"
    computed = (
        "g (float[n, 4] x) => (float[n, 4] y) { h = Cast <to = 16> (x)  m = MatMul (h, W)  y = Cast <to = 1> (m) }"
    )
    found = []
    for text in (stored, computed):
        model = model_kit.text(text)
        value = ir.Value(
            name="W",
            type=ir.TensorType(BF16),
            shape=ir.Shape([4, 4]),
            const_value=ir.Tensor(weight, dtype=BF16, name="W"),
        )
        for node in model.graph:
            for position, one in enumerate(node.inputs):
                if one.name == "W":
                    node.replace_input_with(position, value)
        model.graph.register_initializer(value)
        found.append(widened.brains(model))
    assert found == [False, True]


# -- streaming ------------------------------------------------------------------------------------------------------

_PEAK = """
import resource, sys
import qgraph
from qgraph import registry
registry.pipeline("write")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
qgraph.optimize(sys.argv[1], sys.argv[2], scheme=sys.argv[4], check=sys.argv[3])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is counted in other units elsewhere")
@pytest.mark.parametrize(("check", "scheme", "most"), [("parts", "int4", 150e6), ("none", "fp32", 190e6)])
def test_memory_is_that_of_the_result_of_one_tensor(decoder, tmp_path, check, scheme, most):
    """96 MB of weights, of which one table takes 82 MB, and 164 MB in float32."""
    shape = decoder.Decoder(2, 512, 8, 2, 2048, 80000, tied=True)
    path = decoder.write(tmp_path / "m.onnx", shape, "plain", "float16")
    size = path.with_suffix(".onnx.data").stat().st_size
    assert 90e6 < size < 100e6
    command = [sys.executable, "-c", _PEAK, str(path), str(tmp_path / "out.onnx"), check, scheme]
    grown = 1024 * int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    written = (tmp_path / "out.onnx.data").stat().st_size
    assert written < (28e6 if scheme == "int4" else 1.01 * size)
    assert grown < most
