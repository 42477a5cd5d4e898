"""`auto` where one row at a time is timed: weights in blocks of few bits; everything else as it was."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import qgraph
from qgraph import modelio, registry
from qgraph.errors import AccuracyError
from qgraph.few_bits import FewBits, Order
from qgraph.formats import INT8, UINT8
from qgraph.rules import Rules
from qgraph.spec import Mixture
from qgraph.targets.cpu import Cpu
from qgraph.targets.cpu_costs import SHIPPED, Costs

ROOT = Path(__file__).resolve().parent.parent
# Of this processor one row of little weights is in blocks at once.
RATES = {"blocks.row.8.32": 1 / 90, "blocks.row.4.32": 1 / 100, "blocks.row.2.32": 1 / 110}
SIZES = {"layers": 1, "width": 64, "heads": 4, "kv_heads": 2, "hidden": 160, "vocabulary": 600}


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    """A decoder with a cache, and token ids for it."""
    spec = importlib.util.spec_from_file_location("decoder", ROOT / "tools" / "decoder.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["decoder"] = module
    spec.loader.exec_module(module)
    folder = tmp_path_factory.mktemp("decoder")
    path = module.write(folder / "model.onnx", module.Decoder(**SIZES), seed=1)
    np.savez(folder / "ids.npz", input_ids=np.random.default_rng(0).integers(0, 600, (24, 12)))
    yield path, folder / "ids.npz"
    del sys.modules["decoder"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Makes `cpu` a target on which even tiny weights in blocks pay."""
    find = registry.target

    def target(name):
        if name != "cpu":
            return find(name)
        costs = {key: 1.0 if key.endswith(".start") else each for key, each in SHIPPED.coefficients.items()}
        return Cpu("quick", "tests: no time to start", UINT8, INT8, Costs("tests", {**costs, **RATES}))

    monkeypatch.setattr(registry, "target", target)


def quantized(source, tmp_path, **options):
    """The report."""
    more = {"bench_seconds": 0, "block_size": 32, **options}
    return qgraph.optimize(source, tmp_path / "out.onnx", **more).report


def schemes(report):
    return {node.scheme for node in report.quantized}


def names(report):
    return [one.name for one in report.candidates]


def test_a_decoder_goes_into_four_bits(decoder, tmp_path):
    """Within the budget, its codes learned, and told."""
    path, ids = decoder
    report = quantized(path, tmp_path, data=str(ids))
    assert "int4" in schemes(report) and schemes(report) <= {"int2", "int4", "int8-weights"}
    assert any("'auto' chose among int8-weights, int4, int2: activations stay" in note for note in report.notes)
    assert report.scheme == "auto" and report.budget.metric == "kl"
    chosen = next(one for one in report.candidates if one.verdict == "chosen")
    assert chosen.loss <= 0.05
    assert (tmp_path / "out.onnx").stat().st_size < 0.3 * (path.with_name("model.onnx.data")).stat().st_size
    assert any(step.name == "RoundBlocks" for step in report.steps)


def test_few_bits_need_data(decoder, tmp_path):
    """What they lose on random tokens says little."""
    report = quantized(decoder[0], tmp_path)
    assert report.quantized and not {"int4", "int2"} & schemes(report)
    assert not any("'auto' chose among" in note for note in report.notes)


def test_the_first_candidate_has_no_two_bits(decoder, tmp_path):
    """They come in only where it leaves something of the budget."""
    path, ids = decoder
    report = quantized(path, tmp_path, data=str(ids), max_loss="200%", metric="cosine")
    first = next(one for one in report.candidates if one.name == "fastest")
    assert set(first.nodes) <= {"int4", "int8-weights"} and "int4" in first.nodes
    assert any("int2" in one.nodes and one.verdict != "loses too much" for one in report.candidates)


def test_channels_are_scaled_for_four_bits(decoder, tmp_path):
    """As they are where these were asked for: factors for two bits are others."""
    path, ids = decoder
    model = modelio.read(path)
    for name, value in model.graph.initializers.items():
        if "layernorm" in name:
            # A few channels of each norm reach far, as those of trained models do.
            gain = value.const_value.numpy().copy()
            gain[:3] *= 30
            value.const_value = ir.Tensor(gain, name=name)
    found = []
    for scheme in ("int4", "auto"):
        report = quantized(model, tmp_path, data=str(ids), scheme=scheme, min_sqnr=3, force=True)
        found.append(next(one.sqnr for one in report.candidates if one.name == "fastest"))
    assert found[0] == pytest.approx(found[1], abs=0.5)


def test_a_narrow_budget_takes_more_bits(decoder, tmp_path):
    path, ids = decoder
    report = quantized(path, tmp_path, data=str(ids), min_sqnr=30)
    assert "int8-weights" in schemes(report) and "int2" not in schemes(report)
    assert report.fidelity.worst.sqnr > 30


def test_without_time_the_most_bits_are_tried(decoder, tmp_path):
    """What four bits lose is too much, and nothing can be measured any more."""
    path, ids = decoder
    report = quantized(path, tmp_path, data=str(ids), min_sqnr=30, time_limit=0)
    assert names(report) == ["fp32", "fastest", "most bits"] and schemes(report) == {"int8-weights"}


def test_what_the_caller_chose_stays(decoder, tmp_path):
    """Options about integers ask for them."""
    path, ids = decoder
    report = quantized(path, tmp_path, data=str(ids), choices={"MatMul": "int8-dynamic"})
    assert schemes(report) <= {"int8", "int8-dynamic", "int8-weights"}
    report = quantized(path, tmp_path, data=str(ids), observer="minmax", force=True)
    assert not {"int4", "int2"} & schemes(report)


def test_nothing_within_is_an_error_as_ever(decoder, tmp_path):
    path, ids = decoder
    # The float graph itself is within any other.
    report = quantized(path, tmp_path, data=str(ids), min_sqnr=90)
    assert not report.quantized
    with pytest.raises(AccuracyError):
        quantized(path, tmp_path, data=str(ids), min_sqnr=500)


MLP = "g (float[n, 256] x) => (float[n, 128] y) { h = MatMul (x, A) r = Relu (h) y = MatMul (r, B) }"
CNN = """g (float[n, 16, 8, 8] x) => (float[n, 128] y) {
    c = Conv <pads = [1, 1, 1, 1]> (x, W)
    r = Relu (c)
    p = GlobalAveragePool (r)
    f = Flatten (p)
    y = Gemm (f, B)
}"""


def mlp(kit):
    return kit.text(MLP, A=kit.normal(256, 512, scale=0.1), B=kit.normal(512, 128, scale=0.1))


def cnn(kit):
    return kit.text(CNN, W=kit.normal(256, 16, 3, 3, scale=0.1), B=kit.normal(256, 128, scale=0.1))


@pytest.mark.parametrize(("make", "rows"), [(mlp, 64), (cnn, 1), (cnn, 4)])
@pytest.mark.parametrize("given", [True, False])
def test_other_models_have_the_same_bytes(model_kit, tmp_path, monkeypatch, make, rows, given):
    """As if there were nothing to choose: many rows, and what has no such kernels."""
    model, found = make(model_kit), []
    data = model_kit.feeds(model, 16, rows) if given else None
    for suited in (FewBits.suited, lambda *_: None):
        monkeypatch.setattr(FewBits, "suited", suited)
        report = quantized(model.clone(), tmp_path, data=data, min_sqnr=20)
        assert "int4" not in schemes(report)
        found.append((tmp_path / "out.onnx").read_bytes())
    assert found[0] == found[1]


def suited(model, target, rows=None):
    """What `auto` becomes on `target` for `model` on that many rows."""
    for value in model.graph.inputs:
        value.meta["qgraph.shape"] = (rows or 64, *value.shape[1:])
    rules = Rules(target, target.scheme("auto"))
    return FewBits(rows is None).suited(model, target, rules)


def test_costs_decide_and_not_names(model_kit):
    """One row of a large product is fastest in blocks, whatever the model is; many rows are not."""
    text = "g (float[n, 2048] x) => (float[n, 2048] y) { y = MatMul (x, A) }"
    model = model_kit.text(text, A=model_kit.normal(2048, 2048))
    target = registry.target("x86-vnni")
    found = suited(model, target)
    assert isinstance(found, Mixture) and found.name == "auto"
    assert {part.name for part in found.parts} == {"int8-weights", "int4", "int2"}
    order = Order.of(found)
    assert order.last == {"int2"} and order.others == {"int4", "int2"}
    assert [part.name for part in order.usual.parts] == ["int8-weights", "int4"]
    assert suited(model, target, 256) is None and suited(model, target, 1) == found
    # A processor whose products of integers are ten times as fast.
    integers = {key: each / 10 for key, each in SHIPPED.coefficients.items() if "integers" in key or "dynamic" in key}
    other = Cpu("other", "", UINT8, INT8, Costs("", {**SHIPPED.coefficients, **integers}))
    assert suited(model, other) is None


@pytest.mark.parametrize("name", ["wasm", "xnnpack", "cuda", "webgpu", "qnn", "openvino", "tensorrt"])
def test_targets_without_fast_blocks_stay(model_kit, name):
    """Or with the schemes among their default ones already."""
    text = "g (float[n, 2048] x) => (float[n, 2048] y) { y = MatMul (x, A) }"
    assert suited(model_kit.text(text, A=model_kit.normal(2048, 2048)), registry.target(name)) is None


def test_sizes_are_given_back(model_kit):
    """Where nothing is changed for a model, nothing of it is."""
    text = "g (float[n, 256] x) => (float[n, 256] y) { h = MatMul (x, A) y = MatMul (h, A) }"
    model = model_kit.text(text, A=model_kit.normal(256, 256))
    inner = model.graph[1].inputs[0]
    model.graph.inputs[0].meta["qgraph.shape"] = (7, 256)
    target = registry.target("x86-vnni")
    FewBits(True).suited(model, target, Rules(target, target.scheme("auto")))
    assert model.graph.inputs[0].meta["qgraph.shape"] == (7, 256) and "qgraph.shape" not in inner.meta
    FewBits(True).price(model)
    assert model.graph.inputs[0].meta["qgraph.shape"] == inner.meta["qgraph.shape"] == (1, 256)


def test_only_the_default_scheme_is_replaced(decoder, tmp_path, monkeypatch):
    """A named scheme, or the search by size, is no choice of `auto`."""
    path, _ = decoder
    monkeypatch.setattr(FewBits, "suited", lambda *_: pytest.fail("it was asked for"))
    assert schemes(quantized(path, tmp_path, scheme="int8-weights")) == {"int8-weights"}
    assert schemes(quantized(path, tmp_path, bits_per_weight=7)) <= {"int2", "int4", "int8-weights"}
