"""What ONNX Runtime's CPU provider makes of weights in 16-, 8- and 4-bit floats: does it fold them, and how fast is it?

One row times [K, N], the weight written in each form, beside the float32 product: time to load, time of a run (both
median), largest error relative to the largest output, and the operators that are left in the runtime's graph. A form
that the runtime refuses shows its words. This is what `qgraph/targets/cpu_stored.py` rests on.

    python tools/measure_floats.py [N]
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qgraph.errors import ExecutionError
from qgraph.float_formats import BF16, E2M1, E4M3, E5M2, FP16, NF4
from qgraph.session import Session, SessionOptions

_SIZE = 2048
_RUNS = 25
_HALVES = (FP16, BF16)
_SMALL = (E4M3, E5M2, E2M1)
_FLOAT = ir.DataType.FLOAT


def _graph(size: int, body: str, constants: dict[str, ir.TensorProtocol]) -> ir.Model:
    text = f"""<ir_version: 11, opset_import: ["" : 23, "com.microsoft" : 1]>
        g (float[m, {size}] x) => (float[m, {size}] y) {{ {body} }}"""
    model = ir.from_onnx_text(text)
    for name, tensor in constants.items():
        value = next(v for node in model.graph for v in node.inputs if v is not None and v.name == name)
        value.const_value, value.type = tensor, ir.TensorType(tensor.dtype)
        value.shape = ir.Shape(tensor.shape.numpy())
        model.graph.register_initializer(value)
    return model


def _forms(weight: NDArray[np.float32]) -> Iterator[tuple[str, ir.Model, SessionOptions]]:
    size = len(weight)
    plain, unfolded = SessionOptions(threads=1), (("session.disable_quant_qdq", "1"),)
    yield "float32", _graph(size, "y = MatMul (x, W)", {"W": ir.Tensor(weight)}), plain
    for fmt in (*_HALVES, *_SMALL):
        scale = np.float32(1 if fmt in _HALVES else np.abs(weight).max() / fmt.highest)
        codes = ir.Tensor(fmt.encode(weight / scale), dtype=fmt.storage)
        given = {"Q": codes, "s": ir.Tensor(np.asarray(scale))}
        text = "c = Cast <to = 1> (Q)  W = Mul (c, s)  y = MatMul (x, W)"
        yield f"{fmt.name}, Cast", _graph(size, text, given), plain
        if fmt in _HALVES:
            kind = int(fmt.storage)
            text = f"h = Cast <to = {kind}> (x)  p = MatMul (h, Q)  y = Cast <to = 1> (p)"
            yield f"{fmt.name}, computed", _graph(size, text, {"Q": codes}), plain
        else:
            text = "W = DequantizeLinear (Q, s)  y = MatMul (x, W)"
            yield f"{fmt.name}, DequantizeLinear", _graph(size, text, given), plain
            options = SessionOptions(threads=1, config=unfolded)
            yield f"{fmt.name}, DequantizeLinear, disable_quant_qdq", _graph(size, text, given), options
    for quant_type, fmt in enumerate((E2M1, NF4)):
        codes = ir.Tensor(np.random.default_rng(0).integers(0, 256, size * size // 2, np.uint8))
        most = ir.Tensor(np.full(size * size // 64, 0.02, np.float32))
        attributes = f"K = {size}, N = {size}, block_size = 64, quant_type = {quant_type}"
        text = f"y = com.microsoft.MatMulBnb4 <{attributes}> (x, B, A)"
        yield f"{fmt.name}, MatMulBnb4 (random codes)", _graph(size, text, {"B": codes, "A": most}), plain


def _measure(model: ir.Model, options: SessionOptions, x: NDArray[np.float32], wanted: NDArray[np.float32]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path, optimized = Path(folder) / "m.onnx", Path(folder) / "o.onnx"
        ir.save(model, path)
        start = time.perf_counter()
        with Session(path, options) as session:
            loaded = time.perf_counter() - start
            found = session.run({"x": x})["y"]
            times: list[float] = []
            for _ in range(_RUNS):
                start = time.perf_counter()
                session.call({"x": x})
                times.append(time.perf_counter() - start)
        shown = SessionOptions(threads=1, config=options.config, optimized=optimized)
        Session(path, shown).close()
        left = " ".join(node.op_type for node in ir.load(optimized).graph)
        error = np.abs(found - wanted).max() / np.abs(wanted).max()
        size = path.stat().st_size / 1e6
    return f"{loaded * 1e3:8.1f} {np.median(times) * 1e3:8.3f} {error:8.1e} {size:7.1f}  {left}"


def _told(model: ir.Model, options: SessionOptions, x: NDArray[np.float32], wanted: NDArray[np.float32]) -> str:
    try:
        return _measure(model, options, x, wanted)
    except ExecutionError as error:
        return f"refused: {str(error).split(': ', 1)[-1][:110]}"


def main() -> int:
    """Print the table."""
    size = int(sys.argv[1]) if len(sys.argv) > 1 else _SIZE
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((size, size), np.float32) * np.float32(0.02)
    x = rng.standard_normal((1, size), np.float32)
    print(f"{'form':44s} {'load ms':>8s} {'run ms':>8s} {'error':>8s} {'MB':>7s}  operators")
    for name, model, options in _forms(weight):
        print(f"{name:44s} {_told(model, options, x, x @ weight)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
