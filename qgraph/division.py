"""Which data does what: some to calibrate on, some to search on, some to judge the result on."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from qgraph import data
from qgraph.data import Dataset, DataSource
from qgraph.metrics import Limit
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
    """

    calibrate: Dataset | None
    search: Dataset
    final: Dataset | None
    apart: bool
    note: str = ""


def divide(
    model: ir.Model,
    source: DataSource | None,
    evaluation: DataSource | None,
    limits: list[Limit],
    whole: bool = False,
) -> Parts:
    """Divide what the user gave.

    Part of the calibration data, chosen by its contents, is held back for the search, so that the evaluation data only
    has to say yes or no to the result. Where a metric needs labels that only the evaluation data has, it does both.

    Args:
        model: its inputs say what a feed is.
        source: calibration data, or None.
        evaluation: data to judge the result on, or None.
        limits: the budget.
        whole: whether nothing may be held back from calibration.

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
    needs_labels = any(limit.metric.needs_labels for limit in limits)
    if tested is not None and needs_labels and given.first().labels is None:
        return Parts(given, tested, None, True, _of_decoder(given))
    if whole:
        note = _of_decoder(given) if tested is not None else f"{_WHOLE} {_of_decoder(given)}".strip()
        return Parts(given, given if tested is None else tested, None, tested is not None, note)
    count = given.count()
    calibrate, held = given.split(max(_HELD_BACK, _ENOUGH / count) if count >= 5 * _ENOUGH else _HELD_BACK)
    if held is None:
        words = "" if tested is not None else _FEW
        return Parts(given, given, tested, False, f"{words} {_of_decoder(given)}".strip())
    return Parts(calibrate, held, tested, True, _of_decoder(given))


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
