"""PlainReciprocal: 1 / x as a division, for the one provider that has no other right."""

import numpy as np
import pytest
from qgraph.passes.plain_reciprocal import PlainReciprocal

from qgraph.targets.cpu import x86_vnni
from qgraph.targets.qnn import qnn


def test_a_division(model_kit):
    model = model_kit.text(
        "g (float[4, 8] x) => (float[4, 8] y, float[4, 8] z) { a = Reciprocal (x)  y = Neg (a)  z = Reciprocal (y) }"
    )
    after = model.clone()
    assert PlainReciprocal(qnn())(after).modified
    assert model_kit.ops(after) == ["Div", "Neg", "Div"]
    assert len(after.graph.initializers) == 1, "both divide the same 1"
    model_kit.same(model, after, [{"x": model_kit.normal(4, 8) + 8.0}])


def test_in_a_body(model_kit):
    model = model_kit.text(
        """g (float[4] x, bool c) => (float[4] y) {
            y = If (c) <then_branch = t () => (float[4] a) { a = Reciprocal (x) },
                        else_branch = e () => (float[4] b) { b = Neg (x) }>
        }"""
    )
    after = model.clone()
    assert PlainReciprocal(qnn())(after).modified
    assert [node.op_type for node in after.graph.all_nodes()] == ["If", "Div", "Neg"]
    model_kit.same(model, after, [{"x": model_kit.normal(4) + 8.0, "c": np.array(c)} for c in (True, False)])


@pytest.mark.parametrize("kind, target", [("float", x86_vnni()), ("double", qnn())])
def test_left(model_kit, kind, target):
    model = model_kit.text(f"g ({kind}[4] x) => ({kind}[4] y) {{ y = Reciprocal (x) }}")
    assert not PlainReciprocal(target)(model).modified
    assert model_kit.ops(model) == ["Reciprocal"]
