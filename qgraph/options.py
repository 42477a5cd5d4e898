"""What a caller can choose about the main job, as frozen data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from qgraph import calibration
from qgraph.errors import OptionError, unknown
from qgraph.observers import OBSERVERS

__all__ = ["Options", "refuse_overwriting"]


def refuse_overwriting(writes: Mapping[str, str | Path | None], reads: Mapping[str, object]) -> None:
    """Check that no file is written over one that is read, or over another one that is written.

    Args:
        writes: what is written -> its path.
        reads: what is read -> its path; whatever is no path is passed over.

    Raises:
        OptionError: names both.
    """
    taken = {Path(path).resolve(): what for what, path in reads.items() if isinstance(path, (str, Path))}
    for what, path in writes.items():
        if path is None:
            continue
        if Path(path).resolve() in taken:
            raise OptionError(f"The {what} would replace the {taken[Path(path).resolve()]}; name another file.")
        taken[Path(path).resolve()] = what


@dataclasses.dataclass(frozen=True)
class Options:
    """How to optimize.

    Attributes:
        target: name of the target; `cpu` is the machine this runs on.
        scheme: name of the scheme, one of the target's.
        observer: name of the observer; None for the scheme's own.
        keep_float: patterns (shell style) of node names or operator types to leave in float.
        memory: bytes that the observed values of one calibration run may take.
        ranges: file of saved ranges to use instead of running the calibration data.
        save_ranges: file to save the observed ranges in.
        bench_seconds: about how long to time both models for each thread count; 0 does not time, and so cannot promise
            that the result is not slower.
        force: write the result even if it is slower than its input, or mostly noise.
    """

    target: str = "cpu"
    scheme: str = "int8"
    observer: str | None = None
    keep_float: tuple[str, ...] = ()
    memory: int = calibration.DEFAULT_BUDGET
    ranges: Path | str | None = None
    save_ranges: Path | str | None = None
    bench_seconds: float = 4.0
    force: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            OptionError: a single string where several patterns are expected, or options that exclude each other.
        """
        if isinstance(self.keep_float, str):
            raise OptionError(f"keep_float takes several patterns: write ({self.keep_float!r},).")
        if self.observer is not None and self.observer not in OBSERVERS:
            raise unknown("observer", self.observer, OBSERVERS)
        if self.ranges is not None and self.observer is not None:
            raise OptionError("Saved ranges bring their observer with them: give either the ranges or an observer.")
        if self.memory <= 0 or self.bench_seconds < 0:
            raise OptionError("memory must be positive, and bench_seconds not negative.")
