"""Profiles, measured here or stored, and the targets that they become."""

import dataclasses
import json
import math

import onnx_ir as ir
import pytest

from qgraph import profiles, registry
from qgraph.errors import OptionError
from qgraph.profiling import measure as profiling
from qgraph.targets.cpu import x86_vnni
from qgraph.targets.cpu_costs import COEFFICIENTS, SHIPPED


def test_a_profile_is_stored_and_read(made, rows, folder):
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
def test_a_bad_profile_is_an_error_that_names_the_file(made, rows, folder, change, words):
    path = profiles.save(made(rows))
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))
    with pytest.raises(OptionError, match=words) as error:
        profiles.load("other")
    assert str(path) in str(error.value)


def test_unknown_and_impossible_names(made, rows):
    profiles.save(made(rows))
    with pytest.raises(OptionError, match="Did you mean 'other'"):
        profiles.load("othr")
    with pytest.raises(OptionError, match="cannot name a target"):
        profiles.save(made(rows, name="../other"))
    with pytest.raises(OptionError, match=r"Unknown target 'othr'.* Did you mean 'other'"):
        registry.target("othr")


def test_a_stored_profile_is_a_target(made, rows):
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


def test_cpu_takes_the_profile_of_this_machine_and_no_other(made, rows):
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
