"""Observers: exact commutative monoids that take in any float tensor, and extremes as numpy has them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from qgraph import observers
from qgraph.errors import OptionError
from qgraph.formats import INT8, UINT8, UInt
from qgraph.observers import OBSERVERS, counts
from qgraph.spec import QuantSpec

AFFINE, SYMMETRIC = QuantSpec(UINT8), QuantSpec(INT8, symmetric=True)
SPECS = [AFFINE, SYMMETRIC, QuantSpec(INT8), QuantSpec(UInt(4)), QuantSpec(UINT8, symmetric=True)]
VALUES = st.floats(width=32, allow_nan=False, allow_infinity=False)
SAMPLES = st.lists(arrays.arrays(np.float32, st.integers(0, 12), elements=VALUES), min_size=1, max_size=6)
every_observer = pytest.mark.parametrize("name", list(OBSERVERS))


@every_observer
@settings(max_examples=60)
@given(samples=SAMPLES, random=st.randoms(use_true_random=False))
def test_no_order_or_split_changes_a_bit(observed, frozen, name, samples, random):
    expected = frozen(observed(name, *samples))
    pieces = list(samples)
    if not OBSERVERS[name].per_sample:
        # Other batches: all values shuffled, then cut anywhere.
        values = np.concatenate(samples)
        random.shuffle(order := list(range(values.size)))
        cuts = sorted(random.randrange(values.size + 1) for _ in range(random.randrange(5)))
        pieces = np.split(values[np.array(order, int)], cuts)
    random.shuffle(pieces)
    assert frozen(observed(name, *pieces)) == expected
    # Any number of workers, merged in any order.
    workers = [observers.create(name) for _ in range(random.randrange(1, 5))]
    for piece in pieces:
        random.choice(workers).update(piece)
    while len(workers) > 1:
        random.shuffle(workers)
        first = workers.pop()
        workers[0].merge(first)
    assert frozen(workers[0]) == expected


@every_observer
@settings(max_examples=30)
@given(samples=SAMPLES)
def test_an_empty_observer_is_the_identity(observed, frozen, name, samples):
    expected = frozen(observed(name, *samples))
    left, right = observers.create(name), observed(name, *samples)
    left.merge(right)
    right.merge(observers.create(name))
    assert frozen(left) == frozen(right) == expected


@every_observer
@settings(max_examples=30)
@given(samples=SAMPLES, more=SAMPLES)
def test_state_round_trips(observed, frozen, name, samples, more):
    original = observed(name, *samples)
    restored = OBSERVERS[name].from_state(original.state())
    assert frozen(restored) == frozen(original)
    assert (restored.count, restored.finite) == (original.count, original.finite)
    assert restored.range(AFFINE) == original.range(AFFINE)
    # And lives on.
    for sample in more:
        original.update(sample)
        restored.update(sample)
    assert frozen(restored) == frozen(original)


@every_observer
def test_merge_leaves_the_other_as_it_was(observed, frozen, name):
    first, second = observed(name, np.float32([1, 2])), observed(name, np.float32([-5]))
    before = frozen(second)
    first.merge(second)
    first.update(np.float32([100]))
    assert frozen(second) == before


@every_observer
def test_a_state_shares_no_memory_with_its_observer(observed, name):
    observer = observed(name, np.float32([1, 2]))
    state = observer.state()
    before = {key: array.copy() for key, array in state.items()}
    restored = OBSERVERS[name].from_state(state)
    observer.update(np.float32([3]))
    restored.update(np.float32([4]))
    assert all(np.array_equal(state[key], before[key]) for key in state)


@every_observer
def test_signed_zeros_are_one_value(observed, frozen, name):
    zeros = np.float32([0.0]), np.float32([-0.0])
    assert frozen(observed(name, *zeros)) == frozen(observed(name, *zeros[::-1]))


@every_observer
def test_nothing_seen(name):
    observer = observers.create(name)
    assert observer.count == 0 and observer.finite
    for spec in SPECS:
        assert observer.range(spec) == (0.0, 0.0)
        assert observer.qparams(spec).scale == 1.0


@every_observer
@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0, 4)])
def test_empty_arrays_change_nothing(observed, frozen, name, shape):
    observer = observed(name, np.float32([1, -2]))
    before = frozen(observer)
    observer.update(np.zeros(shape, np.float32))
    assert frozen(observer) == before
    assert frozen(observed(name, np.zeros(shape, np.float32))) == frozen(observers.create(name))


@every_observer
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, -np.nan])
@pytest.mark.parametrize("position", [0, 3, 6])
def test_nan_and_infinity_are_noticed_and_never_forgotten(observed, name, bad, position):
    array = np.arange(7, dtype=np.float32)
    array[position] = bad
    observer = observed(name, array)
    assert not observer.finite
    observer.update(np.float32([1.0]))
    assert not observer.finite
    assert not OBSERVERS[name].from_state(observer.state()).finite
    healthy = observed(name, np.float32([1.0]))
    assert healthy.finite
    healthy.merge(observer)
    assert not healthy.finite


@every_observer
def test_count(observed, name):
    arrays = np.zeros((2, 3), np.float32), np.zeros((4, 5), np.float32)
    assert observed(name, *arrays).count == (2 if OBSERVERS[name].per_sample else 26)


@every_observer
def test_any_layout_and_float_type(observed, frozen, name):
    array = np.arange(-12, 12, dtype=np.float32).reshape(4, 6) / 4
    expected = frozen(observed(name, array))
    for same in (array.T, np.asfortranarray(array), array[::-1], array.astype(np.float16), array.astype(np.float64)):
        assert frozen(observed(name, same)) == expected


@every_observer
def test_memory_does_not_grow_with_the_data(observed, name):
    def held(observer):
        sizes = [a.nbytes if isinstance(a, np.ndarray) else a.__sizeof__() for a in vars(observer).values()]
        return sum(sizes), sum(a.nbytes for a in observer.state().values())

    rng = np.random.default_rng(0)
    data = rng.standard_normal(1 << 18).astype(np.float32)
    # Both signs in both, so that the same bins are occupied.
    few = held(observed(name, data, -data))
    many = held(observed(name, *(data * s for s in rng.permutation([1.0, -1.0] * 8))))
    assert many[0] <= 2 * few[0] + 64
    assert many[1] <= 2 * few[1]


@every_observer
def test_streams_of_any_length_are_counted(observed, name):
    observer = observed(name, *[np.float32([-1, 0, 0.5, 3])] * 3)
    once, expected = observer.count, observer.range(AFFINE)
    for _ in range(40):
        observer.merge(OBSERVERS[name].from_state(observer.state()))
    assert observer.count == once * 2**40
    assert OBSERVERS[name].from_state(observer.state()).count == once * 2**40
    assert observer.range(AFFINE) == pytest.approx(expected)


def test_pieces_are_only_a_matter_of_speed(observed, frozen, monkeypatch):
    array = np.random.default_rng(1).standard_normal(1000).astype(np.float32)
    expected = frozen(observed("histogram", array))
    monkeypatch.setattr(counts, "_CHUNK", 7)
    assert frozen(observed("histogram", array)) == expected


def test_create_knows_all_and_names_the_nearest():
    assert all(type(observers.create(name)) is kind for name, kind in OBSERVERS.items())
    with pytest.raises(OptionError, match=r"Unknown observer 'histogrm'\. Did you mean 'histogram'"):
        observers.create("histogrm")


@given(SAMPLES)
def test_minmax_is_numpys(observed, samples):
    values = np.concatenate(samples)
    expected = (values.min(), values.max()) if values.size else (0.0, 0.0)
    assert observed("minmax", *samples).range(AFFINE) == expected


@given(SAMPLES)
def test_moving_average_is_the_mean_of_the_samples_extremes(observed, samples):
    full = [s.astype(np.float64) for s in samples if s.size]
    low, high = observed("moving-average", *samples).range(AFFINE)
    if not full:
        assert (low, high) == (0.0, 0.0)
        return
    scale = max(float(np.abs(s).max()) for s in full)
    assert low == pytest.approx(np.mean([s.min() for s in full]), rel=1e-12, abs=1e-12 * scale)
    assert high == pytest.approx(np.mean([s.max() for s in full]), rel=1e-12, abs=1e-12 * scale)


def test_moving_average_adds_exactly(observed):
    """Sums of floats would lose the small one: (1e30 + 1) - 1e30."""
    samples = [np.float32([v]) for v in (1e30, 1.0, -1e30)]
    assert observed("moving-average", *samples).range(AFFINE).high == pytest.approx(1 / 3, rel=1e-15)
    assert observed("moving-average", *[np.float32([3.4028235e38])] * 100).range(AFFINE).high == 3.4028234663852886e38


def test_only_the_moving_average_is_one_of_samples():
    assert [name for name, kind in OBSERVERS.items() if kind.per_sample] == ["moving-average"]
