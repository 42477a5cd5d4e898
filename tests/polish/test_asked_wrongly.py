"""Interrupts, and what is asked for wrongly."""

import os

import onnx_ir as ir
import pytest

import qgraph
from qgraph import options
from qgraph.complaints import complaint
from qgraph.errors import OptionError

GOOD = ("--data", "d.npz", "--bench-seconds", 0)


@pytest.mark.parametrize(
    ("arguments", "writes", "words_of"),
    [
        ((), False, "nothing was written."),
        (("--state", "s.json"), False, "nothing was measured yet that could be kept in s.json"),
        (("--state", "old.json"), False, "What was kept before is still there, in old.json."),
        (("--state", "s.json"), True, ", in s.json, from which the next run goes on"),
    ],
)
def test_an_interrupt_says_what_is_left(run, work, monkeypatch, arguments, writes, words_of):
    def interrupted(*_, **__):
        if writes:
            (work / "s.json").write_text("{}")
        raise KeyboardInterrupt

    (work / "old.json").write_text("{}")
    monkeypatch.setattr(qgraph, "optimize", interrupted)
    code, told = run("optimize", "m.onnx", "o.onnx", *GOOD, *arguments)
    assert code == 1 and "Interrupted before a first candidate" in told and words_of in told


@pytest.mark.parametrize("option", ["--report", "--save-ranges", "--state", "--save-config", None])
def test_nothing_takes_the_place_of_a_device(run, work, option):
    os.mkfifo("pipe")
    code, told = run("optimize", "m.onnx", *(["pipe"] if option is None else ["o.onnx", option, "pipe"]), *GOOD)
    assert code == 1 and "name a plain file" in told
    assert (work / "pipe").is_fifo() and not (work / "o.onnx").exists()
    for path in ("/dev/null", "/dev/stdout"):
        with pytest.raises(OptionError, match=f"'{path}' does not allow"):
            options.refuse_overwriting({"output": path}, {})


@pytest.mark.parametrize("option", ["--state", "--save-ranges", None])
def test_nothing_is_written_over_the_weights_of_the_input(run, net, work, option):
    ir.save(net, "e.onnx", external_data="e.data", size_threshold_bytes=0)
    before = (work / "e.data").read_bytes()
    code, told = run("optimize", "e.onnx", *(["e.data"] if option is None else ["o.onnx", option, "e.data"]), *GOOD)
    assert code == 1 and ("holds weights of the input" in told or "state of a search" in told)
    assert (work / "e.data").read_bytes() == before


@pytest.mark.parametrize(
    "wrong",
    [{"bench_seconds": float("inf")}, {"bench_seconds": float("nan")}, {"time_limit": float("nan")}, {"memory": 0}],
)
def test_times_that_are_none(wrong):
    with pytest.raises(OptionError, match="must be positive"):
        qgraph.Options(**wrong)


def test_a_qconfig_and_an_observer_exclude_each_other():
    with pytest.raises(OptionError, match="either the qconfig or an observer"):
        qgraph.Options(qconfig="fbgemm", observer="minmax")


def test_an_error_of_the_system_is_a_message(run, work):
    code, told = run("optimize", "m.onnx", "a" * 300 + ".onnx", *GOOD)
    assert code == 1 and told.startswith("Error: The system cannot use 'aaa") and "Traceback" not in told


def test_words_of_the_runtime_have_no_places_in_its_source():
    place = "/onnxruntime_src/onnxruntime/core/graph/model_load_utils.h:46 void onnxruntime::f(const std::map<int>&) "
    assert complaint(RuntimeError(f"[ONNXRuntimeError] : 1 : FAIL : {place}Opset 99 is not known")) == (
        "Opset 99 is not known"
    )
    told = complaint(
        RuntimeError("1 : FAIL : Load model from /tmp/x/model.onnx failed:Foo(-1) is not a registered function/op")
    )
    assert told.startswith("Foo(-1) is not a registered") and "libraries of your own" in told
