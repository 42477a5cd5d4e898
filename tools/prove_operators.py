"""Each operator of a target's table, alone, on the target's own provider: was it taken, and are its numbers right?

    python tools/prove_operators.py qnn --scheme int8

A model of one operator (between a layer before it and one after it would hide where an error begins) is quantized for
the target, run there and on the CPU provider, and the two are compared in steps of the output's scale.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import click
import numpy as np
import onnx.numpy_helper
import onnx.parser
import onnx_ir as ir
from rich.console import Console
from rich.table import Table

import qgraph
from qgraph import proof, registry
from qgraph.errors import QGraphError
from qgraph.session import HOST, Session, SessionOptions

_WIDTH = 200
"""Characters of a line where no terminal says how many."""
# Name -> (inputs, outputs, nodes, shapes of the constants), in the text form of ONNX.
_IMAGE, _ROWS = "float[1,16,12,12] x", "float[1,32,64] x"
OPERATORS: dict[str, tuple[str, str, str, dict[str, tuple[int, ...]]]] = {
    "Conv 3x3": (_IMAGE, "float[1,24,12,12] y", "y = Conv <pads=[1,1,1,1]> (x, w, b)",
                 {"w": (24, 16, 3, 3), "b": (24,)}),
    "Conv 1x1": (_IMAGE, "float[1,24,12,12] y", "y = Conv (x, w)", {"w": (24, 16, 1, 1)}),
    "Conv stride": (_IMAGE, "float[1,24,6,6] y", "y = Conv <strides=[2,2],pads=[1,1,1,1]> (x, w, b)",
                    {"w": (24, 16, 3, 3), "b": (24,)}),
    "Conv depthwise": (_IMAGE, "float[1,16,12,12] y", "y = Conv <group=16,pads=[1,1,1,1]> (x, w, b)",
                       {"w": (16, 1, 3, 3), "b": (16,)}),
    "Conv grouped": (_IMAGE, "float[1,24,12,12] y", "y = Conv <group=4,pads=[1,1,1,1]> (x, w, b)",
                     {"w": (24, 4, 3, 3), "b": (24,)}),
    "Conv Relu": (_IMAGE, "float[1,24,12,12] y", "c = Conv <pads=[1,1,1,1]> (x, w, b) y = Relu (c)",
                  {"w": (24, 16, 3, 3), "b": (24,)}),
    "Conv 1d": ("float[1,16,40] x", "float[1,24,40] y", "y = Conv <pads=[1,1]> (x, w, b)",
                {"w": (24, 16, 3), "b": (24,)}),
    "ConvTranspose": (_IMAGE, "float[1,8,24,24] y", "y = ConvTranspose <strides=[2,2]> (x, w, b)",
                      {"w": (16, 8, 2, 2), "b": (8,)}),
    "Gemm": ("float[4,64] x", "float[4,48] y", "y = Gemm (x, w, b)", {"w": (64, 48), "b": (48,)}),
    "Gemm transB": ("float[4,64] x", "float[4,48] y", "y = Gemm <transB=1> (x, w, b)", {"w": (48, 64), "b": (48,)}),
    "MatMul": (_ROWS, "float[1,32,48] y", "y = MatMul (x, w)", {"w": (64, 48)}),
    "MatMul Add": (_ROWS, "float[1,32,48] y", "m = MatMul (x, w) y = Add (m, b)", {"w": (64, 48), "b": (48,)}),
    "MatMul of two": (_ROWS, "float[1,32,32] y", "t = Transpose <perm=[0,2,1]> (x) y = MatMul (x, t)", {}),
    **{f"{op} of two": (_IMAGE + ", float[1,16,12,12] z", "float[1,16,12,12] y", f"y = {op} (x, z)", {})
       for op in ("Add", "Sub", "Mul", "Max", "Min")},
    **{f"{op} constant": (_IMAGE, "float[1,16,12,12] y", f"y = {op} (x, c)", {"c": (16, 1, 1)})
       for op in ("Add", "Sub", "Mul", "Div")},
    "Max zero": (_IMAGE, "float[1,16,12,12] y", "y = Max (x, zero)", {}),
    "Min bound": (_IMAGE, "float[1,16,12,12] y", "y = Min (x, bound)", {}),
    "Where zero": (_ROWS + ", bool[1,32,64] m", "float[1,32,64] y", "y = Where (m, x, zero)", {}),
    "Reciprocal": (_ROWS, "float[1,32,64] y", "a = Abs (x) s = Add (a, least) y = Reciprocal (s)", {}),
    "Gather of a table": ("int64[1,32] x", "float[1,32,64] y", "y = Gather (table, x)", {"table": (100, 64)}),
    "Concat": (_IMAGE + ", float[1,16,12,12] z", "float[1,32,12,12] y", "y = Concat <axis=1> (x, z)", {}),
    **{op: (_ROWS, "float[1,32,64] y", f"y = {op} (x)", {})
       for op in ("Relu", "Sigmoid", "Tanh", "HardSwish", "HardSigmoid", "Elu", "Abs", "Neg", "LeakyRelu", "Gelu")},
    "Sqrt": (_ROWS, "float[1,32,64] y", "a = Abs (x) y = Sqrt (a)", {}),
    "Exp": (_ROWS, "float[1,32,64] y", "y = Exp (x)", {}),
    "Softmax": (_ROWS, "float[1,32,64] y", "y = Softmax <axis=-1> (x)", {}),
    "LogSoftmax": (_ROWS, "float[1,32,64] y", "y = LogSoftmax <axis=-1> (x)", {}),
    "LayerNormalization": (_ROWS, "float[1,32,64] y", "y = LayerNormalization (x, g, b)", {"g": (64,), "b": (64,)}),
    "Clip": (_ROWS, "float[1,32,64] y", "y = Clip (x, low, high)", {"low": (), "high": ()}),
    "GlobalMaxPool": (_IMAGE, "float[1,16,1,1] y", "y = GlobalMaxPool (x)", {}),
    "MaxPool": (_IMAGE, "float[1,16,6,6] y", "y = MaxPool <kernel_shape=[2,2],strides=[2,2]> (x)", {}),
    "AveragePool": (_IMAGE, "float[1,16,6,6] y", "y = AveragePool <kernel_shape=[2,2],strides=[2,2]> (x)", {}),
    "GlobalAveragePool": (_IMAGE, "float[1,16,1,1] y", "y = GlobalAveragePool (x)", {}),
    "ReduceMean": (_IMAGE, "float[1,16,1,1] y", "y = ReduceMean <keepdims=1> (x, axes)", {}),
    "Reshape": (_IMAGE, "float[1,16,144] y", "y = Reshape (x, shape)", {}),
    "Flatten": (_IMAGE, "float[1,2304] y", "y = Flatten (x)", {}),
    "Transpose": (_IMAGE, "float[1,12,12,16] y", "y = Transpose <perm=[0,2,3,1]> (x)", {}),
    "DepthToSpace": (_IMAGE, "float[1,4,24,24] y", "y = DepthToSpace <blocksize=2> (x)", {}),
    "Resize nearest": (_IMAGE, "float[1,16,24,24] y",
                       'y = Resize <mode="nearest",coordinate_transformation_mode="asymmetric",nearest_mode="floor">'
                       " (x, , scales)", {}),
    "Resize linear": (_IMAGE, "float[1,16,24,24] y",
                      'y = Resize <mode="linear",coordinate_transformation_mode="half_pixel"> (x, , scales)', {}),
}  # fmt: skip
_FIXED = {
    "axes": np.array([2, 3]),
    "shape": np.array([1, 16, 144]),
    "scales": np.array([1, 1, 2, 2], np.float32),
    "low": np.array(-0.5, np.float32),
    "high": np.array(1.5, np.float32),
    "least": np.array([0.01], np.float32),
    "zero": np.array(0.0, np.float32),
    "bound": np.array(1e9, np.float32),
}


def model_of(name: str) -> ir.Model:
    """The float model of one operator, its constants seeded."""
    inputs, outputs, nodes, constants = OPERATORS[name]
    text = f'<ir_version: 10, opset_import: ["": 21]>\ng ({inputs}) => ({outputs}) {{ {nodes} }}'
    random = np.random.default_rng(0)
    used = nodes.replace(",", " ").replace(")", " ").split()
    made = {key: random.standard_normal(shape).astype(np.float32) / 4 + 0.5 for key, shape in constants.items()}
    if "w" in made:
        made["w"] = random.standard_normal(made["w"].shape).astype(np.float32) / 8
    made.update({key: value for key, value in _FIXED.items() if key in used})
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, key) for key, array in made.items())
    model = ir.from_proto(proto)
    for number, node in enumerate(model.graph):
        node.name = f"{node.op_type}_{number}"
    return model


def _samples(model: ir.Model) -> list[dict[str, np.ndarray]]:
    return [
        {str(value.name): _array(value, np.random.default_rng((seed, i))) for i, value in enumerate(model.graph.inputs)}
        for seed in range(8)
    ]


def _array(value: ir.Value, random: np.random.Generator) -> np.ndarray:
    shape = tuple(int(d) for d in value.shape.numpy()) if value.shape is not None else ()
    if value.dtype == ir.DataType.BOOL:
        return random.random(shape) < 0.5
    if value.dtype == ir.DataType.INT64:
        return random.integers(0, 100, shape)
    return random.standard_normal(shape).astype(np.float32)


@click.command()
@click.argument("target")
@click.option("--scheme", default="int8", show_default=True)
@click.option("--only", help="Operators whose name holds this.")
def main(target: str, scheme: str, only: str | None) -> None:
    """Prove TARGET's operators one by one."""
    where = registry.target(target)
    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    table = Table("operator", "plan", "nodes there", "left", "largest error, steps", "RMS error", "SQNR there")
    for name in OPERATORS:
        if only is not None and only not in name:
            continue
        model = model_of(name)
        samples = _samples(model)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            try:
                found = qgraph.optimize(
                    model,
                    path,
                    data=samples,
                    evaluation=samples[:1],
                    target=target,
                    scheme=scheme,
                    force=True,
                    bench_seconds=0,
                )
            except QGraphError as error:
                table.add_row(name, f"[dim]{type(error).__name__}: {str(error)[:90]}", "", "", "", "", "")
                continue
            placed = found.report.placement
            plan = ", ".join(f"{n.op_type}" for n in found.report.quantized) or "float"
            if placed is None:
                why = next((note for note in found.report.notes if "proved" in note or "run there" in note), "")
                table.add_row(name, plan, f"[red]not run: {why[:90]}", "", "", "", "")
                continue
            ran = proof.place(path, where, samples[:1])
            with Session(path, SessionOptions(providers=(HOST,))) as session:
                expected = session.run(samples[0])["y"]
            steps = [v for v in found.model.graph.initializers.values() if v.name == "y_scale"]
            step = float(steps[0].const_value.numpy()) if steps and steps[0].const_value is not None else 0.0
            largest = float(np.abs(expected - ran.outputs[0]["y"]).max())
            table.add_row(
                name, plan, f"{placed.share:.0%}", ", ".join(sorted({one.op_type for one in placed.left})),
                f"{largest / step:.2f}" if step else f"({largest:.2g})",
                f"{placed.error:.1e}" if placed.right else f"[red]{placed.error:.1e}", f"{placed.sqnr:.1f} dB",
            )  # fmt: skip
    console.print(table)


if __name__ == "__main__":
    main()
