"""Profiles: what the kernels of one machine take, as data that is measured once and kept.

A profile is a JSON file in the folder of the user's profiles (`QGRAPH_PROFILES`, or the platform's place for
applications' data), called by its name. It says where and when it was measured.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from qgraph import errors
from qgraph.errors import OptionError
from qgraph.session import runtime_version
from qgraph.targets.cpu_costs import COEFFICIENTS, Costs

__all__ = ["FOLDER", "HERE", "Machine", "Profile", "RowTime", "folder", "for_this_machine", "load", "names", "save"]

HERE = "this-machine"
"""Name of the profile of the machine that qgraph runs on."""
FOLDER = "QGRAPH_PROFILES"
"""Environment variable that names the folder of profiles."""
_VERSION = 1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclasses.dataclass(frozen=True)
class Machine:
    """A machine, as far as its kernels' times depend on it.

    Attributes:
        processor: what it calls itself.
        architecture: as `x86_64`.
        cores: how many this process may use.
        features: digest of the processor's family, stepping and instruction sets; empty where unknown.
    """

    processor: str
    architecture: str
    cores: int
    features: str = ""

    @classmethod
    def here(cls) -> Machine:
        """The machine that this runs on."""
        try:
            text = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
        except OSError:
            text = ""
        found = dict(re.findall(r"^([^\t:]+?)\s*: (.*)$", text, re.MULTILINE))
        kept = ("vendor_id", "cpu family", "model", "stepping", "flags", "Features", "CPU part", "CPU implementer")
        said = {key: found[key] for key in kept if key in found}
        digest = hashlib.sha256(repr(sorted(said.items())).encode()).hexdigest()[:16] if said else ""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        name = found.get("model name") or platform.processor() or platform.machine()
        return cls(name, platform.machine(), cores, digest)

    def same(self, other: Machine) -> bool:
        """Whether kernels take the same time on both: all but the number of cores."""
        return dataclasses.replace(self, cores=other.cores) == other


@dataclasses.dataclass(frozen=True)
class RowTime:
    """Measured times of one row of the table of kernels.

    Attributes:
        table, name, form: the row.
        before: seconds in float.
        after: seconds in integers.
        ratio: median over rounds of before / after.
        error: fitted over measured time less one, of the form where that is farther off.
        shipped: what the costs that come with qgraph would make of the ratio.
    """

    table: str
    name: str
    form: str
    before: float
    after: float
    ratio: float
    error: float
    shipped: float


@dataclasses.dataclass(frozen=True)
class Profile:
    """What was measured, and the costs that were fitted to it.

    Attributes:
        name: what its target is called.
        like: the target whose formats and kernels it has.
        provider: the execution provider that was timed.
        machine: where.
        runtime: on what, as `onnxruntime 1.31.1`.
        date: when, as 2026-11-22.
        seconds: how long it was measured.
        rounds: how often each model was timed.
        rows: the times.
        coefficients: nanoseconds of each term of the costs.
        refused: kernels that the runtime refused -> its words.
    """

    name: str
    like: str
    provider: str
    machine: Machine
    runtime: str
    date: str
    seconds: float
    rounds: int
    rows: tuple[RowTime, ...]
    coefficients: Mapping[str, float]
    refused: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])

    @property
    def measured(self) -> str:
        """Where, on what and when."""
        cores = f"{self.machine.cores} core{'s' * (self.machine.cores != 1)}"
        return f"{self.machine.processor}, {cores}, {self.runtime}, {self.date}"

    @property
    def costs(self) -> Costs:
        """What a CPU target carries."""
        return Costs(self.measured, self.coefficients)

    @property
    def error(self) -> float:
        """Median relative error of the fit."""
        found = sorted(abs(row.error) for row in self.rows)
        return found[len(found) // 2] if found else math.nan


def folder() -> Path:
    """Where profiles are kept."""
    given = os.environ.get(FOLDER)
    return Path(given) if given else Path(click.get_app_dir("qgraph")) / "profiles"


def names() -> list[str]:
    """Names of the stored profiles."""
    try:
        return sorted(path.stem for path in folder().iterdir() if path.suffix == ".json" and _NAME.fullmatch(path.stem))
    except OSError:
        return []


def save(profile: Profile) -> Path:
    """Store a profile under its name, in the place of an older one; a failure leaves that as it was.

    Raises:
        OptionError: the name is no name of a file, or the folder cannot be written.
    """
    if not _NAME.fullmatch(profile.name):
        raise OptionError(f"{profile.name!r} cannot name a target: take letters, digits, '.', '_' and '-'.")
    path = folder() / f"{profile.name}.json"
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    text = json.dumps({"version": _VERSION, **dataclasses.asdict(profile)}, indent=1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(text + "\n")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise OptionError(f"Cannot write the profile to {str(path)!r}: {errors.first_line(error)}.") from error
    return path


def load(name: str) -> Profile:
    """The profile called `name`.

    Raises:
        OptionError: there is none, or its file is not what this version of qgraph writes.
    """
    if name not in names():
        raise errors.unknown("profile", name, names())
    path = folder() / f"{name}.json"
    try:
        found = json.loads(path.read_text())
        if found.pop("version") != _VERSION:
            raise ValueError("it has another version")
        return _read({**found, "name": name})
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise OptionError(
            f"The profile {str(path)!r} cannot be used: {errors.first_line(error)}. Measure it again, or remove it."
        ) from error


def _read(found: Mapping[str, Any]) -> Profile:
    coefficients = {str(key): float(value) for key, value in found["coefficients"].items()}
    wrong = set(coefficients) ^ set(COEFFICIENTS)
    if wrong:
        raise ValueError(f"it is of another version of qgraph (see {min(wrong)!r})")
    bad = [key for key, value in coefficients.items() if not (math.isfinite(value) and value >= 0)]
    if bad:
        raise ValueError(f"{bad[0]!r} is no time")
    rows = tuple(RowTime(**row) for row in found["rows"])
    whole: dict[str, Any] = {"machine": Machine(**found["machine"]), "rows": rows, "coefficients": coefficients}
    return Profile(**{**found, **whole})


def for_this_machine() -> tuple[Profile | None, str | None]:
    """The profile to use for the CPU of this machine, and a note about it; neither where none was measured."""
    if HERE not in names():
        return None, None
    try:
        found = load(HERE)
    except OptionError as error:
        return None, f"Costs are those that come with qgraph. {error}"
    again = "run `qgraph profile` again; costs are those that come with qgraph"
    if not found.machine.same(Machine.here()):
        return None, f"The profile of {found.date} is of another machine ({found.machine.processor}): {again}."
    runtime = f"onnxruntime {runtime_version()}"
    if found.runtime != runtime:
        return None, f"The profile of {found.date} was measured with {found.runtime}, and this is {runtime}: {again}."
    return found, f"Costs are those measured on this machine on {found.date} (profile {HERE!r})."
