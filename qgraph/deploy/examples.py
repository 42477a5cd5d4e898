"""Examples for Android, iOS and the web: plain string templates, filled in with a model's inputs and provider."""

from __future__ import annotations

import dataclasses
import json
import string
from collections.abc import Sequence
from pathlib import Path

from qgraph.deploy.providers import Provider
from qgraph.deploy.sample import Tensor

__all__ = ["Example", "bundle", "missing_types", "template", "write_example"]

_KOTLIN = {
    "float32": "FLOAT", "float64": "DOUBLE", "float16": "FLOAT16", "bool": "BOOL",
    **{f"int{bits}": f"INT{bits}" for bits in (8, 16, 32, 64)}, "uint8": "UINT8",
}  # fmt: skip
_SWIFT = {
    "float32": ".float", "int8": ".int8", "uint8": ".uInt8", "int32": ".int32", "uint32": ".uInt32", "int64": ".int64",
    "uint64": ".uInt64",
}  # fmt: skip
_SCRIPT = (
    {"float16", "float32", "float64", "bool"}
    | {f"int{b}" for b in (8, 16, 32, 64)}
    | {f"uint{b}" for b in (8, 16, 32, 64)}
)
_TYPES = {"android": set(_KOTLIN), "ios": set(_SWIFT), "web": _SCRIPT}
_BUNDLES = {
    "wasm": ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"),
    "WebGpuExecutionProvider": ("ort.webgpu.bundle.min.mjs", "ort-wasm-simd-threaded.asyncify.wasm"),
}
"""What the page loads of onnxruntime-web: the script, and what that loads."""


class _Template(string.Template):
    """`@@{name}`, since Kotlin, Swift and JavaScript have their own uses of a dollar."""

    delimiter = "@@"


@dataclasses.dataclass(frozen=True)
class Example:
    """What an example is made of.

    Attributes:
        name: what the user calls the model.
        inputs: of the sample.
        outputs: of the sample.
        external: files beside model.onnx that hold its weights.
        provider: what it runs on.
        tolerance: what the result may differ by, see `qgraph.deploy.sample.difference`.
    """

    name: str
    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]
    external: Sequence[str]
    provider: Provider
    tolerance: float


def missing_types(platform: str, tensors: Sequence[Tensor]) -> list[str]:
    """Types among those of `tensors` that the platform's package cannot take or give."""
    return sorted({tensor.type for tensor in tensors} - _TYPES[platform])


def write_example(platform: str, folder: Path, example: Example, vendored: Path | None = None) -> None:
    """Write the example for a platform into a folder of that name.

    Args:
        platform: "android", "ios" or "web".
        folder: where; it holds `model` and `sample`.
        example: what it is filled with.
        vendored: folder with the files of onnxruntime-web's `dist`, to copy beside the page.
    """
    fields = {"android": _android, "ios": _ios, "web": _web}[platform](example)
    _fill(_root() / platform, folder / platform, fields)
    if platform == "web" and vendored is not None:
        (folder / "web" / "ort").mkdir()
        for name in _BUNDLES[example.provider.name]:
            (folder / "web" / "ort" / name).write_bytes((vendored / name).read_bytes())


def bundle(provider: Provider) -> tuple[str, ...]:
    """Files of onnxruntime-web that a page with this provider needs."""
    return _BUNDLES[provider.name]


def template(name: str, fields: dict[str, str]) -> str:
    """One template, filled in."""
    return _Template((_root() / name).read_text(encoding="utf-8")).substitute(fields)


def _root() -> Path:
    return Path(__file__).parents[1] / "templates" / "deploy"


def _fill(source: Path, folder: Path, fields: dict[str, str]) -> None:
    folder.mkdir()
    for one in sorted(source.iterdir(), key=lambda entry: entry.name):
        if one.is_dir():
            _fill(one, folder / one.name, fields)
        else:
            text = _Template(one.read_text(encoding="utf-8")).substitute(fields)
            (folder / one.name).write_text(text, encoding="utf-8", newline="\n")


def _kotlin(text: str) -> str:
    """A literal; a dollar would begin a template."""
    return json.dumps(text).replace("$", "\\$")


def _swift(text: str) -> str:
    """A literal; what would end or break it is escaped, and any other character may stand as it is."""
    odd = {'"': '\\"', "\\": "\\\\"}
    return '"' + "".join(odd.get(c) or (c if c.isprintable() else f"\\u{{{ord(c):x}}}") for c in text) + '"'


def _android(example: Example) -> dict[str, str]:
    def listed(tensors: Sequence[Tensor]) -> str:
        return "\n".join(
            f"    Tensor({_kotlin(t.name)}, OnnxJavaType.{_KOTLIN[t.type]}, "
            f"longArrayOf({', '.join(map(str, t.shape))}), {_kotlin(_base(t))}),"
            for t in tensors
        )

    files = ["model.onnx", *example.external, *(_base(t) for t in (*example.inputs, *example.outputs))]
    native = '\n        <uses-native-library android:name="libcdsprpc.so" android:required="false" />'
    return {
        "inputs": listed(example.inputs),
        "outputs": listed(example.outputs),
        "files": ", ".join(map(_kotlin, files)),
        "tolerance": repr(example.tolerance),
        "provider": _runs_on(example.provider),
        "code": _indented(example.provider.code),
        "package": json.dumps(f"{example.provider.package}:{example.provider.version}"),
        "libraries": native if example.provider.name == "QNNExecutionProvider" else "",
    }


def _ios(example: Example) -> dict[str, str]:
    def listed(tensors: Sequence[Tensor]) -> str:
        return "\n".join(
            f"    Tensor(name: {_swift(t.name)}, type: {_SWIFT[t.type]}, shape: {t.shape}, file: {_swift(_base(t))}),"
            for t in tensors
        )

    return {
        "inputs": listed(example.inputs),
        "outputs": listed(example.outputs),
        "tolerance": repr(example.tolerance),
        "provider": _runs_on(example.provider),
        "code": _indented(example.provider.code),
        "package": json.dumps(example.provider.package),
        "version": json.dumps(example.provider.version),
    }


def _web(example: Example) -> dict[str, str]:
    keys = ("name", "type", "shape", "file")

    def listed(tensors: Sequence[Tensor]) -> str:
        return "[\n" + "".join(f"  {json.dumps({key: getattr(t, key) for key in keys})},\n" for t in tensors) + "]"

    return {
        "title": json.dumps(example.name),
        "name": json.dumps(example.name),
        "model": json.dumps("../model/model.onnx"),
        "external": json.dumps(list(example.external)),
        "providers": ", ".join(example.provider.code),
        "inputs": listed(example.inputs),
        "outputs": listed(example.outputs),
        "tolerance": repr(example.tolerance),
        "file": json.dumps(_BUNDLES[example.provider.name][0]),
        "version": json.dumps(example.provider.version),
    }


def _base(tensor: Tensor) -> str:
    return tensor.file.rpartition("/")[2]


def _indented(lines: Sequence[str]) -> str:
    return "".join(f"    {line}\n" for line in lines)


def _runs_on(provider: Provider) -> str:
    """The provider and its options, in words."""
    options = ", ".join(f"{name} {value}" for name, value in provider.options.items())
    return provider.name + (f" ({options})" if options else " with the runtime's defaults")
