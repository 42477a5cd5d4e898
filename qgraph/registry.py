"""Finds pipelines, targets and passes by entry point, its own as anyone's plugin."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from qgraph import errors, profiles
from qgraph.errors import OptionError
from qgraph.pipeline import Context, Pipeline
from qgraph.targets import Target
from qgraph.targets.cpu import Cpu
from qgraph.targets.measured import measured

__all__ = ["installed", "is_installed", "passes", "pipeline", "pipelines", "target", "targets"]


@functools.cache
def _found(group: str) -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=group)}


def _load(group: str, kind: str, name: str) -> Any:
    points = _found(group)
    if not points:
        raise OptionError(f"No {kind} is installed: reinstall qgraph, so that its entry points are registered.")
    if name not in points:
        raise errors.unknown(kind, name, points)
    return points[name].load()


def targets() -> list[str]:
    """Names of all installed targets, and of those whose profiles are stored."""
    return sorted({*_found("qgraph.targets"), *profiles.names()})


def target(name: str) -> Target:
    """The target called `name`; `cpu` has the costs that were measured on this machine, if they were.

    Raises:
        OptionError: there is none; names the nearest.
    """
    if not is_installed(name) and name in profiles.names():
        found = profiles.load(name)
        note = f"Costs are those of the profile {name!r}, measured on {found.measured}."
        # The profile of this machine is its CPU, and not another place.
        other = None if name == profiles.HERE else name
        return measured(_base(found), found.costs, note, other)
    made = installed(name)
    return _here(made) if name == "cpu" else made


def _base(found: profiles.Profile) -> Target:
    """The target that a profile has the kernels of: the one it names, or that of the provider it was measured on."""
    named = installed(found.like)
    if found.provider in ("", named.provider):
        return named
    others = (installed(name) for name in sorted(_found("qgraph.targets")))
    return next((one for one in others if one.provider == found.provider and isinstance(one, Cpu)), named)


def installed(name: str) -> Target:
    """The target called `name` as it was installed, whatever profiles there are.

    Raises:
        OptionError: there is none; names the nearest.
    """
    if _found("qgraph.targets") and not is_installed(name):
        raise errors.unknown("target", name, targets())
    made: Target = _load("qgraph.targets", "target", name)()
    return made


def is_installed(name: str) -> bool:
    """Whether a target of that name is installed, and not only a profile."""
    return name in _found("qgraph.targets")


def _here(made: Target) -> Target:
    """The target of this machine with its measured costs."""
    found, note = profiles.for_this_machine()
    if note is None or not isinstance(made, Cpu):
        return made
    if found is None:
        return measured(made, made.costs, note)
    if found.like != made.name:
        return measured(made, made.costs, f"The profile {found.name!r} is like {found.like}, this is {made.name}.")
    return measured(made, found.costs, note)


def pipelines() -> list[str]:
    """Names of all installed pipelines."""
    return sorted(_found("qgraph.pipelines"))


def pipeline(name: str) -> Callable[[Context], Pipeline]:
    """The pipeline function called `name`.

    Raises:
        OptionError: there is none; names the nearest.
    """
    found: Callable[[Context], Pipeline] = _load("qgraph.pipelines", "pipeline", name)
    return found


def passes() -> dict[str, str]:
    """First line of each installed pass's module, by the pass's name."""
    lines: dict[str, str] = {}
    for name in sorted(_found("qgraph.passes")):
        loaded = _load("qgraph.passes", "pass", name)
        module = __import__(loaded.__module__, fromlist=["__doc__"])
        lines[name] = " ".join((module.__doc__ or "").strip().split("\n\n")[0].split())
    return lines
