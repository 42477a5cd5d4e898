"""The pieces of a transformer between its products, each in several forms, for `measure_glue.py`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
from onnx import numpy_helper

__all__ = ["REPEATS", "SECTIONS", "Case"]

REPEATS = 4
HEADER = '<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>'
# (tokens, width, heads, width of a head, heads of keys and values)
MODELS = {
    "MiniLM": (64, 384, 12, 32, 12),
    "BERT-base": (128, 768, 12, 64, 12),
    "DeiT-small": (197, 384, 6, 64, 6),
    "small Llama": (256, 256, 8, 32, 4),
}


@dataclass(frozen=True)
class Case:
    """One piece of a model in several forms, the first of which is what exporters write.

    `forms` is name -> body; `{x}` is what the body reads, `{y}` what it writes, both of shape `x`; `_name` is its own,
    other names are further `inputs` of the graph, or `weights`.
    """

    piece: str
    size: str
    forms: dict[str, str]
    x: tuple[int, ...]
    inputs: dict[str, np.ndarray]
    weights: dict[str, np.ndarray]

    def model(self, form: str) -> ir.Model:
        """The form, `REPEATS` times in a row."""
        body = []
        for step in range(REPEATS):
            text = self.forms[form].format(x=f"x{step}", y=f"x{step + 1}")
            body.append(re.sub(r"\b_(\w+)", rf"l{step}_\1", text))
        shape = ", ".join(map(str, self.x))
        kinds = {"f": "float", "i": "int64", "b": "bool"}
        kinds_of = {name: "int32" if a.dtype == np.int32 else kinds[a.dtype.kind] for name, a in self.inputs.items()}
        more = "".join(f", {kinds_of[n]}[{', '.join(map(str, a.shape))}] {n}" for n, a in self.inputs.items())
        head = f"g (float[{shape}] x0{more}) => (float[{shape}] x{REPEATS})"
        model = onnx.parser.parse_model(f"{HEADER}\n{head} {{ {' '.join(body)} }}")
        used = set(re.findall(r"\w+", " ".join(body)))
        model.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in self.weights.items() if n in used)
        return ir.from_proto(model)

    def feeds(self) -> dict[str, np.ndarray]:
        """One run's inputs."""
        x = np.random.default_rng(0).standard_normal(self.x).astype(np.float32)
        return {"x0": x, **self.inputs}


def _normal(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _scalars(**values: float) -> dict[str, np.ndarray]:
    return {name: np.array(value, np.float32) for name, value in values.items()}


def _ints(**values: list[int]) -> dict[str, np.ndarray]:
    return {name: np.array(value, np.int64) for name, value in values.items()}


def activations() -> Iterator[Case]:
    """GELU by Erf and by Tanh, and SiLU, on the four times wider layer."""
    numbers = _scalars(root=np.sqrt(0.5), one=1, half=0.5, c=0.044715, k=np.sqrt(2 / np.pi), three=3)
    tanh = "_p = Pow ({x}, three) _c = Mul (_p, c) _s = Add ({x}, _c) _i = Mul (_s, k) _t = Tanh (_i)"
    for name, (tokens, width, *_) in MODELS.items():
        shape = (1, tokens, 4 * width)
        size, weights = f"{name} {list(shape)}", numbers
        erf = {
            "Erf in parts": "_h = Mul ({x}, half) _s = Mul ({x}, root) _e = Erf (_s) _d = Add (_e, one)"
            " {y} = Mul (_h, _d)",
            "Gelu": "{y} = Gelu ({x})",
            "FastGelu (other numbers)": "{y} = com.microsoft.FastGelu ({x})",
        }
        yield Case("GELU", size, erf, shape, {}, weights)
        parts = {
            "Tanh in parts": f"_h = Mul ({{x}}, half) {tanh} _d = Add (_t, one) {{y}} = Mul (_h, _d)",
            "FastGelu": "{y} = com.microsoft.FastGelu ({x})",
            "Gelu approximate": '{y} = Gelu <approximate = "tanh"> ({x})',
        }
        yield Case("GELU by tanh", size, parts, shape, {}, weights)
        silu = {
            "SiLU in parts": "_s = Sigmoid ({x}) {y} = Mul ({x}, _s)",
            "QuickGelu": "{y} = com.microsoft.QuickGelu <alpha = 1.0> ({x})",
        }
        yield Case("SiLU", size, silu, shape, {}, weights)


def norms() -> Iterator[Case]:
    """RMSNorm, alone and after a residual; LayerNormalization in parts."""
    for name, (tokens, width, *_) in MODELS.items():
        shape = (1, tokens, width)
        weights = {**_scalars(two=2, eps=1e-6, one=1), **_ints(last=[-1]), "g": _normal(width), "b": _normal(width)}
        rms = "_q = Pow ({x}, two) _m = ReduceMean (_q, last) _v = Add (_m, eps) _r = Sqrt (_v)"
        forms = {
            "RMSNorm in parts": rms + " _i = Reciprocal (_r) _n = Mul ({x}, _i) {y} = Mul (_n, g)",
            "SimplifiedLayerNormalization": "{y} = SimplifiedLayerNormalization <axis = -1, epsilon = 1e-6> ({x}, g)",
            "RMSNormalization": "{y} = RMSNormalization <axis = -1, epsilon = 1e-6> ({x}, g)",
        }
        size = f"{name} {list(shape)}"
        yield Case("RMSNorm", size, forms, shape, {}, weights)
        forms = {
            "Sum, Simplified": "_s = Sum ({x}, x0)"
            " {y} = SimplifiedLayerNormalization <axis = -1, epsilon = 1e-6> (_s, g)",
            "SkipSimplified": "{y} = com.microsoft.SkipSimplifiedLayerNormalization <epsilon = 1e-6> ({x}, x0, g)",
        }
        yield Case("residual RMSNorm", size, forms, shape, {}, weights)
        forms = {
            "Sum, LayerNormalization": "_s = Sum ({x}, x0)"
            " {y} = LayerNormalization <axis = -1, epsilon = 1e-6> (_s, g, b)",
            "SkipLayerNormalization": "{y} = com.microsoft.SkipLayerNormalization <epsilon = 1e-6> ({x}, x0, g, b)",
        }
        yield Case("residual LayerNorm", size, forms, shape, {}, weights)


def rotary() -> Iterator[Case]:
    """Rotation of halves, on [1, heads, tokens, head size]."""
    for name, (tokens, _, heads, head, _) in MODELS.items():
        shape = (1, heads, tokens, head)
        angle = np.arange(tokens)[:, None] * 10000 ** -(np.arange(head // 2) / (head // 2))
        tables = {"cos": np.cos(angle).astype(np.float32), "sin": np.sin(angle).astype(np.float32)}
        weights = {
            **_ints(zero=[0], half=[head // 2], end=[2**31], last=[-1]),
            **tables,
            **{n + "2": np.tile(a, (1, 2))[None, None] for n, a in tables.items()},
            "ids": np.arange(tokens)[None],
        }
        halves = "_a = Slice ({x}, zero, half, last) _b = Slice ({x}, half, end, last) _n = Neg (_b)"
        forms = {
            "RoPE in parts": f"{halves} _c = Concat <axis = -1> (_n, _a) _d = Mul ({{x}}, cos2) _e = Mul (_c, sin2)"
            " {y} = Add (_d, _e)",
            "com.microsoft.RotaryEmbedding": "{y} = com.microsoft.RotaryEmbedding ({x}, ids, cos, sin)",
        }
        yield Case("RoPE", f"{name} {list(shape)}", forms, shape, {}, weights)


def attention() -> Iterator[Case]:
    """softmax(q k' / sqrt d + mask) v on [1, tokens, width], with the moves of heads around it."""
    for name, (tokens, width, heads, head, _) in MODELS.items():
        x = (1, tokens, width)
        weights = {
            **_ints(split=[0, 0, heads, head], join=[0, 0, width]),
            **_scalars(root=1 / np.sqrt(head)),
        }
        parts = (
            "_qs = Reshape ({x}, split) _q = Transpose <perm = [0, 2, 1, 3]> (_qs)"
            " _ks = Reshape (key, split) _k = Transpose <perm = [0, 2, 3, 1]> (_ks)"
            " _vs = Reshape (val, split) _v = Transpose <perm = [0, 2, 1, 3]> (_vs)"
        )
        end = " _o = Transpose <perm = [0, 2, 1, 3]> (_c) {y} = Reshape (_o, join)"
        scores = " _p = MatMul (_q, _k) _s = Mul (_p, root)"
        plain = " _w = Softmax <axis = -1> (_s) _c = MatMul (_w, _v)"
        masked = " _t = Add (_s, mask) _w = Softmax <axis = -1> (_t) _c = MatMul (_w, _v)"
        inputs = {"key": _normal(*x), "val": _normal(*x, seed=2)}
        mha = f"com.microsoft.MultiHeadAttention <num_heads = {heads}>"
        forms = {
            "attention in parts": parts + scores + plain + end,
            "MultiHeadAttention": f"{{y}} = {mha} ({{x}}, key, val)",
            "Attention (23)": f"{{y}} = Attention <q_num_heads = {heads}, kv_num_heads = {heads}> ({{x}}, key, val)",
        }
        yield Case("attention", f"{name} {list(x)}", forms, x, inputs, weights)
        for which, mask in {
            "padding": np.zeros((1, 1, 1, tokens), np.float32),
            "causal": np.triu(np.full((1, 1, tokens, tokens), -3.4e38, np.float32), 1),
        }.items():
            forms = {
                "masked attention in parts": parts + scores + masked + end,
                # They take no mask of one row; a model expands its own once for all layers.
                "MultiHeadAttention": f"{{y}} = {mha} ({{x}}, key, val, , , full)",
                "Attention (23)": f"{{y}} = Attention <q_num_heads = {heads}, kv_num_heads = {heads}>"
                " ({x}, key, val, full)",
            }
            masks = {"mask": mask, "full": np.ascontiguousarray(np.broadcast_to(mask, (1, 1, tokens, tokens)))}
            yield Case(f"attention, {which} mask", f"{name} {list(x)}", forms, x, {**inputs, **masks}, weights)


def heads() -> Iterator[Case]:
    """What exporters write around attention: a guard against NaN, keys and values repeated for groups of heads."""
    # Many queries of few keys are today's language models.
    for name, (tokens, _, heads, head, groups) in {**MODELS, "Qwen2-0.5B": (128, 896, 14, 64, 2)}.items():
        x = (1, heads, tokens, tokens)
        forms = {
            "Softmax, Where IsNaN": "_s = Softmax <axis = -1> ({x}) _n = IsNaN (_s) {y} = Where (_n, zero, _s)",
            "Softmax": "{y} = Softmax <axis = -1> ({x})",
        }
        yield Case("guard against NaN", f"{name} {list(x)}", forms, x, {}, _scalars(zero=0))
        for queries, keys in ((tokens, tokens), (1, tokens), (1, 8 * tokens)) if groups < heads else ():
            x, kv = (1, heads, queries, head), (1, groups, keys, head)
            weights = {
                **_ints(two=[2], full=[1, groups, heads // groups, keys, head], all=[1, heads, keys, head]),
                **_ints(rows=[0, groups, -1, 0], back=[0, heads, -1, 0]),
            }
            forms = {
                "repeated keys": "_ku = Unsqueeze (key, two) _ke = Expand (_ku, full) _k = Reshape (_ke, all)"
                " _vu = Unsqueeze (val, two) _ve = Expand (_vu, full) _v = Reshape (_ve, all)"
                " _t = Transpose <perm = [0, 1, 3, 2]> (_k) _p = MatMul ({x}, _t) _s = Softmax <axis = -1> (_p)"
                " {y} = MatMul (_s, _v)",
                "groups as rows": "_q = Reshape ({x}, rows) _t = Transpose <perm = [0, 1, 3, 2]> (key)"
                " _g = MatMul (_q, _t) _p = Reshape (_g, back) _s = Softmax <axis = -1> (_p) _r = Reshape (_s, rows)"
                " _o = MatMul (_r, val) {y} = Reshape (_o, back)",
            }
            inputs = {"key": _normal(*kv), "val": _normal(*kv, seed=2)}
            yield Case("grouped heads", f"{name} {list(x)} to {keys} keys", forms, x, inputs, weights)


def products() -> Iterator[Case]:
    """Three products of one input against one wide product and a Split."""
    for name, (tokens, width, *_) in MODELS.items():
        x = (1, tokens, width)
        codes = np.random.default_rng(3).integers(-127, 128, (width, 3 * width)).astype(np.int8)
        weights: dict[str, np.ndarray] = {"w": codes.astype(np.float32) / (127 * width**0.5), "codes": codes}
        weights |= {f"w{i}": np.ascontiguousarray(weights["w"][:, i * width : (i + 1) * width]) for i in range(3)}
        weights |= {f"codes{i}": np.ascontiguousarray(codes[:, i * width : (i + 1) * width]) for i in range(3)}
        weights |= {"s": np.full(3 * width, 1 / (127 * width**0.5), np.float32), "z": np.zeros(3 * width, np.int8)}
        weights |= {"s1": weights["s"][:width], "z1": weights["z"][:width], **_scalars(xs=0.05)}
        weights["xz"] = np.array(128, np.uint8)
        three = " ".join(f"_p{i} = MatMul ({{x}}, w{i})" for i in range(3)) + " {y} = Sum (_p0, _p1, _p2)"
        one = "_p = MatMul ({x}, w) _a, _b, _c = Split <axis = -1, num_outputs = 3> (_p) {y} = Sum (_a, _b, _c)"
        yield Case("products", f"{name} {list(x)}", {"three MatMul": three, "one and Split": one}, x, {}, weights)
        pair = "_e = QuantizeLinear ({x}, xs, xz) _x = DequantizeLinear (_e, xs, xz) "
        three = pair + " ".join(
            f"_w{i} = DequantizeLinear <axis = 1> (codes{i}, s1, z1) _p{i} = MatMul (_x, _w{i})" for i in range(3)
        )
        one = pair + "_w = DequantizeLinear <axis = 1> (codes, s, z) " + one.replace("{x}, w", "_x, _w")
        forms = {"three MatMul": three + " {y} = Sum (_p0, _p1, _p2)", "one and Split": one}
        yield Case("int8 products", f"{name} {list(x)}", forms, x, {}, weights)


def beside() -> Iterator[Case]:
    """A few channels in float beside a dynamic int8 product, as `SetAside` writes them: what they add to its time."""
    for name, (tokens, width, *_) in MODELS.items():
        x, wide = (1, tokens, width), 4 * width
        codes = np.random.default_rng(3).integers(-127, 128, (width, wide)).astype(np.int8)
        weights = {"up": codes, "ups": _normal(wide), "down": codes.reshape(wide, width), "downs": _normal(width)}
        few = {**_ints(few=[1, 5, 8, 11]), "upf": np.zeros((4, wide), np.float32), "downf": _normal(4, width) * 0}

        def product(source: str, weight: str, result: str) -> str:
            return (
                f"_q{weight}, _s{weight}, _z{weight} = DynamicQuantizeLinear ({source})"
                f" _m{weight} = MatMulInteger (_q{weight}, {weight}, _z{weight})"
                f" _c{weight} = Cast <to = 1> (_m{weight}) _f{weight} = Mul (_s{weight}, {weight}s)"
                f" {result} = Mul (_c{weight}, _f{weight}) "
            )

        def share(source: str, weight: str, coded: str, result: str) -> str:
            picked = f"_g{weight} = Gather <axis = -1> ({source}, few) _b{weight} = MatMul (_g{weight}, {weight}f)"
            return f"{picked} {result} = Add ({coded}, _b{weight}) "

        forms = {
            "codes alone": product("{x}", "up", "_u") + product("_u", "down", "{y}"),
            "4 aside of the wide one": product("{x}", "up", "_u")
            + product("_u", "down", "_d")
            + share("_u", "down", "_d", "{y}"),
            "4 aside of the narrow one": product("{x}", "up", "_n")
            + share("{x}", "up", "_n", "_u")
            + product("_u", "down", "{y}"),
        }
        yield Case("channels aside", f"{name} {list(x)}", forms, x, {}, {**weights, **few})


SECTIONS = {
    "beside": beside,
    "activation": activations,
    "norm": norms,
    "rotary": rotary,
    "attention": attention,
    "heads": heads,
    "product": products,
}
