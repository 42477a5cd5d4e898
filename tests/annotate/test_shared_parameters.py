"""Parameters are shared where codes only move, and activations absorbed where codes clip."""

import numpy as np
import pytest

from qgraph.targets import ABSORBED, KERNEL, Output


def test_movers_share_the_parameters_of_what_they_move(model_kit, groups, annotated):
    n = model_kit.normal
    model = model_kit.text(
        """g (float[1, 4, 8, 8] x) => (float[1, 4, 8, 8] y) {
            a = Conv <pads = [1, 1, 1, 1]> (x, A)
            t = Transpose <perm = [0, 1, 3, 2]> (a)
            r = Reshape (t, shape)
            y = Conv <pads = [1, 1, 1, 1]> (r, B)
        }""",
        A=n(4, 4, 3, 3),
        B=n(4, 4, 3, 3),
        shape=[1, 4, 8, 8],
    )
    assert annotated(model) == {"a", "t", "r", "y"}
    assert groups(model) == [["a", "r", "t"]]


def test_inputs_of_concat_share(model_kit, groups, annotated):
    n = model_kit.normal
    model = model_kit.text(
        """g (float[1, 4, 8, 8] x) => (float[1, 8, 8, 8] y, float[1, 8, 8, 8] z) {
            a = Conv <pads = [1, 1, 1, 1]> (x, A)
            b = Conv <pads = [1, 1, 1, 1]> (x, B)
            y = Concat <axis = 1> (a, b)
            z = Concat <axis = 1> (b, x)
        }""",
        A=n(4, 4, 3, 3),
        B=n(4, 4, 3, 3),
    )
    assert annotated(model) == {"a", "b", "y", "z"}
    assert groups(model) == [["a", "b", "x", "y", "z"]]


def test_outputs_of_split_share(model_kit, groups, annotated):
    n = model_kit.normal
    model = model_kit.text(
        """g (float[1, 4, 8, 8] x) => (float[1, 2, 8, 8] y, float[1, 2, 8, 8] p) {
            a = Conv <pads = [1, 1, 1, 1]> (x, A)
            p, q = Split <axis = 1, num_outputs = 2> (a)
            y = Conv <pads = [1, 1, 1, 1]> (q, B)
        }""",
        A=n(4, 4, 3, 3),
        B=n(2, 2, 3, 3),
    )
    assert annotated(model) == {"a", "p", "y"}
    assert groups(model) == [["a", "p", "q"]]


def test_movers_of_floats_alone_stay(model_kit, priced, annotated):
    n = model_kit.normal
    model = model_kit.text(
        """g (float[2, 16] x) => (float[4, 4] y) {
            t = Transpose (x)
            e = Erf (t)
            r = Reshape (e, shape)
            y = MatMul (r, W)
        }""",
        shape=[4, 8],
        W=n(8, 4),
    )
    assert annotated(model, priced({"t": (1, 0.5), "r": (1, 1.2)})) == {"y"}


def test_kept_relu_is_not_absorbed(model_kit, specs, annotated, residual):
    assert annotated(residual, keep_float=("ar",)) == {"s", "a", "b", "p"}
    assert {node.name for node in residual.graph if ABSORBED in node.meta} == {"r", "y"}
    assert model_kit.reasons(residual)["ar"] == "left in float by the option 'ar'"
    assert {"a", "ar"} <= specs(residual), "quantized before it and after it"


@pytest.mark.parametrize("layer", ["MatMul (x, W)", "Gemm (x, W, b)"])
@pytest.mark.parametrize(
    "follower, keep, absorbed",
    [
        ("Relu (h)", (), True),
        ("Clip (h, zero, six)", (), True),
        ("Clip (h, one, six)", (), False),
        ("Clip (h, zero, top)", (), False),
        ("Gelu (h)", (), False),
        ("Relu (h)", ("r",), False),
    ],
)
def test_product_before_an_absorbable_activation_ends_in_integers(
    specs, model_kit, annotated, layer, follower, keep, absorbed
):
    n = model_kit.normal
    constants = {"zero": 0, "one": 1, "six": 6}
    model = model_kit.text(
        f"g (float[4, 16] x, float top) => (float[4, 16] y) {{ h = {layer}  r = {follower}  y = Erf (r) }}",
        W=n(16, 16),
        **({"b": n(16)} if "b" in layer else {}),
        **{name: np.array(v, np.float32) for name, v in constants.items() if name in follower},
    )
    assert annotated(model, keep_float=keep) == {"h"}
    kernel = model.graph[0].meta[KERNEL]
    assert kernel.output is (Output.QUANTIZED if absorbed else Output.FLOAT)
    assert (ABSORBED in model.graph[1].meta) == absorbed
    assert specs(model) == ({"x", "r"} if absorbed else {"x"})
    assert absorbed == (kernel.result is not None)


def test_product_before_an_activation_that_is_not_its_only_reader_writes_float(model_kit, specs, annotated):
    n = model_kit.normal
    model = model_kit.text(
        "g (float[4, 16] x) => (float[4, 16] y, float[4, 16] r) { h = MatMul (x, W)  r = Relu (h)  y = Erf (h) }",
        W=n(16, 16),
    )
    assert annotated(model) == {"h"}
    assert model.graph[0].meta[KERNEL].output is Output.FLOAT
    assert specs(model) == {"x"}


@pytest.mark.parametrize(
    "first, second, shared",
    [("Relu (a)", "Relu (b)", True), ("Relu (a)", "Neg (b)", False), ("Relu (a)", "Clip (b, zero, six)", False)],
)
def test_inputs_of_concat_share_only_if_their_bounds_are_the_same(model_kit, groups, annotated, first, second, shared):
    n = model_kit.normal
    model = model_kit.text(
        f"""g (float[1, 4, 8, 8] x) => (float[1, 8, 8, 8] y) {{
            a = Conv <pads = [1, 1, 1, 1]> (x, A)
            b = Conv <pads = [1, 1, 1, 1]> (x, B)
            r = {first}
            s = {second}
            y = Concat <axis = 1> (r, s)
        }}""",
        A=n(4, 4, 3, 3),
        B=n(4, 4, 3, 3, seed=1),
        **{name: np.array(v, np.float32) for name, v in {"zero": 0, "six": 6}.items() if name in second},
    )
    assert annotated(model) == {"a", "b", "y"}
    assert groups(model) == ([["r", "s", "y"]] if shared else [])


def test_concat_absorbs_nothing(model_kit, groups, annotated):
    n = model_kit.normal
    model = model_kit.text(
        """g (float[1, 4, 8, 8] x) => (float[1, 8, 8, 8] y) {
            a = Conv <pads = [1, 1, 1, 1]> (x, A)
            b = Conv <pads = [1, 1, 1, 1]> (x, B)
            c = Concat <axis = 1> (a, b)
            y = Relu (c)
        }""",
        A=n(4, 4, 3, 3),
        B=n(4, 4, 3, 3, seed=1),
    )
    assert annotated(model) == {"a", "b", "c"}
    assert not [node for node in model.graph if ABSORBED in node.meta]
    assert groups(model) == [["a", "b", "c"]]


def test_relu_read_in_a_body_or_bounds_computed_are_not_absorbed(model_kit, specs, annotated):
    n = model_kit.normal
    model = model_kit.text(
        """g (float[1, 4, 8, 8] x, bool f, float top) => (float[1, 4, 8, 8] y, float[1, 4, 8, 8] k) {
            a = Conv <pads = [1, 1, 1, 1]> (x, A)
            y = If (f) <
                then_branch = t () => (float[1, 4, 8, 8] u) { u = Relu (a) },
                else_branch = e () => (float[1, 4, 8, 8] v) { v = Neg (a) }
            >
            b = Conv <pads = [1, 1, 1, 1]> (x, B)
            k = Clip (b, , top)
        }""",
        A=n(4, 4, 3, 3),
        B=n(4, 4, 3, 3),
    )
    assert annotated(model) == {"a", "b"}
    assert specs(model) == {"x", "a", "b"}
