"""What became of a model in 16-bit floats that went through float32, in words."""

from __future__ import annotations

from collections.abc import Sequence

from qgraph.targets import Target

__all__ = ["told"]

_OTHER = {"fp16": "bf16", "bf16": "fp16"}
_WORDS = {"fp16": "float16", "bf16": "bfloat16"}


def told(kinds: Sequence[str], target: Target | None = None) -> str:
    """A note for the report.

    Args:
        kinds: what it computed in: "bfloat16", "float16".
        target: where it will run; None for one that computes in float32 alone.
    """
    what = f"The model computes in {' and '.join(kinds)}"
    half = None if target is None else target.half
    if target is None or half is None:
        return (
            f"{what}, for which this target has no kernels. What is not quantized computes in float32, its large "
            "weights stored as they were; inputs and outputs keep their types."
        )
    other = _OTHER[half]
    if _WORDS[other] not in kinds:
        return f"{what}, and in {half} it stays but for what is quantized, or reaches too far on the data."
    why = target.refused.get(other, f"this target has no schemes in {other}")
    return (
        f"{what}, and what computes in 16 bits now does so in {half} ({why}); inputs and outputs keep their types. "
        "What reaches too far for it on the data stays in float32; without data (--data) only the comparison shows it."
    )
