"""Options: any as a keyword, each checked where it is set, and an unknown one names the nearest."""

import dataclasses

import pytest

import qgraph
from qgraph.errors import OptionError

QUIET = qgraph.Options(bench_seconds=0)


# One way to quantize, and no budget that would send a noisy node back to float.
INT8 = qgraph.Options(bench_seconds=0, scheme="int8", max_loss="100%")


def test_any_option_as_a_keyword(model_kit, model_free_cpu, mlp):
    data = model_kit.feeds(mlp)
    base = dataclasses.replace(INT8, observer="minmax", keep_float=("h_Gemm",))
    report = qgraph.optimize(mlp, data=data, options=base, keep_float=("y_Gemm",)).report
    assert [node.name for node in report.quantized] == ["h_Gemm", "k_Gemm"], "on top of the options"
    assert not report.speed
    with pytest.raises(OptionError, match="x86-vnni"):
        qgraph.optimize(mlp, data=data, target="x86-vni")
    report = qgraph.optimize(
        mlp, data=data, keep_float=("y_Gemm",), bench_seconds=0, scheme="int8", max_loss="100%"
    ).report
    assert [node.name for node in report.quantized] == ["h_Gemm", "k_Gemm"]
    assert base.keep_float == ("h_Gemm",)
    for name, near in (("keepfloat", "keep_float"), ("bench_second", "bench_seconds"), ("obsever", "observer")):
        with pytest.raises(OptionError, match=rf"Unknown option '{name}'. Did you mean '{near}'"):
            qgraph.optimize(mlp, data=data, **{name: 1})


@pytest.mark.parametrize(
    "change, words",
    [
        ({"keep_float": "Gemm"}, r"write \('Gemm',\)"),
        ({"observer": "minmix"}, "minmax"),
        ({"ranges": "r.npz", "observer": "minmax"}, "either the ranges or an observer"),
        ({"memory": 0}, "memory must be positive"),
        ({"bench_seconds": -1}, "bench_seconds and time_limit not negative"),
        ({"time_limit": -1}, "bench_seconds and time_limit not negative"),
        ({"max_loss": "one"}, "at least 0.*'one'"),
        ({"min_cosine": 1.5}, "min_cosine lies between 0 and 1"),
        ({"min_agreement": -0.5}, "min_agreement lies between 0 and 1"),
        ({"min_sqnr": float("nan")}, "min_sqnr is a finite number"),
        ({"metric": "cosin"}, "Did you mean 'cosine'"),
        ({"metric": "sqnr", "max_loss": "1"}, "--min-sqnr"),
    ],
)
def test_options_check_themselves(mlp, change, words):
    with pytest.raises(OptionError, match=words):
        qgraph.Options(**change)
    with pytest.raises(OptionError, match=words):
        dataclasses.replace(QUIET, **change)
    with pytest.raises(OptionError, match=words):
        qgraph.optimize(mlp, data=[], **change)


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"target": "x86-vni"}, OptionError, "x86-vnni"),
        ({"scheme": "int9"}, OptionError, "int8"),
        ({"observer": "minmix"}, OptionError, "minmax"),
        ({"keep_float": ("Gem",)}, OptionError, "Gemm"),
    ],
)
def test_unknown_options_name_the_nearest(model_kit, untouched, standing, mlp, change, error, words):
    with pytest.raises(error, match=words):
        qgraph.optimize(
            standing / "in.onnx",
            standing / "out.onnx",
            data=model_kit.feeds(mlp),
            options=dataclasses.replace(QUIET, **change),
        )
    untouched(standing)


@pytest.mark.parametrize("change", [{"scheme": "int8-dynamic"}, {"scheme": "fp32"}, {"data": None}])
def test_an_observer_that_has_nothing_to_observe_is_an_error(model_kit, mlp, change):
    job = {"data": model_kit.feeds(mlp), "observer": "minmax", "bench_seconds": 0, **change}
    with pytest.raises(OptionError, match="leave out the observer"):
        qgraph.optimize(mlp, **job)
