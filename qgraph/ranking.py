"""Which nodes hurt: the loss of each alone, worst first, without writing anything."""

from __future__ import annotations

from pathlib import Path

from qgraph import modelio
from qgraph.data import DataSource
from qgraph.errors import NothingQuantizedError
from qgraph.job import Job, Progress
from qgraph.options import Options
from qgraph.report import Sensitivity

__all__ = ["rank"]

_FOREVER = 1e9


def rank(
    model: Path,
    source: DataSource,
    target: str = "cpu",
    scheme: str = "auto",
    exact: int = 8,
    progress: Progress | None = None,
) -> list[Sensitivity]:
    """Each node in each scheme, the noisiest first.

    Args:
        model: the file.
        source: data; a part of it is held back to measure on.
        target: name of the target.
        scheme: name of the scheme.
        exact: how many nodes to measure end to end, the noisiest by estimate; the others' estimates are brought to the
            same scale.
        progress: called with (what is done, steps done, steps in all).

    Raises:
        NothingQuantizedError: no node has a kernel in this scheme.
        QGraphError: the model, the data or an option is at fault.
    """
    with modelio.Workspace() as workspace:
        options = Options(target=target, scheme=scheme, time_limit=_FOREVER, bench_seconds=0)
        job = Job(model, None, options, workspace, progress or (lambda what, done, total: None))
        found = job.rank(source, exact)
    if not found:
        raise NothingQuantizedError(f"No node has a kernel in scheme {scheme!r} on target {target!r}.")
    return sorted(found, key=lambda one: (-one.noise, one.node, one.scheme))
