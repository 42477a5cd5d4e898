"""Means of channels: an exact monoid in which every sample counts alike."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from qgraph.observers.channel_mean import ChannelMean


def mean_of(samples, axis=1):
    mean = ChannelMean(axis)
    for sample in samples:
        mean.update(sample)
    return mean


MEANINGFUL = st.floats(-(2.0**60), 2.0**60, width=32)
CHANNELS = st.lists(arrays.arrays(np.float32, (2, 3), elements=MEANINGFUL), min_size=1, max_size=6)


@given(samples=CHANNELS, random=st.randoms(use_true_random=False))
def test_channel_means_are_an_exact_monoid(frozen, samples, random):
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
def test_channel_means_do_not_depend_on_the_split_into_batches(frozen, array, axis, cuts):
    whole = mean_of([array], axis)
    assert frozen(mean_of(np.split(array, sorted(min(c, len(array)) for c in cuts)), axis)) == frozen(whole)
    assert frozen(mean_of([row[None] for row in array], axis)) == frozen(whole)


SPOILT = st.one_of(MEANINGFUL, st.sampled_from([np.nan, np.inf, -np.inf]))


@given(
    array=arrays.arrays(np.float32, st.tuples(st.integers(1, 6), st.just(3), st.integers(1, 4)), elements=SPOILT),
    axis=st.sampled_from([1, 2]),
    random=st.randoms(use_true_random=False),
)
def test_positions_that_are_not_finite_are_left_out_whatever_else_is_in_their_batch(frozen, array, axis, random):
    expected = mean_of([array], axis)
    shuffled = list(array)
    random.shuffle(shuffled)
    parts = [ChannelMean(axis), ChannelMean(axis)]
    for sample in shuffled:
        random.choice(parts).update(sample[None])
    parts[0].merge(parts[1])
    assert frozen(parts[0]) == frozen(expected)
    # [samples, positions, channels]; the mean of each sample is that of its positions which are finite throughout.
    rows = array if axis == 2 else np.moveaxis(array, 1, 2)
    kept = [sample[np.isfinite(sample).all(axis=1)].astype(np.float64) for sample in rows]
    means = [sample.mean(axis=0) for sample in kept if len(sample)]
    if not means:
        assert expected.mean is None
        return
    largest = max(float(np.abs(sample).max()) for sample in kept if len(sample))
    np.testing.assert_allclose(expected.mean, np.mean(means, axis=0), rtol=1e-7, atol=1e-7 * largest)


def test_what_is_too_large_for_float32_is_not_finite():
    double = np.array([[1.0, 2.0], [1e300, 4.0]])
    np.testing.assert_array_equal(mean_of([double]).mean, [1, 2])
    assert mean_of([np.full((2, 3), np.nan, np.float32)]).mean is None


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
