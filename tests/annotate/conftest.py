"""Graphs that are annotated at given costs, and what was annotated."""

import dataclasses

import onnx_ir as ir
import pytest
from qgraph.passes import Annotate, Canonicalize
from qgraph.passes.annotate import GROUP

from qgraph.formats import INT8, UINT8
from qgraph.targets import KERNEL, REASON, SPEC, Refusal
from qgraph.targets.cpu import Cpu


class Priced(Cpu):
    """The CPU's kernels at given times: node -> (float, integer), (10, 2) where not given; crossings cost the same."""

    def __init__(self, times=None, crossing=1.0):
        super().__init__("priced", "tests: given costs", UINT8, INT8)
        self.times, self.crossing = times or {}, crossing

    def kernel(self, node, scheme):
        found = super().kernel(node, scheme)
        if isinstance(found, Refusal):
            return found
        in_float, in_integers = self.times.get(node.name, (10.0, 2.0))
        return dataclasses.replace(found, float_seconds=in_float, integer_seconds=in_integers)

    def quantize_cost(self, value):
        return self.crossing

    def dequantize_cost(self, value):
        return self.crossing


@pytest.fixture
def annotated(model_kit):
    """Canonicalizes, names nodes after their first outputs, annotates; returns the names of the integer nodes."""

    def apply(model, target=None, keep_float=(), **options):
        Canonicalize()(model)
        for node in model.graph:
            node.name = node.outputs[0].name
        before = ir.to_proto(model)
        target = target or Priced()
        Annotate(target, target.scheme("int8"), keep_float, **options)(model)
        assert ir.to_proto(model) == before, "only meta may be written"
        for node in model.graph:
            assert (KERNEL in node.meta) != (REASON in node.meta), node.name
        return {node.name for node in model.graph if KERNEL in node.meta}

    return apply


@pytest.fixture
def priced():
    """The CPU at given times, see `Priced`."""
    return Priced


def values_of(model):
    return [*model.graph.inputs, *(v for node in model.graph for v in node.outputs)]


@pytest.fixture
def value():
    """Finds a value by its name."""
    return lambda model, name: next(v for v in values_of(model) if v.name == name)


@pytest.fixture
def specs():
    """Gives the names of the values that have a spec."""
    return lambda model: {v.name for v in values_of(model) if SPEC in v.meta}


@pytest.fixture
def groups():
    """Gives the names of the values that share parameters, group by group."""

    def found(model):
        groups = {}
        for v in values_of(model):
            if GROUP in v.meta:
                groups.setdefault(v.meta[GROUP], set()).add(v.name)
        return sorted(sorted(names) for names in groups.values() if len(names) > 1)

    return found


@pytest.fixture
def chain(model_kit):
    """Two convolutions, an operator that only exists in float, and two more."""
    n = model_kit.normal
    return model_kit.text(
        """g (float[1, 4, 8, 8] x) => (float[1, 4, 8, 8] y) {
            a = Conv <pads = [1, 1, 1, 1]> (x, A)
            b = Conv <pads = [1, 1, 1, 1]> (a, B)
            t = Erf (b)
            c = Conv <pads = [1, 1, 1, 1]> (t, C)
            y = Conv <pads = [1, 1, 1, 1]> (c, D)
        }""",
        **{name: n(4, 4, 3, 3, seed=i) for i, name in enumerate("ABCD")},
    )


@pytest.fixture
def residual(model_kit):
    n = model_kit.normal
    return model_kit.text(
        """g (float[1, 4, 8, 8] x) => (float[1, 4, 8, 8] y) {
            s = Conv <pads = [1, 1, 1, 1]> (x, A)
            r = Relu (s)
            a = Conv <pads = [1, 1, 1, 1]> (r, B)
            ar = Relu (a)
            b = Conv <pads = [1, 1, 1, 1]> (ar, C)
            p = Add (b, r)
            y = Relu (p)
        }""",
        **{name: n(4, 4, 3, 3, seed=i) for i, name in enumerate("ABC")},
    )
