"""What a review of the targets found: each was wrong once."""

import numpy as np
import pytest
from qgraph.passes.canonicalize import Canonicalize

import qgraph
from qgraph import proof, registry, runners
from qgraph.data import inputs_of, load
from qgraph.errors import OptionError, UnprovedError
from qgraph.observers import create
from qgraph.pipeline import Context
from qgraph.runners import Ran
from qgraph.targets import Kernel
from qgraph.targets.openvino import openvino
from qgraph.targets.qnn import qnn


def written(model, feeds, scheme="a16w8"):
    target = qnn()
    context = Context(target, target.scheme(scheme), load(feeds, inputs_of(model)))
    return registry.pipeline("quantize")(context)(model.clone()).model


def test_a_fixed_range_is_not_that_of_what_it_is_joined_with(model_kit):
    model = model_kit.text(
        """
        g (float[1, 4, 6, 6] x) => (float[1, 8, 6, 6] y) {
            a = Conv <pads=[1,1,1,1]> (x, A)
            s = Sigmoid (a)
            b = Conv <pads=[1,1,1,1]> (x, B)
            y = Concat <axis=1> (s, b)
        }
        """,
        A=model_kit.normal(4, 4, 3, 3),
        B=model_kit.normal(4, 4, 3, 3, seed=1),
    )
    feeds = model_kit.feeds(model)
    done = written(model, feeds)
    assert model_kit.sqnr(model, done, feeds) > 40
    sigmoid = next(node for node in done.graph if node.op_type == "Sigmoid")
    assert float(sigmoid.outputs[0].consumers()[0].inputs[1].const_value.numpy()) == 1 / 65536


def test_infinite_constants_are_no_codes(model_kit):
    model = model_kit.text(
        """
        g (float[2, 8] x, bool[2, 8] m) => (float[2, 4] y) {
            f = Where (m, x, low)
            r = ReduceMax <axes=[1], keepdims=1> (f)
            d = Add (x, r)
            y = MatMul (d, W)
        }
        """,
        opset=17,
        low=np.float32(-np.inf),
        W=model_kit.normal(8, 4),
    )
    mask = np.ones((2, 8), bool)
    mask[:, 3] = False
    feeds = [{"x": model_kit.normal(2, 8, seed=i), "m": mask} for i in range(8)]
    done = written(model, feeds, "int8")
    where = next(node for node in done.graph if node.op_type == "Where")
    assert [v.producer() is None or v.producer().op_type != "DequantizeLinear" for v in where.inputs]
    assert model_kit.sqnr(model, done, feeds) > 25


def test_zeros_first_or_last_are_the_same_statistic():
    values = [np.zeros(4, np.float32), np.array([3e-13, -1e-12], np.float32), np.zeros(2, np.float32)]
    kept = []
    for order in ((0, 1, 2), (1, 0, 2), (2, 0, 1)):
        one = create("torch-histogram")
        for number in order:
            one.update(values[number])
        kept.append((one._power, one._keys.tolist(), one._counts.tolist()))
    assert kept[0] == kept[1] == kept[2]
    assert len(kept[0][1]) == 3, "two values and zero, each in a cell of its own"


class Stand(runners.Runner):
    """Answers as a test wants."""

    name, provider, how, setup, missing = "qnn", "QNNExecutionProvider", "a stand-in", "set it up", None

    def __init__(self, answer):
        self.answer = answer

    def command(self, folder):
        raise AssertionError

    def job(self, config):
        raise AssertionError

    def run(self, model, feeds, *, config=None, seconds=600.0):
        return self.answer(model, feeds)


@pytest.fixture
def two(model_kit, tmp_path):
    """A model with an output of floats and one of integers, and the way to prove it on a stand-in."""
    import onnx_ir as ir

    model = model_kit.text("g (float[4] x) => (float[4] y, int64[1] k) { y = Neg (x) k = ArgMax <axis=0> (x) }")
    path = tmp_path / "m.onnx"
    ir.save(model, path)
    data = load([{"x": np.array([1, 3, 2, 0], np.float32)}], inputs_of(model))
    right = {"y": np.array([-1, -3, -2, 0], np.float32), "k": np.array([1])}

    def prove(monkeypatch, **changed):
        outputs = {**right, **changed}
        monkeypatch.setitem(runners.RUNNERS, "qnn", Stand(lambda *_: Ran([outputs], [], {}, "a stand-in")))
        return proof.prove(path, qgraph.compare.Runnable(model), qnn(), data)

    return prove


def test_integers_beside_floats_are_compared(two, monkeypatch):
    assert two(monkeypatch).right
    assert not two(monkeypatch, k=np.array([3])).right


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_number_that_is_none_is_wrong(two, monkeypatch, bad):
    assert not two(monkeypatch, y=np.array([-1, bad, -2, 0], np.float32)).right


def test_what_one_output_lost_allows_nothing_to_another(model_kit, monkeypatch, tmp_path):
    import onnx_ir as ir

    model = model_kit.text("g (float[4] x) => (float[4] a, float[4] b) { a = Neg (x) b = Abs (x) }")
    text = "g (float[4] x) => (float[4] a, float[4] b) { a = Mul (x, c) b = Abs (x) }"
    coarse = model_kit.text(text, c=np.float32(-0.7))
    ir.save(coarse, tmp_path / "m.onnx")
    x = np.array([1, -2, 3, 4], np.float32)
    outputs = {"a": -0.7 * x, "b": np.abs(x) / 2}
    monkeypatch.setitem(runners.RUNNERS, "qnn", Stand(lambda *_: Ran([outputs], [], {}, "a stand-in")))
    data = load([{"x": x}], inputs_of(model))
    assert not proof.prove(tmp_path / "m.onnx", qgraph.compare.Runnable(model), qnn(), data).right


def test_a_stand_in_that_is_too_old_says_nothing_about_the_device(model_kit, monkeypatch):
    def old(model, feeds):
        raise UnprovedError("a stand-in knows opsets up to 3")

    monkeypatch.setitem(runners.RUNNERS, "xnnpack", Stand(old))
    model = model_kit.text("g (float[4] x) => (float[4] y) { y = Neg (x) }")
    report = qgraph.optimize(model, data=model_kit.feeds(model), target="xnnpack", scheme="fp32").report
    assert report.placement is None
    assert any("Nothing was proved on XnnpackExecutionProvider: a stand-in knows" in note for note in report.notes)


def test_fixed_shapes_and_masks_are_told(model_kit, monkeypatch):
    monkeypatch.setattr(proof, "runner_of", lambda target: None)
    model = model_kit.text(
        "g (float[n, 8] x, bool[n, 8] m) => (float[n, 8] y) { t = Where (m, x, low) y = Softmax <axis=-1> (t) }",
        low=np.float32(-1e9),
    )
    feeds = [{"x": model_kit.normal(3, 8, seed=i), "m": np.ones((3, 8), bool)} for i in range(6)]
    notes = qgraph.optimize(model, data=feeds, target="qnn", scheme="fp32").report.notes
    assert any("now takes x [3, 8], m [3, 8]" in note for note in notes), notes
    assert any("The mask 'low' is bounded to -100" in note for note in notes)


def test_the_ladder_with_a_state_and_with_force(model_kit, monkeypatch, tmp_path):
    monkeypatch.setattr(proof, "runner_of", lambda target: None)
    model = model_kit.text(
        "g (float[4, 32] x) => (float[4, 32] y) { a = MatMul (x, A) b = Tanh (a) y = MatMul (b, B) }",
        A=model_kit.normal(32, 32) / 6,
        B=model_kit.normal(32, 32, seed=1) / 6,
    )
    data = [{"x": model_kit.normal(4, 32, seed=i)} for i in range(12)]
    for force in (False, True):
        found = qgraph.optimize(
            model, data=data, target="qnn", min_sqnr=42, state=tmp_path / "s.json", force=force, time_limit=5
        ).report
        assert found.scheme == "a16w8" and found.quantized
    beyond = qgraph.optimize(model, data=data, target="qnn", min_sqnr=120, time_limit=5).report
    assert beyond.scheme == "fp32" and not beyond.quantized, "as any target's default, it ends in the float graph"


def test_nothing_is_timed_for_what_is_not_here(model_kit, tmp_path, monkeypatch):
    import onnx_ir as ir
    from click.testing import CliRunner

    from qgraph.cli import main

    monkeypatch.chdir(tmp_path)
    ir.save(model_kit.text("g (float[2] x) => (float[2] y) { y = Neg (x) }"), "m.onnx")
    np.savez("d.npz", x=np.zeros((2, 2), np.float32))
    found = CliRunner().invoke(main, ["bench", "m.onnx", "m.onnx", "--data", "d.npz", "--target", "nnapi"])
    assert found.exit_code == 1 and "Nothing is timed for 'nnapi' here" in " ".join(found.output.split())


def test_ranges_like_pytorchs_where_another_scheme_has_sixteen_bits():
    from qgraph.qconfigs import with_qconfig

    made = with_qconfig(qnn(), "qnnpack")
    assert made.schemes["int8"].activation.torch and not made.schemes["a16w8"].activation.torch
    with pytest.raises(OptionError):
        with_qconfig(registry.target("webgpu"), "qnnpack")


@pytest.mark.parametrize(
    ("nodes", "taken"),
    [
        ("a = Conv (x, W)  y = Add (a, x)", True),
        ("a = Conv (x, W)  b = HardSigmoid (a)  y = Mul (x, b)", True),
        ("a = Conv (x, W)  b = Relu (a)  c = MaxPool <kernel_shape = [1, 1]> (b)  y = Add (c, x)", True),
        ("a = Conv (x, W)  b = Reshape (a, shape)  c = Identity (b)  y = Add (c, b)", False),
        ("t = Transpose <perm = [0, 1, 3, 2]> (x)  a = MatMul (x, t)  y = Add (a, mask)", False),
        ("y = Mul (x, x)", False),
    ],
)
def test_openvino_sums_up_images_in_integers(model_kit, nodes, taken):
    """Scores, masks and tokens in 8 bits are what made BERT-base lose 19 dB."""
    model = model_kit.text(
        f"g (float[1, 4, 6, 6] x) => (float[1, 4, 6, 6] y) {{ {nodes} }}",
        W=model_kit.normal(4, 4, 1, 1),
        mask=np.float32(-3.4e38),
        shape=np.array([1, 4, 6, 6]),
    )
    target = openvino()
    Canonicalize(target.min_opset)(model)
    found = target.kernel(model.graph[-1], target.scheme("int8"))
    assert isinstance(found, Kernel) if taken else "no convolution near" in found.reason
