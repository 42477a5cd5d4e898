"""Why nothing is written, as errors: what was found instead, and what to do."""

from __future__ import annotations

from qgraph import outcome
from qgraph.builder import Builder
from qgraph.errors import AccuracyError, NothingQuantizedError, SlowerError
from qgraph.report import Budget
from qgraph.trials import Trials

__all__ = ["only_float", "over_budget", "slower"]


def over_budget(trials: Trials, builder: Builder, budget: Budget | None, hint: str) -> AccuracyError:
    """No candidate is within the budget; where there is none but the float graph, the reasons are told."""
    return AccuracyError(trials.nothing("Nothing is within the budget", budget) + _reasons(trials, builder) + hint)


def only_float(
    trials: Trials, builder: Builder, scheme: str, budget: Budget | None, hint: str
) -> NothingQuantizedError:
    """Of a scheme that was asked for, only the float graph is left."""
    what = trials.nothing(outcome.ONLY_FLOAT.format(scheme), budget)
    return NothingQuantizedError(what + outcome.INSTEAD + _reasons(trials, builder) + hint)


def slower(trials: Trials, budget: Budget | None, hint: str) -> SlowerError:
    """What is within the budget is slower than the model."""
    return SlowerError(trials.nothing("Nothing within the budget is as fast as the model itself", budget) + hint)


def _reasons(trials: Trials, builder: Builder) -> str:
    """Why nothing was tried but the float graph."""
    if any(trial.assignment for trial in trials.trials.values()):
        return ""
    try:
        builder.assignment()
    except NothingQuantizedError as error:
        return f" {error}."
    return ""
