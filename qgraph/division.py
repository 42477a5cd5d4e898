"""Which data does what: some to calibrate on, some to search on, some to judge the result on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import onnx_ir as ir

from qgraph import data, oddities
from qgraph.data import Dataset, DataSource
from qgraph.errors import DataError
from qgraph.metrics import METRICS, Limit
from qgraph.session import Session
from qgraph.synthetic import synthetic

__all__ = ["Parts", "divide"]

_HELD_BACK = 0.15
_ENOUGH = 8
"""Samples are held back where that leaves four times as many to calibrate on, and never less than the share above."""
_RANDOM = (
    "Without data everything was compared and timed on random inputs, which says little about real ones, and nothing "
    "was calibrated. With a few dozen typical inputs (--data) static int8 comes into question: faster kernels, "
    "convolutions among them, and a loss that is measured."
)
_RANDOM_STEPS = (
    "Without data the model was compared on random tokens: a prompt, and steps after a random cache. That says little "
    "about text: predictions of noise are vague, and what blurs them is not seen. Token ids (--data) tell the loss."
)
_FILLED = "The data has token ids without {}: each sample was taken as a prompt with nothing before it."
_STEPS = (
    "Times are those of generation: one token after {past} others, batch {batch}. A prompt's many tokens at once gain "
    "less from small weights."
)
_WHOLE = "Nothing was held back, so that ranges are of all the data: the comparison ran on the calibration data itself."
_UNLABELLED = (
    "The calibration data has no labels, so that {!r} can be measured on the evaluation data only: candidates were "
    "chosen on what the result is judged on, which flatters it a little. Labels with the calibration data mend that."
)
_FEW = "There are too few samples to hold some back: the comparison ran on the calibration data itself."


@dataclasses.dataclass(frozen=True)
class Parts:
    """Data by its use.

    Attributes:
        calibrate: for ranges and samples; None when there is none.
        search: what candidates are held to.
        final: what the result is held to; None for the same.
        apart: whether calibration does not see what is searched on.
        note: what the user should know, or an empty text.
        fresh: whether calibration does not see what the result is held to.
        warnings: what looks like a mistake.
    """

    calibrate: Dataset | None
    search: Dataset
    final: Dataset | None
    apart: bool
    note: str = ""
    fresh: bool = True
    warnings: tuple[str, ...] = ()

    @property
    def told(self) -> list[str]:
        """All of it that the user should read."""
        return [text for text in (self.note, *self.warnings) if text]


def divide(
    model: ir.Model,
    source: DataSource | None,
    evaluation: DataSource | None,
    limits: list[Limit],
    whole: bool = False,
    original: Callable[[], Session] | None = None,
) -> Parts:
    """Divide what the user gave.

    Part of the calibration data, chosen by its contents, is held back for the search, so that the evaluation data only
    has to say yes or no to the result. Where a metric needs labels that only the evaluation data has, it does both; a
    function of the user's may do without, which is tried on one batch.

    Args:
        model: its inputs say what a feed is.
        source: calibration data, or None.
        evaluation: data to judge the result on, or None.
        limits: the budget.
        whole: whether nothing may be held back from calibration.
        original: runs the original; None where functions need not be tried.

    Raises:
        DataError: a source is not readable as feeds of this model.
    """
    inputs = data.inputs_of(model)
    tested = data.load(evaluation, inputs) if evaluation is not None else None
    if source is None:
        if tested is not None:
            return Parts(None, tested, None, True, _of_decoder(tested))
        made_up = data.load(lambda: synthetic(model), inputs)
        note = _RANDOM if made_up.decoder is None else f"{_RANDOM_STEPS} {_of_decoder(made_up)}"
        return Parts(None, made_up, None, True, note)
    given = data.load(source, inputs)
    found = _divided(given, tested, _blind(given, limits, original) if tested is not None else None, whole)
    twice = oddities.shared(given, tested) if tested is not None else ""
    warnings = (*found.warnings, *([twice] if twice else []), *oddities.constant(given))
    apart = found.apart and not (twice and found.search is tested)
    return dataclasses.replace(found, apart=apart, fresh=not twice, warnings=warnings)


def _divided(given: Dataset, tested: Dataset | None, blind: str | None, whole: bool) -> Parts:
    """Of calibration data; `blind` is a metric that cannot be measured on it."""
    if tested is not None and blind is not None:
        return Parts(given, tested, None, True, _of_decoder(given), warnings=(_UNLABELLED.format(blind),))
    if whole:
        note = _of_decoder(given) if tested is not None else f"{_WHOLE} {_of_decoder(given)}".strip()
        return Parts(given, given if tested is None else tested, None, tested is not None, note)
    count = given.count()
    calibrate, held = given.split(max(_HELD_BACK, _ENOUGH / count) if count >= 5 * _ENOUGH else _HELD_BACK)
    if held is None:
        words = "" if tested is not None else _FEW
        return Parts(given, given, tested, False, f"{words} {_of_decoder(given)}".strip())
    return Parts(calibrate, held, tested, True, _of_decoder(given))


def _blind(given: Dataset, limits: list[Limit], original: Callable[[], Session] | None) -> str | None:
    """Name of a metric that cannot be measured without labels that the data lacks; None where there is none."""
    needy = [limit for limit in limits if limit.metric.needs_labels]
    batch = given.first() if needy else None
    if batch is None or batch.labels is not None:
        return None
    for limit in needy:
        metric = limit.metric
        if metric.of_outputs is None or METRICS.get(metric.name) is metric or original is None:
            return metric.name
        with original() as session:
            outputs = session.run(batch.feeds)
        try:
            limit.loss(value := metric.of_outputs([(batch, outputs)]), value)
        except DataError:
            return metric.name
        if not math.isfinite(value):
            return metric.name
    return None


def _of_decoder(dataset: Dataset) -> str:
    """What the user of a decoder with a cache should know: what was made up, and what is timed."""
    decoder = dataset.decoder
    if decoder is None:
        return ""
    step = dataset.typical()
    batch, new = step[decoder.ids.name].shape
    words = _STEPS.format(past=decoder.past(step), batch=batch) if new == 1 else ""
    # Caches count as one.
    names = [decoder.caches[0].name.split(".")[0] if n in decoder.cache_names else n for n in sorted(dataset.filled)]
    if names:
        words = f"{_FILLED.format(', '.join(dict.fromkeys(names)))} {words}"
    return words.strip()
