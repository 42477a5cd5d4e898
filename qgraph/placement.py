"""Where a provider put a model's nodes, and whether it computed what it should: what a proof on it found."""

from __future__ import annotations

import dataclasses

__all__ = ["Left", "Placement"]


@dataclasses.dataclass(frozen=True)
class Left:
    """A node that the target's provider did not take: name, operator, and the provider that ran it."""

    name: str
    op_type: str
    provider: str


@dataclasses.dataclass(frozen=True)
class Placement:
    """One model on one provider.

    Attributes:
        provider: the target's.
        runtime: what ran it, in words.
        nodes: provider -> number of nodes that it ran, as the runtime counts them, quantizers left out.
        share: share of these nodes that the target's provider ran.
        work: share of the multiplications of products and convolutions that it ran; None where there are none.
        left: the nodes that it did not run.
        error: RMS of the difference to the CPU provider on the same file over the RMS of the output; of the worst one.
        allowed: the largest such error that is taken for rounding.
        sqnr: of the worst output against the original on the CPU provider, dB.
        cosine: of the worst output against the original, mean over samples.
        samples: number of runs.
    """

    provider: str
    runtime: str
    nodes: dict[str, int]
    share: float
    work: float | None
    left: list[Left]
    error: float
    allowed: float
    sqnr: float
    cosine: float
    samples: int

    @property
    def right(self) -> bool:
        """Whether the provider's numbers are those of the CPU provider, but for rounding."""
        return self.error <= self.allowed
