"""Caches in integers: codes as the kernel makes them, models whose caches are codes, and the float view of them."""

import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

import qgraph
from qgraph import caches, modelio
from qgraph.compare import Runnable
from qgraph.decoding import Decoder
from qgraph.errors import OptionError
from qgraph.feeds import inputs_of
from qgraph.session import Session, SessionOptions

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import decoder as decoders


@pytest.fixture(scope="module")
def fused(tmp_path_factory):
    """A decoder of two layers with GroupQueryAttention, and prompts for it."""
    rng = np.random.default_rng(0)
    path = decoders.write(tmp_path_factory.mktemp("fused") / "model.onnx", "tiny", "fused")
    return path, [{"input_ids": rng.integers(0, 512, (1, 24))} for _ in range(12)]


@pytest.fixture(scope="module", params=[("int8", 8, 22), ("int4", 4, 10)], ids=["int8", "int4"])
def cached(request, fused, tmp_path_factory):
    """(file with caches in integers, bits, least dB of the logits, report)."""
    name, bits, level = request.param
    path, data = fused
    out = tmp_path_factory.mktemp(name) / "out.onnx"
    result = qgraph.optimize(path, out, scheme="fp32", kv_cache=name, data=data, bench_seconds=0, force=True)
    return out, bits, level, result.report


@given(seed=st.integers(0, 20), bits=st.sampled_from([8, 4]), length=st.integers(0, 3))
def test_codes_come_back_within_half_a_step(seed, bits, length):
    rng = np.random.default_rng(seed)
    scale = rng.uniform(0.1, 2, (1, 2, 1, 6)).astype(np.float32)
    top = 2 ** (bits - 1)
    cache = (rng.uniform(-top, top - 1, (3, 2, length, 6)) * scale).astype(np.float32)
    codes = caches.encode(cache, scale, bits)
    assert codes.dtype == (np.int8 if bits == 8 else np.uint8) and codes.shape == (3, 2, length, 6 * bits // 8)
    back = caches.decode(codes, scale, bits)
    assert (np.abs(back - cache) <= 0.5001 * scale).all()
    np.testing.assert_array_equal(caches.encode(back, scale, bits), codes)


@pytest.mark.parametrize("bits", [8, 4])
def test_scales_have_the_least_error(bits):
    rng = np.random.default_rng(0)
    sample = rng.standard_normal((2, 500, 6)).astype(np.float32)
    sample[0, 0, 0] = 40.0
    largest = np.abs(sample).max(axis=1)
    scale = caches.step(sample, largest, bits)
    assert scale.shape == (1, 2, 1, 6) and scale.dtype == np.float32

    def error(scale):
        return np.square(caches.decode(caches.encode(sample[None], scale, bits), scale, bits) - sample).sum(axis=(0, 2))

    plain = (largest / (2 ** (bits - 1) - 1))[None, :, None]
    assert (error(scale) <= error(plain) * 1.0001).all()
    if bits == 4:
        assert (error(scale) < 0.95 * error(plain)).sum() >= 6, "few levels are worth more than a few far values"


def test_channels_of_zeros_have_a_scale():
    scale = caches.step(np.zeros((1, 4, 2), np.float32), np.zeros((1, 2), np.float32), 8)
    assert (scale > 0).all() and np.isfinite(scale).all()


def test_inputs_and_outputs_are_codes(cached, fused):
    out, bits, _, report = cached
    model, original = ir.load(out), ir.load(fused[0])
    kind = ir.DataType.INT8 if bits == 8 else ir.DataType.UINT8
    for old, new in zip(
        (*original.graph.inputs, *original.graph.outputs), (*model.graph.inputs, *model.graph.outputs), strict=True
    ):
        assert old.name == new.name
        is_cache = "past" in old.name or "present" in old.name
        assert new.dtype == (kind if is_cache else old.dtype)
        assert new.shape[-1] == (old.shape[-1] * bits // 8 if is_cache else old.shape[-1])
    assert [c.past for c in caches.found(model)] == [v.name for v in original.graph.inputs if "past" in v.name]
    assert any("start from empty ones" in note for note in report.notes)


def test_codes_are_those_of_the_kernel(cached, fused):
    """What is read back from the cache is the float model's, to within half a step and what layers before lost."""
    out, bits, _, _ = cached
    feeds = Decoder.of(inputs_of(modelio.read(fused[0]))).complete(fused[1][0])
    with Session(fused[0]) as session:
        expected = session.run(feeds)["present.0.key"]
    cache = next(c for c in caches.found(ir.load(out)) if c.present == "present.0.key")
    with Session(out) as session:
        codes = session.run(caches.given(out, feeds))["present.0.key"]
    ours = caches.encode(expected, cache.scale, bits)
    assert codes.shape == ours.shape and np.mean(codes != ours) < 0.02, "ties and last bits may round the other way"


def test_generation_agrees(cached, fused):
    out, _, level, report = cached
    expected, found = _logits(fused[0]), _logits(out)
    signal = 10 * np.log10(np.square(expected).sum() / np.square(expected - found).sum())
    assert signal > level
    assert report.fidelity.outputs["logits"].sqnr > level and not report.fidelity.skipped
    assert all(one.cosine > 0.95 for one in report.fidelity.outputs.values()), "caches are compared as floats"


def _logits(path):
    """Of a prompt and eight steps, each with the cache that the one before wrote."""
    decoder, rows = Decoder.of(inputs_of(modelio.read(path))), []
    with Session(path) as session:
        feeds = decoder.complete({"input_ids": np.arange(3, 19)[None]})
        for token in range(100, 108):
            outputs = session.run(feeds)
            rows.append(outputs.pop("logits")[0, -1])
            past = {f"past_key_values.{name.removeprefix('present.')}": array for name, array in outputs.items()}
            feeds = decoder.complete({"input_ids": np.array([[token]]), **past})
    return np.array(rows, np.float64)


def test_sessions_take_floats(cached, fused):
    out = cached[0]
    feeds = Decoder.of(inputs_of(modelio.read(fused[0]))).step({"input_ids": np.array([[3]])}, 5)
    with Runnable(out).session(SessionOptions(threads=1)) as session:
        first = session.run(feeds)
        session.call(feeds)
        assert first["present.0.key"].dtype == np.float32 and first["present.0.key"].shape == (1, 2, 6, 16)
    with Runnable(fused[0]).session(SessionOptions(threads=1)) as session:
        assert type(session) is Session


def test_refusals(fused, model_kit, tmp_path):
    path, data = fused
    with pytest.raises(OptionError, match="calibration data"):
        qgraph.optimize(path, tmp_path / "o.onnx", kv_cache="int8")
    with pytest.raises(OptionError, match="Did you mean 'int8'"):
        qgraph.optimize(path, tmp_path / "o.onnx", kv_cache="int9", data=data)
    plain = decoders.write(tmp_path / "plain.onnx", "tiny", "plain")
    with pytest.raises(OptionError, match="only GroupQueryAttention"):
        qgraph.optimize(plain, tmp_path / "o.onnx", scheme="fp32", kv_cache="int8", data=data, bench_seconds=0)
    assert not (tmp_path / "o.onnx").exists()
