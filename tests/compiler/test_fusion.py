"""What does not fuse in the runtime's own graph goes back to float, and takes nothing along that does."""

import dataclasses

import numpy as np
import pytest

import qgraph
from qgraph import audit
from qgraph.errors import AuditError

QUIET = qgraph.Options(bench_seconds=0)


# One way to quantize, and no budget that would send a noisy node back to float.
INT8 = qgraph.Options(bench_seconds=0, scheme="int8", max_loss="100%")


def test_nodes_that_do_not_fuse_go_back_to_float(model_kit, mlp, model_free_cpu, monkeypatch):
    real = audit.audit
    calls = []

    def first_complains(path, plan, target):
        found = real(path, plan, target)
        calls.append(set(plan.operators))
        if plan.operators and not any(calls[:-1]):
            name = sorted(plan.operators)[0]
            return audit.Audit(found.kernels, {name: "made up"}, {})
        return found

    monkeypatch.setattr(audit, "audit", first_complains)
    report = qgraph.optimize(mlp, data=model_kit.feeds(mlp), options=INT8).report
    # First the float graph, of which nothing is planned.
    assert [len(call) for call in calls][:3] == [0, 3, 2] and all(len(call) < 3 for call in calls[2:])
    assert any("made up" in node.reason for node in report.refused)


def test_a_plan_that_never_fuses_is_an_error(model_kit, untouched, standing, mlp, model_free_cpu, monkeypatch):
    monkeypatch.setattr(audit, "audit", lambda *_: audit.Audit({}, {}, {"some_weight": ["a reader that nobody knows"]}))
    with pytest.raises(AuditError, match=r"some_weight.*a reader that nobody knows"):
        qgraph.optimize(standing / "in.onnx", standing / "out.onnx", data=model_kit.feeds(mlp), options=QUIET)
    untouched(standing)


def test_layer_whose_relu_is_read_in_float(model_kit, model_free_cpu):
    # onnxruntime leaves MatMul -> Relu without QuantizeLinear in float: either way out is right, an error is not.
    n = model_kit.normal
    model = model_kit.text(
        "g (float[4, 16] x) => (float[4, 16] y) { h = MatMul (x, W)  r = Relu (h)  e = Erf (r)  y = MatMul (e, V) }",
        W=n(16, 16),
        V=n(16, 16, seed=1),
    )
    result = qgraph.optimize(model, data=model_kit.feeds(model), options=QUIET)
    assert "MatMul" in {node.op_type for node in result.report.quantized}
    assert all(node.kernel or node.reason for node in result.report.nodes)


def test_a_shared_weight_stays_integer_for_the_reader_that_fuses(model_kit, model_free_cpu):
    n = model_kit.normal
    model = model_kit.text(
        "g (float[4, 16] x) => (float[4, 16] y) { h = MatMul (x, W)  r = Relu (h)  e = Erf (r)  y = MatMul (e, W) }",
        W=n(16, 16),
    )
    result = qgraph.optimize(model, data=model_kit.feeds(model), options=QUIET)
    assert "y_MatMul" in {node.name for node in result.report.quantized}


def test_a_float_layer_at_the_end_does_not_pull_the_chain_after_it(model_kit, model_free_cpu):
    # Gemm -> Relu read in float does not fuse; with its result quantized (QGemm, then DequantizeLinear) it would.
    n = model_kit.normal
    model = model_kit.text(
        """g (float[4, 32] x) => (float[4, 32] y) {
            a = Gemm (x, A, b)
            ra = Relu (a)
            c = Gemm (ra, C, b)
            rc = Relu (c)
            d = Gemm (rc, D, b)
            rd = Relu (d)
            y = Gemm (rd, E, b)
        }""",
        **{name: n(32, 32, seed=i, scale=0.3) for i, name in enumerate("ACDE")},
        b=n(32),
    )
    model.graph[-1].name = "head"
    options = dataclasses.replace(INT8, keep_float=("head",))
    result = qgraph.optimize(model, data=model_kit.feeds(model), options=options)
    assert len(result.report.quantized) == 3


@pytest.mark.parametrize("shape", [(), (1,), (4, 1), (4, 16), (1, 16)])
def test_constants_added_to_a_product_are_not_always_biases(model_kit, model_free_cpu, shape):
    n = model_kit.normal
    model = model_kit.text(
        "g (float[4, 16] x) => (float[4, 16] y) { h = MatMul (x, W)  t = Add (h, c)  y = MatMul (t, V) }",
        W=n(16, 16),
        V=n(16, 16, seed=1),
        c=n(*shape),
    )
    feeds = model_kit.feeds(model)
    result = qgraph.optimize(model, data=feeds, options=QUIET)
    assert model_kit.sqnr(model, result.model, feeds) > 25


def test_square_column_added_to_a_product_is_no_bias(model_kit, model_free_cpu):
    n = model_kit.normal
    model = model_kit.text(
        "g (float[16, 16] x) => (float[16, 16] y) { h = MatMul (x, W)  t = Add (h, c)  y = MatMul (t, V) }",
        W=n(16, 16) + 3,
        V=n(16, 16, seed=1),
        c=n(16, 1),
    )
    feeds = [{"x": feed["x"] + 5} for feed in model_kit.feeds(model)]
    result = qgraph.optimize(model, data=feeds, options=QUIET)
    assert model_kit.sqnr(model, result.model, feeds) > 25
    # Smoothing may have scaled the columns of the sum; a vector made of it would be a bias.
    assert not [
        v for v in result.model.graph.initializers.values() if np.array_equal(v.const_value.numpy(), n(16, 1)[:, 0])
    ]
