"""What happened and why: every decision with its reason, every number with its unit."""

from __future__ import annotations

import dataclasses

__all__ = ["Step"]


@dataclasses.dataclass(frozen=True)
class Step:
    """One pass: name, seconds, and by how many each operator's count changed."""

    name: str
    seconds: float
    operators: dict[str, int]
