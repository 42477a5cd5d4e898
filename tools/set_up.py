"""Sets up runners: runtimes of other providers and processors, each in a folder, nothing of it system-wide.

    python tools/set_up.py --list
    python tools/set_up.py openvino qnn webgpu arm64 xnnpack wasm

They go to $QGRAPH_RUNNERS, or to the user's cache. What is there already is left as it is, and each is proved by a tiny
model.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import set_up_arm64
import set_up_node
import set_up_python
import set_up_vulkan

from qgraph.errors import ExecutionError, unknown
from qgraph.runners import RUNNERS, Runner
from qgraph.runners.base import runners_folder
from qgraph.session import Session

__all__ = ["SET_UPS", "prove", "set_up"]

_ORT = "onnxruntime==1.31.1"
_PROBE = """<ir_version: 8, opset_import: ["" : 17]>
probe (float[1, 4, 8, 8] x) => (float[1, 6, 8, 8] y) <float[6, 4, 3, 3] w = {WEIGHTS}>
{ y = Conv <pads = [1, 1, 1, 1]> (x, w) }"""
_ALLOWED = 5e-3
"""Of the largest output: some compute float in fewer bits."""


def _openvino(folder: Path) -> None:
    set_up_python.install(folder / "openvino", ["onnxruntime-openvino==1.24.1"])


def _qnn(folder: Path) -> None:
    set_up_python.install(folder / "qnn", [_ORT, "onnxruntime-qnn==2.7.0"])


def _webgpu(folder: Path) -> None:
    set_up_python.install(folder / "webgpu", [_ORT, "onnxruntime-ep-webgpu==0.4.0"])
    if platform.system() == "Linux":
        set_up_vulkan.install(folder / "vulkan")


def _arm64(folder: Path) -> None:
    set_up_arm64.install(folder / "arm64")


def _xnnpack(folder: Path) -> None:
    _node(folder, "xnnpack")


def _wasm(folder: Path) -> None:
    _node(folder, "wasm")


def _node(folder: Path, name: str) -> None:
    set_up_node.install(folder / name, name)


SET_UPS: dict[str, Callable[[Path], None]] = {
    "openvino": _openvino,
    "qnn": _qnn,
    "webgpu": _webgpu,
    "arm64": _arm64,
    "xnnpack": _xnnpack,
    "wasm": _wasm,
}
"""Runner -> what puts it into the folder of the runners."""


def set_up(name: str, folder: Path) -> None:
    """Set one up unless it is there, and prove it.

    Raises:
        SystemExit: it cannot be had on this machine, in words.
        ExecutionError: it was set up, and does not run.
    """
    begin = time.monotonic()
    if RUNNERS[name].missing is not None:
        print(f"{name}: into {folder} ...", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        SET_UPS[name](folder)
    print(f"{name}: {prove(RUNNERS[name])}, {time.monotonic() - begin:.0f} s", flush=True)


def prove(runner: Runner) -> str:
    """Run a convolution and compare it with the CPU provider's.

    Raises:
        ExecutionError: it cannot be run, or its numbers are wrong.
    """
    random = np.random.default_rng(0)
    weights = ", ".join(f"{one:.4f}" for one in random.normal(size=6 * 4 * 3 * 3))
    model = ir.from_onnx_text(_PROBE.replace("WEIGHTS", weights))
    feeds = {"x": random.normal(size=(1, 4, 8, 8)).astype(np.float32)}
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "probe.onnx"
        ir.save(model, path)
        ran = runner.run(path, [feeds])
        with Session(path) as session:
            expected = session.run(feeds)["y"]
    error = float(np.abs(ran.outputs[0]["y"] - expected).max() / np.abs(expected).max())
    taken = sorted({kernel.provider for kernel in ran.kernels})
    if error > _ALLOWED or runner.provider not in taken:
        raise ExecutionError(f"{runner.how} does not work: {' and '.join(taken)} ran, with an error of {error:.1g}.")
    return f"{ran.runtime} runs (error {error:.0e})"


def _list() -> None:
    print(f"In {runners_folder()}:")
    for name, runner in RUNNERS.items():
        print(f"  {name:<12}{'here' if runner.missing is None else 'missing: ' + runner.missing}")


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(SET_UPS))
    parser.add_argument("--list", action="store_true", help="what is here and what is missing")
    arguments = parser.parse_args()
    for name in arguments.names:
        if name not in SET_UPS:
            parser.error(str(unknown("runner", name, SET_UPS)))
    if arguments.list or not arguments.names:
        _list()
    done = [_tried(name) for name in arguments.names]
    return int(not all(done))


def _tried(name: str) -> bool:
    try:
        set_up(name, runners_folder())
    except (SystemExit, ExecutionError, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
