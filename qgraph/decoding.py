"""What a decoder with a key-value cache takes, by the names and shapes of its inputs, and how to make that up.

New tokens come as ids [batch, new], what was computed for earlier ones as a cache [batch, heads, past, size] for each
layer's keys and values. An attention mask covers [batch, past + new], positions are those of the new tokens. So ids
alone are a prompt: nothing is past, everything is visible.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qgraph.feeds import InputSpec, ids_name

__all__ = ["LEAST_PAST", "Decoder"]

LEAST_PAST = 128
"""Tokens that a step of generation has behind it, where the data has fewer."""


@dataclasses.dataclass(frozen=True)
class Decoder:
    """The inputs of a decoder by their use.

    Attributes:
        ids: token ids [batch, new].
        caches: keys and values of earlier tokens, the free axis before the last their number.
        mask: [batch, past + new], 1 where a token counts; None where the model takes none.
        positions: [batch, new]; None where the model takes none.
    """

    ids: InputSpec
    caches: tuple[InputSpec, ...]
    mask: InputSpec | None = None
    positions: InputSpec | None = None

    @staticmethod
    def of(inputs: Sequence[InputSpec]) -> Decoder | None:
        """The decoder that takes these inputs; None where they are of something else.

        Something else are encoder-decoders, caches of a fixed length, and whatever takes further inputs.
        """
        name = ids_name({spec.name: (spec.dtype, spec.shape) for spec in inputs})
        ids = next((spec for spec in inputs if spec.name == name), None)
        caches = tuple(spec for spec in inputs if _is_cache(spec))
        mask = next((spec for spec in inputs if _is_whole(spec) and "mask" in spec.name.lower()), None)
        positions = next((spec for spec in inputs if _is_whole(spec) and "position" in spec.name.lower()), None)
        known = [ids, mask, positions, *caches]
        if ids is None or not caches or any(all(spec is not one for one in known) for spec in inputs):
            return None
        if any("encoder" in spec.name.lower().split(".") for spec in caches):
            return None
        return Decoder(ids, caches, mask, positions)

    @property
    def cache_names(self) -> set[str]:
        """Names of the caches."""
        return {spec.name for spec in self.caches}

    @property
    def optional(self) -> set[str]:
        """Inputs that `complete` can make up."""
        return self.cache_names | {spec.name for spec in (self.mask, self.positions) if spec is not None}

    def past(self, feeds: Mapping[str, NDArray[Any]]) -> int:
        """Tokens that are past in `feeds`; 0 where they have no cache."""
        lengths = (_length(feeds[spec.name], spec) for spec in self.caches if spec.name in feeds)
        return next(lengths, 0)

    def is_step(self, feeds: Mapping[str, NDArray[Any]]) -> bool:
        """Whether `feeds` are one new token of one sequence."""
        return feeds[self.ids.name].size == 1

    def complete(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """`feeds` with what they lack: empty caches, nothing masked, positions counted along the mask.

        A cache is only made up where none is given; one that is given says how many tokens are past.
        """
        found = dict(feeds)
        ids = found.get(self.ids.name)
        if ids is None or ids.ndim != 2:
            return found
        batch, new = ids.shape
        if not any(spec.name in found for spec in self.caches):
            found.update({spec.name: _empty(spec, batch, 0) for spec in self.caches})
        past = self.past(found)
        if self.mask is not None and self.mask.name not in found:
            found[self.mask.name] = np.ones((batch, past + new), self.mask.dtype)
        if self.positions is not None and self.positions.name not in found:
            mask = found[self.mask.name] if self.mask is not None else np.ones((batch, past + new), np.int64)
            places = np.maximum(np.cumsum(np.asarray(mask, np.int64), axis=1) - 1, 0)[:, -new:]
            found[self.positions.name] = places.astype(self.positions.dtype)
        return found

    def step(self, feeds: Mapping[str, NDArray[Any]], least: int = LEAST_PAST) -> dict[str, NDArray[Any]]:
        """One step of generation, batch 1, of the same kind: the last token after all others, their cache made up.

        Args:
            feeds: complete feeds; a fixed number of new tokens or a fixed batch stays.
            least: tokens that are past at the least.

        Returns:
            The feeds for a clock: caches hold seeded normal numbers (zeros in integers), nothing is masked.
        """
        ids = feeds[self.ids.name]
        rows, new = (fixed or 1 for fixed in (self.ids.shape or (1, 1)))
        past = max(least, ids.shape[1] + self.past(feeds) - new)
        if ids.size == 0:
            ids = np.zeros((rows, new), ids.dtype)
        return self.complete(
            {self.ids.name: np.resize(ids[:, -new:], (rows, new)), **self.drawn(rows, past, np.random.default_rng(0))}
        )

    def drawn(self, batch: int, past: int, rng: np.random.Generator) -> dict[str, NDArray[Any]]:
        """Caches of `past` tokens: standard normal, or zero where they are codes."""
        found = {spec.name: _empty(spec, batch, past) for spec in self.caches}
        for name, array in found.items():
            if array.dtype.kind == "f":
                found[name] = rng.standard_normal(array.shape, np.float32).astype(array.dtype)
        return found


def _is_cache(spec: InputSpec) -> bool:
    shape, words = spec.shape, spec.name.lower()
    if shape is None or not any(word in words for word in ("past", "cache")) or len(shape) not in (4, 5):
        return False
    # Everything but the batch and the length must be known, to make one up.
    return shape[-2] is None and all(isinstance(dim, int) for dim in (*shape[:-4], shape[-3], shape[-1]))


def _is_whole(spec: InputSpec) -> bool:
    return spec.dtype.kind in "iu" and len(spec.shape or ()) == 2


def _length(array: NDArray[Any], spec: InputSpec) -> int:
    return int(array.shape[-2]) if array.ndim == len(spec.shape or ()) else 0


def _empty(spec: InputSpec, batch: int, past: int) -> NDArray[Any]:
    shape = list(spec.shape or ())
    shape[-4], shape[-2] = shape[-4] if shape[-4] is not None else batch, past
    return np.zeros([int(dim or 0) for dim in shape], spec.dtype)
