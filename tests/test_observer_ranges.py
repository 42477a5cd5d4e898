"""Ranges that observers advise, against numpy, a search on the data itself, and each other."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qgraph import observers
from qgraph.formats import INT8, UINT8, UInt
from qgraph.observers import OBSERVERS
from qgraph.observers.histogram import mean_squared_error
from qgraph.qparams import fake_quantize, from_range
from qgraph.spec import QuantSpec

AFFINE, SYMMETRIC = QuantSpec(UINT8), QuantSpec(INT8, symmetric=True)
SPECS = [AFFINE, SYMMETRIC, QuantSpec(INT8), QuantSpec(UInt(4)), QuantSpec(UINT8, symmetric=True)]
every_observer = pytest.mark.parametrize("name", list(OBSERVERS))
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
def test_odd_tensors_give_sound_parameters(observed, name, array, spec):
    observer = observed(name, array)
    low, high = observer.range(spec)
    assert np.isfinite(low) and np.isfinite(high) and low <= high
    assert min(float(array.min()), 0.0) <= low and high <= max(float(array.max()), 0.0)
    params = observer.qparams(spec)
    assert np.isfinite(params.scale) and params.scale > 0
    assert params.zero_point == np.rint(params.zero_point)


@pytest.mark.parametrize("name", ["histogram", "minmax", "moving-average", "percentile", "entropy"])
@pytest.mark.parametrize("value", [5.25, -1e-3, 1.0, 3.4e38, 1e-30])
def test_a_constant_is_expressed_to_within_rounding(observed, name, value):
    array = np.full(1000, value, np.float32)
    found = fake_quantize(array, observed(name, array).qparams(AFFINE))
    np.testing.assert_allclose(found, array, rtol=1e-6)


def distributions(size, seed=11):
    """Six kinds of data: light and heavy tails, one-sided ones, outliers."""
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
def test_percentile_is_numpys_quantile_to_within_a_bin(observed, data, percent, monkeypatch):
    monkeypatch.setattr(observers.Percentile, "percent", percent)
    data = data[: data.size - 3]  # a number that no tail divides
    tail = (1 - percent / 100) / 2
    expected = np.quantile(data.astype(np.float64), [tail, 1 - tail], method="inverted_cdf")
    found = observed("percentile", *batches(data)).range(AFFINE)
    assert np.all(np.abs(np.array(found) - expected) <= np.abs(expected) / 127)


def test_percentile_finds_no_value_where_there_is_none(observed):
    data = np.random.default_rng(0).uniform(-1, 1, 100_000).astype(np.float32)
    data[:1000] = 1000.0
    for percent, high in ((99.999, 1000.0), (99.0, 1000.0), (97.0, 0.985 * 2 / 0.99 - 1)):
        observer = observed("percentile", data)
        observer.percent = percent
        assert observer.range(AFFINE).high == pytest.approx(high, rel=1 / 127)


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
def test_histogram_is_as_good_as_a_grid_search_on_the_data(observed, data, spec):
    found = sqnr(data, observed("histogram", *batches(data)).qparams(spec))
    assert found >= grid(data, spec) - 0.05
    assert found >= sqnr(data, observed("minmax", *batches(data)).qparams(spec)) - 0.01


def test_the_grid_search_itself_is_right():
    """Against the published numbers of facts/numerics.md, where the sample size matters least."""
    assert grid(DATA["gauss"], AFFINE) == pytest.approx(40.6, abs=0.15)
    assert grid(DATA["relu"], AFFINE) == pytest.approx(46.3, abs=0.15)


@every_distribution
def test_histogram_keeps_one_sided_data_one_sided(observed, data):
    positive = np.abs(data)
    assert observed("histogram", positive).range(AFFINE).low == 0.0
    assert observed("histogram", positive).qparams(AFFINE).zero_point == 0
    assert observed("histogram", -positive).qparams(AFFINE).zero_point == 255


def test_histogram_on_data_of_few_values(observed):
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
def test_histogram_is_never_much_worse_than_minmax(observed, seed, spec):
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
def test_the_integrated_error_is_the_error_of_the_data(observed, data, spec, share):
    low, high = min(float(data.min()) * share, 0.0), float(data.max()) * share
    params = from_range(low, high, spec)
    real = np.mean(np.square(fake_quantize(data, params).astype(np.float64) - data))
    assert mean_squared_error(observed("histogram", data).bins(), params) == pytest.approx(real, rel=0.03)


def test_bins_are_in_order_and_hold_all_values(observed):
    for array in (*DATA.values(), *(a.astype(np.float32) for a in ODD.values())):
        bins = observed("histogram", array).bins()
        assert np.all(bins.low <= bins.high) and np.all(bins.high[:-1] <= bins.low[1:])
        assert bins.low[0] >= array.min() and bins.high[-1] <= array.max()
        assert bins.counts.sum() == array.size
        assert np.all(bins.high - bins.low <= np.maximum(np.abs(bins.low), np.abs(bins.high)) / 128 + 2.0**-133)


@pytest.mark.parametrize("spec", [AFFINE, SYMMETRIC], ids=["affine", "symmetric"])
def test_entropy_does_not_throw_one_sided_data_away(observed, spec):
    rng = np.random.default_rng(2)
    for data in (DATA["relu"], -DATA["relu"], rng.exponential(size=50_000), np.abs(rng.standard_normal(50_000))):
        data = data.astype(np.float32)
        observer = observed("entropy", data)
        assert sqnr(data, observer.qparams(spec)) >= sqnr(data, observed("minmax", data).qparams(spec)) - 3
    assert observed("entropy", DATA["relu"]).range(AFFINE).low == 0.0


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-1.0, 1.0), (-3.0, 0.5), (-2.0, 0.0)])
@pytest.mark.parametrize("spec", [AFFINE, SYMMETRIC], ids=["affine", "symmetric"])
def test_entropy_covers_uniform_data(observed, low, high, spec):
    data = np.random.default_rng(3).uniform(low, high, 50_000).astype(np.float32)
    found = observed("entropy", data).range(spec)
    assert found.low == pytest.approx(low, abs=0.01) and found.high == pytest.approx(high, abs=0.01)


def test_entropy_clips_a_lone_outlier(observed):
    data = np.append(DATA["gauss"], np.float32(20))
    low, high = observed("entropy", data).range(AFFINE)
    assert -6 < low < -3 and 3 < high < 15
