"""Runners in Python: providers that come as another build of onnxruntime, as a plugin, or for another processor."""

from __future__ import annotations

import dataclasses
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qgraph.errors import ExecutionError
from qgraph.runners import places
from qgraph.runners.base import Runner
from qgraph.runners.places import Interpreter

__all__ = ["PythonRunner", "runners"]

_QNN, _WEBGPU = "onnxruntime_qnn", "onnxruntime_ep_webgpu"
_ARM64 = ("aarch64", "arm64")
_WORKER = Path(__file__).with_name("worker.py")


@dataclasses.dataclass(frozen=True)
class PythonRunner(Runner):
    """onnxruntime in a Python process of its own.

    Its options are for `dataclasses.replace`: one that runs on one thread, say, or that refuses what the provider
    leaves to the CPU provider.

    Attributes:
        name: what targets call it, and the folder that it is set up in.
        provider: the execution provider.
        how: what runs there, in words.
        setup: the command that sets it up.
        package: the distribution that brings the provider, here or in a virtual environment of the runner's own; empty
            if there is no other place than this Python.
        plugin: its module, if the provider is a plugin library that onnxruntime loads.
        options: the provider's own options.
        config: session config entries.
        emulates: qemu's name of the arm64 processor to run on; empty for this machine's own.
        threads: intra-op threads; 0 is the runtime's choice.
        level: graph optimization, `none`, `basic` or `all`.
        strict: whether a node that the provider does not take is an error; else the CPU provider runs it.
    """

    name: str
    provider: str
    how: str
    setup: str
    package: str = ""
    plugin: str | None = None
    options: tuple[tuple[str, str], ...] = ()
    config: tuple[tuple[str, str], ...] = ()
    emulates: str = ""
    threads: int = 0
    level: str = "all"
    strict: bool = False

    @property
    def missing(self) -> str | None:
        """What is not here that it needs, in words; None when it can run. Starts nothing."""
        found = self._unfit() or self.interpreter()
        if isinstance(found, Interpreter) and self.plugin == _WEBGPU:
            device = places.vulkan()
            return device if isinstance(device, str) else None
        return found if isinstance(found, str) else None

    def _unfit(self) -> str | None:
        """Why this machine cannot run the provider at all."""
        if self.plugin != _QNN:
            return None
        if sys.platform != "linux" or platform.machine() != "x86_64":
            return "the simulator of Qualcomm's processor is for Linux on x86-64"
        if places.glibc() < (2, 35):
            version = ".".join(map(str, places.glibc())) or "another C library"
            return f"onnxruntime-qnn needs glibc 2.35 or newer, and here is {version}"
        return None

    def interpreter(self) -> Interpreter | str:
        """The Python that it runs in, or why there is none, in words."""
        # An arm64 machine is no cortex in particular, but it is what all else calls arm64.
        if self.emulates and not (self.name == "arm64" and platform.machine().lower() in _ARM64):
            return places.emulated("arm64", self.emulates)
        here = places.this(self.provider, self.package, self.plugin)
        if isinstance(here, Interpreter) or not self.package:
            return here
        there = places.own(self.name, self.package)
        return there if isinstance(there, Interpreter) else f"{here}, and {there}"

    def command(self, folder: Path) -> tuple[list[str], Mapping[str, str]]:
        """The command that does the job in `folder`, and what its environment has besides ours."""
        found = self.interpreter()
        if isinstance(found, str):
            raise ExecutionError(f"Cannot run on {self.provider}: {found}. Set it up: {self.setup}")
        environment = dict(found.environment)
        if self.plugin == _WEBGPU:
            device = places.vulkan()
            environment.update({} if isinstance(device, str) else device)
            if "XDG_RUNTIME_DIR" not in os.environ:  # A server has no session of a user's, and drivers complain.
                environment["XDG_RUNTIME_DIR"] = str(folder)
        return [*found.command, str(_WORKER), str(folder)], environment

    def job(self, config: Mapping[str, str]) -> dict[str, Any]:
        """What the job says besides model and inputs."""
        return {
            "provider": self.provider,
            "provider_options": dict(self.options),
            "plugin": self.plugin,
            "config": {**dict(self.config), **config},
            "threads": self.threads,
            "level": self.level,
            "strict": self.strict,
            "device": self._device(),
        }

    def _device(self) -> str | None:
        """What it runs on, where the runtime itself does not know that this is not the real thing."""
        if self.emulates and self.interpreter() == places.emulated("arm64", self.emulates):
            return f"an emulated {self.emulates}"
        if self.plugin == _WEBGPU:
            device = places.vulkan()
            return "Mesa's software device" if isinstance(device, Mapping) and device else None
        return "Qualcomm's simulator" if self.plugin == _QNN else None


def _set_up(name: str) -> str:
    return f"python tools/set_up.py {name}"


def _arm64(name: str, processor: str, what: str) -> PythonRunner:
    return PythonRunner(
        name=name,
        provider="CPUExecutionProvider",
        how=f"onnxruntime for arm64 on an emulated {processor} ({what})",
        setup=_set_up("arm64"),
        emulates=processor,
    )


def runners() -> tuple[PythonRunner, ...]:
    """All of them."""
    return (
        PythonRunner(
            name="openvino",
            provider="OpenVINOExecutionProvider",
            how="OpenVINO on the processor",
            setup=_set_up("openvino"),
            package="onnxruntime-openvino",
            options=(("device_type", "CPU"),),
        ),
        PythonRunner(
            name="qnn",
            provider="QNNExecutionProvider",
            how="Qualcomm's simulator of its HTP",
            setup=_set_up("qnn"),
            package="onnxruntime-qnn",
            plugin=_QNN,
            # The model of the chip is pinned: without one the simulator is of an old chip that lacks much.
            options=(("backend_path", "libQnnHtp.so"), ("soc_model", "57")),
        ),
        PythonRunner(
            name="webgpu",
            provider="WebGpuExecutionProvider",
            how="WebGPU",
            setup=_set_up("webgpu"),
            package="onnxruntime-ep-webgpu",
            plugin=_WEBGPU,
        ),
        _arm64("arm64", "cortex-a76", "products of bytes and fp16"),
        _arm64("arm64-a53", "cortex-a53", "neither products of bytes nor fp16"),
        _arm64("arm64-a710", "cortex-a710", "products of bytes, of matrices of bytes, and fp16"),
        PythonRunner(
            name="cuda",
            provider="CUDAExecutionProvider",
            how="CUDA on this machine's GPU",
            setup="pip install onnxruntime-gpu in place of onnxruntime",
        ),
        PythonRunner(
            name="tensorrt",
            provider="TensorrtExecutionProvider",
            how="TensorRT on this machine's GPU",
            setup="pip install onnxruntime-gpu in place of onnxruntime, and tensorrt",
        ),
    )
