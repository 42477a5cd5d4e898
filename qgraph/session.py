"""One ONNX Runtime session, and nothing else that touches the runtime's API.

Sessions are made from a file, or from an IR whose external tensors stay where they are on disk. Idle sessions' worker
threads spin, so callers keep at most one session alive at a time; `Session` is a context manager for that.
"""

# The runtime ships no type information.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray
from typing_extensions import Self

from qgraph.brain_floats import BRAIN, given, numbers
from qgraph.complaints import complaint
from qgraph.errors import ExecutionError
from qgraph.external import float_quantizers
from qgraph.narrowing import narrowed

__all__ = [
    "HOST",
    "Feeds",
    "KernelTime",
    "Session",
    "SessionOptions",
    "has_provider",
    "max_ir_version",
    "runtime_version",
]

Feeds: TypeAlias = Mapping[str, NDArray[Any]]

HOST = "CPUExecutionProvider"
"""The provider that every runtime has."""
_DEVICES = {"CUDAExecutionProvider": "cuda", "TensorrtExecutionProvider": "cuda"}
"""Where the values of a provider lie, if not in the host's memory."""
_LEVELS = {
    "none": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}


@dataclasses.dataclass(frozen=True)
class SessionOptions:
    """How a session is made.

    Attributes:
        providers: execution providers, in order of preference; a missing one is an error, never a silent fallback.
        threads: intra-op threads; 0 is the runtime's choice (all cores).
        level: graph optimization, `none`, `basic` or `all`.
        config: further session config entries.
        profile: file prefix for a profile; None for no profiling.
        optimized: where to write the graph as the runtime has optimized it; None not to.
    """

    providers: tuple[str, ...] = (HOST,)
    threads: int = 0
    level: str = "all"
    config: tuple[tuple[str, str], ...] = ()
    profile: str | None = None
    optimized: Path | None = None

    def native(self) -> Any:
        """The runtime's own options object."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.graph_optimization_level = _LEVELS[self.level]
        options.log_severity_level = 4
        for key, value in self.config:
            options.add_session_config_entry(key, value)
        if self.profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = self.profile
        if self.optimized is not None:
            options.optimized_model_filepath = str(self.optimized)
            options.add_session_config_entry(
                "session.optimized_model_external_initializers_file_name", self.optimized.name + ".data"
            )
            options.add_session_config_entry(
                "session.optimized_model_external_initializers_min_size_in_bytes", str(1 << 20)
            )
        return options


@dataclasses.dataclass(frozen=True)
class KernelTime:
    """Time of one node as the runtime ran it.

    Attributes:
        node: name in the runtime's optimized graph.
        op_type: operator of the kernel.
        seconds: median over the runs.
        provider: execution provider that ran it.
        inputs: shapes that it read, constants included.
        outputs: shapes that it wrote.
    """

    node: str
    op_type: str
    seconds: float
    provider: str = ""
    inputs: tuple[tuple[int, ...], ...] = ()
    outputs: tuple[tuple[int, ...], ...] = ()


class Session:
    """A loaded model. Use as a context manager; `close` frees the runtime's memory."""

    def __init__(self, model: Path | ir.Model, options: SessionOptions | None = None, folder: Path | None = None):
        """Load.

        Args:
            model: a file, or an IR to be serialized without its external tensors.
            options: see `SessionOptions`.
            folder: where the external tensors of an IR lie.

        Raises:
            ExecutionError: the runtime refuses the model; carries the runtime's own words.
        """
        self._options = options or SessionOptions()
        if _DEVICES.get(self._options.providers[0]) == "cuda" and hasattr(ort, "preload_dlls"):
            # CUDA's libraries may have come as packages of their own, which no loader's path names.
            ort.preload_dlls()
        missing = set(self._options.providers) - set(ort.get_available_providers())
        if missing:
            raise ExecutionError(f"The installed onnxruntime {ort.__version__} has no provider {sorted(missing)}.")
        native = self._options.native()
        try:
            if isinstance(model, Path):
                source: str | bytes = str(model)
            else:
                if folder is not None:
                    native.add_session_config_entry(
                        "session.model_external_initializers_file_folder_path", str(folder.resolve())
                    )
                source = ir.to_proto(narrowed(model)).SerializeToString()
            if self._options.level == "all" and self._options.providers[0] == HOST and _wrongly_rewritten(model):
                native.graph_optimization_level = _LEVELS["basic"]
            self._session: Any = ort.InferenceSession(
                source, native, providers=list(self._options.providers), enable_fallback=0
            )
        except ExecutionError:
            raise
        except Exception as error:
            what = model.name if isinstance(model, Path) else f"graph {model.graph.name!r}"
            raise ExecutionError(f"onnxruntime {ort.__version__} cannot load {what}: {complaint(error)}") from error
        self.outputs: list[str] = [o.name for o in self._session.get_outputs()]
        self.inputs: dict[str, str] = {i.name: i.type for i in self._session.get_inputs()}
        self._brain = any(one.type == BRAIN for one in (*self._session.get_inputs(), *self._session.get_outputs()))

    def run(self, feeds: Feeds, outputs: Sequence[str] | None = None) -> dict[str, NDArray[Any]]:
        """Outputs by name (all of them unless chosen).

        Raises:
            ExecutionError: the run failed; carries the runtime's words and the feeds' shapes.
        """
        names = list(outputs) if outputs is not None else self.outputs
        try:
            if self._brain:
                results = [numbers(one) for one in self._session.run_with_ort_values(names, given(feeds, self.inputs))]
            else:
                results = self._session.run(names, dict(feeds))
        except Exception as error:
            shapes = ", ".join(f"{k} {v.dtype}{list(v.shape)}" for k, v in feeds.items()) or "nothing"
            raise ExecutionError(f"onnxruntime cannot run the model on {shapes}: {complaint(error)}") from error
        return dict(zip(names, results, strict=True))

    def call(self, feeds: Feeds) -> None:
        """Run and drop the results: the least overhead around a measurement."""
        if self._brain:
            self._session.run_with_ort_values(None, given(feeds, self.inputs))
        else:
            self._session.run(None, feeds)

    def caller(self, feeds: Feeds) -> Callable[[], None]:
        """A run for the clock. On a device with memory of its own, inputs lie there and outputs stay there."""
        device = _DEVICES.get(self._options.providers[0])
        if device is None:
            return lambda: self.call(feeds)
        binding = self._session.io_binding()
        for name, array in feeds.items():
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), device, 0))
        for name in self.outputs:
            binding.bind_output(name, device)
        binding.synchronize_inputs()

        def run() -> None:
            self._session.run_with_iobinding(binding)
            binding.synchronize_outputs()

        return run

    def types(self) -> dict[str, tuple[str, list[int | str | None]]]:
        """Type in the runtime's words, as `tensor(float)`, and shape of outputs, free dimensions by name or None."""
        return {one.name: (one.type, list(one.shape)) for one in self._session.get_outputs()}

    def profile(self) -> list[KernelTime]:
        """End profiling and return each node's median time, in order of first execution."""
        path = Path(self._session.end_profiling())
        events = json.loads(path.read_text())
        path.unlink()
        times: dict[tuple[str, str, str], list[float]] = {}
        shapes: dict[tuple[str, str, str], list[tuple[tuple[int, ...], ...]]] = {}
        for event in events:
            name, args = event.get("name", ""), event.get("args", {})
            if event.get("cat") == "Node" and name.endswith("_kernel_time"):
                key = (name.removesuffix("_kernel_time"), args.get("op_name", ""), args.get("provider", ""))
                times.setdefault(key, []).append(event["dur"] * 1e-6)
                shapes[key] = [_shapes(args.get(side)) for side in ("input_type_shape", "output_type_shape")]
        return [
            KernelTime(node, op, float(np.median(seen)), where, *shapes[node, op, where])
            for (node, op, where), seen in times.items()
        ]

    def close(self) -> None:
        """Free the session."""
        self._session = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _wrongly_rewritten(model: Path | ir.Model) -> bool:
    """Whether the CPU provider's own rewriting of `model` would go wrong.

    Beyond the level `basic` it drops a Relu before a quantizer of fp8, as if its codes ended at 0 (up to 1.32.0, by
    ReluQuantRewrite), and up to 1.31 it fuses such quantizers into operators that refuse them.
    """
    try:
        return float_quantizers(model)
    except Exception:  # What is no model, the runtime says better.
        return False


def _shapes(told: Any) -> tuple[tuple[int, ...], ...]:
    """Shapes as a profile tells them: [{type: sizes}, ...]."""
    return tuple(tuple(int(size) for size in sizes) for one in told or () for sizes in one.values())


def has_provider(name: str) -> bool:
    """Whether the installed runtime has this execution provider."""
    return name in ort.get_available_providers()


def runtime_version() -> str:
    """Version of the installed runtime."""
    return str(ort.__version__)


@functools.cache
def max_ir_version() -> int:
    """The newest IR version that the installed runtime reads, found by trying."""
    value = ir.val("x", ir.DataType.FLOAT, [1])
    node = ir.node("Identity", [value])
    node.outputs[0].name = "y"
    node.outputs[0].type, node.outputs[0].shape = value.type, value.shape
    graph = ir.Graph([value], list(node.outputs), nodes=[node], opset_imports={"": 17}, name="probe")
    for version in range(20, 3, -1):
        try:
            Session(ir.Model(graph, ir_version=version)).close()
        except ExecutionError:
            continue
        return version
    raise ExecutionError("The installed onnxruntime reads no IR version from 4 to 20.")
