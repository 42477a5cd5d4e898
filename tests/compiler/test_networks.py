"""Whole networks: integers where the target has kernels, a reason elsewhere, fused, and near the original."""

import dataclasses
import json

import numpy as np
import onnx_ir as ir
import pytest

import qgraph
from qgraph import audit, registry
from qgraph.observers import OBSERVERS

QUIET = qgraph.Options(bench_seconds=0)


@pytest.fixture
def transformer(model_kit):
    """One encoder block as exporters write it: erf-GELU and LayerNorm in pieces, masked attention."""
    n = model_kit.normal
    width, heads = 64, 4
    return model_kit.text(
        f"""g (float[batch, seq, {width}] x, float[batch, seq] mask) => (float[batch, seq, {width}] y) {{
            mu = ReduceMean <keepdims = 1> (x, last)
            d = Sub (x, mu)
            d2 = Pow (d, two)
            va = ReduceMean <keepdims = 1> (d2, last)
            ve = Add (va, eps)
            sd = Sqrt (ve)
            dn = Div (d, sd)
            ds = Mul (dn, ln_s)
            l = Add (ds, ln_b)
            q0 = MatMul (l, Wq)
            q1 = Add (bq, q0)
            q2 = Reshape (q1, split)
            q = Transpose <perm = [0, 2, 1, 3]> (q2)
            k0 = MatMul (l, Wk)
            k1 = Add (k0, bk)
            k2 = Reshape (k1, split)
            k = Transpose <perm = [0, 2, 3, 1]> (k2)
            v0 = MatMul (l, Wv)
            v1 = Add (v0, bv)
            v2 = Reshape (v1, split)
            v = Transpose <perm = [0, 2, 1, 3]> (v2)
            s = MatMul (q, k)
            sc = Mul (s, scale)
            m1 = Unsqueeze (mask, axes)
            m2 = Sub (one, m1)
            m3 = Mul (m2, lowest)
            sm = Add (sc, m3)
            p = Softmax <axis = -1> (sm)
            o = MatMul (p, v)
            o1 = Transpose <perm = [0, 2, 1, 3]> (o)
            o2 = Reshape (o1, join)
            o3 = MatMul (o2, Wo)
            o4 = Add (o3, bo)
            x1 = Add (x, o4)
            f0 = MatMul (x1, W1)
            f1 = Add (f0, b1)
            e0 = Div (f1, root2)
            e1 = Erf (e0)
            e2 = Add (e1, one)
            e3 = Mul (f1, e2)
            f2 = Mul (e3, half)
            f3 = MatMul (f2, W2)
            f4 = Add (f3, b2)
            y = Add (x1, f4)
        }}""",
        last=np.array([-1]),
        two=np.array(2, np.float32),
        eps=np.array(1e-5, np.float32),
        ln_s=1 + n(width, scale=0.1),
        ln_b=n(width, scale=0.1, seed=1),
        **{f"W{c}": n(width, width, scale=0.12, seed=ord(c)) for c in "qkvo"},
        **{f"b{c}": n(width, scale=0.1, seed=ord(c)) for c in "qkvo"},
        split=np.array([0, 0, heads, width // heads]),
        join=np.array([0, 0, width]),
        scale=np.array((width // heads) ** -0.5, np.float32),
        axes=np.array([1, 2]),
        one=np.array(1, np.float32),
        lowest=np.array(np.finfo(np.float32).min),
        half=np.array(0.5, np.float32),
        root2=np.array(np.sqrt(2), np.float32),
        W1=n(width, 4 * width, scale=0.12),
        b1=n(4 * width, scale=0.1),
        W2=n(4 * width, width, scale=0.06),
        b2=n(width, scale=0.1, seed=9),
    )


def transformer_feeds(count):
    rng = np.random.default_rng(0)
    feeds = []
    for i in range(count):
        mask = np.ones((2, 12), np.float32)
        mask[:, 12 - i % 5 :] = 0
        feeds.append({"x": rng.standard_normal((2, 12, 64)).astype(np.float32), "mask": mask})
    return feeds


def complete(report, floats):
    """Every node is in integers or has a reason; JSON says the same."""
    assert report.nodes
    for node in report.nodes:
        assert node.name
        assert (node.kernel is None) != (node.reason is None), node
        assert node.kernel is not None or node.reason
    assert {node.op_type for node in report.refused} <= floats, {(n.op_type, n.reason) for n in report.refused}
    plain = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert {f.name for f in dataclasses.fields(report)} == set(plain)
    assert plain["steps"][0]["name"] == "Canonicalize"
    assert plain["fidelity"]["outputs"]
    assert all(isinstance(v, (int, float, str)) for o in plain["fidelity"]["outputs"].values() for v in o.values() if v)


def audited(path, result, target="cpu"):
    """An audit made afresh, from what the report says the kernels are."""
    planned = {node.name: (node.kernel,) for node in result.report.quantized}
    movers = frozenset(node.name for node in result.report.quantized if node.kernel == "(no work)")
    return audit.audit(path, audit.Plan(planned, movers), registry.target(target))


def test_cnn(model_kit, model_free_cpu, cnn, tmp_path):
    feeds = model_kit.feeds(cnn, 12)
    ir.save(cnn, tmp_path / "in.onnx")
    result = qgraph.optimize(tmp_path / "in.onnx", tmp_path / "out.onnx", data=feeds, options=QUIET)
    complete(result.report, {"Relu", "Mul", "Sum"})
    # A Mul is what smoothing puts before a layer, and the Sum keeps the runtime from drawing it into integers.
    assert {n.name.split("_")[0] for n in result.report.refused if n.op_type in ("Mul", "Sum")} <= {"image", "f"}
    assert {n.kernel for n in result.report.quantized} >= {"QLinearConv", "QLinearAdd", "QGemm"}
    found = audited(tmp_path / "out.onnx", result)
    assert found.clean, found
    assert model_kit.sqnr(tmp_path / "in.onnx", tmp_path / "out.onnx", feeds) > 30
    assert (tmp_path / "out.onnx").stat().st_size < 0.3 * (tmp_path / "in.onnx").stat().st_size
    assert all(layer.sqnr > 25 for layer in result.report.fidelity.layers)
    assert result.report.fidelity.held_back
    assert result.report.output == str(tmp_path / "out.onnx")


def test_cnn_as_the_real_costs_choose(model_kit, cnn, tmp_path):
    ir.save(cnn, tmp_path / "in.onnx")
    options = qgraph.Options(target="x86-vnni", bench_seconds=0)
    result = qgraph.optimize(tmp_path / "in.onnx", tmp_path / "out.onnx", data=model_kit.feeds(cnn), options=options)
    assert sum(node.op_type == "Conv" for node in result.report.quantized) == 3
    assert result.report.target == "x86-vnni"


def test_mlp_with_a_dynamic_batch(model_kit, model_free_cpu, mlp, tmp_path):
    feeds = model_kit.feeds(mlp, 12, free=8)
    ir.save(mlp, tmp_path / "in.onnx")
    result = qgraph.optimize(tmp_path / "in.onnx", tmp_path / "out.onnx", data=feeds, options=QUIET)
    complete(result.report, {"Relu"})
    assert [node.kernel for node in result.report.quantized] == ["QGemm"] * 3
    assert audited(tmp_path / "out.onnx", result).clean
    assert model_kit.sqnr(tmp_path / "in.onnx", tmp_path / "out.onnx", feeds) > 30
    other = model_kit.feeds(mlp, 3, free=5, seed=9)
    assert model_kit.sqnr(tmp_path / "in.onnx", tmp_path / "out.onnx", other) > 25


def test_transformer(model_kit, transformer, tmp_path):
    ir.save(transformer, tmp_path / "in.onnx")
    feeds = transformer_feeds(12)
    options = qgraph.Options(target="x86-vnni", bench_seconds=0)
    result = qgraph.optimize(tmp_path / "in.onnx", tmp_path / "out.onnx", data=feeds, options=options)
    kinds = {node.op_type for node in result.report.nodes}
    assert {"Gelu", "LayerNormalization"} <= kinds and not {"Erf", "Pow", "Sqrt"} & kinds
    found = audited(tmp_path / "out.onnx", result, "x86-vnni")
    assert found.clean, found
    assert model_kit.sqnr(tmp_path / "in.onnx", tmp_path / "out.onnx", feeds) > 25
    for node in result.report.refused:
        assert node.reason


def test_transformer_with_everything_in_integers(model_kit, model_free_cpu, transformer, tmp_path):
    # The Add of the mask of -3.4e38 has no useful range; it is not worth an integer kernel at real costs either.
    ir.save(transformer, tmp_path / "in.onnx")
    feeds = transformer_feeds(12)
    options = dataclasses.replace(QUIET, keep_float=("sm_Add",))
    next(node for node in transformer.graph if node.outputs[0].name == "sm").name = "sm_Add"
    ir.save(transformer, tmp_path / "in.onnx")
    result = qgraph.optimize(tmp_path / "in.onnx", tmp_path / "out.onnx", data=feeds, options=options)
    assert audited(tmp_path / "out.onnx", result).clean
    # Those whose bias the kernel adds are written as that kernel.
    kinds = ("MatMul", "MatMulInteger", "MatMulIntegerToFloat")
    products = [node for node in result.report.quantized if node.op_type in kinds]
    assert len(products) == 6
    assert model_kit.sqnr(tmp_path / "in.onnx", tmp_path / "out.onnx", feeds) > 20


@pytest.mark.parametrize("observer", sorted(OBSERVERS))
def test_every_observer(model_kit, model_free_cpu, mlp, observer):
    feeds = model_kit.feeds(mlp, 10, free=8)
    result = qgraph.optimize(mlp, data=feeds, options=dataclasses.replace(QUIET, observer=observer))
    assert model_kit.sqnr(mlp, result.model, feeds) > 22
    assert len(result.report.quantized) == 3
