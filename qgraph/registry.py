"""Finds pipelines, targets and passes by entry point, its own as anyone's plugin."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from qgraph import errors
from qgraph.errors import OptionError
from qgraph.pipeline import Context, Pipeline
from qgraph.targets import Target

__all__ = ["passes", "pipeline", "pipelines", "target", "targets"]


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
    """Names of all installed targets."""
    return sorted(_found("qgraph.targets"))


def target(name: str) -> Target:
    """The target called `name`.

    Raises:
        OptionError: there is none; names the nearest.
    """
    made: Target = _load("qgraph.targets", "target", name)()
    return made


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
