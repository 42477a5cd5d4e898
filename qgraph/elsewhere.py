"""What a job does for a target that this machine is not: say what can be proved here, and prove it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from qgraph import overflow, proof
from qgraph.compare import Runnable
from qgraph.data import Dataset
from qgraph.errors import ExecutionError, ProviderError, UnprovedError
from qgraph.placement import Placement
from qgraph.session import HOST
from qgraph.targets import Target
from qgraph.words import percent

__all__ = ["notes", "proved", "told"]

_RUN = "Nodes and numbers are proved on {}, which is no device: nothing is said of its speed."
_UNPROVED = "Nothing was proved on {}: {}"
_NOT_RUN = (
    "Nothing here runs models on {}: numbers were checked on the CPU provider, and neither the target's own kernels "
    "nor its speed."
)
_NAMED = 4


def notes(target: Target) -> list[str]:
    """What a report says beforehand of a target that cannot be run here."""
    if target.native:
        return []
    if proof.how(target) is not None or target.provider == HOST:
        # What comes of it is told once it is there.
        return []
    return [f"{_NOT_RUN.format(target.provider)} {target.missing or proof.hint(target)}".strip()]


def proved(
    target: Target, model: Path, original: Runnable, data: Dataset, tell: Callable[[str], None], accept: bool = False
) -> Placement | None:
    """Where the target's provider put the nodes of `model`; None where it cannot be run here.

    Args:
        target: where the model will run.
        model: what was written for it.
        original: the float model.
        data: samples to run.
        tell: called with what a report should say of it.
        accept: whether what is wrong is told, and not raised.

    Raises:
        ProviderError: the provider refuses the model, or computes something else than the CPU provider.
    """
    if proof.how(target) is None or (target.native and target.provider == HOST):
        return None
    try:
        found = proof.prove(model, original, target, data)
    except UnprovedError as error:
        tell(_UNPROVED.format(target.provider, error))
        return None
    except ExecutionError as error:
        words = f"What was made for {target.name!r} does not run there. {error}"
        if not accept:
            raise ProviderError(words) from error
        tell(words)
        return None
    if not found.right and not accept:
        narrow = target.narrow
        beyond = "" if narrow is None else overflow.told(overflow.beyond(model, data, narrow), narrow)
        raise ProviderError(
            f"{target.provider} took {percent(found.share)} of the nodes and gives wrong numbers: they differ by "
            f"{found.error:.2g} of the output from those of the CPU provider on the same file ({found.allowed:.2g} "
            "would be rounding)."
            + (beyond or " Keep the nodes in question in float (--keep-float), or choose another --scheme.")
        )
    if not target.native:
        tell(_RUN.format(found.runtime))
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
