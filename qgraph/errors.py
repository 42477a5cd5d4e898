"""The error tree: one root, so that one `except` catches all that qgraph itself raises.

    QGraphError
    ├── ModelError            the model cannot be read, converted or written
    │   └── ExternalDataError     its external data is missing, or outside the model's folder
    ├── OptionError           an unknown or impossible option; names the nearest right one
    ├── DataError             calibration or evaluation data that cannot be right
    ├── ExecutionError        the runtime refused to load or to run a model
    │   └── UnprovedError         only the runtime that stands for a device here is too old or too slow for it
    ├── QuantizationError     a request that cannot be carried out on this model
    │   └── NothingQuantizedError   the scheme found no node to quantize
    ├── ProviderError         the target's provider refuses the model, or computes something else
    ├── AuditError            the written model does not run in the kernels that were planned
    ├── AccuracyError         the result says little about what the original says, and nothing was written
    └── SlowerError           the result is slower than its input, and nothing was written

Every message says what was wrong, where, and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "AccuracyError",
    "AuditError",
    "DataError",
    "ExecutionError",
    "ExternalDataError",
    "ModelError",
    "NothingQuantizedError",
    "OptionError",
    "ProviderError",
    "QGraphError",
    "QuantizationError",
    "SlowerError",
    "UnprovedError",
    "first_line",
    "nearest",
    "unknown",
]


class QGraphError(Exception):
    """Root of all errors that qgraph raises on purpose."""


class ModelError(QGraphError):
    """The model cannot be read, converted or written."""


class ExternalDataError(ModelError):
    """The model's external data is missing, truncated, or lies outside the model's folder."""


class OptionError(QGraphError):
    """An option, name or combination that does not exist."""


class DataError(QGraphError):
    """Calibration or evaluation data that cannot be right for this model."""


class ExecutionError(QGraphError):
    """The runtime refused to load or to run a model."""


class UnprovedError(ExecutionError):
    """The runtime that stands for a device here is too old or too slow for the model; the device need not be."""


class QuantizationError(QGraphError):
    """A request that cannot be carried out on this model."""


class NothingQuantizedError(QuantizationError):
    """The scheme found no node to quantize."""


class ProviderError(QGraphError):
    """The target's execution provider refuses the model, or computes something else than the CPU provider."""


class AuditError(QGraphError):
    """The model does not run in the kernels that were planned for it."""


class AccuracyError(QGraphError):
    """The result's outputs are mostly noise."""


class SlowerError(QGraphError):
    """The result is slower than its input on the target."""


def first_line(error: BaseException, limit: int = 300) -> str:
    """What another library's error says, in one line and without numbers of errors; its type where it says nothing."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return next(iter(str(error).strip().splitlines()), "")[:limit] or type(error).__name__


def nearest(name: str, choices: Iterable[str]) -> str | None:
    """The choice most like `name`, or None when none is near."""
    found = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return found[0] if found else None


def unknown(kind: str, name: str, choices: Iterable[str]) -> OptionError:
    """An OptionError for a `name` that is not one of `choices`, naming the nearest and, when few, all of them."""
    known = sorted(choices)
    near = nearest(name, known)
    hint = f" Did you mean {near!r}?" if near else ""
    listing = f" Known: {', '.join(known)}." if len(known) <= 20 else f" There are {len(known)} to choose from."
    return OptionError(f"Unknown {kind} {name!r}.{hint}{listing}")
