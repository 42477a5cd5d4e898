"""Debian packages unpacked into a folder of one's own: nothing is installed, no root is needed.

The index of a release is read over https, and every package is checked against the SHA-256 that the index gives.
"""

from __future__ import annotations

import hashlib
import lzma
import re
import shutil
import subprocess
import tempfile
import urllib.parse
import urllib.request
from collections.abc import Collection, Iterable
from pathlib import Path

__all__ = ["Index", "closure", "read_index", "unpack"]

_MIRROR = "https://deb.debian.org/debian/"
_SECONDS = 300

Index = dict[str, dict[str, str]]
"""Package name -> the fields that are needed of it."""
_FIELDS = ("Package", "Version", "Filename", "SHA256", "Depends", "Pre-Depends", "Provides")


def read_index(architecture: str, *releases: str) -> Index:
    """The packages of some releases, the later named taking the place of the earlier, for one architecture.

    Raises:
        OSError: the mirror cannot be reached.
    """
    found: Index = {}
    for release in releases:
        data = _get(f"{_MIRROR}dists/{release}/main/binary-{architecture}/Packages.xz")
        for stanza in lzma.decompress(data).decode().split("\n\n"):
            pairs = (line.split(": ", 1) for line in stanza.splitlines() if ": " in line and line[0] != " ")
            fields = {key: value for key, value in pairs if key in _FIELDS}
            if "Package" in fields:
                found[fields["Package"]] = fields
    return found


def closure(index: Index, names: Iterable[str], without: Collection[str] = ()) -> list[str]:
    """These packages and all that they depend on (of alternatives the first that there is), but for those `without`."""
    waiting, seen = list(names), set[str]()
    while waiting:
        name = waiting.pop()
        if name in seen or name in without:
            continue
        seen.add(name)
        wanted = ", ".join(index[name].get(field, "") for field in ("Depends", "Pre-Depends"))
        for one in wanted.split(","):
            choices = [re.split(r"[\s:(]", choice.strip())[0] for choice in one.split("|")]
            waiting += [choice for choice in choices if choice in index][:1]
    return sorted(seen)


def unpack(index: Index, names: Iterable[str], folder: Path) -> None:
    """Put the files of these packages under `folder`.

    Raises:
        SystemExit: a package is not what the index says, or dpkg-deb is not here.
    """
    if shutil.which("dpkg-deb") is None:
        raise SystemExit("dpkg-deb is needed: install the package dpkg of your distribution.")
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        package = index[name]
        data = _get(_MIRROR + urllib.parse.quote(package["Filename"]))
        if hashlib.sha256(data).hexdigest() != package["SHA256"]:
            raise SystemExit(f"{package['Filename']} is not the file that Debian's index names (SHA-256 differs).")
        print(f"  {name} {package['Version']} ({len(data) / 1e6:.1f} MB)", flush=True)
        with tempfile.NamedTemporaryFile(suffix=".deb") as file:
            file.write(data)
            file.flush()
            subprocess.run(["dpkg-deb", "-x", file.name, str(folder)], check=True)


def _get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=_SECONDS) as answer:
        return bytes(answer.read())
