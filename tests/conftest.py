"""Fixtures shared by all tests."""

import dataclasses
import itertools
from collections import Counter

import hypothesis
import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser
import onnx_ir as ir
import pytest
from click.testing import CliRunner
from onnx_ir.passes import common

from qgraph import bench, graph, observers, registry
from qgraph.calibration import CHANNELS, SAMPLE
from qgraph.cli import main
from qgraph.data import inputs_of, load
from qgraph.formats import INT8, UINT8
from qgraph.pipeline import Context
from qgraph.qparams import fake_quantize, from_range
from qgraph.session import Session, SessionOptions
from qgraph.spec import PerAxis, QuantSpec
from qgraph.targets import KERNEL, REASON, Refusal
from qgraph.targets.cpu import Cpu

# -- models: tiny graphs as text, run on the real runtime (fixture `model_kit`) -------------------------------------


class _FreeTarget(Cpu):
    """The CPU's kernels where integers always pay and crossing costs nothing: what can be quantized, is."""

    def kernel(self, node, scheme):
        found = super().kernel(node, scheme)
        return found if isinstance(found, Refusal) else dataclasses.replace(found, float_seconds=1.0, integer_seconds=0)

    def quantize_cost(self, value):
        return 0.0

    def dequantize_cost(self, value):
        return 0.0


class _Constant(dict):
    """Holds every key, with one value."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def __contains__(self, key):
        return True

    def __missing__(self, key):
        return self.value


class ModelKit:
    """What the tests of passes and of whole models share."""

    @staticmethod
    def text(text, /, opset=21, **weights):
        """A model from ONNX text; `weights` become initializers of these names."""
        header = "" if text.lstrip().startswith("<") else f'<ir_version: 10, opset_import: ["" : {opset}]>\n'
        proto = onnx.parser.parse_model(header + text)
        proto.graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(a), name) for name, a in weights.items())
        return ir.from_proto(proto)

    @staticmethod
    def normal(*shape, seed=0, scale=1.0):
        """Seeded normal float32 numbers."""
        return (np.random.default_rng([seed, *shape]).standard_normal(shape) * scale).astype(np.float32)

    @staticmethod
    def feeds(model, count=8, free=2, seed=0):
        """`count` seeded feeds for the inputs without default; free dimensions get the size `free`."""
        rng = np.random.default_rng(seed)
        feeds = [{} for _ in range(count)]
        for value in model.graph.inputs:
            if value.name in model.graph.initializers:
                continue
            shape = [dim if isinstance(dim, int) else free for dim in value.shape]
            kind = np.dtype(value.dtype.numpy())
            for feed in feeds:
                array = rng.standard_normal(shape) if kind.kind == "f" else rng.integers(0, 2, shape)
                feed[value.name] = np.asarray(array, kind)
        return feeds

    @staticmethod
    def run(model, feeds):
        """Outputs of a real session."""
        with Session(model, SessionOptions(threads=1)) as session:
            return session.run(feeds)

    @staticmethod
    def ops(model):
        """The operators of the main graph, in order."""
        return [node.op_type for node in model.graph]

    @classmethod
    def same(cls, before, after, feeds=None, tolerance=1e-5):
        """Both give the same outputs, under the same names, to within `tolerance` of the largest number."""
        options = SessionOptions(threads=1)
        with Session(before, options) as first, Session(after, options) as second:
            assert second.outputs == first.outputs
            for feed in cls.feeds(before, 2) if feeds is None else feeds:
                expected, found = first.run(feed), second.run(feed)
                for name, array in expected.items():
                    assert (found[name].shape, found[name].dtype) == (array.shape, array.dtype), name
                    limit = tolerance * max(1.0, float(np.abs(array).max(initial=0)))
                    np.testing.assert_allclose(found[name], array, rtol=0, atol=limit, err_msg=name)

    @classmethod
    def sqnr(cls, before, after, feeds):
        """The lowest signal to noise ratio of any output, dB, over all feeds."""
        signal, noise = Counter(), Counter()
        options = SessionOptions(threads=1)
        with Session(before, options) as first, Session(after, options) as second:
            assert second.outputs == first.outputs
            for feed in feeds:
                expected, found = first.run(feed), second.run(feed)
                for name, array in expected.items():
                    assert found[name].shape == array.shape, name
                    signal[name] += float(np.square(array.astype(np.float64)).sum())
                    noise[name] += float(np.square(array.astype(np.float64) - found[name]).sum())
        return min(10 * np.log10(signal[n] / noise[n]) if noise[n] else np.inf for n in signal)

    @staticmethod
    def free():
        """A target on which everything that can be quantized is."""
        return _FreeTarget("free", "tests: integers always pay", UINT8, INT8)

    @classmethod
    def static(cls, model, feeds=None, target=None, **options):
        """`model` (changed in place) through the static pipeline."""
        target = target or cls.free()
        data = load(cls.feeds(model) if feeds is None else feeds, inputs_of(model))
        context = Context(target, target.scheme("int8"), data, **options)
        return registry.pipeline("static")(context)(model).model

    @staticmethod
    def node_times(monkeypatch):
        """Profiles that find every node twice as fast in integers as in float."""
        found = itertools.cycle([_Constant(2.0), _Constant(1.0)])
        monkeypatch.setattr(bench, "node_times", lambda *_, **__: next(found))

    @staticmethod
    def integer(model):
        """Names of the nodes that are planned for integers."""
        return [node.name for node in model.graph if KERNEL in node.meta]

    @staticmethod
    def reasons(model):
        """Reason of each node that is not, by name."""
        return {node.name: node.meta[REASON] for node in model.graph if REASON in node.meta}

    @staticmethod
    def tensors(model):
        """The initializers as arrays."""
        return {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}


@pytest.fixture(scope="session")
def model_kit():
    """Helpers of the tests of passes and whole models, see `ModelKit`."""
    return ModelKit


@pytest.fixture
def model_free_cpu(monkeypatch):
    """Makes `cpu` the target on which integers always pay, for whole compilations of tiny models."""
    find = registry.target
    monkeypatch.setattr(registry, "target", lambda name: ModelKit.free() if name == "cpu" else find(name))


@pytest.fixture
def model_eight_bits():
    """The model with the inputs of its surveyed layers in u8, min-max, and their weights in s8 per channel."""

    def build(model):
        copy = model.clone()
        for node in [n for n in copy.graph if SAMPLE in n.meta]:
            low, high = node.meta[CHANNELS]
            params = from_range(low.min(), high.max(), QuantSpec(UINT8))
            numbers = [params.scale, np.uint8(params.zero_point)]
            scale, zero = (
                graph.add_initializer(copy.graph, ir.Tensor(np.asarray(a)), f"{node.outputs[0].name}_{i}")
                for i, a in enumerate(numbers)
            )
            codes = ir.node("QuantizeLinear", [node.inputs[0], scale, zero])
            back = ir.node("DequantizeLinear", [codes.outputs[0], scale, zero])
            copy.graph.insert_before(node, [codes, back])
            node.replace_input_with(0, back.outputs[0])
            weight = node.inputs[1].const_value.numpy()
            axis = 0 if node.op_type == "Conv" or node.attributes.get_int("transB", 0) else 1
            others = tuple(i for i in range(weight.ndim) if i != axis)
            spec = QuantSpec(INT8, PerAxis(axis), symmetric=True)
            rounded = fake_quantize(weight, from_range(weight.min(others), weight.max(others), spec))
            made = graph.add_initializer(copy.graph, ir.Tensor(rounded), f"{node.outputs[0].name}_rounded")
            node.replace_input_with(1, made)
        common.NameFixPass()(copy)
        return copy

    return build


# -- the lower floors (fixtures `tiny_*`) -----------------------------------------------------------------------------

# The same examples at every run; `--hypothesis-profile=explore` looks further.
hypothesis.settings.register_profile("same", deadline=None, derandomize=True)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=1000)
hypothesis.settings.load_profile("same")


@pytest.fixture
def tiny_chain():
    """Maker of y = Sqrt(Relu(x * w + c)): exact at any batch size; inner values are scaled, shifted and positive."""

    def build(batch="N", width=4, weight=2.0):
        text = f"""<ir_version: 10, opset_import: ["" : 21]>
            chain (float[{batch}, {width}] x) => (float[{batch}, {width}] y)
            <float[{batch}, {width}] scaled, float[{batch}, {width}] shifted, float[{batch}, {width}] positive>
            {{ [mul] scaled = Mul(x, w)  [add] shifted = Add(scaled, c)
               [relu] positive = Relu(shifted)  [sqrt] y = Sqrt(positive) }}"""
        weights = {"w": np.full(width, weight, np.float32), "c": np.arange(width, dtype=np.float32)}
        return ir.from_onnx_text(text, initializers=[ir.tensor(array, name=name) for name, array in weights.items()])

    return build


_NET = """g (float[n, 16] x) => (float[n, 4] y) {
    h = Gemm (x, A)
    r = Relu (h)
    y = Gemm (r, B)
}"""


@pytest.fixture
def net(model_kit):
    """A small network with named nodes."""
    model = model_kit.text(_NET, A=model_kit.normal(16, 32), B=model_kit.normal(32, 4))
    for node in model.graph:
        node.name = f"/{node.outputs[0].name}"
    return model


@pytest.fixture
def work(net, model_kit, tmp_path, monkeypatch):
    """The present folder, with that network in `m.onnx` and data for it in `d.npz`."""
    monkeypatch.chdir(tmp_path)
    ir.save(net, "m.onnx")
    np.savez("d.npz", x=model_kit.normal(12, 16, seed=1))
    return tmp_path


@pytest.fixture
def run():
    """Calls the command line; what fails in any other way than by an exit code fails the test."""

    def call(*arguments):
        found = CliRunner().invoke(main, [str(a) for a in arguments], terminal_width=200)
        assert found.exception is None or isinstance(found.exception, SystemExit), found.exception
        return found

    return call


# -- statistics -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def observed():
    """Maker of an observer of this name that has seen these arrays, one after the other."""

    def make(name, *samples):
        observer = observers.create(name)
        for sample in samples:
            observer.update(sample)
        return observer

    return make


@pytest.fixture(scope="session")
def frozen():
    """Gives a statistic's state, to be compared bit for bit."""
    return lambda one: {key: (a.dtype.str, a.shape, a.tobytes()) for key, a in one.state().items()}
