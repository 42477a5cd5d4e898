"""Measure what stands between the products of a decoder that generates: one new token, many in the cache.

Each form of a piece stands in a row of layers, every one with a cache of its own where it has one, as in a model; the
first form is what qgraph writes for models in primitives. Forms run in alternating blocks, each in a session of its
own. Gain is the first form's time over the other's (median and range over pairs of blocks); difference is the largest
one of the outputs, relative to the largest number.

    python tools/measure_decode.py --only attention --past 128 --past 2048
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import click
import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
from onnx import numpy_helper
from rich.console import Console
from rich.table import Table

from qgraph.bench import alternate
from qgraph.blocks import nearest
from qgraph.compare import Runnable
from qgraph.formats import UINT4
from qgraph.session import SessionOptions
from qgraph.spec import PerBlock, QuantSpec

LAYERS = 12
HEADER = '<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>'
# Qwen2-0.5B: width, heads, width of a head, heads of keys and values, inner width.
WIDTH, HEADS, HEAD, GROUPS, INNER = 896, 14, 64, 2, 4864
_KINDS = {"float32": "float", "int64": "int64", "int32": "int32", "int8": "int8", "uint8": "uint8"}


@dataclass
class Form:
    """One way to write a piece.

    `body` reads `{x}` and writes `{y}`, both of the shape of x; `{l}` is the number of the layer. `own` are inputs of
    each layer, `made` its further outputs (name -> text of type); `inputs` and `weights` are those of all layers.
    """

    name: str
    body: str
    inputs: dict[str, np.ndarray] = field(default_factory=dict)
    own: dict[str, np.ndarray] = field(default_factory=dict)
    made: dict[str, str] = field(default_factory=dict)
    weights: dict[str, np.ndarray] = field(default_factory=dict)

    def model(self, x: tuple[int, ...]) -> ir.Model:
        """`LAYERS` of it in a row."""
        shape = ", ".join(map(str, x))
        body = [
            self.body.format(l=n, x="x" if n == 0 else f"x{n}", y="y" if n == LAYERS - 1 else f"x{n + 1}")
            for n in range(LAYERS)
        ]
        takes = [f"float[{shape}] x", *(f"{_typed(a)} {name}" for name, a in self.feeds().items())]
        gives = [f"float[{shape}] y", *(f"{t} {n}{i}" for i in range(LAYERS) for n, t in self.made.items())]
        text = f"{HEADER}\ng ({', '.join(takes)}) => ({', '.join(gives)}) {{ {' '.join(body)} }}"
        model = onnx.parser.parse_model(text)
        model.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in self.weights.items())
        return ir.from_proto(model)

    def feeds(self) -> dict[str, np.ndarray]:
        """All inputs but x."""
        return {**self.inputs, **{f"{name}{i}": a for i in range(LAYERS) for name, a in self.own.items()}}


def _typed(array: np.ndarray) -> str:
    return f"{_KINDS[array.dtype.name]}[{', '.join(map(str, array.shape))}]"


def _normal(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def _ints(**values: list[int]) -> dict[str, np.ndarray]:
    return {name: np.array(value, np.int64) for name, value in values.items()}


def attention(past: int, rows: int) -> Iterator[list[Form]]:
    """Attention with a cache that is read and written, with the same mask for all heads."""
    total = past + rows
    mask = np.where(np.tril(np.ones((rows, total)), past) > 0, 0.0, -1e9).astype(np.float32)[None, None]
    key, value = _normal(1, rows, GROUPS * HEAD, seed=2), _normal(1, rows, GROUPS * HEAD, seed=3)
    new = {"key": key, "val": value}
    own = {"pk": _normal(1, GROUPS, past, HEAD, seed=4), "pv": _normal(1, GROUPS, past, HEAD, seed=5)}
    cache = f"float[1, {GROUPS}, {total}, {HEAD}]"
    made = {"nk": cache, "nv": cache}
    lengths = {"seq": np.array([total - 1], np.int32), "total": np.array(total, np.int32)}
    shapes = _ints(
        qs=[0, 0, HEADS, HEAD],
        ks=[0, 0, GROUPS, HEAD],
        rows=[0, GROUPS, -1, 0],
        back=[0, HEADS, -1, 0],
        flat=[0, 0, -1],
    )
    start = (
        "q4_{l} = Reshape ({x}, qs) qt{l} = Transpose <perm = [0, 2, 1, 3]> (q4_{l}) "
        "k4_{l} = Reshape (key, ks) kt{l} = Transpose <perm = [0, 2, 1, 3]> (k4_{l}) "
        "v4_{l} = Reshape (val, ks) vt{l} = Transpose <perm = [0, 2, 1, 3]> (v4_{l}) "
        "nk{l} = Concat <axis = 2> (pk{l}, kt{l}) nv{l} = Concat <axis = 2> (pv{l}, vt{l}) "
        "qr{l} = Reshape (qt{l}, rows) tk{l} = Transpose <perm = [0, 1, 3, 2]> (nk{l}) s0{l} = MatMul (qr{l}, tk{l}) "
    )
    end = "o4{l} = Reshape (o{l}, back) ot{l} = Transpose <perm = [0, 2, 1, 3]> (o4{l}) {y} = Reshape (ot{l}, flat)"
    by_rows = (
        "s1{l} = Mul (s0{l}, scale) s2{l} = Add (s1{l}, rowmask) p{l} = Softmax <axis = -1> (s2{l}) "
        "o{l} = MatMul (p{l}, nv{l}) "
    )
    by_heads = (
        "sh{l} = Reshape (s0{l}, back) s1{l} = Mul (sh{l}, scale) s2{l} = Add (s1{l}, mask) "
        "p{l} = Softmax <axis = -1> (s2{l}) pr{l} = Reshape (p{l}, rows) o{l} = MatMul (pr{l}, nv{l}) "
    )
    numbers = {**shapes, "scale": np.float32(HEAD**-0.5)}
    tiled = np.ascontiguousarray(np.tile(mask, (1, 1, HEADS // GROUPS, 1)))
    what = f"num_heads = {HEADS}, kv_num_heads = {GROUPS}"
    taken = "{x}, key, val, pk{l}, pv{l}, seq, total"
    group = "{y}, nk{l}, nv{l} = com.microsoft.GroupQueryAttention"
    standard = f"{{y}}, nk{{l}}, nv{{l}} = Attention <q_num_heads = {HEADS}, kv_num_heads = {GROUPS}>"
    forms = [
        Form("mask on rows", start + by_rows + end, {**new, "rowmask": tiled}, own, made, numbers),
        Form("mask on heads", start + by_heads + end, {**new, "mask": mask}, own, made, numbers),
        Form("GroupQueryAttention", f"{group} <{what}> ({taken})", {**new, **lengths}, own, made),
        Form(
            "GroupQueryAttention, mask", f"{group} <{what}> ({taken}, , , , mask)", {**new, **lengths, "mask": mask},
            own, made,
        ),
        Form(
            "Attention (23)", f"{standard} ({{x}}, key, val, mask, pk{{l}}, pv{{l}})", {**new, "mask": mask}, own, made
        ),
    ]  # fmt: skip
    call = f"{group} <{what}, {{how}}> ({taken}, , , , , , ks, ks)"
    yield [*forms, *_in_codes(call, {**new, **lengths}, own, total)]


def _in_codes(call: str, new: dict[str, np.ndarray], own: dict[str, np.ndarray], total: int) -> Iterator[Form]:
    """Attention with a cache in integers, `how` they are held in braces in the `call`."""
    for bits in (8, 4):
        codes = {name: _codes(array, bits) for name, array in own.items()}
        kind = "int8" if bits == 8 else "uint8"
        held = f"{kind}[1, {GROUPS}, {total}, {HEAD * bits // 8}]"
        for mode in ("PER_TENSOR", "PER_CHANNEL"):
            shape = (1,) if mode == "PER_TENSOR" else (1, GROUPS, 1, HEAD)
            scale = {"ks": np.full(shape, _step(bits), np.float32)}
            how = f'kv_cache_bit_width = {bits}, k_quant_type = "{mode}", v_quant_type = "{mode}"'
            name = f"GroupQueryAttention, int{bits} {mode.lower()[4:]}"
            yield Form(name, call.replace("{how}", how), new, codes, {"nk": held, "nv": held}, scale)


def _step(bits: int) -> float:
    """Four standard deviations within the codes."""
    return 4.0 / (2 ** (bits - 1) - 1)


def _codes(cache: np.ndarray, bits: int) -> np.ndarray:
    top = 2 ** (bits - 1)
    codes = np.clip(np.rint(cache / _step(bits)), -top, top - 1).astype(np.int8)
    if bits == 8:
        return codes
    low, high = (codes[..., 0::2] + 8).astype(np.uint8), (codes[..., 1::2] + 8).astype(np.uint8)
    return low | (high << 4)


def products(past: int, rows: int) -> Iterator[list[Form]]:
    """Products in four bits: their biases, and several of one input as one."""
    del past
    for name, sizes in (("queries, keys, values", [WIDTH, GROUPS * HEAD, GROUPS * HEAD]), ("gate, up", [INNER, INNER])):
        weights: dict[str, np.ndarray] = {"sizes": np.array(sizes, np.int64)}
        for at, columns in enumerate(sizes):
            weights.update(_blocks(f"w{at}", columns))
        last = len(sizes)
        for part in ("codes", "scale", "zero", "bias"):
            weights[f"w{last}_{part}"] = np.concatenate([weights[f"w{at}_{part}"] for at in range(last)])
        parts = " ".join(f"p{at}_{{l}} = {_call(f'w{at}', n)}" for at, n in enumerate(sizes))
        sums = " ".join(f"b{at}_{{l}} = Add (p{at}_{{l}}, w{at}_bias)" for at in range(last))
        inside = " ".join(f"b{at}_{{l}} = {_call(f'w{at}', n, bias=True)}" for at, n in enumerate(sizes))
        names = ", ".join(f"b{at}_{{l}}" for at in range(last))
        whole = f"p_{{l}} = {_call(f'w{last}', sum(sizes), bias=True)} {names} = Split <axis = -1> (p_{{l}}, sizes)"
        # Each result is read, as it is in a model; the first gives the next layer's x.
        weights.update(_ints(starts=[0], ends=[WIDTH], axes=[2]))
        reads = " ".join(f"m{at}_{{l}} = ReduceMax <keepdims = 1> (b{at}_{{l}})" for at in range(1, last))
        used = " ".join(f"t{at}_{{l}} = Add (t{at - 1}_{{l}}, m{at}_{{l}})" for at in range(1, last))
        tail = f"t0_{{l}} = Slice (b0_{{l}}, starts, ends, axes) {reads} {used} {{y}} = Tanh (t{last - 1}_{{l}})"
        yield [
            Form(f"{name}: {kind}", f"{body} {tail}", weights=weights)
            for kind, body in (("bias inside", inside), ("bias behind", f"{parts} {sums}"), ("joined", whole))
        ]


def _blocks(name: str, columns: int) -> dict[str, np.ndarray]:
    weight = _normal(WIDTH, columns, seed=columns) / np.float32(WIDTH**0.5)
    made = nearest(weight, QuantSpec(UINT4, PerBlock(0, 128)))
    zero = made.zero_point
    assert zero is not None
    bias = _normal(columns, seed=7)
    return {f"{name}_codes": made.codes, f"{name}_scale": made.scale, f"{name}_zero": zero, f"{name}_bias": bias}


def _call(name: str, columns: int, bias: bool = False) -> str:
    how = f"K = {WIDTH}, N = {columns}, bits = 4, block_size = 128, accuracy_level = 4"
    end = f", , {name}_bias" if bias else ""
    return f"com.microsoft.MatMulNBits <{how}> ({{x}}, {name}_codes, {name}_scale, {name}_zero{end})"


def norms(past: int, rows: int) -> Iterator[list[Form]]:
    """The residual sum and the norm behind it."""
    del past, rows
    weights = {"scale": _normal(WIDTH), "skip": _normal(1, 1, WIDTH)}
    how = "epsilon = 1e-6"
    yield [
        Form(
            "Add, SimplifiedLayerNormalization",
            f"s{{l}} = Add ({{x}}, skip) n{{l}} = SimplifiedLayerNormalization <axis = -1, {how}> (s{{l}}, scale) "
            "{y} = Sub (s{l}, n{l})",
            weights=weights,
        ),
        Form(
            "SkipSimplifiedLayerNormalization",
            f"n{{l}}, u{{l}}, v{{l}}, s{{l}} = com.microsoft.SkipSimplifiedLayerNormalization <{how}> "
            "({x}, skip, scale) {y} = Sub (s{l}, n{l})",
            weights=weights,
        ),
    ]


SECTIONS = {"attention": attention, "products": products, "norm": norms}


@click.command()
@click.option("--only", multiple=True, type=click.Choice(list(SECTIONS)), help="Sections to run, by default all.")
@click.option("--past", "pasts", multiple=True, default=(128, 2048), show_default=True, help="Tokens in the cache.")
@click.option("--rows", default=1, show_default=True, help="New tokens.")
@click.option("--threads", multiple=True, default=(1, 2), show_default=True, help="Intra-op threads.")
@click.option("--seconds", default=2.0, show_default=True, help="Time for each comparison.")
def main(only: tuple[str, ...], pasts: tuple[int, ...], rows: int, threads: tuple[int, ...], seconds: float) -> None:
    """Time the forms of each piece on this machine."""
    table = Table("past", "threads", "first", "us a layer", "other", "us a layer", "gain", "range", "difference")
    shape = (1, rows, WIDTH)
    x = {"x": _normal(*shape, seed=9)}
    for name in only or SECTIONS:
        for past in pasts if name == "attention" else (0,):
            for forms in SECTIONS[name](past, rows):
                first, results = forms[0], [_run(form, shape, x) for form in forms]
                for form, found in zip(forms[1:], results[1:], strict=True):
                    for count in threads:
                        row = _row(first, form, shape, x, count, seconds)
                        wrong = float(np.abs(found - results[0]).max() / np.abs(results[0]).max())
                        table.add_row(str(past), str(count), *row, f"{wrong:.0e}")
    Console(width=190).print(table)


def _run(form: Form, shape: tuple[int, ...], x: dict[str, np.ndarray]) -> Any:
    with Runnable(form.model(shape)).session(SessionOptions(threads=1)) as session:
        return session.run({**x, **form.feeds()}, ["y"])["y"]


def _row(
    first: Form, other: Form, shape: tuple[int, ...], x: dict[str, np.ndarray], threads: int, seconds: float
) -> list[str]:
    """Both forms have inputs of their own, so each runs with its feeds bound to it."""
    before, after = (_Bound(form.model(shape), {**x, **form.feeds()}) for form in (first, other))
    speed = alternate(before, after, {}, SessionOptions(), threads, seconds)
    us = [f"{1e6 * t.median / LAYERS:.1f}" for t in (speed.before, speed.after)]
    spread = f"{speed.ratio_low:.2f}-{speed.ratio_high:.2f}"
    return [first.name, us[0], other.name, us[1], f"{speed.ratio:.2f}", spread]


class _Bound(Runnable):
    """A model that brings its feeds along."""

    def __init__(self, model: ir.Model, feeds: dict[str, np.ndarray]):
        super().__init__(model)
        object.__setattr__(self, "feeds", feeds)

    feeds: dict[str, np.ndarray]

    def session(self, options: SessionOptions) -> Any:
        """A session that runs on them, whatever it is given."""
        session, feeds = super().session(options), self.feeds
        run, call = session.run, session.call
        session.run = lambda _, outputs=None: run(feeds, outputs)  # type: ignore[method-assign]
        session.call = lambda _: call(feeds)  # type: ignore[method-assign]
        return session


if __name__ == "__main__":
    main()
