"""What the names of candidates and kernels mean, in words."""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = ["candidates", "kernel"]

_MEANINGS = (
    (r"^fp32", "fp32", "the graph rewritten, and no number quantized"),
    (r"^fastest", "fastest", "each node as is fastest by the target's costs, whatever that loses"),
    (r"^all layers", "all layers", "every layer with weights quantized, though by the costs none pays"),
    (r"^[\d.]+ bits", "bits", "each weight in what loses least within so many bits on average"),
    (r"^finer", "finer", "as fast as the fastest, as far as a clock could tell, and of such the one that loses least"),
    (r"^mixed", "mixed", "between the fastest and float: nodes that lose much for what they save are in float, or in "
     "another scheme; the number is the step of the search"),
    (r", folded", "folded", "range is moved between channels where that costs nothing at run time"),
    (r", none", "none", "no range is moved between channels; without this word it is, where that costs nothing"),
    (r", explicit", "explicit", "range is moved between channels, also by multiplications that are put in"),
    (r", aside", "aside", "the same, and the loudest channels of some products computed in float beside them"),
    (r", learned", "learned", "ranges and roundings are learned from the data"),
    (r"\(\d+\)$", "(2)", "from a second search, with the times of nodes as measured here"),
)  # fmt: skip


def candidates(names: Iterable[str]) -> list[tuple[str, str]]:
    """(part of a name, what it means) of all parts that these names of candidates have."""
    names = list(names)
    return [(part, what) for pattern, part, what in _MEANINGS if any(re.search(pattern, name) for name in names)]


def kernel(op_type: str, ran: str | None) -> str:
    """A quantized node: its operator and the kernel that runs it, once if they are the same."""
    if ran is None or ran == op_type:
        return op_type
    return ran if ran.startswith(f"{op_type} (") else f"{op_type} as {ran}"
