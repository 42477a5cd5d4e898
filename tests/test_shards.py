"""Weights in several files of a bounded size: written whole or not at all, and everything reads them."""

import json
from pathlib import Path

import click.testing
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qgraph
from qgraph import shards
from qgraph.cli import main
from qgraph.deploy.job import deploy
from qgraph.errors import ModelError, OptionError
from qgraph.modelio import Workspace, external_files, read, size_on_disk, stage
from qgraph.session import Session

# -- sizes and names ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [("2GB", 2 * 10**9), ("2GiB", 2**31), ("1.5 kB", 1500), ("64mib", 2**26), ("300", 300), (7, 7), ("3tb", 3 * 10**12),
     ("5 B", 5)],
)  # fmt: skip
def test_sizes(text, expected):
    assert shards.parsed(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "2GBs", "-1", "0", "0.1B", "two", "2 G B", "1e9", None])
def test_what_is_no_size(text):
    with pytest.raises(OptionError, match="2GB or 500MiB"):
        shards.parsed(text)
    if text is not None:
        with pytest.raises(OptionError, match="2GB or 500MiB"):
            qgraph.Options(max_shard_size=text)


def test_browsers_have_a_limit_of_their_own():
    web = {name for name in qgraph.registry.targets() if qgraph.registry.target(name).web}
    assert web == {"wasm", "webgpu"}
    assert shards.limit(None, True) == 2 * 10**9 < 0x7FE00000
    assert shards.limit(None, False) is None
    assert shards.limit("3GB", True) == shards.limit("3GB", False) == 3 * 10**9


def test_names_that_are_spared(tmp_path):
    output = tmp_path / "o.onnx"
    assert shards.free_name(output, ()) == "o.onnx.data"
    assert shards.free_name(output, {tmp_path / "o.onnx.data"}) == "o.onnx.1.data"
    parts = {tmp_path / "o-00002-of-00009.onnx.data", tmp_path / "o.onnx.1.data"}
    assert shards.free_name(output, parts) == "o.onnx.2.data"
    assert shards.free_name(output, {tmp_path / "sub" / "o.onnx.data"}) == "o.onnx.data"


# -- writing -----------------------------------------------------------------------------------------------------------


def many(kit, sizes, seed=0):
    """A chain of additions of constants of these numbers of floats."""
    adds = "\n".join(f"p{i} = ReduceSum <keepdims = 0> (W{i})\n v{i + 1} = Add (v{i}, p{i})" for i in range(len(sizes)))
    text = f"g (float[n] v0) => (float[n] v{len(sizes)}) {{ {adds} }}"
    return kit.text(text, **{f"W{i}": kit.normal(size, seed=seed + i) for i, size in enumerate(sizes)})


def files(folder):
    return {p.name: p.stat().st_size for p in sorted(Path(folder).iterdir()) if p.is_file()}


def written(model, folder, limit, external=True, avoid=()):
    with Workspace(folder / "o.onnx", limit) as workspace:
        stage(model, folder / "o.onnx", workspace, external, avoid).commit()


@settings(max_examples=15, deadline=None)
@given(sizes=st.lists(st.integers(1, 3000), min_size=1, max_size=12), limit=st.integers(1100, 20_000))
def test_no_file_is_larger_unless_a_weight_is(model_kit, tmp_path_factory, sizes, limit):
    folder = tmp_path_factory.mktemp("shards")
    model = many(model_kit, sizes)
    written(model, folder, limit)
    result = read(folder / "o.onnx")
    assert set(files(folder)) == {"o.onnx", *(path.name for path in external_files(result))}
    inside = {}
    for value in result.graph.initializers.values():
        tensor = value.const_value
        np.testing.assert_array_equal(tensor.numpy(), model.graph.initializers[value.name].const_value.numpy())
        if isinstance(tensor, ir.ExternalTensor):
            inside.setdefault(Path(tensor.path).name, []).append(tensor.nbytes)
    for name, parts in inside.items():
        assert (folder / name).stat().st_size == sum(parts), "dense, and nothing twice"
        assert sum(parts) <= limit or len(parts) == 1
    if len(inside) > 1:
        assert sorted(inside) == [f"o-{i + 1:05d}-of-{len(inside):05d}.onnx.data" for i in range(len(inside))]
    x = {"v0": np.float32([0.5, 1])}
    with Session(folder / "o.onnx") as after, Session(model) as before:
        for name, array in before.run(x).items():
            np.testing.assert_array_equal(after.run(x)[name], array)


def test_what_fits_stays_in_the_models_own_file(model_kit, tmp_path):
    model = many(model_kit, [500, 500])
    written(model, tmp_path, 4001, external=False)
    assert set(files(tmp_path)) == {"o.onnx"}
    written(model, tmp_path, 3999, external=False)
    assert set(files(tmp_path)) == {"o.onnx", "o-00001-of-00002.onnx.data", "o-00002-of-00002.onnx.data"}


def test_one_file_has_the_plain_name(model_kit, tmp_path):
    written(many(model_kit, [500, 500]), tmp_path, 10_000)
    assert set(files(tmp_path)) == {"o.onnx", "o.onnx.data"}


def test_a_weight_larger_than_the_limit_is_told_and_nothing_is_logged(model_kit, tmp_path, caplog):
    written(many(model_kit, [400, 5000, 400]), tmp_path, 2000)
    assert files(tmp_path)["o-00002-of-00003.onnx.data"] == 20_000
    assert not caplog.records
    several, large = shards.notes(tmp_path / "o.onnx", 2000)
    assert several == "The weights lie in 3 files of up to 20.0 kB beside the model."
    assert large.startswith("o-00002-of-00003.onnx.data is larger than 2.0 kB: a weight is never cut in two")
    assert shards.notes(tmp_path / "o.onnx", None) == []
    assert len(shards.notes(tmp_path / "o.onnx", 20_000)) == 1


@pytest.mark.parametrize("fails", [1, 2, 3, 4])
def test_all_or_nothing(model_kit, tmp_path, monkeypatch, fails):
    """Whichever of the moves fails, what stood there stands again, all of it; the model itself comes last."""
    written(many(model_kit, [500, 500, 500]), tmp_path, 2500)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert len(before) == 4
    with Workspace(tmp_path / "o.onnx", 2500) as workspace:
        staged = stage(many(model_kit, [500, 500, 500], seed=9), tmp_path / "o.onnx", workspace, True)
        real, moves = Path.replace, []

        def move(self, target):
            if self.parent == staged.path.parent and Path(target).parent == tmp_path and ".previous" not in self.name:
                moves.append(Path(target).name)
                if len(moves) == fails:
                    raise OSError(28, "No space left on device")
            return real(self, target)

        monkeypatch.setattr(Path, "replace", move)
        with pytest.raises(ModelError, match="No space left"):
            staged.commit()
        monkeypatch.undo()
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == before
    assert moves == sorted(before, key=lambda name: (name == "o.onnx", name))[:fails]


# -- the whole way -----------------------------------------------------------------------------------------------------


@pytest.fixture
def work(model_kit, tmp_path, monkeypatch):
    """A model whose own weights lie in parts."""
    monkeypatch.chdir(tmp_path)
    text = """g (int64[n] ids) => (float[n, 96] y) {
        x = Gather (T, ids) h = MatMul (x, A) r = Relu (h) y = Gemm <transB = 1> (r, B, c) }"""
    normal = model_kit.normal
    model = model_kit.text(text, T=normal(200, 128), A=normal(128, 160), B=normal(96, 160), c=normal(96))
    ir.save(model, "m.onnx", external_data="m.onnx.data", size_threshold_bytes=0, max_shard_size_bytes=90_000)
    assert len(list(tmp_path.glob("m-*-of-00003.onnx.data"))) == 3
    np.savez("d.npz", ids=np.random.default_rng(0).integers(0, 200, (40, 8)))
    return tmp_path


@pytest.mark.parametrize("check", ["whole", "parts", "none"])
@pytest.mark.usefixtures("model_free_cpu")
def test_streamed_into_parts(work, check):
    """The same weights as in one file."""
    options = {"scheme": "int8-weights", "check": check, "bench_seconds": 0, "force": True, "block_size": 32}
    report = qgraph.optimize("m.onnx", "o.onnx", max_shard_size="25kB", **options).report
    parts = [name for name in files(work) if name.startswith("o-")]
    assert len(parts) > 1 and all(files(work)[name] <= 30_000 for name in parts)
    assert any(note.startswith(f"The weights lie in {len(parts)} files of up to") for note in report.notes)
    qgraph.optimize("m.onnx", "one.onnx", **options)
    several, one = read("o.onnx"), read("one.onnx")
    assert set(several.graph.initializers) == set(one.graph.initializers)
    for name, value in one.graph.initializers.items():
        found = several.graph.initializers[name].const_value
        assert found.tobytes() == value.const_value.tobytes()
    assert size_on_disk(work / "o.onnx") == sum(files(work)[name] for name in ("o.onnx", *parts))
    qgraph.optimize("m.onnx", "o.onnx", max_shard_size="25kB", **options)
    assert [name for name in files(work) if name.startswith("o-")] == parts, "over itself"


@pytest.mark.usefixtures("model_free_cpu")
def test_what_is_read_is_never_replaced(work):
    """Beside the model, and under the name that its data have: the parts take another one."""
    folder = work / "in"
    folder.mkdir()
    for path in [work / "m.onnx", *work.glob("m-*.data")]:
        path.rename(folder / path.name)
    options = {"scheme": "int8-weights", "check": "none", "max_shard_size": "25kB", "block_size": 32}
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    qgraph.optimize("in/m.onnx", "in/o.onnx", **options)
    assert {name: (folder / name).read_bytes() for name in before} == before
    # The model's data have the very names that the result would take.
    (folder / "m.onnx").rename(folder / "old.onnx")
    data = {name: content for name, content in before.items() if name.endswith(".data")}
    qgraph.optimize("in/old.onnx", "in/m.onnx", **options)
    assert {name: (folder / name).read_bytes() for name in data} == data
    assert all(".1" in path.name for path in external_files(read("in/m.onnx")))


@pytest.mark.usefixtures("model_free_cpu")
def test_weights_of_an_earlier_result_are_told_of(work):
    options = {"scheme": "int8-weights", "check": "none", "block_size": 32}
    first = qgraph.optimize("m.onnx", "o.onnx", max_shard_size="25kB", **options).report
    assert not any("are left" in note for note in first.notes)
    parts = sorted(name for name in files(work) if name.startswith("o-"))
    second = qgraph.optimize("m.onnx", "o.onnx", **options).report
    note = next(note for note in second.notes if "are left" in note)
    assert ", ".join(parts) in note and "'o.onnx'" in note
    assert set(parts) < set(files(work)) and "o.onnx.data" in files(work)


@pytest.mark.usefixtures("model_free_cpu")
def test_the_command_line_validates_and_deploys_parts(work, monkeypatch):
    run = click.testing.CliRunner().invoke
    command = ["optimize", "m.onnx", "o.onnx", "--scheme", "int8-weights", "--check", "none", "--block-size", "32"]
    found = run(main, [*command, "--max-shard-size", "25 kilos"])
    assert found.exit_code == 1 and "25 kilos" in found.output and not (work / "o.onnx").exists()
    found = run(main, [*command, "--max-shard-size", "25kB", "--save-config", "c.toml"])
    assert found.exit_code == 0, found.output
    assert 'max-shard-size = "25kB"' in (work / "c.toml").read_text()
    found = run(main, ["validate", "m.onnx", "o.onnx", "--data", "d.npz"])
    assert found.exit_code == 0, found.output
    # As if it were too large for one file.
    monkeypatch.setattr("qgraph.deploy.job._ONE_FILE", 1000)
    made = deploy("o.onnx", "folder", data="d.npz")
    parts = sorted(path.name for path in external_files(read("o.onnx")))
    assert len(parts) > 1
    sums = (work / "folder" / "SHA256SUMS").read_text()
    manifest = json.loads((work / "folder" / "manifest.json").read_text())
    for name in parts:
        assert f"  model/{name}\n" in sums and f"model/{name}" in manifest["files"]
        assert name in (work / "folder" / "web" / "app.js").read_text()
        assert any(name in text.read_text() for text in (work / "folder" / "android").rglob("*.kt"))
    assert "stay beside it in " + ", ".join(parts) in " ".join(made.notes)
