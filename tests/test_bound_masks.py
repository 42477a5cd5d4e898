"""BoundMasks: masks that codes of few bits can hold, and nothing else touched."""

import numpy as np
import pytest
from qgraph.passes import BoundMasks

from qgraph.targets.cpu import x86_vnni
from qgraph.targets.qnn import qnn
from qgraph.targets.wasm import wasm

ADDED = """
g (float[2, 4, 8] s, int64[2, 1, 8] m) => (float[2, 4, 8] y) {
    f = Cast <to=1> (m)
    i = Sub (one, f)
    far = Mul (i, low)
    t = Add (s, far)
    y = Softmax <axis=-1> (t)
}
"""
CHOSEN = """
g (float[2, 4, 8] s, bool[2, 1, 8] m) => (float[2, 4, 8] y) {
    t = Where (m, s, low)
    y = Softmax <axis=-1> (t)
}
"""
ONE, LOWEST = np.float32(1), np.finfo(np.float32).min


def feeds(kind, model_kit):
    mask = np.ones((2, 1, 8), bool)
    mask[0, :, 5:] = False
    mask[1, :, 2] = False
    return {"s": model_kit.normal(2, 4, 8, scale=4.0), "m": mask.astype(kind)}


@pytest.mark.parametrize("low", [LOWEST, -1e9, -1e4])
def test_an_added_mask(model_kit, low):
    model = model_kit.text(ADDED, one=ONE, low=np.float32(low))
    one = feeds(np.int64, model_kit)
    expected = model_kit.run(model, one)["y"]
    work = BoundMasks(qnn())
    result = work(model)
    assert result.modified and "'low' is bounded to -100" in work.notes[0]
    assert float(result.model.graph.initializers["low"].const_value.numpy()) == -100
    np.testing.assert_allclose(model_kit.run(result.model, one)["y"], expected, atol=1e-7)


@pytest.mark.parametrize("low", [-np.inf, LOWEST])
def test_a_chosen_mask(model_kit, low):
    model = model_kit.text(CHOSEN, low=np.float32(low))
    one = feeds(bool, model_kit)
    expected = model_kit.run(model, one)["y"]
    result = BoundMasks(qnn())(model)
    np.testing.assert_allclose(model_kit.run(result.model, one)["y"], expected, atol=1e-7)
    assert float(result.model.graph.initializers["low"].const_value.numpy()) == -100


def test_an_array_keeps_what_is_no_mask(model_kit):
    model = model_kit.text(
        "g (float[4, 4] s) => (float[4, 4] y) { t = Add (s, low) y = Softmax <axis=-1> (t) }",
        low=np.triu(np.full((4, 4), -np.inf, np.float32), 1) + np.tril(np.full((4, 4), 0.5, np.float32)),
    )
    done = BoundMasks(qnn())(model).model
    found = done.graph.initializers["low"].const_value.numpy()
    assert sorted(set(found.reshape(-1).tolist())) == [-100, 0.5]


def test_a_filled_mask(model_kit):
    model = model_kit.text(
        """
        g (float[3, 3] s, int64[2] size) => (float[3, 3] y) {
            f = ConstantOfShape <value = float[1] {-3e38}> (size)
            u = Trilu <upper=1> (f, k)
            t = Add (s, u)
            y = Softmax <axis=-1> (t)
        }
        """,
        k=np.int64(1),
    )
    one = {"s": model_kit.normal(3, 3), "size": np.array([3, 3])}
    expected = model_kit.run(model, one)["y"]
    result = BoundMasks(qnn())(model)
    filler = next(node for node in result.model.graph if node.op_type == "ConstantOfShape")
    assert filler.attributes["value"].as_tensor().numpy().tolist() == [-100]
    np.testing.assert_allclose(model_kit.run(result.model, one)["y"], expected, atol=1e-7)


@pytest.mark.parametrize(
    "text",
    [
        # It is read by more than a Softmax.
        "g (float[4] s) => (float[4] y, float[4] t) { t = Add (s, low) y = Softmax (t) }",
        "g (float[4] s) => (float[4] y) { t = Max (s, low) y = Relu (t) }",
        "g (float[4] s) => (float[4] y) { t = Add (s, low) e = Exp (t) f = Softmax (t) y = Add (e, f) }",
        # A temperature, and a mask that is scaled on its way.
        "g (float[4] s) => (float[4] y) { t = Mul (s, low) y = Softmax (t) }",
        "g (float[4] s) => (float[4] y) { t = Add (s, low) u = Mul (t, t) y = Softmax (u) }",
        "g (float[4] s) => (float[4] y) { t = Max (s, low) y = Softmax (t) }",
        # The caller may give another.
        "g (float[4] s, float low) => (float[4] y) { t = Add (s, low) y = Softmax (t) }",
    ],
)
def test_what_is_no_mask_alone_stays(model_kit, text):
    model = model_kit.text(text, low=np.float32(LOWEST))
    work = BoundMasks(qnn())
    result = work(model)
    assert not result.modified
    assert float(result.model.graph.initializers["low"].const_value.numpy()) == LOWEST
    assert list(work.refused) == ["low"]


def test_other_targets_keep_their_masks(model_kit):
    model = model_kit.text(ADDED, one=ONE, low=np.float32(LOWEST))
    assert not BoundMasks(wasm())(model).modified


@pytest.mark.parametrize("low", [-1e4, -3.4e38, -np.inf])
def test_an_operator_for_attention_takes_masks_as_they_are(model_kit, low):
    model = model_kit.text(ADDED, one=ONE, low=np.float32(low))
    assert not BoundMasks(x86_vnni())(model).modified


def test_but_for_the_lowest_number(model_kit):
    model = model_kit.text(ADDED, one=ONE, low=np.float32(LOWEST))
    before, work = model.clone(), BoundMasks(x86_vnni())
    assert work(model).modified and not work.notes and not work.refused
    assert LOWEST < float(model.graph.initializers["low"].const_value.numpy()) < -1e38
    model_kit.same(before, model)


@pytest.mark.parametrize(
    "text",
    [
        # Somebody asks for its shape, or whether it is 0: what Hugging Face's models do to join two masks.
        """size = Shape (m)  far = ConstantOfShape <value = float[1] {-3.4028234663852886e38}> (size)
            again = Shape (far)  zeros = ConstantOfShape <value = float[1] {0.0}> (again)
            c = Where (m, zeros, far)  t = Add (s, c)  y = Softmax <axis = -1> (t)""",
        """c = Where (m, nought, low)  hides = Cast <to = 9> (c)  d = Where (hides, low, c)
            t = Add (s, d)  y = Softmax <axis = -1> (t)""",
        # OPT's scores do not fall below where two masks meet.
        "c = Where (m, nought, low)  a = Add (s, c)  t = Max (a, low)  y = Softmax <axis = -1> (t)",
    ],
)
def test_whoever_asks_is_told_the_same(model_kit, text):
    text = f"g (float[2, 4, 8] s, bool[2, 4, 8] m) => (float[2, 4, 8] y) {{ {text} }}"
    model = model_kit.text(text, **({"low": LOWEST, "nought": np.float32(0)} if "low" in text else {}))
    before = model.clone()
    assert BoundMasks(x86_vnni())(model).modified
    one = feeds(bool, model_kit) | {"m": np.arange(64).reshape(2, 4, 8) % 13 > 4}
    one["m"][1, 2] = False
    model_kit.same(before, model, [one])


def test_what_is_0_after_a_sum_is_asked_for(model_kit):
    """A little less than the lowest number would not be."""
    model = model_kit.text(
        """g (float[2, 4] s, bool[2, 4] m, float[2, 4] w) => (float[2, 4] y, bool[2, 4] hides) {
            c = Where (m, low, nought)  d = Add (c, w)  hides = Cast <to = 9> (d)  t = Add (s, d)
            y = Softmax <axis = -1> (t)
        }""",
        low=LOWEST,
        nought=np.float32(0),
    )
    assert not BoundMasks(x86_vnni())(model).modified
