"""The command line: every command on a tiny model, and every error as one message, exit code and no leftovers."""

import json
import re

import click.testing
import numpy as np
import onnx
import onnx_ir as ir
import pytest

import qgraph
from qgraph import bench as timing
from qgraph import compare, report
from qgraph.cli import main

pytestmark = pytest.mark.usefixtures("model_free_cpu")


@pytest.fixture
def work(model_kit, tmp_path, monkeypatch):
    """A folder with a model, its data, and other data that is wrong in one way each; it is the current folder."""
    n = model_kit.normal
    model = model_kit.text(
        """g (float[batch, 16] image) => (float[batch, 4] logits) {
            h = Gemm <transB = 1> (image, W, b)
            r = Relu (h)
            logits = Gemm <transB = 1> (r, V)
        }""",
        W=n(16, 16),
        b=n(16),
        V=n(4, 16),
    )
    for node in model.graph:
        node.name = f"/net/{node.outputs[0].name}"
    monkeypatch.chdir(tmp_path)
    ir.save(model, "m.onnx")
    good = n(12, 16, seed=1)
    np.savez("data.npz", image=good)
    np.save("data.npy", good)
    np.savez("nan.npz", image=np.where(np.arange(16) == 3, np.nan, good))
    np.savez("inf.npz", image=np.where(np.arange(16) == 3, np.inf, good))
    np.savez("named.npz", imag=good)
    np.savez("shape.npz", image=good[:, :5])
    np.savez("type.npz", image=good.astype(np.int64))
    np.savez("none.npz", image=good[:0])
    (tmp_path / "text.onnx").write_text("this is no model")
    (tmp_path / "empty.onnx").write_bytes(b"")
    (tmp_path / "text.npz").write_text("this is no data")
    (tmp_path / "void").mkdir()
    tiny = model_kit.text("g (float[2, 16] image) => (float[2, 16] y) { y = Relu (image) }")
    ir.save(tiny, "relu.onnx")
    return tmp_path


def run(*arguments):
    found = click.testing.CliRunner().invoke(main, [str(a) for a in arguments], terminal_width=200)
    assert found.exception is None or isinstance(found.exception, SystemExit), found.exception
    return found


def listing(folder):
    return {p.relative_to(folder): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


QUIET = ("--bench-seconds", 0)
GOOD = ("--data", "data.npz", *QUIET)


# -- commands -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", ["data.npz", "data.npy"])
def test_optimize(work, model_kit, data):
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


def test_optimize_with_every_option(work):
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
    assert plain["speed"] and plain["fidelity"]["held_back"]
    text, margin = plain["budget"]["text"].split(" (", 1)
    assert text == "loss of agreement at most 90%, SQNR at least 5 dB, cosine at least 0.5, agreement at least 0.1"
    assert margin.startswith("losses on ") and margin.endswith("-fold)")
    assert {one["name"]: one["nodes"] for one in plain["candidates"]} == {"fp32": {}, "fastest": {"int8": 1}}
    assert (work / "state.json").is_file() and (work / "c.toml").is_file()
    assert (work / "ranges.npz").is_file()


def test_optimize_with_test_data_sets(work):
    for i, row in enumerate(np.load("data.npy")):
        folder = work / "sets" / f"test_data_set_{i}"
        folder.mkdir(parents=True)
        (folder / "input_0.pb").write_bytes(onnx.numpy_helper.from_array(row[None], "image").SerializeToString())
    assert run("optimize", "m.onnx", "out.onnx", "--data", "sets", *QUIET).exit_code == 0


def test_optimize_with_a_function(work):
    (work / "my_feeds.py").write_text(
        "import numpy as np\ndef feeds():\n    for row in np.load('data.npy'):\n        yield {'image': row[None]}\n"
    )
    found = run("optimize", "m.onnx", "out.onnx", "--data", "my_feeds:feeds", *QUIET)
    assert found.exit_code == 0, found.output


def test_inspect(work):
    found = run("inspect", "m.onnx")
    assert found.exit_code == 0, found.output
    assert "opset 21" in found.output and "2 Gemm" in found.output and "image" in found.output
    assert re.search(r"nodes quantized:.*2 Gemm as QGemm", found.output)
    assert "Give --data" in found.output
    assert "Give --data" not in run("inspect", "m.onnx", "--data", "data.npz").output
    assert not list(work.glob(".*"))


def test_inspect_of_a_model_with_nothing_to_quantize_says_why(work):
    found = run("inspect", "relu.onnx")
    assert found.exit_code == 0, found.output
    assert "no integer kernel for Relu" in found.output


def test_validate(work):
    found = run("validate", "m.onnx", "m.onnx", "--data", "data.npz")
    assert found.exit_code == 0, found.output
    assert "identical" in found.output and "logits" in found.output and "100.00%" in found.output
    run("optimize", "m.onnx", "out.onnx", "--data", "data.npz", *QUIET)
    found = run("validate", "m.onnx", "out.onnx", "--data", "data.npz")
    assert re.search(r"logits\s+\d\d\.\d dB", found.output), found.output


def test_bench(work):
    found = run("bench", "m.onnx", "m.onnx", "--data", "data.npz", "--seconds", 0.1, "--threads", 1)
    assert found.exit_code == 0, found.output
    assert "1 thread " in found.output and re.search(r"\d\.\d\dx (faster|slower)", found.output)


def test_targets_and_passes(work):
    found = run("targets")
    assert found.exit_code == 0
    assert all(word in found.output for word in ("cpu", "x86-vnni", "arm64", "CPUExecutionProvider", "int8"))
    found = run("passes")
    assert found.exit_code == 0
    assert all(word in found.output for word in ("Canonicalize", "Annotate", "static", "plan"))


def test_version_and_help(work):
    assert qgraph.__version__ in run("--version").output
    for command in ("optimize", "sensitivity", "inspect", "validate", "bench", "targets", "passes"):
        found = run(command, "-h")
        assert found.exit_code == 0 and command in found.output


# -- the search -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["int8", "int8-dynamic", "int8-weights", "fp32", "auto"])
def test_schemes(work, scheme):
    found = run(
        "optimize", "m.onnx", "out.onnx", "--data", "data.npz", "--scheme", scheme, *QUIET, "--report", "r.json",
        *(["--force"] if scheme == "int8-weights" else []),
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    nodes = json.loads((work / "r.json").read_text())["nodes"]
    seen = {node["scheme"] for node in nodes if node["kernel"]}
    assert seen <= {scheme} or scheme == "auto"
    # Rows of 16 weights are less than a block of 128: there is nothing to do, and the reason says so.
    if scheme == "int8-weights":
        assert {node["reason"] for node in nodes if node["op_type"] == "Gemm"} == {
            "its 16 rows are less than one block of 128"
        }
    elif scheme != "fp32":
        assert seen


def test_without_data_the_schemes_that_need_none(work):
    found = run("optimize", "m.onnx", "out.onnx", *QUIET, "--report", "r.json")
    assert found.exit_code == 0, found.output
    assert "random inputs, which says little" in " ".join(found.output.split())
    plain = json.loads((work / "r.json").read_text())
    assert {node["scheme"] for node in plain["nodes"] if node["kernel"]} == {"int8-dynamic"}
    assert plain["calibration_samples"] == 0


def test_overrides_by_name_go_before_operators(work):
    found = run(
        *("optimize", "m.onnx", "out.onnx", "--data", "data.npz", *QUIET, "--report", "r.json"),
        *("--override", "/net/h=int8-dynamic", "--override", "Gemm=float"),
    )
    assert found.exit_code == 0, found.output
    nodes = {node["name"]: node for node in json.loads((work / "r.json").read_text())["nodes"]}
    assert nodes["/net/h"]["scheme"] == "int8-dynamic"
    assert nodes["/net/logits"]["reason"] == "left in float by the option 'Gemm'"


def test_labels_and_metrics(work):
    rows = np.load("data.npy")
    scores = qgraph.session.Session(work / "m.onnx").run({"image": rows})["logits"]
    np.savez("labelled.npz", image=rows, labels=scores.argmax(axis=1))
    (work / "mine.py").write_text("def constant(outputs):\n    return sum(len(o['logits']) for _, o in outputs)\n")
    for metric, words in (("top1", "loss of top1 at most 1%"), ("top5", "top5"), ("mine:constant", "mine:constant")):
        found = run(
            *("optimize", "m.onnx", "out.onnx", "--data", "labelled.npz", "--metric", metric, *QUIET),
            *("--report", "r.json"),
        )
        assert found.exit_code == 0, found.output
        assert words in json.loads((work / "r.json").read_text())["budget"]["text"]


def test_state_is_taken_up_again(work):
    command = ("optimize", "m.onnx", "out.onnx", "--data", "data.npz", *QUIET, "--state", "state.json")
    first = run(*command)
    assert first.exit_code == 0, first.output
    result, state = (work / "out.onnx").read_bytes(), json.loads((work / "state.json").read_text())
    second = run(*command)
    assert "candidates were measured before" in second.output.replace("\n", " ")
    assert (work / "out.onnx").read_bytes() == result
    assert json.loads((work / "state.json").read_text()) == state
    # What was measured under other conditions says nothing about these.
    np.savez("other.npz", image=np.load("data.npy")[::-1] + 1)
    others = (("--min-sqnr", 20), ("--data", "other.npz"), ("--keep-float", "/net/h"), ("--override", "/net/h=int8"),
              ("--observer", "minmax"), ("--scheme", "int8"), ("--target", "arm64"))  # fmt: skip
    for change in others:
        found = run(*command, *change)
        assert found.exit_code == 1, change
        assert "another model, other data or other options" in " ".join(found.output.split()), change
    assert json.loads((work / "state.json").read_text()) == state


def test_an_interrupted_search_writes_the_best_it_has(work, monkeypatch):
    """Ctrl-C while the quantized candidate is judged: what was found until then is a result all the same."""
    real, calls = compare.Reference.compare, []

    def fail(*args, **more):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **more)

    monkeypatch.setattr(compare.Reference, "compare", fail)
    found = run("optimize", "m.onnx", "out.onnx", *GOOD, "--report", "r.json")
    assert found.exit_code == 0, found.output
    assert "interrupted" in found.output
    assert {one["name"]: one["verdict"] for one in json.loads((work / "r.json").read_text())["candidates"]} == {
        "fp32": "chosen"
    }
    onnx.checker.check_model(onnx.load("out.onnx"))
    assert not list(work.glob(".*"))


def test_options_from_a_file(work):
    (work / "c.toml").write_text(
        'scheme = "int8"\nmax-loss = "50%"\nbench_seconds = 0\ndata = "data.npz"\nreport = "r.json"\n'
        'keep-float = ["/net/h"]\n[override]\n"/net/l*" = "int8-dynamic"\n'
    )
    found = run("optimize", "m.onnx", "out.onnx", "--config", "c.toml")
    assert found.exit_code == 0, found.output
    plain = json.loads((work / "r.json").read_text())
    assert plain["scheme"] == "int8" and plain["budget"]["limit"] == 0.5
    assert {node["name"]: node["scheme"] for node in plain["nodes"] if node["kernel"]} == {
        "/net/logits": "int8-dynamic"
    }
    # The command line goes before the file, option by option.
    found = run("optimize", "m.onnx", "out.onnx", "--scheme", "fp32", "--max-loss", "2%", "--config", "c.toml")
    assert found.exit_code == 0, found.output
    plain = json.loads((work / "r.json").read_text())
    assert plain["scheme"] == "fp32" and plain["budget"]["limit"] == 0.02


def test_options_saved_to_a_file_give_the_same_result(work):
    options = (
        *("--data", "data.npz", "--scheme", "int8", "--max-loss", "30%", "--keep-float", "/net/h", "--memory", 3),
        *("--override", "/net/l*=int8-dynamic", "--observer", "minmax", *QUIET),
    )
    assert run("optimize", "m.onnx", "a.onnx", *options, "--save-config", "c.toml").exit_code == 0
    text = (work / "c.toml").read_text()
    assert "save" not in text and "config" not in text and "metric" not in text, "what was not given is not written"
    found = run("optimize", "m.onnx", "b.onnx", "--config", "c.toml")
    assert found.exit_code == 0, found.output
    assert (work / "a.onnx").read_bytes() == (work / "b.onnx").read_bytes()


@pytest.mark.parametrize(
    "text, words",
    [
        ("schema = 'int8'", "key in 'c.toml': 'schema'.*Did you mean 'scheme'"),
        ("max_los = '1%'", "'max_los'.*Did you mean 'max-loss'"),
        ("config = 'other.toml'", "key in 'c.toml': 'config'"),
        ("override = 'Gemm=int8'", "override is a table"),
        ("keep-float = [1]", "neither a number, a text nor a list of texts"),
        ("[scheme]\nx = 1", "neither a number, a text nor a list of texts"),
        ("scheme = ", "Cannot read the configuration 'c.toml'"),
        ("scheme = 'int9'", "Did you mean 'int8'"),
    ],
)
def test_errors_in_a_file_of_options(work, text, words):
    (work / "c.toml").write_text(text)
    before = listing(work)
    found = run("optimize", "m.onnx", "out.onnx", *GOOD, "--config", "c.toml")
    assert found.exit_code == 1, found.output
    assert re.search(words, " ".join(found.output.split())), found.output
    assert found.output.startswith("Error: ") and listing(work) == before


def test_a_wrong_type_in_a_file_of_options_is_a_message(work):
    (work / "c.toml").write_text("memory = 'much'")
    found = run("optimize", "m.onnx", "out.onnx", *GOOD, "--config", "c.toml")
    assert found.exit_code == 2 and "--memory" in found.output and "Traceback" not in found.output


def test_sensitivity(work):
    before = listing(work)
    found = run("sensitivity", "m.onnx", "--data", "data.npz", "--exact", 1)
    assert found.exit_code == 0, found.output
    assert listing(work) == before, "nothing is written"
    rows = [line.split() for line in found.output.splitlines() if "Gemm" in line]
    assert {row[0] for row in rows} == {"/net/h", "/net/logits"}
    assert {row[2] for row in rows} == {"int8", "int8-dynamic"}
    assert [row[-1] for row in rows].count("measured") == 1
    decibels = [float(row[3]) for row in rows]
    assert decibels == sorted(decibels), "worst first"
    assert all(20 < value < 70 for value in decibels)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("relu.onnx", "--data", "data.npz"), "No node has a kernel in scheme 'auto'"),
        (("m.onnx", "--data", "data.npz", "--scheme", "int9"), "Did you mean 'int8'"),
        (("m.onnx", "--data", "data.npz", "--scheme", "fp32"), "No node has a kernel in scheme 'fp32'"),
        (("m.onnx", "--data", "data.npz", "--scheme", "int8-weights"), "No node has a kernel in scheme 'int8-weights'"),
        (("no.onnx", "--data", "data.npz"), "no model file"),
        (("m.onnx", "--data", "nan.npz"), "NaN"),
    ],
)
def test_errors_of_sensitivity(work, arguments, words):
    before = listing(work)
    found = run("sensitivity", *arguments)
    assert found.exit_code == 1, found.output
    assert found.output.startswith("Error: ") and re.search(words, " ".join(found.output.split())), found.output
    assert listing(work) == before


# -- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("no.onnx", "out.onnx", *GOOD), "no model file 'no.onnx'"),
        (("void", "out.onnx", *GOOD), "no model file 'void'"),
        (("text.onnx", "out.onnx", *GOOD), "not a readable ONNX model|not an ONNX model"),
        (("empty.onnx", "out.onnx", *GOOD), "not an ONNX model"),
        (("data.npz", "out.onnx", *GOOD), "not a readable ONNX model|not an ONNX model"),
        (("m.onnx", "m.onnx", *GOOD), "replace the input"),
        (("m.onnx", "no/out.onnx", *GOOD), "'.*/no' does not exist"),
        (("m.onnx", "void", *GOOD), "is a folder"),
        (("m.onnx", "out.onnx", *GOOD, "--target", "x86-vni"), "Did you mean 'x86-vnni'"),
        (("m.onnx", "out.onnx", *GOOD, "--scheme", "int9"), "Did you mean 'int8'"),
        (("m.onnx", "out.onnx", *GOOD, "--observer", "minmx"), "Did you mean 'minmax'"),
        (("m.onnx", "out.onnx", *GOOD, "--keep-float", "/net/logitz"), "Did you mean '/net/logits'"),
        (("m.onnx", "out.onnx", *QUIET, "--data", "dta.npz"), "Did you mean 'data.npz'"),
        (("m.onnx", "out.onnx", *QUIET, "--data", "no/where"), "no data at 'no/where'"),
        (("m.onnx", "out.onnx", *QUIET, "--data", "nan.npz"), r"'image' of 'nan.npz\[0\]' holds NaN"),
        (("m.onnx", "out.onnx", *QUIET, "--data", "inf.npz"), r"'image' of 'inf.npz\[0\]' holds infinite"),
        (("m.onnx", "out.onnx", *QUIET, "--data", "named.npz"), "holds 'imag'.*Did you mean 'image'"),
        (("m.onnx", "out.onnx", *QUIET, "--data", "shape.npz"), "shape 1x5, but the model takes .x16"),
        (("m.onnx", "out.onnx", *QUIET, "--data", "type.npz"), "int64, but the model takes float32"),
        (("m.onnx", "out.onnx", *QUIET, "--data", "none.npz"), "no data"),
        (("m.onnx", "out.onnx", *QUIET, "--data", "void"), "holds no .npz"),
        (("m.onnx", "out.onnx", *QUIET, "--data", "text.npz"), "Cannot read 'text.npz'"),
        (("m.onnx", "out.onnx", *QUIET, "--data", "text.onnx"), "'text.onnx' is none of"),
        (("m.onnx", "out.onnx", *QUIET, "--data", "nomodule:f"), "Cannot import 'nomodule:f'"),
        (("m.onnx", "out.onnx", *QUIET, "--data", "json:__name__"), "not a function"),
        (("m.onnx", "out.onnx", *GOOD, "--eval", "nan.npz"), "holds NaN"),
        (("m.onnx", "out.onnx", *GOOD, "--ranges", "no.npz"), "Cannot read ranges from 'no.npz'"),
        (("m.onnx", "out.onnx", *GOOD, "--ranges", "data.npz"), "no ranges written by qgraph"),
        (("m.onnx", "out.onnx", *GOOD, "--ranges", "no.npz", "--observer", "minmax"), "bring their observer"),
        (("m.onnx", "out.onnx", *GOOD, "--report", "no/r.json"), "Cannot write to 'no/r.json'"),
        (("m.onnx", "out.onnx", *GOOD, "--save-ranges", "no/r.npz"), "Cannot write to 'no/r.npz'"),
        (("m.onnx", "out.onnx", *GOOD, "--override", "Gemm"), "An override is PATTERN=SCHEME"),
        (("m.onnx", "out.onnx", *GOOD, "--override", "=int8"), "An override is PATTERN=SCHEME"),
        (("m.onnx", "out.onnx", *GOOD, "--override", "Gemm=int9"), "Did you mean 'int8'"),
        (("m.onnx", "out.onnx", *GOOD, "--override", "Gem=int8"), "Did you mean 'Gemm'"),
        (("m.onnx", "out.onnx", *GOOD, "--override", "/net/r=int8"), "'/net/r' cannot be 'int8'.*no integer kernel"),
        (("m.onnx", "out.onnx", *GOOD, "--max-loss", "much"), "at least 0.*'much'"),
        (("m.onnx", "out.onnx", *GOOD, "--max-loss", "-1"), "at least 0.*'-1'"),
        (("m.onnx", "out.onnx", *GOOD, "--metric", "cosin"), "Did you mean 'cosine'"),
        (("m.onnx", "out.onnx", *GOOD, "--metric", "nowhere:f"), "Cannot import metric 'nowhere:f'"),
        (("m.onnx", "out.onnx", *GOOD, "--metric", "json:dumps"), "metric's function failed"),
        (("m.onnx", "out.onnx", *GOOD, "--metric", "top1"), "needs right answers: an array 'labels'"),
        (("m.onnx", "out.onnx", *GOOD, "--metric", "sqnr"), "--min-sqnr"),
        (("m.onnx", "out.onnx", *GOOD, "--min-cosine", 2), "between 0 and 1"),
        (("m.onnx", "out.onnx", *GOOD, "--min-sqnr", "nan"), "finite number of dB"),
        (("m.onnx", "out.onnx", *GOOD, "--state", "no/s.json"), "Cannot write to 'no/s.json'"),
        (("m.onnx", "out.onnx", *GOOD, "--state", "text.onnx"), "'text.onnx' holds no state of a search"),
        (("m.onnx", "out.onnx", *GOOD, "--save-config", "no/c.toml"), "Cannot write to 'no/c.toml'"),
        (("m.onnx", "out.onnx", *GOOD, "--config", "no.toml"), "Cannot read the configuration 'no.toml'"),
        (("m.onnx", "out.onnx", *GOOD, "--config", "text.onnx"), "Cannot read the configuration 'text.onnx'"),
        (("m.onnx", "out.onnx", "--bench-seconds", 0, "--scheme", "int8"), "needs calibration data"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_optimize_errors(work, arguments, words):
    before = listing(work)
    found = run("optimize", *arguments)
    assert found.exit_code == 1, found.output
    assert re.search(words, found.output.replace("\n", " ")), found.output
    assert found.output.startswith("Error: ") and "Traceback" not in found.output
    assert len(found.output.strip().splitlines()) == 1
    assert listing(work) == before


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("optimize", "m.onnx"), "Missing argument"),
        (("optimize", "m.onnx", "out.onnx", *GOOD, "--schema", "int8"), "No such option.*--scheme"),
        (("optimize", "m.onnx", "out.onnx", *GOOD, "--memory", 0), "--memory"),
        (("optimize", "m.onnx", "out.onnx", *GOOD, "--bench-seconds", "soon"), "--bench-seconds"),
        (("optimise", "m.onnx"), "No such command.*optimi[sz]e"),
        (("bench", "m.onnx", "m.onnx", "--data", "data.npz", "--threads", 0), "--threads"),
    ],
)
def test_wrong_usage_exits_with_2(work, arguments, words):
    found = run(*arguments)
    assert found.exit_code == 2
    assert re.search(words, found.output.replace("\n", " ")), found.output


@pytest.mark.parametrize("command", ["inspect", "validate", "bench"])
@pytest.mark.parametrize(
    "model, data, target, words",
    [
        ("no.onnx", "data.npz", "cpu", "no model file"),
        ("text.onnx", "data.npz", "cpu", "ONNX model"),
        ("m.onnx", "nan.npz", "cpu", "NaN"),
        ("m.onnx", "no.npz", "cpu", "no data at"),
        ("m.onnx", "data.npz", "x86-vni", "Did you mean 'x86-vnni'"),
    ],
)
def test_errors_of_the_other_commands(work, command, model, data, target, words):
    before = listing(work)
    models = (model,) if command == "inspect" else ("m.onnx", model) if model != "m.onnx" else (model, model)
    found = run(command, *models, "--data", data, "--target", target)
    assert found.exit_code == 1, found.output
    assert re.search(words, found.output), found.output
    assert len(found.output.strip().splitlines()) == 1
    assert listing(work) == before


def test_validate_of_models_with_other_inputs(work):
    found = run("validate", "m.onnx", "relu.onnx", "--data", "data.npz")
    assert found.exit_code == 1
    assert found.output.startswith("Error: ")


def test_bench_of_models_with_other_inputs(work, model_kit):
    other = model_kit.text("g (float[n, 3] x) => (float[n, 3] y) { y = Relu (x) }")
    ir.save(other, "other.onnx")
    found = run("bench", "m.onnx", "other.onnx", "--data", "data.npz", "--seconds", 0.1, "--threads", 1)
    assert found.exit_code == 1
    assert found.output.startswith("Error: ")


def test_a_slower_result_exits_with_1_and_writes_nothing(work, model_kit, monkeypatch):
    before = listing(work)
    one = report.Latency(1, 1, 1)
    monkeypatch.setattr(timing, "alternate", lambda *_, **__: report.Speed(1, one, one, 0.5, 0.5, 0.5, 3))
    model_kit.node_times(monkeypatch)
    found = run("optimize", "m.onnx", "out.onnx", "--data", "data.npz")
    assert found.exit_code == 1, found.output
    assert "0.50x" in found.output and "--force" in found.output
    assert listing(work) == before


@pytest.mark.parametrize("error, words", [(KeyboardInterrupt, "Interrupted"), (MemoryError, "Out of memory")])
def test_interrupt_and_lack_of_memory(work, monkeypatch, error, words):
    before = listing(work)

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(compare.Reference, "compare", fail)
    found = run("optimize", "m.onnx", "out.onnx", *GOOD)
    assert found.exit_code == 1, found.output
    assert words in found.output
    assert listing(work) == before


def test_unwritable_folder(work):
    (work / "locked").mkdir(mode=0o555)
    try:
        (work / "locked" / "try").write_text("")
    except OSError:
        found = run("optimize", "m.onnx", "locked/out.onnx", *GOOD)
        assert found.exit_code == 1 and "Cannot write" in found.output
    else:
        pytest.skip("this user may write everywhere")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("data.npz", "--data", "data.npz"), "output would replace the calibration data"),
        (("out.onnx", "--data", "data.npz", "--report", "m.onnx"), "report would replace the input"),
        (("out.onnx", "--data", "data.npz", "--report", "out.onnx"), "report would replace the output"),
        (("out.onnx", "--data", "data.npz", "--save-ranges", "data.npz"), "ranges would replace the calibration data"),
    ],
)
def test_nothing_that_is_read_or_written_is_overwritten(work, arguments, words):
    before = (work / "data.npz").read_bytes(), (work / "m.onnx").read_bytes()
    found = run("optimize", "m.onnx", *arguments, "--bench-seconds", 0)
    assert found.exit_code == 1
    assert words in " ".join(found.output.split())
    assert before == ((work / "data.npz").read_bytes(), (work / "m.onnx").read_bytes())
