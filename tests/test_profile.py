"""The table of kernels, its fit, stored profiles, the kit and the command."""

import dataclasses
import json
import math
import shutil
import subprocess
from pathlib import Path

import click.testing
import hypothesis
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import strategies as st

from qgraph import profiles, registry
from qgraph.cli import main
from qgraph.cli_profile import profile as command
from qgraph.errors import DataError, OptionError
from qgraph.profiling import fit as profile_fit
from qgraph.profiling import kit as profile_kit
from qgraph.profiling import measure as profiling
from qgraph.profiling.rows import AROUND
from qgraph.session import Session, SessionOptions
from qgraph.targets import Refusal
from qgraph.targets.cpu import arm64, x86_vnni
from qgraph.targets.cpu_costs import COEFFICIENTS, SHIPPED, Costs

PRIOR = {**COEFFICIENTS, **AROUND}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Profiles are kept here."""
    monkeypatch.setenv(profiles.FOLDER, str(tmp_path / "profiles"))
    return tmp_path / "profiles"


@pytest.fixture(scope="module")
def rows():
    return profiling.table(x86_vnni())


def times_of(rows, coefficients=PRIOR, rounds=3):
    """Times that a machine with these coefficients would take."""
    return {
        name: [1e-9 * sum(coefficients[term] * count for term, count in one.terms.items())] * rounds
        for name, one in profiling.models(rows).items()
    }


def made(rows, name="other", **changes):
    found = profiling.profile(
        name, "x86-vnni", "CPUExecutionProvider", profiles.Machine.here(), ("onnxruntime 0.0", "2026-01-02", 9.0), rows,
        times_of(rows),
    )  # fmt: skip
    return dataclasses.replace(found, **changes)


# -- the table --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [x86_vnni(), arm64()], ids=lambda target: target.name)
def test_every_integer_model_runs_in_the_kernels_it_is_about(target, tmp_path):
    expected = {
        "conv": {"QLinearConv"},
        "matmul": {"QLinearMatMul", "DynamicQuantizeMatMul"},
        "blocks": {"MatMulNBits"},
        "mover": {"QLinearConcat", "QLinearGlobalAveragePool", "QLinearAveragePool", "Transpose", "Reshape", "Slice",
                  "Split"},
        "elementwise": {"QLinearSigmoid", "QLinearLeakyRelu", "QLinearAdd", "QLinearMul", "NhwcMaxPool", "MaxPool",
                        "Resize", "DepthToSpace"},
        "run": {"Reshape"},
    }  # fmt: skip
    allowed = {"Transpose", "QLinearConv"}
    # What the runtime does by itself on arm64 only.
    config = (("session.qdqisint8allowed", "1"),)
    for row in profiling.table(target):
        if row.table == "crossing":
            continue
        path = tmp_path / "optimized.onnx"
        with Session(row.after.build(), SessionOptions(threads=1, optimized=path, config=config)):
            pass
        found = {node.op_type for node in onnx.load(path, load_external_data=False).graph.node}
        assert found & expected[row.table], (row.name, found)
        assert found <= expected[row.table] | allowed, (row.name, found)


def test_crossings_cross_once(rows, tmp_path):
    for row in rows:
        if row.table == "crossing":
            for one, operator in ((row.before, "QuantizeLinear"), (row.after, "DequantizeLinear")):
                path = tmp_path / "optimized.onnx"
                with Session(one.build(), SessionOptions(threads=1, optimized=path)):
                    pass
                found = [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]
                assert found.count(operator) == 1, (one.name, found)
                assert "Conv" not in found or found.count("Conv") == found.count("QLinearConv") == 1


def test_numbers_of_the_models_are_finite(rows):
    for row in rows[::7]:
        for one in (row.before, row.after):
            model = one.build()
            with Session(model, SessionOptions(threads=1)) as session:
                for array in session.run(profiling.feeds(model)).values():
                    assert np.isfinite(array.astype(np.float64)).all(), one.name


def test_terms_are_those_that_the_costs_look_up(rows):
    names = {term for one in profiling.models(rows).values() for term in one.terms}
    assert names <= set(PRIOR)
    unmeasured = {name.split(".")[0] for name in set(PRIOR) - names}
    assert unmeasured == {"rows", "lstm"}
    # The same convolution, asked of the target.
    row = next(row for row in rows if row.name == "Conv 64-64k3@56")
    target = x86_vnni()
    x, w = ir.val("x", ir.DataType.FLOAT, [1, 64, 56, 56]), ir.val("w", ir.DataType.FLOAT, [64, 64, 3, 3])
    w.const_value = ir.tensor(np.zeros((64, 64, 3, 3), np.float32))
    y = ir.val("y", ir.DataType.FLOAT, [1, 64, 56, 56])
    node = ir.Node("", "Conv", [x, w], outputs=[y])
    graph = ir.Graph([x], [y], nodes=[node], initializers=[w])
    kernel = target.kernel(graph[0], target.scheme("int8"))
    assert not isinstance(kernel, Refusal)
    alone = {term: count for term, count in row.after.terms.items() if term not in AROUND}
    assert kernel.integer_seconds == pytest.approx(SHIPPED.seconds(alone))


# -- the fit ----------------------------------------------------------------------------------------------------------


def test_times_of_the_shipped_profile_give_it_back(rows):
    seen = times_of(rows)
    found = profile_fit.fit([(one.terms, seen[model][0]) for model, one in profiling.models(rows).items()], PRIOR)
    assert found.coefficients == pytest.approx(PRIOR)
    assert max(map(abs, found.errors)) < 1e-6


@hypothesis.given(st.floats(0.05, 50.0), st.sampled_from(["conv.integers.mac", "matmul.float.mac", "blocks.4.32"]))
@hypothesis.settings(max_examples=10)
def test_a_slower_machine_with_one_odd_kernel(rows, everything, name):
    there = {term: value * everything for term, value in PRIOR.items()}
    there[name] *= 3
    seen = times_of(rows, there)
    fitted = profile_fit.fit([(one.terms, seen[model][0]) for model, one in profiling.models(rows).items()], PRIOR)
    assert fitted.coefficients[name] == pytest.approx(there[name], rel=0.1)
    # What no row measures goes by the others.
    assert fitted.coefficients["lstm.float.mac"] == pytest.approx(there["lstm.float.mac"], rel=0.1)
    assert min(fitted.coefficients.values()) > 0


def test_times_far_off_count_less(rows):
    seen = times_of(rows)
    seen["Conv 64-64k3@56 float"] = [one * 10 for one in seen["Conv 64-64k3@56 float"]]
    fitted = profile_fit.fit([(one.terms, seen[model][0]) for model, one in profiling.models(rows).items()], PRIOR)
    assert fitted.coefficients["conv.float.mac"] == pytest.approx(PRIOR["conv.float.mac"], rel=0.05)


def test_a_refused_kernel_is_never_chosen(rows):
    seen = times_of(rows)
    refused = [name for name in seen if "2 bits by 32" in name]
    found = profiling.profile(
        "x", "x86-vnni", "p", profiles.Machine.here(), ("r", "d", 1.0), rows,
        {**seen, **dict.fromkeys(refused, "no such kernel")},
    )  # fmt: skip
    assert found.coefficients["blocks.2.32"] == 1000 * COEFFICIENTS["blocks.2.32"]
    assert found.coefficients["blocks.2.64"] == pytest.approx(COEFFICIENTS["blocks.2.64"])
    assert found.refused == dict.fromkeys(refused, "no such kernel")
    assert not [row for row in found.rows if row.form == "2 bits by 32"]


# -- profiles and targets ---------------------------------------------------------------------------------------------


def test_a_profile_is_stored_and_read(rows, folder):
    profile = made(rows)
    assert profiles.save(profile) == folder / "other.json"
    assert profiles.names() == ["other"]
    assert profiles.load("other") == profile
    assert [path.name for path in folder.iterdir()] == ["other.json"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda found: found.update(version=0), "another version"),
        (lambda found: found["coefficients"].pop("Add.float"), "another version of qgraph"),
        (lambda found: found["coefficients"].update({"Add.float": -1.0}), "is no time"),
        (lambda found: found["coefficients"].update({"Add.float": math.nan}), "is no time"),
        (lambda found: found.pop("date"), "date"),
    ],
)
def test_a_bad_profile_is_an_error_that_names_the_file(rows, folder, change, words):
    path = profiles.save(made(rows))
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))
    with pytest.raises(OptionError, match=words) as error:
        profiles.load("other")
    assert str(path) in str(error.value)


def test_unknown_and_impossible_names(rows):
    profiles.save(made(rows))
    with pytest.raises(OptionError, match="Did you mean 'other'"):
        profiles.load("othr")
    with pytest.raises(OptionError, match="cannot name a target"):
        profiles.save(made(rows, name="../other"))
    with pytest.raises(OptionError, match=r"Unknown target 'othr'.* Did you mean 'other'"):
        registry.target("othr")


def test_a_stored_profile_is_a_target(rows):
    slow = {**COEFFICIENTS, "flat.in.element": 100.0}
    profiles.save(made(rows, coefficients=slow))
    assert "other" in registry.targets()
    target = registry.target("other")
    assert (target.name, target.costs.coefficients) == ("other", slow)
    assert set(target.schemes) == set(x86_vnni().schemes)
    value = ir.val("x", ir.DataType.FLOAT, [10, 100])
    assert target.quantize_cost(value) == pytest.approx(1e-9 * (2000 + 1000 * 100))
    # The shipped one is as it was.
    assert x86_vnni().quantize_cost(value) == pytest.approx(1e-9 * (2000 + 1000 * 0.125))
    assert target.in_blocks(64).costs.coefficients == slow


def test_cpu_takes_the_profile_of_this_machine_and_no_other(rows):
    cpu = registry.target("cpu")
    assert cpu.costs is SHIPPED
    assert not cpu.notes
    mine = {**COEFFICIENTS, "Add.float": 9.0}
    here = made(
        rows, profiles.HERE, coefficients=mine, like=cpu.name, runtime=f"onnxruntime {profiles.runtime_version()}"
    )
    profiles.save(here)
    found = registry.target("cpu")
    assert (found.name, found.costs.coefficients) == (cpu.name, mine)
    assert "2026-01-02" in found.notes[0]
    assert registry.target("this-machine").costs.coefficients == mine

    for change, words in (
        ({"runtime": "onnxruntime 0.0"}, "was measured with onnxruntime 0.0"),
        ({"machine": dataclasses.replace(here.machine, features="else")}, "is of another machine"),
    ):
        profiles.save(dataclasses.replace(here, **change))
        found = registry.target("cpu")
        assert found.costs is SHIPPED
        assert words in found.notes[0]
        assert "qgraph profile" in found.notes[0]
    # A core more or less changes nothing on one thread.
    profiles.save(dataclasses.replace(here, machine=dataclasses.replace(here.machine, cores=64)))
    assert registry.target("cpu").costs.coefficients == mine


def test_a_profile_that_cannot_be_read_is_told_and_not_used(folder):
    folder.mkdir()
    (folder / "this-machine.json").write_text("{")
    found = registry.target("cpu")
    assert found.costs is SHIPPED
    assert "cannot be used" in found.notes[0]


# -- measuring --------------------------------------------------------------------------------------------------------


@pytest.fixture
def short(monkeypatch):
    """Five rows, timed for a moment."""
    kept = {"Conv 16-16k1@60", "MatMul 1x256x256", "Transpose 512x12x64", "a run"}
    table = profiling.table
    monkeypatch.setattr(profiling, "table", lambda target: [row for row in table(target) if row.name in kept])
    monkeypatch.setattr(profiling, "_SLICE", 0.002)


def test_measuring_this_machine(short):
    told = []
    found = profiling.here(x86_vnni(), 0.1, lambda *one: told.append(one))
    assert found.rounds >= 3
    assert found.machine == profiles.Machine.here()
    assert {row.name for row in found.rows} == {
        "Conv 16-16k1@60", "MatMul 1x256x256", "Transpose 512x12x64", "a run"}  # fmt: skip
    assert all(1e-7 < row.before < 1 and 1e-7 < row.after < 1 for row in found.rows)
    assert told[0][:2] == ("timing kernels", 0)
    assert all(done < total for _, done, total in told)


@pytest.mark.parametrize(("rounds", "kept"), [(2, None), (4, 4)])
def test_an_interruption_keeps_whole_rounds(short, monkeypatch, rounds, kept):
    models = len(profiling.models(profiling.table(x86_vnni())))
    left = iter(range(rounds * models + 2))

    def block(*_):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return 1e-5

    monkeypatch.setattr(profiling, "_block", block)
    if kept is None:
        with pytest.raises(KeyboardInterrupt):
            profiling.here(x86_vnni(), 1e9, lambda *_: None)
    else:
        assert profiling.here(x86_vnni(), 1e9, lambda *_: None).rounds == kept


# -- the kit ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kits") / "kit"
    profile_kit.export(folder, x86_vnni(), seconds=1)
    return folder


@pytest.fixture
def kit(exported, tmp_path):
    """A kit that a test may write to."""
    return Path(shutil.copytree(exported, tmp_path / "kit"))


def results(kit, rows, **changes):
    """What a program of the kit would write."""
    plan = json.loads((kit / "plan.json").read_text())
    found = {key: plan[key] for key in ("version", "table", "like", "provider")}
    machine = {"processor": "A phone", "architecture": "wasm", "cores": 8}
    found.update(date="2026-01-02", runtime="onnxruntime 1.0", machine=machine, seconds=5.0, times=times_of(rows))
    found.update(changes)
    (kit / "results.json").write_text(json.dumps(found))
    return kit / "results.json"


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


def test_results_become_a_profile(kit, rows):
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
def test_bad_times_are_named(kit, rows, change, words):
    times = times_of(rows)
    change(times)
    with pytest.raises(DataError, match=words):
        profile_kit.read(results(kit, rows, times=times), "phone", x86_vnni())


def test_results_of_something_else(kit, rows, tmp_path):
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


# -- the command ------------------------------------------------------------------------------------------------------


def run(*arguments):
    if "profile" not in main.commands:
        main.add_command(command)
    found = click.testing.CliRunner().invoke(main, ["profile", *map(str, arguments)], terminal_width=200)
    return found.exit_code, found.output


def test_the_command_measures(short, folder):
    code, output = run("--seconds", 1)
    assert code == 0, output
    assert "Transpose 512x12x64" in output
    assert profiles.names() == ["this-machine"]


def test_the_command_exports_and_imports(kit, rows, tmp_path):
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
def test_wrong_commands(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, output = run(*arguments)
    assert code == 1
    assert words in " ".join(output.split())
    assert list(tmp_path.iterdir()) == []
