import inspect
import re

import pytest

import qgraph
from qgraph import errors


def _classes() -> dict[str, type[Exception]]:
    found = {name: kind for name, kind in vars(errors).items() if inspect.isclass(kind)}
    return {name: kind for name, kind in found.items() if issubclass(kind, Exception)}


def test_tree_in_the_docstring_is_the_tree_of_classes():
    drawn: dict[str, str] = {}
    path: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        found = re.match(r"([ │├└─]*)([A-Z]\w*Error)\b", line)
        if found is None or not line.startswith("    "):
            continue
        depth, name = len(found[1]), found[2]
        while path and path[-1][0] >= depth:
            path.pop()
        drawn[name] = path[-1][1] if path else "Exception"
        path.append((depth, name))
    real = {name: kind.__base__.__name__ for name, kind in _classes().items() if kind.__base__ is not None}
    assert drawn == real
    assert drawn["QGraphError"] == "Exception"


def test_all_of_errors_is_what_it_defines():
    functions = {n for n, f in vars(errors).items() if inspect.isfunction(f) and f.__module__ == errors.__name__}
    assert set(errors.__all__) == set(_classes()) | {n for n in functions if not n.startswith("_")}


def test_all_of_the_face_is_what_it_exports():
    public = {
        name for name, thing in vars(qgraph).items() if not name.startswith("_") and not inspect.ismodule(thing)
    } | {"__version__"}
    assert set(qgraph.__all__) == public
    assert len(qgraph.__all__) == len(set(qgraph.__all__))
    assert {n for n in errors.__all__ if n.endswith("Error")} <= set(qgraph.__all__)


@pytest.mark.parametrize(
    ("name", "choices", "expected"),
    [
        ("histogrm", ["histogram", "minmax"], "histogram"),
        ("min-max", ["histogram", "minmax"], "minmax"),
        ("zzz", ["histogram", "minmax"], None),
        ("x", [], None),
    ],
)
def test_nearest(name, choices, expected):
    assert errors.nearest(name, choices) == expected


def test_unknown_names_the_nearest_and_lists_few():
    error = errors.unknown("observer", "histogrm", ["minmax", "histogram"])
    assert isinstance(error, errors.OptionError)
    assert str(error) == "Unknown observer 'histogrm'. Did you mean 'histogram'? Known: histogram, minmax."


def test_unknown_does_not_list_many():
    error = errors.unknown("node", "node-7x", [f"node-{i}" for i in range(100)])
    assert "Did you mean 'node-7" in str(error)
    assert "There are 100 to choose from." in str(error)
    assert "node-42" not in str(error)
