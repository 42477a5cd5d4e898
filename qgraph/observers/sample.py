"""A few of the rows or patches that a layer multiplies with its weights, the same ones in whatever order data comes.

Kept are those with the smallest hashes of their contents (bottom-k sampling: Cohen and Kaplan, "Summarizing Data using
Bottom-k Sketches", 2007), each once, so that merging is exact and commutative; and some with the largest magnitudes: a
few rows with outliers decide what a transformer says, and a fair sample would miss them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

__all__ = ["Patches", "Sample"]

_COUNT = 256
_CHUNK = 1 << 20
_SEED = 20070813

Hashes = NDArray[np.uint64]


@dataclasses.dataclass(frozen=True)
class Patches:
    """Where a convolution looks: one entry for each spatial dimension; `auto_pad` as ONNX has it."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    auto_pad: str = "NOTSET"

    def padded(self, image: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
        """(before, after) of each spatial dimension of an image of this size."""
        if self.auto_pad not in ("SAME_UPPER", "SAME_LOWER"):
            return self.pads if self.auto_pad == "NOTSET" else ((0, 0),) * len(image)
        found: list[tuple[int, int]] = []
        for size, width, step, dilation in zip(image, self.kernel, self.strides, self.dilations, strict=True):
            total = max((-(-size // step) - 1) * step + (width - 1) * dilation + 1 - size, 0)
            small, large = total // 2, total - total // 2
            found.append((small, large) if self.auto_pad == "SAME_UPPER" else (large, small))
        return tuple(found)

    def windows(self, array: NDArray[np.generic]) -> NDArray[np.generic]:
        """[samples, channels, spatial...] -> [samples, channels, positions..., kernel...], a view of a padded copy."""
        wide = np.pad(array, ((0, 0), (0, 0), *self.padded(array.shape[2:])))
        spans = tuple((k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True))
        axes = tuple(range(2, array.ndim))
        found = np.lib.stride_tricks.sliding_window_view(wide, spans, axis=axes)
        places = tuple(slice(None, None, s) for s in self.strides)
        taps = tuple(slice(None, None, d) for d in self.dilations)
        return np.asarray(found[(slice(None), slice(None), *places, *taps)])


class _Kept:
    """Distinct items with the smallest keys."""

    def __init__(self, limit: int):
        self.limit = limit
        self.keys: Hashes = np.zeros(0, np.uint64)
        self.items: NDArray[np.float32] | None = None

    def take(self, keys: Hashes, items: NDArray[np.float32]) -> None:
        """Take in items [n, ...] under keys [n]; equal keys are equal items."""
        if self.items is not None:
            keys, items = np.concatenate([self.keys, keys]), np.concatenate([self.items, items])
        chosen = _smallest(keys, self.limit)
        self.keys, self.items = keys[chosen], np.ascontiguousarray(items[chosen])


class Sample:
    """At most `count` rows [channels] (the last axis), or patches [channels, kernel...] of images.

    An eighth of them are those with the largest magnitudes, which may be among the others, too.
    """

    def __init__(self, patches: Patches | None = None, count: int = _COUNT):
        self.patches = patches
        self._fair = _Kept(count - count // 8)
        self._extreme = _Kept(count // 8)

    def update(self, array: NDArray[np.floating]) -> None:
        """Take in `array`: [..., channels] for rows, [samples, channels, spatial...] for patches.

        Rows, or patches, that are not finite in float32 are left out, whatever else is in their batch.
        """
        if array.size == 0 or array.ndim == 0:
            return
        with np.errstate(over="ignore"):
            array = np.asarray(array, np.float32)
        if self.patches is None:
            self._take_rows(array.reshape(-1, array.shape[-1]))
            return
        for image in array:
            # One image at a time: the hashes of all taps of all positions are as large as its channels' windows.
            self._take_patches(image, self.patches)

    def _take_rows(self, rows: NDArray[np.float32]) -> None:
        """Take in rows [n, channels]."""
        finite = np.isfinite(rows).all(axis=1)
        rows = rows if finite.all() else rows[finite]
        if len(rows) == 0:
            return
        hashes = _hash_rows(rows)
        for kept, keys in ((self._fair, hashes), (self._extreme, _by_size(np.abs(rows).max(axis=1), hashes))):
            chosen = _smallest(keys, kept.limit)
            kept.take(keys[chosen], rows[chosen])

    def _take_patches(self, image: NDArray[np.float32], patches: Patches) -> None:
        """Take in the patches of an image [channels, spatial...]."""
        rank = image.ndim - 1
        known = np.isfinite(image)
        places: NDArray[np.intp] | None = None
        if not known.all():
            # Padding is finite, so it is what is not that is looked for.
            spoilt = np.logical_or.reduce(~known, axis=0)
            places = np.flatnonzero(~self._taps(spoilt, rank).any(axis=-1))
            if places.size == 0:
                return
            image = np.where(known, image, np.float32(0))
        taps = self._taps(_hash_rows(np.moveaxis(image, 0, -1)), rank).astype(np.uint64)
        hashes = _mixed((taps * _multipliers(taps.shape[-1])).sum(axis=-1, dtype=np.uint64))
        sizes = self._taps(np.abs(image).max(axis=0), rank).max(axis=-1).astype(np.float32)
        windows = patches.windows(image[None])[0]
        for kept, all_keys in ((self._fair, hashes), (self._extreme, _by_size(sizes, hashes))):
            keys = all_keys.reshape(-1) if places is None else all_keys.reshape(-1)[places]
            chosen = _smallest(keys, kept.limit)
            where = np.unravel_index(chosen if places is None else places[chosen], hashes.shape)
            kept.take(keys[chosen], np.moveaxis(windows[(slice(None), *where)], 0, 1).astype(np.float32))

    def _taps(self, plane: NDArray[Any], rank: int) -> NDArray[Any]:
        """[spatial...] -> [positions..., taps]."""
        assert self.patches is not None
        windows = self.patches.windows(plane[None, None])[0, 0]
        return np.asarray(windows.reshape(*windows.shape[:rank], -1))

    def merge(self, other: Self) -> None:
        """Take in all that `other` has seen."""
        for mine, theirs in ((self._fair, other._fair), (self._extreme, other._extreme)):
            if theirs.items is not None:
                mine.take(theirs.keys, theirs.items)

    @property
    def fair(self) -> NDArray[np.float32] | None:
        """Those that were taken whatever their size, in no order that means anything; None when nothing was seen."""
        return self._fair.items

    @property
    def items(self) -> NDArray[np.float32] | None:
        """[at most count, channels (, kernel...)], extreme ones spread among the others; None when nothing was seen.

        A first part of them is as good a sample as the whole, only smaller.
        """
        if self._fair.items is None or self._extreme.items is None:
            return None
        fair, extreme = self._fair.items, self._extreme.items
        order = np.concatenate([np.arange(len(fair)) * len(extreme), np.arange(len(extreme)) * len(fair)])
        return np.concatenate([fair, extreme])[np.argsort(order, kind="stable")]


def _by_size(sizes: NDArray[np.float32], hashes: Hashes) -> Hashes:
    """Keys of which the smallest belong to the largest sizes (non-negative); hashes settle ties."""
    # Patterns of non-negative floats are in the order of the floats.
    patterns = np.ascontiguousarray(sizes, np.float32).view(np.uint32).astype(np.uint64)
    return ((np.uint64(0xFFFFFFFF) - patterns) << np.uint64(32)) | (hashes >> np.uint64(32))


def _multipliers(count: int) -> Hashes:
    return np.random.default_rng(_SEED).integers(1, 1 << 63, count, dtype=np.uint64) * np.uint64(2) + np.uint64(1)


def _hash_rows(rows: NDArray[np.float32]) -> Hashes:
    """A hash of each vector along the last axis, [...]."""
    width = rows.shape[-1]
    flat = np.ascontiguousarray(rows).reshape(-1, width).view(np.uint32)
    factors = _multipliers(width)
    step = max(1, _CHUNK // max(1, width))
    parts = [(flat[i : i + step].astype(np.uint64) * factors).sum(axis=1) for i in range(0, len(flat), step)]
    return _mixed(np.concatenate(parts)).reshape(rows.shape[:-1])


def _mixed(hashes: Hashes) -> Hashes:
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014): every bit of the sum decides every bit of the hash."""
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(hashes ^ (hashes >> np.uint64(31)))


def _smallest(hashes: Hashes, count: int) -> NDArray[np.intp]:
    """Indices of the `count` smallest distinct hashes, ascending; equal hashes are equal contents."""
    if hashes.size > 8 * count:
        # Repeated rows (padding) may crowd the smallest: then the slow way finds enough distinct ones.
        near = np.argpartition(hashes, 4 * count)[: 4 * count]
        found, first = np.unique(hashes[near], return_index=True)
        if found.size >= count:
            return np.asarray(near[first[:count]])
    _, first = np.unique(hashes, return_index=True)
    return np.asarray(first[:count])
