"""Runners in Node: what they are given, what is said when something is missing, and real runs where they are set up."""

import dataclasses
import json
import shutil
import sys

import numpy as np
import onnx_ir as ir
import pytest

from qgraph.errors import ExecutionError
from qgraph.runners import node
from qgraph.runners.base import write_job
from qgraph.runners.node import WASM, XNNPACK
from qgraph.session import Session

RUNNERS = {"xnnpack": XNNPACK, "wasm": WASM}
HEAD = '<ir_version: 8, opset_import: ["" : 17]>\n'
NET = (
    HEAD
    + """net (float[1, 3, 8, 8] x) => (float[1, 5] y) {
    c = Conv <pads = [1, 1, 1, 1]> (x, w1)
    r = Relu (c)
    f = Flatten (r)
    y = MatMul (f, w2)
}"""
)
QDQ = (
    HEAD
    + """qdq (float[1, 8, 9, 9] x) => (float[1, 8, 9, 9] y)
<float xs = {0.03125}, int8 xz = {5}, float ys = {0.125}, int8 yz = {-128}> {
    xq = QuantizeLinear (x, xs, xz)
    xd = DequantizeLinear (xq, xs, xz)
    wd = DequantizeLinear <axis = 0> (w, ws, wz)
    bd = DequantizeLinear <axis = 0> (b, bs, bz)
    c = Conv <pads = [1, 1, 1, 1], group = GROUP> (xd, wd, bd)
    r = Relu (c)
    rq = QuantizeLinear (r, ys, yz)
    y = DequantizeLinear (rq, ys, yz)
}"""
)
SHARED = (
    HEAD
    + """shared (float[1, 3, 8, 8] x) => (float[1, 4, 8, 8] y) {
    c = Conv <pads = [1, 1, 1, 1]> (x, w)
    r = Relu (c)
    s = Sigmoid (c)
    y = Mul (r, s)
}"""
)


@pytest.fixture(params=RUNNERS)
def real(request):
    """A runner that is set up here."""
    runner = RUNNERS[request.param]
    if runner.missing is not None:
        pytest.skip(f"{runner.name} is not set up: {runner.missing}. Set it up: {runner.setup}")
    return runner


@pytest.fixture
def placed(tmp_path, monkeypatch):
    """Places a package of a version where a runner looks for it; Node seems to be there."""
    monkeypatch.setenv("QGRAPH_RUNNERS", str(tmp_path / "runners"))
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")

    def place(runner, version):
        folder = tmp_path / "runners" / runner.name / "node_modules" / "onnxruntime-web"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "package.json").write_text(json.dumps({"version": version}))

    return place


def saved(model, folder, **options):
    path = folder / "model.onnx"
    ir.save(model, path, **options)
    return path


def small(model_kit):
    return model_kit.text(NET, w1=model_kit.normal(4, 3, 3, 3), w2=model_kit.normal(256, 5))


def whole(model_kit, groups, per_channel):
    """A convolution whose input, weight, bias and output are integers, and the step of its output."""
    rng = np.random.default_rng(3)
    count = 8 if per_channel else 1
    scales = np.linspace(0.001, 0.003, count, dtype=np.float32)
    weights = {
        "w": rng.integers(-127, 128, (8, 8 // groups, 3, 3)).astype(np.int8),
        "ws": scales if per_channel else scales[0],
        "wz": np.zeros(count if per_channel else (), np.int8),
        "b": rng.integers(-2000, 2000, 8).astype(np.int32),
        "bs": (scales if per_channel else scales[0]) * np.float32(0.03125),
        "bz": np.zeros(count if per_channel else (), np.int32),
    }
    return model_kit.text(QDQ.replace("GROUP", str(groups)), **weights), 0.125


# -- without Node ----------------------------------------------------------------------------------------------------


def test_missing_node_is_said(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "no `node`" in XNNPACK.missing


def test_missing_package_names_the_folder_and_the_command(placed, tmp_path, model_kit):
    path = saved(small(model_kit), tmp_path)
    with pytest.raises(ExecutionError, match=r"no onnxruntime-web in .*wasm.*Set it up: python tools/set_up.py wasm"):
        WASM.run(path, [])


def test_another_version_is_no_xnnpack(placed):
    placed(XNNPACK, "1.17.0")
    assert "has onnxruntime-web 1.17.0, and it takes 1.16.3" in XNNPACK.missing
    placed(XNNPACK, "1.16.3")
    assert XNNPACK.missing is None
    placed(WASM, "1.30.0")
    assert WASM.missing is None


def test_command_and_job(placed, tmp_path):
    placed(XNNPACK, "1.16.3")
    command, _ = XNNPACK.command(tmp_path)
    assert command[0] == "/usr/bin/node"
    assert (command[-2].endswith("worker.mjs"), command[-1]) == (True, str(tmp_path))
    able = dataclasses.replace(XNNPACK, external=(("a.data", "/there/a.data"),))
    write_job(tmp_path, able.job({"session.x": "1"}), [{"x": np.ones((2, 3), np.float16)}])
    job = json.loads((tmp_path / "job.json").read_text())
    assert job["backend"] == "xnnpack"
    assert job["modules"].endswith("node_modules")
    assert job["config"] == {"session.x": "1"}
    assert job["external"] == [{"path": "a.data", "file": "/there/a.data"}]
    assert job["samples"][0][0] == {"name": "x", "dtype": "float16", "shape": [2, 3], "offset": 0, "bytes": 12}


def test_a_model_that_is_read_as_it_is_is_not_copied(model_kit, tmp_path):
    path = saved(small(model_kit), tmp_path)
    assert XNNPACK.readable(path, tmp_path) == (path, ())


@pytest.mark.parametrize("name", RUNNERS)
def test_a_newer_ir_version_is_lowered_in_a_copy(name, model_kit, tmp_path):
    model = small(model_kit)
    model.ir_version = 14
    path = saved(model, tmp_path)
    (tmp_path / "copies").mkdir()
    copy, _ = RUNNERS[name].readable(path, tmp_path / "copies")
    found = ir.load(copy)
    assert copy != path
    assert found.ir_version == RUNNERS[name].newest_ir
    assert found.opset_imports == {"": 17}
    assert ir.load(path).ir_version == 14


def test_unused_operator_sets_are_left_out(model_kit, tmp_path):
    model = small(model_kit)
    model.opset_imports["ai.onnx.ml"] = 5
    (tmp_path / "copies").mkdir()
    copy, _ = XNNPACK.readable(saved(model, tmp_path), tmp_path / "copies")
    assert ir.load(copy).opset_imports == {"": 17}


def test_a_newer_opset_is_refused_in_words(model_kit, tmp_path):
    model = small(model_kit)
    model.opset_imports[""] = 21
    with pytest.raises(ExecutionError, match=r"knows opsets up to 19, and the model has 21"):
        XNNPACK.readable(saved(model, tmp_path), tmp_path)


def test_external_data_is_written_into_the_file_or_named(model_kit, tmp_path):
    path = saved(small(model_kit), tmp_path, external_data="weights.data", size_threshold_bytes=0)
    (tmp_path / "copies").mkdir()
    copy, external = XNNPACK.readable(path, tmp_path / "copies")
    assert external == ()
    assert not any(isinstance(v.const_value, ir.ExternalTensor) for v in ir.load(copy).graph.initializers.values())
    assert [one.name for one in (tmp_path / "copies").iterdir()] == [copy.name]
    files = (("weights.data", str((tmp_path / "weights.data").resolve())),)
    assert WASM.readable(path, tmp_path / "copies") == (path, files)


def test_lost_external_data_is_said(model_kit, tmp_path):
    path = saved(small(model_kit), tmp_path, external_data="weights.data", size_threshold_bytes=0)
    (tmp_path / "weights.data").unlink()
    with pytest.raises(ExecutionError, match=r"'weights.data', is not beside it"):
        WASM.readable(path, tmp_path)


@pytest.mark.parametrize(("name", "words"), [("xnnpack", "one file, of less than 2 GiB"), ("wasm", "ends at 4 GiB")])
def test_too_many_bytes_are_said(name, words, model_kit, tmp_path, monkeypatch):
    path = saved(small(model_kit), tmp_path, external_data="weights.data", size_threshold_bytes=0)
    monkeypatch.setattr(node, "size_on_disk", lambda path: 5 << 30)
    with pytest.raises(ExecutionError, match=words):
        RUNNERS[name].readable(path, tmp_path)


def test_what_is_no_model_is_said(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ExecutionError, match="not a readable ONNX model"):
        WASM.readable(path, tmp_path)


# -- in Node ---------------------------------------------------------------------------------------------------------


def test_numbers_and_kernels(real, model_kit, tmp_path):
    path = saved(small(model_kit), tmp_path)
    feeds = [{"x": model_kit.normal(1, 3, 8, 8, seed=seed)} for seed in range(3)]
    ran = real.run(path, feeds)
    with Session(path) as session:
        for feed, found in zip(feeds, ran.outputs, strict=True):
            np.testing.assert_allclose(found["y"], session.run(feed)["y"], rtol=0, atol=1e-4)
    taken = {kernel.op_type for kernel in ran.kernels if kernel.provider == real.provider}
    assert {"Conv" if real is XNNPACK else "FusedConv", "MatMul"} <= taken
    assert sum(kernel.seconds for kernel in ran.kernels) > 0
    assert ran.runtime.startswith("onnxruntime-web 1.")


def test_external_data_is_found(real, model_kit, tmp_path):
    path = saved(small(model_kit), tmp_path, external_data="weights.data", size_threshold_bytes=0)
    feed = {"x": model_kit.normal(1, 3, 8, 8)}
    with Session(path) as session:
        expected = session.run(feed)["y"]
    np.testing.assert_allclose(real.run(path, [feed]).outputs[0]["y"], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("groups", [1, 8])
@pytest.mark.parametrize("per_channel", [False, True])
def test_integer_convolution(real, groups, per_channel, model_kit, tmp_path):
    model, step = whole(model_kit, groups, per_channel)
    path = saved(model, tmp_path)
    feed = {"x": model_kit.normal(1, 8, 9, 9)}
    ran = real.run(path, [feed])
    assert [kernel.provider for kernel in ran.kernels if kernel.op_type == "QLinearConv"] == [real.provider]
    with Session(path) as session:
        np.testing.assert_allclose(ran.outputs[0]["y"], session.run(feed)["y"], rtol=0, atol=step * 1.001)


def test_types_pass_unchanged(real, model_kit, tmp_path):
    kinds = ["float64", "float16", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool"]
    inputs, outputs = (", ".join(f"float[a, 2] {name}_{kind}" for kind in kinds) for name in "xy")
    nodes = " ".join(f"y_{kind} = Identity (x_{kind})" for kind in kinds)
    model = model_kit.text(f"{HEAD}g ({inputs}) => ({outputs}) {{ {nodes} }}")
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.dtype = ir.DataType.from_numpy(np.dtype(value.name[2:]))
    given = {f"x_{kind}": np.asarray([[0, 1], [100, 3], [2, 77]]).astype(kind) for kind in kinds}
    first = {name: array[:1] for name, array in given.items()}
    for feeds, found in zip((given, first), real.run(saved(model, tmp_path), [given, first]).outputs, strict=True):
        for name, array in feeds.items():
            assert found[name.replace("x", "y", 1)].dtype == array.dtype
            np.testing.assert_array_equal(found[name.replace("x", "y", 1)], array)


def test_refusals_come_in_words(real, model_kit, tmp_path):
    model = model_kit.text(f"{HEAD}g (float[2] x) => (float[2] y) {{ y = Identity (x) }}")
    model.graph[0].op_type = "Nonsense"
    with pytest.raises(ExecutionError, match=r"cannot run model.onnx: No Op registered for Nonsense"):
        real.run(saved(model, tmp_path), [{"x": np.ones(2, np.float32)}])
    path = saved(small(model_kit), tmp_path)
    with pytest.raises(ExecutionError, match=r"[Gg]ot invalid dimensions|Got: 4 Expected: 3"):
        real.run(path, [{"x": np.ones((1, 4, 8, 8), np.float32)}])
    with pytest.raises(ExecutionError, match="'x' is missing"):
        real.run(path, [{"z": np.ones((1, 3, 8, 8), np.float32)}])


def test_config_reaches_the_session(real, model_kit, tmp_path):
    path, feeds = saved(small(model_kit), tmp_path), [{"x": model_kit.normal(1, 3, 8, 8)}]
    if real is XNNPACK:  # which leaves Flatten to the host
        with pytest.raises(ExecutionError, match="fallback to CPU EP has been explicitly disabled"):
            real.run(path, feeds, config={"session.disable_cpu_ep_fallback": "1"})
    else:
        plain = real.run(path, feeds, config={"optimization.disable_specified_optimizers": "ConvActivationFusion"})
        assert "Relu" in {kernel.op_type for kernel in plain.kernels}


def test_xnnpack_refuses_in_words_what_it_merges_wrongly(model_kit, tmp_path):
    """This build throws bare addresses of C++ exceptions; what they say is read from its memory."""
    if XNNPACK.missing is not None:
        pytest.skip(f"xnnpack is not set up: {XNNPACK.missing}. Set it up: {XNNPACK.setup}")
    path = saved(model_kit.text(SHARED, w=model_kit.normal(4, 3, 3, 3)), tmp_path)
    with pytest.raises(ExecutionError, match=r"1\.16\.3.*Node input .* is not a graph input"):
        XNNPACK.run(path, [{"x": model_kit.normal(1, 3, 8, 8)}])


def test_half_done_work_is_ended(real, model_kit, tmp_path):
    with pytest.raises(ExecutionError, match="took more than 0 s"):
        real.run(saved(small(model_kit), tmp_path), [{"x": model_kit.normal(1, 3, 8, 8)}], seconds=0.01)


@pytest.mark.skipif(sys.platform == "win32", reason="processes end otherwise there")
def test_a_dead_runtime_is_an_error(real, model_kit, tmp_path, monkeypatch):
    monkeypatch.setenv("NODE_OPTIONS", "--import=data:text/javascript,process.kill(process.pid,'SIGABRT')")
    with pytest.raises(ExecutionError, match="ended with signal 6"):
        real.run(saved(small(model_kit), tmp_path), [{"x": model_kit.normal(1, 3, 8, 8)}])
