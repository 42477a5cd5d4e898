"""Runs one job with onnxruntime in whatever interpreter is given this file; knows nothing of qgraph.

It needs Python 3.9 or newer, numpy and onnxruntime. The folder of the job is its only argument; base.py says what lies
there. A model that the runtime refuses is an answer (`error`), not a failure of this script.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

if sys.path and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    del sys.path[0]  # Our neighbours are no modules of this interpreter.

import numpy as np
import onnxruntime as ort

__all__ = ["main"]

CPU = "CPUExecutionProvider"
# Numbers of onnx.TensorProto for types that numpy lacks, and an integer as wide. Two or four of an int4 or int2 lie in
# a byte there; here as in ml_dtypes each has its own.
RARE = {
    "bfloat16": (16, "uint16"),
    "float8_e4m3fn": (17, "uint8"),
    "float8_e4m3fnuz": (18, "uint8"),
    "float8_e5m2": (19, "uint8"),
    "float8_e5m2fnuz": (20, "uint8"),
    "uint4": (21, "uint8"),
    "int4": (22, "int8"),
    "float4_e2m1fn": (23, "uint8"),
    "uint2": (25, "uint8"),
    "int2": (26, "int8"),
}
BITS = {"uint4": 4, "int4": 4, "float4_e2m1fn": 4, "uint2": 2, "int2": 2}
# What the runtime calls the types whose names in numpy are others.
NAMES = {"float": "float32", "double": "float64", "float8e4m3fn": "float8_e4m3fn", "float8e5m2": "float8_e5m2"}
NAMES.update({"float8e4m3fnuz": "float8_e4m3fnuz", "float8e5m2fnuz": "float8_e5m2fnuz", "float4e2m1": "float4_e2m1fn"})


def main(folder: Path) -> None:
    """Read the job, do it, write the result."""
    job = json.loads((folder / "job.json").read_text())
    result: dict[str, Any] = {"runtime": runtime(job)}
    try:
        work(folder, job, result)
    except Exception as error:
        result["error"] = words(error)
    (folder / "result.json").write_text(json.dumps(result))


def work(folder: Path, job: dict[str, Any], result: dict[str, Any]) -> None:
    """Run all samples; what is found goes into `result` and outputs.bin."""
    session = open_session(folder, job, result)
    data = np.memmap(folder / "inputs.bin", np.uint8, "r") if (folder / "inputs.bin").stat().st_size else b""
    kinds = [one.type for one in session.get_inputs()] + [one.type for one in session.get_outputs()]
    strange = sorted({kind for kind in kinds if not kind.startswith("tensor(") or kind == "tensor(string)"})
    if strange:
        raise ValueError(f"This runner passes tensors of numbers only, not {', '.join(strange)}.")
    rare = any(name_of(kind) in RARE for kind in kinds)
    run = run_rare if rare else run_plain
    result["outputs"] = []
    with (folder / "outputs.bin").open("wb") as file:
        for sample in job["samples"]:
            found = run(session, sample, data)
            result["outputs"].append([put(file, *one) for one in found])
    result["assigned"] = assigned(session)
    result["kernels"] = kernels(Path(session.end_profiling()))


def open_session(folder: Path, job: dict[str, Any], result: dict[str, Any]) -> Any:
    """A session on the job's provider, which leaves the rest to the CPU's; adds the device to `runtime`."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = int(job.get("threads") or 0)
    options.inter_op_num_threads = 1
    level = {"none": "ORT_DISABLE_ALL", "basic": "ORT_ENABLE_BASIC", "all": "ORT_ENABLE_ALL"}[job.get("level") or "all"]
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    options.log_severity_level = 4
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    entries = {"session.record_ep_graph_assignment_info": "1", **job.get("config", {})}
    provider, settings = job["provider"], dict(job.get("provider_options") or {})
    if job.get("strict") and provider != CPU:  # which falls back to none
        entries["session.disable_cpu_ep_fallback"] = "1"
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    if job.get("plugin"):
        device = find_device(job["plugin"], provider)
        result["runtime"] += f" on {job.get('device') or device_words(device)}"
        options.add_provider_for_devices([device], settings)
        return ort.InferenceSession(job["model"], options, enable_fallback=0)
    if provider not in ort.get_available_providers():
        raise ValueError(f"onnxruntime {ort.__version__} here has no {provider}.")
    if provider in ("CUDAExecutionProvider", "TensorrtExecutionProvider") and hasattr(ort, "preload_dlls"):
        ort.preload_dlls()  # CUDA's libraries may have come as packages of their own, which no loader's path names.
    session = ort.InferenceSession(job["model"], options, providers=[(provider, settings)], enable_fallback=0)
    if provider not in session.get_providers():
        raise ValueError(f"onnxruntime {ort.__version__} here cannot start {provider}.")
    return session


def find_device(plugin: str, provider: str) -> Any:
    """The first device that the plugin's provider offers, as it sorts them itself."""
    module = importlib.import_module(plugin)
    ort.register_execution_provider_library(provider, module.get_library_path())
    found = [device for device in ort.get_ep_devices() if device.ep_name == provider]
    if not found:
        raise ValueError(f"{provider} finds no device here that it can run on.")
    return found[0]


def device_words(device: Any) -> str:
    """What a plugin says of its device."""
    hardware = device.device
    known = dict(hardware.metadata)
    return str(known.get("Description") or f"{hardware.vendor} {str(hardware.type).rsplit('.', 1)[-1]}")


def runtime(job: dict[str, Any]) -> str:
    """What runs and its version; a plugin's device is added when it is known."""
    plugin, found = job.get("plugin"), f"{job['provider']} of onnxruntime {ort.__version__}"
    if not plugin:
        return f"{found} on {job.get('device') or platform.machine()}"
    package = plugin.replace("_", "-")
    try:
        return f"{found} with {package} {version(package)}"
    except PackageNotFoundError:
        return f"{found} with {package}"


def name_of(kind: str) -> str:
    """numpy's name for a type in the runtime's words, as `tensor(float)`."""
    inner = kind[len("tensor(") : -1]
    return NAMES.get(inner, inner)


def get(data: Any, one: dict[str, Any], dtype: str) -> Any:
    """A tensor of the inputs, as numbers of this type."""
    width = np.dtype(dtype)
    count = one["bytes"] // width.itemsize
    if not count:
        return np.zeros(one["shape"], width)
    return np.frombuffer(data, width, count, one["offset"]).reshape(one["shape"])


def put(file: Any, name: str, dtype: str, array: Any) -> dict[str, Any]:
    """Append a tensor; says where it lies."""
    file.write(b"\0" * (-file.tell() % 16))
    whole = np.ascontiguousarray(array)
    offset = file.tell()
    file.write(whole.tobytes())
    return {"name": name, "dtype": dtype, "shape": list(array.shape), "offset": offset, "bytes": whole.nbytes}


def run_plain(session: Any, sample: list[dict[str, Any]], data: Any) -> list[tuple[str, str, Any]]:
    """Name, type and numbers of each output."""
    feeds = {one["name"]: get(data, one, one["dtype"]) for one in sample}
    results = session.run(None, feeds)
    return [(one.name, name_of(one.type), results[i]) for i, one in enumerate(session.get_outputs())]


def run_rare(session: Any, sample: list[dict[str, Any]], data: Any) -> list[tuple[str, str, Any]]:
    """With types that numpy lacks, which pass as bytes of the runtime's own values."""
    feeds = {one["name"]: value_of(data, one) for one in sample}
    outputs = session.get_outputs()
    results = session.run_with_ort_values([one.name for one in outputs], feeds)
    kinds = [name_of(one.type) for one in outputs]
    return [(one.name, kinds[i], array_of(results[i], kinds[i])) for i, one in enumerate(outputs)]


def value_of(data: Any, one: dict[str, Any]) -> Any:
    """An input as a value of the runtime, which owns its bytes."""
    if one["dtype"] not in RARE:
        return ort.OrtValue.ortvalue_from_numpy(get(data, one, one["dtype"]).copy())
    number, storage = RARE[one["dtype"]]
    array = get(data, one, storage)
    if one["dtype"] not in BITS:
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.copy(), number)
    value = ort.OrtValue.ortvalue_from_shape_and_type(list(array.shape), number)
    packed = pack(array, BITS[one["dtype"]])
    ctypes.memmove(value.data_ptr(), packed.ctypes.data, packed.nbytes)
    return value


def array_of(value: Any, dtype: str) -> Any:
    """A value of the runtime as an array; of a type that numpy lacks, as integers as wide."""
    if dtype not in RARE:
        return value.numpy()
    shape, storage = list(value.shape()), np.dtype(RARE[dtype][1])
    count, bits = int(np.prod(shape)), BITS.get(dtype, storage.itemsize * 8)
    raw = np.frombuffer(ctypes.string_at(value.data_ptr(), -(-count * bits // 8)), np.uint8)
    if dtype not in BITS:
        return raw.view(storage).reshape(shape)
    return unpack(raw, bits, count, signed=storage.kind == "i").reshape(shape)


def pack(array: Any, bits: int) -> Any:
    """Several values in a byte, the first in its lowest bits."""
    each = 8 // bits
    flat = array.reshape(-1).view(np.uint8) & ((1 << bits) - 1)
    flat = np.pad(flat, (0, -flat.size % each)).reshape(-1, each)
    return np.bitwise_or.reduce(flat << (np.arange(each, dtype=np.uint8) * bits), axis=1).astype(np.uint8)


def unpack(raw: Any, bits: int, count: int, signed: bool) -> Any:
    """The first `count` of such values, each in a byte of its own."""
    each = 8 // bits
    flat = ((raw[:, None] >> (np.arange(each, dtype=np.uint8) * bits)) & ((1 << bits) - 1)).reshape(-1)[:count]
    if not signed:
        return flat
    return (flat.astype(np.int8) << (8 - bits)) >> (8 - bits)


def assigned(session: Any) -> dict[str, list[str]]:
    """Provider -> its nodes; nothing where the runtime does not tell."""
    try:
        parts = session.get_provider_graph_assignment_info()
    except Exception:
        return {}
    found: dict[str, list[str]] = {}
    for part in parts:
        found.setdefault(part.ep_name, []).extend(node.name for node in part.get_nodes())
    return found


def kernels(path: Path) -> list[dict[str, Any]]:
    """Nodes as they ran, in order of first execution, each with its median time over the samples."""
    times: dict[tuple[str, str, str], list[float]] = {}
    for event in json.loads(path.read_text()):
        name, args = event.get("name", ""), event.get("args", {})
        if event.get("cat") == "Node" and name.endswith("_kernel_time"):
            key = (name[: -len("_kernel_time")], args.get("op_name", ""), args.get("provider", ""))
            times.setdefault(key, []).append(event["dur"] * 1e-6)
    return [
        {"name": name, "op": op, "provider": provider, "seconds": float(np.median(seen))}
        for (name, op, provider), seen in times.items()
    ]


def words(error: Exception) -> str:
    """The runtime's message without its decoration and without the names of its functions."""
    text = str(error).replace("[ONNXRuntimeError] : ", "").strip()
    newer = re.search(r"Unsupported model IR version: (\d+), max supported IR version: (\d+)", text)
    if newer:
        return f"It reads IR versions up to {newer[2]}, and the model has {newer[1]}: save it with an older one."
    text = re.sub(r"(?:^|(?<=failed:))\S*/onnxruntime/\S+:\d+ .*?\) (?=[A-Z])", "", " ".join(text.splitlines()[:2]))
    return text[:500] or type(error).__name__


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    # Some providers' libraries crash as they are taken down; the answer is written by now.
    sys.stdout.flush()
    os._exit(0)
