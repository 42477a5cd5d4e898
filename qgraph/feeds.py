"""One run's inputs: what a model takes, what a batch gives, and whether the two fit."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qgraph import errors
from qgraph.errors import DataError

__all__ = ["IDS", "LABELS", "Batch", "InputSpec", "check_names", "checked", "ids_name", "inputs_of"]


LABELS = "labels"
"""Name under which data may bring the right answers, for metrics; models never see them."""
IDS = "input_ids"
"""What token ids are called everywhere."""


def ids_name(inputs: Mapping[str, tuple[np.dtype[Any], tuple[int | None, ...] | None]]) -> str | None:
    """Which of the inputs, name -> (type, shape), are token ids [batch, positions]; None for none."""
    whole = [name for name, (kind, shape) in inputs.items() if kind.kind in "iu" and len(shape or ()) == 2]
    others = ("mask", "position", "type", "segment", "length")
    found = [name for name in whole if not any(word in name.lower() for word in others)]
    return IDS if IDS in found else next((n for n in found if "id" in n.lower() or "token" in n.lower()), None)


@dataclasses.dataclass(frozen=True)
class InputSpec:
    """What one input of the model takes: name, numpy type, shape with None for free dimensions (None: any rank)."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | None, ...] | None

    @property
    def batch(self) -> int | None:
        """Fixed size of the first dimension, None when it is free or there is none."""
        return self.shape[0] if self.shape else None


@dataclasses.dataclass(frozen=True)
class Batch:
    """One run's feeds, where they came from, and the labels if there are any."""

    name: str
    feeds: dict[str, NDArray[Any]]
    labels: NDArray[Any] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self.feeds.values())

    @property
    def visible(self) -> NDArray[np.bool_] | None:
        """Which positions [samples, length] an attention mask leaves in sight; None when there is none that hides any.

        What a model says at hidden positions (padding) means nothing, so neither ranges nor errors are taken there.
        """
        ids = self.ids
        for name, array in self.feeds.items():
            if "mask" in name.lower() and array.ndim == 2 and array.dtype.kind in "iufb":
                seen = array != 0
                if np.isin(array, (0, 1)).all() and seen.any(axis=1).all() and not seen.all():
                    # A mask over a cache is longer than the new tokens, which are its end.
                    new = ids.shape[1] if ids is not None and len(ids) == len(array) else array.shape[1]
                    return None if seen[:, -new:].all() else np.asarray(seen[:, -new:])
        return None

    @property
    def ids(self) -> NDArray[Any] | None:
        """Token ids [samples, length]; None when there are none."""
        name = ids_name({name: (array.dtype, array.shape) for name, array in self.feeds.items()})
        return None if name is None else self.feeds[name]

    @property
    def digest(self) -> bytes:
        """Hash of the contents: an identity that no order of the data changes."""
        found = hashlib.sha256()
        for key in sorted(self.feeds):
            found.update(key.encode())
            found.update(repr(self.feeds[key].shape).encode())
            found.update(np.ascontiguousarray(self.feeds[key]).tobytes())
        return found.digest()


def inputs_of(model: ir.Model) -> list[InputSpec]:
    """The inputs a caller must give (those without a default)."""
    specs: list[InputSpec] = []
    for value in model.graph.inputs:
        if value.name is None or value.name in model.graph.initializers:
            continue
        if value.dtype is None or isinstance(_plain(value.type), ir.SequenceType):
            raise DataError(f"Input {value.name!r} is not a tensor with a known type; such models cannot be run here.")
        shape = None if value.shape is None else tuple(d if isinstance(d, int) else None for d in value.shape)
        # Sessions take float32 for bfloat16, which numpy has not.
        kind = ir.DataType.FLOAT if value.dtype == ir.DataType.BFLOAT16 else value.dtype
        specs.append(InputSpec(value.name, np.dtype(kind.numpy()), shape))
    return specs


def _plain(kind: ir.TypeProtocol | None) -> ir.TypeProtocol | None:
    """What an optional input takes where it is given."""
    return kind.elem_type if isinstance(kind, ir.OptionalType) else kind


def check_names(label: str, arrays: Mapping[str, object], inputs: list[InputSpec]) -> None:
    """Refuse arrays that the model does not take (but for labels), and inputs that have no array."""
    wanted = [spec.name for spec in inputs]
    for name in arrays:
        if name not in wanted and name != LABELS:
            near = errors.nearest(name, wanted)
            takes = f"It takes: {', '.join(wanted)}." if wanted else "It takes no inputs: leave the data out."
            hint = f" Did you mean {near!r}?" if near else f" {takes}"
            raise DataError(f"{label!r} holds {name!r}, which the model does not take.{hint}")
    for name in wanted:
        if name not in arrays:
            raise DataError(f"{label!r} lacks the input {name!r}.")


def checked(batch: Batch, inputs: list[InputSpec]) -> Batch:
    """The batch with its arrays in the model's types, or a DataError that names the batch and the input."""
    check_names(batch.name, batch.feeds, inputs)
    feeds: dict[str, NDArray[Any]] = {}
    for spec in inputs:
        array = batch.feeds[spec.name]
        where = f"Input {spec.name!r} of {batch.name!r}"
        if spec.dtype.kind == "O" and array.dtype.kind in "US":
            array = array.astype(object)
        if array.dtype != spec.dtype:
            kinds = {np.dtype(spec.dtype).kind, array.dtype.kind}
            if kinds not in ({"f"}, {"i"}, {"u"}, {"i", "u"}) or not _fits(array, spec.dtype):
                wants = "text" if spec.dtype.kind == "O" else spec.dtype
                raise DataError(f"{where} is {array.dtype}, but the model takes {wants}.")
            with np.errstate(over="ignore"):
                array = array.astype(spec.dtype)
        if spec.shape is not None:
            fits = array.ndim == len(spec.shape) and all(
                want is None or want == got for want, got in zip(spec.shape, array.shape, strict=True)
            )
            if not fits:
                wanted = "x".join("?" if d is None else str(d) for d in spec.shape) or "a scalar"
                got = "x".join(map(str, array.shape)) or "a scalar"
                hint = " Files hold samples along axis 0." if len(array.shape) == len(spec.shape) - 1 else ""
                raise DataError(f"{where} has shape {got}, but the model takes {wanted}.{hint}")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            bad = "NaN" if np.isnan(array).any() else "infinite"
            raise DataError(f"{where} holds {bad} values: ranges would be meaningless. Clean the data.")
        feeds[spec.name] = array
    labels = batch.labels if batch.labels is not None else batch.feeds.get(LABELS)
    return Batch(batch.name, feeds, None if LABELS in feeds else labels)


def _fits(array: NDArray[Any], dtype: np.dtype[Any]) -> bool:
    """Whether the values survive the conversion."""
    if array.size == 0 or np.dtype(dtype).kind == "f":
        return True
    info = np.iinfo(dtype)
    return bool(array.min() >= info.min and array.max() <= info.max)
