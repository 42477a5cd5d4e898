"""Products with a weight for each expert, as mixtures of experts have them: every form that runs on the CPU, timed.

    all       x [E, T, K] times W [E, K, N]: each expert has tokens of its own
    shared    x [1, T, K] times W [E, K, N]: each expert multiplies the same tokens
    gathered  x [S, 1, K] times Gather(W, experts): each row goes to the expert that a router picked for it
    block     a gated layer of experts whole: router, two products in, one out, weighted sum

The first form of each is float, and the others are timed against it in alternating blocks, each in a session of its
own. Gain is the float form's time over the other's (median, then range over pairs of blocks); difference is the largest
one of the outputs, relative to the largest number: the weights are the codes exactly, so it is that of activations
rounded to int8 inside MatMulNBits, and next to nothing where a form computes in float.

    python tools/experts_products.py --only gathered --experts 8 --size 1024 --bits 4 --rows 1 --rows 16
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx.parser
import onnx_ir as ir
from numpy.typing import NDArray

from qgraph.bench import alternate
from qgraph.blocks import pack
from qgraph.compare import Runnable
from qgraph.errors import QGraphError
from qgraph.session import SessionOptions

BLOCK = 128
ROUTED = 2  # Experts that each token of a whole layer goes to.
_HEADER = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>'
_CALL = "com.microsoft.MatMulNBits <K = {k}, N = {n}, bits = {bits}, block_size = {block}, accuracy_level = 4>"


@dataclass
class Table:
    """Weights of all experts: [E, K, N] in float, and in codes of `bits` bits with one scale for all."""

    experts: int
    inner: int
    columns: int
    bits: int

    def __post_init__(self) -> None:
        rng = np.random.default_rng([self.experts, self.inner, self.columns])
        shape = (self.experts, self.columns, self.inner)
        self.codes = rng.integers(1, 2**self.bits, shape, np.uint8)
        self.scale = np.float32(2.0 / 2**self.bits / np.sqrt(self.inner))
        self.call = _CALL.format(k=self.inner, n=self.columns, bits=self.bits, block=BLOCK)
        self.stacked = _CALL.format(k=self.inner, n=self.experts * self.columns, bits=self.bits, block=BLOCK)

    def scales(self, *shape: int) -> NDArray[np.float32]:
        """The one scale, as often as a form wants it."""
        return np.full(shape, self.scale, np.float32)

    def real(self) -> NDArray[np.float32]:
        """[E, K, N]"""
        found = self.codes.transpose(0, 2, 1).astype(np.float32)
        found -= np.float32(2 ** (self.bits - 1))
        found *= self.scale
        return found

    def each(self, name: str) -> dict[str, NDArray[Any]]:
        """Codes and scales of each expert, as MatMulNBits takes them."""
        scales = self.scales(self.columns, self.inner // BLOCK)
        packed = [pack(codes, self.bits).reshape(*scales.shape, -1) for codes in self.codes]
        return {f"{name}{e}": p for e, p in enumerate(packed)} | {f"{name}{e}s": scales for e in range(self.experts)}

    def products(self, sources: list[str], name: str) -> str:
        """MatMulNBits(sources[e], expert e), written to p0, p1..."""
        return " ".join(f"p{e} = {self.call} ({x}, {name}{e}, {name}{e}s)" for e, x in enumerate(sources))


Weights = Callable[[], dict[str, Any]]
Form = tuple[str, str, Weights]  # Name, body of the graph, weights.


def _names(prefix: str, count: int) -> str:
    return ", ".join(f"{prefix}{e}" for e in range(count))


# Rows x0 of experts i, those of an expert together, how many each has, and the way back.
_SORT = (
    "n = Shape (i) u, order = TopK <axis = 0, largest = 0> (i, n) v, back = TopK <axis = 0, largest = 0> (order, n) "
    "z = Gather (x0, order) hot = OneHot <axis = -1> (i, depth, values) counts = ReduceSum <keepdims = 0> (hot, first)"
)


def _sorted(t: Table) -> dict[str, NDArray[Any]]:
    return {"depth": np.array(t.experts), "values": np.array([0, 1]), "first": np.array([0])}


def _stored(t: Table) -> dict[str, Any]:
    """Codes of [E, K, N], with scales for blocks along K."""
    codes = np.ascontiguousarray(t.codes.transpose(0, 2, 1))
    zero = np.full((t.experts, t.inner // BLOCK, t.columns), 2 ** (t.bits - 1), np.uint8)
    made = {"D": codes, "Ds": t.scales(*zero.shape), "Dz": zero}
    if t.bits == 8:
        return made
    kind = ir.DataType.UINT4
    packed = {k: ir.PackedTensor(pack(made[k], 4).reshape(-1), kind, shape=made[k].shape, name=k) for k in ("D", "Dz")}
    return {**made, **packed}


def every(t: Table, rows: int) -> tuple[str, dict[str, NDArray[Any]], Iterator[Form]]:
    """x [E, T, K]."""
    x = np.random.default_rng(rows).standard_normal((t.experts, rows, t.inner), np.float32)

    def forms() -> Iterator[Form]:
        yield "float", "y = MatMul (x, W)", lambda: {"W": t.real()}
        body = f"{_names('x', t.experts)} = Split <axis = 0, num_outputs = {t.experts}> (x) "
        body += t.products([f"x{e}" for e in range(t.experts)], "B")
        yield "split", f"{body} y = Concat <axis = 0> ({_names('p', t.experts)})", lambda: t.each("B")
        yield (
            "stored",
            f"w = DequantizeLinear <axis = 1, block_size = {BLOCK}> (D, Ds, Dz) y = MatMul (x, w)",
            (lambda: _stored(t)),
        )

    return f"float[{t.experts}, {rows}, {t.inner}] x", {"x": x}, forms()


def shared(t: Table, rows: int) -> tuple[str, dict[str, NDArray[Any]], Iterator[Form]]:
    """x [1, T, K]."""
    x = np.random.default_rng(rows).standard_normal((1, rows, t.inner), np.float32)
    blocks = t.inner // BLOCK

    def forms() -> Iterator[Form]:
        yield "float", "y = MatMul (x, W)", lambda: {"W": t.real()}
        body = t.products(["x"] * t.experts, "B")
        yield "one each", f"{body} y = Concat <axis = 0> ({_names('p', t.experts)})", lambda: t.each("B")
        yield (
            "stacked",
            f"p = {t.stacked} (x, B, Bs) q = Reshape (p, shape) y = Transpose <perm = [1, 0, 2]> (q)",
            lambda: {
                "B": pack(t.codes, t.bits).reshape(t.experts * t.columns, blocks, -1),
                "Bs": t.scales(t.experts * t.columns, blocks),
                "shape": np.array([rows, t.experts, t.columns]),
            },
        )

    return f"float[1, {rows}, {t.inner}] x", {"x": x}, forms()


def gathered(t: Table, rows: int) -> tuple[str, dict[str, NDArray[Any]], Iterator[Form]]:
    """x [S, 1, K], each row with an expert of its own; what the float form copies must fit into memory."""
    rng = np.random.default_rng(rows)
    feeds = {
        "x": rng.standard_normal((rows, 1, t.inner), np.float32),
        "i": rng.permutation(np.arange(rows) % t.experts),
    }

    def forms() -> Iterator[Form]:
        yield "float", "w = Gather (W, i) y = MatMul (x, w)", lambda: {"W": t.real()}
        attributes = f"gather_axis = 0, quantize_axis = 2, block_size = {BLOCK}, bits = {t.bits}"
        yield (
            "picked",
            f"w = com.microsoft.GatherBlockQuantized <{attributes}> (D, i, Ds) y = MatMul (x, w)",
            lambda: {
                "D": pack(np.ascontiguousarray(t.codes.transpose(0, 2, 1)), t.bits),
                "Ds": t.scales(t.experts, t.inner, t.columns // BLOCK),
            },
        )
        blocks = t.inner // BLOCK
        if rows == 1:
            yield (
                "codes picked",
                f"c = Gather (B, i) d = Squeeze (c, first) s = Gather (Bs, i) r = Squeeze (s, first) "
                f"y = {t.call} (x, d, r)",
                lambda: {
                    "B": pack(t.codes, t.bits).reshape(t.experts, t.columns, blocks, -1),
                    "Bs": t.scales(t.experts, t.columns, blocks),
                    "first": np.array([0]),
                },
            )
        body = f"x0 = Identity (x) {_SORT} {_names('x_', t.experts)} = Split <axis = 0> (z, counts) "
        body += t.products([f"x_{e}" for e in range(t.experts)], "B")
        body += f" q = Concat <axis = 0> ({_names('p', t.experts)}) y = Gather (q, back)"
        yield "sorted", body, lambda: {**t.each("B"), **_sorted(t)}

    return f"float[{rows}, 1, {t.inner}] x, int64[{rows}] i", feeds, forms()


def block(t: Table, rows: int) -> tuple[str, dict[str, NDArray[Any]], Iterator[Form]]:
    """x [T, K] through two products in, silu(a) * b, one out (K = N), and the sum over the best experts."""
    rng = np.random.default_rng(rows)
    feeds = {
        "x": rng.standard_normal((rows, t.inner), np.float32),
        "r": rng.standard_normal((rows, t.experts), np.float32),
    }
    start = (
        "g0, j = TopK (r, best) g = Softmax (g0) i = Reshape (j, flat) "
        "e1 = Unsqueeze (x, one) e2 = Expand (e1, times) x0 = Reshape (e2, rows) "
    )
    end = " h = Reshape (o, wide) g1 = Unsqueeze (g, two) w = Mul (h, g1) y = ReduceSum <keepdims = 0> (w, one)"
    constants = {"best": [ROUTED], "flat": [-1], "one": [1], "two": [2], "times": [1, ROUTED, 1]}
    constants |= {"rows": [-1, 1, t.inner], "wide": [-1, ROUTED, t.columns]}
    shapes = {name: np.array(numbers) for name, numbers in constants.items()}

    def forms() -> Iterator[Form]:
        body = "w1 = Gather (A, i) a = MatMul (x0, w1) w2 = Gather (B, i) b = MatMul (x0, w2) "
        body += "a1 = Sigmoid (a) a2 = Mul (a, a1) c = Mul (a2, b) w3 = Gather (C, i) o = MatMul (c, w3)"
        yield "float", start + body + end, lambda: {"A": t.real(), "B": t.real()[::-1], "C": t.real() / 2, **shapes}
        body = f"{_SORT} {_names('z', t.experts)} = Split <axis = 0> (z, counts) "
        for e in range(t.experts):
            f = t.experts - 1 - e
            body += f"a{e} = {t.call} (z{e}, A{e}, A{e}s) b{e} = {t.call} (z{e}, A{f}, A{f}s) s{e} = Sigmoid (a{e}) "
            body += f"t{e} = Mul (a{e}, s{e}) c{e} = Mul (t{e}, b{e}) o{e} = {t.call} (c{e}, A{e}, C{e}s) "
        body += f"q = Concat <axis = 0> ({_names('o', t.experts)}) o = Gather (q, back)"
        halves = {f"C{e}s": t.scales(t.columns, t.inner // BLOCK) / 2 for e in range(t.experts)}
        yield "sorted", start + body + end, lambda: {**t.each("A"), **halves, **_sorted(t), **shapes}
        attributes = (
            f'k = {ROUTED}, activation_type = "swiglu", activation_alpha = 1.0, activation_beta = 0.0, '
            f"swiglu_fusion = 1, expert_weight_bits = {t.bits}, block_size = {BLOCK}, accuracy_level = 4, "
            "normalize_routing_weights = 1"
        )

        def whole() -> dict[str, NDArray[Any]]:
            scales = t.scales(t.experts, 2 * t.columns, t.inner // BLOCK)
            # Columns of the two products in turns, the only form that the CPU's kernel takes.
            both = np.stack([t.codes, t.codes[::-1]], axis=2).reshape(t.experts, -1, t.inner)
            return {"F": pack(both, t.bits), "Fs": scales, "G": pack(t.codes, t.bits), "Gs": scales[:, : t.columns] / 2}

        yield "QMoE", f"y = com.microsoft.QMoE <{attributes}> (x, r, F, Fs, , G, Gs)", whole

    return f"float[{rows}, {t.inner}] x, float[{rows}, {t.experts}] r", feeds, forms()


KINDS = {"all": every, "shared": shared, "gathered": gathered, "block": block}


def _save(inputs: str, form: Form, folder: Path) -> Runnable:
    """The form as a model whose weights lie beside it."""
    name, body, weights = form
    proto = onnx.parser.parse_model(f"{_HEADER} g ({inputs}) => (float[] y) {{ {body} }}")
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    made = weights()
    for key in made:
        proto.graph.initializer.add(name=key, data_type=onnx.TensorProto.FLOAT, dims=[0])
    model = ir.from_proto(proto)
    for key, array in made.items():
        tensor = array if isinstance(array, ir.TensorProtocol) else ir.Tensor(np.ascontiguousarray(array), name=key)
        value = model.graph.initializers[key]
        value.const_value, value.type, value.shape = tensor, ir.TensorType(tensor.dtype), tensor.shape
    path = folder / f"{name.replace(' ', '_')}.onnx"
    ir.save(model, path, external_data=f"{path.name}.data")
    return Runnable(path)


@click.command(help=__doc__)
@click.option("--only", multiple=True, type=click.Choice(list(KINDS)))
@click.option("--experts", multiple=True, type=int, default=(8, 64), show_default=True)
@click.option("--size", "sizes", multiple=True, type=int, default=(1024, 2048), show_default=True, help="K = N.")
@click.option("--bits", "widths", multiple=True, type=int, default=(4, 8), show_default=True)
@click.option("--rows", "counts", multiple=True, type=int, default=(1, 16, 128), show_default=True, help="T or S.")
@click.option("--threads", multiple=True, type=int, default=(1,), show_default=True)
@click.option("--seconds", default=3.0, show_default=True, help="For each form.")
@click.option("--largest", default=4.0, show_default=True, help="GB of float weights, or copies of them, at most.")
def main(
    only: tuple[str, ...], experts: tuple[int, ...], sizes: tuple[int, ...], widths: tuple[int, ...],
    counts: tuple[int, ...], threads: tuple[int, ...], seconds: float, largest: float,
) -> None:  # fmt: skip
    """Print a line for each form."""
    print("kind      E     K=N  bits    T  threads  form            ms   gain (range)          difference")
    for kind, count, size, bits, rows in itertools.product(only or KINDS, experts, sizes, widths, counts):
        copies = rows if kind == "gathered" else ROUTED * rows if kind == "block" else count
        if max(copies, count) * size**2 * 4 > largest * 1e9:
            continue
        inputs, feeds, forms = KINDS[kind](Table(count, size, size, bits), rows)
        with tempfile.TemporaryDirectory() as folder:
            plain = _save(inputs, next(forms), Path(folder))
            for form, number in itertools.product(forms, threads):
                line = _line(plain, form, inputs, feeds, Path(folder), number, seconds)
                head = f"{kind:9s} {count:2d} {size:6d} {bits:4d} {rows:5d} {number:7d}"
                print(f"{head}  {form[0]:12s} {line}", flush=True)


def _line(
    plain: Runnable, form: Form, inputs: str, feeds: dict[str, NDArray[Any]], folder: Path, threads: int, seconds: float
) -> str:
    try:
        other = _save(inputs, form, folder)
        found: list[NDArray[np.float32]] = []
        for one in (plain, other):
            with one.session(SessionOptions()) as session:
                found.append(session.run(feeds)["y"])
    except (QGraphError, ValueError) as error:
        return str(error)
    speed = alternate(plain, other, feeds, SessionOptions(), threads, seconds)
    apart = np.abs(found[1].reshape(found[0].shape) - found[0]).max() / np.abs(found[0]).max()
    gain = f"{speed.ratio:6.2f} ({speed.ratio_low:.2f} to {speed.ratio_high:.2f})"
    return f"{speed.after.median * 1e3:8.3f} {gain:22s} {apart:.1e}"


if __name__ == "__main__":
    main()
