"""Whole compilations of models in 16 bits: every scheme, target and cache, and their memory."""

import subprocess
import sys

import numpy as np
import onnx_ir as ir
import pytest

import qgraph
from qgraph import modelio, passes, registry
from qgraph.data import inputs_of, load
from qgraph.pipeline import Context
from qgraph.session import Session, SessionOptions

HALF, FLOAT = ir.DataType.FLOAT16, ir.DataType.FLOAT


@pytest.mark.parametrize("style", ["plain", "fused"])
def test_decoders_step_by_step(decoder, tmp_path, style):
    """Logits and caches of a prompt and a step are those of the original, in its types."""
    path = decoder.write(tmp_path / "m.onnx", "tiny", style, "float16")
    context = Context(registry.target("cpu"), registry.target("cpu").scheme("fp32"), None, tmp_path)
    model = registry.pipeline("float")(context)(modelio.read(path)).model
    ir.save(model, tmp_path / "o.onnx")
    tokens = np.random.default_rng(0).integers(0, 512, (1, 7))
    found = []
    for one in (path, tmp_path / "o.onnx"):
        with Session(one, SessionOptions(threads=1)) as session:
            feeds = decoder.feeds("tiny", tokens, style, 0, "float16")
            first = session.run(feeds)
            second = session.run(decoder.next_feeds(feeds, first, np.array([[3]])))
            found.append({**first, **{f"second {name}": array for name, array in second.items()}})
    for name, array in found[0].items():
        assert found[1][name].dtype == array.dtype == np.float16
        assert np.abs(found[1][name].astype(np.float32) - array).max() < 0.01, name
    attention = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
    assert len(attention) == (2 if style == "fused" else 0)
    assert all(node.inputs[3].is_graph_input() for node in attention)


SCHEMES = [
    "fp32", "auto", "int8", "int8-dynamic", "int8-weights", "int4", "int2", "ternary-blocks", "weights", "fp16", "bf16",
    "fp8", "nf4",
]  # fmt: skip


@pytest.mark.usefixtures("model_free_cpu")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme(kinds, decoder, tmp_path, scheme):
    """In float16 the same layers are quantized as in float32, with the same loss; none is refused for its type."""
    shape = decoder.Decoder(1, 128, 4, 2, 256, 300, tied=True, bias=True)
    options = {"scheme": scheme, "bench_seconds": 0, "force": True, "time_limit": 1}
    if scheme in ("auto", "int8", "int8-dynamic"):
        options["data"] = [{"input_ids": row} for row in np.random.default_rng(1).integers(0, 300, (4, 1, 6))]
    reports = {}
    for dtype in ("float32", "float16"):
        path = decoder.write(tmp_path / f"{dtype}.onnx", shape, "plain", dtype)
        reports[dtype] = qgraph.optimize(path, tmp_path / "o.onnx", **options).report
        written = ir.load(tmp_path / "o.onnx")
        assert kinds(written) == kinds(ir.load(path))
        assert modelio.size_on_disk(tmp_path / "o.onnx") < 1.2 * modelio.size_on_disk(path)
    single, halved = reports.values()
    # What appends to the caches stays in float16.
    kernels = [
        sorted((node.name, node.scheme) for node in report.quantized if node.name.endswith("/MatMul"))
        for report in (single, halved)
    ]
    assert kernels[0] == kernels[1]
    assert bool(kernels[0]) == (scheme != "fp32")
    assert not [node for node in halved.refused if "float16" in node.reason and node.op_type not in ("Concat", "Cast")]
    assert any("computes in float16" in note for note in halved.notes)
    before, after = (report.fidelity.outputs["logits"].sqnr for report in (single, halved))
    # Caches and logits are rounded to float16 in both halved models.
    assert after > min(before, 50) - 1.5


@pytest.mark.usefixtures("model_free_cpu")
@pytest.mark.parametrize("check", ["whole", "parts", "none"])
def test_the_same_codes_as_from_float32(decoder, tmp_path, check):
    """Of the same numbers: weights that float16 holds exactly."""
    shape = decoder.Decoder(1, 128, 4, 2, 256, 300, tied=True, bias=True)
    model = decoder.build(shape, "plain", "float16")
    ir.save(model, tmp_path / "half.onnx")
    wide = modelio.read(tmp_path / "half.onnx")
    passes.ToFloat(caches=False)(wide)
    for value in wide.graph.initializers.values():
        value.const_value = ir.Tensor(np.array(value.const_value.numpy()), name=value.name)
    ir.save(wide, tmp_path / "single.onnx")
    codes = []
    for name in ("half", "single"):
        options = {"scheme": "int4", "block_size": 32, "check": check, "bench_seconds": 0.0, "force": check == "whole"}
        qgraph.optimize(tmp_path / f"{name}.onnx", tmp_path / f"{name}-int4.onnx", **options)
        written = ir.load(tmp_path / f"{name}-int4.onnx")
        nodes = [node for node in written.graph if node.op_type == "MatMulNBits"]
        codes.append({node.name: node.inputs[1].const_value.numpy() for node in nodes})
    assert codes[0].keys() == codes[1].keys() and len(codes[0]) == 5
    for name, array in codes[0].items():
        assert np.array_equal(array, codes[1][name]), name


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_caches_in_integers(kinds, decoder, tmp_path, bits):
    """They take the place of those in float16 at both ends."""
    path = decoder.write(tmp_path / "m.onnx", "tiny", "fused", "float16")
    tokens = np.random.default_rng(1).integers(0, 512, (4, 6))
    data = [{"input_ids": row[None]} for row in tokens]
    options = {"scheme": "fp32", "kv_cache": bits, "bench_seconds": 0, "force": True}
    report = qgraph.optimize(path, tmp_path / "o.onnx", data=data, **options).report
    written = ir.load(tmp_path / "o.onnx")
    expected = ir.DataType.INT8 if bits == "int8" else ir.DataType.UINT8
    assert {kind for name, kind in kinds(written).items() if "past" in name or "present" in name} == {expected}
    assert kinds(written)["logits"] == HALF
    single = decoder.write(tmp_path / "single.onnx", "tiny", "fused")
    wanted = qgraph.optimize(single, tmp_path / "s.onnx", data=data, **options).report
    assert abs(report.fidelity.outputs["logits"].sqnr - wanted.fidelity.outputs["logits"].sqnr) < 1


@pytest.mark.parametrize("target", ["cuda", "webgpu"])
@pytest.mark.parametrize("scheme", ["fp16", "int4"])
@pytest.mark.parametrize("style", ["plain", "fused"])
def test_targets_that_compute_in_halves(kinds, decoder, model_kit, tmp_path, target, scheme, style):
    """All is in float16 again, with no Cast between, and the numbers are those of the original."""
    shape = decoder.Decoder(1, 128, 4, 2, 256, 300, tied=True, bias=True)
    path = decoder.write(tmp_path / "m.onnx", shape, style, "float16")
    where = registry.target(target)
    tokens = np.random.default_rng(1).integers(0, 300, (4, 6))
    feeds = [decoder.feeds(shape, row[None], style, 0, "float16") for row in tokens]
    before = modelio.read(path)
    data = load(feeds, inputs_of(before))
    model = registry.pipeline("quantize")(Context(where, where.scheme(scheme), data, tmp_path))(before.clone()).model
    assert kinds(model) == kinds(before)
    large = [v for v in model.graph.initializers.values() if v.const_value.size >= 1024]
    assert large and not [v.name for v in large if v.dtype == FLOAT]
    attention = [node for node in model.graph if node.op_type in ("MatMul", "GroupQueryAttention", "MatMulNBits")]
    assert {node.outputs[0].dtype for node in attention} == {HALF}
    # From integers, and around what has no float16 form; none at a cache.
    ends = [node for node in model.graph if node.op_type == "Cast" and node.inputs[0].is_graph_input()]
    assert not [node for node in ends if "past" in node.inputs[0].name]
    if scheme == "int4":
        assert "MatMulNBits" in model_kit.ops(model)
    with Session(before, SessionOptions(threads=1), tmp_path) as first:
        wanted = first.run(feeds[0])
    with Session(model, SessionOptions(threads=1), tmp_path) as second:
        found = second.run(feeds[0])
    error = np.abs(found["logits"].astype(np.float32) - wanted["logits"]).max()
    assert error < (0.02 if scheme == "fp16" else 0.5) * np.abs(wanted["logits"]).max()


def test_a_gpu_keeps_the_float_graph_in_halves(decoder, tmp_path):
    """Scheme fp32 quantizes nothing: what computed in float16 there goes on to do so."""
    path = decoder.write(tmp_path / "m.onnx", "tiny", "fused", "float16")
    where = registry.target("cuda")
    model = registry.pipeline("float")(Context(where, where.scheme("fp32"), None, tmp_path))(modelio.read(path)).model
    assert {node.outputs[0].dtype for node in model.graph if node.op_type == "MatMul"} == {HALF}


_PEAK = """
import resource, sys
import qgraph
from qgraph import registry
registry.pipeline("write")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
qgraph.optimize(sys.argv[1], sys.argv[2], scheme=sys.argv[4], check=sys.argv[3])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is counted in other units elsewhere")
@pytest.mark.parametrize(("check", "scheme", "most"), [("parts", "int4", 150e6), ("none", "fp32", 190e6)])
def test_memory_is_that_of_the_result_of_one_tensor(decoder, tmp_path, check, scheme, most):
    """96 MB of weights, of which one table takes 82 MB, and 164 MB in float32."""
    shape = decoder.Decoder(2, 512, 8, 2, 2048, 80000, tied=True)
    path = decoder.write(tmp_path / "m.onnx", shape, "plain", "float16")
    size = path.with_suffix(".onnx.data").stat().st_size
    assert 90e6 < size < 100e6
    command = [sys.executable, "-c", _PEAK, str(path), str(tmp_path / "out.onnx"), check, scheme]
    grown = 1024 * int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    written = (tmp_path / "out.onnx.data").stat().st_size
    assert written < (28e6 if scheme == "int4" else 1.01 * size)
    assert grown < most
