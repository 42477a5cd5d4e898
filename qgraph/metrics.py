"""What a result may lose: metrics, and budgets stated in them.

A metric gives one number for a model on data. `cosine`, `agreement` and `sqnr` compare with the original and need no
labels; `top1` and `top5` need an array `labels` in the data; `package.module:function` is for anything else. Of
language models, `kl` compares the predictions with the original's, without labels, and `bits` and `perplexity` are
those of the data's own tokens. Higher is better, but for the last three.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from qgraph import errors, language, named
from qgraph.errors import DataError, OptionError, QGraphError, first_line
from qgraph.feeds import LABELS, Batch
from qgraph.report import Fidelity

__all__ = ["DEFAULT", "LANGUAGE", "METRICS", "Limit", "Metric", "Outputs", "Pairs", "loss_limit", "metric"]

Outputs: TypeAlias = Iterable[tuple[Batch, dict[str, NDArray[Any]]]]
"""Every batch with what a model made of it, read from disk one at a time."""
Pairs: TypeAlias = Iterable[tuple[Batch, dict[str, NDArray[Any]], dict[str, NDArray[Any]]]]
"""Every batch with what the original and a model made of it."""


@dataclasses.dataclass(frozen=True)
class Metric:
    """A number for a model.

    Attributes:
        name: what the user calls it.
        of_fidelity: from the comparison with the original, for metrics that need no more.
        of_outputs: from all batches and outputs, for others.
        of_pairs: from all batches with the original's outputs and the model's, for the rest.
        perfect: value of the original, where it is known without measuring.
        lower: whether lower is better.
        labelled: whether `of_outputs` may need labels.
        unit: of its values, for messages.
        allowed: the loss that is allowed where nothing is said.
    """

    name: str
    of_fidelity: Callable[[Fidelity], float] | None = None
    of_outputs: Callable[[Outputs], float] | None = None
    of_pairs: Callable[[Pairs], float] | None = None
    perfect: float | None = None
    lower: bool = False
    labelled: bool = True
    unit: str = ""
    allowed: str = "1%"

    @property
    def needs_labels(self) -> bool:
        """Whether outputs alone do not tell it; a function of the user's may need labels."""
        return self.of_outputs is not None and self.labelled

    @property
    def needs_outputs(self) -> bool:
        """Whether the comparison's sums do not tell it."""
        return self.of_outputs is not None or self.of_pairs is not None

    def value(self, fidelity: Fidelity, outputs: Outputs, original: Outputs = ()) -> float:
        """The metric of a model that was compared and has made these outputs, where the original has made its own.

        Raises:
            DataError: the data does not suit the metric.
        """
        found = self.of_fidelity(fidelity) if self.of_fidelity is not None else math.nan
        if self.of_outputs is not None:
            found = self.of_outputs(outputs)
        if self.of_pairs is not None:
            found = self.of_pairs((batch, a, b) for (batch, a), (_, b) in zip(original, outputs, strict=True))
        if not math.isfinite(found) and not (found == math.inf and self.name == "sqnr"):
            raise DataError(f"Metric {self.name!r} is {found} for this model and data: it cannot be held to a budget.")
        return float(found)


@dataclasses.dataclass(frozen=True)
class Limit:
    """One requirement: how much of a metric may be lost.

    Attributes:
        metric: the metric.
        limit: the largest loss.
        relative: whether loss is a share of the original's value.
        text: the requirement in words.
    """

    metric: Metric
    limit: float
    relative: bool
    text: str

    def loss(self, original: float, value: float) -> float:
        """What was lost, in the unit of `limit`; a gain is a negative loss.

        Raises:
            DataError: a relative loss of a metric that is zero for the original.
        """
        if self.metric.name == "sqnr":
            return float(10 ** (-value / 10))
        lost = value - original if self.metric.lower else original - value
        if not self.relative:
            return lost
        if original == 0:
            raise DataError(f"Metric {self.metric.name!r} is 0 for the original: state the loss in points, without %.")
        return lost / abs(original)


def _cosine(fidelity: Fidelity) -> float:
    return min(output.cosine for output in fidelity.outputs.values())


def _agreement(fidelity: Fidelity) -> float:
    shares = [output.agreement for output in fidelity.outputs.values() if output.agreement is not None]
    if not shares:
        raise DataError("No output looks like class scores ([samples, classes]), so there is no agreement to measure.")
    return min(shares)


def _top(count: int) -> Callable[[Outputs], float]:
    def measure(outputs: Outputs) -> float:
        right = total = 0
        for batch, found in outputs:
            if batch.labels is None:
                raise DataError(f"Metric 'top{count}' needs right answers: an array {LABELS!r} beside the inputs.")
            scores = next((a for a in found.values() if a.ndim == 2 and a.shape[1] > 1 and a.dtype.kind == "f"), None)
            labels = np.asarray(batch.labels).reshape(-1)
            if scores is None or len(scores) != len(labels):
                raise DataError(f"Metric 'top{count}' needs an output of class scores, [samples, classes].")
            best = np.argsort(-scores, axis=1, kind="stable")[:, :count]
            right += int((best == labels[:, None]).any(axis=1).sum())
            total += len(labels)
        return 100.0 * right / max(1, total)

    return measure


METRICS: dict[str, Metric] = {
    "cosine": Metric("cosine", of_fidelity=_cosine, perfect=1.0),
    "agreement": Metric("agreement", of_fidelity=_agreement, perfect=1.0),
    "sqnr": Metric("sqnr", of_fidelity=lambda fidelity: fidelity.worst.sqnr, perfect=math.inf),
    "top1": Metric("top1", of_outputs=_top(1)),
    "top5": Metric("top5", of_outputs=_top(5)),
    "kl": Metric("kl", of_pairs=language.cross_entropy, lower=True, unit="bits per token", allowed="5%"),
    "bits": Metric("bits", of_outputs=language.bits, lower=True, labelled=False, unit="bits per token"),
    "perplexity": Metric("perplexity", of_outputs=language.perplexity, lower=True, labelled=False),
}
DEFAULT = "cosine"
LANGUAGE = "kl"
"""The default of language models: what counts are their predictions, and not the caches that they also give.

Four bits cost a small model 1 to 2 % of its bits per token, two bits 8 %, int8 with outliers among its activations
14 %, where their cosines are 0.999, 0.994 and 0.98: so 5 % is allowed, which is the like of 1 % of a cosine.
"""


def metric(name: str | Callable[[Outputs], float]) -> Metric:
    """The metric called `name`: one of `METRICS`, `package.module:function`, or a function.

    A function is given an iterable of (batch, outputs): `batch.feeds` and `batch.labels`, and a dict of the model's
    outputs; it returns a number, higher is better.

    Raises:
        OptionError: there is none of this name, or it cannot be imported.
    """
    if callable(name):
        return Metric(getattr(name, "__qualname__", repr(name)), of_outputs=_guarded(name))
    if name in METRICS:
        return METRICS[name]
    if not named.is_name(name):
        raise errors.unknown("metric", name, [*METRICS, "package.module:function"])
    return Metric(name, of_outputs=_guarded(named.load(name, OptionError, "metric ")))


def _guarded(function: Callable[[Outputs], Any]) -> Callable[[Outputs], float]:
    """A user's function whose failures are told as such."""

    def measure(outputs: Outputs) -> float:
        try:
            return float(function(outputs))
        except QGraphError:
            raise
        except Exception as error:
            raise DataError(f"The metric's function failed: {type(error).__name__}: {first_line(error)}") from error

    return measure


def loss_limit(text: str | float, measure: Metric) -> Limit:
    """The limit that `--max-loss` states: `1%` is relative to the original's value, `0.5` is in the metric's points.

    Raises:
        OptionError: not a number of at least 0, with or without %.
    """
    found = re.fullmatch(r"\s*([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*(%?)\s*", str(text))
    try:
        number = float(found[1]) if found else math.nan
    except ValueError:
        number = math.nan
    if found is None or not math.isfinite(number):
        raise OptionError(f"A loss is a number of at least 0, with % if relative (1%), and not {text!r}.")
    if measure.name == "sqnr":
        raise OptionError("A loss of SQNR means nothing, since the original's is infinite: use --min-sqnr.")
    relative = bool(found[2])
    words = f"loss of {measure.name} at most {found[1]}{found[2]}"
    if measure.unit:
        words += f" of the original's {measure.unit}" if relative else f" {measure.unit}"
    return Limit(measure, number / 100 if relative else number, relative, words)
