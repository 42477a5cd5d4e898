import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from qgraph import observers
from qgraph.errors import OptionError
from qgraph.formats import INT8, UINT8, UInt
from qgraph.observers import OBSERVERS, counts
from qgraph.observers.channel_mean import ChannelMean
from qgraph.observers.histogram import mean_squared_error
from qgraph.qparams import fake_quantize, from_range
from qgraph.spec import QuantSpec

AFFINE, SYMMETRIC = QuantSpec(UINT8), QuantSpec(INT8, symmetric=True)
SPECS = [AFFINE, SYMMETRIC, QuantSpec(INT8), QuantSpec(UInt(4)), QuantSpec(UINT8, symmetric=True)]
VALUES = st.floats(width=32, allow_nan=False, allow_infinity=False)
SAMPLES = st.lists(arrays.arrays(np.float32, st.integers(0, 12), elements=VALUES), min_size=1, max_size=6)
every_observer = pytest.mark.parametrize("name", list(OBSERVERS))


def observed(name, *samples):
    observer = observers.create(name)
    for sample in samples:
        observer.update(sample)
    return observer


def frozen(observer):
    """The state, to be compared bit for bit."""
    return {key: (a.dtype.str, a.shape, a.tobytes()) for key, a in observer.state().items()}


# -- the laws of a commutative monoid ----------------------------------------------------------------------------------


@every_observer
@settings(max_examples=60)
@given(samples=SAMPLES, random=st.randoms(use_true_random=False))
def test_no_order_or_split_changes_a_bit(name, samples, random):
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
def test_an_empty_observer_is_the_identity(name, samples):
    expected = frozen(observed(name, *samples))
    left, right = observers.create(name), observed(name, *samples)
    left.merge(right)
    right.merge(observers.create(name))
    assert frozen(left) == frozen(right) == expected


@every_observer
@settings(max_examples=30)
@given(samples=SAMPLES, more=SAMPLES)
def test_state_round_trips(name, samples, more):
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
def test_merge_leaves_the_other_as_it_was(name):
    first, second = observed(name, np.float32([1, 2])), observed(name, np.float32([-5]))
    before = frozen(second)
    first.merge(second)
    first.update(np.float32([100]))
    assert frozen(second) == before


@every_observer
def test_a_state_shares_no_memory_with_its_observer(name):
    observer = observed(name, np.float32([1, 2]))
    state = observer.state()
    before = {key: array.copy() for key, array in state.items()}
    restored = OBSERVERS[name].from_state(state)
    observer.update(np.float32([3]))
    restored.update(np.float32([4]))
    assert all(np.array_equal(state[key], before[key]) for key in state)


@every_observer
def test_signed_zeros_are_one_value(name):
    zeros = np.float32([0.0]), np.float32([-0.0])
    assert frozen(observed(name, *zeros)) == frozen(observed(name, *zeros[::-1]))


# -- what is taken in --------------------------------------------------------------------------------------------------


@every_observer
def test_nothing_seen(name):
    observer = observers.create(name)
    assert observer.count == 0 and observer.finite
    for spec in SPECS:
        assert observer.range(spec) == (0.0, 0.0)
        assert observer.qparams(spec).scale == 1.0


@every_observer
@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0, 4)])
def test_empty_arrays_change_nothing(name, shape):
    observer = observed(name, np.float32([1, -2]))
    before = frozen(observer)
    observer.update(np.zeros(shape, np.float32))
    assert frozen(observer) == before
    assert frozen(observed(name, np.zeros(shape, np.float32))) == frozen(observers.create(name))


@every_observer
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, -np.nan])
@pytest.mark.parametrize("position", [0, 3, 6])
def test_nan_and_infinity_are_noticed_and_never_forgotten(name, bad, position):
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
def test_count(name):
    arrays = np.zeros((2, 3), np.float32), np.zeros((4, 5), np.float32)
    assert observed(name, *arrays).count == (2 if OBSERVERS[name].per_sample else 26)


@every_observer
def test_any_layout_and_float_type(name):
    array = np.arange(-12, 12, dtype=np.float32).reshape(4, 6) / 4
    expected = frozen(observed(name, array))
    for same in (array.T, np.asfortranarray(array), array[::-1], array.astype(np.float16), array.astype(np.float64)):
        assert frozen(observed(name, same)) == expected


@every_observer
def test_memory_does_not_grow_with_the_data(name):
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
def test_streams_of_any_length_are_counted(name):
    observer = observed(name, *[np.float32([-1, 0, 0.5, 3])] * 3)
    once, expected = observer.count, observer.range(AFFINE)
    for _ in range(40):
        observer.merge(OBSERVERS[name].from_state(observer.state()))
    assert observer.count == once * 2**40
    assert OBSERVERS[name].from_state(observer.state()).count == once * 2**40
    assert observer.range(AFFINE) == pytest.approx(expected)


def test_pieces_are_only_a_matter_of_speed(monkeypatch):
    array = np.random.default_rng(1).standard_normal(1000).astype(np.float32)
    expected = frozen(observed("histogram", array))
    monkeypatch.setattr(counts, "_CHUNK", 7)
    assert frozen(observed("histogram", array)) == expected


def test_create_knows_all_and_names_the_nearest():
    assert all(type(observers.create(name)) is kind for name, kind in OBSERVERS.items())
    with pytest.raises(OptionError, match=r"Unknown observer 'histogrm'\. Did you mean 'histogram'"):
        observers.create("histogrm")


# -- odd tensors -------------------------------------------------------------------------------------------------------

ODD = {
    "zeros": np.zeros(10),
    "one value": np.array([3.7]),
    "constant": np.full(100, 5.25),
    "negative constant": np.full(100, -1e-3),
    "two values": np.array([0.0, 1.0] * 20),
    "subnormal": np.full(10, 1e-41),
    "subnormals": np.linspace(1e-44, 3e-41, 50),
    "negative subnormals": -np.linspace(1e-44, 1e-39, 50),
    "subnormal and not": np.array([1e-42, 1.0, 2.0]),
    "tiny": np.array([1.2e-38, -1.2e-38]),
    "largest": np.array([3.4028235e38, -3.4028235e38]),
    "one outlier": np.append(np.linspace(-1, 1, 999), 3.4e38),
    "one negative outlier": np.append(np.linspace(0, 1, 999), -3.4e38),
    "mostly zero": np.append(np.zeros(999), 2.5),
    "all magnitudes": np.ldexp(1.0, np.arange(-149, 128)),
}
odd_tensors = pytest.mark.parametrize("array", [a.astype(np.float32) for a in ODD.values()], ids=list(ODD))


@every_observer
@odd_tensors
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.format.name}-{'symmetric' if s.symmetric else 'affine'}")
def test_odd_tensors_give_sound_parameters(name, array, spec):
    observer = observed(name, array)
    low, high = observer.range(spec)
    assert np.isfinite(low) and np.isfinite(high) and low <= high
    assert min(float(array.min()), 0.0) <= low and high <= max(float(array.max()), 0.0)
    params = observer.qparams(spec)
    assert np.isfinite(params.scale) and params.scale > 0
    assert params.zero_point == np.rint(params.zero_point)


@pytest.mark.parametrize("name", ["histogram", "minmax", "moving-average", "percentile", "entropy"])
@pytest.mark.parametrize("value", [5.25, -1e-3, 1.0, 3.4e38, 1e-30])
def test_a_constant_is_expressed_to_within_rounding(name, value):
    array = np.full(1000, value, np.float32)
    found = fake_quantize(array, observed(name, array).qparams(AFFINE))
    np.testing.assert_allclose(found, array, rtol=1e-6)


# -- min-max and moving average ----------------------------------------------------------------------------------------


@given(SAMPLES)
def test_minmax_is_numpys(samples):
    values = np.concatenate(samples)
    expected = (values.min(), values.max()) if values.size else (0.0, 0.0)
    assert observed("minmax", *samples).range(AFFINE) == expected


@given(SAMPLES)
def test_moving_average_is_the_mean_of_the_samples_extremes(samples):
    full = [s.astype(np.float64) for s in samples if s.size]
    low, high = observed("moving-average", *samples).range(AFFINE)
    if not full:
        assert (low, high) == (0.0, 0.0)
        return
    scale = max(float(np.abs(s).max()) for s in full)
    assert low == pytest.approx(np.mean([s.min() for s in full]), rel=1e-12, abs=1e-12 * scale)
    assert high == pytest.approx(np.mean([s.max() for s in full]), rel=1e-12, abs=1e-12 * scale)


def test_moving_average_adds_exactly():
    """Sums of floats would lose the small one: (1e30 + 1) - 1e30."""
    samples = [np.float32([v]) for v in (1e30, 1.0, -1e30)]
    assert observed("moving-average", *samples).range(AFFINE).high == pytest.approx(1 / 3, rel=1e-15)
    assert observed("moving-average", *[np.float32([3.4028235e38])] * 100).range(AFFINE).high == 3.4028234663852886e38


def test_only_the_moving_average_is_one_of_samples():
    assert [name for name, kind in OBSERVERS.items() if kind.per_sample] == ["moving-average"]


# -- percentile --------------------------------------------------------------------------------------------------------


def distributions(size, seed=11):
    """The six of facts/numerics.md."""
    rng = np.random.default_rng(seed)
    outliers = rng.standard_normal(size)
    outliers[rng.random(size) < 0.001] *= 50
    return {
        "gauss": rng.standard_normal(size),
        "laplace": rng.laplace(size=size),
        "relu": np.maximum(rng.standard_normal(size), 0),
        "outliers": outliers,
        "student-t3": rng.standard_t(3, size),
        "lognormal": rng.lognormal(size=size),
    }


BATCHES, BATCH = 8, 20_000
DATA = {name: values.astype(np.float32) for name, values in distributions(BATCHES * BATCH).items()}
every_distribution = pytest.mark.parametrize("data", list(DATA.values()), ids=list(DATA))


def batches(data):
    return np.array_split(data, BATCHES)


@every_distribution
@pytest.mark.parametrize("percent", [99.999, 99.9, 90.0])
def test_percentile_is_numpys_quantile_to_within_a_bin(data, percent, monkeypatch):
    monkeypatch.setattr(observers.Percentile, "percent", percent)
    data = data[: data.size - 3]  # a number that no tail divides
    tail = (1 - percent / 100) / 2
    expected = np.quantile(data.astype(np.float64), [tail, 1 - tail], method="inverted_cdf")
    found = observed("percentile", *batches(data)).range(AFFINE)
    assert np.all(np.abs(np.array(found) - expected) <= np.abs(expected) / 127)


def test_percentile_finds_no_value_where_there_is_none():
    data = np.random.default_rng(0).uniform(-1, 1, 100_000).astype(np.float32)
    data[:1000] = 1000.0
    for percent, high in ((99.999, 1000.0), (99.0, 1000.0), (97.0, 0.985 * 2 / 0.99 - 1)):
        observer = observed("percentile", data)
        observer.percent = percent
        assert observer.range(AFFINE).high == pytest.approx(high, rel=1 / 127)


# -- histogram ---------------------------------------------------------------------------------------------------------


def sqnr(data, params):
    error = fake_quantize(data, params).astype(np.float64) - data
    return 10 * np.log10(np.mean(np.square(data.astype(np.float64))) / np.mean(np.square(error)))


def grid(data, spec):
    """The best SQNR of any range, by trying them on all the data: both ends from everything down to 1/400, then finer.

    No assumption but that the error falls and rises once at the scale of the coarse grid's steps.
    """
    lowest, highest = min(float(data.min()), 0.0), max(float(data.max()), 0.0)

    def best(lows, highs):
        options = [(low, high) for low in lows for high in highs]
        if spec.symmetric:
            options = [(-high, high) for high in highs]
        return max((sqnr(data, from_range(low, high, spec)), low, high) for low, high in options)

    if spec.symmetric:
        lowest, highest = 0.0, max(-lowest, highest)
    coarse = np.geomspace(1, 1 / 400, 40 if lowest == 0.0 else 14)
    found = best(lowest * coarse if lowest else [0.0], highest * coarse)
    ratio = coarse[0] / coarse[1]
    for _ in range(3):
        factors = np.geomspace(1 / ratio, ratio, 7)
        found = max(found, best(found[1] * factors if lowest else [0.0], found[2] * factors))
        ratio **= 0.4
    return found[0]


@every_distribution
@pytest.mark.parametrize("spec", [AFFINE, SYMMETRIC], ids=["affine", "symmetric"])
def test_histogram_is_as_good_as_a_grid_search_on_the_data(data, spec):
    found = sqnr(data, observed("histogram", *batches(data)).qparams(spec))
    assert found >= grid(data, spec) - 0.05
    assert found >= sqnr(data, observed("minmax", *batches(data)).qparams(spec)) - 0.01


def test_the_grid_search_itself_is_right():
    """Against the published numbers of facts/numerics.md, where the sample size matters least."""
    assert grid(DATA["gauss"], AFFINE) == pytest.approx(40.6, abs=0.15)
    assert grid(DATA["relu"], AFFINE) == pytest.approx(46.3, abs=0.15)


@every_distribution
def test_histogram_keeps_one_sided_data_one_sided(data):
    positive = np.abs(data)
    assert observed("histogram", positive).range(AFFINE).low == 0.0
    assert observed("histogram", positive).qparams(AFFINE).zero_point == 0
    assert observed("histogram", -positive).qparams(AFFINE).zero_point == 255


def test_histogram_on_data_of_few_values():
    """Masks, images and saturated activations, which codes can express exactly or nearly so, stay so."""
    rng = np.random.default_rng(5)
    images = rng.integers(0, 256, 50_000).astype(np.float32)
    assert np.array_equal(fake_quantize(images, observed("histogram", images).qparams(AFFINE)), images)
    mask = (rng.random(50_000) < 0.01).astype(np.float32)
    np.testing.assert_allclose(fake_quantize(mask, observed("histogram", mask).qparams(AFFINE)), mask, rtol=1e-6)
    for data in (
        (images / 255 - 0.485) / 0.229,
        np.clip(rng.standard_normal(50_000) * 3, 0, 6),
        np.tanh(rng.standard_normal(50_000) * 4),
        rng.random(50_000),
        rng.uniform(-1, 1, 50_000),
    ):
        data = data.astype(np.float32)
        for spec in (AFFINE, SYMMETRIC):
            least = sqnr(data, observed("minmax", data).qparams(spec))
            assert sqnr(data, observed("histogram", data).qparams(spec)) >= least - 0.1


@settings(max_examples=60)
@given(st.integers(0, 2**32), st.sampled_from([AFFINE, SYMMETRIC]))
def test_histogram_is_never_much_worse_than_minmax(seed, spec):
    """Any mixture of spikes and clouds. What is lost on spikes, whose place in their bin is unknown, stays small."""
    rng = np.random.default_rng(seed)
    spikes = rng.choice(rng.standard_normal(5) * 10.0 ** rng.integers(-3, 3, 5), 4000)
    cloud = rng.standard_normal(4000) * 10.0 ** rng.integers(-3, 3)
    data = np.where(rng.random(4000) < rng.random(), spikes, cloud).astype(np.float32)
    found, least = (sqnr(data, observed(name, data).qparams(spec)) for name in ("histogram", "minmax"))
    assert found >= least - 1 or found > 40


@every_distribution
@pytest.mark.parametrize("spec", [AFFINE, SYMMETRIC, QuantSpec(UInt(4))], ids=["affine", "symmetric", "4 bits"])
@pytest.mark.parametrize("share", [1.0, 0.5, 0.1])
def test_the_integrated_error_is_the_error_of_the_data(data, spec, share):
    low, high = min(float(data.min()) * share, 0.0), float(data.max()) * share
    params = from_range(low, high, spec)
    real = np.mean(np.square(fake_quantize(data, params).astype(np.float64) - data))
    assert mean_squared_error(observed("histogram", data).bins(), params) == pytest.approx(real, rel=0.03)


def test_bins_are_in_order_and_hold_all_values():
    for array in (*DATA.values(), *(a.astype(np.float32) for a in ODD.values())):
        bins = observed("histogram", array).bins()
        assert np.all(bins.low <= bins.high) and np.all(bins.high[:-1] <= bins.low[1:])
        assert bins.low[0] >= array.min() and bins.high[-1] <= array.max()
        assert bins.counts.sum() == array.size
        assert np.all(bins.high - bins.low <= np.maximum(np.abs(bins.low), np.abs(bins.high)) / 128 + 2.0**-133)


# -- entropy -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [AFFINE, SYMMETRIC], ids=["affine", "symmetric"])
def test_entropy_does_not_throw_one_sided_data_away(spec):
    rng = np.random.default_rng(2)
    for data in (DATA["relu"], -DATA["relu"], rng.exponential(size=50_000), np.abs(rng.standard_normal(50_000))):
        data = data.astype(np.float32)
        observer = observed("entropy", data)
        assert sqnr(data, observer.qparams(spec)) >= sqnr(data, observed("minmax", data).qparams(spec)) - 3
    assert observed("entropy", DATA["relu"]).range(AFFINE).low == 0.0


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-1.0, 1.0), (-3.0, 0.5), (-2.0, 0.0)])
@pytest.mark.parametrize("spec", [AFFINE, SYMMETRIC], ids=["affine", "symmetric"])
def test_entropy_covers_uniform_data(low, high, spec):
    data = np.random.default_rng(3).uniform(low, high, 50_000).astype(np.float32)
    found = observed("entropy", data).range(spec)
    assert found.low == pytest.approx(low, abs=0.01) and found.high == pytest.approx(high, abs=0.01)


def test_entropy_clips_a_lone_outlier():
    data = np.append(DATA["gauss"], np.float32(20))
    low, high = observed("entropy", data).range(AFFINE)
    assert -6 < low < -3 and 3 < high < 15


# -- channel means -----------------------------------------------------------------------------------------------------


def mean_of(samples, axis=1):
    mean = ChannelMean(axis)
    for sample in samples:
        mean.update(sample)
    return mean


MEANINGFUL = st.floats(-(2.0**60), 2.0**60, width=32)
CHANNELS = st.lists(arrays.arrays(np.float32, (2, 3), elements=MEANINGFUL), min_size=1, max_size=6)


@given(samples=CHANNELS, random=st.randoms(use_true_random=False))
def test_channel_means_are_an_exact_monoid(samples, random):
    expected = frozen(mean_of(samples))
    shuffled = list(samples)
    random.shuffle(shuffled)
    cut = random.randrange(len(samples) + 1)
    left, right = mean_of(shuffled[:cut]), mean_of(shuffled[cut:])
    before = frozen(right)
    left.merge(right)
    left.merge(ChannelMean(1))
    left.update(np.zeros((0, 3), np.float32))
    assert frozen(left) == expected
    restored = ChannelMean.from_state(left.state())
    assert frozen(restored) == expected
    left.update(samples[0])
    restored.update(samples[0])
    assert frozen(left) == frozen(restored) == frozen(mean_of([*samples, samples[0]]))
    assert frozen(right) == before
    restored = ChannelMean.from_state(mean_of(samples).state())
    np.testing.assert_array_equal(restored.mean, mean_of(samples).mean)


@given(CHANNELS)
def test_channel_means_are_means(samples):
    expected = np.mean([sample.astype(np.float64).mean(0) for sample in samples], axis=0)
    largest = max(float(np.abs(sample).max()) for sample in samples)
    np.testing.assert_allclose(mean_of(samples).mean, expected, rtol=1e-7, atol=1e-7 * largest)


@given(
    array=arrays.arrays(np.float32, st.tuples(st.integers(1, 9), st.just(3), st.integers(1, 4)), elements=MEANINGFUL),
    axis=st.sampled_from([1, 2, -1, -2]),
    cuts=st.lists(st.integers(0, 9), max_size=4),
)
def test_channel_means_do_not_depend_on_the_split_into_batches(array, axis, cuts):
    whole = mean_of([array], axis)
    assert frozen(mean_of(np.split(array, sorted(min(c, len(array)) for c in cuts)), axis)) == frozen(whole)
    assert frozen(mean_of([row[None] for row in array], axis)) == frozen(whole)


def test_every_sample_counts_alike():
    # Sequences of one and of nine positions: a mean of means, not of positions.
    short, long = np.full((1, 1, 2), 1, np.float32), np.full((1, 9, 2), 3, np.float32)
    np.testing.assert_array_equal(mean_of([short, long], -1).mean, [2, 2])


def test_channel_means_over_any_axis_and_of_nothing():
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    for axis in (0, 1, 2, -1, -2):
        others = tuple({0, 1, 2} - {axis % 3})
        np.testing.assert_allclose(mean_of([array], axis).mean, array.mean(others))
    assert ChannelMean(1).mean is None
