"""Caches of keys and values in integers, as GroupQueryAttention keeps them: codes, scales, and a session in between.

A cache in 8 bits is int8 of the float one's shape [batch, heads, length, size]; in 4 bits two codes share a byte of
uint8 [batch, heads, length, size / 2], the even one low, each plus 8. Zero is code 0; scales are [1, heads, 1, size].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qgraph import graph
from qgraph.session import Feeds, Session

__all__ = [
    "FORMATS",
    "NOTES",
    "Cache",
    "Seen",
    "Translated",
    "cast_from_input",
    "cast_to_output",
    "decode",
    "encode",
    "found",
    "given",
    "step",
    "translated",
]

FORMATS = {"int8": 8, "int4": 4}
"""What a cache can be kept in -> bits."""
_NOTE = (
    "Caches of keys and values are {} now, at both ends: start from empty ones of that type, {}, and pass on what "
    "comes out. Losses were measured with the original's caches brought to codes, and codes brought back."
)
NOTES = {
    "int8": _NOTE.format("int8", "[batch, heads, 0, size]"),
    "int4": _NOTE.format("uint8 with two codes a byte", "[batch, heads, 0, size / 2]"),
}
"""What a cache can be kept in -> what its caller has to know."""
_ATTENTION = ("com.microsoft", "GroupQueryAttention")
_PARTS = ((3, 1, 12), (4, 2, 13))
"""(past, present, scale) of keys and of values: positions of inputs, outputs, inputs."""
_TOKENS = 2048
_EACH = 64
_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5)


@dataclasses.dataclass(frozen=True)
class Cache:
    """One cache in integers.

    Attributes:
        past: name of the input.
        present: name of the output.
        bits: 8 or 4.
        scale: float32, broadcasts to the cache.
    """

    past: str
    present: str
    bits: int
    scale: NDArray[np.float32]


class Seen:
    """The largest magnitude of each channel, and some tokens.

    Attributes:
        largest: float32 [heads, size]; None before the first array.
        tokens: arrays [heads, some tokens, size].
    """

    def __init__(self) -> None:
        self.largest: NDArray[np.float32] | None = None
        self.tokens: list[NDArray[np.float32]] = []
        self._count = 0

    def update(self, array: NDArray[Any]) -> None:
        """Take in [batch, heads, length, size]."""
        found = np.abs(array).max(axis=(0, 2), initial=0.0).astype(np.float32)
        self.largest = found if self.largest is None else np.maximum(self.largest, found)
        if self._count < _TOKENS and array.shape[2]:
            step = -(-array.shape[2] // _EACH)
            self.tokens.append(np.array(array[0, :, ::step], np.float32))
            self._count += self.tokens[-1].shape[1]


def found(model: ir.Model) -> list[Cache]:
    """The caches in integers that go in and out of `model`."""
    caches: list[Cache] = []
    for node in model.graph:
        bits = node.attributes.get_int("kv_cache_bit_width", 0) if (node.domain, node.op_type) == _ATTENTION else 0
        for past, present, scale in _PARTS if bits else ():
            source, numbers = node.inputs[past], node.inputs[scale] if len(node.inputs) > scale else None
            if source is not None and numbers is not None and numbers.const_value is not None:
                array = np.array(numbers.const_value.numpy(), np.float32)
                caches.append(Cache(str(source.name), str(node.outputs[present].name), bits, array))
    return caches


def cast_from_input(value: ir.Value | None) -> ir.Node | None:
    """The Cast of an input of the model that alone makes `value`, for one reader; None where there is none such."""
    maker = graph.producer(value, "Cast")
    source = maker.inputs[0] if maker is not None else None
    alone = value is not None and source is not None and len(value.uses()) == len(source.uses()) == 1
    return maker if alone and source is not None and source.is_graph_input() else None


def cast_to_output(value: ir.Value) -> ir.Node | None:
    """The Cast that alone reads `value`, and makes an output of the model of it; None where there is none such."""
    readers = value.consumers()
    alone = len(readers) == 1 and graph.is_standard(readers[0], "Cast") and not value.is_graph_output()
    result = readers[0].outputs[0] if alone else None
    return readers[0] if result is not None and result.is_graph_output() and not result.uses() else None


def step(sample: NDArray[np.float32], largest: NDArray[np.float32], bits: int) -> NDArray[np.float32]:
    """Scales [1, heads, 1, size] of the least squared error on a sample.

    Args:
        sample: [heads, tokens, size].
        largest: magnitudes [heads, size] over all tokens.
        bits: 8 or 4.
    """
    top = 2 ** (bits - 1) - 1
    whole = np.maximum(largest, np.finfo(np.float32).tiny * top) / top
    best, least = whole, np.full(whole.shape, np.inf)
    for share in _SHARES:
        tried = (whole * np.float32(share)).astype(np.float32)
        codes = np.clip(np.rint(sample / tried[:, None]), -top - 1, top)
        error = np.square(codes * tried[:, None] - sample).sum(axis=1)
        best, least = np.where(error < least, tried, best), np.minimum(error, least)
    return np.ascontiguousarray(best[None, :, None], np.float32)


def encode(cache: NDArray[Any], scale: NDArray[np.float32], bits: int) -> NDArray[Any]:
    """Codes of a float cache [batch, heads, length, size]."""
    top = 2 ** (bits - 1)
    codes = np.clip(np.rint(cache / scale), -top, top - 1).astype(np.int8)
    if bits == 8:
        return codes
    shifted = (codes + 8).astype(np.uint8)
    return np.asarray(shifted[..., 0::2] | (shifted[..., 1::2] << 4))


def decode(codes: NDArray[Any], scale: NDArray[np.float32], bits: int) -> NDArray[np.float32]:
    """The float cache that `codes` stand for."""
    if bits == 4:
        pair = np.stack([codes & 15, codes >> 4], axis=-1).astype(np.float32) - 8
        return np.asarray(pair.reshape(*codes.shape[:-1], 2 * codes.shape[-1]) * scale, np.float32)
    return np.asarray(codes.astype(np.float32) * scale, np.float32)


def given(path: Path, feeds: Feeds) -> Feeds:
    """`feeds` as the model at `path` takes them: float caches as codes, if it wants codes."""
    known = {cache.past: cache for cache in found(ir.load(path))}
    return _encoded(feeds, known)


def _encoded(feeds: Feeds, known: Mapping[str, Cache]) -> dict[str, NDArray[Any]]:
    return {
        k: encode(v, known[k].scale, known[k].bits) if k in known and v.dtype.kind == "f" else v
        for k, v in feeds.items()
    }


class Translated(Session):
    """A session whose caches in integers are given and returned as floats, as those of the original are.

    Args:
        inner: the session.
        caches: see `found`.
    """

    def __init__(self, inner: Session, caches: list[Cache]):
        self.__dict__.update(inner.__dict__)
        self._pasts = {cache.past: cache for cache in caches}
        self._presents = {cache.present: cache for cache in caches}
        self._last: tuple[Feeds, dict[str, NDArray[Any]]] | None = None

    def run(self, feeds: Feeds, outputs: Sequence[str] | None = None) -> dict[str, NDArray[Any]]:
        """As `Session.run`, with float caches."""
        results = super().run(_encoded(feeds, self._pasts), outputs)
        known = self._presents
        return {k: decode(v, known[k].scale, known[k].bits) if k in known else v for k, v in results.items()}

    def call(self, feeds: Feeds) -> None:
        """As `Session.call`; feeds are translated when they come for the first time."""
        if self._last is None or self._last[0] is not feeds:
            self._last = feeds, _encoded(feeds, self._pasts)
        super().call(self._last[1])


def translated(session: Session, model: Path | ir.Model) -> Session:
    """`session` of `model` with float caches; itself where it has no others."""
    if not any(kind in ("tensor(int8)", "tensor(uint8)") for kind in session.inputs.values()):
        return session
    caches = found(model if isinstance(model, ir.Model) else ir.load(model))
    return Translated(session, caches) if caches else session
