"""A Vulkan device in software for WebGPU: Mesa's lavapipe 25, unpacked from Debian's backports into a folder.

Bookworm's own Mesa 22 is too old for WebGPU. The C and C++ libraries stay the machine's own, all else comes along.
"""

from __future__ import annotations

import json
import platform
import shutil
from pathlib import Path

import debian_packages

__all__ = ["install"]

_MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}
_MACHINES_OWN = {"libc6", "libgcc-s1", "libstdc++6"}
_PACKAGES = ("mesa-vulkan-drivers", "libvulkan1")
_NEEDED = ("libvulkan_lvp.so",)
"""Of the drivers, which are for all sorts of devices."""


def install(folder: Path) -> None:
    """Unpack into `folder`, unless it is there.

    Raises:
        SystemExit: no such machine, or a package that is not what the index says.
        OSError: the mirror cannot be reached.
    """
    if any(folder.glob("usr/share/vulkan/icd.d/lvp_icd*.json")):
        return
    if platform.system() != "Linux" or platform.machine() not in _MACHINES:
        raise SystemExit("Debian's lavapipe is for Linux on x86-64 or arm64; use the machine's own device.")
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    index = debian_packages.read_index(_MACHINES[platform.machine()], "bookworm", "bookworm-backports")
    debian_packages.unpack(index, debian_packages.closure(index, _PACKAGES, without=_MACHINES_OWN), part)
    for library in part.glob("usr/lib/*/libvulkan_*.so"):
        if library.name not in _NEEDED:
            library.unlink()
    # Some libraries lie in /lib, which on a merged system is /usr/lib.
    for library in [*part.glob("lib/*/*")]:
        place = part / "usr" / library.relative_to(part)
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.exists() and not place.is_symlink():
            library.rename(place)
    shutil.rmtree(part / "lib", ignore_errors=True)
    shutil.rmtree(part / "usr" / "share" / "doc", ignore_errors=True)
    drivers = part / "usr" / "share" / "vulkan" / "icd.d"
    for path in drivers.glob("*.json"):
        if not path.name.startswith("lvp_"):
            path.unlink()
            continue
        described = json.loads(path.read_text())
        library = next(part.glob("usr/lib/*/libvulkan_lvp.so"))
        # Read as from where the description lies, so the folder may move.
        described["ICD"]["library_path"] = "../../../" + library.relative_to(part / "usr").as_posix()
        path.write_text(json.dumps(described, indent=4))
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
