"""Proofs on a runner: on as many samples as time allows, with patience for large models, and names for all nodes."""

import numpy as np
import onnx_ir as ir
import pytest

import qgraph
from qgraph import naming, proof, runners
from qgraph.compare import Runnable
from qgraph.data import inputs_of, load
from qgraph.errors import OptionError, UnprovedError
from qgraph.formats import INT8, UINT8
from qgraph.runners import Ran
from qgraph.runners.base import SECONDS, Runner, patience
from qgraph.session import KernelTime, Session, SessionOptions
from qgraph.targets.cpu import Cpu


class Far(Cpu):
    """A provider that is not here."""

    provider = "FarExecutionProvider"
    runner = "far"
    native = property(lambda self: False)

    def __init__(self):
        super().__init__("far", "far away", UINT8, INT8)


class Stand(Runner):
    """Runs on the CPU provider; each job takes the seconds of a clock that is no clock."""

    name, provider, how, setup = "far", "FarExecutionProvider", "a stand-in", "set it up"
    missing = None

    def __init__(self, load=0.0, each=0.0, broken=None):
        self.load, self.each, self.broken, self.now, self.jobs = load, each, broken, 0.0, []

    def command(self, folder):
        raise AssertionError("nothing is started")

    def job(self, config):
        raise AssertionError("nothing is started")

    def run(self, model, feeds, *, config=None, seconds=None):
        self.jobs.append(len(feeds))
        if self.broken is not None and len(self.jobs) >= self.broken:
            raise UnprovedError("a stand-in took more than 1 s on it")
        self.now += self.load + self.each * len(feeds)
        with Session(model, SessionOptions()) as session:
            outputs = [session.run(one) for one in feeds]
        nodes = list(ir.load(model).graph.all_nodes())
        kernels = [KernelTime(node.name, node.op_type, 0.0, self.provider) for node in nodes]
        return Ran(outputs, kernels, {self.provider: [node.name for node in nodes]}, "a stand-in 1.0")


@pytest.fixture
def proved(net, model_kit, tmp_path, monkeypatch):
    ir.save(net, tmp_path / "m.onnx")
    data = load(model_kit.feeds(net, 40), inputs_of(net))

    def prove(stand, **changes):
        monkeypatch.setitem(runners.RUNNERS, "far", stand)
        monkeypatch.setattr(proof.time, "monotonic", lambda: stand.now)
        return proof.prove(tmp_path / "m.onnx", Runnable(net), Far(), data, **changes)

    return prove


@pytest.mark.parametrize(
    ("load", "each", "least", "most"),
    [
        (0.0, 100.0, 2, 2),  # two take longer than all the time that there is
        (1.0, 0.5, 8, 16),  # what is left after two, with a job's start
        (0.0, 0.0, 40, 40),  # all of them, and no more
    ],
)
def test_as_many_samples_as_fit_into_the_time(proved, load, each, least, most):
    stand = Stand(load, each)
    found = proved(stand, seconds=10.0)
    assert least <= found.samples <= most and sum(stand.jobs) == found.samples and stand.jobs[0] == 2
    assert found.right and found.error == 0
    if each < 100:
        assert stand.now <= 10.0


def test_samples_do_not_take_more_memory_than_is_allowed(proved, monkeypatch):
    monkeypatch.setattr(proof, "_ROOM", 5 * (16 + 4) * 2 * 4)
    assert proved(Stand()).samples == 5


def test_a_runner_that_is_late_with_more_samples_has_proved_the_first(proved):
    assert proved(Stand(broken=2)).samples == 2
    with pytest.raises(UnprovedError):
        proved(Stand(broken=1))


def test_a_runner_that_is_too_slow_proves_nothing_and_refuses_nothing(net, model_kit, monkeypatch):
    monkeypatch.setitem(runners.RUNNERS, "far", Stand(broken=1))
    monkeypatch.setattr("qgraph.registry.target", lambda name: Far())
    monkeypatch.setattr(Far, "fuses_like_host", False)
    options = qgraph.Options(target="far", scheme="int8", force=True)
    report = qgraph.optimize(net, data=model_kit.feeds(net, 8), options=options).report
    assert report.placement is None
    assert any("Nothing was proved on FarExecutionProvider: a stand-in took more" in note for note in report.notes)


class Sleeps(Stand):
    """One that never ends."""

    def command(self, folder):
        return ["sleep", "60"], {}

    def job(self, config):
        return {}

    run = Runner.run


def test_a_runner_has_longer_for_a_larger_model_and_as_long_as_the_user_says(work, monkeypatch):
    monkeypatch.delenv(SECONDS, raising=False)
    (work / "large.onnx").write_bytes((work / "m.onnx").read_bytes())
    assert patience(work / "m.onnx") == pytest.approx(600 + (work / "m.onnx").stat().st_size / 1e6)
    monkeypatch.setenv(SECONDS, "0.2")
    assert patience(work / "m.onnx") == 0.2
    feeds = {"x": np.zeros((1, 16), np.float32)}
    with pytest.raises(UnprovedError, match=f"took more than 0 s on m.onnx: {SECONDS} allows it more"):
        Sleeps().run(work / "m.onnx", [feeds])
    for wrong in ("soon", "-1", "nan", "0"):
        monkeypatch.setenv(SECONDS, wrong)
        with pytest.raises(OptionError, match=f"{SECONDS} is a number of seconds above 0"):
            patience(work / "m.onnx")


def nameless(model_kit, folder, names=(None, None, None), **how):
    model = model_kit.text(
        "g (float[n, 16] x) => (float[n, 4] y) { h = Gemm (x, A) r = Relu (h) y = Gemm (r, B) }",
        A=model_kit.normal(16, 32),
        B=model_kit.normal(32, 4),
    )
    for node, name in zip(model.graph, names, strict=True):
        node.name = name
    folder.mkdir()
    ir.save(model, folder / "m.onnx", **how)
    return model


@pytest.mark.parametrize("how", [{}, {"external_data": "w.data", "size_threshold_bytes": 0}])
@pytest.mark.parametrize("writable", [True, False])
def test_nodes_get_names_by_which_a_provider_tells_of_them(model_kit, tmp_path, monkeypatch, how, writable):
    model = nameless(model_kit, tmp_path / "in", **how)
    if not writable:
        monkeypatch.setattr(naming.os, "access", lambda path, mode: False)
    with naming.named(tmp_path / "in" / "m.onnx") as path:
        assert (path.parent.parent == tmp_path / "in") is writable
        found = ir.load(path)
        names = [node.name for node in found.graph]
        assert all(names) and len(set(names)) == 3
        model_kit.same(model, path)
    assert sorted(p.name for p in (tmp_path / "in").iterdir()) == ["m.onnx", *(["w.data"] if how else [])]


def test_a_model_with_names_is_taken_as_it_is(model_kit, tmp_path):
    nameless(model_kit, tmp_path / "in", ("a", "b", "c"))
    with naming.named(tmp_path / "in" / "m.onnx") as path:
        assert path == tmp_path / "in" / "m.onnx"


def test_nodes_without_names_and_with_external_data_are_counted(model_kit, tmp_path, monkeypatch):
    model = nameless(model_kit, tmp_path / "in", external_data="w.data", size_threshold_bytes=0)
    monkeypatch.setitem(runners.RUNNERS, "far", Stand())
    data = load(model_kit.feeds(model, 3), inputs_of(model))
    found = proof.prove(tmp_path / "in" / "m.onnx", Runnable(tmp_path / "in" / "m.onnx"), Far(), data)
    assert found.nodes == {"FarExecutionProvider": 3} and found.share == 1 and found.work == pytest.approx(1)
