"""Random inputs: they run, ids lie within their tables, free dimensions of one name have one size."""

import numpy as np
import onnx_ir as ir
import pytest

from qgraph.session import Session
from qgraph.synthetic import synthetic


def feeds_of(model):
    """The feeds, each of which a session takes."""
    found = list(synthetic(model))
    with Session(model) as session:
        for feed in found:
            session.run(feed)
    return found


def test_ids_lie_within_the_smallest_table_they_pick_from(model_kit):
    model = model_kit.text(
        """g (int64[batch, seq] ids, int32[batch, seq] kinds, int64[batch, seq] mask) => (float[batch, seq, 4] y) {
            a = Gather (T, ids)
            wide = Cast <to = 7> (kinds)
            flat = Reshape (wide, row)
            b0 = Gather (S, flat)
            again = Gather (L, ids)
            s = Shape (a)
            b = Reshape (b0, s)
            c = Add (a, b)
            m0 = Cast <to = 1> (mask)
            m = Unsqueeze (m0, last)
            d = Mul (c, m)
            y = Add (d, again)
        }""",
        T=model_kit.normal(50, 4),
        S=model_kit.normal(2, 4),
        L=model_kit.normal(30, 4),
        row=np.array([-1]),
        last=np.array([-1]),
    )
    found = feeds_of(model)
    ids = np.concatenate([feed["ids"].ravel() for feed in found])
    assert ids.min() >= 0 and ids.max() < 30 and len(np.unique(ids)) > 25
    kinds = np.concatenate([feed["kinds"].ravel() for feed in found])
    assert set(kinds.tolist()) == {0, 1} and kinds.dtype == np.int32
    assert all((feed["mask"] == 1).all() for feed in found)
    assert len({feed[name].shape for feed in found for name in feed}) == 1, "batch and seq are one size each"


def test_a_table_along_another_axis(model_kit):
    model = model_kit.text(
        "g (int64[n] i) => (float[3, n] y) { y = Gather <axis = 1> (T, i) }", T=model_kit.normal(3, 7)
    )
    picked = np.concatenate([feed["i"] for feed in feeds_of(model)])
    assert picked.max() < 7 and len(np.unique(picked)) > 1


def test_sizes_of_free_dimensions(model_kit):
    model = model_kit.text(
        """g (float[n, 3, h, w] image, float[n, seq, 8] text, float[m, seq] other) => (float[n, 3, h, w] y) {
            y = Identity (image)
        }"""
    )
    (feed, *_) = found = feeds_of(model)
    assert feed["image"].shape == (1, 3, 224, 224) and feed["text"].shape == (1, 64, 8)
    assert feed["other"].shape == (1, 64)
    assert len(found) == 4 and not np.array_equal(found[0]["text"], found[1]["text"])


def test_types_and_defaults(model_kit):
    model = model_kit.text(
        """g (float16[4] h, double[4] d, int64 count, bool flag, float[2, 4] w) => (float[2, 4] y) {
            y = Identity (w)
        }""",
        w=np.zeros((2, 4), np.float32),
    )
    for feed in feeds_of(model):
        assert {name: (array.dtype.name, array.shape) for name, array in feed.items()} == {
            "h": ("float16", (4,)),
            "d": ("float64", (4,)),
            "count": ("int64", ()),
            "flag": ("bool", ()),
        }
        assert feed["count"] == 1 and feed["flag"]


def test_the_same_at_every_call(model_kit):
    model = model_kit.text("g (float[n, 4] x) => (float[n, 4] y) { y = Relu (x) }")
    for first, second in zip(synthetic(model), synthetic(model), strict=True):
        np.testing.assert_array_equal(first["x"], second["x"])


@pytest.mark.parametrize("shape", [None, ir.Shape([None, None])])
def test_shapes_that_are_not_known(model_kit, shape):
    model = model_kit.text("g (float[n, 4] x) => (float[n, 4] y) { y = Relu (x) }")
    model.graph.inputs[0].shape = shape
    (feed, *_) = list(synthetic(model))
    assert feed["x"].shape == (() if shape is None else (1, 64))
