"""Models in 16-bit floats: a small network, and the script that makes language models."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

MLP = "g (float16[n, 32] x) => (float16[n, 32] y) { h = Gemm (x, A, b)  r = Relu (h)  y = MatMul (r, B) }"


@pytest.fixture(scope="module")
def decoder():
    """The script that makes language models."""
    path = Path(__file__).resolve().parents[2] / "tools" / "decoder.py"
    spec = importlib.util.spec_from_file_location("to_float_decoder", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def mlp():
    """Maker of a network in halves; `changes` are other weights."""

    def make(kit, **changes):
        numbers = {"A": kit.normal(32, 64) / 6, "b": kit.normal(64), "B": kit.normal(64, 32) / 8, **changes}
        return kit.text(MLP, **{name: np.asarray(array, np.float16) for name, array in numbers.items()})

    return make


@pytest.fixture
def kinds():
    """Gives the types of a model's inputs and outputs, by name."""
    return lambda model: {value.name: value.dtype for value in (*model.graph.inputs, *model.graph.outputs)}
