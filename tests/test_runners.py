"""Runners in Python: the protocol on this interpreter, what is said when something is missing or dies, and each
provider that is set up here."""

import dataclasses
import importlib.util
import os
import platform
import stat
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qgraph.errors import ExecutionError
from qgraph.runners import RUNNERS, places, worker
from qgraph.runners.base import runners_folder
from qgraph.runners.places import Interpreter
from qgraph.runners.python import PythonRunner, runners
from qgraph.session import HOST, Session, SessionOptions

NET = """net (float[n, 3, 8, 8] x) => (float[n, 5] y) {
    [first] c = Conv <pads = [1, 1, 1, 1]> (x, w1)
    [second] r = Relu (c)
    [third] f = Flatten (r)
    [fourth] y = MatMul (f, w2)
}"""
STEP = 0.005
QUANTIZED = """net (float[1, 3, 8, 8] x) => (float[1, 5] y) {
    xq = QuantizeLinear (x, s, zero)
    xd = DequantizeLinear (xq, s, zero)
    w1d = DequantizeLinear (w1, sw, zero)
    c = Conv <pads = [1, 1, 1, 1]> (xd, w1d)
    r = Relu (c)
    rq = QuantizeLinear (r, s, low)
    rd = DequantizeLinear (rq, s, low)
    f = Flatten (rd)
    fq = QuantizeLinear (f, s, low)
    fd = DequantizeLinear (fq, s, low)
    w2d = DequantizeLinear (w2, sw, zero)
    m = MatMul (fd, w2d)
    mq = QuantizeLinear (m, step, zero)
    y = DequantizeLinear (mq, step, zero)
}"""
HERE = PythonRunner("here", HOST, "this Python", "nothing to set up")
SET_UP = [name for name, runner in RUNNERS.items() if isinstance(runner, PythonRunner)]
FLOATS = {"webgpu": 1e-5, "openvino": 1e-5, "qnn": 2e-3, "arm64": 1e-5, "arm64-a53": 1e-5, "arm64-a710": 1e-5}
"""What may be missing from the largest number: QNN computes float in half precision."""


def save(model, folder, name="model.onnx"):
    path = folder / name
    ir.save(model, path)
    return path


@pytest.fixture
def net(model_kit, tmp_path):
    weights = {"w1": model_kit.normal(4, 3, 3, 3, scale=0.3), "w2": model_kit.normal(256, 5, scale=0.1)}
    return save(model_kit.text(NET, **weights), tmp_path)


@pytest.fixture
def fixed(model_kit, tmp_path):
    """The same without free dimensions, which some providers do not take."""
    weights = {"w1": model_kit.normal(4, 3, 3, 3, scale=0.3), "w2": model_kit.normal(256, 5, scale=0.1)}
    return save(model_kit.text(NET.replace("[n,", "[1,"), **weights), tmp_path, "fixed.onnx")


@pytest.fixture
def quantized(model_kit, tmp_path):
    """The same in integers, by hand, so that these tests need no pass."""
    random = np.random.default_rng(0)
    codes = {"w1": random.integers(-127, 128, (4, 3, 3, 3)), "w2": random.integers(-127, 128, (256, 5))}
    scales = {"s": np.float32(0.02), "sw": np.float32(0.001), "step": np.float32(STEP)}
    zeros = {"zero": np.int8(0), "low": np.int8(-128)}
    weights = {name: array.astype(np.int8) for name, array in codes.items()}
    return save(model_kit.text(QUANTIZED, **weights, **scales, **zeros), tmp_path, "quantized.onnx")


def scripted(folder, text):
    """A runner whose interpreter is a shell script."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)

    class Scripted(PythonRunner):
        def interpreter(self):
            return Interpreter((str(path),))

    return Scripted("scripted", HOST, "A script", "nothing to set up")


def test_runs_as_a_session_in_this_process_does(net, model_kit):
    feeds = [{"x": model_kit.normal(n, 3, 8, 8, seed=n)} for n in (1, 2, 5)]
    ran = dataclasses.replace(HERE, threads=1).run(net, feeds)
    with Session(net, SessionOptions(threads=1, profile=str(net.parent / "profile"))) as session:
        for found, one in zip(ran.outputs, feeds, strict=True):
            expected = session.run(one)
            assert list(found) == ["y"] and found["y"].dtype == np.float32
            np.testing.assert_array_equal(found["y"], expected["y"])
        kernels = session.profile()
    assert [(one.node, one.op_type, one.provider) for one in ran.kernels] == [
        (one.node, one.op_type, one.provider) for one in kernels
    ]
    assert all(one.seconds >= 0 for one in ran.kernels)
    assert ran.assigned == {HOST: ["first", "second", "third", "fourth"]}
    assert platform.machine() in ran.runtime and HOST in ran.runtime


def test_level_and_config_reach_the_runtime(net, model_kit):
    feeds = [{"x": model_kit.normal(1, 3, 8, 8)}]
    fused = {one.op_type for one in HERE.run(net, feeds).kernels}
    plain = {one.op_type for one in dataclasses.replace(HERE, level="none").run(net, feeds).kernels}
    assert "Relu" in plain and "Relu" not in fused
    with pytest.raises(ExecutionError, match=r"thread"):
        HERE.run(net, feeds, config={"session.intra_op_thread_affinities": "nonsense"})


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float8_e4m3fn", "int4", "uint4", "uint8", "int64", "bool"])
def test_numbers_of_all_types_pass_both_ways(dtype, model_kit, tmp_path):
    kind = {"float8_e4m3fn": "float8e4m3fn"}.get(dtype, dtype)
    # The CPU provider has no Identity for the smallest types.
    small = {"int4": 22, "uint4": 21}.get(dtype)
    work = f"w = Cast <to = 1> (x)  y = Cast <to = {small}> (w)" if small else "y = Identity (x)"
    text = f"m ({kind}[n, 3] x, float[2] z) => ({kind}[n, 3] y, float[2] z2) {{ {work}  z2 = Neg (z) }}"
    path = save(model_kit.text(text), tmp_path)
    type_ = np.dtype(getattr(ml_dtypes, dtype, dtype))
    array = np.array([[0, 1, 1], [3, 0, 7], [1, 6, 5]]).astype(type_)
    if dtype in ("int4", "bfloat16", "float16"):
        array = (-array.astype(np.float32)).astype(type_)
    numbers = np.float32([1, -2])
    ran = dataclasses.replace(HERE, level="none").run(path, [{"x": a, "z": numbers} for a in (array, array[:0])])
    for found, expected in zip(ran.outputs, (array, array[:0]), strict=True):
        assert found["y"].dtype == type_ and found["y"].shape == expected.shape
        np.testing.assert_array_equal(found["y"].astype(np.float32), expected.astype(np.float32))
        np.testing.assert_array_equal(found["z2"], -numbers)


def test_external_data_and_a_model_without_inputs(model_kit, tmp_path):
    model = model_kit.text("m () => (float[64, 64] y) { y = Neg (w) }", w=model_kit.normal(64, 64))
    ir.save(model, tmp_path / "model.onnx", external_data="weights.bin", size_threshold_bytes=0)
    ran = HERE.run(tmp_path / "model.onnx", [{}])
    np.testing.assert_array_equal(ran.outputs[0]["y"], -model_kit.normal(64, 64))


def test_a_refused_model_is_told_in_the_runtimes_words(model_kit, tmp_path, net):
    bad = save(model_kit.text("m (float[2] x) => (float[2] y) { y = NoSuchOperator (x) }"), tmp_path, "bad.onnx")
    with pytest.raises(ExecutionError, match=r"cannot run bad\.onnx: .*NoSuchOperator"):
        HERE.run(bad, [{"x": np.zeros(2, np.float32)}])
    with pytest.raises(ExecutionError, match=r"INVALID_ARGUMENT.* x "):
        HERE.run(net, [{"x": np.zeros((1, 4, 8, 8), np.float32)}])
    newer = onnx.load(net)
    newer.ir_version = 99
    (tmp_path / "newer.onnx").write_bytes(newer.SerializeToString())
    with pytest.raises(ExecutionError, match=r"IR versions up to \d+, and the model has 99"):
        HERE.run(tmp_path / "newer.onnx", [])
    words = save(model_kit.text("m (string[2] x) => (string[2] y) { y = Identity (x) }"), tmp_path, "words.onnx")
    with pytest.raises(ExecutionError, match=r"tensors of numbers only, not tensor\(string\)"):
        HERE.run(words, [])


def test_a_runtime_without_the_provider_is_told(net):
    absent = dataclasses.replace(HERE, provider="NoSuchExecutionProvider")
    assert "has no NoSuchExecutionProvider" in absent.missing

    class Insists(PythonRunner):
        def interpreter(self):
            return Interpreter((sys.executable,))

    with pytest.raises(ExecutionError, match=r"here has no NoSuchExecutionProvider"):
        Insists("x", "NoSuchExecutionProvider", "x", "x").run(net, [])


@pytest.mark.skipif(os.name == "nt", reason="shell scripts")
def test_a_worker_that_dies_is_an_error_here_and_no_more(tmp_path, net):
    with pytest.raises(ExecutionError, match=r"A script ended with signal 6 on model\.onnx: no word"):
        scripted(tmp_path, "kill -ABRT $$").run(net, [])
    with pytest.raises(ExecutionError, match=r"ended with exit code 3 on model\.onnx: out of luck"):
        scripted(tmp_path, "echo out of luck >&2; exit 3").run(net, [])
    with pytest.raises(ExecutionError, match=r"gave no answer for model\.onnx"):
        scripted(tmp_path, "exit 0").run(net, [])
    with pytest.raises(ExecutionError, match=r"took more than 0 s on model\.onnx"):
        scripted(tmp_path, "exec sleep 30").run(net, [], seconds=0.3)


def test_what_is_missing_names_its_set_up(tmp_path, monkeypatch, net):
    monkeypatch.setenv("QGRAPH_RUNNERS", str(tmp_path))
    assert runners_folder() == tmp_path
    for name in ("openvino", "arm64", "arm64-a53"):
        command = f"python tools/set_up.py {name.partition('-')[0]}"
        assert str(tmp_path) in RUNNERS[name].missing or sys.platform != "linux"
        with pytest.raises(ExecutionError, match=rf"Cannot run on \w+: .*Set it up: {command}$"):
            RUNNERS[name].run(net, [])
        with pytest.raises(ExecutionError, match=rf"Set it up: {command}$"):
            RUNNERS[name].command(tmp_path)


def test_folder_of_the_runners_is_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("QGRAPH_RUNNERS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    assert runners_folder() == tmp_path / "qgraph" / "runners"


def test_an_environment_of_its_own_is_known_by_its_files(monkeypatch, tmp_path):
    monkeypatch.setenv("QGRAPH_RUNNERS", str(tmp_path))
    folder = tmp_path / "thing"
    assert "no Python in" in places.own("thing", "some-package")
    python = places.virtual_environment(folder)
    python.parent.mkdir(parents=True)
    python.touch()
    assert "has no some-package" in places.own("thing", "some-package")
    (folder / "lib" / "python3.11" / "site-packages" / "some_package-1.0.dist-info").mkdir(parents=True)
    assert places.own("thing", "some-package") == Interpreter((str(python), "-I"))


@pytest.mark.skipif(sys.platform != "linux" or platform.machine() != "x86_64", reason="QNN's simulator")
def test_an_old_c_library_is_told(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.31"))
    assert RUNNERS["qnn"].missing == "onnxruntime-qnn needs glibc 2.35 or newer, and here is 2.31"
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert "here is another C library" in RUNNERS["qnn"].missing


def test_on_arm64_nothing_is_emulated(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert RUNNERS["arm64"].interpreter() == Interpreter((sys.executable,))
    assert RUNNERS["arm64"].missing is None and RUNNERS["arm64"].job({})["device"] is None


@pytest.mark.skipif(sys.platform != "linux", reason="Vulkan's drivers are looked up on Linux")
def test_the_users_choice_of_a_vulkan_driver_stands(monkeypatch, tmp_path):
    monkeypatch.setenv("QGRAPH_RUNNERS", str(tmp_path))
    for name in ("VK_DRIVER_FILES", "VK_ICD_FILENAMES"):
        monkeypatch.delenv(name, raising=False)
    driver = tmp_path / "vulkan" / "usr" / "share" / "vulkan" / "icd.d" / "lvp_icd.x86_64.json"
    driver.parent.mkdir(parents=True)
    driver.touch()
    assert places.vulkan()["VK_DRIVER_FILES"] == str(driver)
    monkeypatch.setenv("VK_ICD_FILENAMES", "/elsewhere.json")
    assert places.vulkan() == {}


def test_the_worker_knows_nothing_of_us():
    """It must run where qgraph is not, and our modules' names must not hide those of that Python."""
    path = Path(worker.__file__)
    code = f"""import runpy, sys
sys.path.insert(0, {str(path.parent)!r})
runpy.run_path({str(path)!r}, run_name="other")
print([one for one in sys.modules if one.split(".")[0] in ("qgraph", "onnx", "onnx_ir", "base", "python", "places")])
print({str(path.parent)!r} in sys.path)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n") == ["[]", "False", ""]


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("signed", [False, True])
def test_small_integers_pack_as_onnx_packs_them(bits, signed):
    low, high = (-(1 << (bits - 1)), 1 << (bits - 1)) if signed else (0, 1 << bits)
    array = np.random.default_rng(bits).integers(low, high, 13).astype(np.int8 if signed else np.uint8)
    kind = getattr(ir.DataType, f"{'' if signed else 'U'}INT{bits}")
    expected = ir.Tensor(array.astype(kind.numpy()), dtype=kind).tobytes()
    packed = worker.pack(array, bits)
    assert packed.tobytes() == expected
    np.testing.assert_array_equal(worker.unpack(packed, bits, 13, signed), array)


# -- the real ones, as far as they are set up ---------------------------------------------------------------------


def present(name):
    if RUNNERS[name].missing is not None:
        pytest.skip(f"{RUNNERS[name].missing}; {RUNNERS[name].setup}")
    return RUNNERS[name]


@pytest.mark.parametrize("name", SET_UP)
def test_a_float_model_is_taken_whole_and_computed_right(name, fixed, model_kit):
    runner = dataclasses.replace(present(name), strict=True)
    feeds = [{"x": model_kit.normal(1, 3, 8, 8, seed=i)} for i in range(2)]
    ran = runner.run(fixed, feeds)
    assert {one.provider for one in ran.kernels} == {runner.provider}
    assert {"first", "fourth"} <= {node.partition("_token_")[0] for node in ran.assigned[runner.provider]}
    with Session(fixed) as session:
        for found, one in zip(ran.outputs, feeds, strict=True):
            expected = session.run(one)["y"]
            assert np.abs(found["y"] - expected).max() <= FLOATS.get(name, 1e-3) * np.abs(expected).max()


@pytest.mark.parametrize("name", SET_UP)
def test_a_quantized_model_is_computed_to_its_last_step(name, quantized, model_kit):
    runner = present(name)
    feeds = [{"x": model_kit.normal(1, 3, 8, 8, seed=i)} for i in range(2)]
    ran = runner.run(quantized, feeds)
    assert runner.provider in {one.provider for one in ran.kernels}
    with Session(quantized) as session:
        for found, one in zip(ran.outputs, feeds, strict=True):
            expected = session.run(one)["y"]
            assert np.ptp(expected) > 10 * STEP
            # One step of the output; arm64 has the very integer kernels of x86.
            limit = 0 if runner.emulates else 1.01 * STEP
            assert np.abs(found["y"] - expected).max() <= limit


def test_what_a_provider_leaves_to_the_processor_is_an_error_when_strict(model_kit, tmp_path):
    runner = present("qnn")
    # How many there are is known only when it runs, and the simulated chip has no such shapes.
    path = save(model_kit.text("m (float[2, 3, 4] x) => (int64[3, n] y) { y = NonZero (x) }"), tmp_path)
    feeds = [{"x": model_kit.normal(2, 3, 4)}]
    assert {one.provider for one in runner.run(path, feeds).kernels} == {HOST}
    with pytest.raises(ExecutionError, match=r"fallback to CPU EP has been explicitly disabled"):
        dataclasses.replace(runner, strict=True).run(path, feeds)


def test_emulated_processors_are_of_that_architecture(tmp_path):
    runner = present("arm64")
    if platform.machine() in ("aarch64", "arm64"):
        pytest.skip("this machine is one itself")
    assert runner.job({})["device"] == "an emulated cortex-a76"
    found, environment = runner.command(tmp_path)
    code = "import platform; print(platform.machine())"
    done = subprocess.run(
        [*found[:-2], "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "aarch64"


def test_every_name_is_there_once():
    assert len({one.name for one in runners()}) == len(runners()) == len(SET_UP)
    assert importlib.util.find_spec("qgraph.runners.worker") is not None
