"""A chain of values that observers watch, and what they should see."""

import numpy as np
import pytest

from qgraph import data, observers
from qgraph.calibration import OBSERVER

NAMES = ("x", "scaled", "shifted", "positive", "y")


@pytest.fixture
def values_of():
    """Gives the values of a model by name."""

    def found(model):
        values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
        return {value.name: value for value in values}

    return found


@pytest.fixture
def watched(values_of):
    """Puts a new observer on each value of these names; gives the model."""

    def watch(model, observer="histogram", names=NAMES):
        for name in names:
            values_of(model)[name].meta[OBSERVER] = observers.create(observer)
        return model

    return watch


@pytest.fixture
def states(values_of, frozen):
    """Gives every observer's state, to be compared bit for bit."""
    return lambda model: {
        name: frozen(value.meta[OBSERVER]) for name, value in values_of(model).items() if OBSERVER in value.meta
    }


@pytest.fixture
def dataset():
    """Gives feeds as a data set for a model."""
    return lambda model, feeds: data.load(feeds, data.inputs_of(model))


@pytest.fixture
def feeds_of():
    """Maker of seeded feeds for `tiny_chain`."""

    def make(count=6, rows=3, seed=0):
        rng = np.random.default_rng(seed)
        return [{"x": rng.standard_normal((rows, 4)).astype(np.float32)} for _ in range(count)]

    return make


@pytest.fixture
def chain():
    """What `tiny_chain` computes, value by value."""

    def computed(x):
        scaled = x * np.float32(2)
        shifted = scaled + np.arange(4, dtype=np.float32)
        positive = np.maximum(shifted, 0)
        return {"x": x, "scaled": scaled, "shifted": shifted, "positive": positive, "y": np.sqrt(positive)}

    return computed
