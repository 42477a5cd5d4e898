"""The kit for another machine, and the command."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from qgraph import profiles, registry
from qgraph.errors import DataError, OptionError
from qgraph.profiling import kit as profile_kit
from qgraph.profiling import measure as profiling
from qgraph.session import Session, SessionOptions
from qgraph.targets.cpu import arm64, x86_vnni
from qgraph.targets.cpu_costs import COEFFICIENTS, Costs


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kits") / "kit"
    profile_kit.export(folder, x86_vnni(), seconds=1)
    return folder


@pytest.fixture
def kit(exported, tmp_path):
    """A kit that a test may write to."""
    return Path(shutil.copytree(exported, tmp_path / "kit"))


def test_the_kit_holds_what_the_table_times(kit, rows):
    plan = json.loads((kit / "plan.json").read_text())
    assert [one["name"] for one in plan["models"]] == list(profiling.models(rows))
    assert sum(path.stat().st_size for path in kit.rglob("*") if path.is_file()) < 4 << 20
    text = (kit / "plan.txt").read_text().splitlines()
    assert [line.split("\t")[1] for line in text if line.startswith("model\t")] == list(profiling.models(rows))
    for one in plan["models"][::20]:
        with Session(kit / one["file"], SessionOptions(threads=1)) as session:
            assert list(session.inputs) == [given["name"] for given in one["inputs"]]
    assert {path.name for path in kit.iterdir()} == {
        "CMakeLists.txt", "README.md", "index.html", "kit.mjs", "models", "plan.json", "plan.txt", "run.cpp", "run.mjs"
    }  # fmt: skip


def test_a_kit_goes_into_a_new_folder(kit):
    with pytest.raises(OptionError, match="holds something already"):
        profile_kit.export(kit, x86_vnni())
    with pytest.raises(OptionError, match="Did you mean 'xnnpack'"):
        profile_kit.export(kit.parent / "other", x86_vnni(), "xnpack")
    assert sorted(path.name for path in kit.parent.iterdir()) == ["kit"]


def test_results_become_a_profile(results, kit, rows):
    found = profile_kit.read(results(kit, rows), "phone", x86_vnni())
    assert found.coefficients == pytest.approx(COEFFICIENTS)
    assert found.measured == "A phone, 8 cores, onnxruntime 1.0, 2026-01-02"
    assert found.rounds == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda times: times.pop("Add 32@64 float"), "has no times of 'Add 32@64 float'"),
        (lambda times: times.update(more=[1.0] * 3), "unknown models: 'more'"),
        (lambda times: times.update({"Add 32@64 float": [1e-3, -1.0, 1e-3]}), "impossible times of 'Add 32@64 float'"),
        (lambda times: times.update({"Add 32@64 float": [1e-3, None, 1e-3]}), "impossible times of 'Add 32@64 float'"),
        (lambda times: times.update({"Add 32@64 float": [1e-3]}), "impossible times of 'Add 32@64 float'"),
        (lambda times: times.update({"Add 32@64 float": [1e-3] * 5}), "same number of rounds"),
    ],
)
def test_bad_times_are_named(times_of, results, kit, rows, change, words):
    times = times_of(rows)
    change(times)
    with pytest.raises(DataError, match=words):
        profile_kit.read(results(kit, rows, times=times), "phone", x86_vnni())


def test_results_of_something_else(results, kit, rows, tmp_path):
    with pytest.raises(DataError, match="export a kit"):
        profile_kit.read(results(kit, rows, table="0"), "phone", x86_vnni())
    with pytest.raises(DataError, match="another table"):
        profile_kit.read(results(kit, rows), "phone", arm64())
    machine = {"processor": "A phone", "architecture": "arm64", "cores": 8}
    with pytest.raises(DataError, match="export a kit with --like arm64"):
        profile_kit.read(results(kit, rows, machine=machine), "phone", x86_vnni())
    with pytest.raises(DataError, match="does not say where"):
        profile_kit.read(results(kit, rows, machine={}), "phone", x86_vnni())
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(DataError, match="not written by a kit"):
        profile_kit.read(tmp_path / "x.json", "phone", x86_vnni())


@pytest.mark.skipif(shutil.which("node") is None, reason="needs Node")
def test_the_script_times_each_model_in_rounds_and_tells_what_was_refused(kit):
    # A runtime that stands for onnxruntime-node, so that what the script does is seen without it.
    package = kit / "node_modules" / "onnxruntime-node"
    package.mkdir(parents=True)
    (package / "index.js").write_text(
        """let alive = 0;
        exports.env = { versions: { node: "9.9" } };
        exports.Tensor = class { constructor(type, data, dims) { Object.assign(this, { type, data, dims }); } };
        exports.InferenceSession = { create: async (path) => {
          if (++alive > 1) throw new Error("two sessions");
          if (path.endsWith("003.onnx")) { alive--; throw new Error("no such kernel"); }
          return { run: async (feeds) => feeds, release: async () => { alive--; } };
        } };"""
    )
    script = (kit / "kit.mjs").read_text()
    # Moments, since nothing is measured here.
    (kit / "kit.mjs").write_text(script.replace("SLICE = 0.05", "SLICE = 0").replace("BATCH = 0.01", "BATCH = 0"))
    done = subprocess.run(["node", "run.mjs", "0.01"], cwd=kit, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((kit / "results.json").read_text())
    refused = [name for name, seen in found["times"].items() if isinstance(seen, dict)]
    assert refused == [json.loads((kit / "plan.json").read_text())["models"][3]["name"]]
    assert found["times"][refused[0]] == {"error": "no such kernel"}
    assert {len(seen) for seen in found["times"].values() if isinstance(seen, list)} == {3}
    assert found["runtime"] == "onnxruntime-node 9.9"


def test_the_command_measures(run, short, folder):
    code, output = run("--seconds", 1)
    assert code == 0, output
    assert "Transpose 512x12x64" in output
    assert profiles.names() == ["this-machine"]


def test_the_command_exports_and_imports(results, run, kit, rows, tmp_path):
    code, output = run("--export", tmp_path / "new", "--like", "x86-vnni")
    assert code == 0, output
    code, output = run("--import", results(kit, rows), "--target", "my-phone")
    assert code == 0, output
    assert "Every ratio is near" in output
    assert registry.target("my-phone").costs == Costs("A phone, 8 cores, onnxruntime 1.0, 2026-01-02",
                                                      profiles.load("my-phone").coefficients)  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--import", "results.json"], "go together"),
        (["--target", "x"], "go together"),
        (["--like", "arm64"], "--like for --export and --import"),
        (["--provider", "cpu"], "--provider is for --export"),
        (["--import", "results.json", "--target", "x86"], "There is a target 'x86' already"),
        (["--import", "results.json", "--target", "this-machine"], "There is a target 'this-machine' already"),
        (["--import", "results.json", "--target", "x"], "Cannot read the results 'results.json'"),
        (["--export", "kit", "--like", "cuda"], "has no costs to measure"),
        (["--export", "kit", "--like", "arm46"], "Did you mean 'arm64'"),
    ],
)
def test_wrong_commands(run, arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, output = run(*arguments)
    assert code == 1
    assert words in " ".join(output.split())
    assert list(tmp_path.iterdir()) == []
