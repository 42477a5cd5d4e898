"""Weights beside the model in several files, none larger than what a browser, a host of files or a disk takes."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from qgraph.errors import OptionError
from qgraph.external import data_files
from qgraph.words import size

__all__ = ["WEB", "free_name", "left_behind", "limit", "notes", "parsed"]

WEB = 2_000_000_000
"""Bytes of a file that browsers load: Chrome's ArrayBuffer ends at 0x7fe00000, and GitHub takes 2 GB in LFS."""
_UNITS = {"": 1, "B": 1}
_UNITS.update({f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", 1)})
_UNITS.update({f"{prefix}IB": 1024**power for power, prefix in enumerate("KMGT", 1)})
_PART = re.compile(r"-\d{5}-of-\d{5}")


def parsed(text: str | int) -> int:
    """Bytes: a number, or one with a unit as "2GB" (1000^3) or "2GiB" (1024^3).

    Raises:
        OptionError: it is no size, or nothing.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    unit = None if found is None else _UNITS.get(found[2].upper())
    count = 0 if found is None or unit is None else int(float(found[1]) * unit)
    if count < 1:
        raise OptionError(f"A size is a number of bytes, or one with a unit as 2GB or 500MiB, and not {text!r}.")
    return count


def limit(asked: str | int | None, web: bool) -> int | None:
    """Most bytes of a file of weights; None for all in one.

    Args:
        asked: by the caller.
        web: whether the model will run in browsers, which do not load larger files.
    """
    return parsed(asked) if asked is not None else WEB if web else None


def free_name(destination: Path, avoid: Collection[Path]) -> str:
    """The name of a file of weights, whole or in parts, that is none of `avoid`."""
    folder = destination.resolve().parent
    # A part of another number of parts is spared, too: how many there will be is not known yet.
    taken = {*avoid, *(path.with_name(_PART.sub("", path.name)) for path in avoid)}
    name, number = f"{destination.name}.data", 0
    while folder / name in taken:
        number += 1
        name = f"{destination.name}.{number}.data"
    return name


def notes(path: Path, most: int | None) -> list[str]:
    """What is worth telling of the files of the model at `path`."""
    files = data_files(path)
    if most is None or not files:
        return []
    told: list[str] = []
    if len(files) > 1:
        sizes = [file.stat().st_size for file in files]
        told.append(f"The weights lie in {len(files)} files of up to {size(max(sizes))} beside the model.")
    large = [file.name for file in files if file.stat().st_size > most]
    if large:
        told.append(
            f"{', '.join(large)} {'is' if len(large) == 1 else 'are'} larger than {size(most)}: a weight is never cut "
            "in two, and one in there is larger by itself."
        )
    return told


def left_behind(output: Path, path: Path) -> list[str]:
    """A note on files of weights that belong to what stood at `output`, and not to the model at `path`, if any."""
    try:
        old = data_files(output) if output.is_file() else ()
    except Exception:  # whatever stood there is replaced, and need not be a model
        return []
    new = {output.resolve().parent / file.name for file in data_files(path)}
    left = [file for file in old if file not in new and file.is_file()]
    if not left:
        return []
    total = sum(file.stat().st_size for file in left)
    names = ", ".join(sorted(file.name for file in left))
    return [f"Weights of the model that stood at {str(output)!r} before are left: {names} ({size(total)})."]
