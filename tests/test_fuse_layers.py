"""FuseLayers: a layer and its affine neighbours become one layer, where nobody else reads what is between."""

import numpy as np
import pytest
from qgraph.passes import Canonicalize, FuseLayers

from qgraph.graph import ORIGINS


@pytest.fixture
def fused(model_kit):
    """Applies the pass to a copy and checks the numbers."""

    def apply(model, first=None, tolerance=1e-4):
        after = model.clone()
        if first is not None:
            first(after)
        FuseLayers()(after)
        model_kit.same(model, after, tolerance=tolerance)
        read = {v.name for node in after.graph for v in node.inputs if v is not None}
        assert set(after.graph.initializers) <= read, "dead initializers"
        return after

    return apply


@pytest.fixture
def norm(model_kit):
    """Parameters of a BatchNormalization over some channels."""
    n = model_kit.normal
    return lambda c: {"s": 1 + 0.3 * n(c), "t": n(c, seed=1), "m": n(c, seed=2), "v": np.abs(n(c, seed=3)) + 0.5}


BN = "BatchNormalization"


@pytest.mark.parametrize("bias", [False, True])
def test_conv_and_norm(model_kit, fused, norm, bias):
    n = model_kit.normal
    model = model_kit.text(
        f"""g (float[1, 3, 8, 8] x) => (float[1, 4, 8, 8] y) {{
            c = Conv <pads = [1, 1, 1, 1]> (x, W{", b" if bias else ""})
            y = {BN} (c, s, t, m, v)
        }}""",
        W=n(4, 3, 3, 3),
        **({"b": n(4)} if bias else {}),
        **norm(4),
    )
    model.graph[0].name = "/features/0/Conv"
    after = fused(model)
    assert model_kit.ops(after) == ["Conv"]
    assert len(after.graph[0].inputs) == 3
    assert after.graph[0].name == "/features/0/Conv", "users know the layer by this name"


def test_grouped_and_strided_conv(model_kit, fused, norm):
    model = model_kit.text(
        f"""g (float[1, 4, 8, 8] x) => (float[1, 8, 4, 4] y) {{
            c = Conv <pads = [1, 1, 1, 1], group = 4, strides = [2, 2]> (x, W)
            y = {BN} (c, s, t, m, v)
        }}""",
        W=model_kit.normal(8, 1, 3, 3),
        **norm(8),
    )
    after = fused(model)
    assert model_kit.ops(after) == ["Conv"]
    assert after.graph[0].attributes["group"].as_int() == 4


def test_conv_transpose_and_norm(model_kit, fused, norm):
    model = model_kit.text(
        f"g (float[1, 3, 4, 4] x) => (float[1, 4, 6, 6] y) {{ c = ConvTranspose (x, W)  y = {BN} (c, s, t, m, v) }}",
        W=model_kit.normal(3, 4, 3, 3),
        **norm(4),
    )
    assert model_kit.ops(fused(model)) == ["ConvTranspose"]


@pytest.mark.parametrize("transposed", [0, 1])
def test_gemm_and_norm(model_kit, fused, norm, transposed):
    model = model_kit.text(
        f"""g (float[2, 8] x) => (float[2, 4] y) {{
            c = Gemm <transB = {transposed}> (x, W, b)
            y = {BN} (c, s, t, m, v)
        }}""",
        W=model_kit.normal(4, 8) if transposed else model_kit.normal(8, 4),
        b=model_kit.normal(4),
        **norm(4),
    )
    assert model_kit.ops(fused(model)) == ["Gemm"]


def test_pad_and_conv(model_kit, fused):
    model = model_kit.text(
        """g (float[1, 3, 8, 8] x) => (float[1, 4, 8, 8] y) {
            p = Pad (x, pads)
            y = Conv (p, W)
        }""",
        W=model_kit.normal(4, 3, 3, 3),
        pads=np.array([0, 0, 1, 1, 0, 0, 1, 1]),
    )
    after = fused(model)
    assert model_kit.ops(after) == ["Conv"]
    assert list(after.graph[0].attributes["pads"].as_ints()) == [1, 1, 1, 1]


@pytest.mark.parametrize("pads, mode", [([0, 1, 1, 1, 0, 0, 1, 1], "constant"), ([0, 0, 1, 1, 0, 0, 1, 1], "reflect")])
def test_other_pads_stay(model_kit, fused, pads, mode):
    channels = 3 + pads[1]
    model = model_kit.text(
        f"""g (float[1, 3, 8, 8] x) => (float[1, 4, 8, 8] y) {{
            p = Pad <mode = "{mode}"> (x, pads)
            y = Conv (p, W)
        }}""",
        W=model_kit.normal(4, channels, 3, 3),
        pads=np.array(pads),
    )
    assert model_kit.ops(fused(model)) == ["Pad", "Conv"]


@pytest.mark.parametrize(
    "chain, expected",
    [
        ("a = Relu (x)  y = Relu (a)", ["Relu"]),
        ("a = Clip (x, lo, hi)  y = Relu (a)", ["Clip"]),
        ("a = Relu (x)  y = Clip (a, lo, hi)", ["Clip"]),
        ("a = Clip (x, lo, hi)  y = Clip (a, lo2, hi)", ["Clip"]),
    ],
)
def test_chains_of_relu_and_clip(model_kit, fused, chain, expected):
    known = {"lo": -0.5, "hi": 0.75, "lo2": -0.25}
    model = model_kit.text(
        f"g (float[2, 8] x) => (float[2, 8] y) {{ {chain} }}",
        **{name: np.array(value, np.float32) for name, value in known.items() if f" {name}," in chain or f" {name})"
           in chain},
    )  # fmt: skip
    assert model_kit.ops(fused(model, Canonicalize())) == expected
    fused(model)  # without inferred types, at least no harm


def test_a_clip_whose_bound_may_be_overridden_stays_right(model_kit, fused):
    model = model_kit.text(
        "g (float[2, 8] x) => (float[2, 8] y) { a = Relu (x)  y = Clip (a, lo, hi) }",
        lo=np.array(-0.5, np.float32),
        hi=np.array(0.5, np.float32),
    )
    model.graph.inputs.append(model.graph.initializers["hi"])
    after = fused(model, Canonicalize())
    other = {"x": model_kit.normal(2, 8), "hi": np.array(0.1, np.float32)}
    model_kit.same(model, after, [other])


def test_a_clip_of_unknown_type_is_left(model_kit):
    model = model_kit.text(
        """<ir_version: 10, opset_import: ["" : 21, "strange" : 1]>
        g (float[2, 8] x) => (float[2, 8] y) { s = strange.Op (x)  a = Relu (s)  b = Relu (a)  y = Clip (b, lo) }""",
        lo=np.array(-0.5, np.float32),
    )
    FuseLayers()(model)


def test_weights_in_constant_nodes_after_canonicalize(model_kit, fused, norm):
    model = model_kit.text(
        f"""g (float[1, 1, 4, 4] x) => (float[1, 2, 4, 4] y) {{
            W = Constant <value = float[2, 1, 1, 1] {{1.5, -2.0}}> ()
            s = Constant <value = float[2] {{1.5, 0.5}}> ()
            t = Constant <value = float[2] {{0.1, 0.2}}> ()
            m = Constant <value = float[2] {{0.3, -0.2}}> ()
            v = Constant <value = float[2] {{1.1, 0.7}}> ()
            c = Conv (x, W)
            y = {BN} (c, s, t, m, v)
        }}"""
    )
    assert model_kit.ops(fused(model, Canonicalize())) == ["Conv"]


# -- refused --------------------------------------------------------------------------------------------------------


def test_not_when_the_value_between_is_read_elsewhere(model_kit, fused, norm):
    model = model_kit.text(
        f"""g (float[1, 3, 8, 8] x) => (float[1, 4, 8, 8] y) {{
            c = Conv <pads = [1, 1, 1, 1]> (x, W)
            n = {BN} (c, s, t, m, v)
            y = Add (n, c)
        }}""",
        W=model_kit.normal(4, 3, 3, 3),
        **norm(4),
    )
    assert model_kit.ops(fused(model)) == ["Conv", BN, "Add"]


def test_not_when_the_value_between_is_an_output(model_kit, fused, norm):
    model = model_kit.text(
        f"""g (float[1, 3, 8, 8] x) => (float[1, 4, 8, 8] c, float[1, 4, 8, 8] y) {{
            c = Conv <pads = [1, 1, 1, 1]> (x, W)
            y = {BN} (c, s, t, m, v)
        }}""",
        W=model_kit.normal(4, 3, 3, 3),
        **norm(4),
    )
    assert model_kit.ops(fused(model)) == ["Conv", BN]


def test_not_when_a_body_reads_the_value_between(model_kit, fused, norm):
    model = model_kit.text(
        f"""g (float[1, 3, 8, 8] x, bool f) => (float[1, 4, 8, 8] y, float[1, 4, 8, 8] z) {{
            c = Conv <pads = [1, 1, 1, 1]> (x, W)
            y = {BN} (c, s, t, m, v)
            z = If (f) <
                then_branch = tb () => (float[1, 4, 8, 8] a) {{ a = Neg (c) }},
                else_branch = eb () => (float[1, 4, 8, 8] b) {{ b = Relu (c) }}
            >
        }}""",
        W=model_kit.normal(4, 3, 3, 3),
        **norm(4),
    )
    assert model_kit.ops(fused(model)) == ["Conv", BN, "If"]


def test_not_when_the_weight_is_shared(model_kit, fused, norm):
    model = model_kit.text(
        f"""g (float[1, 3, 8, 8] x) => (float[1, 4, 8, 8] y, float[1, 4, 8, 8] z) {{
            c = Conv <pads = [1, 1, 1, 1]> (x, W)
            y = {BN} (c, s, t, m, v)
            z = Conv <pads = [1, 1, 1, 1]> (x, W)
        }}""",
        W=model_kit.normal(4, 3, 3, 3),
        **norm(4),
    )
    model.graph[0].name, model.graph[2].name = "first", "second"
    after = fused(model)
    assert sorted(model_kit.ops(after)) == sorted(["Conv", BN, "Conv"])
    assert {node.name for node in after.graph if node.op_type == "Conv"} == {"first", "second"}


def test_layers_that_share_a_weight_keep_their_names(model_kit, fused):
    n = model_kit.normal
    model = model_kit.text(
        """g (float[1, 4, 8, 8] x) => (float[1, 4, 8, 8] y) {
            a = Conv <pads = [1, 1, 1, 1]> (x, W)
            p = Pad (a, pads)
            b = Conv (p, W)
            q = Pad (b, pads)
            y = Conv (q, V)
        }""",
        W=n(4, 4, 3, 3),
        V=n(4, 4, 3, 3, seed=1),
        pads=np.array([0, 0, 1, 1, 0, 0, 1, 1]),
    )
    for node in model.graph:
        node.name = f"/net/{node.outputs[0].name}"
    names = [node.name for node in fused(model).graph if node.op_type == "Conv"]
    assert names[0] == "/net/a" and names[2] == "/net/y"
    assert len(set(names)) == 3


def test_what_was_merged_is_remembered(model_kit, fused, norm):
    model = model_kit.text(
        f"""g (float[1, 3, 8, 8] x) => (float[1, 4, 8, 8] y) {{
            c = Conv <pads = [1, 1, 1, 1]> (x, W)
            y = {BN} (c, s, t, m, v)
        }}""",
        W=model_kit.normal(4, 3, 3, 3),
        **norm(4),
    )
    for node in model.graph:
        node.name = f"/net/{node.outputs[0].name}"
    (conv,) = fused(model).graph
    assert conv.name == "/net/c"
    assert ("/net/y", BN) in conv.meta[ORIGINS]


def test_pad_conv_and_norm_become_one(model_kit, fused, norm):
    model = model_kit.text(
        f"""g (float[1, 3, 8, 8] x) => (float[1, 4, 8, 8] y) {{
            p = Pad (x, pads)
            c = Conv (p, W)
            y = {BN} (c, s, t, m, v)
        }}""",
        W=model_kit.normal(4, 3, 3, 3),
        pads=np.array([0, 0, 1, 1, 0, 0, 1, 1]),
        **norm(4),
    )
    for node in model.graph:
        node.name = f"/net/{node.outputs[0].name}"
    (conv,) = fused(model).graph
    assert conv.name == "/net/c"
    assert {("/net/p", "Pad"), ("/net/y", BN)} <= set(conv.meta[ORIGINS])


def test_not_when_the_weight_may_be_overridden(model_kit, fused, norm):
    model = model_kit.text(
        f"""g (float[1, 3, 8, 8] x) => (float[1, 4, 8, 8] y) {{
            c = Conv <pads = [1, 1, 1, 1]> (x, W)
            y = {BN} (c, s, t, m, v)
        }}""",
        W=model_kit.normal(4, 3, 3, 3),
        **norm(4),
    )
    model.graph.inputs.append(model.graph.initializers["W"])
    after = fused(model)
    other = {"x": model_kit.normal(1, 3, 8, 8), "W": model_kit.normal(4, 3, 3, 3, seed=8)}
    model_kit.same(model, after, [other], tolerance=1e-4)


def test_not_when_the_norm_is_computed(model_kit, fused, norm):
    given = norm(4)
    del given["s"]
    model = model_kit.text(
        f"""g (float[1, 3, 8, 8] x, float[4] s) => (float[1, 4, 8, 8] y) {{
            c = Conv <pads = [1, 1, 1, 1]> (x, W)
            y = {BN} (c, s, t, m, v)
        }}""",
        W=model_kit.normal(4, 3, 3, 3),
        **given,
    )
    assert model_kit.ops(fused(model)) == ["Conv", BN]


def test_nothing_to_fuse_is_not_modified(model_kit):
    model = model_kit.text("g (float[2, 8] x) => (float[2, 8] y) { y = Tanh (x) }")
    assert not FuseLayers()(model).modified
