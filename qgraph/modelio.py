"""Models in and out: any size, weights memory-mapped, files written beside and moved into place."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from qgraph import shards, widened
from qgraph.errors import ExternalDataError, ModelError, OptionError, QGraphError, first_line
from qgraph.external import data_files
from qgraph.quiet import quiet
from qgraph.session import max_ir_version
from qgraph.staged import Staged
from qgraph.widened import Widened

__all__ = [
    "Staged",
    "Workspace",
    "copied",
    "external_files",
    "has_external",
    "read",
    "size_on_disk",
    "stage",
    "weight_bytes",
]

OLDEST_OPSET = 7
_SPILL_BYTES = 64 << 20
_INLINE_BYTES = 1 << 30
_EXTERNAL_THRESHOLD = 1024


def read(path: str | Path) -> ir.Model:
    """Load a model; external tensors stay on disk and are mapped when read.

    Raises:
        ModelError: no such file, not an ONNX model, no default-domain opset, or an opset older than 7.
        ExternalDataError: external data is missing, too short, or outside the model's folder.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"There is no model file {str(path)!r}.")
    try:
        model = ir.load(path)
    except Exception as error:
        raise ModelError(f"{str(path)!r} is not a readable ONNX model: {first_line(error)}") from error
    if len(model.graph) == 0 and not model.graph.outputs:
        raise ModelError(f"{str(path)!r} is not an ONNX model: it has no graph.")
    if not model.graph.outputs:
        raise ModelError(f"{str(path)!r} has no outputs, so that nothing in it is computed. Export it anew.")
    imports = model.graph.opset_imports
    if "ai.onnx" in imports:  # the long name of the default domain
        imports.setdefault("", imports.pop("ai.onnx"))
    opset = imports.get("")
    if opset is None and any(node.domain in ("", "ai.onnx") for node in model.graph.all_nodes()):
        raise ModelError(f"{str(path)!r} does not say which opset its operators are of. Export it anew.")
    if opset is not None and opset < OLDEST_OPSET:
        raise ModelError(
            f"{str(path)!r} has opset {opset}; {OLDEST_OPSET} is the oldest that can be converted. Export it anew."
        )
    _check_external(model, path.parent)
    _take_in(model, _EXTERNAL_THRESHOLD)
    try:
        # Some writers leave the nodes unsorted; the runtime forgives it, most tools do not.
        model.graph.sort()
    except ValueError as error:
        raise ModelError(f"{str(path)!r} is not a valid ONNX model: its graph has a cycle.") from error
    return model


def _tensors(model: ir.Model) -> Iterator[tuple[str, ir.TensorProtocol]]:
    for graph in (model.graph, *model.graph.subgraphs()):
        for name, value in graph.initializers.items():
            if value.const_value is not None:
                yield name, widened.source(value.const_value)


def _all_tensors(model: ir.Model) -> Iterator[tuple[str, ir.TensorProtocol]]:
    """Initializers, and tensors in the attributes of nodes."""
    yield from _tensors(model)
    for node in model.graph.all_nodes():
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref():
                yield f"{node.name or node.op_type}.{attribute.name}", attribute.as_tensor()


def external_files(model: ir.Model) -> set[Path]:
    """The resolved paths of all files of external data that the model names."""
    return {Path(t.path).resolve() for _, t in _all_tensors(model) if isinstance(t, ir.ExternalTensor)}


def _check_external(model: ir.Model, folder: Path) -> None:
    root = folder.resolve()
    for name, tensor in _all_tensors(model):
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        where = Path(tensor.path)
        if Path(tensor.location).is_absolute() or not where.resolve().is_relative_to(root):
            raise ExternalDataError(
                f"Weight {name!r} points to {str(tensor.location)!r}, outside the model's folder. "
                "Move the data beside the model and save the model again."
            )
        if not where.is_file():
            raise ExternalDataError(f"Weight {name!r} is in {where.name!r}, which is not beside the model.")
        size, need = where.stat().st_size, (tensor.offset or 0) + (tensor.length or tensor.nbytes)
        if size < need:
            raise ExternalDataError(
                f"Weight {name!r} needs {need} bytes of {where.name!r}, which has only {size}: the file is truncated."
            )


def size_on_disk(path: Path) -> int:
    """Bytes of the model file and of all files of external data that it names."""
    return path.stat().st_size + sum(file.stat().st_size for file in data_files(path))


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all its weights, shared ones once."""
    return sum(tensor.nbytes for _, tensor in _tensors(model))


def copied(model: Any) -> ir.Model:
    """A copy of a caller's model.

    Raises:
        OptionError: not an IR.
        ModelError: it cannot be copied.
    """
    if not isinstance(model, ir.Model):
        raise OptionError(
            f"The model is a {type(model).__name__}; give a path or an onnx_ir.Model (onnx_ir.from_proto makes one)."
        )
    try:
        copy: ir.Model = model.clone()
    except Exception as error:
        raise ModelError(
            "The model cannot be copied. Its nodes may be out of order: run onnx_ir's TopologicalSortPass first."
        ) from error
    _take_in(copy, _EXTERNAL_THRESHOLD)
    return copy


def has_external(model: ir.Model) -> bool:
    """Whether any weight lies outside the model's own file."""
    return any(isinstance(tensor, ir.ExternalTensor) for _, tensor in _tensors(model))


class Workspace:
    """A temporary folder in which a model's weights lie as one memory-mapped file.

    With its weights on disk a model can be serialized in kilobytes as often as needed: calibration graphs share them.
    """

    def __init__(self, near: Path | None = None, shard: int | None = None):
        """Make the folder beside `near` (so that files can be moved into place), or among the system's.

        Args:
            near: where the result will stand.
            shard: most bytes of one of its files of weights; None for all in one.
        """
        self.shard = shard
        # A link is replaced, not followed, so its own folder counts.
        folder = near.parent.resolve() if near is not None else None
        if folder is not None and not folder.is_dir():
            raise ModelError(f"The folder {str(folder)!r} does not exist.")
        if near is not None and near.is_dir():
            raise ModelError(f"{str(near)!r} is a folder; name a file for the result.")
        try:
            self.folder = Path(tempfile.mkdtemp(prefix=".qgraph-", dir=folder))
        except OSError as error:
            raise ModelError(f"Cannot write in {str(folder)!r}: {error.strerror}.") from error
        self._remove = weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)

    def spill(self, model: ir.Model) -> Path | None:
        """Make sure that all large weights of `model` are external tensors of one folder, and return that folder.

        Small models are left in memory (None is returned when nothing is external). A model whose weights already lie
        in one folder keeps them there, as long as what is in memory besides fits into one message.
        """
        external = {Path(t.base_dir) for _, t in _tensors(model) if isinstance(t, ir.ExternalTensor)}
        inline = sum(t.nbytes for _, t in _tensors(model) if not isinstance(t, ir.ExternalTensor))
        if len(external) <= 1 and inline < (_INLINE_BYTES if external else _SPILL_BYTES):
            return external.pop() if external else None
        data = Path(tempfile.mkdtemp(prefix="weights-", dir=self.folder))
        values = [v for graph in (model.graph, *model.graph.subgraphs()) for v in graph.initializers.values()]
        # A view of 16-bit floats is stored as what it is a view of.
        views = [value for value in values if isinstance(value.const_value, Widened)]
        for value in views:
            value.const_value = None if value.const_value is None else widened.source(value.const_value)
        ir.save(model, data / "model.onnx", external_data="weights.data", size_threshold_bytes=_EXTERNAL_THRESHOLD)
        stored = ir.load(data / "model.onnx")
        for graph, other in zip(
            (model.graph, *model.graph.subgraphs()), (stored.graph, *stored.graph.subgraphs()), strict=True
        ):
            for name, value in graph.initializers.items():
                value.const_value = other.initializers[name].const_value
        for value in views:
            value.const_value = None if value.const_value is None else Widened(value.const_value)
        return data

    def close(self) -> None:
        """Remove the folder; done by itself when nothing refers to the workspace any more."""
        self._remove()

    def __enter__(self) -> Workspace:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _take_in(model: ir.Model, least: int | None = None) -> None:
    """Read external weights of at most `least` bytes (None for all) into memory, in place.

    Small ones are written into the model's own file, for which they must not be mapped.
    """
    for graph in (model.graph, *model.graph.subgraphs()):
        for value in graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor) and (least is None or tensor.nbytes <= least):
                value.const_value = ir.Tensor(np.array(tensor.numpy()), dtype=tensor.dtype, name=tensor.name)
                # A view of it that someone holds keeps it mapped, which costs address space only.
                with contextlib.suppress(BufferError):
                    tensor.release()


def stage(
    model: ir.Model,
    destination: Path,
    workspace: Workspace,
    external: bool = False,
    avoid: Collection[Path] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Staged:
    """Write `model` as it will stand at `destination`, into the workspace.

    The IR version is lowered to what the installed runtime reads. Lazy tensors are evaluated one at a time.

    Args:
        model: what to write; unchanged, but for its IR version.
        destination: the final path.
        workspace: where to write.
        external: put the weights into `<name>.data`; done in any case when they exceed 1 GiB, or what a file may hold.
        avoid: resolved paths that must not be replaced, as the original's own data.
        progress: called with (tensors done, tensors in all).
    """
    model.ir_version = min(model.ir_version, max_ir_version())
    folder = Path(tempfile.mkdtemp(prefix="staged-", dir=workspace.folder))
    path = folder / destination.name
    sizes = [t.nbytes for _, t in _tensors(model)]
    inline = min(_INLINE_BYTES, workspace.shard or _INLINE_BYTES)
    # Where all weights are small, none would be in a file of its own.
    beside = (external or sum(sizes) > inline) and max(sizes, default=0) > _EXTERNAL_THRESHOLD
    data = shards.free_name(destination, avoid) if beside else None
    if data is None:
        # What lies in the workspace would otherwise be written as a reference to it.
        model = model.clone()
        _take_in(model)

    def report(_: object, info: object) -> None:
        if progress is not None:
            progress(int(getattr(info, "index", 0)) + 1, int(getattr(info, "total", 0)))

    try:
        # Tensors that are larger than a file may be are told in the report.
        with quiet(ir.external_data.__name__, logging.ERROR):
            ir.save(
                model,
                path,
                external_data=data,
                size_threshold_bytes=_EXTERNAL_THRESHOLD,
                max_shard_size_bytes=workspace.shard if data is not None else None,
                callback=report,
                max_workers=1,
            )
    except OSError as error:
        raise ModelError(f"Cannot write {str(destination)!r}: {os.strerror(error.errno or 0)}.") from error
    except ir.serde.SerdeError as error:
        # Lazy weights are computed as they are written; what is wrong with one is said at the bottom.
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, QGraphError):
            cause = cause.__cause__
        raise cause or error from error
    return Staged(path, destination)
