"""A table of kernels, times that a machine would take, and where profiles are kept."""

import dataclasses
import json

import pytest

from qgraph import profiles
from qgraph.profiling import measure as profiling
from qgraph.profiling.rows import AROUND
from qgraph.targets.cpu import x86_vnni
from qgraph.targets.cpu_costs import COEFFICIENTS

PRIOR = {**COEFFICIENTS, **AROUND}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Profiles are kept here."""
    monkeypatch.setenv(profiles.FOLDER, str(tmp_path / "profiles"))
    return tmp_path / "profiles"


@pytest.fixture(scope="session")
def rows():
    """The table for a CPU with VNNI."""
    return profiling.table(x86_vnni())


@pytest.fixture(scope="session")
def times_of():
    """Times that a machine with these coefficients would take."""

    def times(rows, coefficients=PRIOR, rounds=3):
        return {
            name: [1e-9 * sum(coefficients[term] * count for term, count in one.terms.items())] * rounds
            for name, one in profiling.models(rows).items()
        }

    return times


@pytest.fixture
def made(times_of):
    """Maker of the profile of such a machine."""

    def make(rows, name="other", **changes):
        found = profiling.profile(
            name, "x86-vnni", "CPUExecutionProvider", profiles.Machine.here(), ("onnxruntime 0.0", "2026-01-02", 9.0),
            rows, times_of(rows),
        )  # fmt: skip
        return dataclasses.replace(found, **changes)

    return make


@pytest.fixture
def short(monkeypatch):
    """Five rows, timed for a moment."""
    kept = {"Conv 16-16k1@60", "MatMul 1x256x256", "Transpose 512x12x64", "a run"}
    table = profiling.table
    monkeypatch.setattr(profiling, "table", lambda target: [row for row in table(target) if row.name in kept])
    monkeypatch.setattr(profiling, "_SLICE", 0.002)


@pytest.fixture
def results(times_of):
    """Writes what a program of the kit would write; gives its path."""

    def write(kit, rows, **changes):
        plan = json.loads((kit / "plan.json").read_text())
        found = {key: plan[key] for key in ("version", "table", "like", "provider")}
        machine = {"processor": "A phone", "architecture": "wasm", "cores": 8}
        found.update(date="2026-01-02", runtime="onnxruntime 1.0", machine=machine, seconds=5.0, times=times_of(rows))
        found.update(changes)
        (kit / "results.json").write_text(json.dumps(found))
        return kit / "results.json"

    return write


@pytest.fixture
def run(run):
    """Calls `qgraph profile`: (exit code, what it says)."""

    def call(*arguments):
        found = run("profile", *arguments)
        return found.exit_code, found.output

    return call
