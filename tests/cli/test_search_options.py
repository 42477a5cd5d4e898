"""The search from the command line: schemes, overrides, labels, states and files of options."""

import json
import re

import numpy as np
import onnx
import pytest

import qgraph
from qgraph import compare

pytestmark = pytest.mark.usefixtures("model_free_cpu")
QUIET = ("--bench-seconds", 0)
GOOD = ("--data", "data.npz", *QUIET)


@pytest.mark.parametrize("scheme", ["int8", "int8-dynamic", "int8-weights", "fp32", "auto"])
def test_schemes(run, work, scheme):
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


def test_without_data_the_schemes_that_need_none(run, work):
    found = run("optimize", "m.onnx", "out.onnx", *QUIET, "--report", "r.json")
    assert found.exit_code == 0, found.output
    assert "random inputs, which says little" in " ".join(found.output.split())
    plain = json.loads((work / "r.json").read_text())
    assert {node["scheme"] for node in plain["nodes"] if node["kernel"]} == {"int8-dynamic"}
    assert plain["calibration_samples"] == 0


def test_overrides_by_name_go_before_operators(run, work):
    found = run(
        *("optimize", "m.onnx", "out.onnx", "--data", "data.npz", *QUIET, "--report", "r.json"),
        *("--override", "/net/h=int8-dynamic", "--override", "Gemm=float"),
    )
    assert found.exit_code == 0, found.output
    nodes = {node["name"]: node for node in json.loads((work / "r.json").read_text())["nodes"]}
    assert nodes["/net/h"]["scheme"] == "int8-dynamic"
    assert nodes["/net/logits"]["reason"] == "left in float by the option 'Gemm'"


def test_labels_and_metrics(run, work):
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


def test_state_is_taken_up_again(run, work):
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


def test_an_interrupted_search_writes_the_best_it_has(run, work, monkeypatch):
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


def test_options_from_a_file(run, work):
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


def test_options_saved_to_a_file_give_the_same_result(run, work):
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
def test_errors_in_a_file_of_options(run, listing, work, text, words):
    (work / "c.toml").write_text(text)
    before = listing(work)
    found = run("optimize", "m.onnx", "out.onnx", *GOOD, "--config", "c.toml")
    assert found.exit_code == 1, found.output
    assert re.search(words, " ".join(found.output.split())), found.output
    assert found.output.startswith("Error: ") and listing(work) == before


def test_a_wrong_type_in_a_file_of_options_is_a_message(run, work):
    (work / "c.toml").write_text("memory = 'much'")
    found = run("optimize", "m.onnx", "out.onnx", *GOOD, "--config", "c.toml")
    assert found.exit_code == 2 and "--memory" in found.output and "Traceback" not in found.output


def test_sensitivity(run, listing, work):
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
def test_errors_of_sensitivity(run, listing, work, arguments, words):
    before = listing(work)
    found = run("sensitivity", *arguments)
    assert found.exit_code == 1, found.output
    assert found.output.startswith("Error: ") and re.search(words, " ".join(found.output.split())), found.output
    assert listing(work) == before
