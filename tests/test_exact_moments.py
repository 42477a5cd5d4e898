"""Moments that codes are learned on: the same bits in any order, from single sums to the file that is written."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qgraph
from qgraph.errors import QuantizationError
from qgraph.observers.exact_products import ExactProducts
from qgraph.observers.second_moment import Grid, SecondMoment
from qgraph.observers.twin_moment import TwinMoment, TwinReach

# -- sums --------------------------------------------------------------------------------------------------------------


def summed(pieces, largest, symmetric):
    found = ExactProducts(largest)
    for a, b in pieces:
        found.add(a[None], None if symmetric else b[None])
    return found


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    bits=st.sampled_from([3, 8, 12, 20, 24, 26]),
    cuts=st.lists(st.integers(0, 40), max_size=6),
    symmetric=st.booleans(),
    random=st.randoms(),
)
def test_sums_are_those_of_whole_numbers(seed, bits, cuts, symmetric, random):
    """At 26 bits every second row is carried over; the truth is that of Python's integers."""
    rng = np.random.default_rng(seed)
    a = rng.integers(-(2**bits), 2**bits + 1, (40, 3))
    b = a if symmetric else rng.integers(-(2**bits), 2**bits + 1, (40, 2))
    truth = (a.astype(object).T @ b.astype(object)).astype(np.float64)[None]
    order = rng.permutation(40)
    pieces = [(a[i].astype(np.float64), b[i].astype(np.float64)) for i in np.split(order, sorted(cuts))]
    whole = summed(pieces, 4**bits, symmetric)
    np.testing.assert_array_equal(whole.total, truth)
    workers = [ExactProducts(4**bits) for _ in range(3)]
    for x, y in pieces:
        random.choice(workers).add(x[None], None if symmetric else y[None])
    workers[2].merge(workers[0])
    workers[1].merge(workers[2])
    assert workers[1].total.tobytes() == whole.total.tobytes()
    assert workers[1].rows == whole.rows == 40


def test_far_more_rows_than_float64_adds_up():
    """16-bit codes: 2^23 rows of the largest product fill float64; the sum of two and a half times as many is odd."""
    found = ExactProducts(32767**2)
    rows = np.full((1, 1 << 20, 1), 32767, np.float32)
    for _ in range(20):
        found.add(rows)
    found.add(np.ones((1, 1, 1), np.float32))
    exact = 20 * (1 << 20) * 32767**2 + 1
    assert exact > 1 << 54 and found.total[0, 0, 0] == float(exact)
    assert int(found._high[0, 0, 0]) + int(found._low[0, 0, 0]) == exact


def test_more_than_64_bits_is_an_error():
    found = ExactProducts(1 << 53)
    found.add(np.ones((1, 1023, 1)))
    assert found.total[0, 0, 0] == 1023
    with pytest.raises(QuantizationError, match="fewer samples"):
        found.add(np.ones((1, 1, 1)))
    with pytest.raises(QuantizationError, match="fewer samples"):
        found.merge(found)


# -- twins -------------------------------------------------------------------------------------------------------------


def pairs(seed, samples=9, positions=150, width=5):
    """Channels of very different sizes, and an outlier; 1350 rows, more than wait at a time."""
    rng = np.random.default_rng(seed)
    own = rng.standard_normal((samples, positions, width)).astype(np.float32) * np.float32([1, 1e-4, 300, 0, 2])
    own[rng.integers(samples), rng.integers(positions)] *= 1e3
    return own, own + np.float32(0.01) * rng.standard_normal(own.shape).astype(np.float32) * np.abs(own).mean((0, 1))


def twins(pieces, differ=True):
    reach = TwinReach()
    for own, other in pieces:
        reach.update(own, other)
    found = TwinMoment(reach, differ)
    for own, other in pieces:
        found.update(own, other)
    return found


def frozen(found):
    return found.rows, *(None if one is None else one.tobytes() for one in found.moments())


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), cuts=st.lists(st.integers(0, 9), max_size=5), random=st.randoms())
def test_no_order_split_or_sharding_changes_a_bit(seed, cuts, random):
    own, other = pairs(seed)
    expected = frozen(twins([(own, other)]))
    order = np.random.default_rng(seed).permutation(len(own))
    pieces = [(own[i], other[i]) for i in np.split(order, sorted(cuts))]
    assert frozen(twins(pieces)) == expected
    # Each worker sees a part; the largest magnitudes are merged before anything is counted.
    reaches = [TwinReach() for _ in range(3)]
    shares = [random.randrange(3) for _ in pieces]
    for share, piece in zip(shares, pieces, strict=True):
        reaches[share].update(*piece)
    reaches[1].merge(reaches[0])
    reaches[2].merge(reaches[1])
    workers = [TwinMoment(reaches[2], True) for _ in range(3)]
    for share, piece in zip(shares, pieces, strict=True):
        workers[share].update(*piece)
    workers[0].merge(workers[2])
    workers[1].merge(workers[0])
    assert frozen(workers[1]) == expected


def test_moments_are_those_of_the_rows():
    own, other = pairs(3)
    moment, drift = twins([(own, other)]).moments()
    x = other.reshape(-1, 5).astype(np.float64)
    lost = (own - other).reshape(-1, 5).astype(np.float64)
    power = np.sqrt((x**2).mean(axis=0))
    share = np.sqrt((lost**2).mean(axis=0))
    scale, turned = np.outer(power, power) + 1e-30, np.outer(power, share) + 1e-30
    # One row holds nearly all of the power here, and sets the grid: the hardest case there is.
    assert np.abs((moment - x.T @ x / len(x)) / scale).max() < 1e-4
    assert np.abs((drift - x.T @ lost / len(x)) / turned).max() < 1e-4
    assert moment.tobytes() == moment.T.tobytes()
    assert not moment[3].any()


def test_twins_that_do_not_differ_have_no_drift():
    own, _ = pairs(4)
    found = twins([(own, own)], differ=False)
    moment, drift = found.moments()
    assert drift is None
    assert moment.tobytes() == twins([(own, own)]).moments()[0].tobytes()
    assert not twins([(own, own)]).moments()[1].any()


def test_rows_that_are_not_finite_are_left_out_wherever_they_stand():
    own, other = pairs(5)
    other[2, 7, 1], own[4, 0, 3] = np.nan, np.inf
    kept = np.isfinite(other.reshape(-1, 5)).all(1) & np.isfinite(own.reshape(-1, 5)).all(1)
    assert kept.sum() == kept.size - 2
    clean = [(own.reshape(-1, 5)[kept], other.reshape(-1, 5)[kept])]
    assert frozen(twins([(own, other)])) == frozen(twins(clean))
    assert frozen(twins([(one[None], two[None]) for one, two in zip(own, other, strict=True)])) == frozen(twins(clean))
    reach = TwinReach()
    reach.update(np.full((2, 3), np.nan, np.float32), np.ones((2, 3), np.float32))
    assert reach.twin is None


def test_the_same_of_single_moments():
    """Before, one infinite number took all that was in its batch with it."""
    rows = pairs(6)[1].reshape(-1, 5)
    rows[11, 2] = np.inf
    grid = Grid.covering(np.abs(np.delete(rows, 11, 0)).max(axis=0))
    found = []
    for pieces in ([rows], np.split(rows, [3, 400]), [np.delete(rows, 11, 0)]):
        moment = SecondMoment(grid)
        for piece in pieces:
            moment.update(piece)
        assert moment.rows == len(rows) - 1
        found.append(moment.moment().tobytes())
    assert len(set(found)) == 1


# -- the file ----------------------------------------------------------------------------------------------------------

DEEP = """
g (float[n, 12, 128] x) => (float[n, 12, 128] y) {
    a = MatMul (x, A)
    b = Relu (a)
    c = MatMul (b, B)
    d = Add (c, x)
    e = MatMul (d, C)
    y = Add (e, d)
}
"""


@pytest.mark.parametrize("scheme", ["int4", "int2"])
def test_shuffled_data_give_the_same_file(model_kit, tmp_path, scheme):
    model = model_kit.text(
        DEEP,
        A=model_kit.normal(128, 256, scale=0.1),
        B=model_kit.normal(256, 128, scale=0.1),
        C=model_kit.normal(128, 128, scale=0.1),
    )
    rng = np.random.default_rng(0)
    mixer = np.eye(128) + rng.standard_normal((128, 128)) / 12
    data = (rng.standard_normal((48, 12, 128)) @ mixer).astype(np.float32)
    found = set()
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(48) if seed else np.arange(48)
        feeds = [{"x": data[i : i + 1]} for i in order]
        if seed == 2:
            np.savez(tmp_path / "d.npz", x=data[order])
            feeds = tmp_path / "d.npz"
        result = qgraph.optimize(
            model, tmp_path / "o.onnx", data=feeds, scheme=scheme, bench_seconds=0, force=True, time_limit=600
        )
        assert any(step.name == "RoundBlocks" and not step.refused for step in result.report.steps)
        assert model_kit.ops(result.model).count("MatMulNBits") == 3
        found.add(hashlib.sha256((tmp_path / "o.onnx").read_bytes()).hexdigest())
    assert len(found) == 1
