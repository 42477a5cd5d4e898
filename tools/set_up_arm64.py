"""An arm64 machine in a folder: qemu 10, Debian's arm64 Python with the libraries it needs, and arm64 wheels.

qemu 7.2, bookworm's own, crashes in onnxruntime, so it is taken from the backports.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import debian_packages

__all__ = ["install"]

_PYTHON = "3.11"
"""Bookworm's."""
_UNUSED = {"dpkg", "tar", "media-types", "readline-common", "libreadline8", "libncursesw6", "libdb5.3", "libselinux1"}
_WHEELS = ("onnxruntime==1.31.1", "numpy>=2,<3")
_PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64")


def install(folder: Path) -> None:
    """Unpack into `folder` what is not there.

    Raises:
        SystemExit: no such machine, pip finds no wheel, or a package is not what the index says.
        OSError: the mirror cannot be reached.
    """
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise SystemExit("The emulator is Debian's for x86-64. On arm64 itself nothing needs to be set up.")
    for name, make in (("qemu", _qemu), ("root", _root), ("site", _site)):
        part = folder / f"{name}.part"
        if (folder / name).exists():
            continue
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        make(part)
        part.rename(folder / name)


def _qemu(folder: Path) -> None:
    index = debian_packages.read_index("amd64", "bookworm-backports")
    debian_packages.unpack(index, ["qemu-user"], folder)
    for path in [*folder.rglob("*")]:
        if path.is_file() and path.name != "qemu-aarch64":
            path.unlink()


def _root(folder: Path) -> None:
    index = debian_packages.read_index("arm64", "bookworm")
    wanted = (f"python{_PYTHON}-minimal", f"libpython{_PYTHON}-stdlib", "libstdc++6")
    debian_packages.unpack(index, debian_packages.closure(index, wanted, without=_UNUSED), folder)
    shutil.rmtree(folder / "usr" / "share", ignore_errors=True)


def _site(folder: Path) -> None:
    platforms = [word for one in _PLATFORMS for word in ("--platform", one)]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--only-binary=:all:"]
    python = ["--target", str(folder), "--implementation", "cp", "--python-version", _PYTHON]
    if subprocess.run([*pip, *python, *platforms, *_WHEELS], check=False).returncode != 0:
        raise SystemExit(f"pip cannot get the arm64 wheels of {' and '.join(_WHEELS)}.")
