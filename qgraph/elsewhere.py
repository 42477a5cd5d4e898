"""What a job does for a target that this machine is not: say what can be proved here, and prove it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from qgraph import proof
from qgraph.compare import Runnable
from qgraph.data import Dataset
from qgraph.errors import ExecutionError, ProviderError
from qgraph.placement import Placement
from qgraph.session import HOST
from qgraph.targets import Target
from qgraph.words import percent

__all__ = ["notes", "proved", "told"]

_RUN = "Nodes and numbers are proved on {} ({}). Its times say nothing about a device, and none were taken."
_NOT_RUN = (
    "Nothing here runs models on {}: numbers were checked on the CPU provider, and neither the target's own kernels "
    "nor its speed."
)
_NAMED = 4


def notes(target: Target) -> list[str]:
    """What a report says of a target that is not this machine."""
    if target.native:
        return []
    where = proof.how(target)
    if where is not None:
        return [_RUN.format(target.provider, where)]
    if target.provider == HOST:
        return []
    return [f"{_NOT_RUN.format(target.provider)} {target.missing or proof.hint(target)}".strip()]


def proved(
    target: Target, model: Path, original: Runnable, data: Dataset, tell: Callable[[str], None] | None = None
) -> Placement | None:
    """Where the target's provider put the nodes of `model`; None where it cannot be run here.

    Args:
        target: where the model will run.
        model: what was written for it.
        original: the float model.
        data: samples to run.
        tell: called with what is wrong, where that is to be accepted; None to raise it.

    Raises:
        ProviderError: the provider refuses the model, or computes something else than the CPU provider.
    """
    if proof.how(target) is None or (target.native and target.provider == HOST):
        return None
    try:
        found = proof.prove(model, original, target, data)
    except ExecutionError as error:
        words = f"What was made for {target.name!r} does not run there. {error}"
        if tell is None:
            raise ProviderError(words) from error
        tell(words)
        return None
    if not found.right and tell is None:
        raise ProviderError(
            f"{target.provider} took {percent(found.share)} of the nodes and gives wrong numbers: they differ by "
            f"{found.error:.2g} of the output from those of the CPU provider on the same file ({found.allowed:.2g} "
            "would be rounding). Keep the nodes in question in float (--keep-float), or choose another --scheme."
        )
    return found


def told(found: Placement) -> str:
    """A placement in a sentence."""
    nodes = f"{found.provider} ran {percent(found.share)} of the nodes"
    work = "" if found.work is None else f" and {percent(found.work)} of the multiplications"
    names = [f"{one.op_type} {one.name}".strip() for one in found.left[:_NAMED]]
    more = f" and {len(found.left) - _NAMED} more" if len(found.left) > _NAMED else ""
    rest = f"; left to others: {', '.join(names)}{more}" if names else ""
    right = f"differs by {found.error:.1e} from the CPU provider on the same file"
    return f"{nodes}{work}, {right}{'' if found.right else ', which is WRONG'} ({found.runtime}){rest}."
