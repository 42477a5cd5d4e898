import json

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from qgraph.complaints import complaint
from qgraph.errors import ExecutionError
from qgraph.session import KernelTime, Session, SessionOptions, max_ir_version, runtime_version

X = np.linspace(-2, 2, 8, dtype=np.float32).reshape(2, 4)
Y = np.sqrt(np.maximum(X * 2 + np.arange(4, dtype=np.float32), 0))
TWO = """<ir_version: 10, opset_import: ["" : 21]>
    two (float[N] x) => (float[N] b, float[N] a) { a = Neg(x)  b = Abs(x) }"""


def test_a_model_from_memory_and_from_a_file(tiny_chain, tmp_path):
    ir.save(tiny_chain(), tmp_path / "m.onnx")
    for model in (tiny_chain(), tmp_path / "m.onnx"):
        with Session(model) as made:
            found = made.run({"x": X})
            assert made.outputs == ["y"]
        assert list(found) == ["y"]
        np.testing.assert_array_equal(found["y"], Y)


def test_outputs_are_named_in_the_models_order_or_chosen():
    with Session(ir.from_onnx_text(TWO)) as made:
        x = np.float32([1, -2])
        assert list(made.run({"x": x})) == ["b", "a"]
        assert {k: v.tolist() for k, v in made.run({"x": x}).items()} == {"b": [1, 2], "a": [-1, 2]}
        assert {k: v.tolist() for k, v in made.run({"x": x}, ["a"]).items()} == {"a": [-1, 2]}
        assert made.call({"x": x}) is None


def test_external_weights_are_read_from_their_folder(tiny_chain, tmp_path):
    ir.save(tiny_chain(width=512), tmp_path / "m.onnx", external_data="m.data", size_threshold_bytes=10)
    model = ir.load(tmp_path / "m.onnx")
    x = np.ones((1, 512), np.float32)
    with Session(model, folder=tmp_path) as made:
        expected = np.sqrt(2 + np.arange(512, dtype=np.float32))[None]
        np.testing.assert_allclose(made.run({"x": x})["y"], expected, rtol=1e-6)
    with pytest.raises(ExecutionError, match="cannot load graph 'chain'"):
        Session(model, folder=tmp_path / "none")


def test_the_context_closes(tiny_chain):
    with Session(tiny_chain()) as made:
        assert made._session is not None
    assert made._session is None
    made.close()
    with pytest.raises(ZeroDivisionError), Session(tiny_chain()) as made:
        raise ZeroDivisionError
    assert made._session is None


# -- errors ------------------------------------------------------------------------------------------------------------


def test_a_model_that_cannot_be_loaded(tiny_chain, tmp_path):
    model = tiny_chain()
    model.graph[0].op_type = "NoSuchOperator"
    version = runtime_version()
    with pytest.raises(ExecutionError, match=rf"onnxruntime {version} cannot load graph 'chain': .*NoSuchOperator"):
        Session(model)
    ir.save(model, tmp_path / "m.onnx")
    with pytest.raises(ExecutionError, match=r"cannot load m\.onnx: .*NoSuchOperator"):
        Session(tmp_path / "m.onnx")
    (tmp_path / "text.onnx").write_text("no model")
    for name in ("text.onnx", "none.onnx"):
        with pytest.raises(ExecutionError, match=f"cannot load {name}: .+"):
            Session(tmp_path / name)


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({"x": np.ones((1, 5), np.float32)}, r"on x float32\[1, 5\]: .*x"),
        ({"x": np.ones((1, 4), np.int64)}, r"on x int64\[1, 4\]: .*float"),
        ({"z": np.ones((1, 4), np.float32)}, r"on z float32\[1, 4\]: .*x"),
        ({}, r"on nothing: .*x"),
    ],
)
def test_feeds_that_do_not_fit(tiny_chain, feeds, message):
    with (
        Session(tiny_chain()) as made,
        pytest.raises(ExecutionError, match="onnxruntime cannot run the model " + message),
    ):
        made.run(feeds)


def test_an_output_that_does_not_exist(tiny_chain):
    with Session(tiny_chain()) as made, pytest.raises(ExecutionError, match="none"):
        made.run({"x": X}, ["none"])


def test_a_missing_provider_is_never_replaced_in_silence(tiny_chain):
    options = SessionOptions(providers=("NoSuchExecutionProvider", "CPUExecutionProvider"))
    with pytest.raises(ExecutionError, match=r"has no provider \['NoSuchExecutionProvider'\]"):
        Session(tiny_chain(), options)


def test_messages_are_short_and_bare():
    assert complaint(RuntimeError("[ONNXRuntimeError] : 1 : FAIL : reason\nstack\ntrace")) == "reason"
    assert complaint(RuntimeError("")) == "RuntimeError"
    assert len(complaint(RuntimeError("x" * 10_000))) == 500


# -- options -----------------------------------------------------------------------------------------------------------


def test_options_reach_the_runtime():
    native = SessionOptions(threads=3, level="basic", config=(("session.qdqisint8allowed", "1"),)).native()
    assert native.intra_op_num_threads == 3
    assert native.inter_op_num_threads == 1
    assert native.graph_optimization_level == ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    assert native.get_session_config_entry("session.qdqisint8allowed") == "1"
    assert not native.enable_profiling
    levels = {
        level: SessionOptions(level=level).native().graph_optimization_level for level in ("none", "basic", "all")
    }
    assert len(set(levels.values())) == 3
    assert SessionOptions().native().graph_optimization_level == ort.GraphOptimizationLevel.ORT_ENABLE_ALL


def test_the_optimized_graph_is_written(tmp_path):
    text = """<ir_version: 10, opset_import: ["" : 21]>
        g (float[N] x) => (float[N] y) { a = Identity(x)  b = Identity(a)  y = Neg(b) }"""
    for level, operators in (("none", ["Identity", "Identity", "Neg"]), ("all", ["Neg"])):
        path = tmp_path / f"{level}.onnx"
        with Session(ir.from_onnx_text(text), SessionOptions(level=level, optimized=path)):
            pass
        assert [node.op_type for node in onnx.load(path).graph.node] == operators


def test_profiles(tiny_chain, tmp_path):
    options = SessionOptions(profile=str(tmp_path / "profile"), threads=1)
    with Session(tiny_chain(), options) as made:
        for _ in range(3):
            made.call({"x": X})
        times = made.profile()
    assert [(time.node, time.op_type) for time in times] == [
        ("mul", "Mul"),
        ("add", "Add"),
        ("relu", "Relu"),
        ("sqrt", "Sqrt"),
    ]
    assert all(0 <= time.seconds < 1 for time in times)
    assert list(tmp_path.iterdir()) == []


def test_profiles_are_medians_in_seconds(tiny_chain, tmp_path, monkeypatch):
    with Session(tiny_chain(), SessionOptions()) as made:
        real = made._session
        events = [
            {"cat": "Node", "name": "conv_kernel_time", "dur": d, "args": {"op_name": "Conv"}} for d in (5, 1000, 7)
        ]
        events += [{"cat": "Node", "name": "conv_fence_before", "dur": 1, "args": {}}, {"cat": "Session", "name": "x"}]
        path = tmp_path / "profile.json"
        path.write_text(json.dumps(events))

        class Fake:
            def end_profiling(self):
                return str(path)

        made._session = Fake()
        assert made.profile() == [KernelTime("conv", "Conv", pytest.approx(7e-6))]
        made._session = real
    assert not path.exists()


# -- versions ----------------------------------------------------------------------------------------------------------


def test_versions(tiny_chain):
    assert runtime_version() == ort.__version__
    newest = max_ir_version()
    assert 10 <= newest < 20
    model = tiny_chain()
    model.ir_version = newest
    Session(model).close()
    model.ir_version = newest + 1
    with pytest.raises(ExecutionError, match="IR version"):
        Session(model)
