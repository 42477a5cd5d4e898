"""What a language model's predictions are worth: KL divergence, bits per token, perplexity.

The logits [batch, positions, vocabulary] at a position are the model's prediction of the next token. Positions that an
attention mask hides do not count, nor does a prediction of a hidden token. Numbers are in bits (base 2) per token; for
a model of bytes these are bits per byte.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qgraph.errors import DataError
from qgraph.feeds import IDS, Batch
from qgraph.synthetic import table_rows

__all__ = ["bits", "cross_entropy", "is_language_model", "perplexity"]

Arrays: TypeAlias = Mapping[str, NDArray[Any]]
_CHUNK = 1 << 20
"""Elements that are in double precision at a time."""
_NEAR = 0.1
"""Padding that a head's columns may have beyond the rows of the table."""


def is_language_model(model: ir.Model) -> bool:
    """Whether token ids go in, and logits over their vocabulary come out for each position."""
    rows = next((rows for v in model.graph.inputs if (rows := table_rows(v)) is not None), None)
    for value in model.graph.outputs:
        last = value.shape[-1] if value.shape is not None and len(value.shape) == 3 else None
        if rows is not None and isinstance(last, int) and abs(last - rows) <= _NEAR * rows:
            return True
    # Tables of other operators than Gather are not looked into: there names tell.
    return any(v.name == IDS for v in model.graph.inputs) and any(
        v.name == "logits" and (v.shape is None or len(v.shape) == 3) for v in model.graph.outputs
    )


def cross_entropy(pairs: Iterable[tuple[Batch, Arrays, Arrays]]) -> float:
    """Bits per token that a model needs for text drawn from the original's own predictions.

    That is H(P) + KL(P || Q), the mean over positions of -sum_i p_i log2 q_i, with P the original's next-token
    distribution and Q the model's. Of the original itself it is the entropy H(P), so what a model loses is its mean KL
    divergence in bits per token (Kullback and Leibler 1951, "On Information and Sufficiency", section 2), and a loss in
    percent is a share of the original's bits. No labels are needed.

    Args:
        pairs: every batch with the original's outputs and the model's.

    Raises:
        DataError: no output looks like logits, or nothing is visible.
    """
    total, count = 0.0, 0
    for batch, expected, found in pairs:
        name, ids = _logits(batch, expected)
        seen = _seen(batch, ids)
        p, q = expected[name], found[name]
        if p.shape != q.shape:
            raise DataError(f"Logits have shape {list(q.shape)} instead of {list(p.shape)} on {batch.name!r}.")
        for true, other in zip(_chunks(p[seen]), _chunks(q[seen]), strict=True):
            total -= float((np.exp2(_log(true)) * _log(other)).sum())
        count += int(seen.sum())
    return _mean(total, count)


def bits(outputs: Iterable[tuple[Batch, Arrays]]) -> float:
    """Bits per token of the data's own tokens: the mean of -log2 q(next token).

    Args:
        outputs: every batch with the model's outputs; the tokens are the batch's ids, of which all but the first are
            predicted.

    Raises:
        DataError: no output looks like logits, or no token is followed by another.
    """
    total, count = 0.0, 0
    for batch, found in outputs:
        name, ids = _logits(batch, found)
        seen = _seen(batch, ids)
        here = seen[:, :-1] & seen[:, 1:]
        logits, labels = found[name][:, :-1][here], ids[:, 1:][here]
        at = 0
        for rows in _chunks(logits):
            part = labels[at : at + len(rows)]
            total -= float(_log(rows)[np.arange(len(rows)), part].sum())
            at += len(rows)
        count += len(labels)
    return _mean(total, count)


def perplexity(outputs: Iterable[tuple[Batch, Arrays]]) -> float:
    """Two to the power of `bits`."""
    return float(2.0 ** bits(outputs))


def _logits(batch: Batch, outputs: Arrays) -> tuple[str, NDArray[Any]]:
    """(the output that holds logits [batch, positions, vocabulary], the ids that they follow [batch, positions])."""
    ids = batch.ids
    for name, array in sorted(outputs.items(), key=lambda pair: pair[0] != "logits"):
        if ids is None:
            break
        fits = array.dtype.kind == "f" and array.ndim == 3 and array.shape[:2] == ids.shape
        if fits and array.shape[2] > max(1, int(ids.max(initial=0))):
            return name, ids
    raise DataError(
        "This metric is one of language models: token ids [batch, positions] in, and logits for each of them "
        f"[batch, positions, vocabulary] out, which {batch.name!r} does not show."
    )


def _seen(batch: Batch, ids: NDArray[Any]) -> NDArray[np.bool_]:
    visible = batch.visible
    return np.ones(ids.shape, bool) if visible is None or visible.shape != ids.shape else visible


def _chunks(rows: NDArray[Any]) -> Iterator[NDArray[Any]]:
    step = max(1, _CHUNK // max(1, rows.shape[-1]))
    for start in range(0, len(rows), step):
        yield rows[start : start + step]


def _log(rows: NDArray[Any]) -> NDArray[np.float64]:
    """Base-2 logarithm of softmax along the last axis."""
    x = rows.astype(np.float64) * np.log2(np.e)
    x -= x.max(axis=-1, keepdims=True)
    x -= np.log2(np.exp2(x).sum(axis=-1, keepdims=True))
    # Zero probability of an impossible token: nothing times minus infinity is nothing.
    return np.asarray(np.maximum(x, -1e6))


def _mean(total: float, count: int) -> float:
    if not count:
        raise DataError("There is no token to predict: sequences of at least two visible tokens are needed.")
    return total / count
