"""Find by trying which release of onnxruntime is the first to read an IR version, an opset, or an operator of its own.

    python tools/probe_versions.py 1.15.1 1.16.3 1.17.3 1.18.1 ...

Each release is installed into a temporary folder and runs one-operator models in a process of its own. The result is
the table in `qgraph/deploy/versions.py`. Needs a Python for which all the releases have wheels.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

TRY = """
import json, sys
from pathlib import Path
import numpy as np, onnxruntime as ort
ort.set_default_logger_severity(4)
found = []
for path in sorted(Path(sys.argv[1]).glob("*.onnx")):
    try:
        session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        kinds = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
        session.run(None, {i.name: np.zeros(i.shape, kinds[i.type]) for i in session.get_inputs()})
        found.append(path.stem)
    except Exception:
        pass
print(json.dumps(found))
"""


def _save(folder: Path, name: str, node: onnx.NodeProto, opset: int = 17, version: int = 8, **arrays: object) -> None:
    """A model of one node: inputs that are given as lists are the caller's, arrays are constants."""
    inputs, constants = [], []
    for key, value in arrays.items():
        if isinstance(value, tuple):
            kind, shape = value
            inputs.append(helper.make_tensor_value_info(key, kind, shape))
        else:
            constants.append(numpy_helper.from_array(np.asarray(value), key))
    outputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in node.output]
    graph = helper.make_graph([node], name, inputs, outputs, constants)
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, ir_version=version, opset_imports=imports), str(folder / f"{name}.onnx"))


def models(folder: Path) -> None:
    """Write one model for each thing to be tried."""
    x, ids, ones = (TensorProto.FLOAT, [1, 64]), (TensorProto.INT64, [4]), np.ones(64, np.float32)
    same = helper.make_node("Identity", ["x"], ["y"])
    for opset in range(7, 27):
        _save(folder, f"opset {opset:2}", same, opset, 7, x=x)
    for version in range(3, 15):
        _save(folder, f"IR version {version:2}", same, 13, version, x=x)

    def own(operator: str, inputs: list[str], label: str = "", **attributes: object) -> tuple[str, onnx.NodeProto]:
        made = helper.make_node(operator, inputs, ["y"], domain="com.microsoft", **attributes)
        return f"{operator}{label}", made

    for bits in (2, 4, 8):
        codes, scales = np.zeros((32, 2, 32 * bits // 8), np.uint8), np.ones(64, np.float32)
        name, node = own("MatMulNBits", ["x", "w", "s"], f" {bits}", K=64, N=32, bits=bits, block_size=32,
                         accuracy_level=4)  # fmt: skip
        _save(folder, name, node, x=x, w=codes, s=scales)
    for bits in (4, 8):
        name, node = own("GatherBlockQuantized", ["w", "i", "s"], f" {bits}", gather_axis=0, quantize_axis=1,
                         block_size=32, bits=bits)  # fmt: skip
        _save(folder, name, node, w=np.zeros((10, 8 * bits), np.uint8), i=ids, s=np.ones((10, 2), np.float32))
    for operator in ("Gelu", "QuickGelu", "FastGelu"):
        name, node = own(operator, ["x"])
        _save(folder, name, node, x=x)
    name, node = own("FusedMatMul", ["x", "w"], transB=1)
    _save(folder, name, node, x=x, w=np.ones((64, 64), np.float32))
    name, node = own("DynamicQuantizeMatMul", ["x", "w", "s"])
    _save(folder, name, node, x=x, w=np.ones((64, 64), np.int8), s=np.float32(1))
    name, node = own("SkipSimplifiedLayerNormalization", ["x", "x", "g"], epsilon=1e-5)
    _save(folder, name, node, x=x, g=ones)
    name, node = own("RotaryEmbedding", ["x", "p", "c", "s"], num_heads=1)
    table = np.ones((8, 32), np.float32)
    _save(folder, name, node, x=(TensorProto.FLOAT, [1, 2, 64]), p=(TensorProto.INT64, [1, 2]), c=table, s=table)
    past = (TensorProto.FLOAT, [1, 1, 4, 32])
    key = (TensorProto.FLOAT, [1, 1, 32])
    node = helper.make_node("GroupQueryAttention", ["x", "k", "v", "pk", "pv", "n", "t"], ["y", "ok", "ov"],
                            domain="com.microsoft", num_heads=2, kv_num_heads=1)  # fmt: skip
    _save(folder, "GroupQueryAttention", node, x=(TensorProto.FLOAT, [1, 1, 64]), k=key, v=key, pk=past, pv=past,
          n=np.full(1, 4, np.int32), t=np.int32(5))  # fmt: skip


def tried(release: str, folder: Path) -> set[str]:
    """Names of the models that a release runs."""
    numpy = "numpy<2" if tuple(map(int, release.split(".")[:2])) < (1, 19) else "numpy"
    with tempfile.TemporaryDirectory() as place:
        install = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-qq",
            "--no-warn-conflicts",
            "--target",
            place,
            f"onnxruntime=={release}",
            numpy,
        ]
        subprocess.run(install, check=True)
        environment = {**os.environ, "PYTHONPATH": place}
        command = [sys.executable, "-c", TRY, str(folder)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def main() -> int:
    """Try the releases named, oldest first."""
    with tempfile.TemporaryDirectory() as name:
        models(Path(name))
        everything = sorted(path.stem for path in Path(name).glob("*.onnx"))
        first: dict[str, str] = {}
        for release in sys.argv[1:]:
            for one in tried(release, Path(name)):
                first.setdefault(one, release)
    for one in everything:
        print(f"{one:40} {first.get(one, 'none of these')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
