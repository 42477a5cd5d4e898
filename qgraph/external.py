"""Which files of external data a model on disk names; each version of a file is parsed once."""

from __future__ import annotations

import functools
from pathlib import Path

import onnx_ir as ir

__all__ = ["data_files"]


def data_files(path: Path) -> tuple[Path, ...]:
    """Resolved paths, sorted, whether they exist or not; only those of initializers."""
    stamp = path.stat()
    return _parsed(path.resolve(), stamp.st_mtime_ns, stamp.st_size)


@functools.lru_cache(maxsize=16)
def _parsed(path: Path, *_: int) -> tuple[Path, ...]:
    tensors = [value.const_value for graph in ir.load(path).graphs() for value in graph.initializers.values()]
    return tuple(sorted({Path(t.path).resolve() for t in tensors if isinstance(t, ir.ExternalTensor)}))
