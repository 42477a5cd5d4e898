"""Decoders with a cache: what they take is known by names and shapes, and what data lacks is made up."""

import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

import qgraph
from qgraph import division, language, modelio
from qgraph.data import inputs_of, load
from qgraph.decoding import Decoder
from qgraph.errors import DataError
from qgraph.feeds import Batch, InputSpec
from qgraph.session import Session
from qgraph.synthetic import synthetic

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import decoder as decoders

I64, F32 = np.dtype(np.int64), np.dtype(np.float32)
IDS = InputSpec("input_ids", I64, (None, None))
MASK, POSITIONS = InputSpec("attention_mask", I64, (None, None)), InputSpec("position_ids", I64, (None, None))
KEY, VALUE = (InputSpec(f"past_key_values.0.{name}", F32, (None, 2, None, 8)) for name in ("key", "value"))
ALL = [IDS, MASK, POSITIONS, KEY, VALUE]


@pytest.fixture(scope="module", params=["plain", "fused"])
def tiny(request, tmp_path_factory):
    """A decoder of two layers, on disk."""
    return decoders.write(tmp_path_factory.mktemp(request.param) / "model.onnx", "tiny", request.param)


@pytest.mark.parametrize("inputs", [ALL, [IDS, KEY, VALUE], [IDS, MASK, KEY], ALL[::-1]])
def test_decoders_are_known(inputs):
    found = Decoder.of(inputs)
    assert found is not None and found.ids is IDS
    assert found.cache_names == {spec.name for spec in inputs if "past" in spec.name}
    assert (found.mask is MASK) == (MASK in inputs) and (found.positions is POSITIONS) == (POSITIONS in inputs)


@pytest.mark.parametrize(
    "inputs",
    [
        [IDS, MASK],
        [MASK, KEY, VALUE],
        [*ALL, InputSpec("pixels", F32, (None, 3, 8, 8))],
        [IDS, InputSpec("past_key", F32, (None, None, None, 8))],
        [IDS, InputSpec("past_key", F32, (1, 2, 64, 8))],
        [IDS, InputSpec("past_key_values.0.decoder.key", F32, (None, 2, None, 8)),
         InputSpec("past_key_values.0.encoder.key", F32, (None, 2, None, 8))],
    ],
)  # fmt: skip
def test_what_is_something_else(inputs):
    assert Decoder.of(inputs) is None


@given(batch=st.integers(1, 3), new=st.integers(1, 5), past=st.integers(0, 6))
def test_lengths_fit_together(batch, new, past):
    decoder = Decoder.of(ALL)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 9, (batch, new))
    feeds = decoder.complete({"input_ids": ids, **(decoder.drawn(batch, past, rng) if past else {})})
    assert feeds["attention_mask"].shape == (batch, past + new)
    np.testing.assert_array_equal(feeds["position_ids"], np.tile(np.arange(past, past + new), (batch, 1)))
    assert feeds[KEY.name].shape == (batch, 2, past, 8) and decoder.past(feeds) == past
    step = decoder.step(feeds, least=3)
    assert step["input_ids"].tolist() == [[ids[0, -1]]]
    assert decoder.past(step) == max(3, past + new - 1)
    assert step["attention_mask"].shape == (1, decoder.past(step) + 1) and step["position_ids"] == decoder.past(step)


def test_positions_do_not_count_padding():
    mask = np.array([[0, 0, 1, 1], [1, 1, 1, 0]])
    feeds = Decoder.of(ALL).complete({"input_ids": np.zeros((2, 4), np.int64), "attention_mask": mask})
    assert feeds["position_ids"].tolist() == [[0, 0, 0, 1], [0, 1, 2, 2]]
    given_ = {**feeds, "position_ids": np.full((2, 4), 7)}
    assert (Decoder.of(ALL).complete(given_)["position_ids"] == 7).all(), "what is given stays"


def test_fixed_sizes_and_codes_stay():
    one = InputSpec("input_ids", I64, (2, 1))
    codes = InputSpec("past_key", np.dtype(np.int8), (2, 4, None, 8))
    step = Decoder.of([one, codes]).step(
        {"input_ids": np.array([[3], [4]]), "past_key": np.ones((2, 4, 0, 8), np.int8)}
    )
    assert step["input_ids"].tolist() == [[3], [4]] and step["past_key"].shape == (2, 4, 128, 8)
    assert not step["past_key"].any()


def test_random_feeds_run_and_include_prompts_and_steps(tiny):
    model = modelio.read(tiny)
    found = list(synthetic(model))
    shapes = set()
    with Session(tiny) as session:
        for feed in found:
            outputs = session.run(feed)
            past = feed["past_key_values.0.key"].shape[2]
            shapes.add((past, feed["input_ids"].shape[1]))
            assert outputs["logits"].shape == (*feed["input_ids"].shape, 512)
            assert outputs["present.0.key"].shape[2] == past + feed["input_ids"].shape[1]
    assert any(past == 0 and new > 1 for past, new in shapes) and any(past and new == 1 for past, new in shapes)
    assert any(past and new > 1 for past, new in shapes)
    ids = np.concatenate([feed["input_ids"].ravel() for feed in found])
    assert ids.min() >= 0 and 256 < ids.max() < 512


def test_ids_alone_are_data(tiny, tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "ids.npz", input_ids=rng.integers(0, 512, (6, 9)))
    model = modelio.read(tiny)
    parts = division.divide(model, str(tmp_path / "ids.npz"), None, [])
    batches = [*parts.calibrate, *parts.search]
    assert len(batches) == 6 and "past_key_values" in parts.note and "without attention_mask" in parts.note
    assert "one token after 128 others" in parts.note
    with Session(tiny) as session:
        for batch in batches:
            assert session.run(batch.feeds)["logits"].shape == (1, 9, 512)
        session.run(parts.search.typical())
    typical = parts.search.typical()
    assert typical["input_ids"].shape == (1, 1) and typical["past_key_values.1.value"].shape == (1, 2, 128, 16)


def test_a_single_array_is_the_ids(tiny, tmp_path):
    np.save(tmp_path / "ids.npy", np.arange(12).reshape(3, 4))
    found = list(load(str(tmp_path / "ids.npy"), inputs_of(modelio.read(tiny))))
    assert [batch.feeds["input_ids"].tolist() for batch in found] == [[[0, 1, 2, 3]], [[4, 5, 6, 7]], [[8, 9, 10, 11]]]


def test_names_are_still_checked(tiny, tmp_path):
    np.savez(tmp_path / "ids.npz", input_id=np.zeros((6, 9), np.int64))
    with pytest.raises(DataError, match="Did you mean 'input_ids'"):
        list(load(str(tmp_path / "ids.npz"), inputs_of(modelio.read(tiny))))


def test_masks_over_a_cache_show_the_new_tokens():
    mask = np.array([[0, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    batch = Batch("b", {"input_ids": np.ones((2, 2), np.int64), "attention_mask": mask})
    assert batch.visible.tolist() == [[True, False], [True, True]]
    hidden = Batch("b", {"input_ids": np.ones((1, 2), np.int64), "attention_mask": mask[:1, :4]})
    assert hidden.visible is None, "only the past is hidden"


def test_language_models_are_known(tiny, model_kit):
    assert language.is_language_model(modelio.read(tiny))
    text = "g (int64[b, s] ids) => (float[b, s, {n}] y) {{ e = Gather (T, ids) y = MatMul (e, W) }}"
    table = model_kit.normal(50, 4)
    for columns, expected in ((50, True), (52, True), (9, False)):
        model = model_kit.text(text.format(n=columns), T=table, W=model_kit.normal(4, columns))
        assert language.is_language_model(model) == expected
    assert not language.is_language_model(model_kit.text("g (float[b, 4] x) => (float[b, 4] y) { y = Relu (x) }"))


@pytest.mark.parametrize("scheme, data", [("int4", False), ("int8-dynamic", False), ("fp32", False), ("int8", True)])
def test_decoders_go_in_and_come_out_working(tiny, tmp_path, model_free_cpu, scheme, data):
    rng = np.random.default_rng(1)
    ids, mask = rng.integers(0, 512, (8, 12)), np.ones((8, 12), np.int64)
    mask[::2, :3] = 0
    np.savez(tmp_path / "ids.npz", input_ids=ids, attention_mask=mask)
    out = tmp_path / "out.onnx"
    report = qgraph.optimize(
        tiny, out, scheme=scheme, block_size=32 if scheme == "int4" else None, force=True, bench_seconds=0,
        data=str(tmp_path / "ids.npz") if data and "plain" in str(tiny) else None if not data else ids_only(ids),
    ).report  # fmt: skip
    assert report.budget.metric == "kl" and "bits per token" in report.budget.text
    before, after = ir.load(tiny).graph, ir.load(out).graph
    for old, new in zip((*before.inputs, *before.outputs), (*after.inputs, *after.outputs), strict=True):
        assert (old.name, old.dtype) == (new.name, new.dtype)
    assert bool(report.quantized) == (scheme != "fp32")
    expected, found = (_generate(path, ids[:1, :6]) for path in (tiny, out))
    alike = np.corrcoef(expected.ravel(), found.ravel())[0, 1]
    # Everything is quantized here, masked scores in int8 among it, whether that pays or not.
    assert alike > {"int4": 0.9, "int8": 0.6, "int8-dynamic": 0.99, "fp32": 0.999}[scheme]


def ids_only(ids):
    """Prompts without padding, which the fused operators take at the end only."""
    return [{"input_ids": row[None]} for row in ids]


def _generate(path, ids):
    """Logits of a prompt and four steps, each with the cache of the one before."""
    with Session(path) as session:
        decoder = Decoder.of(inputs_of(modelio.read(path)))
        feeds, rows = decoder.complete({"input_ids": ids}), []
        for token in (5, 17, 99, 400):
            outputs = session.run(feeds)
            rows.append(outputs["logits"][0, -1])
            caches = {f"past_key_values.{n.removeprefix('present.')}": a for n, a in outputs.items() if n != "logits"}
            feeds = decoder.complete({"input_ids": np.array([[token]]), **caches})
    return np.array(rows)
