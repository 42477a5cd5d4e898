"""The identity of a model: what saved ranges and the state of a search belong to."""

from __future__ import annotations

import hashlib
from pathlib import Path

import onnx_ir as ir

from qgraph import modelio
from qgraph.report import WrittenFile

__all__ = ["fingerprint", "of_file", "of_files"]

_CHUNK = 1 << 20


def of_file(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def of_files(path: Path) -> list[WrittenFile]:
    """The files that a model is in: the .onnx first, then its external data by name. Read in pieces of a megabyte.

    Raises:
        ModelError: it cannot be read as a model, or its external data is missing.
    """
    root = path.parent.resolve()
    data = modelio.external_files(modelio.read(path))
    files = [(path.name, path), *sorted((file.relative_to(root).as_posix(), file) for file in data)]
    return [WrittenFile(name, file.stat().st_size, of_file(file)) for name, file in files]


def fingerprint(model: ir.Model) -> str:
    """SHA-256 over the graph and a sample of each weight: the key under which observed ranges are saved.

    Weights over 64 kB enter with their size and 4 kB from each end, so that hashing a model of gigabytes costs
    nothing; the graph, its names and attributes enter whole.
    """
    digest = hashlib.sha256()
    for graph in (model.graph, *model.graph.subgraphs()):
        digest.update(repr([v.name for v in (*graph.inputs, *graph.outputs)]).encode())
        for node in graph:
            digest.update(repr((node.domain, node.op_type, [v.name if v else None for v in node.inputs])).encode())
            digest.update(repr([v.name for v in node.outputs]).encode())
            for attribute in sorted(node.attributes.values(), key=lambda a: a.name):
                if attribute.type in (ir.AttributeType.TENSOR, ir.AttributeType.TENSORS):
                    one = attribute.type == ir.AttributeType.TENSOR
                    for tensor in [attribute.as_tensor()] if one else attribute.as_tensors():
                        shape = tuple(tensor.shape.numpy())
                        digest.update(repr((attribute.name, str(tensor.dtype), shape)).encode() + tensor.tobytes())
                elif attribute.type not in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
                    digest.update(repr((attribute.name, attribute.value)).encode())
    for name, tensor in sorted(_initializers(model), key=lambda pair: pair[0]):
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape.numpy()))).encode())
        if tensor.nbytes <= 1 << 16:
            digest.update(tensor.tobytes())
        else:
            flat = tensor.numpy().reshape(-1)
            digest.update(flat[:1024].tobytes())
            digest.update(flat[-1024:].tobytes())
            del flat
            if isinstance(tensor, ir.ExternalTensor):
                tensor.release()
    return digest.hexdigest()


def _initializers(model: ir.Model) -> list[tuple[str, ir.TensorProtocol]]:
    return [
        (name, value.const_value)
        for graph in (model.graph, *model.graph.subgraphs())
        for name, value in graph.initializers.items()
        if value.const_value is not None
    ]
