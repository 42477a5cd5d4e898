"""Files in the runtime's own format, for builds with only the operators that a model needs: made by onnxruntime.tools.

Both styles are written. "Fixed" has the optimizations of the CPU provider in it; "Runtime" keeps most for the device,
which replays them only with `session.enable_saved_runtime_optimizations=1`. A provider without 16-bit kernels casts
halves to float32, and at its last level Fixed folds those casts into the weights, which doubles the file: the level
below does everything but that, so it is taken where it is smaller.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from qgraph.deploy.sample import difference
from qgraph.errors import AccuracyError, ModelError
from qgraph.session import Feeds, Session, SessionOptions

__all__ = ["OrtFile", "convert"]

_LEVEL = "ORT_CONVERT_ONNX_MODELS_TO_ORT_OPTIMIZATION_LEVEL"
_REPLAY: dict[str, str] = {"session.enable_saved_runtime_optimizations": "1"}
_SECONDS = 1800
_GROWN = 1.25
"""A file so many times larger than the model has weights in it that were widened."""


@dataclasses.dataclass(frozen=True)
class OrtFile:
    """One file in the runtime's format.

    Attributes:
        file: its path, relative to the folder.
        style: "Fixed" or "Runtime".
        level: level of the optimizations in it.
        bytes: its size.
        sizes: level -> size of this style, of all that were made to choose from.
        difference: from the .onnx on the sample: largest difference over largest number.
        config: session entries that it was also run with, and should be where its maker is trusted.
        operators: configuration of a build with only its operators and types, relative to the folder.
    """

    file: str
    style: str
    level: str
    bytes: int
    sizes: dict[str, int]
    difference: float
    config: dict[str, str]
    operators: str


def convert(
    model: Path, scratch: Path, feeds: Feeds, expected: Mapping[str, NDArray[Any]], limit: float
) -> list[OrtFile]:
    """Convert `model` in both styles, prove the files on the sample, and put them beside it with their configurations.

    Args:
        model: the .onnx, in one file.
        scratch: an empty folder, on the same disk, for what is not kept.
        feeds: the sample's inputs.
        expected: what the .onnx gives on them.
        limit: the largest `difference`.

    Raises:
        ModelError: the runtime's tool cannot convert the model.
        ExecutionError: a converted file does not load or run.
        AccuracyError: a converted file gives other numbers.
    """
    name = model.stem
    folders = {"all": _converted(model, scratch / "all", "all")}
    sizes = {"all": (folders["all"] / f"{name}.ort").stat().st_size}
    chosen = "all"
    if sizes["all"] > _GROWN * model.stat().st_size:
        folders["extended"] = _converted(model, scratch / "extended", "extended")
        sizes["extended"] = (folders["extended"] / f"{name}.extended.ort").stat().st_size
        chosen = min(sizes, key=lambda level: sizes[level])
    level = "" if chosen == "all" else f".{chosen}"
    made: list[OrtFile] = []
    plain: dict[str, str] = {}
    for style, folder, had, has, entries in (
        ("Fixed", chosen, level, "", plain),
        ("Runtime", "all", ".with_runtime_opt", ".with_runtime_opt", _REPLAY),
    ):
        path = model.parent / f"{name}{has}.ort"
        shutil.move(folders[folder] / f"{name}{had}.ort", path)
        config = path.with_suffix(".required_operators_and_types.config")
        lines = (folders[folder] / f"{name}.required_operators_and_types{had}.config").read_text().splitlines()
        # Its comments name the folder that it was made in.
        text = [f"# What {path.name} needs, for build.py --include_ops_by_config", *(x for x in lines if x[:1] != "#")]
        config.write_text("\n".join(text) + "\n", newline="\n")
        found = _proved(path, feeds, expected, limit, entries)
        file, size = f"{path.parent.name}/{path.name}", path.stat().st_size
        every = sizes if style == "Fixed" else {"all": size}
        made.append(OrtFile(file, style, folder, size, every, found, entries, f"{path.parent.name}/{config.name}"))
    return made


def _converted(model: Path, folder: Path, level: str) -> Path:
    """Both styles at a level, in a folder of their own; another process, whose environment tells the level."""
    folder.mkdir(parents=True)
    # It writes beside its input, which must not be where the result is gathered.
    (folder / "in").mkdir()
    os.link(model, folder / "in" / model.name)
    command = [sys.executable, "-m", "onnxruntime.tools.convert_onnx_models_to_ort", str(folder / "in" / model.name)]
    command += ["--output_dir", str(folder), "--enable_type_reduction", "--target_platform", "arm"]
    command += ["--optimization_style", "Fixed", "Runtime"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_SECONDS, env={**os.environ, _LEVEL: level}, check=False
        )
    except (subprocess.TimeoutExpired, OSError) as error:
        raise ModelError(f"Converting {model.name} to the runtime's format failed: {error}") from error
    if done.returncode != 0:
        words = " ".join((done.stderr or done.stdout).strip().splitlines()[-1:])[-300:]
        raise ModelError(f"onnxruntime's tool cannot convert {model.name} to its own format: {words or 'no word'}")
    return folder


def _proved(
    path: Path, feeds: Feeds, expected: Mapping[str, NDArray[Any]], limit: float, entries: Mapping[str, str]
) -> float:
    """The largest difference from the .onnx, without and with the entries."""
    worst = 0.0
    for config in ({}, entries) if entries else ({},):
        with Session(path, SessionOptions(config=tuple(config.items()))) as session:
            found = difference(expected, session.run(feeds))
        if found > limit:
            raise AccuracyError(
                f"{path.name} gives other numbers than the .onnx: they differ by {found:.2g} of the largest, and "
                f"{limit:.2g} is allowed. Deploy without .ort files."
            )
        worst = max(worst, found)
    return worst
