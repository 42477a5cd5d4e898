"""A model whose every node has a name, by which it is found again in what a runtime tells."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Generator
from pathlib import Path

import onnx_ir as ir

from qgraph import graph, modelio

__all__ = ["named"]


@contextlib.contextmanager
def named(model: Path) -> Generator[Path]:
    """The model, or a copy of it in which nodes have names, with the same external data; the copy goes afterwards."""
    found = ir.load(model)
    nodes = list(found.graph.all_nodes())
    # Names may also be shared, and then tell nothing.
    taken = {str(node.name) for node in nodes if node.name}
    if len(taken) == len(nodes):
        yield model
        return
    seen: set[str] = set()
    for number, node in enumerate(nodes):
        if not node.name or node.name in seen:
            node.name = graph.fresh_name(f"{node.name or node.op_type}_{number}", taken)
        seen.add(node.name)
    root = model.resolve().parent
    tensors = [v.const_value for one in graph.all_graphs(found.graph) for v in one.initializers.values()]
    places = {Path(tensor.location) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}
    places |= {file.relative_to(root) for file in modelio.external_files(found)}
    with _folder(root) as folder:
        for place in places:
            _linked(root / place, folder / place)
        ir.save(found, folder / model.name)
        yield folder / model.name


@contextlib.contextmanager
def _folder(beside: Path) -> Generator[Path]:
    """A temporary folder, where files can be linked if possible."""
    where = beside if os.access(beside, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix=".qgraph-named-", dir=where) as name:
        yield Path(name)


def _linked(file: Path, place: Path) -> None:
    """The same file at another place: a second name of it, or a copy where there is no such thing."""
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(file.resolve(), place)
    except OSError:
        shutil.copyfile(file, place)
