"""How much of a result is proved before it is written: the whole of it, its parts one by one, or nothing."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from qgraph import modelio
from qgraph.errors import OptionError

__all__ = ["CHECKS", "NONE", "PARTS", "WHOLE", "available_memory", "chosen"]

WHOLE, PARTS, NONE = "whole", "parts", "none"
CHECKS = (WHOLE, PARTS, NONE)

_TIMES = 3.0
"""Bytes that the runtime takes for a byte of float weights, at most: what it has read, and what it has packed; and the
result, which does not run at the same time, but whose pages may still be there."""


def available_memory() -> int | None:
    """Bytes that this process may still take without swapping; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None
    try:
        # A container's own limit, less what it has taken of it.
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        free = min(free, limit - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    except (OSError, ValueError):
        pass
    return free


def chosen(model: ir.Model, asked: str | None, why_whole: str | None) -> tuple[str, str | None]:
    """(the check, a note on why it is not of the whole).

    Args:
        model: the original.
        asked: what the caller wants; None for the whole where it fits into memory, and its parts where it does not.
        why_whole: an option that only a run of the whole model can follow, if one was given.

    Raises:
        OptionError: the caller wants less than the other options need.
    """
    if asked in (PARTS, NONE) and why_whole is not None:
        raise OptionError(f"{why_whole} needs the whole model to be run: leave it out, or say --check {WHOLE}.")
    if asked is not None or why_whole is not None:
        return asked or WHOLE, None
    weights, free = modelio.weight_bytes(model), available_memory()
    if free is None or weights * _TIMES <= free:
        return WHOLE, None
    note = (
        f"The model's weights take {weights / 1e9:.1f} GB, and {free / 1e9:.1f} GB of memory are free: it was checked "
        f"in parts (--check {WHOLE} runs all of it)."
    )
    return PARTS, note
