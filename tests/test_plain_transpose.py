"""PlainTranspose: a transpose that went by way of a Reshape is one again."""

import numpy as np
import pytest
from qgraph.passes.canonicalize import Canonicalize
from qgraph.passes.plain_transpose import PlainTranspose

KEYS = """g (float[N, 2, S, 4] x) => (float[N, 2, 4, S] y) {{
    s = Shape (x)  last = Slice (s, m1, end)  row = Slice (s, m2, m1)  outer = Slice (s, start, m2)
    flat = Concat <axis = 0> ({flat}, row, last)  r = Reshape (x, flat)  t = Transpose <perm = [0, 2, 1]> (r)
    back = Concat <axis = 0> ({back})  y = Reshape (t, back)
}}"""
NUMBERS = {name: np.array([n]) for name, n in {"m1": -1, "m2": -2, "end": 2**62, "start": -(2**62)}.items()}


@pytest.fixture
def plain(model_kit):
    """Applies the pass to a copy and checks the numbers."""

    def apply(model):
        after = model.clone()
        Canonicalize(21)(after)
        PlainTranspose()(after)
        model_kit.same(model, after, [{"x": model_kit.normal(n, 2, s, 4)} for n, s in ((2, 3), (1, 1))])
        return after

    return apply


def test_flattened_keys(model_kit, plain):
    after = plain(model_kit.text(KEYS.format(flat="m1", back="outer, last, row"), **NUMBERS))
    assert model_kit.ops(after) == ["Transpose"]
    assert list(after.graph[0].attributes["perm"].as_ints()) == [0, 1, 3, 2]


def test_two_transposes_become_one(model_kit):
    model = model_kit.text(
        """g (float[N, S, 2, 4] x) => (float[N, 2, 4, S] y) {
            t = Transpose <perm = [0, 2, 1, 3]> (x)  y = Transpose <perm = [0, 1, 3, 2]> (t)
        }"""
    )
    after = model.clone()
    assert PlainTranspose()(after).modified
    assert [list(node.attributes["perm"].as_ints()) for node in after.graph] == [[0, 2, 3, 1]]
    model_kit.same(model, after)


def test_a_result_of_the_same_form_but_other_order_stays(model_kit, plain):
    text = KEYS.replace("float[N, 2, 4, S] y", "float[S, 4, M, 2] y")
    after = plain(model_kit.text(text.format(flat="m1", back="row, last, any, two"), **NUMBERS, any=np.array([-1]),
                                 two=np.array([2])))  # fmt: skip
    assert model_kit.ops(after).count("Reshape") == 2


def test_rows_of_another_width_stay(model_kit):
    model = model_kit.text(
        """g (float[3, 2, 4, 4] x) => (float[3, 2, 4, 4] y) {
            r = Reshape (x, flat)  t = Transpose <perm = [0, 2, 1]> (r)  y = Reshape (t, back)
        }""",
        flat=np.array([-1, 2, 8]),
        back=np.array([3, 2, 4, 4]),
    )
    Canonicalize(21)(model)
    assert not PlainTranspose()(model).modified


def test_unknown_shapes_stay(model_kit):
    model = model_kit.text(
        """g (float[N, 2, S, 4] x, int64[3] flat, int64[4] back) => (float[N, 2, 4, S] y) {
            r = Reshape (x, flat)  t = Transpose <perm = [0, 2, 1]> (r)  y = Reshape (t, back)
        }"""
    )
    assert not PlainTranspose()(model).modified
