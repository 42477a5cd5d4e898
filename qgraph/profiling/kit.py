"""A kit that times the table of kernels on a device without Python, and the way back from its results to a profile.

The folder holds the models, what to do with them (`plan.json`, and `plan.txt` for the C++ program) and programs for
Node, a browser and C++. Each writes `results.json`.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qgraph.errors import DataError, OptionError, first_line, unknown
from qgraph.profiles import Machine, Profile
from qgraph.profiling import measure as profiling
from qgraph.profiling.rows import Row
from qgraph.targets.cpu import Cpu

__all__ = ["PROVIDERS", "export", "read", "told"]

PROVIDERS: Mapping[str, str] = {
    "cpu": "CPUExecutionProvider",
    "xnnpack": "XnnpackExecutionProvider",
}
"""What runners call a provider -> its name. Where there is WebAssembly only, it is the CPU's."""
_VERSION = 1
_WHERE = "It is the results.json that the program of a kit writes on the device (qgraph profile --export FOLDER)."
_SHORTEST, _LONGEST = 1e-8, 100.0
_MOST_NAMED = 3
# What devices call themselves -> the targets whose formats suit them.
_ARCHITECTURES = {
    **dict.fromkeys(("x64", "x86_64", "amd64"), ("x86-vnni", "x86")),
    **dict.fromkeys(("arm64", "aarch64"), ("arm64",)),
}


def _digest(rows: Sequence[Row]) -> str:
    """What results belong to: the models' names and their work."""
    found = [(name, sorted(one.terms.items())) for name, one in profiling.models(rows).items()]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16]


def export(folder: Path, target: Cpu, short: str = "cpu", seconds: float = 180.0) -> int:
    """Write a kit, whole or not at all; returns its size in bytes.

    Args:
        folder: a new or empty one.
        target: whose formats the models have.
        short: the execution provider, one of `PROVIDERS`.
        seconds: how long its programs measure.

    Raises:
        OptionError: the folder holds something, or cannot be written, or there is no such provider.
    """
    if short not in PROVIDERS:
        raise unknown("provider", short, PROVIDERS)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OptionError(f"{str(folder)!r} holds something already: name a new folder.")
    try:
        folder.absolute().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.absolute().parent) as name:
            made = Path(name) / "kit"
            _fill(made, target, short, seconds)
            size = sum(path.stat().st_size for path in made.rglob("*") if path.is_file())
            if folder.exists():
                folder.rmdir()
            made.rename(folder)
    except OSError as error:
        raise OptionError(f"Cannot write the kit to {str(folder)!r}: {first_line(error)}.") from error
    return size


def _fill(folder: Path, target: Cpu, short: str, seconds: float) -> None:
    template = resources.files("qgraph") / "templates" / "kit"
    with resources.as_file(template) as source:
        shutil.copytree(source, folder, copy_function=shutil.copyfile)
    (folder / "models").mkdir()
    rows = profiling.table(target)
    told = {
        "version": _VERSION,
        "table": _digest(rows),
        "like": target.name,
        "provider": PROVIDERS[short],
        "short": short,
        "seconds": seconds,
    }
    models: list[dict[str, Any]] = []
    for number, (name, one) in enumerate(profiling.models(rows).items()):
        model = one.build()
        file = f"models/{number:03d}.onnx"
        ir.save(model, folder / file)
        inputs = [
            {"name": key, "type": array.dtype.name, "shape": list(array.shape)}
            for key, array in profiling.feeds(model).items()
        ]
        models.append({"name": name, "file": file, "inputs": inputs})
    (folder / "plan.json").write_text(json.dumps({**told, "models": models}, indent=1) + "\n")
    lines = [f"{key}\t{value}" for key, value in told.items()]
    for said in models:
        given = ";".join(f"{i['name']} {i['type']} {','.join(map(str, i['shape']))}" for i in said["inputs"])
        lines.append(f"model\t{said['name']}\t{said['file']}\t{given}")
    (folder / "plan.txt").write_text("\n".join(lines) + "\n")


def told(path: Path) -> dict[str, Any]:
    """What a file of results holds.

    Raises:
        DataError: it is no such file.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"Cannot read the results {str(path)!r}: {first_line(error)}. {_WHERE}") from error
    except ValueError as error:
        raise DataError(f"{str(path)!r} holds no results: it is no JSON, or cut short. {_WHERE}") from error
    if not isinstance(found, dict) or "table" not in found or not isinstance(found.get("times"), dict):
        raise DataError(f"{str(path)!r} holds no results: it was not written by a kit. {_WHERE}")
    if found.get("version") != _VERSION:
        what = "it was written by a kit of another version of qgraph; export one again (qgraph profile --export FOLDER)"
        raise DataError(f"{str(path)!r} holds no results: {what}.")
    return found


def read(path: Path, name: str, target: Cpu, found: Mapping[str, Any] | None = None) -> Profile:
    """The profile of a kit's results.

    Args:
        path: the file that the kit's program wrote.
        name: what the profile is called.
        target: whose table was measured.
        found: what `told` says of the file, if that is known.

    Raises:
        DataError: it is no file of results, of another table, of a processor that wants other formats; or times are
            missing, unknown or impossible. Names them.
    """
    results = told(path) if found is None else found
    rows = profiling.table(target)
    if results["table"] != _digest(rows):
        raise DataError(
            f"{str(path)!r} is of another table of kernels than that of {target.name!r}: name the target that the kit "
            "was exported for with --like, or export a kit with this version of qgraph."
        )
    try:
        machine = Machine(
            str(results["machine"]["processor"])[:200],
            str(results["machine"]["architecture"]),
            int(results["machine"]["cores"]),
        )
        words = (str(results["runtime"]), str(results["date"]), float(results["seconds"]))
        provider = str(results["provider"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{str(path)!r} does not say where it was measured: {first_line(error)}.") from error
    fitting = _ARCHITECTURES.get(machine.architecture.lower())
    if fitting is not None and target.name not in fitting:
        raise DataError(
            f"{str(path)!r} was measured on {machine.architecture}, with models for {target.name}: export a kit with "
            f"--like {fitting[0]}."
        )
    times = _checked(results["times"], list(profiling.models(rows)), path)
    return profiling.profile(name, target.name, provider, machine, words, rows, times)


def _checked(times: Mapping[str, Any], names: Sequence[str], path: Path) -> dict[str, list[float] | str]:
    """The times, if every model has some and all make sense."""
    for what, wrong in (
        ("has no times of", [name for name in names if name not in times]),
        ("has times of unknown models:", sorted(set(times) - set(names))),
        ("has impossible times of", [name for name in names if name in times and _bad(times[name])]),
    ):
        if wrong:
            more = f" and {len(wrong) - _MOST_NAMED} more" if len(wrong) > _MOST_NAMED else ""
            raise DataError(f"{str(path)!r} {what} {', '.join(map(repr, wrong[:_MOST_NAMED]))}{more}.")
    lengths = {len(seen) for seen in times.values() if isinstance(seen, list)}
    if len(lengths) > 1:
        raise DataError(f"{str(path)!r} does not have the same number of rounds for each model.")
    return {name: times[name]["error"] if isinstance(times[name], dict) else times[name] for name in names}


def _bad(seen: Any) -> bool:
    if isinstance(seen, dict):
        return not isinstance(seen.get("error"), str)
    if not isinstance(seen, list) or len(seen) < profiling.LEAST_ROUNDS:
        return True
    return not all(isinstance(one, (int, float)) and math.isfinite(one) and _SHORTEST < one < _LONGEST for one in seen)
