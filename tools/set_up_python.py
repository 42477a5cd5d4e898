"""Runners that are a Python of their own with a package or two from PyPI."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

from qgraph.runners.places import virtual_environment

__all__ = ["install"]


def install(folder: Path, packages: list[str]) -> None:
    """A virtual environment in `folder` with these packages; one that is there is brought up to them.

    Raises:
        SystemExit: pip finds no such package for this Python and machine, or it cannot be imported.
    """
    python = virtual_environment(folder)
    if not python.exists():
        venv.create(folder, with_pip=True, clear=folder.exists())
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--only-binary=:all:"]
    if subprocess.run([*pip, *packages], check=False).returncode != 0:
        version = ".".join(map(str, sys.version_info[:2]))
        raise SystemExit(f"pip cannot install {' '.join(packages)} for Python {version} on this machine.")
    script = "import onnxruntime; print('  onnxruntime', onnxruntime.__version__)"
    if subprocess.run([str(python), "-I", "-c", script], check=False).returncode != 0:
        raise SystemExit(f"The onnxruntime in {folder} cannot be imported.")
