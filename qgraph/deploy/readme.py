"""The README.md of a deployed folder: what the manifest says, for people, and how to run the examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qgraph.deploy.examples import template
from qgraph.words import size

__all__ = ["write"]

_RUN = {
    "android": "Open `android/` in Android Studio and run it, or `gradle installDebug` there. The model and the sample "
    "are taken from the folders beside it; an emulator will do.",
    "ios": "On a Mac: `cd ios && swift run Example ..`. In an app, add the package `ios/`, add the folders `model` and "
    "`sample` as resources, and call `runSample` with their URLs.",
    "web": "`python3 -m http.server` here, then open http://localhost:8000/web/. The page takes onnxruntime-web from "
    "`web/ort/` if it lies there, else from the net.",
}


def write(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write README.md into `folder`, from the manifest without its files."""
    sample = manifest["sample"]
    fields = {
        "title": _cell(manifest["source"]),
        "source": _cell(manifest["source"]),
        "qgraph": manifest["qgraph"],
        "runtime": sample["runtime"].split()[1].rstrip(","),
        "facts": _rows(_facts(folder, manifest)),
        "tensors": _rows(_tensors(manifest)),
        "tolerance": f"{100 * sample['tolerance']:g} %",
        "sections": "\n".join(_sections(manifest)),
        "notes": "\n".join(["## Notes\n", *(f"- {note}" for note in manifest["notes"])]) if manifest["notes"] else "",
    }
    text = template("README.md", fields).rstrip() + "\n"
    (folder / "README.md").write_text(text, encoding="utf-8", errors="replace", newline="\n")


def _facts(folder: Path, manifest: Mapping[str, Any]) -> list[Sequence[str]]:
    weight = sum(
        file.stat().st_size for file in (folder / "model").rglob("*") if file.suffix not in (".ort", ".config")
    )
    opsets = ", ".join(f"{domain} {number}" for domain, number in manifest["opset"].items())
    return [
        ("model", f"`model/model.onnx`, {size(weight)}"),
        ("operators", f"{sum(manifest['operators'].values())} nodes of {len(manifest['operators'])} kinds"),
        ("opset", f"{opsets}; IR version {manifest['ir_version']}"),
        ("onnxruntime", f"{manifest['oldest onnxruntime']} or newer"),
        ("target", f"{manifest['target']['name']} ({manifest['target']['provider']})"),
        ("sample", f"{sample_from(manifest)}; expected outputs from {manifest['sample']['runtime']}"),
    ]


def sample_from(manifest: Mapping[str, Any]) -> str:
    """Where the sample came from."""
    return str(manifest["sample"]["from"])


def _tensors(manifest: Mapping[str, Any]) -> list[Sequence[str]]:
    rows: list[Sequence[str]] = []
    for kind, sampled in (("inputs", "inputs"), ("outputs", "expected")):
        shapes = {one["name"]: one["shape"] for one in manifest["sample"][sampled]}
        for one in manifest[kind]:
            free = "any" if one["shape"] is None else " x ".join("?" if d is None else str(d) for d in one["shape"])
            given = " x ".join(map(str, shapes.get(one["name"], []))) or "a scalar"
            rows.append((f"{kind[:-1]} `{_cell(one['name'])}`", str(one["type"]), _cell(free) or "a scalar", given))
    return rows


def _sections(manifest: Mapping[str, Any]) -> list[str]:
    found: list[str] = []
    if manifest["examples"]:
        found += ["## Examples", ""]
        for platform, one in manifest["examples"].items():
            options = ", ".join(f"`{k}` {v}" for k, v in one["options"].items()) or "the runtime's defaults"
            found += [f"**{platform}** runs on {one['provider']} ({options}), {one['package']} {one['version']}. "
                      f"{_RUN[platform]}", ""]  # fmt: skip
    if manifest["mobile usability"]:
        found += ["## Phones' accelerators", "", "What the runtime's static check says, by operators and shapes alone; "
                  "nothing was run on a phone:", "", "| | verdict | nodes taken | in groups | has no kernel for | with "
                  "fixed shapes |", "|---|---|---|---|---|---|"]  # fmt: skip
        for one in manifest["mobile usability"]:
            lacks = ", ".join(name.removeprefix("ai.onnx:") for name in one["unsupported"]) or "-"
            taken = f"{one['supported']} of {one['nodes']}"
            found.append(_row((one["provider"], one["verdict"], taken, one["partitions"], lacks, one["fixed"] or "-")))
        found.append("")
    if manifest.get("ort"):
        found += ["## Reduced builds", "", "The packages above read `model.onnx`. A build of the runtime with this "
                  "model's operators alone reads an .ort file; both give the numbers of the .onnx on the sample:", "",
                  "| | style | size | difference | build.py --include_ops_by_config | session options |",
                  "|---|---|---|---|---|---|"]  # fmt: skip
        for one in manifest["ort"]:
            entries = ", ".join(f"`{k}={v}`" for k, v in one["config"].items()) or "-"
            style = f"{one['style']}, level {one['level']}"
            row = (f"`{one['file']}`", style, size(one["bytes"]), f"{one['difference']:.1g}", f"`{one['operators']}`")
            found.append(_row((*row, entries)))
        found.append("")
    return found


def _rows(rows: Sequence[Sequence[object]]) -> str:
    return "\n".join(_row(row) for row in rows)


def _row(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _cell(text: str) -> str:
    """A name that breaks no table and no code."""
    return text.replace("|", "\\|").replace("`", "'").replace("\n", " ")
