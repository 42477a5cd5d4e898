"""Dynamic int8: products and LSTMs in the forms that the runtime fuses, with the numbers that they should have."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qgraph import audit, registry
from qgraph.data import inputs_of, load
from qgraph.pipeline import Context

DYNAMIC = "int8-dynamic"


@pytest.fixture
def written(model_kit, tmp_path):
    """Brings a model (changed in place) into dynamic int8; returns what each planned node runs as."""

    def write(model, **options):
        target = model_kit.free()
        context = Context(target, target.scheme(DYNAMIC), None, **options)
        registry.pipeline("quantize")(context)(model)
        ir.save(model, tmp_path / "dynamic.onnx")
        onnx.checker.check_model(onnx.load(tmp_path / "dynamic.onnx"))
        found = audit.audit(tmp_path / "dynamic.onnx", audit.plan_of(model), target)
        assert found.clean, found.summary
        return found.kernels

    return write


def dynamic(x, weight, tensors):
    """x @ weight as ONNX defines it: u8 activations of the whole tensor's range, int8 weights per column."""
    codes = next(array for array in tensors.values() if array.dtype == np.int8 and array.shape == weight.shape)
    steps = next(array for name, array in tensors.items() if name.endswith("_scale"))
    assert (np.abs(codes * steps - weight) <= 0.501 * steps).all()
    assert np.abs(codes.astype(int)).max(axis=0).min() >= 127, "each column uses all of the codes"
    low, high = min(x.min(), 0), max(x.max(), 0)
    scale = np.float32((high - low) / np.float32(255))
    zero = np.clip(np.rint(-low / scale), 0, 255)
    return ((np.clip(np.rint(x / scale) + zero, 0, 255) - zero) @ codes.astype(np.float64)) * scale * steps


# -- products -------------------------------------------------------------------------------------------------------


def test_matmul_has_the_numbers_of_its_definition(model_kit, written):
    model = model_kit.text(
        "g (float[b, 3, 32] x) => (float[b, 3, 24] y) { y = MatMul (x, W) }", W=model_kit.normal(32, 24)
    )
    weight = model_kit.tensors(model)["W"]
    assert written(model) == {"y_MatMul": "DynamicQuantizeMatMul"}
    for feed in model_kit.feeds(model, 4, free=5):
        found = model_kit.run(model, feed)["y"]
        expected = dynamic(feed["x"].reshape(-1, 32), weight, model_kit.tensors(model)).reshape(5, 3, 24)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("text, shape", [("MatMul (x, W)", (32, 24)), ("Gemm <transB = 1> (x, W)", (24, 32))])
def test_learned_codes_are_those_that_are_written(model_kit, text, shape):
    """The bias is corrected for them, so that others would be worse than none."""
    model = model_kit.text(f"g (float[40, 32] x) => (float[40, 24] y) {{ y = {text} }}", W=model_kit.normal(*shape))
    rng = np.random.default_rng(0)
    low = rng.standard_normal((3, 32))
    rows = [rng.standard_normal((40, 3)) @ low + 0.03 * rng.standard_normal((40, 32)) for _ in range(8)]
    data = load([{"x": row.astype(np.float32)} for row in rows], inputs_of(model))
    target = model_kit.free()
    found = {}
    for learn in (False, True):
        after = model.clone()
        context = Context(target, target.scheme(DYNAMIC), data, learn=learn)
        registry.pipeline("quantize")(context)(after)
        noise = [model_kit.run(after, b.feeds)["y"] - model_kit.run(model, b.feeds)["y"] for b in data]
        found[learn] = float(np.square(noise, dtype=np.float64).sum())
        codes = next(array for array in model_kit.tensors(after).values() if array.dtype == np.int8)
        assert codes.shape == (32, 24)
    assert found[True] < 0.8 * found[False]


@pytest.mark.parametrize("shape", [(24,), (1, 24), (1, 1, 24)])
@pytest.mark.parametrize("first", ["h, b", "b, h"])
def test_bias_of_an_add_joins_the_kernel(model_kit, written, shape, first):
    model = model_kit.text(
        f"g (float[2, 3, 32] x) => (float[2, 3, 24] y) {{ h = MatMul (x, W)  y = Add ({first}) }}",
        W=model_kit.normal(32, 24),
        b=model_kit.normal(*shape),
    )
    original = model.clone()
    kernels = written(model)
    assert set(kernels.values()) == {"DynamicQuantizeMatMul"}
    assert model_kit.sqnr(original, model, model_kit.feeds(original)) > 30


@pytest.mark.parametrize("shape", [(), (3, 1), (3, 24)])
def test_what_is_no_bias_stays_an_add(model_kit, written, shape):
    model = model_kit.text(
        "g (float[2, 3, 32] x) => (float[2, 3, 24] y) { h = MatMul (x, W)  y = Add (h, b) }",
        W=model_kit.normal(32, 24),
        b=model_kit.normal(*shape),
    )
    original = model.clone()
    assert written(model) == {"h_MatMul": "DynamicQuantizeMatMul"}
    assert model_kit.sqnr(original, model, model_kit.feeds(original)) > 30


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("bias", [None, (24,), (1, 24)])
def test_gemm_in_all_its_forms(model_kit, written, transposed, bias):
    weight = model_kit.normal(32, 24)
    constants = {"W": weight.T.copy() if transposed else weight}
    if bias is not None:
        constants["b"] = model_kit.normal(*bias, scale=3)
    model = model_kit.text(
        f"""g (float[n, 32] x) => (float[n, 24] y) {{
            y = Gemm <transB = {transposed}> (x, W{", b" if bias is not None else ""})
        }}""",
        **constants,
    )
    assert written(model) == {"y_Gemm": "DynamicQuantizeMatMul"}
    for feed in model_kit.feeds(model, 3, free=7):
        expected = dynamic(feed["x"], weight, model_kit.tensors(model)) + constants.get("b", 0)
        found = model_kit.run(model, feed)["y"]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    big = [array for array in model_kit.tensors(model).values() if array.size == 32 * 24]
    assert [array.dtype for array in big] == [np.int8], "the float weight is gone"


def test_products_of_one_input_share_its_quantizer(model_kit, written):
    n = model_kit.normal
    model = model_kit.text(
        """g (float[2, 32] x) => (float[2, 24] q, float[2, 16] k, float[2, 24] o) {
            q = MatMul (x, Q)
            k = Gemm (x, K, c)
            e = Erf (q)
            o = MatMul (e, O)
        }""",
        Q=n(32, 24),
        K=n(32, 16),
        c=n(16),
        O=n(24, 24),
    )
    original = model.clone()
    assert written(model) == {
        "q_MatMul": "MatMulIntegerToFloat",
        "k_Gemm": "MatMulIntegerToFloat",
        "o_MatMul": "DynamicQuantizeMatMul",
    }
    assert model_kit.ops(model).count("DynamicQuantizeLinear") == 2
    feeds = model_kit.feeds(original)
    assert model_kit.sqnr(original, model, feeds) > 25
    model_kit.same(original, original, feeds)


def test_a_quantizer_stands_before_the_first_of_its_readers(model_kit, written):
    """Named so that the order of names is not that of the graph."""
    model = model_kit.text(
        "g (float[2, 32] x) => (float[2, 32] y) { b = MatMul (x, W)  e = Erf (b)  a = MatMul (x, V)  y = Mul (e, a) }",
        W=model_kit.normal(32, 32),
        V=model_kit.normal(32, 32, seed=1),
    )
    original = model.clone()
    written(model)
    assert model_kit.sqnr(original, model, model_kit.feeds(original)) > 25


def test_a_shared_weight_is_stored_once(model_kit, written):
    model = model_kit.text(
        "g (float[2, 32] x) => (float[2, 32] y) { h = MatMul (x, W)  e = Erf (h)  y = MatMul (e, W) }",
        W=model_kit.normal(32, 32),
    )
    original = model.clone()
    assert len(written(model)) == 2
    assert [a.dtype for a in model_kit.tensors(model).values() if a.size == 32 * 32] == [np.int8]
    assert model_kit.sqnr(original, model, model_kit.feeds(original)) > 25


def test_a_weight_that_is_also_read_in_float_stays(model_kit, written):
    model = model_kit.text(
        "g (float[2, 32] x) => (float[2, 32] y, float[32, 32] z) { y = MatMul (x, W)  z = Neg (W) }",
        W=model_kit.normal(32, 32),
    )
    original = model.clone()
    written(model)
    feeds = model_kit.feeds(original)
    assert model_kit.run(model, feeds[0])["z"].tolist() == model_kit.run(original, feeds[0])["z"].tolist()


def test_names_that_are_taken(model_kit, written):
    model = model_kit.text(
        """g (float[2, 32] x, float[2, 24] W_quantized) => (float[2, 24] y) {
            W_scale = MatMul (x, W)
            y = Add (W_scale, W_quantized)
        }""",
        W=model_kit.normal(32, 24),
    )
    original = model.clone()
    assert list(written(model).values()) == ["DynamicQuantizeMatMul"]
    assert model_kit.sqnr(original, model, model_kit.feeds(original)) > 30


def test_weights_of_zeros_and_inputs_of_zeros(model_kit, written):
    weight = model_kit.normal(32, 24)
    weight[:, 3] = 0
    model = model_kit.text("g (float[2, 32] x) => (float[2, 24] y) { y = MatMul (x, W) }", W=weight)
    written(model)
    found = model_kit.run(model, {"x": np.zeros((2, 32), np.float32)})["y"]
    assert (found == 0).all()
    assert (model_kit.run(model, {"x": model_kit.normal(2, 32)})["y"][:, 3] == 0).all()


def test_reasons_of_what_has_no_dynamic_kernel(model_kit):
    n = model_kit.normal
    model = model_kit.text(
        """g (float[1, 4, 8, 8] x) => (float[1, 4, 8, 8] z, float[8, 8] w) {
            y = Conv <pads = [1, 1, 1, 1]> (x, W)
            t = MatMul (y, y)
            s = MatMul (L, t)
            z = MatMul (s, R)
            w = Gemm <alpha = 2.0> (M, R)
        }""",
        W=n(4, 4, 3, 3),
        L=n(8, 8),
        R=n(8, 8),
        M=n(8, 8),
    )
    target = model_kit.free()
    registry.pipeline("quantize")(Context(target, target.scheme(DYNAMIC), None))(model)
    reasons = model_kit.reasons(model)
    assert "dynamic integer convolution is slower" in reasons["y_Conv"]
    assert reasons["t_MatMul"] == "a product of two activations has no weight"
    assert "the weight is on the left" in reasons["s_MatMul"]
    assert "z_MatMul" in model_kit.integer(model)


# -- LSTM -----------------------------------------------------------------------------------------------------------


def lstm(model_kit, directions, inputs, hidden=16, size=12, opset=21):
    """One LSTM; `inputs` are those of B, sequence_lens, initial_h and initial_c that it has."""
    n = model_kit.normal
    constants = {
        "W": n(directions, 4 * hidden, size, scale=0.3),
        "R": n(directions, 4 * hidden, hidden, scale=0.3),
        "B": n(directions, 8 * hidden, scale=0.3),
        "lens": np.array([3, 5], np.int32),
        "h0": n(directions, 2, hidden, seed=1),
        "c0": n(directions, 2, hidden, seed=2),
    }
    names = ["x", "W", "R", *(name if name in inputs else "" for name in ("B", "lens", "h0", "c0"))]
    while not names[-1]:
        names.pop()
    helper = onnx.helper
    node = helper.make_node(
        "LSTM",
        names,
        ["y", "h", "c"],
        name="rnn",
        hidden_size=hidden,
        direction="bidirectional" if directions == 2 else "forward",
    )
    last = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [5, 2, size])
    outputs = [
        helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [5, directions, 2, hidden]),
        *(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [directions, 2, hidden]) for name in "hc"),
    ]
    tensors = [onnx.numpy_helper.from_array(constants[name], name) for name in names[1:] if name]
    graph = helper.make_graph([node], "g", [last], outputs, tensors)
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10))


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("inputs", [(), ("B",), ("B", "lens"), ("h0", "c0"), ("B", "lens", "h0", "c0"), ("lens",)])
def test_lstm(model_kit, written, directions, inputs):
    model = lstm(model_kit, directions, inputs)
    original = model.clone()
    assert written(model) == {"rnn": "DynamicQuantizeLSTM"}
    feeds = model_kit.feeds(original, 4)
    # Measured: 34 to 41 dB.
    assert model_kit.sqnr(original, model, feeds) > 28
    big = [array for array in model_kit.tensors(model).values() if array.ndim == 3 and array.shape[-1] == 64]
    assert [array.dtype for array in big] == [np.int8] * 2
    assert {array.shape for array in big} == {(directions, 12, 64), (directions, 16, 64)}
    assert not {"W", "R"} & set(model_kit.tensors(model))


def test_lstm_gates_have_scales_of_their_own(model_kit, written):
    """One gate of one unit that is a thousand times larger must not cost the others their precision."""
    model = lstm(model_kit, 1, ("B",))
    weight = model_kit.tensors(model)["W"].copy()
    weight[0, 5] *= 1000
    model.graph.initializers["W"].const_value = ir.tensor(weight, name="W")
    original = model.clone()
    written(model)
    assert model_kit.sqnr(original, model, model_kit.feeds(original, 4)) > 28


def test_two_lstms_with_one_weight(model_kit, written):
    model = lstm(model_kit, 1, ("B",), hidden=16, size=16)
    first = model.graph[0]
    again = ir.Node("", "Squeeze", [first.outputs[0], ir.Value(name="axis")], name="flat")
    axis = ir.tensor(np.array([1]), name="axis")
    again.inputs[1].const_value = axis
    model.graph.register_initializer(again.inputs[1])
    attributes = list(first.attributes.values())
    second = ir.Node("", "LSTM", [again.outputs[0], *first.inputs[1:]], attributes, num_outputs=3, name="rnn2")
    model.graph.extend([again, second])
    for old, new, name in zip(list(model.graph.outputs), second.outputs, "yhc", strict=True):
        new.name, new.type, new.shape = f"{name}2", old.type, old.shape
        model.graph.outputs.append(new)
    original = model.clone()
    assert written(model) == {"rnn": "DynamicQuantizeLSTM", "rnn2": "DynamicQuantizeLSTM"}
    assert model_kit.sqnr(original, model, model_kit.feeds(original, 4)) > 25


def test_lstm_with_batch_first_is_refused(model_kit):
    model = lstm(model_kit, 1, ())
    model.graph[0].attributes.add(ir.AttrInt64("layout", 1))
    target = model_kit.free()
    found = target.kernel(model.graph[0], target.scheme(DYNAMIC))
    assert found.reason == "onnxruntime's LSTM takes no batch-first layout"
