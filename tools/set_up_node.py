"""Set up the runners that run in Node: python tools/set_up_node.py [xnnpack] [wasm].

Takes onnxruntime-web from npm, by npm itself, without running any package's scripts. Needs `node` (20 or newer) and
`npm` on the PATH, and no rights of an administrator.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from qgraph.runners.base import runners_folder

VERSIONS = {
    "xnnpack": "1.16.3",  # The last release that has XNNPACK.
    "wasm": "1.30.0",
}


def installed(folder: Path) -> str | None:
    """The version of onnxruntime-web in `folder`, None when it has none."""
    try:
        return str(json.loads((folder / "node_modules" / "onnxruntime-web" / "package.json").read_text())["version"])
    except (OSError, ValueError, KeyError):
        return None


def install(folder: Path, name: str) -> None:
    """Put onnxruntime-web into `folder`, in place of what is there unless that is it already.

    Args:
        folder: the folder of the runner; its parent is made if need be.
        name: `xnnpack` or `wasm`.

    Raises:
        SystemExit: Node or npm is not here, or npm fails; `folder` stays as it was.
    """
    version = VERSIONS[name]
    if installed(folder) == version:
        print(f"{name}: onnxruntime-web {version} is in {folder} already.")
        return
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        raise SystemExit(f"{name} needs `node` (20 or newer) and `npm` on the PATH. Debian: apt install nodejs npm")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder.parent) as workspace:
        new = Path(workspace) / name
        new.mkdir()
        quiet = ("--ignore-scripts", "--no-audit", "--no-fund", "--no-update-notifier", "--loglevel=error")
        done = subprocess.run([npm, "install", "--prefix", str(new), *quiet, f"onnxruntime-web@{version}"], check=False)
        if done.returncode != 0 or installed(new) != version:
            raise SystemExit(f"npm could not install onnxruntime-web {version} (exit code {done.returncode}).")
        # Not needed to run, and a good part of the size.
        for unneeded in new.glob("node_modules/onnxruntime-web/dist/*.map"):
            unneeded.unlink()
        if folder.exists():
            shutil.rmtree(folder)
        new.rename(folder)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{name}: onnxruntime-web {version} is in {folder} ({size / 2**20:.0f} MiB).")


def main() -> None:
    """Set up what is named, or all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{' or '.join(VERSIONS)}; all without one")
    names = parser.parse_args().names or list(VERSIONS)
    unknown = sorted(set(names) - set(VERSIONS))
    if unknown:
        raise SystemExit(f"There is no runner {unknown[0]!r} here. They are {', '.join(VERSIONS)}.")
    for name in names:
        install(runners_folder() / name, name)


if __name__ == "__main__":
    sys.exit(main())
