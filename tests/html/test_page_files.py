"""Pages in files, and the libraries that they need."""

import sys

import pytest

from qgraph import html
from qgraph.errors import ModelError, OptionError
from qgraph.report import Report

EMPTY = Report("model.onnx", "cpu", "int8", "onnxruntime 1.2")


def test_save_replaces_and_leaves_nothing_beside(full, tmp_path, text):
    path = tmp_path / "out.html"
    path.write_text("old")
    html.save(full, path)
    assert path.read_bytes() == text.encode()
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_be_written(tmp_path):
    with pytest.raises(ModelError, match="Cannot write the report to"):
        html.save(EMPTY, tmp_path / "nowhere" / "out.html")
    folder = tmp_path / "out.html"
    folder.mkdir()
    with pytest.raises(ModelError, match="Cannot write the report to"):
        html.save(EMPTY, folder)
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("library", ["jinja2", "matplotlib"])
def test_a_missing_library_says_how_to_install_it(full, tmp_path, monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    path = tmp_path / "out.html"
    path.write_text("old")
    for ask in (html.require, lambda: html.save(full, path)):
        with pytest.raises(OptionError, match=rf'needs {library}: pip install "qgraph\[report\]"'):
            ask()
    assert path.read_text() == "old"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.html", True),
        ("a.HTM", True),
        ("x/a.b.Html", True),
        ("a.json", False),
        ("html", False),
        ("a.html.json", False),
    ],
)
def test_is_page(name, expected):
    assert html.is_page(name) is expected
