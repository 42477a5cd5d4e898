"""Where the Python of a runner is: this one, a virtual environment of the runner's own, or one for another processor.

All is looked up in files, nothing is started.
"""

# The runtime ships no type information.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path

import onnxruntime as ort

from qgraph.runners.base import runners_folder

__all__ = ["Interpreter", "emulated", "glibc", "own", "this", "virtual_environment", "vulkan"]


@dataclasses.dataclass(frozen=True)
class Interpreter:
    """A Python that can run the worker.

    Attributes:
        command: what to put before the worker's path.
        environment: what it needs besides ours.
    """

    command: tuple[str, ...]
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])


def this(provider: str, package: str, plugin: str | None) -> Interpreter | str:
    """The running Python, or why its onnxruntime cannot do it, in words.

    Args:
        provider: the execution provider that is wanted.
        package: the distribution that brings it.
        plugin: the module of `package` if the provider is a plugin library, which any newer runtime loads.
    """
    if plugin is None:
        if provider not in ort.get_available_providers():
            return f"the installed onnxruntime {ort.__version__} has no {provider}"
        return Interpreter((sys.executable,))
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return f"{package} is not installed"
    if not hasattr(ort, "register_execution_provider_library"):
        return f"the installed onnxruntime {ort.__version__} is too old to load a provider's library"
    return Interpreter((sys.executable,))


def own(name: str, package: str) -> Interpreter | str:
    """The virtual environment of the runner `name`, or why it cannot do it, in words."""
    folder = runners_folder() / name
    python = virtual_environment(folder)
    if not python.exists():
        return f"there is no Python in {str(folder)!r}"
    wanted = f"{package.replace('-', '_')}-*.dist-info"
    if not any(folder.glob(f"[Ll]ib/{wanted}")) and not any(folder.glob(f"[Ll]ib/*/site-packages/{wanted}")):
        return f"{str(folder)!r} has no {package}"
    # Nothing of ours may reach it: neither PYTHONPATH nor packages of the user's.
    return Interpreter((str(python), "-I"))


def virtual_environment(folder: Path) -> Path:
    """The Python of a virtual environment."""
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def emulated(name: str, processor: str) -> Interpreter | str:
    """The arm64 Python in the folder of the runner `name` under qemu's model of a `processor`, or why not, in words."""
    if sys.platform != "linux":
        return "qemu runs programs of another processor on Linux only"
    folder = runners_folder() / name
    root, site = folder / "root", folder / "site"
    emulator, python = folder / "qemu" / "usr" / "bin" / "qemu-aarch64", root / "usr" / "bin" / "python3.11"
    for path, what in ((emulator, "qemu"), (python, "arm64 Python"), (site / "onnxruntime", "arm64 onnxruntime")):
        if not path.exists():
            return f"there is no {what} in {str(folder)!r}"
    # By the folders' own names, for those of the host's Python of the same version would be found first.
    environment = {"PYTHONHOME": str(root / "usr"), "PYTHONPATH": str(site), "PYTHONNOUSERSITE": "1"}
    return Interpreter((str(emulator), "-cpu", processor, "-L", str(root), str(python), "-S"), environment)


def vulkan() -> Mapping[str, str] | str:
    """What the environment needs for a Vulkan device, or why there is none, in words.

    The user's choice of a driver stands; else it is the software device in the folder `vulkan`, if it is there, so that
    numbers are the same on any machine; else a driver of the system's.
    """
    if sys.platform != "linux" or os.environ.get("VK_DRIVER_FILES") or os.environ.get("VK_ICD_FILENAMES"):
        return {}
    folder = runners_folder() / "vulkan"
    driver = next(iter(sorted(folder.glob("usr/share/vulkan/icd.d/lvp_icd*.json"))), None)
    if driver is not None:
        libraries = os.pathsep.join(str(path) for path in sorted(folder.glob("usr/lib/*-linux-gnu")))
        before = os.environ.get("LD_LIBRARY_PATH")
        return {
            "VK_DRIVER_FILES": str(driver),
            "VK_ICD_FILENAMES": str(driver),
            "LD_LIBRARY_PATH": f"{libraries}{os.pathsep}{before}" if before else libraries,
            "ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER": "1",
        }
    system = (Path("/usr/share/vulkan/icd.d"), Path("/etc/vulkan/icd.d"))
    if any(path for place in system for path in place.glob("*.json") if not path.name.startswith("lvp")):
        return {}
    return f"there is no Vulkan driver of this machine's, and no software device in {str(folder)!r}"


def glibc() -> tuple[int, ...]:
    """Version of the C library, as (2, 36); empty where it is another library."""
    name, version = platform.libc_ver()
    return tuple(int(part) for part in version.split(".")[:2]) if name == "glibc" else ()
