"""SecondMoment: sums of products of a layer's inputs, the same bits in any order."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qgraph.formats import INT8, UINT8
from qgraph.observers.sample import Patches
from qgraph.observers.second_moment import Grid, SecondMoment, patches_of
from qgraph.qparams import fake_quantize, from_range
from qgraph.spec import QuantSpec

CODES = Grid.of(from_range(-1.0, 3.0, QuantSpec(UINT8)))
SIGNED = Grid.of(from_range(-2.0, 2.0, QuantSpec(INT8, symmetric=True)))
FINE = Grid.covering(np.float32([3, 0.01, 700, 0, 1e-3, 5]))
PATCHES = Patches((3, 2), (2, 1), (1, 2), ((1, 0), (2, 1)))
grids = pytest.mark.parametrize("grid", [CODES, SIGNED, FINE], ids=["codes", "signed", "fine"])


def frozen(moment):
    return moment.rows, moment._sums.tobytes(), moment._products.total.tobytes()


def seen(arrays, *arguments):
    moment = SecondMoment(*arguments)
    for array in arrays:
        moment.update(array)
    return moment


def normal(*shape, seed=0):
    return (np.random.default_rng([seed, *shape]).standard_normal(shape) * 2).astype(np.float32)


@grids
@pytest.mark.parametrize("patches, groups", [(None, 1), (PATCHES, 1), (PATCHES, 2), (PATCHES, 6)])
@settings(max_examples=8)
@given(seed=st.integers(0, 2**32 - 1), cuts=st.lists(st.integers(0, 7), max_size=3), random=st.randoms())
def test_no_order_or_split_changes_a_bit(grid, patches, groups, seed, cuts, random):
    data = normal(7, 6, 6, 5, seed=seed) if patches else normal(7, 9, 6, seed=seed)
    expected = frozen(seen([data], grid, patches, groups))
    pieces = np.split(data, sorted(cuts))
    random.shuffle(pieces)
    assert frozen(seen(pieces, grid, patches, groups)) == expected
    workers = [SecondMoment(grid, patches, groups) for _ in range(3)]
    for piece in pieces:
        random.choice(workers).update(piece)
    while len(workers) > 1:
        random.shuffle(workers)
        last = workers.pop()
        workers[0].merge(last)
    assert frozen(workers[0]) == expected


@pytest.mark.parametrize("grid", [CODES, SIGNED], ids=["codes", "signed"])
def test_moment_is_that_of_the_quantized_rows(grid):
    data = normal(50, 3, 6)
    bounds, spec = ((-1.0, 3.0), QuantSpec(UINT8)) if grid is CODES else ((-2.0, 2.0), QuantSpec(INT8, symmetric=True))
    params = from_range(*bounds, spec)
    rows = fake_quantize(data, params).reshape(-1, 6).astype(np.float64)
    found = seen([data], grid)
    assert found.rows == 150
    np.testing.assert_allclose(found.moment()[0], rows.T @ rows / len(rows), rtol=1e-6, atol=1e-6)


def test_a_grid_of_its_own_for_each_channel_keeps_twelve_bits():
    largest = np.float32([3, 0.01, 700, 1e-3])
    data = normal(400, 4) / 8 * largest
    data = np.clip(data, -largest, largest)
    found = seen([data], Grid.covering(largest)).moment()[0]
    expected = data.astype(np.float64).T @ data / len(data)
    scale = np.sqrt(np.outer(np.diag(expected), np.diag(expected)))
    assert np.abs((found - expected) / scale).max() < 2e-3
    assert np.all(np.frexp(Grid.covering(largest).step)[0] == 0.5), "steps are powers of two"


def test_rows_of_any_number_are_exact():
    """Far more rows of the largest codes than single precision adds up."""
    data = np.full((70_000, 2), 100.0, np.float32)
    found = seen([data], CODES)
    top = CODES.highest * float(CODES.step)
    expected = 70_000.0 * (CODES.highest - found._middle) ** 2
    np.testing.assert_array_equal(found._products.total[0], np.full((2, 2), expected))
    np.testing.assert_allclose(found.moment(), top**2, rtol=1e-12)


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("patches", [PATCHES, Patches((3, 3), (1, 1), (1, 1), ((0, 0), (0, 0)), "SAME_UPPER")])
def test_patches_are_what_a_convolution_multiplies(groups, patches):
    data = normal(3, 6, 8, 7)
    params = from_range(-1.0, 3.0, QuantSpec(UINT8))
    found = seen([data], CODES, patches, groups)
    windows = patches.windows(fake_quantize(data, params))
    inner = 6 // groups
    for group in range(groups):
        part = windows[:, group * inner : (group + 1) * inner]
        rows = np.moveaxis(part, 1, 3).reshape(-1, inner * int(np.prod(patches.kernel))).astype(np.float64)
        np.testing.assert_allclose(found.moment()[group], rows.T @ rows / len(rows), rtol=1e-6, atol=1e-6)


def test_of_a_large_image_patches_are_taken_at_regular_distances(monkeypatch):
    data = normal(2, 4, 64, 48)
    patches = Patches((1, 1), (1, 1), (1, 1), ((0, 0), (0, 0)))
    found = seen([data], CODES, patches)
    assert found.rows == 2 * len(range(1, 64, 3)) * len(range(1, 48, 3))
    chosen = np.moveaxis(data[:, :, 1::3, 1::3], 1, -1)
    assert frozen(found)[1:] == frozen(seen([chosen], CODES))[1:]
    # In slabs, when they are large.
    monkeypatch.setattr("qgraph.observers.second_moment._PIECE", 64)
    assert frozen(seen([data], CODES, patches)) == frozen(found)


def test_nothing_seen():
    empty = seen([np.zeros((0, 4), np.float32), np.float32([[1, np.nan, 0, 0]])], CODES)
    assert empty.moment() is None and empty.rows == 0
    full = seen([normal(5, 4)], CODES)
    before = frozen(full)
    full.merge(empty)
    assert frozen(full) == before
    empty.merge(full)
    assert frozen(empty) == before
    empty.update(normal(5, 4))
    assert frozen(full) == before, "no memory is shared"


def test_patches_of_nodes(model_kit):
    model = model_kit.text(
        """g (float[1, 4, 9, 9] x) => (float[1, 4, 5, 5] y, float[1, 4, 9, 2] z) {
            y = Conv <strides = [2, 2], pads = [1, 1, 1, 1], group = 2> (x, W)
            z = MatMul (x, V)
        }""",
        W=model_kit.normal(4, 2, 3, 3),
        V=model_kit.normal(9, 2),
    )
    conv, product = model.graph
    assert patches_of(conv) == Patches((3, 3), (2, 2), (1, 1), ((1, 1), (1, 1)))
    assert patches_of(product) is None
