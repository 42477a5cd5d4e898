"""Samples of layers' inputs and ranges of their channels: exact whatever the order, and what a Conv multiplies."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from qgraph.passes import Canonicalize, Survey

from qgraph.calibration import CHANNELS, SAMPLE
from qgraph.data import inputs_of, load
from qgraph.observers.channel_range import ChannelRange
from qgraph.observers.sample import Patches, Sample
from qgraph.session import Session

# Few different values, so that rows come again.
ROWS = hnp.arrays(
    np.float32, st.tuples(st.integers(1, 12), st.just(3)), elements=st.sampled_from([-1.5, 0.0, 0.25, 2.0])
)
IMAGES = hnp.arrays(
    np.float32, st.tuples(st.integers(1, 3), st.just(2), st.just(4), st.just(5)), elements=st.sampled_from([0.0, 1, 7])
)
LOOK = Patches((2, 3), (1, 2), (1, 1), ((1, 0), (1, 1)))


def distinct(items):
    return {item.tobytes() for item in items}


@pytest.mark.parametrize("patches, arrays", [(None, ROWS), (LOOK, IMAGES)], ids=["rows", "patches"])
@pytest.mark.parametrize("count", [4, 16, 1000])
@given(data=st.data())
def test_merge_gives_what_one_pass_gives_in_any_order(patches, arrays, count, data):
    batches = data.draw(st.lists(arrays, min_size=1, max_size=5))
    whole = Sample(patches, count)
    for batch in batches:
        whole.update(batch)
    shuffled = data.draw(st.permutations(batches))
    cut = data.draw(st.integers(0, len(batches)))
    first, second = Sample(patches, count), Sample(patches, count)
    for batch in shuffled[:cut]:
        first.update(batch)
    for batch in shuffled[cut:]:
        for sample in batch:
            second.update(sample[None])
    first.merge(second)
    np.testing.assert_array_equal(first.items, whole.items)
    assert first.items.dtype == np.float32
    # Each once, only what was there, and as many as there may be.
    if patches is None:
        seen = distinct(np.concatenate(batches))
    else:
        windows = (np.moveaxis(LOOK.windows(batch), 1, 3).reshape(-1, 2, 2, 3) for batch in batches)
        seen = distinct(itertools.chain.from_iterable(np.ascontiguousarray(w) for w in windows))
    found = distinct(whole.items)
    assert found <= seen and len(whole.items) <= count
    assert len(found) >= min(count - count // 8, len(seen))
    # An eighth are as large as any that was seen.
    sizes = sorted((np.abs(np.frombuffer(item, np.float32)).max() for item in seen), reverse=True)
    kept = sorted((np.abs(np.frombuffer(item, np.float32)).max() for item in found), reverse=True)
    assert kept[: count // 8] == sizes[: count // 8]


def test_merging_nothing_changes_nothing():
    sample = Sample()
    assert sample.items is None
    sample.merge(Sample())
    assert sample.items is None
    sample.update(np.ones((2, 3), np.float32))
    before = sample.items.copy()
    sample.merge(Sample())
    np.testing.assert_array_equal(sample.items, before)


SPOILT = st.sampled_from([0.0, 1.0, 7.0, 0.5, np.nan, np.inf, -np.inf])


@pytest.mark.parametrize(
    "patches, shape",
    [(None, (st.integers(1, 12), st.just(3))), (LOOK, (st.integers(1, 3), st.just(2), st.just(4), st.just(5)))],
    ids=["rows", "patches"],
)
@pytest.mark.parametrize("count", [8, 1000])
@given(data=st.data())
def test_only_what_is_not_finite_is_left_out_whatever_else_is_in_its_batch(patches, shape, count, data):
    spoilt = hnp.arrays(np.float32, st.tuples(*shape), elements=SPOILT, fill=st.sampled_from([0.25, 2.0]))
    batches = data.draw(st.lists(spoilt, min_size=1, max_size=4))
    whole = Sample(patches, count)
    for batch in batches:
        whole.update(batch)
    parts = [Sample(patches, count), Sample(patches, count)]
    for sample in data.draw(st.permutations([sample for batch in batches for sample in batch])):
        parts[data.draw(st.integers(0, 1))].update(sample[None])
    parts[0].merge(parts[1])
    if patches is None:
        seen = np.concatenate(batches)
    else:
        seen = np.concatenate([np.moveaxis(LOOK.windows(b), 1, 3).reshape(-1, 2, 2, 3) for b in batches])
    seen = seen[np.isfinite(seen).reshape(len(seen), -1).all(axis=1)]
    if len(seen) == 0:
        assert whole.items is None and parts[0].items is None
        return
    np.testing.assert_array_equal(parts[0].items, whole.items)
    found, rest = distinct(whole.items), distinct(np.ascontiguousarray(seen))
    assert found <= rest and len(found) >= min(count - count // 8, len(rest))
    assert np.abs(whole.items).max() == np.abs(seen).max()


def test_a_patch_is_as_finite_as_what_it_looks_at():
    """One pixel spoils the patches that meet it, not the image, and the others are as they are without it."""
    image = np.arange(1, 2 * 6 * 7 + 1, dtype=np.float32).reshape(1, 2, 6, 7)
    spoilt = image.copy()
    spoilt[0, 1, 2, 3] = np.inf
    clean, found = Sample(LOOK), Sample(LOOK)
    clean.update(image)
    found.update(spoilt)
    hit = {item.tobytes() for item in clean.items if (item[1] == image[0, 1, 2, 3]).any()}
    assert hit and distinct(found.items) == distinct(clean.items) - hit


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
def test_what_is_not_finite_is_left_out(bad):
    sample = Sample()
    sample.update(np.array([[1, bad]]))
    sample.update(np.zeros((0, 2), np.float32))
    sample.update(np.float32(1))
    assert sample.items is None


def test_many_rows_that_are_mostly_the_same():
    """Padding: a sample of 256 among 100,000 rows of zeros and 300 others."""
    rows = np.zeros((100_000, 4), np.float32)
    rows[:300, 0] = np.arange(1, 301)
    sample, other = Sample(), Sample()
    sample.update(rows)
    for part in np.array_split(rows[::-1], 7):
        other.update(part)
    np.testing.assert_array_equal(sample.items, other.items)
    assert len(distinct(sample.items)) >= 256 - 32
    assert {300.0, 299.0, 269.0} <= set(sample.items[:, 0].tolist()), "the 32 largest"


def test_a_sample_is_spread_over_what_was_seen():
    rows = np.arange(20_000, dtype=np.float32)[:, None]
    sample = Sample(count=256)
    sample.update(rows)
    values = np.sort(sample.items[:, 0])
    fair, extreme = values[: 256 - 32], values[256 - 32 :]
    assert abs(fair.mean() - 10_000) < 5 * 20_000 / np.sqrt(12 * len(fair)), "as a random sample is"
    assert extreme.tolist() == list(range(19_968, 20_000))


def test_a_first_part_of_a_sample_is_one_too():
    rows = np.arange(20_000, dtype=np.float32)[:, None]
    sample = Sample(count=256)
    sample.update(rows)
    first = sample.items[:64, 0]
    assert 4 <= (first >= 19_968).sum() <= 12, "an eighth of them are extreme"
    assert abs(first[first < 19_968].mean() - 10_000) < 5 * 20_000 / np.sqrt(12 * 56)


# -- patches --------------------------------------------------------------------------------------------------------

FORMS = [
    ((3, 3), ""),
    ((3, 3), "pads = [1, 1, 1, 1]"),
    ((3, 2), "pads = [2, 0, 1, 1], strides = [2, 1]"),
    ((3, 3), "dilations = [2, 1], pads = [2, 1, 2, 1]"),
    ((2, 3), "strides = [3, 2], dilations = [2, 2], pads = [0, 1, 3, 2]"),
    ((1, 1), "strides = [2, 3]"),
    ((3, 4), 'auto_pad = "SAME_UPPER", strides = [2, 2]'),
    ((3, 4), 'auto_pad = "SAME_LOWER", strides = [2, 1]'),
    ((2, 2), 'auto_pad = "SAME_LOWER"'),
    ((2, 2), 'auto_pad = "VALID", strides = [2, 2]'),
    ((4,), "pads = [2, 1], strides = [2], dilations = [2]"),
    ((3,), ""),
]


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("kernel, attributes", FORMS)
def test_patches_times_weights_are_the_output_of_a_real_conv(model_kit, kernel, attributes, group):
    rank, channels = len(kernel), 4
    inputs, outputs = ["", ", 9", ", 9, 11"][rank], ["", ", h", ", h, w"][rank]
    model = model_kit.text(
        f"""g (float[n, {channels}{inputs}] x) => (float[n, 6{outputs}] y) {{
            y = Conv <{attributes}{", " if attributes else ""}group = {group}> (x, W)
        }}""",
        W=model_kit.normal(6, channels // group, *kernel),
    )
    feeds = model_kit.feeds(model, 3)
    Survey(load(feeds, inputs_of(model)))(model)
    (node,) = model.graph
    found, weight = node.meta[SAMPLE], model_kit.tensors(model)["W"]
    assert found.shape[1:] == (channels, *kernel)
    inner, outer = channels // group, 6 // group
    products = np.concatenate(
        [
            found[:, g * inner : (g + 1) * inner].reshape(len(found), -1)
            @ weight[g * outer : (g + 1) * outer].reshape(outer, -1).T
            for g in range(group)
        ],
        axis=1,
    )
    with Session(model) as session:
        outputs = np.concatenate([np.moveaxis(session.run(f)["y"], 1, -1).reshape(-1, 6) for f in feeds])
    distance = np.abs(products[:, None] - outputs[None]).max(axis=2)
    assert distance.min(axis=1).max() < 1e-5, "each patch is one that the Conv saw"
    if len(distinct(found)) < 224:
        assert distance.min(axis=0).max() < 1e-5, "and each that it saw is there"


def test_survey_of_products_and_shared_inputs(model_kit):
    model = model_kit.text(
        """g (float[n, 3, 8] x) => (float[n, 3, 4] a, float[n, 3, 4] b, float[m, 4] c) {
            a = MatMul (x, A)
            b = MatMul (x, B)
            f = Reshape (x, rows)
            c = Gemm <transB = 1> (f, C)
        }""",
        A=model_kit.normal(8, 4),
        B=model_kit.normal(8, 4, seed=1),
        C=model_kit.normal(4, 8),
        rows=np.array([-1, 8]),
    )
    Canonicalize()(model)
    feeds = model_kit.feeds(model, 4)
    Survey(load(feeds, inputs_of(model)))(model)
    layers = {node.outputs[0].name: node for node in model.graph if SAMPLE in node.meta}
    assert set(layers) == {"a", "b", "c"}
    rows = np.concatenate([feed["x"].reshape(-1, 8) for feed in feeds])
    for node in layers.values():
        assert distinct(node.meta[SAMPLE]) == distinct(rows)
        np.testing.assert_array_equal(node.meta[CHANNELS][0], rows.min(axis=0))
        np.testing.assert_array_equal(node.meta[CHANNELS][1], rows.max(axis=0))
    leftovers = {key for node in model.graph for value in node.inputs if value is not None for key in value.meta}
    assert "qgraph.statistics" not in leftovers


# -- channel ranges -------------------------------------------------------------------------------------------------


@given(st.lists(IMAGES, min_size=1, max_size=4), st.sampled_from([1, 2, -1, -2, 3]), st.randoms())
def test_channel_ranges_are_those_of_all_the_data(batches, axis, random):
    whole = np.concatenate(batches)
    others = tuple(i for i in range(4) if i != axis % 4)
    parts = [ChannelRange(axis) for _ in range(3)]
    for batch in batches:
        random.choice(parts).update(batch)
    random.shuffle(parts)
    first = parts[0]
    for part in parts[1:]:
        first.merge(part)
    np.testing.assert_array_equal(first.low, whole.min(axis=others))
    np.testing.assert_array_equal(first.high, whole.max(axis=others))


def test_channel_ranges_of_nothing():
    found = ChannelRange(1)
    found.update(np.zeros((0, 3), np.float32))
    found.merge(ChannelRange(1))
    assert found.low is None and found.high is None
