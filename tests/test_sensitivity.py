"""Estimates of what a node loses, against what it really loses on a session; and the ranking made of them."""

import math

import numpy as np
import onnx_ir as ir
import pytest

from qgraph import ranking, registry, sensitivity
from qgraph.data import inputs_of, load
from qgraph.errors import NothingQuantizedError
from qgraph.pipeline import Context
from qgraph.rules import Rules
from qgraph.targets import Refusal
from qgraph.targets.cpu import x86_vnni

CONV = "Conv <pads = [1, 1, 1, 1]>"
FORMS = {
    "matmul": ("float[8, 256] x", "float[8, 32] y", "MatMul (x, W)", (256, 32)),
    "gemm": ("float[8, 256] x", "float[8, 32] y", "Gemm <transB = 1> (x, W, b)", (32, 256)),
    "narrow": ("float[8, 136] x", "float[8, 4] y", "MatMul (x, W)", (136, 4)),
    "conv": ("float[2, 16, 10, 10] x", "float[2, 32, 10, 10] y", f"{CONV} (x, W)", (32, 16, 3, 3)),
    "strided": ("float[2, 16, 10, 10] x", "float[2, 8, 5, 5] y", "Conv <strides = [2, 2]> (x, W)", (8, 16, 2, 2)),
    "grouped": ("float[2, 16, 10, 10] x", "float[2, 32, 10, 10] y", "Conv <pads = [1, 1, 1, 1], group = 4> (x, W)",
                (32, 4, 3, 3)),
    "depthwise": ("float[2, 16, 10, 10] x", "float[2, 16, 10, 10] y", "Conv <pads = [1, 1, 1, 1], group = 16> (x, W)",
                  (16, 1, 3, 3)),
}  # fmt: skip
SPREADS = {"even": 0.0, "channels apart": 1.0}


def estimated(model, target, data, scheme="auto"):
    """(node, scheme) -> noise, and the prepared model."""
    context = Context(target, target.scheme(scheme), data)
    prepared = registry.pipeline("prepare")(context)(model.clone()).model
    rules = Rules(target, target.scheme(scheme))
    found = sensitivity.estimates(prepared, rules, static=data is not None)
    return {(e.node, e.scheme): e.noise for e in found}, prepared


def measured(model_kit, model, target, data, scheme, feeds):
    """Share of the output's power that quantizing everything turns into noise, on a session."""
    # Of all schemes, so that the graph is prepared as for the estimates.
    context = Context(target, target.scheme("auto"), data, choices={model.graph[0].op_type: scheme})
    after = registry.pipeline("quantize")(context)(model.clone()).model
    return 10 ** (-model_kit.sqnr(model, after, feeds) / 10)


@pytest.mark.parametrize("scheme", ["int8", "int8-dynamic", "int8-weights"])
@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("form", FORMS)
def test_estimates_are_within_a_factor_of_two(model_kit, form, spread, scheme):
    x, y, operator, shape = FORMS[form]
    apart = np.exp(SPREADS[spread] * model_kit.normal(shape[0], seed=3)).astype(np.float32)
    weight = model_kit.normal(*shape) * apart.reshape(-1, *[1] * (len(shape) - 1))
    constants = {"W": weight, **({"b": model_kit.normal(32)} if "b)" in operator else {})}
    model = model_kit.text(f"g ({x}) => ({y}) {{ y = {operator} }}", **constants)
    target = model_kit.free()
    if isinstance(target.kernel(model.graph[0], target.scheme(scheme)), Refusal):
        assert "Conv" in operator and scheme != "int8"
        return
    feeds = model_kit.feeds(model, 12)
    data = load(feeds, inputs_of(model))
    found, _ = estimated(model, target, data)
    noise = next(noise for (_, name), noise in found.items() if name == scheme)
    real = measured(model_kit, model, target, data, scheme, feeds)
    if "Conv" in operator:
        # Its output is rounded as well, which counts as its reader's loss, where there is one.
        outputs = np.stack([model_kit.run(model, feed)["y"] for feed in feeds])
        step = (outputs.max() - outputs.min()) / 255
        noise += step**2 / 12 / np.square(outputs).mean()
    assert 0.5 <= real / noise <= 2.0, (real, noise)


def test_estimates_rank_nodes_as_they_are(model_kit):
    """One layer with outliers among its inputs, one without: many times the noise, by estimate and in truth."""
    n = model_kit.normal
    model = model_kit.text(
        """g (float[8, 64] x, float[8, 64] z) => (float[8, 32] a, float[8, 32] b) {
            a = MatMul (x, A)
            b = MatMul (z, B)
        }""",
        A=n(64, 32),
        B=n(64, 32, seed=1),
    )
    feeds = model_kit.feeds(model, 12)
    for feed in feeds:
        feed["z"] = np.float32(np.random.default_rng(0).standard_t(2, (8, 64)))
    data, target = load(feeds, inputs_of(model)), model_kit.free()
    found, _ = estimated(model, target, data, "int8-dynamic")
    after = registry.pipeline("quantize")(Context(target, target.scheme("int8-dynamic"), data))(model.clone()).model
    real = {}
    for name in ("a", "b"):
        pairs = [(model_kit.run(model, feed)[name], model_kit.run(after, feed)[name]) for feed in feeds]
        real[name] = sum(np.square(x - y).sum() for x, y in pairs) / sum(np.square(x).sum() for x, _ in pairs)
        assert 0.5 <= real[name] / found[f"{name}_MatMul", "int8-dynamic"] <= 2.0
    assert real["b"] > 3 * real["a"]


def test_without_data_only_what_needs_none_is_estimated(model_kit):
    model = model_kit.text(
        "g (float[8, 256] x) => (float[8, 256] y) { h = MatMul (x, A)  e = Erf (h)  y = MatMul (e, B) }",
        A=model_kit.normal(256, 256),
        B=model_kit.normal(256, 256, seed=1),
    )
    found, _ = estimated(model, model_kit.free(), None)
    assert {scheme for _, scheme in found} == {"int8-dynamic", "int8-weights"}
    assert all(1e-6 < noise < 1e-2 for noise in found.values())


def test_movers_of_codes_lose_nothing_and_an_infinite_range_everything(model_kit):
    model = model_kit.text(
        "g (float[8, 64] x) => (float[64, 8] y, float[8, 32] z) { y = Transpose (x)  z = MatMul (x, W) }",
        W=model_kit.normal(64, 32),
    )
    target = model_kit.free()
    data = load(model_kit.feeds(model), inputs_of(model))
    found, prepared = estimated(model, target, data)
    assert found["y_Transpose", "int8"] == 0.0
    node = next(node for node in prepared.graph if node.op_type == "MatMul")
    low, high = node.meta["qgraph.channels"]
    node.meta["qgraph.channels"] = low, np.where(np.arange(len(high)) == 3, np.float32(np.inf), high)
    kernel = target.kernel(node, target.scheme("int8"))
    assert sensitivity.noise_of(node, kernel) == 1.0
    assert sensitivity.noise_of(node, target.kernel(node, target.scheme("int8-dynamic"))) < 1e-2


def test_tables(model_kit):
    table = model_kit.normal(300, 16) * np.exp(3 * model_kit.normal(300, 1, seed=1))
    model = model_kit.text("g (int64[20] i) => (float[20, 16] y) { y = Gather (T, i) }", T=table.astype(np.float32))
    target = model_kit.free()
    found, _ = estimated(model, target, None)
    feeds = [{"i": np.arange(k, k + 20)} for k in range(0, 280, 20)]
    real = measured(model_kit, model, target, None, "int8-weights", feeds)
    assert 0.5 <= real / found["y_Gather", "int8-weights"] <= 2.0


def test_total_adds_up():
    noises = {("a", "int8"): 0.25, ("a", "int8-dynamic"): 1.0, ("b", "int8"): 0.5}
    assert sensitivity.total(noises, {"a": "int8", "b": "int8", "c": "int8"}) == 0.75
    assert sensitivity.total(noises, {}) == 0


# -- ranking --------------------------------------------------------------------------------------------------------


@pytest.fixture
def mlp(model_kit, tmp_path):
    n = model_kit.normal
    model = model_kit.text(
        """g (float[b, 128] x) => (float[b, 16] y) {
            h = Gemm (x, W)
            r = Relu (h)
            k = Gemm (r, V)
            e = Erf (k)
            y = Gemm (e, U)
        }""",
        W=n(128, 128, scale=0.1),
        V=n(128, 128, scale=0.1, seed=1),
        U=n(128, 16, scale=0.1),
    )
    for node in model.graph:
        node.name = node.outputs[0].name
    ir.save(model, tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def test_ranking(model_kit, model_free_cpu, mlp):
    feeds = model_kit.feeds(ir.load(mlp), 12, free=8)
    found = ranking.rank(mlp, feeds, exact=2)
    assert [one.noise for one in found] == sorted((one.noise for one in found), reverse=True)
    assert {(one.node, one.scheme) for one in found} == {
        (node, scheme) for node in ("h", "k", "y") for scheme in ("int8", "int8-dynamic", "int8-weights")
    }
    assert sum(one.exact for one in found) == 2
    assert not list(mlp.parent.glob(".*")) and [p.name for p in mlp.parent.iterdir()] == ["m.onnx"]
    every = ranking.rank(mlp, feeds, scheme="int8", exact=10)
    assert len(every) == 3 and all(one.exact for one in every)
    assert all(1e-7 < one.noise < 1e-2 and math.isfinite(one.saved) for one in every)
    estimates = ranking.rank(mlp, feeds, scheme="int8", exact=0)
    assert not any(one.exact for one in estimates)
    exact = {one.node: one.noise for one in every}
    # By estimate, a node's own error; in truth, what the rest of the graph makes of it.
    assert all(0.1 < one.noise / exact[one.node] < 10 for one in estimates)


def test_ranking_of_what_has_no_kernel(model_kit, tmp_path):
    model = model_kit.text("g (float[2, 4] x) => (float[2, 4] y) { y = Erf (x) }")
    ir.save(model, tmp_path / "m.onnx")
    with pytest.raises(NothingQuantizedError, match="No node has a kernel in scheme 'auto'"):
        ranking.rank(tmp_path / "m.onnx", model_kit.feeds(model), target=x86_vnni().name)
