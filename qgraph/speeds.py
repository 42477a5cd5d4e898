"""How fast a model is and what it takes: what the clock and the disk have said."""

from __future__ import annotations

import dataclasses

__all__ = ["Footprint", "Latency", "OperatorTime", "Speed"]


@dataclasses.dataclass(frozen=True)
class Latency:
    """Times of one model: median and the lowest and highest block's median, seconds per run."""

    median: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Speed:
    """Both models, timed in alternating blocks.

    Attributes:
        threads: intra-op threads.
        before: the original.
        after: the result.
        ratio: median over pairs of neighbouring blocks of before / after: above 1 is faster.
        ratio_low: lowest pair.
        ratio_high: highest pair.
        blocks: number of pairs.
    """

    threads: int
    before: Latency
    after: Latency
    ratio: float
    ratio_low: float
    ratio_high: float
    blocks: int


@dataclasses.dataclass(frozen=True)
class Footprint:
    """What a model takes: bytes on disk, seconds to load, bytes of resident memory that loading and a run add.

    The last two are None where nothing was timed.
    """

    disk: int
    load_seconds: float | None = None
    resident: int | None = None


@dataclasses.dataclass(frozen=True)
class OperatorTime:
    """Seconds per run that all nodes of one operator took, as the runtime profiled them on one thread."""

    op_type: str
    before: float
    after: float
