"""Runners in Node: onnxruntime-web, the WebAssembly build that browsers run, and in its older versions XNNPACK."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedOpsetsPass

from qgraph.errors import ExecutionError, UnprovedError, first_line
from qgraph.modelio import external_files, size_on_disk
from qgraph.runners.base import Ran, Runner, runners_folder
from qgraph.session import Feeds

__all__ = ["WASM", "XNNPACK", "NodeRunner"]

MEMORY = 4 << 30
"""Bytes that 32-bit WebAssembly can address, for the weights and all that is computed."""
INLINE = 2 << 30
"""Bytes that one file of protocol buffers can hold."""
_WORKER = Path(__file__).with_name("worker.mjs")


_OLD = ("Unrecognized attribute", "not in range", "is not a registered function/op", "No Op registered for")
"""How a runtime says that an operator is newer than itself."""


@dataclasses.dataclass(frozen=True)
class NodeRunner(Runner):
    """onnxruntime-web in Node.

    Attributes:
        name: what targets call it; also its folder under `runners_folder()`.
        provider: the execution provider that kernels are counted for.
        how: what runs there, in words.
        setup: the command that sets it up.
        backend: what onnxruntime-web calls the provider.
        version: the version of onnxruntime-web that it needs, or its beginning.
        newest_ir: the newest IR version that it reads.
        newest_opset: the newest opset that it knows.
        mounts: whether it takes external data; else the data is written into the model's file.
        external: (location in the model, file) of external data; `run` fills it in.
    """

    name: str
    provider: str
    how: str
    setup: str
    backend: str
    version: str
    newest_ir: int
    newest_opset: int
    mounts: bool
    external: tuple[tuple[str, str], ...] = ()

    @property
    def modules(self) -> Path:
        """The folder of its packages."""
        return runners_folder() / self.name / "node_modules"

    @property
    def missing(self) -> str | None:
        """What is not here that it needs, in words; None when it can run."""
        if shutil.which("node") is None:
            return "there is no `node` (20 or newer) on the PATH"
        package = self.modules / "onnxruntime-web" / "package.json"
        try:
            found = str(json.loads(package.read_text())["version"])
        except (OSError, ValueError, KeyError):
            return f"there is no onnxruntime-web in {str(self.modules)!r}"
        if not found.startswith(self.version):
            return f"{str(self.modules)!r} has onnxruntime-web {found}, and it takes {self.version}"
        return None

    def command(self, folder: Path) -> tuple[list[str], Mapping[str, str]]:
        """The command that does the job in `folder`, and what its environment has besides ours."""
        # Weights are read into JavaScript's memory before they go into that of WebAssembly.
        return [shutil.which("node") or "node", "--max-old-space-size=8192", str(_WORKER), str(folder)], {}

    def job(self, config: Mapping[str, str]) -> dict[str, Any]:
        """What the job says besides model and inputs."""
        return {
            "provider": self.provider,
            "backend": self.backend,
            "modules": str(self.modules.resolve()),
            "provider_options": {},
            "config": dict(config),
            "threads": 1,
            "level": "all",
            "external": [{"path": location, "file": file} for location, file in self.external],
        }

    def run(
        self,
        model: Path,
        feeds: Sequence[Feeds],
        *,
        config: Mapping[str, str] | None = None,
        seconds: float | None = None,
    ) -> Ran:
        """Run `model` on each of the feeds, in Node. See `Runner.run`.

        A model of a newer IR version, or one that names operator sets which it does not use, is run as a copy without
        them; the opset of its operators stays.

        Raises:
            UnprovedError: the model has a newer opset, or newer operators, than this runtime knows, or it takes too
                long.
            ExecutionError: the runner is not here, or its runtime refuses the model or crashes; or the model has more
                bytes than it takes.
        """
        if self.missing is not None:
            return super().run(model, feeds, config=config, seconds=seconds)  # which says so
        with tempfile.TemporaryDirectory(prefix=f"qgraph-{self.name}-model-") as name:
            path, external = self.readable(model, Path(name))
            able = dataclasses.replace(self, external=external)
            try:
                return super(NodeRunner, able).run(path, feeds, config=config, seconds=seconds)
            except ExecutionError as error:
                if any(word in str(error) for word in _OLD):
                    raise UnprovedError(f"it is too old for one of the model's operators. {error}") from error
                raise

    def readable(self, model: Path, folder: Path) -> tuple[Path, tuple[tuple[str, str], ...]]:
        """The model as this runtime can read it, and its external data as (location in the model, file).

        Args:
            model: a file; its external data lies beside it.
            folder: where to write a copy, if one is needed.

        Raises:
            ExecutionError: not a model, or one of a newer opset or with more bytes than the runtime takes.
        """
        try:
            graph = ir.load(model)
        except Exception as error:
            raise ExecutionError(f"{str(model)!r} is not a readable ONNX model: {first_line(error)}") from error
        opset = graph.opset_imports.get("", 0)
        if opset > self.newest_opset:
            raise UnprovedError(f"{self.how} knows opsets up to {self.newest_opset}, and the model has {opset}.")
        files = external_files(graph)
        lost = sorted(file.name for file in files if not file.is_file())
        if lost:
            raise ExecutionError(f"The data of {model.name}, {lost[0]!r}, is not beside it.")
        size = size_on_disk(model)
        inline = bool(files) and not self.mounts
        limit, why = (INLINE, "it takes one file, of less than") if inline else (MEMORY, "WebAssembly's memory ends at")
        if size >= limit:
            has = f"the model has {size / 2**30:.1f} GiB"
            raise ExecutionError(f"{self.how} cannot run {model.name}: {why} {limit >> 30} GiB, and {has}.")
        root = model.resolve().parent
        external = () if inline else tuple(sorted((file.relative_to(root).as_posix(), str(file)) for file in files))
        # Older runtimes refuse newer versions even of operator sets that no node is from.
        unused = bool(RemoveUnusedOpsetsPass()(graph).modified)
        if not (inline or unused or graph.ir_version > self.newest_ir):
            return model, external
        copy = folder / model.name
        graph.ir_version = min(graph.ir_version, self.newest_ir)
        if inline:
            ir.external_data.load_to_model(graph)
        ir.save(graph, copy)
        return copy, external


XNNPACK = NodeRunner(
    name="xnnpack",
    provider="XnnpackExecutionProvider",
    how="XNNPACK of onnxruntime-web 1.16.3 in Node",
    setup="python tools/set_up.py xnnpack",
    backend="xnnpack",
    version="1.16.3",
    newest_ir=9,
    newest_opset=19,
    mounts=False,
)
"""The last onnxruntime-web that has XNNPACK."""

WASM = NodeRunner(
    name="wasm",
    provider="CPUExecutionProvider",
    how="onnxruntime-web in Node",
    setup="python tools/set_up.py wasm",
    backend="wasm",
    version="1.",
    newest_ir=13,
    newest_opset=26,
    mounts=True,
)
"""The processor's kernels as WebAssembly has them, in every browser."""
