"""The table of kernels and its fit: what is timed is what it is about, and times give coefficients back."""

import hypothesis
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import strategies as st

from qgraph import profiles
from qgraph.profiling import fit as profile_fit
from qgraph.profiling import measure as profiling
from qgraph.profiling.rows import AROUND
from qgraph.session import Session, SessionOptions
from qgraph.targets import Refusal
from qgraph.targets.cpu import arm64, x86_vnni
from qgraph.targets.cpu_costs import COEFFICIENTS, SHIPPED

PRIOR = {**COEFFICIENTS, **AROUND}


@pytest.mark.parametrize("target", [x86_vnni(), arm64()], ids=lambda target: target.name)
def test_every_integer_model_runs_in_the_kernels_it_is_about(target, tmp_path):
    expected = {
        "conv": {"QLinearConv"},
        "matmul": {"QLinearMatMul", "DynamicQuantizeMatMul"},
        "blocks": {"MatMulNBits"},
        "mover": {"QLinearConcat", "QLinearGlobalAveragePool", "QLinearAveragePool", "Transpose", "Reshape", "Slice",
                  "Split"},
        "elementwise": {"QLinearSigmoid", "QLinearLeakyRelu", "QLinearAdd", "QLinearMul", "NhwcMaxPool", "MaxPool",
                        "Resize", "DepthToSpace"},
        "run": {"Reshape"},
    }  # fmt: skip
    allowed = {"Transpose", "QLinearConv"}
    # What the runtime does by itself on arm64 only.
    config = (("session.qdqisint8allowed", "1"),)
    for row in profiling.table(target):
        if row.table == "crossing":
            continue
        path = tmp_path / "optimized.onnx"
        with Session(row.after.build(), SessionOptions(threads=1, optimized=path, config=config)):
            pass
        found = {node.op_type for node in onnx.load(path, load_external_data=False).graph.node}
        assert found & expected[row.table], (row.name, found)
        assert found <= expected[row.table] | allowed, (row.name, found)


def test_crossings_cross_once(rows, tmp_path):
    for row in rows:
        if row.table == "crossing":
            for one, operator in ((row.before, "QuantizeLinear"), (row.after, "DequantizeLinear")):
                path = tmp_path / "optimized.onnx"
                with Session(one.build(), SessionOptions(threads=1, optimized=path)):
                    pass
                found = [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]
                assert found.count(operator) == 1, (one.name, found)
                assert "Conv" not in found or found.count("Conv") == found.count("QLinearConv") == 1


def test_numbers_of_the_models_are_finite(rows):
    for row in rows[::7]:
        for one in (row.before, row.after):
            model = one.build()
            with Session(model, SessionOptions(threads=1)) as session:
                for array in session.run(profiling.feeds(model)).values():
                    assert np.isfinite(array.astype(np.float64)).all(), one.name


def test_terms_are_those_that_the_costs_look_up(rows):
    names = {term for one in profiling.models(rows).values() for term in one.terms}
    assert names <= set(PRIOR)
    unmeasured = {name.split(".")[0] for name in set(PRIOR) - names}
    assert unmeasured == {"rows", "lstm"}
    # The same convolution, asked of the target.
    row = next(row for row in rows if row.name == "Conv 64-64k3@56")
    target = x86_vnni()
    x, w = ir.val("x", ir.DataType.FLOAT, [1, 64, 56, 56]), ir.val("w", ir.DataType.FLOAT, [64, 64, 3, 3])
    w.const_value = ir.tensor(np.zeros((64, 64, 3, 3), np.float32))
    y = ir.val("y", ir.DataType.FLOAT, [1, 64, 56, 56])
    node = ir.Node("", "Conv", [x, w], outputs=[y])
    graph = ir.Graph([x], [y], nodes=[node], initializers=[w])
    kernel = target.kernel(graph[0], target.scheme("int8"))
    assert not isinstance(kernel, Refusal)
    alone = {term: count for term, count in row.after.terms.items() if term not in AROUND}
    assert kernel.integer_seconds == pytest.approx(SHIPPED.seconds(alone))


def test_times_of_the_shipped_profile_give_it_back(times_of, rows):
    seen = times_of(rows)
    found = profile_fit.fit([(one.terms, seen[model][0]) for model, one in profiling.models(rows).items()], PRIOR)
    assert found.coefficients == pytest.approx(PRIOR)
    assert max(map(abs, found.errors)) < 1e-6


@hypothesis.given(st.floats(0.05, 50.0), st.sampled_from(["conv.integers.mac", "matmul.float.mac", "blocks.4.32"]))
@hypothesis.settings(max_examples=10)
def test_a_slower_machine_with_one_odd_kernel(times_of, rows, everything, name):
    there = {term: value * everything for term, value in PRIOR.items()}
    there[name] *= 3
    seen = times_of(rows, there)
    fitted = profile_fit.fit([(one.terms, seen[model][0]) for model, one in profiling.models(rows).items()], PRIOR)
    assert fitted.coefficients[name] == pytest.approx(there[name], rel=0.1)
    # What no row measures goes by the others.
    assert fitted.coefficients["lstm.float.mac"] == pytest.approx(there["lstm.float.mac"], rel=0.1)
    assert min(fitted.coefficients.values()) > 0


def test_times_far_off_count_less(times_of, rows):
    seen = times_of(rows)
    seen["Conv 64-64k3@56 float"] = [one * 10 for one in seen["Conv 64-64k3@56 float"]]
    fitted = profile_fit.fit([(one.terms, seen[model][0]) for model, one in profiling.models(rows).items()], PRIOR)
    assert fitted.coefficients["conv.float.mac"] == pytest.approx(PRIOR["conv.float.mac"], rel=0.05)


def test_a_refused_kernel_is_never_chosen(times_of, rows):
    seen = times_of(rows)
    refused = [name for name in seen if "2 bits by 32" in name]
    found = profiling.profile(
        "x", "x86-vnni", "p", profiles.Machine.here(), ("r", "d", 1.0), rows,
        {**seen, **dict.fromkeys(refused, "no such kernel")},
    )  # fmt: skip
    assert found.coefficients["blocks.2.32"] == 1000 * COEFFICIENTS["blocks.2.32"]
    assert found.coefficients["blocks.2.64"] == pytest.approx(COEFFICIENTS["blocks.2.64"])
    assert found.refused == dict.fromkeys(refused, "no such kernel")
    assert not [row for row in found.rows if row.form == "2 bits by 32"]
