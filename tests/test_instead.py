"""What reports say of 16-bit models on targets that compute in other 16 bits, and of experts that stay together."""

import numpy as np
import pytest
from qgraph.passes import pipelines
from qgraph.passes.to_float import ToFloat

from qgraph import instead, registry
from qgraph.data import inputs_of, load
from qgraph.pipeline import Context
from qgraph.targets import KERNEL, REASON

HALVED = """<ir_version: 10, opset_import: ["" : 21]>
g ({kind}[n, 64] x) => ({kind}[n, 64] y) <{kind} two = {{2}}> {{ h = Mul (x, two) y = Sigmoid (h) }}"""


@pytest.mark.parametrize(
    ("kind", "target", "words"),
    [
        ("bfloat16", "cuda", "now does so in fp16 (bfloat16 runs at the speed of fp16"),
        ("bfloat16", "webgpu", "now does so in fp16 (WebGPU knows no bfloat16)"),
        ("bfloat16", "coreml", "now does so in fp16 ("),
        ("bfloat16", "x86-vnni", "for which this target has no kernels"),
        ("float16", "cuda", "in fp16 it stays"),
        ("float16", "x86-vnni", "for which this target has no kernels"),
    ],
)
def test_a_reason_is_given(model_kit, kind, target, words):
    """The type of inputs and outputs is what it was."""
    target = registry.target(target)
    model = model_kit.text(HALVED.format(kind=kind))
    found = pipelines.quantize(Context(target, target.scheme("auto"), None)).passes
    (widen,) = [one for one in found if isinstance(one, ToFloat)]
    widen(model)
    (note,) = widen.notes
    assert words in note and note.startswith(f"The model computes in {kind}")
    assert model.graph.inputs[0].dtype == model.graph.outputs[0].dtype
    assert model.graph.inputs[0].dtype.name == kind.upper()


def test_both_kinds_are_named():
    assert "bfloat16 and float16" in instead.told(["bfloat16", "float16"])


EXPERTS = """g (float[2, n, {inner}] x, float[n, 256] z) => (float[2, n, 8] y, float[n, 4096] o) {{
    y = MatMul (x, W)
    o = MatMul (z, V)
}}"""


@pytest.mark.parametrize(
    ("inner", "words"), [(16, "its 16 rows are less than one block of 128"), (256, "is no faster")]
)
def test_why_experts_stay_together(model_kit, inner, words):
    """And not that their table has three dimensions, which products of single experts have not."""
    weights = {"W": model_kit.normal(2, inner, 8), "V": model_kit.normal(256, 4096)}
    model = model_kit.text(EXPERTS.format(inner=inner), **weights)
    target = registry.target("x86-vnni")
    feeds = {"x": np.ones((2, 3, inner), np.float32), "z": np.ones((1, 256), np.float32)}
    context = Context(target, target.scheme("int4"), load([feeds], inputs_of(model)))
    whole, other = pipelines.plan(context)(model).model.graph
    assert KERNEL in other.meta and KERNEL not in whole.meta
    assert whole.meta[REASON].startswith("its experts stay together: ") and words in whole.meta[REASON]
