"""Proof on a target that this machine is not: by a runner, whose nodes and numbers are looked at."""

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner

import qgraph
from qgraph import elsewhere, proof, registry, runners, work
from qgraph.cli import main
from qgraph.compare import Runnable
from qgraph.data import inputs_of, load
from qgraph.errors import ExecutionError, ProviderError
from qgraph.formats import INT8, UINT8
from qgraph.pipeline import Context
from qgraph.runners import Ran
from qgraph.session import KernelTime, Session, SessionOptions
from qgraph.targets import Refusal
from qgraph.targets.cpu import Cpu
from qgraph.targets.qnn import Qnn

FAR = "FarExecutionProvider"
NET = """
g (float[n, 8, 6, 6] x) => (float[n, 5] y) {
    a = Conv <pads=[1,1,1,1]> (x, W, b)
    r = Relu (a)
    p = GlobalAveragePool (r)
    f = Flatten (p)
    y = Gemm (f, M, c)
}
"""


class Far(Cpu):
    """A provider that is not here."""

    provider = FAR
    runner = "far"
    native = property(lambda self: False)

    def __init__(self):
        super().__init__("far", "far away", UINT8, INT8)

    def kernel(self, node, scheme):
        found = super().kernel(node, scheme)
        return found if isinstance(found, Refusal) else dataclasses.replace(found, float_seconds=1.0, integer_seconds=0)

    def quantize_cost(self, value):
        return 0.0

    def dequantize_cost(self, value):
        return 0.0


class Stand(runners.Runner):
    """Runs on the CPU provider, and tells or changes what a test wants."""

    name, provider, how, setup = "far", FAR, "a stand-in", "set it up"
    missing = None

    def __init__(self, change=None, left=(), assigned=True):
        self.change, self.left, self.tells = change or (lambda array: array), left, assigned

    def command(self, folder):
        raise AssertionError("nothing is started")

    def job(self, config):
        raise AssertionError("nothing is started")

    def run(self, model, feeds, *, config=None, seconds=None):
        names = [(node.name, node.op_type) for node in ir.load(model).graph]
        with Session(model, SessionOptions()) as session:
            outputs = [{k: self.change(v) for k, v in session.run(one).items()} for one in feeds]
        where = {name: "CPUExecutionProvider" if op in self.left else FAR for name, op in names}
        assigned = {p: [n for n in where if where[n] == p] for p in sorted(set(where.values()))}
        kernels = [KernelTime(name, op, 0.0, where[name]) for name, op in names]
        return Ran(outputs, kernels, assigned if self.tells else {}, "a stand-in 1.0")


@pytest.fixture
def net(model_kit):
    return model_kit.text(
        NET,
        W=model_kit.normal(12, 8, 3, 3, scale=0.1),
        b=model_kit.normal(12),
        M=model_kit.normal(12, 5),
        c=model_kit.normal(5),
    )


@pytest.fixture
def samples(model_kit, net):
    return model_kit.feeds(net)


@pytest.fixture
def stand(monkeypatch):
    def put(**how):
        monkeypatch.setitem(runners.RUNNERS, "far", Stand(**how))
        monkeypatch.setattr("qgraph.registry.target", lambda name: Far())

    return put


@pytest.mark.parametrize("assigned", [True, False])
def test_shares_of_nodes_and_of_work(net, samples, stand, assigned):
    stand(left=("Gemm",), assigned=assigned)
    found = qgraph.optimize(net, data=samples, target="far", scheme="fp32").report.placement
    assert found.nodes == {FAR: 4, "CPUExecutionProvider": 1}
    assert found.share == pytest.approx(0.8)
    conv, gemm = 2 * 12 * 36 * 8 * 9, 2 * 12 * 5
    assert found.work == pytest.approx(conv / (conv + gemm))
    assert [(one.op_type, one.provider) for one in found.left] == [("Gemm", "CPUExecutionProvider")]
    assert found.error == 0 and found.right and found.sqnr > 100 and found.cosine == pytest.approx(1)


def test_quantizers_are_not_counted(net, samples, stand):
    stand(left=("QuantizeLinear",))
    found = qgraph.optimize(net, data=samples, target="far", scheme="int8", force=True).report
    assert found.quantized
    assert found.placement.share == 1.0 and found.placement.left == []


def test_wrong_numbers_are_an_error_and_nothing_is_written(net, samples, stand, tmp_path):
    stand(change=lambda array: array * 1.5)
    with pytest.raises(ProviderError, match=r"wrong numbers: they differ by 0\.5 "):
        qgraph.optimize(net, tmp_path / "out.onnx", data=samples, target="far", scheme="fp32")
    assert list(tmp_path.iterdir()) == []
    found = qgraph.optimize(net, data=samples, target="far", scheme="fp32", force=True).report.placement
    assert not found.right and found.error == pytest.approx(0.5)
    assert "WRONG" in elsewhere.told(found)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_no_number_is_wrong(net, samples, stand, bad):
    stand(change=lambda array: np.full_like(array, bad))
    with pytest.raises(ProviderError, match="wrong numbers"):
        qgraph.optimize(net, data=samples, target="far", scheme="fp32")


def test_another_shape_is_wrong(net, samples, stand):
    stand(change=lambda array: array[:1])
    with pytest.raises(ProviderError, match="wrong numbers"):
        qgraph.optimize(net, data=samples, target="far", scheme="fp32")


def test_rounding_like_that_of_quantization_is_right(net, samples, stand, monkeypatch):
    noise = np.random.default_rng(0)
    stand(change=lambda array: array + noise.standard_normal(array.shape).astype(np.float32) * 0.004 * array.std())
    monkeypatch.setattr(Far, "tolerance", 1e-6)
    assert qgraph.optimize(net, data=samples, target="far", scheme="int8", force=True).report.placement.right
    # The float model has lost nothing, so that the same difference is no rounding.
    with pytest.raises(ProviderError):
        qgraph.optimize(net, data=samples, target="far", scheme="fp32")


def test_what_the_provider_does_not_take_is_left_in_float(net, samples, stand, monkeypatch):
    stand(left=("Gemm",))
    monkeypatch.setattr(Far, "fuses_like_host", False)
    found = qgraph.optimize(net, data=samples, target="far", scheme="int8", force=True).report
    reasons = {node.op_type: node.reason for node in found.refused}
    assert f"{FAR} left it to CPUExecutionProvider" in reasons["Gemm"]
    assert {node.op_type for node in found.quantized} >= {"Conv"}


def test_a_refusal_is_told_with_the_runtimes_words(net, samples, monkeypatch):
    class Refuses(Stand):
        def run(self, model, feeds, *, config=None, seconds=None):
            raise ExecutionError("a stand-in 1.0 cannot run model.onnx: no such operator")

    monkeypatch.setitem(runners.RUNNERS, "far", Refuses())
    monkeypatch.setattr("qgraph.registry.target", lambda name: Far())
    with pytest.raises(ProviderError, match=r"does not run there.*no such operator"):
        qgraph.optimize(net, data=samples, target="far", scheme="fp32")
    told = qgraph.optimize(net, data=samples, target="far", scheme="fp32", force=True).report
    assert told.placement is None and any("no such operator" in note for note in told.notes)


def test_without_the_runner_it_is_said_and_how_to_have_it(net, samples, monkeypatch):
    class Missing(Stand):
        missing = "there is no such thing"

    monkeypatch.setitem(runners.RUNNERS, "far", Missing())
    monkeypatch.setattr("qgraph.registry.target", lambda name: Far())
    report = qgraph.optimize(net, data=samples, target="far", scheme="fp32").report
    assert report.placement is None and report.speed == []
    assert any("Nothing here runs models on FarExecutionProvider" in n and "set it up" in n for n in report.notes)
    assert proof.how(Far()) is None
    assert "There is no such thing. To have it here: set it up." in proof.missing(Far())


def test_validate_shows_the_placement_and_fails_on_wrong_numbers(net, samples, stand, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ir.save(net, "a.onnx")
    np.savez("data.npz", x=np.concatenate([one["x"] for one in samples]))
    stand()
    found = CliRunner().invoke(main, ["validate", "a.onnx", "a.onnx", "--data", "data.npz", "--target", "far"])
    assert found.exit_code == 0, found.output
    assert "ran 100 % of the nodes" in " ".join(found.output.split())
    stand(change=lambda array: -array)
    found = CliRunner().invoke(main, ["validate", "a.onnx", "a.onnx", "--data", "data.npz", "--target", "far"])
    assert (
        found.exit_code == 1 and "wrong numbers" in " ".join(found.output.split()) and "Traceback" not in found.output
    )


@pytest.mark.parametrize(
    "op, inputs, outputs, count",
    [
        ("Conv", [(1, 8, 6, 6), (12, 8, 3, 3)], [(1, 12, 6, 6)], 12 * 36 * 72),
        ("Conv", [(1, 8, 6, 6), (8, 1, 3, 3)], [(1, 8, 6, 6)], 8 * 36 * 9),
        ("ConvTranspose", [(1, 8, 6, 6), (8, 4, 2, 2)], [(1, 4, 12, 12)], 8 * 36 * 16),
        ("MatMul", [(2, 3, 4), (4, 5)], [(2, 3, 5)], 2 * 3 * 5 * 4),
        ("Gemm", [(3, 4), (5, 4), (5,)], [(3, 5)], 60),
        ("LSTM", [(7, 2, 3), (1, 16, 3), (1, 16, 4)], [(7, 1, 2, 4)], 14 * (48 + 64)),
        ("Attention", [(2, 3, 8), (2, 5, 8), (2, 5, 4)], [(2, 3, 4)], 2 * 3 * 5 * (8 + 4)),
        ("Attention", [(2, 4, 3, 8), (2, 1, 5, 8), (2, 1, 5, 6)], [(2, 4, 3, 6)], 2 * 4 * 3 * 5 * (8 + 6)),
        ("Relu", [(4, 4)], [(4, 4)], 0),
        ("MatMul", [], [], 0),
    ],
)
def test_multiplications(op, inputs, outputs, count):
    assert work.multiplications(KernelTime("n", op, 0.0, "", tuple(inputs), tuple(outputs))) == count


def test_of_several_outputs_the_worst_counts(model_kit, monkeypatch, tmp_path):
    model = model_kit.text("g (float[4] x) => (float[4] y, float[4] z) { y = Relu (x) z = Neg (x) }")
    data = load([{"x": model_kit.normal(4)}], inputs_of(model))

    class Worse(Stand):
        def run(self, model, feeds, *, config=None, seconds=None):
            ran = super().run(model, feeds)
            ran.outputs[0]["z"] = ran.outputs[0]["z"] * np.float32(2)
            return ran

    monkeypatch.setitem(runners.RUNNERS, "far", Worse())
    ir.save(model, tmp_path / "m.onnx")
    found = proof.prove(tmp_path / "m.onnx", Runnable(model), Far(), data)
    assert found.error == pytest.approx(1.0) and found.work is None
    assert found.sqnr == pytest.approx(0.0, abs=1e-5)


def test_an_accelerator_takes_the_graph_whole(net, samples):
    target = Qnn()
    context = Context(target, target.scheme("int8"), load(samples, inputs_of(net)))
    done = registry.pipeline("quantize")(context)(net.clone()).model
    floats = [node for node in done.graph if node.op_type not in ("QuantizeLinear", "DequantizeLinear")]
    assert [node.op_type for node in floats] == ["Conv", "GlobalAveragePool", "Flatten", "Gemm"]
    for node in floats:
        makers = {v.producer().op_type for v in node.inputs if v is not None and v.producer() is not None}
        assert makers == {"DequantizeLinear"}, node.op_type
    assert tuple(done.graph.inputs[0].shape.numpy()) == (2, 8, 6, 6), "shapes are fixed to those of the data"
