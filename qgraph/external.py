"""What a model on disk says of itself at a glance, each version of a file parsed once: data files, fp8 quantizers."""

from __future__ import annotations

import dataclasses
import functools
import gc
import mmap
from pathlib import Path

import onnx_ir as ir

__all__ = ["data_files", "float_quantizers"]

_QUANTIZER = "QuantizeLinear"
_LARGE = 32 << 20
_FP8 = frozenset(one for one in ir.DataType if one.name.startswith("FLOAT8"))


@dataclasses.dataclass(frozen=True)
class _Glance:
    files: tuple[Path, ...]
    fp8: bool


def data_files(path: Path) -> tuple[Path, ...]:
    """Resolved paths, sorted, whether they exist or not; only those of initializers."""
    return _seen(path).files


def float_quantizers(model: Path | ir.Model) -> bool:
    """Whether some QuantizeLinear writes floats of 8 bits, as its zero point says."""
    if isinstance(model, Path):
        return _seen(model).fp8
    graphs: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    return any(_writes_fp8(node) for graph in graphs for node in graph.all_nodes() if node.op_type == _QUANTIZER)


def _writes_fp8(node: ir.Node) -> bool:
    """By its zero point, a constant in whatever form, or by its attribute."""
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    constant = ir.convenience.get_const_tensor(zero) if zero is not None else None
    kinds = node.attributes.get_int("output_dtype", 0), zero and zero.dtype, constant and constant.dtype
    return any(kind in _FP8 for kind in kinds)


def _seen(path: Path) -> _Glance:
    stamp = path.stat()
    return _parsed(path.resolve(), stamp.st_mtime_ns, stamp.st_size)


@functools.lru_cache(maxsize=16)
def _parsed(path: Path, _: int, size: int) -> _Glance:
    if not _mentions(path, size, _QUANTIZER, "location"):
        return _Glance((), False)
    model = ir.load(path)
    tensors = [value.const_value for graph in model.graphs() for value in graph.initializers.values()]
    files = {Path(tensor.path).resolve() for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}
    found = _Glance(tuple(sorted(files)), float_quantizers(model))
    del model, tensors
    if size > _LARGE:
        gc.collect()  # Graphs are in cycles, and the weights of this one would lie beside those of a session.
    return found


def _mentions(path: Path, size: int, *words: str) -> bool:
    """Whether one of the words, an operator or the key of external data, is in the file at all."""
    if size == 0:
        return False
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return any(content.find(word.encode()) >= 0 for word in words)
