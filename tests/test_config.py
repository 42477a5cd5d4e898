"""Options in a TOML file: what is written is read back, and what is wrong is named."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qgraph import config
from qgraph.errors import ModelError, OptionError

KNOWN = {"scheme", "max-loss", "memory", "force", "time-limit", "keep-float", "override", "data"}
TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12)
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "scheme": TEXT,
        "max_loss": TEXT,
        "memory": st.integers(1, 10**9),
        "force": st.booleans(),
        "time_limit": st.floats(0, 1e9),
        "keep_float": st.lists(TEXT, min_size=1, max_size=3).map(tuple),
        "override": st.dictionaries(TEXT, TEXT, min_size=1, max_size=3),
    },
)


@given(options=OPTIONS)
def test_what_is_saved_is_loaded(tmp_path_factory, options):
    path = tmp_path_factory.mktemp("config") / "c.toml"
    config.save(options, path)
    expected = {**options}
    if "keep_float" in options:
        expected["keep_float"] = list(options["keep_float"])
    if "override" in options:
        expected["override"] = [f"{pattern}={scheme}" for pattern, scheme in options["override"].items()]
    assert config.load(path, KNOWN) == expected
    assert [entry.name for entry in path.parent.iterdir()] == ["c.toml"]


def test_what_says_nothing_is_left_out(tmp_path):
    config.save(
        {"scheme": None, "keep_float": (), "override": {}, "data": Path("a/b.npz"), "force": False}, tmp_path / "c"
    )
    assert (tmp_path / "c").read_text() == 'data = "a/b.npz"\nforce = false\n'


def test_names_with_dashes_or_underscores(tmp_path):
    (tmp_path / "c").write_text('max_loss = "1%"\nkeep-float = ["a", "b"]\n')
    assert config.load(tmp_path / "c", KNOWN) == {"max_loss": "1%", "keep_float": ["a", "b"]}


@pytest.mark.parametrize(
    "text, words",
    [
        ("schema = 1", "'schema'.*Did you mean 'scheme'"),
        ("keep_flat = 1", "'keep_flat'.*Did you mean 'keep-float'"),
        ("[overide]\na = 'int8'", "'overide'.*Did you mean 'override'"),
        ("override = ['a=b']", "override is a table"),
        ("keep-float = [1, 2]", "keep-float is neither"),
        ("[memory]\nx = 1", "memory is neither"),
        ("memory = ", "Cannot read the configuration"),
        ("a = 1\na = 2", "Cannot read the configuration"),
    ],
)
def test_errors(tmp_path, text, words):
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(OptionError, match=words):
        config.load(tmp_path / "c.toml", KNOWN)


def test_files_that_cannot_be_read_or_written(tmp_path):
    with pytest.raises(OptionError, match="Cannot read the configuration"):
        config.load(tmp_path / "none.toml", KNOWN)
    with pytest.raises(OptionError, match="Cannot read the configuration"):
        config.load(tmp_path, KNOWN)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(OptionError, match="Cannot read the configuration"):
        config.load(tmp_path / "binary", KNOWN)
    with pytest.raises(ModelError, match="Cannot write the configuration"):
        config.save({"scheme": "int8"}, tmp_path / "no" / "c.toml")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ModelError, match="Cannot write the configuration"):
        config.save({"scheme": "int8"}, tmp_path / "folder")
