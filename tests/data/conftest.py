"""Data in all the forms in which it may come, and how it is read back."""

import sys

import numpy as np
import pytest
from onnx import numpy_helper

from qgraph.data import InputSpec, load


@pytest.fixture(scope="session")
def array(model_kit):
    """Seeded normal float32 numbers."""
    return model_kit.normal


@pytest.fixture(scope="session")
def feeds_of():
    """Reads a source for a model of one input x: float32 [any, 3], or of others."""
    one = [InputSpec("x", np.dtype(np.float32), (None, 3))]
    return lambda source, inputs=one: [batch.feeds for batch in load(source, inputs)]


@pytest.fixture(scope="session")
def contents():
    """Gives the bytes of each batch of x."""
    return lambda data: [batch.feeds["x"].tobytes() for batch in data]


@pytest.fixture(scope="session")
def same():
    """Checks that feeds are equal, in names, types and numbers."""

    def check(found, expected):
        assert [set(feed) for feed in found] == [set(feed) for feed in expected]
        for one, other in zip(found, expected, strict=True):
            for name in other:
                assert one[name].dtype == other[name].dtype
                np.testing.assert_array_equal(one[name], other[name])

    return check


@pytest.fixture
def protos():
    """Writer of arrays into a folder, as `input_<number>.pb`."""

    def write(folder, *arrays, names=None):
        folder.mkdir(parents=True)
        for number, one in enumerate(arrays):
            tensor = numpy_helper.from_array(one, None if names is None else names[number])
            (folder / f"input_{number}.pb").write_bytes(tensor.SerializeToString())

    return write


@pytest.fixture
def generator():
    """Text of a module whose functions give feeds, or go wrong."""
    return """
import numpy as np

def samples():
    for number in range(3):
        yield {"x": np.full((1, 3), number, np.float32)}

class Holder:
    samples = staticmethod(samples)

constant = 5

def wrong():
    return 7

def broken():
    import no_such_module_at_all
"""


@pytest.fixture
def module(generator, tmp_path, monkeypatch):
    """Maker of a package `name` with a module `feeds` on the path, whose text is `generator`."""

    def make(name):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
        (tmp_path / name / "feeds.py").write_text(generator)
        monkeypatch.syspath_prepend(tmp_path)
        for key in (name, f"{name}.feeds"):
            monkeypatch.delitem(sys.modules, key, raising=False)

    yield make
    for key in [key for key in sys.modules if key.split(".")[0].startswith("qgraph_test_")]:
        del sys.modules[key]
