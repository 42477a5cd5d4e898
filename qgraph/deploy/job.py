"""A folder that an application for phones or the web needs of a model, proved before it is handed over."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qgraph import data as sources
from qgraph import modelio, registry, shards
from qgraph.data import DataSource
from qgraph.deploy import examples as deploy_examples
from qgraph.deploy import ort as deploy_ort
from qgraph.deploy import readme as deploy_readme
from qgraph.deploy import reports
from qgraph.deploy import sample as deploy_sample
from qgraph.deploy.folder import move, refuse, seal
from qgraph.deploy.providers import PLATFORMS, Provider, provider_on
from qgraph.deploy.usability import Verdict, usability
from qgraph.deploy.versions import oldest_runtime
from qgraph.errors import ModelError, OptionError, unknown
from qgraph.session import HOST, Session, SessionOptions, runtime_version
from qgraph.synthetic import synthetic
from qgraph.words import size

__all__ = ["PLATFORMS", "Deployment", "deploy"]

_ONE_FILE = (1 << 31) - (1 << 20)
"""Most bytes of one ONNX file (protobuf's limit, less what the graph itself takes), and of an .ort file."""


@dataclasses.dataclass(frozen=True)
class Deployment:
    """What was written: the folder, its manifest as plain data, and what is worth knowing."""

    folder: Path
    manifest: dict[str, Any]
    notes: list[str]


def deploy(
    model: str | Path,
    folder: str | Path,
    *,
    target: str = "cpu",
    ort: bool = False,
    platforms: Sequence[str] = PLATFORMS,
    data: DataSource | None = None,
    report: str | Path | None = None,
    ort_web: str | Path | None = None,
    force: bool = False,
) -> Deployment:
    """Write a folder with the model, a sample with its expected result, examples that run it, and a manifest.

    Args:
        model: the file; `qgraph.optimize` wrote it, or anyone.
        folder: where; made, and moved into place when all in it was proved.
        target: name of the target; its provider is what the examples run on, where the platform has it.
        ort: add files in the runtime's own format, see `qgraph.deploy.ort`.
        platforms: what examples to write.
        data: its first sample travels along; without it, seeded numbers do.
        report: the report of `qgraph.optimize` about this very file, to copy along.
        ort_web: `onnxruntime-web` as npm installs it, or its `dist`, to copy beside the page, which then needs no net.
        force: replace a folder that was deployed before.

    Raises:
        OptionError: an unknown target or platform, a folder that is in the way, a file that is not there, a report
            of another model.
        ModelError: the model cannot be read or converted, or the folder not written.
        DataError: the data is not of this model.
        ExecutionError: the runtime cannot load or run the model.
        AccuracyError: a file in the runtime's format gives other numbers than the model.
    """
    model, folder = Path(model), Path(folder)
    for name in platforms:
        if name not in PLATFORMS:
            raise unknown("platform", name, PLATFORMS)
    wanted = registry.target(target).provider
    final = folder.resolve()
    refuse(final, folder, force, {"model": model, "data": data, "report": report, "copy of onnxruntime-web": ort_web})
    vendored = _vendored(Path(ort_web), provider_on("web", wanted)) if ort_web is not None else None
    loaded = modelio.read(model)
    if report is not None:
        reports.check(Path(report), model)
    if not final.parent.is_dir():
        raise ModelError(f"The folder {str(final.parent)!r} does not exist.")
    try:
        with tempfile.TemporaryDirectory(prefix=".qgraph-", dir=final.parent) as name:
            made = Path(name) / "made"
            scratch = Path(name) / "scratch"
            for one in (made, made / "model", made / "sample", scratch):
                one.mkdir()
            job = _Job(model, loaded, made, scratch, wanted, target)
            job.write(ort, [p for p in PLATFORMS if p in platforms], data, report, vendored)
            move(made, final, Path(name) / "previous")
    except OSError as error:
        raise ModelError(f"Cannot write {str(folder)!r}: {error.strerror or error}.") from error
    return Deployment(folder, job.manifest, job.notes)


def _vendored(folder: Path, provider: Provider) -> Path:
    names = deploy_examples.bundle(provider)
    for place in (folder, folder / "dist", folder / "node_modules" / "onnxruntime-web" / "dist"):
        if all((place / name).is_file() for name in names):
            return place
    raise OptionError(f"{str(folder)!r} is no copy of onnxruntime-web: it lacks {' or '.join(names)}.")


class _Job:
    """One deployment, as it is made."""

    def __init__(self, source: Path, model: ir.Model, folder: Path, scratch: Path, wanted: str, target: str):
        self.source, self.model, self.folder, self.scratch = source, model, folder, scratch
        self.wanted = wanted
        self.notes: list[str] = []
        self.manifest: dict[str, Any] = {"qgraph": metadata.version("qgraph"), "source": source.name}
        self.manifest["target"] = {"name": target, "provider": wanted}

    def write(
        self,
        ort: bool,
        platforms: Sequence[str],
        data: DataSource | None,
        report: str | Path | None,
        vendored: Path | None,
    ) -> None:
        """Everything, in the order in which one part needs another."""
        path, external = self._place()
        self._describe()
        feeds = self._feeds(data)
        with Session(path, SessionOptions()) as session:
            outputs = session.run(feeds)
        inputs = deploy_sample.write_tensors(self.folder / "sample", "input", feeds)
        expected = deploy_sample.write_tensors(self.folder / "sample", "expected", outputs)
        limit = deploy_sample.tolerance(self._types())
        self.manifest["sample"] = {
            "from": "the data given" if data is not None else "seeded random numbers",
            "runtime": f"onnxruntime {runtime_version()}, {HOST}",
            "inputs": [dataclasses.asdict(one) for one in inputs],
            "expected": [dataclasses.asdict(one) for one in expected],
            "tolerance": limit,
        }
        if data is None:
            self.notes.append("The sample is random numbers: with --data, one of yours travels along.")
        if ort:
            self._convert(path, external, feeds, outputs, limit)
        found = usability(path)
        if isinstance(found, str):
            self.notes.append(found)
        verdicts: list[Verdict] = [] if isinstance(found, str) else found
        self.manifest["mobile usability"] = [dataclasses.asdict(one) for one in verdicts]
        self._examples(platforms, [*inputs], [*expected], external, limit, vendored)
        if report is not None:
            suffix = Path(report).suffix or ".json"
            shutil.copyfile(report, self.folder / f"report{suffix}")
        self.manifest["notes"] = self.notes
        deploy_readme.write(self.folder, self.manifest)
        seal(self.folder, self.manifest)

    def _place(self) -> tuple[Path, list[str]]:
        """The model as `model/model.onnx`, in one file where it fits into one; names of files beside it otherwise."""
        path = self.folder / "model" / "model.onnx"
        stored = ir.load(self.source)
        files = modelio.external_files(stored)
        if not files:
            shutil.copyfile(self.source, path)
            return path, []
        if modelio.size_on_disk(self.source) < _ONE_FILE:
            ir.save(ir.external_data.load_to_model(stored), path)
            self.notes.append("The weights lay beside the model; here they are in its file.")
            return path, []
        root = self.source.parent.resolve()
        names = sorted(file.relative_to(root).as_posix() for file in files)
        for name in names:
            (path.parent / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / name, path.parent / name)
        shutil.copyfile(self.source, path)
        self.notes.append(
            f"The model exceeds 2 GB, the most that one file may hold: its weights stay beside it in "
            f"{', '.join(names)}. {_who_loads(max((root / name).stat().st_size for name in names))}"
        )
        return path, names

    def _describe(self) -> None:
        """What is in the model, and who can read it."""
        version, untried = oldest_runtime(self.model)
        imports = self.model.graph.opset_imports
        used = Counter(f"{node.domain or 'ai.onnx'}:{node.op_type}" for node in self.model.graph.all_nodes())
        values = [v for v in self.model.graph.inputs if v.name not in self.model.graph.initializers]
        self.manifest |= {
            "inputs": [_described(value) for value in values],
            "outputs": [_described(value) for value in self.model.graph.outputs],
            "ir_version": self.model.ir_version,
            "opset": {domain or "ai.onnx": number for domain, number in sorted(imports.items())},
            "operators": dict(sorted(used.items())),
            "oldest onnxruntime": version,
        }
        if untried:
            self.notes.append(f"It is not known here which onnxruntime was the first with {', '.join(untried)}.")

    def _feeds(self, data: DataSource | None) -> dict[str, NDArray[Any]]:
        if data is None:
            return next(iter(synthetic(self.model)))
        return next(iter(sources.load(data, sources.inputs_of(self.model)))).feeds

    def _types(self) -> set[str]:
        """Numpy's names of the types of weights, inputs and outputs."""
        graph = self.model.graph
        values = [*graph.inputs, *graph.outputs, *graph.initializers.values()]
        return {np.dtype(value.dtype.numpy()).name for value in values if value.dtype is not None}

    def _convert(
        self,
        path: Path,
        external: list[str],
        feeds: dict[str, NDArray[Any]],
        outputs: dict[str, NDArray[Any]],
        limit: float,
    ) -> None:
        if external:
            raise ModelError("The model exceeds 2 GB, which is more than an .ort file may hold. Deploy without --ort.")
        made = deploy_ort.convert(path, self.scratch, feeds, outputs, limit)
        self.manifest["ort"] = [dataclasses.asdict(one) for one in made]
        for one in made:
            if one.level != "all":
                self.notes.append(
                    f"The {one.style} .ort was made at level {one.level!r}, with {size(one.bytes)}: at level 'all', "
                    f"which widens weights to float32, it would have {size(one.sizes['all'])}."
                )

    def _examples(
        self,
        platforms: Sequence[str],
        inputs: list[deploy_sample.Tensor],
        outputs: list[deploy_sample.Tensor],
        external: list[str],
        limit: float,
        vendored: Path | None,
    ) -> None:
        written: dict[str, Any] = {}
        for platform in platforms:
            lacking = deploy_examples.missing_types(platform, [*inputs, *outputs])
            if lacking:
                self.notes.append(f"No example for {platform}: its package has no tensors of {', '.join(lacking)}.")
                continue
            provider = provider_on(platform, self.wanted)
            example = deploy_examples.Example(self.source.name, inputs, outputs, external, provider, limit)
            deploy_examples.write_example(platform, self.folder, example, vendored)
            written[platform] = {
                "provider": provider.name,
                "options": provider.options,
                "package": provider.package,
                "version": provider.version,
            }
            if provider.name.lower() != self.wanted.lower() and self.wanted != HOST:
                self.notes.append(f"{platform} has no {self.wanted}; its example runs on {provider.name}.")
            oldest = str(self.manifest["oldest onnxruntime"])
            if _numbers(provider.version) < _numbers(oldest):
                self.notes.append(
                    f"The model needs onnxruntime {oldest}, and the example for {platform} names "
                    f"{provider.version}, the newest known here: raise it."
                )
        self.manifest["examples"] = written


def _who_loads(largest: int) -> str:
    """What a size of files means for browsers and phones."""
    if largest > shards.WEB:
        return "Browsers load no file of that size: optimize with --max-shard-size 2GB. Many phones lack the memory."
    return "Each file is small enough for browsers, which have memory for 4 GB in all at most. Many phones have less."


def _described(value: ir.Value) -> dict[str, Any]:
    """Name, type as numpy calls it, and shape with free dimensions by name or null."""
    shape = None if value.shape is None else [d if isinstance(d, int) else d.value for d in value.shape]
    return {
        "name": value.name,
        "type": None if value.dtype is None else np.dtype(value.dtype.numpy()).name,
        "shape": shape,
    }


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])
