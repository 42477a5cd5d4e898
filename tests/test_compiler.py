"""The main job on small models: what it promises, and that a failure leaves everything as it was."""

import dataclasses
import gc
import json
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import qgraph
from qgraph import audit, bench, compare, registry
from qgraph.errors import (
    AccuracyError,
    AuditError,
    DataError,
    ModelError,
    NothingQuantizedError,
    OptionError,
    QGraphError,
    SlowerError,
)
from qgraph.observers import OBSERVERS
from qgraph.session import Session, SessionOptions

QUIET = qgraph.Options(bench_seconds=0)
# One way to quantize, and no budget that would send a noisy node back to float.
INT8 = qgraph.Options(bench_seconds=0, scheme="int8", max_loss="100%")


@pytest.fixture
def cnn(model_kit):
    """A stem, a residual block, a pool and a classifier; wide enough to pay."""
    n = model_kit.normal
    return model_kit.text(
        """g (float[1, 32, 14, 14] image) => (float[1, 10] logits) {
            c0 = Conv <pads = [1, 1, 1, 1]> (image, W0, b0)
            r0 = Relu (c0)
            c1 = Conv <pads = [1, 1, 1, 1]> (r0, W1)
            n1 = BatchNormalization (c1, s1, t1, m1, v1)
            r1 = Relu (n1)
            c2 = Conv <pads = [1, 1, 1, 1]> (r1, W2, b2)
            a = Add (c2, r0)
            r2 = Relu (a)
            p = GlobalAveragePool (r2)
            f = Flatten (p)
            logits = Gemm <transB = 1> (f, G, g0)
        }""",
        W0=n(64, 32, 3, 3, scale=0.08),
        b0=n(64, scale=0.1),
        W1=n(64, 64, 3, 3, scale=0.06),
        s1=1 + n(64, scale=0.1),
        t1=n(64, seed=1, scale=0.1),
        m1=n(64, seed=2, scale=0.1),
        v1=np.abs(n(64, seed=3)) + 0.5,
        W2=n(64, 64, 3, 3, seed=1, scale=0.06),
        b2=n(64, seed=4, scale=0.1),
        G=n(10, 64, scale=0.2),
        g0=n(10),
    )


@pytest.fixture
def mlp(model_kit):
    n = model_kit.normal
    return model_kit.text(
        """g (float[batch, 128] x) => (float[batch, 16] y) {
            h = Gemm <transB = 1> (x, W, b)
            r = Relu (h)
            k = Gemm <transB = 1> (r, V, c)
            s = Relu (k)
            y = Gemm <transB = 1> (s, U, d)
        }""",
        W=n(256, 128, scale=0.1),
        b=n(256, scale=0.1),
        V=n(256, 256, scale=0.08),
        c=n(256, scale=0.1, seed=1),
        U=n(16, 256, scale=0.1),
        d=n(16),
    )


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


# -- what it promises -----------------------------------------------------------------------------------------------


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
    products = [node for node in result.report.quantized if node.op_type in ("MatMul", "MatMulIntegerToFloat")]
    assert len(products) == 6
    assert model_kit.sqnr(tmp_path / "in.onnx", tmp_path / "out.onnx", feeds) > 20


def test_same_bytes_for_the_same_input_and_in_any_order_of_the_data(model_kit, model_free_cpu, cnn, tmp_path):
    ir.save(cnn, tmp_path / "in.onnx")
    feeds = model_kit.feeds(cnn, 10)
    shuffled = [feeds[i] for i in np.random.default_rng(1).permutation(len(feeds))]
    results = []
    for name, data in (("a", feeds), ("b", feeds), ("c", shuffled)):
        qgraph.optimize(tmp_path / "in.onnx", tmp_path / name, data=data, options=QUIET)
        results.append((tmp_path / name).read_bytes())
    assert results[0] == results[1]
    assert results[0] == results[2]


def test_same_bytes_for_any_memory_budget(model_kit, model_free_cpu, cnn, tmp_path):
    ir.save(cnn, tmp_path / "in.onnx")
    feeds = model_kit.feeds(cnn, 6)
    results = []
    for memory in (1, 60_000, 1 << 28):
        # Roundings are learned where their moments fit into the memory, and else not; here they are not.
        options = dataclasses.replace(QUIET, memory=memory, time_limit=0)
        qgraph.optimize(tmp_path / "in.onnx", tmp_path / "out", data=feeds, options=options)
        results.append((tmp_path / "out").read_bytes())
    assert results[0] == results[1] == results[2]


def test_shuffled_data_of_a_dynamic_shape_gives_the_same_bytes(model_kit, model_free_cpu, mlp, tmp_path):
    ir.save(mlp, tmp_path / "in.onnx")
    feeds = [{"x": model_kit.normal(1 + i, 128, seed=i)} for i in range(8)]
    qgraph.optimize(tmp_path / "in.onnx", tmp_path / "a", data=feeds, options=QUIET)
    qgraph.optimize(tmp_path / "in.onnx", tmp_path / "b", data=feeds[::-1], options=QUIET)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("observer", sorted(OBSERVERS))
def test_every_observer(model_kit, model_free_cpu, mlp, observer):
    feeds = model_kit.feeds(mlp, 10, free=8)
    result = qgraph.optimize(mlp, data=feeds, options=dataclasses.replace(QUIET, observer=observer))
    assert model_kit.sqnr(mlp, result.model, feeds) > 22
    assert len(result.report.quantized) == 3


def test_in_memory_in_and_out(model_kit, model_free_cpu, mlp, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = ir.to_proto(mlp).SerializeToString()
    feeds = model_kit.feeds(mlp, 6)
    result = qgraph.optimize(mlp, data=feeds, options=QUIET)
    assert isinstance(result.model, ir.Model)
    assert model_kit.sqnr(mlp, result.model, feeds) > 25
    assert ir.to_proto(mlp).SerializeToString() == before, "the caller's model was changed"
    assert not any(value.meta for value in mlp.graph.initializers.values())
    assert list(tmp_path.iterdir()) == []
    assert result.report.output is None


def test_in_memory_and_file_give_the_same_bytes(model_kit, model_free_cpu, mlp, tmp_path):
    ir.save(mlp, tmp_path / "in.onnx")
    feeds = model_kit.feeds(mlp, 6)
    qgraph.optimize(tmp_path / "in.onnx", tmp_path / "a.onnx", data=feeds, options=QUIET)
    qgraph.optimize(ir.load(tmp_path / "in.onnx"), tmp_path / "b.onnx", data=feeds, options=QUIET)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_string_paths_and_a_relative_output(model_kit, model_free_cpu, mlp, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ir.save(mlp, "in.onnx")
    qgraph.optimize("in.onnx", "out.onnx", data=model_kit.feeds(mlp), options=QUIET)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.onnx", "out.onnx"]


def test_ranges_saved_and_given_back(model_kit, model_free_cpu, mlp, tmp_path):
    ir.save(mlp, tmp_path / "in.onnx")
    feeds, ranges = model_kit.feeds(mlp, 8), tmp_path / "ranges.npz"
    source = tmp_path / "in.onnx"
    qgraph.optimize(source, tmp_path / "a", data=feeds, options=dataclasses.replace(INT8, save_ranges=ranges))
    qgraph.optimize(source, tmp_path / "b", data=feeds, options=dataclasses.replace(INT8, ranges=ranges))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    # They are really used: other data changes nothing.
    others = model_kit.feeds(mlp, 8, seed=5)
    qgraph.optimize(source, tmp_path / "c", data=others, options=dataclasses.replace(INT8, ranges=ranges))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "c").read_bytes()
    mlp.graph.initializers["d"].const_value = ir.tensor(np.zeros(16, np.float32))
    ir.save(mlp, tmp_path / "other.onnx")
    with pytest.raises(DataError, match="another model"):
        qgraph.optimize(
            tmp_path / "other.onnx", tmp_path / "d", data=feeds, options=dataclasses.replace(INT8, ranges=ranges)
        )


def test_ranges_of_a_model_with_absorbed_activations(model_kit, model_free_cpu, cnn, tmp_path):
    feeds = model_kit.feeds(cnn, 6)
    job = {"options": INT8, "data": feeds}
    first = qgraph.optimize(cnn, tmp_path / "a", save_ranges=str(tmp_path / "ranges.npz"), **job)
    assert "Relu" not in {node.op_type for node in first.report.nodes}
    qgraph.optimize(cnn, tmp_path / "b", ranges=str(tmp_path / "ranges.npz"), **job)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    # What needs fewer ranges finds all of them.
    report = qgraph.optimize(cnn, ranges=tmp_path / "ranges.npz", keep_float=("Gemm",), **job).report
    assert "Gemm" in {node.op_type for node in report.refused}
    with pytest.raises(DataError, match="lacks the range"):
        qgraph.optimize(cnn, save_ranges=tmp_path / "few.npz", keep_float=("Gemm",), **job)
        qgraph.optimize(cnn, ranges=tmp_path / "few.npz", **job)


@pytest.mark.parametrize("order", ["given", "reversed"])
def test_ranges_of_a_search_hold_for_all_its_candidates(model_kit, model_free_cpu, mlp, tmp_path, order):
    """Nodes that the fastest candidate has in no static kernel may be static in a later one: their ranges are kept."""
    feeds = model_kit.feeds(mlp, 8)
    job = {"bench_seconds": 0, "data": feeds if order == "given" else feeds[::-1], "min_sqnr": 45}
    first = qgraph.optimize(mlp, tmp_path / "a", save_ranges=tmp_path / "ranges.npz", **job).report
    second = qgraph.optimize(mlp, tmp_path / "b", ranges=tmp_path / "ranges.npz", **job).report
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert len(first.candidates) > 2
    assert first.candidates == second.candidates


def test_ranges_on_other_data_are_those_of_the_first(model_kit, model_free_cpu, mlp, tmp_path):
    """Channels must not be scaled by what other data says while their ranges stay."""
    scale = np.exp(model_kit.normal(128, seed=8))
    feeds = [{"x": feed["x"] * scale} for feed in model_kit.feeds(mlp, 8, free=8)]
    other = [{"x": feed["x"] * scale[::-1]} for feed in model_kit.feeds(mlp, 8, free=8, seed=4)]
    job = {"options": INT8, "evaluation": feeds}
    first = qgraph.optimize(mlp, tmp_path / "a", data=feeds, save_ranges=tmp_path / "ranges.npz", **job).report
    second = qgraph.optimize(mlp, tmp_path / "b", data=other, ranges=tmp_path / "ranges.npz", **job).report
    assert first.fidelity.worst.sqnr == second.fidelity.worst.sqnr > 20
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


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


def test_a_loader_that_shuffles(model_kit, model_free_cpu, mlp, tmp_path):
    """Calibration, the split and the comparison go through the data several times, and must see the same."""
    feeds, random = model_kit.feeds(mlp, 10), np.random.default_rng(0)

    class Loader:
        def __iter__(self):
            return iter([feeds[i] for i in random.permutation(len(feeds))])

    sources = [feeds, Loader(), Loader, lambda: (feed for feed in Loader()), iter(Loader())]
    for number, data in enumerate(sources):
        qgraph.optimize(mlp, tmp_path / str(number), data=data, options=QUIET)
    assert len({(tmp_path / str(number)).read_bytes() for number in range(len(sources))}) == 1


def test_failures_of_the_users_function_are_data_errors(mlp, tmp_path):
    def feeds():
        yield {"x": np.zeros((1, 128), np.float32)}
        raise FileNotFoundError("image 7 is gone")

    with pytest.raises(DataError, match="FileNotFoundError: image 7 is gone"):
        qgraph.optimize(mlp, tmp_path / "out.onnx", data=feeds, options=QUIET)
    assert list(tmp_path.iterdir()) == []


def test_the_folder_of_a_result_goes_with_it(model_kit, model_free_cpu, mlp, tmp_path):
    ir.save(mlp, tmp_path / "in.onnx", external_data="w", size_threshold_bytes=64)
    feeds = model_kit.feeds(mlp)
    result = qgraph.optimize(tmp_path / "in.onnx", data=feeds, options=QUIET)
    places = {Path(v.const_value.path) for v in result.model.graph.initializers.values()
              if isinstance(v.const_value, ir.ExternalTensor)}  # fmt: skip
    assert places and all(place.is_file() for place in places)
    del result
    gc.collect()
    assert not any(place.exists() or place.parent.exists() for place in places)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.onnx", "w"]


def outlier(model_kit, reach):
    """Calibration data with one value so large that little of a range is left for the others."""
    feeds = [{"x": np.clip(model_kit.normal(4, 128, seed=i), -2, 2)} for i in range(4)]
    feeds[0]["x"][0, 0] = reach
    return {"data": feeds, "evaluation": [{"x": model_kit.normal(4, 128, seed=9)}]}


@pytest.fixture
def product(model_kit):
    return model_kit.text(
        "g (float[4, 128] x) => (float[4, 16] y) { y = MatMul (x, W) }", W=model_kit.normal(128, 16, scale=0.1)
    )


def test_what_is_outside_the_budget_is_not_written(model_kit, model_free_cpu, product, tmp_path):
    """The float graph always stands; what it keeps out is a budget that even rounding in float exceeds."""
    (tmp_path / "out.onnx").write_bytes(b"the old one")
    job = {"bench_seconds": 0, "scheme": "int8", "observer": "minmax", **outlier(model_kit, 30000)}
    words = r"nothing is within the budget.*\(loss of cosine at most 1% \(losses on 1 .*fastest loses 0\.\d+ of cosine"
    with pytest.raises(NothingQuantizedError, match=words):
        qgraph.optimize(product, tmp_path / "out.onnx", max_loss="1%", **job)
    assert (tmp_path / "out.onnx").read_bytes() == b"the old one"
    # With --force the fastest is taken, whatever it loses.
    report = qgraph.optimize(product, tmp_path / "out.onnx", max_loss="1%", force=True, **job).report
    assert report.fidelity.worst.sqnr < 20 and report.quantized
    assert {one.name: one.verdict for one in report.candidates} == {"fp32": "within", "fastest": "chosen"}
    onnx.load(tmp_path / "out.onnx")


def worse(monkeypatch, loss):
    """Every candidate loses this much of its cosine more than it does."""
    real = compare.Reference.compare

    def compared(*args, **more):
        found = real(*args, **more)
        outputs = {n: dataclasses.replace(o, cosine=o.cosine - loss) for n, o in found.outputs.items()}
        return dataclasses.replace(found, outputs=outputs)

    monkeypatch.setattr(compare.Reference, "compare", compared)


def test_nothing_within_the_budget_lists_the_trade_offs(model_kit, model_free_cpu, product, tmp_path, monkeypatch):
    (tmp_path / "out.onnx").write_bytes(b"the old one")
    worse(monkeypatch, 0.1)
    feeds = model_kit.feeds(product)
    with pytest.raises(AccuracyError) as caught:
        qgraph.optimize(product, tmp_path / "out.onnx", data=feeds, options=QUIET)
    words = str(caught.value)
    assert "Nothing is within the budget (loss of cosine at most 1% (losses on 1 samples" in words
    assert "fp32 loses 0.1 of cosine" in words and "fastest loses 0.1 of cosine" in words
    assert "--time-limit" in words and "--force" in words
    assert [p.name for p in tmp_path.iterdir()] == ["out.onnx"]
    assert (tmp_path / "out.onnx").read_bytes() == b"the old one"
    report = qgraph.optimize(product, tmp_path / "out.onnx", data=feeds, options=QUIET, force=True).report
    assert report.quantized and report.fidelity.worst.cosine < 0.91
    onnx.load(tmp_path / "out.onnx")


@pytest.mark.parametrize("budget, least", [({"max_loss": "1%"}, 12), ({"min_sqnr": 25}, 25), ({"min_sqnr": 60}, 60),
                                           ({"min_cosine": 0.9999}, 30), ({"max_loss": 0.0}, 60)])  # fmt: skip
def test_the_result_is_within_the_budget(model_kit, model_free_cpu, mlp, budget, least):
    """On the data it was judged by, whatever the budget: the noisier the nodes, the fewer are quantized."""
    scale = np.exp(2 * model_kit.normal(128, seed=8))
    feeds = [{"x": feed["x"] * scale} for feed in model_kit.feeds(mlp, 12, free=8)]
    result = qgraph.optimize(mlp, data=feeds, evaluation=feeds[:3], bench_seconds=0, **budget)
    assert result.report.fidelity.worst.sqnr >= least
    assert model_kit.sqnr(mlp, result.model, feeds[:3]) >= least
    # A budget of nothing is met by rounding in float if it is by none.
    chosen = [one for one in result.report.candidates if one.verdict == "chosen"]
    assert len(chosen) == 1 and sum(chosen[0].nodes.values()) == len(result.report.quantized)


def test_a_candidate_that_failed_on_the_evaluation_data_gives_way(model_kit, model_free_cpu, product):
    """It held the budget on what was held back of the calibration data, but not on data of another kind."""
    feeds = [{"x": np.clip(model_kit.normal(4, 128, seed=i), -2, 2)} for i in range(12)]
    far = [{"x": 100 * model_kit.normal(4, 128, seed=20 + i)} for i in range(3)]
    job = {"bench_seconds": 0, "scheme": "int8", "data": feeds}
    assert qgraph.optimize(product, **job).report.quantized
    with pytest.raises(NothingQuantizedError, match="nothing is within the budget"):
        qgraph.optimize(product, evaluation=far, **job)
    # Nobody asked for a scheme by name: the float graph is an answer.
    report = qgraph.optimize(product, evaluation=far, **{**job, "scheme": "auto"}).report
    assert report.fidelity.worst.sqnr > 30
    assert any("not on the evaluation data" in note for note in report.notes)
    verdicts = {one.name: one.verdict for one in report.candidates}
    assert "loses too much on the evaluation data" in verdicts.values()


def test_an_output_that_is_all_zeros_is_no_noise(model_kit, model_free_cpu):
    model = model_kit.text(
        """g (float[4, 16] x) => (float[4, 16] y, float[4, 16] z) {
            y = MatMul (x, W)
            n = Abs (y)
            m = Neg (n)
            z = Relu (m)
        }""",
        W=model_kit.normal(16, 16),
    )
    report = qgraph.optimize(model, data=model_kit.feeds(model), options=QUIET).report
    assert not any("SQNR" in note for note in report.notes)


def test_separate_evaluation_data(model_kit, model_free_cpu, mlp):
    feeds = model_kit.feeds(mlp, 3)
    result = qgraph.optimize(mlp, data=feeds, evaluation=model_kit.feeds(mlp, 5, seed=3), options=QUIET)
    assert result.report.calibration_samples == 3
    assert (result.report.fidelity.samples, result.report.fidelity.held_back) == (5, True)


def test_too_few_samples_to_hold_back_is_said(model_kit, model_free_cpu, mlp):
    result = qgraph.optimize(mlp, data=model_kit.feeds(mlp, 2), options=QUIET)
    assert not result.report.fidelity.held_back
    assert any("too few samples" in note for note in result.report.notes)


def test_progress_is_told(model_kit, model_free_cpu, mlp):
    seen = []
    qgraph.optimize(mlp, data=model_kit.feeds(mlp), options=QUIET, progress=lambda *event: seen.append(event))
    words = [what for what, _, _ in seen]
    assert {"reading", "Canonicalize", "calibrating", "auditing", "comparing"} <= set(words)
    assert all(0 <= done <= total for _, done, total in seen if total)


# -- keep_float -----------------------------------------------------------------------------------------------------


def test_keep_float_by_name_pattern_and_operator(model_kit, model_free_cpu, cnn):
    for node in cnn.graph:
        node.name = f"/net/{node.outputs[0].name}"
    feeds = model_kit.feeds(cnn, 6)
    options = dataclasses.replace(QUIET, keep_float=("/net/c0", "Gemm"))
    kept = {node.name: node for node in qgraph.optimize(cnn, data=feeds, options=options).report.refused}
    assert {"/net/c0", "/net/logits"} <= set(kept)
    assert "/net/c0" in kept["/net/c0"].reason and "Gemm" in kept["/net/logits"].reason
    options = dataclasses.replace(QUIET, keep_float=("/net/c?",))
    report = qgraph.optimize(cnn, data=feeds, options=options).report
    assert not [node for node in report.quantized if node.op_type == "Conv"]


def test_keep_float_of_an_operator_holds_for_unnamed_nodes(model_kit, model_free_cpu, cnn):
    assert not any(node.name for node in cnn.graph)
    options = dataclasses.replace(QUIET, keep_float=("Conv",))
    report = qgraph.optimize(cnn, data=model_kit.feeds(cnn, 6), options=options).report
    assert not [node for node in report.quantized if node.op_type == "Conv"]


def test_keep_float_of_a_node_that_is_fused_into(model_kit, model_free_cpu, cnn):
    for node in cnn.graph:
        node.name = f"/net/{node.outputs[0].name}"
    options = dataclasses.replace(QUIET, keep_float=("/net/c1",))
    report = qgraph.optimize(cnn, data=model_kit.feeds(cnn, 6), options=options).report
    assert sum(node.op_type == "Conv" for node in report.refused) == 1


@pytest.mark.parametrize("layer, default", [("Conv", True), ("ConvTranspose", False)])
def test_a_float_layer_between_integers_is_left_alone(model_kit, model_free_cpu, layer, default):
    n = model_kit.normal
    model = model_kit.text(
        f"""g (float[1, 4, 8, 8] x) => (float[1, 4, 8, 8] y) {{
            a = Conv <pads = [1, 1, 1, 1]> (x, A)
            b = {layer} <pads = [1, 1, 1, 1]> (a, B)
            y = Conv <pads = [1, 1, 1, 1]> (b, C)
        }}""",
        **{name: n(4, 4, 3, 3, seed=i) for i, name in enumerate("ABC")},
    )
    if default:
        # A weight that the caller may override must not be quantized by the runtime, either.
        model.graph.inputs.append(model.graph.initializers["B"])
    report = qgraph.optimize(model, data=model_kit.feeds(model), options=QUIET).report
    assert [node.name for node in report.quantized] == ["a_Conv", "y_Conv"]


def test_a_relu_that_is_kept_in_float_is_there_and_listed(model_kit, model_free_cpu):
    n = model_kit.normal
    model = model_kit.text(
        """g (float[1, 4, 8, 8] x) => (float[1, 4, 8, 8] y) {
            c = Conv <pads = [1, 1, 1, 1]> (x, W)
            r = Relu (c)
            y = Conv <pads = [1, 1, 1, 1]> (r, V)
        }""",
        W=n(4, 4, 3, 3),
        V=n(4, 4, 3, 3, seed=1),
    )
    result = qgraph.optimize(model, data=model_kit.feeds(model), keep_float=("Relu",), bench_seconds=0)
    assert "Relu" in model_kit.ops(result.model)
    assert [node.op_type for node in result.report.refused] == ["Relu"]


def test_keep_float_that_matches_nothing_names_the_nearest(model_kit, model_free_cpu, cnn):
    for node in cnn.graph:
        node.name = f"/net/{node.outputs[0].name}"
    with pytest.raises(OptionError, match="/net/logits"):
        qgraph.optimize(cnn, data=model_kit.feeds(cnn), options=dataclasses.replace(QUIET, keep_float=("/net/logit",)))


@pytest.mark.parametrize("scheme", ["auto", "int8", "int8-dynamic", "int8-weights"])
def test_keep_float_of_everything_leaves_the_float_graph(model_kit, model_free_cpu, mlp, scheme):
    options = dataclasses.replace(QUIET, keep_float=("Gemm",), scheme=scheme)
    if scheme != "auto":
        with pytest.raises(NothingQuantizedError, match=f"scheme '{scheme}', nothing"):
            qgraph.optimize(mlp, data=model_kit.feeds(mlp), options=options)
        options = dataclasses.replace(options, force=True)
    result = qgraph.optimize(mlp, data=model_kit.feeds(mlp), options=options)
    assert not result.report.quantized
    reasons = {node.reason for node in result.report.refused if node.op_type == "Gemm"}
    assert reasons == {"left in float by the option 'Gemm'"}
    model_kit.same(mlp, result.model)


def test_a_model_with_nothing_to_quantize_gets_the_rewritten_graph_and_the_reasons(model_kit, tmp_path):
    """Erf-GELU in pieces: no node has an integer kernel, but the runtime's own Gelu is faster."""
    model = model_kit.text(
        """g (float[4, 64] x) => (float[4, 64] y) {
            a = Div (x, root2)
            b = Erf (a)
            c = Add (b, one)
            d = Mul (x, c)
            y = Mul (d, half)
        }""",
        root2=np.array(np.sqrt(2), np.float32),
        one=np.array(1, np.float32),
        half=np.array(0.5, np.float32),
    )
    with pytest.raises(NothingQuantizedError, match="the scheme 'auto', which writes a faster float graph"):
        qgraph.optimize(model, data=model_kit.feeds(model), scheme="int8", options=QUIET)
    for scheme in ("auto", "fp32"):
        result = qgraph.optimize(
            model, tmp_path / "out.onnx", data=model_kit.feeds(model), scheme=scheme, options=QUIET
        )
        assert model_kit.ops(result.model) == ["Gelu"]
        model_kit.same(model, tmp_path / "out.onnx")
        assert [(one.name, one.verdict) for one in result.report.candidates] == [("fp32", "chosen")]
        (node,) = result.report.nodes
        assert node.kernel is None
        assert node.reason == ("the scheme leaves all nodes in float" if scheme == "fp32"
                               else "onnxruntime's CPU provider has no integer kernel for Gelu")  # fmt: skip


def test_float_nodes_of_a_float_result_have_the_reasons_of_the_plan(model_kit, mlp):
    """Kernels that exist, but came out worse on the whole, are not explained by a body that is not there."""
    options = dataclasses.replace(QUIET, max_loss=0.0, min_sqnr=100, target="x86-vnni")
    report = qgraph.optimize(mlp, data=model_kit.feeds(mlp, free=32), options=options).report
    assert not report.quantized
    reasons = {node.name: node.reason for node in report.refused}
    assert not [why for why in reasons.values() if "body" in why], reasons
    assert "no candidate with its integer kernel" in reasons["k_Gemm"]
    assert "no integer kernel for Relu" in reasons["r_Relu"]


# -- failures -------------------------------------------------------------------------------------------------------


def untouched(folder, names=("in.onnx", "out.onnx")):
    assert sorted(p.name for p in folder.iterdir()) == sorted(names)
    assert (folder / "out.onnx").read_bytes() == b"the old one"


@pytest.fixture
def standing(mlp, tmp_path):
    """A model, and an older output that a failure must leave alone."""
    ir.save(mlp, tmp_path / "in.onnx")
    (tmp_path / "out.onnx").write_bytes(b"the old one")
    return tmp_path


def test_output_equals_input(model_kit, mlp, tmp_path, monkeypatch):
    ir.save(mlp, tmp_path / "in.onnx")
    before = (tmp_path / "in.onnx").read_bytes()
    (tmp_path / "link.onnx").symlink_to(tmp_path / "in.onnx")
    monkeypatch.chdir(tmp_path)
    for output in (tmp_path / "in.onnx", "in.onnx", "./in.onnx", "link.onnx"):
        with pytest.raises(OptionError, match="replace the input"):
            qgraph.optimize(tmp_path / "in.onnx", output, data=model_kit.feeds(mlp), options=QUIET)
    assert (tmp_path / "in.onnx").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.onnx", "link.onnx"]


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"target": "x86-vni"}, OptionError, "x86-vnni"),
        ({"scheme": "int9"}, OptionError, "int8"),
        ({"observer": "minmix"}, OptionError, "minmax"),
        ({"keep_float": ("Gem",)}, OptionError, "Gemm"),
    ],
)
def test_unknown_options_name_the_nearest(model_kit, standing, mlp, change, error, words):
    with pytest.raises(error, match=words):
        qgraph.optimize(
            standing / "in.onnx",
            standing / "out.onnx",
            data=model_kit.feeds(mlp),
            options=dataclasses.replace(QUIET, **change),
        )
    untouched(standing)


@pytest.mark.parametrize(
    "harm, words",
    [
        (lambda feeds: feeds[3]["x"].__setitem__((0, 0), np.nan), "batch 3.*NaN"),
        (lambda feeds: feeds[3]["x"].__setitem__((0, 0), np.inf), "batch 3.*infinite"),
        (lambda feeds: feeds.clear(), "no data"),
        (lambda feeds: feeds[2].update(x=np.zeros((2, 127), np.float32)), "batch 2.*2x127"),
        (lambda feeds: feeds[2].update(x=np.zeros((2, 128), np.int64)), "batch 2.*int64"),
        (lambda feeds: feeds[1].pop("x"), "batch 1.*lacks the input 'x'"),
        (lambda feeds: feeds[1].update(z=feeds[1].pop("x")), "batch 1.*'z'"),
    ],
)
def test_wrong_data(model_kit, standing, mlp, model_free_cpu, harm, words):
    feeds = model_kit.feeds(mlp)
    harm(feeds)
    with pytest.raises(DataError, match=words):
        qgraph.optimize(standing / "in.onnx", standing / "out.onnx", data=feeds, options=QUIET)
    untouched(standing)


@pytest.mark.parametrize("scheme", ["auto", "int8"])
def test_overflow_inside_the_model_names_the_value(model_kit, model_free_cpu, scheme):
    model = model_kit.text(
        """g (float[2, 8] x) => (float[2, 8] y) {
            h = MatMul (x, W)
            e = Exp (h)
            s = MatMul (e, V)
            y = Sigmoid (s)
        }""",
        W=model_kit.normal(8, 8, scale=100),
        V=np.abs(model_kit.normal(8, 8)),
    )
    with pytest.raises(DataError, match=r"'e' \(the output of e_Exp\).*batch"):
        qgraph.optimize(model, data=model_kit.feeds(model), options=dataclasses.replace(QUIET, scheme=scheme))


@pytest.mark.parametrize("scheme", ["auto", "int8", "int8-dynamic", "fp32"])
def test_an_original_that_overflows_names_the_output(model_kit, model_free_cpu, scheme):
    n = model_kit.normal
    model = model_kit.text(
        "g (float[2, 8] x) => (float[2, 8] y) { h = MatMul (x, W)  e = Exp (h)  y = MatMul (e, W) }",
        W=n(8, 8, scale=100),
    )
    with pytest.raises(DataError, match=r"Output 'y' of the original is NaN on 'batch \d'"):
        qgraph.optimize(model, data=model_kit.feeds(model), options=dataclasses.replace(QUIET, scheme=scheme))


def test_missing_folder(model_kit, mlp, tmp_path):
    with pytest.raises(ModelError, match="does not exist"):
        qgraph.optimize(mlp, tmp_path / "no" / "out.onnx", data=model_kit.feeds(mlp), options=QUIET)


def test_output_is_a_folder(model_kit, mlp, tmp_path, model_free_cpu):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("kept")
    with pytest.raises(QGraphError):
        qgraph.optimize(mlp, tmp_path / "out", data=model_kit.feeds(mlp), options=QUIET)
    assert (tmp_path / "out" / "precious").read_text() == "kept"


def test_a_slower_result_is_not_written(model_kit, standing, mlp, model_free_cpu, monkeypatch):
    slow = qgraph.report.Latency(1.0, 1.0, 1.0)
    speed = qgraph.report.Speed(1, slow, slow, 0.5, 0.5, 0.5, 3)
    monkeypatch.setattr(bench, "alternate", lambda *_, **__: speed)
    model_kit.node_times(monkeypatch)
    job = {"data": model_kit.feeds(mlp)}
    with pytest.raises(SlowerError, match=r"0\.50x"):
        qgraph.optimize(standing / "in.onnx", standing / "out.onnx", **job)
    untouched(standing)
    result = qgraph.optimize(standing / "in.onnx", standing / "out.onnx", **job, options=qgraph.Options(force=True))
    assert result.report.speed[0].ratio == 0.5
    onnx.load(standing / "out.onnx")


def test_a_slower_result_none_of_whose_nodes_could_be_timed(model_kit, mlp, model_free_cpu, monkeypatch):
    slow = qgraph.report.Latency(1.0, 1.0, 1.0)
    speed = qgraph.report.Speed(1, slow, slow, 0.5, 0.5, 0.5, 3)
    monkeypatch.setattr(bench, "alternate", lambda *_, **__: speed)
    monkeypatch.setattr(bench, "node_times", lambda *_, **__: {})
    with pytest.raises(SlowerError, match=r"0\.50x"):
        qgraph.optimize(mlp, data=model_kit.feeds(mlp))


def test_a_slower_result_where_by_its_measured_times_nothing_pays(model_kit, standing, model_free_cpu, monkeypatch):
    slow = qgraph.report.Latency(1.0, 1.0, 1.0)
    speed = qgraph.report.Speed(1, slow, slow, 0.5, 0.5, 0.5, 3)
    monkeypatch.setattr(bench, "alternate", lambda *_, **__: speed)
    times = [1.0, 2.0]
    monkeypatch.setattr(bench, "node_times", lambda *_: dict.fromkeys(("h_Gemm", "k_Gemm", "y_Gemm"), times.pop(0)))
    source = standing / "in.onnx"
    with pytest.raises(SlowerError, match=r"fp32 loses 0 of cosine.*0\.50x.*fastest.* loses.*0\.50x"):
        qgraph.optimize(source, standing / "out.onnx", data=model_kit.feeds(ir.load(source)))
    untouched(standing)


def test_timed_result_tells_its_speed(model_kit, mlp, model_free_cpu):
    options = qgraph.Options(bench_seconds=0.2, force=True)
    report = qgraph.optimize(mlp, data=model_kit.feeds(mlp, 6, free=8), options=options).report
    assert report.speed[0].threads == 1 and report.speed[0].ratio > 0
    assert not any("not timed" in note for note in report.notes)


def test_an_interrupt_leaves_nothing(model_kit, standing, mlp, model_free_cpu):
    def stop(what, *_):
        if what == "comparing":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        qgraph.optimize(
            standing / "in.onnx", standing / "out.onnx", data=model_kit.feeds(mlp), options=QUIET, progress=stop
        )
    untouched(standing)


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


def test_a_plan_that_never_fuses_is_an_error(model_kit, standing, mlp, model_free_cpu, monkeypatch):
    monkeypatch.setattr(audit, "audit", lambda *_: audit.Audit({}, {}, {"some_weight": ["a reader that nobody knows"]}))
    with pytest.raises(AuditError, match=r"some_weight.*a reader that nobody knows"):
        qgraph.optimize(standing / "in.onnx", standing / "out.onnx", data=model_kit.feeds(mlp), options=QUIET)
    untouched(standing)


def test_overwriting_an_old_output(model_kit, standing, mlp, model_free_cpu):
    qgraph.optimize(standing / "in.onnx", standing / "out.onnx", data=model_kit.feeds(mlp), options=QUIET)
    assert sorted(p.name for p in standing.iterdir()) == ["in.onnx", "out.onnx"]
    onnx.checker.check_model(onnx.load(standing / "out.onnx"))


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


def test_an_ir_whose_nodes_are_unsorted_says_what_to_do(model_kit, model_free_cpu):
    n = model_kit.normal
    model = model_kit.text("g (float[2, 8] x) => (float[2, 8] y) { h = MatMul (x, W)  y = Relu (h) }", W=n(8, 8))
    nodes = list(model.graph)
    model.graph.remove(nodes[0])
    model.graph.append(nodes[0])
    with pytest.raises(ModelError, match="TopologicalSortPass"):
        qgraph.optimize(model, data=model_kit.feeds(model), options=QUIET)


def test_output_whose_data_file_is_the_weights_of_the_input(model_kit, model_free_cpu, mlp, tmp_path):
    # "model.onnx" was renamed, its weights were not; the result takes the old name.
    ir.save(mlp, tmp_path / "model.onnx", external_data="model.onnx.data", size_threshold_bytes=64)
    (tmp_path / "model.onnx").rename(tmp_path / "model_fp32.onnx")
    weights = (tmp_path / "model.onnx.data").read_bytes()
    source, output, feeds = tmp_path / "model_fp32.onnx", tmp_path / "model.onnx", model_kit.feeds(mlp)
    for _ in range(2):
        qgraph.optimize(source, output, data=feeds, options=QUIET)
        assert (tmp_path / "model.onnx.data").read_bytes() == weights
        names = {"model_fp32.onnx", "model.onnx", "model.onnx.data", "model.onnx.1.data"}
        assert {p.name for p in tmp_path.iterdir()} == names
        assert model_kit.sqnr(source, output, feeds) > 25


def test_output_that_is_a_link_is_replaced(model_kit, model_free_cpu, mlp, tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "kept.onnx").write_bytes(b"the old one")
    (tmp_path / "out.onnx").symlink_to(tmp_path / "far" / "kept.onnx")
    qgraph.optimize(mlp, tmp_path / "out.onnx", data=model_kit.feeds(mlp), options=QUIET)
    onnx.checker.check_model(onnx.load(tmp_path / "out.onnx"))
    assert [p.name for p in (tmp_path / "far").iterdir()] == ["kept.onnx"]


@pytest.mark.parametrize("operator", ["Softmax", "Sigmoid", "LeakyRelu", "Tanh"])
def test_what_is_left_in_float_runs_in_float(model_kit, model_free_cpu, tmp_path, operator):
    # onnxruntime's QLinearSoftmax turns the largest codes, if they round to 256, into 0: this is not only about speed.
    n = model_kit.normal
    model = model_kit.text(
        f"""g (float[1, 4, 8, 8] x) => (float[1, 4, 8, 8] y) {{
            c = Conv <pads = [1, 1, 1, 1]> (x, W)
            s = {operator} (c)
            y = Conv <pads = [1, 1, 1, 1]> (s, V)
        }}""",
        W=n(4, 4, 3, 3),
        V=n(4, 4, 3, 3, seed=1),
    )
    options = dataclasses.replace(QUIET, keep_float=(operator,))
    result = qgraph.optimize(model, tmp_path / "out.onnx", data=model_kit.feeds(model), options=options)
    assert operator in {node.op_type for node in result.report.refused}
    Session(tmp_path / "out.onnx", SessionOptions(optimized=tmp_path / "run.onnx")).close()
    assert operator in {node.op_type for node in ir.load(tmp_path / "run.onnx").graph}


@pytest.mark.parametrize("change", [{"scheme": "int8-dynamic"}, {"scheme": "fp32"}, {"data": None}])
def test_an_observer_that_has_nothing_to_observe_is_an_error(model_kit, mlp, change):
    job = {"data": model_kit.feeds(mlp), "observer": "minmax", "bench_seconds": 0, **change}
    with pytest.raises(OptionError, match="leave out the observer"):
        qgraph.optimize(mlp, **job)
