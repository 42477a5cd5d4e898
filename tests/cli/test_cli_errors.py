"""Every error is one message and an exit code, and leaves nothing behind."""

import re

import onnx_ir as ir
import pytest

from qgraph import bench as timing
from qgraph import compare, report

pytestmark = pytest.mark.usefixtures("model_free_cpu")
QUIET = ("--bench-seconds", 0)
GOOD = ("--data", "data.npz", *QUIET)


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
def test_optimize_errors(run, listing, work, arguments, words):
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
def test_wrong_usage_exits_with_2(run, work, arguments, words):
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
def test_errors_of_the_other_commands(run, listing, work, command, model, data, target, words):
    before = listing(work)
    models = (model,) if command == "inspect" else ("m.onnx", model) if model != "m.onnx" else (model, model)
    found = run(command, *models, "--data", data, "--target", target)
    assert found.exit_code == 1, found.output
    assert re.search(words, found.output), found.output
    assert len(found.output.strip().splitlines()) == 1
    assert listing(work) == before


def test_validate_of_models_with_other_inputs(run, work):
    found = run("validate", "m.onnx", "relu.onnx", "--data", "data.npz")
    assert found.exit_code == 1
    assert found.output.startswith("Error: ")


def test_bench_of_models_with_other_inputs(run, work, model_kit):
    other = model_kit.text("g (float[n, 3] x) => (float[n, 3] y) { y = Relu (x) }")
    ir.save(other, "other.onnx")
    found = run("bench", "m.onnx", "other.onnx", "--data", "data.npz", "--seconds", 0.1, "--threads", 1)
    assert found.exit_code == 1
    assert found.output.startswith("Error: ")


def test_a_slower_result_exits_with_1_and_writes_nothing(run, listing, work, model_kit, monkeypatch):
    before = listing(work)
    one = report.Latency(1, 1, 1)
    monkeypatch.setattr(timing, "alternate", lambda *_, **__: report.Speed(1, one, one, 0.5, 0.5, 0.5, 3))
    model_kit.node_times(monkeypatch)
    found = run("optimize", "m.onnx", "out.onnx", "--data", "data.npz")
    assert found.exit_code == 1, found.output
    assert "0.50x" in found.output and "--force" in found.output
    assert listing(work) == before


@pytest.mark.parametrize("error, words", [(KeyboardInterrupt, "Interrupted"), (MemoryError, "Out of memory")])
def test_interrupt_and_lack_of_memory(run, listing, work, monkeypatch, error, words):
    before = listing(work)

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(compare.Reference, "compare", fail)
    found = run("optimize", "m.onnx", "out.onnx", *GOOD)
    assert found.exit_code == 1, found.output
    assert words in found.output
    assert listing(work) == before


def test_unwritable_folder(run, work):
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
def test_nothing_that_is_read_or_written_is_overwritten(run, work, arguments, words):
    before = (work / "data.npz").read_bytes(), (work / "m.onnx").read_bytes()
    found = run("optimize", "m.onnx", *arguments, "--bench-seconds", 0)
    assert found.exit_code == 1
    assert words in " ".join(found.output.split())
    assert before == ((work / "data.npz").read_bytes(), (work / "m.onnx").read_bytes())
