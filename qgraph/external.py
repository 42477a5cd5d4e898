"""What a model on disk says of itself at a glance, each version of a file parsed once: data files, fp8 quantizers."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import onnx_ir as ir

__all__ = ["data_files", "float_quantizers"]

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
    return any(
        len(node.inputs) > 2 and node.inputs[2] is not None and node.inputs[2].dtype in _FP8
        for node in model.graph.all_nodes()
        if node.op_type == "QuantizeLinear"
    )


def _seen(path: Path) -> _Glance:
    stamp = path.stat()
    return _parsed(path.resolve(), stamp.st_mtime_ns, stamp.st_size)


@functools.lru_cache(maxsize=16)
def _parsed(path: Path, *_: int) -> _Glance:
    model = ir.load(path)
    tensors = [value.const_value for graph in model.graphs() for value in graph.initializers.values()]
    files = {Path(tensor.path).resolve() for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}
    return _Glance(tuple(sorted(files)), float_quantizers(model))
