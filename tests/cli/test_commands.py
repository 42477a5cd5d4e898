"""Every command on a tiny model."""

import json
import re

import numpy as np
import onnx
import pytest

import qgraph

pytestmark = pytest.mark.usefixtures("model_free_cpu")
QUIET = ("--bench-seconds", 0)


@pytest.mark.parametrize("data", ["data.npz", "data.npy"])
def test_optimize(run, work, model_kit, data):
    found = run("optimize", "m.onnx", "out.onnx", "--data", data, *QUIET, "--report", "r.json")
    assert found.exit_code == 0, found.output
    assert "2 nodes quantized: 2 Gemm as QGemm" in found.output
    assert "dB" in found.output and "0 nodes in float" in found.output
    onnx.checker.check_model(onnx.load("out.onnx"))
    plain = json.loads((work / "r.json").read_text())
    assert plain["source"] == "m.onnx" and plain["output"] == "out.onnx"
    assert {node["kernel"] for node in plain["nodes"]} == {"QGemm"}
    feeds = [{"image": np.load("data.npy")[i : i + 1]} for i in range(12)]
    assert model_kit.sqnr(work / "m.onnx", work / "out.onnx", feeds) > 25
    assert not list(work.glob(".*"))


def test_optimize_with_every_option(run, work):
    found = run(
        *("optimize", "m.onnx", "out.onnx", "--data", "data.npz", "--eval", "data.npy", "--target", "cpu"),
        *("--scheme", "int8", "--observer", "minmax", "--keep-float", "/net/?", "--memory", 1, "--force"),
        *("--bench-seconds", 0.1, "--report", "r.json", "--save-ranges", "ranges.npz", "--state", "state.json"),
        *("--max-loss", "90%", "--metric", "agreement", "--min-sqnr", 5, "--min-cosine", 0.5, "--min-agreement", 0.1),
        *("--time-limit", 30, "--override", "Gemm=int8", "--save-config", "c.toml"),
    )
    assert found.exit_code == 0, found.output
    plain = json.loads((work / "r.json").read_text())
    # Which of the two is faster is for the clock to say; in the one that is quantized it is this node.
    assert {node["name"]: node["scheme"] for node in plain["nodes"] if node["kernel"]} in ({}, {"/net/logits": "int8"})
    assert plain["speed"] and not plain["fidelity"]["held_back"], "it is the same data"
    assert any(note.startswith("12 of the 12 runs of the evaluation data") for note in plain["notes"])
    text, margin = plain["budget"]["text"].split(" (", 1)
    assert text == "loss of agreement at most 90%, SQNR at least 5 dB, cosine at least 0.5, agreement at least 0.1"
    assert margin.startswith("losses on ") and "-fold" in margin
    assert {one["name"]: one["nodes"] for one in plain["candidates"]} == {"fp32": {}, "fastest": {"int8": 1}}
    assert (work / "state.json").is_file() and (work / "c.toml").is_file()
    assert (work / "ranges.npz").is_file()


def test_optimize_with_test_data_sets(run, work):
    for i, row in enumerate(np.load("data.npy")):
        folder = work / "sets" / f"test_data_set_{i}"
        folder.mkdir(parents=True)
        (folder / "input_0.pb").write_bytes(onnx.numpy_helper.from_array(row[None], "image").SerializeToString())
    assert run("optimize", "m.onnx", "out.onnx", "--data", "sets", *QUIET).exit_code == 0


def test_optimize_with_a_function(run, work):
    (work / "my_feeds.py").write_text(
        "import numpy as np\ndef feeds():\n    for row in np.load('data.npy'):\n        yield {'image': row[None]}\n"
    )
    found = run("optimize", "m.onnx", "out.onnx", "--data", "my_feeds:feeds", *QUIET)
    assert found.exit_code == 0, found.output


def test_inspect(run, work):
    found = run("inspect", "m.onnx")
    assert found.exit_code == 0, found.output
    assert "opset 21" in found.output and "2 Gemm" in found.output and "image" in found.output
    assert re.search(r"nodes quantized:.*2 Gemm as QGemm", found.output)
    assert "Give --data" in found.output
    assert "Give --data" not in run("inspect", "m.onnx", "--data", "data.npz").output
    assert not list(work.glob(".*"))


def test_inspect_of_a_model_with_nothing_to_quantize_says_why(run, work):
    found = run("inspect", "relu.onnx")
    assert found.exit_code == 0, found.output
    assert "no integer kernel for Relu" in found.output


def test_validate(run, work):
    found = run("validate", "m.onnx", "m.onnx", "--data", "data.npz")
    assert found.exit_code == 0, found.output
    assert "identical" in found.output and "logits" in found.output and "100.00%" in found.output
    run("optimize", "m.onnx", "out.onnx", "--data", "data.npz", *QUIET)
    found = run("validate", "m.onnx", "out.onnx", "--data", "data.npz")
    assert re.search(r"logits\s+\d\d\.\d dB", found.output), found.output


def test_bench(run, work):
    found = run("bench", "m.onnx", "m.onnx", "--data", "data.npz", "--seconds", 0.1, "--threads", 1)
    assert found.exit_code == 0, found.output
    assert "1 thread " in found.output and re.search(r"\d\.\d\dx (faster|slower)", found.output)


def test_targets_and_passes(run, work):
    found = run("targets")
    assert found.exit_code == 0
    assert all(word in found.output for word in ("cpu", "x86-vnni", "arm64", "CPUExecutionProvider", "int8"))
    found = run("passes")
    assert found.exit_code == 0
    assert all(word in found.output for word in ("Canonicalize", "Annotate", "static", "plan"))


def test_version_and_help(run, work):
    assert qgraph.__version__ in run("--version").output
    for command in ("optimize", "sensitivity", "inspect", "validate", "bench", "targets", "passes"):
        found = run(command, "-h")
        assert found.exit_code == 0 and command in found.output
