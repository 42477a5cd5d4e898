"""What a model's outputs are worth on its task: pure functions on arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["bits_per_byte", "neighbours", "sentence_embeddings", "top1"]

Floats = NDArray[np.floating[Any]]


def top1(logits: Floats, labels: NDArray[np.int64]) -> float:
    """Share of samples [N, classes] whose largest output is the label [N]; labels below zero are left out."""
    known = labels >= 0
    return float((logits.argmax(axis=1)[known] == labels[known]).mean())


def bits_per_byte(logits: Floats, tokens: NDArray[np.int64]) -> float:
    """Mean bits that a byte-level language model needs for each next byte.

    Args:
        logits: [sequences, length, 256]; those at position i are for byte i + 1.
        tokens: the bytes, int64 [sequences, length].
    """
    total = 0.0
    for row, ids in zip(logits, tokens, strict=True):
        x = row[:-1].astype(np.float64)
        x -= x.max(axis=1, keepdims=True)
        total += float((np.log(np.exp(x).sum(axis=1)) - np.take_along_axis(x, ids[1:, None], 1)[:, 0]).sum())
    return total / (tokens[:, 1:].size * float(np.log(2)))


def sentence_embeddings(states: Floats, mask: NDArray[np.int64]) -> Floats:
    """Hidden states [sentences, length, width], averaged over the tokens of `mask` [sentences, length], of norm 1."""
    weights = mask.astype(np.float64)[:, :, None]
    mean = (states * weights).sum(axis=1) / weights.sum(axis=1)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


def neighbours(expected: Floats, found: Floats) -> tuple[float, float]:
    """How well embeddings [sentences, width] of norm 1 stand for others of the same sentences.

    Returns:
        Mean cosine, and the share of sentences whose nearest other sentence is the same.
    """

    def nearest(embeddings: Floats) -> NDArray[np.intp]:
        similarity = embeddings @ embeddings.T
        np.fill_diagonal(similarity, -np.inf)
        nearest_one: NDArray[np.intp] = similarity.argmax(axis=1)
        return nearest_one

    return float((expected * found).sum(axis=1).mean()), float((nearest(expected) == nearest(found)).mean())
