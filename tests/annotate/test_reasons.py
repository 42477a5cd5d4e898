"""A reason for each node that stays in float: the user's, the target's or the form's."""

import numpy as np
import onnx_ir as ir
import pytest
from qgraph.passes import Annotate, Canonicalize, FuseLayers

from qgraph.errors import NothingQuantizedError, OptionError
from qgraph.graph import ORIGINS
from qgraph.targets import KERNEL, REASON


@pytest.mark.parametrize("pattern", ["b", "b*", "?"])
def test_keep_float(model_kit, annotated, chain, pattern):
    if pattern == "?":
        with pytest.raises(NothingQuantizedError, match=r"left in float by the option '\?'"):
            annotated(chain, keep_float=(pattern,))
        return
    assert annotated(chain, keep_float=(pattern,)) == {"a", "c", "y"}
    assert model_kit.reasons(chain)["b"] == f"left in float by the option {pattern!r}"


def test_keep_float_of_an_operator_and_of_a_name_with_brackets(model_kit, priced, annotated, chain):
    with pytest.raises(NothingQuantizedError):
        annotated(chain.clone(), keep_float=("Conv",))
    Canonicalize()(chain)
    for node in chain.graph:
        node.name = f"/layers[0]/{node.outputs[0].name}"
    target = priced()
    Annotate(target, target.scheme("int8"), ("/layers[0]/b",))(chain)
    assert [node.name for node in chain.graph if KERNEL in node.meta] == [f"/layers[0]/{c}" for c in "acy"]


def test_keep_float_of_a_node_that_was_merged_into_another(model_kit, annotated):
    n = model_kit.normal
    model = model_kit.text(
        """g (float[1, 4, 8, 8] x) => (float[1, 4, 8, 8] y) {
            c = Conv <pads = [1, 1, 1, 1]> (x, A)
            b = BatchNormalization (c, s, t, m, v)
            y = Conv <pads = [1, 1, 1, 1]> (b, B)
        }""",
        A=n(4, 4, 3, 3),
        B=n(4, 4, 3, 3, seed=1),
        **{name: np.ones(4, np.float32) for name in "stmv"},
    )
    for node in model.graph:
        node.name = f"/net/{node.op_type}/{node.outputs[0].name}"
    Canonicalize()(model)
    FuseLayers()(model)
    assert ("/net/BatchNormalization/b", "BatchNormalization") in model.graph[0].meta[ORIGINS]
    for pattern in ("/net/BatchNormalization/b", "*/b", "BatchNormalization"):
        assert annotated(model.clone(), keep_float=(pattern,)) == {"y"}, pattern


@pytest.mark.parametrize(
    "pattern, near", [("Cov", "Conv"), ("none*", "There are|Known"), ("BatchNormalization", "Known")]
)
def test_keep_float_without_effect_is_an_error(annotated, chain, pattern, near):
    with pytest.raises(OptionError, match=rf"node or operator to choose for.*{pattern[:3]}.*({near})"):
        annotated(chain, keep_float=("b", pattern))


def test_keep_float_in_a_body_has_an_effect(model_kit, annotated):
    n = model_kit.normal
    model = model_kit.text(
        """g (float[2, 8] x, bool f) => (float[2, 8] y) {
            a = MatMul (x, W)
            y = If (f) <
                then_branch = t () => (float[2, 8] u) { u = Elu (a) },
                else_branch = e () => (float[2, 8] v) { v = Neg (a) }
            >
        }""",
        W=n(8, 8),
    )
    assert annotated(model, keep_float=("Elu",)) == {"a"}


def test_refused_nodes_keep_the_reason_they_were_given(model_kit, annotated, chain):
    refused = {("b", "int8"): "the runtime did not like it", ("nobody", "int8"): "..."}
    assert annotated(chain, refused=refused) == {"a", "c", "y"}
    assert model_kit.reasons(chain)["b"] == "the runtime did not like it"


def test_what_is_refused_in_one_scheme_may_run_in_another(model_kit, annotated, chain):
    assert annotated(chain, refused={("b", "int8-dynamic"): "..."}) == {"a", "b", "c", "y"}


@pytest.mark.parametrize(
    "text, reason",
    [
        ("t = Conv (C, W4)", "'C' is a constant"),
        ("t = Conv (d, W4)", "'d' is a constant or has a default"),
        ("t = Gemm (M, W)", "'M' is a constant"),
        ("t = MatMul (W, x)", "the weight is on the left"),
        ("t = MatMul (x, x)", "product of two activations"),
        ("t = Add (x, M)", "one side is a constant"),
        ("t = Sigmoid (M)", "'M' is a constant"),
        ("t = Transpose (M)", "'M' is a constant"),
        ("t = Concat <axis = 0> (x, M)", "'M' is a constant"),
        ("t = Gemm (x, W, col)", "one number per column"),
        ("t, u = Split <axis = 0, num_outputs = 2> (x)", "only when all its outputs are read"),
        ("t = Softmax (x)", "integer Softmax is several times slower"),
    ],
)
def test_reasons_of_refused_forms(model_kit, priced, text, reason):
    n = model_kit.normal
    known = {"C": n(1, 4, 8, 8), "d": n(1, 4, 8, 8), "W4": n(4, 4, 3, 3), "M": n(8, 8), "W": n(8, 8), "col": n(8, 1)}
    used = {k: v for k, v in known.items() if k in text.replace("Conv", "").replace("Concat", "").replace("MatMul", "")}
    model = model_kit.text(
        f"g (float[8, 8] x) => (float[8, 8] y) {{ y = MatMul (x, V)  {text} }}", V=n(8, 8, seed=1), **used
    )
    if "d" in used and "(d" in text:
        model.graph.inputs.append(model.graph.initializers["d"])
    # Not canonicalized: constants would be folded, the unread node would go.
    ir.passes.common.ShapeInferencePass()(model)
    target = priced()
    Annotate(target, target.scheme("int8"))(model)
    assert reason in model.graph[1].meta[REASON]


@pytest.mark.parametrize("operator, reason", [("MatMul (h, V)", "float16"), ("Erf (h)", "no integer kernel for Erf")])
def test_reasons(model_kit, priced, operator, reason):
    n = model_kit.normal
    model = model_kit.text(
        f"""g (float[2, 8] x) => (float16[2, 8] y) {{
            a = MatMul (x, W)
            h = Cast <to = 10> (a)
            y = {operator}
        }}""",
        W=n(8, 8),
        **({"V": n(8, 8).astype("float16")} if "V" in operator else {}),
    )
    Canonicalize()(model)
    target = priced()
    Annotate(target, target.scheme("int8"))(model)
    assert reason in model.graph[2].meta[REASON]


def test_layers_in_bodies_have_a_reason(model_kit, annotated):
    n = model_kit.normal
    model = model_kit.text(
        """g (float[2, 8] x, bool f) => (float[2, 8] y) {
            a = MatMul (x, W)
            y = If (f) <
                then_branch = t () => (float[2, 8] u) { u = MatMul (a, W) },
                else_branch = e () => (float[2, 8] v) { v = Neg (a) }
            >
        }""",
        W=n(8, 8),
    )
    annotated(model)
    inner = model.graph[1].attributes["then_branch"].as_graph()[0]
    assert "inside a body" in inner.meta[REASON]
