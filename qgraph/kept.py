"""Learned codes on disk, weight by weight, so that an interrupted run goes on where it was.

Each weight has a folder of arrays, written beside and moved into place, and read back mapped into memory. All of them
belong to one key: a model as it was prepared, to the last byte of its weights, the data, and the versions of what
computed them. Codes of another key are never used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qgraph.blocks import Blocks
from qgraph.data import Dataset
from qgraph.errors import DataError, ModelError, first_line
from qgraph.fingerprint import fingerprint
from qgraph.session import runtime_version

__all__ = ["Kept", "contents", "keeper"]

_VERSION = 1
_KEY, _ENTRY = "key.json", "blocks.json"
_ARRAYS = ("codes", "scale", "zero_point")
_CHUNK = 1 << 22


class Kept(MutableMapping[str, Blocks]):
    """Blocks by the name that an algorithm gives them.

    Args:
        folder: where; made when there is something to keep.
        key: what codes depend on, by the words for it, as "data" -> a digest.
        told: called with a note where codes were there already.

    Raises:
        DataError: what lies there is of another key, or no folder of codes.
    """

    def __init__(self, folder: Path, key: Mapping[str, str], told: Callable[[str], None] | None = None):
        self._folder = folder
        self._key = {"layout of this folder": str(_VERSION), **key}
        self._known: dict[str, Blocks] = {}
        if folder.exists():
            self._refuse_others()
            for rest in folder.glob(".part-*"):
                shutil.rmtree(rest, ignore_errors=True)
            if told is not None and len(self):
                told(f"The codes of {len(self)} weights were learned before, and taken from {str(folder)!r}.")

    def _refuse_others(self) -> None:
        try:
            found = json.loads((self._folder / _KEY).read_text(encoding="utf-8"))
            others = [what for what, value in self._key.items() if found[what] != value]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{str(self._folder)!r} holds no codes that were learned: {first_line(error)}") from error
        if others:
            raise DataError(
                f"{str(self._folder)!r} holds codes that were learned with another {others[0]}, which are of no use "
                "here. Name another --state, or remove that folder."
            )

    def __getitem__(self, name: str) -> Blocks:
        if name not in self._known:
            place = self._place(name)
            if not place.is_dir():
                raise KeyError(name)
            found = _read(place)
            if found is None:
                # Damaged: as good as never learned.
                shutil.rmtree(place, ignore_errors=True)
                raise KeyError(name)
            self._known[name] = found
        return self._known[name]

    def __setitem__(self, name: str, blocks: Blocks) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if not (self._folder / _KEY).exists():
                _write_file(self._folder / f"{_KEY}.part", (json.dumps(self._key, indent=1) + "\n").encode())
                (self._folder / f"{_KEY}.part").replace(self._folder / _KEY)
            self._known.pop(name, None)
            shutil.rmtree(self._place(name), ignore_errors=True)
            made = Path(tempfile.mkdtemp(prefix=".part-", dir=self._folder))
            try:
                _write(made, blocks)
                made.replace(self._place(name))
            except BaseException:
                shutil.rmtree(made, ignore_errors=True)
                raise
        except OSError as error:
            raise ModelError(f"Cannot keep codes in {str(self._folder)!r}: {error.strerror or error}.") from error
        # From now on they are read from there, and memory is free for others.
        self._known[name] = _mapped(self._place(name), blocks.bits, blocks.inner)

    def __delitem__(self, name: str) -> None:
        if name not in self:
            raise KeyError(name)
        del self._known[name]
        shutil.rmtree(self._place(name), ignore_errors=True)

    def __contains__(self, name: object) -> bool:
        with contextlib.suppress(KeyError):
            self[str(name)]
            return True
        return False

    def __iter__(self) -> Iterator[str]:
        if self._folder.is_dir():
            yield from sorted(p.name for p in self._folder.iterdir() if p.is_dir() and not p.name.startswith("."))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _place(self, name: str) -> Path:
        return self._folder / name


def keeper(
    state: str | Path | None, model: str, data: Dataset | None, memory: int, told: Callable[[str], None]
) -> Callable[[str, ir.Model], MutableMapping[str, Blocks]]:
    """What makes a place for learned codes out of the way in which channels are scaled, and the model scaled so.

    Args:
        state: beside it is the folder, `<state>.codes`; None keeps codes in memory.
        model: fingerprint of the original.
        data: what codes are learned from.
        memory: what bounds the layers that learn.
        told: called with notes.
    """

    def made(variant: str, scaled: ir.Model) -> MutableMapping[str, Blocks]:
        if state is None or data is None:
            return {}
        key = {
            "version of qgraph": version("qgraph"),
            "version of onnxruntime": runtime_version(),
            "model": model,
            "set of data": data.digest(),
            "--memory": str(memory),
            "choice of options": contents(scaled),
        }
        return Kept(Path(f"{state}.codes") / variant, key, told)

    return made


def _write(folder: Path, blocks: Blocks) -> None:
    for name in _ARRAYS:
        array = getattr(blocks, name)
        if array is not None:
            with (folder / f"{name}.npy").open("wb") as file:
                np.save(file, array)
                _settle(file)
    entry = {"bits": blocks.bits, "inner": blocks.inner, "digest": _digest(blocks)}
    _write_file(folder / _ENTRY, json.dumps(entry).encode())


def _read(folder: Path) -> Blocks | None:
    """None where it is not what was written."""
    try:
        entry = json.loads((folder / _ENTRY).read_text(encoding="utf-8"))
        found = _mapped(folder, int(entry["bits"]), int(entry["inner"]))
        return found if _digest(found) == entry["digest"] else None
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None


def _mapped(folder: Path, bits: int, inner: int) -> Blocks:
    def array(name: str) -> NDArray[Any]:
        return np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False))

    zero = array("zero_point") if (folder / "zero_point.npy").exists() else None
    return Blocks(array("codes"), array("scale"), zero, bits, inner)


def _digest(blocks: Blocks) -> str:
    found = hashlib.sha256(repr((blocks.bits, blocks.inner)).encode())
    for name in _ARRAYS:
        array = getattr(blocks, name)
        if array is not None:
            found.update(repr((name, array.shape, str(array.dtype))).encode())
            found.update(np.ascontiguousarray(array).data)
    return found.hexdigest()


def _write_file(path: Path, text: bytes) -> None:
    with path.open("wb") as file:
        file.write(text)
        _settle(file)


def _settle(file: Any) -> None:
    """On the disk itself, so that a name never stands for less than all of it."""
    file.flush()
    os.fsync(file.fileno())


def contents(model: ir.Model) -> str:
    """SHA-256 of the graph and of every byte of its weights, read a piece at a time."""
    found = hashlib.sha256(fingerprint(model).encode())
    for graph in (model.graph, *model.graph.subgraphs()):
        for name, value in sorted(graph.initializers.items()):
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor):
                found.update(repr(name).encode())
                with Path(tensor.path).open("rb") as file:
                    file.seek(tensor.offset or 0)
                    left = tensor.length or tensor.nbytes
                    while left and (piece := file.read(min(left, _CHUNK))):
                        found.update(piece)
                        left -= len(piece)
            elif tensor is not None:
                found.update(repr(name).encode())
                found.update(tensor.tobytes())
    return found.hexdigest()
