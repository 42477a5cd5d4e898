"""Self-attention with batch and heads in one axis on the way, as exporters write it, and plainly."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from glue import MODELS, Case

__all__ = ["flattened"]


def flattened() -> Iterator[Case]:
    """One product for queries, keys and values, positions first; heads split off with the batch; and all back again."""
    for name, (tokens, width, heads, head, _) in MODELS.items():
        for batch in (1, 4):
            x = (batch, tokens, width)
            rng = np.random.default_rng(0)
            integers = {
                "apart": [tokens, -1, 3, width],
                "zero": [0],
                "two": [-2],
                "flat": [tokens, -1, head],
                "rows": [batch, heads, tokens, head],
                "all": [-1, width],
                "lead": [tokens, -1, width],
                "parts": [width] * 3,
            }
            weights: dict[str, np.ndarray] = {key: np.array(n, np.int64) for key, n in integers.items()}
            weights |= {f"n{k}": np.array(k, np.int64) for k in range(3)}
            weights["root"] = np.array(head**-0.25, np.float32)
            weights["W"] = rng.standard_normal((width, 3 * width)).astype(np.float32) / np.float32(width**0.5)
            split = " ".join(
                f"_{v}0 = Gather (_s, n{k}) _{v}1 = Reshape (_{v}0, flat)"
                f" _{v}2 = Transpose <perm = [1, 0, 2]> (_{v}1) _{v}3 = Reshape (_{v}2, rows)"
                for k, v in enumerate("qkv")
            )
            forms = {
                "nn.MultiheadAttention": "_t = Transpose <perm = [1, 0, 2]> ({x}) _p = MatMul (_t, W)"
                " _a = Reshape (_p, apart) _u = Unsqueeze (_a, zero) _b = Transpose <perm = [3, 1, 2, 0, 4]> (_u)"
                f" _s = Squeeze (_b, two) {split} _q = Mul (_q3, root) _k4 = Transpose <perm = [0, 1, 3, 2]> (_k3)"
                " _k = Mul (_k4, root) _m = MatMul (_q, _k) _w = Softmax <axis = -1> (_m) _c = MatMul (_w, _v3)"
                " _d = Transpose <perm = [2, 0, 1, 3]> (_c) _e = Reshape (_d, all) _f = Reshape (_e, lead)"
                " {y} = Transpose <perm = [1, 0, 2]> (_f)",
                "Split, Attention (23)": "_p = MatMul ({x}, W) _q, _k, _v = Split <axis = 2> (_p, parts)"
                f" {{y}} = Attention <q_num_heads = {heads}, kv_num_heads = {heads}> (_q, _k, _v)",
            }
            yield Case("nn.MultiheadAttention", f"{name} {list(x)}", forms, x, {}, weights)
            yield Case("torch.bmm", f"{name} {list(x)}", *_stacked(x, heads, rng))


def _stacked(
    x: tuple[int, int, int], heads: int, rng: np.random.Generator
) -> tuple[dict[str, str], tuple[int, int, int], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """BART's attention up to transformers 4.4x: products in three dimensions, the mask added in four."""
    batch, tokens, width = x
    head = width // heads
    integers = {
        "apart": [0, 0, heads, head],
        "flat": [batch * heads, tokens, head],
        "square": [batch, heads, tokens, tokens],
        "rows": [batch * heads, tokens, tokens],
        "back": [batch, heads, tokens, head],
        "joined": [0, 0, width],
    }
    weights: dict[str, np.ndarray] = {key: np.array(n, np.int64) for key, n in integers.items()}
    weights["root"] = np.array(head**-0.5, np.float32)
    for name in "QKV":
        weights[name] = rng.standard_normal((width, width)).astype(np.float32) / np.float32(width**0.5)
    mask = np.where(rng.random((batch, 1, tokens, tokens)) < 0.2, np.float32(-1e9), np.float32(0))
    projected = "_q0 = MatMul ({x}, Q) _k = MatMul ({x}, K) _v = MatMul ({x}, V)"
    split = " ".join(
        f"_{v}1 = Reshape (_{v}, apart) _{v}2 = Transpose <perm = [0, 2, 1, 3]> (_{v}1) _{v}3 = Reshape (_{v}2, flat)"
        for v in "qkv"
    )
    forms = {
        "torch.bmm": f"{projected} _q = Mul (_q0, root) {split} _k4 = Transpose <perm = [0, 2, 1]> (_k3)"
        " _p = MatMul (_q3, _k4) _p1 = Reshape (_p, square) _a = Add (_p1, mask) _a1 = Reshape (_a, rows)"
        " _w = Softmax <axis = -1> (_a1) _o = MatMul (_w, _v3) _o1 = Reshape (_o, back)"
        " _o2 = Transpose <perm = [0, 2, 1, 3]> (_o1) {y} = Reshape (_o2, joined)",
        "Attention (23)": f"{projected} {{y}} = Attention <q_num_heads = {heads}, kv_num_heads = {heads}>"
        " (_q0, _k, _v, mask)",
    }
    return forms, x, {"mask": mask}, weights
