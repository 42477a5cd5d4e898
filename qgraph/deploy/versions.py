"""The oldest onnxruntime that reads a model: by its IR version, its opset, and the operators of the runtime's own.

Found by trying: seventeen releases from 1.15 to 1.31 were given a one-operator model of each kind, and the first that
loaded and ran it is listed (`tools/probe_versions.py` repeats it). Older releases were not tried.
"""

from __future__ import annotations

import onnx_ir as ir

__all__ = ["OLDEST_TRIED", "oldest_runtime"]

Version = tuple[int, int]

OLDEST_TRIED: Version = (1, 15)
_IR: dict[int, Version] = {10: (1, 18), 11: (1, 23), 12: (1, 24), 13: (1, 24)}
_OPSET: dict[int, Version] = {19: (1, 16), 20: (1, 17), 21: (1, 18), 22: (1, 21), 23: (1, 23), 24: (1, 24), 25: (1, 24)}
_NEWEST: Version = (1, 25)
"""First release that reads opset 26, the newest tried."""
_PRODUCTS: dict[int, Version] = {4: (1, 17), 8: (1, 22), 2: (1, 24)}
"""MatMulNBits, by its bits."""
_OPERATORS: dict[str, Version] = {
    "GatherBlockQuantized": (1, 23),
    "GroupQueryAttention": (1, 18),
    "RotaryEmbedding": (1, 17),
    "SkipSimplifiedLayerNormalization": (1, 16),
}
_PLAIN = frozenset(
    {
        "DynamicQuantizeMatMul",
        "FastGelu",
        "FusedMatMul",
        "Gelu",
        "QuickGelu",
    }
)
"""Operators that the oldest release tried has."""


def oldest_runtime(model: ir.Model) -> tuple[str, list[str]]:
    """Version of the oldest release that reads the model, and what in it was not tried.

    Returns:
        ("1.18", operators of the runtime's own, IR versions and opsets whose first release is not known here).
    """
    found, untried = OLDEST_TRIED, set[str]()
    version, opset = model.ir_version or 0, model.graph.opset_imports.get("", 0)
    if version >= min(_IR):
        found = max(found, _IR.get(version, _NEWEST))
    if opset >= min(_OPSET):
        found = max(found, _OPSET.get(opset, _NEWEST))
    untried |= {f"IR version {version}"} if version > max(_IR) else set()
    untried |= {f"opset {opset}"} if opset > max(_OPSET) + 1 else set()
    for node in model.graph.all_nodes():
        if node.domain == "com.microsoft" and node.op_type == "MatMulNBits":
            found = max(found, _PRODUCTS.get(node.attributes.get_int("bits", 4), _NEWEST))
        elif node.domain == "com.microsoft" and node.op_type in _OPERATORS:
            found = max(found, _OPERATORS[node.op_type])
            if node.attributes.get_int("kv_cache_bit_width", 0):
                untried.add("GroupQueryAttention with a quantized cache")
        elif node.domain not in ("", "ai.onnx") and node.op_type not in _PLAIN:
            untried.add(f"{node.domain}:{node.op_type}")
    return f"{found[0]}.{found[1]}", sorted(untried)
