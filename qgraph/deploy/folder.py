"""The deployed folder as a whole: when it may be written, how it is sealed, how it comes into place."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qgraph.errors import OptionError
from qgraph.fingerprint import of_file

__all__ = ["move", "refuse", "seal"]

_MANIFEST, _SUMS = "manifest.json", "SHA256SUMS"


def refuse(final: Path, folder: Path, force: bool, reads: Mapping[str, object]) -> None:
    """Check that a folder may be written, or replaced: only what a deployment wrote ever is.

    Args:
        final: where it really is.
        folder: what the user calls it.
        force: whether to replace one that is there.
        reads: what is read -> its path.

    Raises:
        OptionError: it is in the way.
    """
    if final.exists() and not final.is_dir():
        raise OptionError(f"{str(folder)!r} is a file; name a folder.")
    for what, path in reads.items():
        if isinstance(path, (str, Path)) and final in (Path(path).resolve(), *Path(path).resolve().parents):
            raise OptionError(f"The {what} is in {str(folder)!r}, which would be replaced; name another folder.")
    if not final.is_dir() or not any(final.iterdir()):
        return
    if not force:
        raise OptionError(f"{str(folder)!r} is not empty. Name a new folder, or replace it with --force.")
    if not _ours(final):
        what = "what qgraph deploy has not written, or files that were changed since"
        raise OptionError(f"{str(folder)!r} holds {what}; it is never replaced.")


def _ours(folder: Path) -> bool:
    """Whether a folder holds exactly what a deployment put there, or less."""
    try:
        files = {line[66:]: line[:64] for line in (folder / _SUMS).read_text(encoding="utf-8").splitlines()}
    except (OSError, UnicodeDecodeError):
        return False
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    if _MANIFEST not in files or not there <= {*files, _SUMS}:
        return False
    return all(files[name] == digest for name, _, digest in _digests(folder) if name in files)


def move(made: Path, final: Path, previous: Path) -> None:
    """Into place; on failure what stood there before stands again."""
    if not final.exists():
        made.replace(final)
        return
    final.replace(previous)
    try:
        made.replace(final)
    except BaseException:
        previous.replace(final)
        raise


def seal(folder: Path, manifest: dict[str, Any]) -> None:
    """Add sizes and checksums of all files to the manifest, and write it and a file of all checksums."""
    manifest["files"] = {name: {"bytes": size, "sha256": digest} for name, size, digest in _digests(folder)}
    text = json.dumps(manifest, indent=1, allow_nan=False)
    (folder / _MANIFEST).write_text(text + "\n", encoding="utf-8", newline="\n")
    lines = [f"{digest}  {name}\n" for name, _, digest in _digests(folder)]
    (folder / _SUMS).write_text("".join(lines), encoding="utf-8", newline="\n")


def _digests(folder: Path) -> list[tuple[str, int, str]]:
    found: list[tuple[str, int, str]] = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        found.append((path.relative_to(folder).as_posix(), path.stat().st_size, of_file(path)))
    return found
