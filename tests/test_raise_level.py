"""Products that come with weights of few bits: at level 4, in blocks that have a kernel, with the same numbers."""

import numpy as np
import pytest
from qgraph.passes.raise_level import RaiseLevel

from qgraph import registry
from qgraph.blocks import nearest
from qgraph.formats import UINT2, UINT4, UINT8
from qgraph.spec import PerBlock, QuantSpec

FORMATS = {2: UINT2, 4: UINT4, 8: UINT8}


def given(model_kit, bits, size, level, inner=300, columns=24, zero=True, **more):
    """A model as other tools write it."""
    spec = QuantSpec(FORMATS[bits], PerBlock(1, size), symmetric=not zero)
    made = nearest(model_kit.normal(columns, inner), spec)
    constants = {"B": made.codes, "s": made.scale.reshape(-1), **({"z": made.zero_point} if zero else {}), **more}
    stated = "" if level is None else f", accuracy_level = {level}"
    return made, model_kit.text(
        f"""<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
        g (float[n, {inner}] x) => (float[n, {columns}] y) {{
        [p] y = com.microsoft.MatMulNBits <K = {inner}, N = {columns}, bits = {bits}, block_size = {size}{stated}>
            (x, {", ".join(constants)}) }}""",
        **constants,
    )


@pytest.mark.parametrize("level", [None, 0, 1, 3, 4])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_level_is_raised(model_kit, bits, level):
    """The numbers stay, but for the activations' rounding to 8 bits."""
    _, model = given(model_kit, bits, 32, level)
    before = model.clone()
    result = RaiseLevel(registry.target("x86-vnni"))(model)
    assert result.modified == (level != 4)
    (node,) = model.graph
    assert node.attributes["accuracy_level"].as_int() == 4
    assert model_kit.sqnr(before, model, model_kit.feeds(before, 4, free=3)) > 35


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("inner", [256, 300, 384, 512, 900])
def test_long_blocks_of_two_bits_become_short_ones(model_kit, inner, zero):
    """Of the same numbers, also where the last block is short."""
    made, model = given(model_kit, 2, 256, 4, inner, zero=zero)
    pass_ = RaiseLevel(registry.target("x86-vnni"))
    pass_(model)
    (node,) = model.graph
    assert node.attributes["block_size"].as_int() == 128
    assert not pass_.refused
    feed = model_kit.feeds(model, 1, free=5)[0]
    expected = feed["x"] @ made.real.T
    found = model_kit.run(model, feed)["y"]
    assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()


def test_what_has_no_kernel_is_told(model_kit):
    """Short blocks of two bits stay, with the reason."""
    _, model = given(model_kit, 2, 16, 4)
    pass_ = RaiseLevel(registry.target("x86-vnni"))
    assert not pass_(model).modified
    assert pass_.refused == {"p": "onnxruntime has no fast kernel for 2 bits in blocks of 16"}
