"""Products with weights of few bits beside float32, each through the whole pipeline: speed, size and time to load.

A model of one product, one row (as in the decode of a language model) times [K, N], goes through `qgraph.optimize` with
each scheme and no data, so that weights are rounded to nearest; they are drawn ternary, binary or normal, as the line
says, and inputs are random. Times are medians over alternating blocks, and so are their ratios to the float32 model.

    python tools/ternary_products.py [K N] [--rows 1] [--seconds 4]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

import qgraph

_CASES = (
    ("normal", "int8-weights", False),
    ("normal", "int4", False),
    ("normal", "int2", False),
    ("normal", "ternary", False),
    ("ternary", "auto", False),
    ("ternary", "auto", True),
    ("binary", "auto", False),
    ("binary", "auto", True),
    ("normal", "fp16", False),
    ("normal", "bf16", False),
    ("normal", "fp8", False),
    ("normal", "fp4", False),
    ("normal", "nf4", False),
)


def _weight(kind: str, shape: tuple[int, int]) -> NDArray[np.float32]:
    rng = np.random.default_rng(0)
    if kind == "normal":
        return rng.standard_normal(shape, np.float32) * np.float32(0.02)
    drawn = rng.integers(-1, 2, shape) if kind == "ternary" else rng.choice([-1, 1], shape)
    return drawn.astype(np.float32) * np.float32(0.02)


def _model(kind: str, shape: tuple[int, int], rows: int, path: Path) -> None:
    inner, columns = shape
    weight = ir.Value(name="W", const_value=ir.Tensor(_weight(kind, shape)))
    x = ir.val("x", ir.DataType.FLOAT, [rows, inner])
    product = ir.node("MatMul", [x, weight], name="product")
    y = product.outputs[0]
    y.name, y.type, y.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape([rows, columns])
    graph = ir.Graph([x], [y], nodes=[product], initializers=[weight], opset_imports={"": 21}, name="one_product")
    ir.save(ir.Model(graph, ir_version=10), path)


def _row(kind: str, scheme: str, pack: bool, report: Any) -> str:
    before, after, worst = report.before, report.after, report.fidelity.worst
    kernel = next((node.kernel for node in report.nodes if node.kernel), "float32")
    speed = " ".join(f"{one.after.median * 1e3:8.3f} {one.ratio:6.2f}" for one in report.speed)
    bits = after.disk * 8 / (before.disk / 4)
    name = scheme + (" --pack" if pack else "")
    size = f"{after.disk / 1e6:8.1f} {bits:6.2f} {after.load_seconds:6.2f} {after.resident / 1e6:7.0f}"
    return f"{kind:8s} {name:14s} {kernel:22s} {speed} {size} {worst.sqnr:7.1f}"


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", nargs="*", type=int, default=[4096, 11008], help="K N")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=4.0, help="for each measurement")
    asked = parser.parse_args()
    inner, columns = asked.shape
    print(f"[{asked.rows}, {inner}] x [{inner}, {columns}]; float32 has {inner * columns * 4 / 1e6:.1f} MB")
    threads = " ".join(f"{f'ms, {n} thr':>8s} {'x fp32':>6s}" for n in sorted({1, qgraph.bench.all_threads()}))
    print(f"{'weights':8s} {'scheme':14s} {'kernel':22s} {threads} {'MB':>8s} {'bits/w':>6s} {'load s':>6s} "
          f"{'RSS MB':>7s} {'SQNR dB':>7s}")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        for kind, scheme, pack in _CASES:
            path = Path(folder) / f"{kind}.onnx"
            if not path.exists():
                _model(kind, (inner, columns), asked.rows, path)
            options = qgraph.Options(
                scheme=scheme, pack=pack, bench_seconds=asked.seconds, force=True, time_limit=30, max_loss="100%"
            )
            try:
                report = qgraph.optimize(path, Path(folder) / "out.onnx", options=options).report
            except qgraph.errors.QGraphError as error:
                print(f"{kind:8s} {scheme:14s} {error}")
                continue
            print(_row(kind, scheme, pack, report), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
