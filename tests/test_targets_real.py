"""Targets on their own providers, where these are set up: what they take, and that their numbers are right."""

from pathlib import Path

import numpy as np
import pytest

import qgraph
from qgraph import proof, registry
from qgraph.errors import OptionError

MODELS = Path(__file__).parent.parent / "models"
LAYERS = """
g (float[8, 128] x) => (float[8, 64] y) {
    a = MatMul (x, A)
    b = Add (a, bias)
    c = Relu (b)
    d = LayerNormalization (c, gain, offset)
    y = MatMul (d, B)
}
"""


@pytest.fixture(autouse=True)
def _two_samples(monkeypatch):
    """Two samples show what these tests look at; test_polish.py looks at how many are taken."""
    monkeypatch.setattr(proof, "_SECONDS", 0.0)


def here(name):
    """The target, or a skip that says what is missing."""
    target = registry.target(name)
    if proof.how(target) is None:
        pytest.skip(proof.missing(target))
    return target


@pytest.mark.parametrize(
    "target, scheme, share, work, least",
    [
        ("xnnpack", "int8", 0.35, 0.99, 30),
        ("xnnpack", "fp32", 0.35, 0.99, 100),
        ("qnn", "int8", 1.0, 1.0, 25),
        ("qnn", "a16w8", 1.0, 1.0, 38),
        ("openvino", "int8", 0.99, 1.0, 25),
        ("openvino", "fp32", 0.99, 1.0, 80),
        ("webgpu", "fp16", 0.9, 1.0, 40),
        ("wasm", "int8", 1.0, 1.0, 30),
        ("arm64", "int8", 1.0, 1.0, 30),
    ],
)
def test_a_convolutional_net(target, scheme, share, work, least, tmp_path):
    here(target)
    found = qgraph.optimize(
        MODELS / "digits.onnx",
        tmp_path / "out.onnx",
        data=str(MODELS / "digits_calibration.npz"),
        target=target,
        scheme=scheme,
        bench_seconds=0,
    ).report
    placed = found.placement
    assert placed is not None and placed.right
    assert placed.share >= share and placed.work >= work, placed.left
    assert placed.sqnr > least and placed.cosine > 0.998


@pytest.mark.parametrize(
    "target, scheme, least",
    [
        ("webgpu", "int4", 14),
        ("webgpu", "int8-weights", 35),
        ("webgpu", "fp16", 45),
        ("openvino", "int8-weights", 35),
        ("openvino", "int4", 14),
        ("wasm", "int4", 14),
        ("wasm", "int8-weights", 35),
        ("qnn", "int8", 25),
    ],
)
def test_products(target, scheme, least, model_kit, tmp_path):
    here(target)
    model = model_kit.text(
        LAYERS,
        A=model_kit.normal(128, 256) / 11,
        bias=model_kit.normal(256),
        gain=1 + 0.1 * model_kit.normal(256),
        offset=model_kit.normal(256, seed=2),
        B=model_kit.normal(256, 64) / 16,
    )
    data = [{"x": model_kit.normal(8, 128, seed=i)} for i in range(8)]
    found = qgraph.optimize(
        model, tmp_path / "out.onnx", data=data, target=target, scheme=scheme, force=True, bench_seconds=0
    ).report
    assert found.placement is not None and found.placement.right, found.notes
    assert found.placement.work == 1.0 and found.placement.sqnr > least
    assert {node.op_type for node in found.quantized} & {"MatMul", "Gemm", "MatMulNBits", "FusedMatMul"}


@pytest.mark.parametrize(
    ("nodes", "scheme", "most"),
    [
        # In scales of their own, a constant 0 beside small numbers gave 0 there, and a reciprocal of 100 gave 10.
        ("a = Abs (x)  b = Mul (a, small)  m = Max (b, zero)  y = Sqrt (m)", "a16w8", 1e-3),
        ("a = Abs (x)  c = Mul (a, small)  b = Add (c, small)  r = Reciprocal (b)  y = Mul (r, x)", "a16w8", 2e-2),
        ("e = Gather (table, i)  n = Neg (e)  y = Add (n, x)", "a16w8", 1e-3),
        ("e = Gather (table, i)  n = Neg (e)  y = Add (n, x)", "int8", 2e-2),
    ],
)
def test_numbers_that_were_wrong_there(nodes, scheme, most, model_kit, tmp_path):
    here("qnn")
    model = model_kit.text(
        f"g (float[8, 16] x, int64[8] i) => (float[8, 16] y) {{ {nodes} }}",
        zero=np.float32(0),
        small=np.float32(0.01),
        table=model_kit.normal(50, 16),
    )
    data = [
        {"x": model_kit.normal(8, 16, seed=seed), "i": np.random.default_rng(seed).integers(0, 50, 8)}
        for seed in range(8)
    ]
    found = qgraph.optimize(
        model, tmp_path / "out.onnx", data=data, target="qnn", scheme=scheme, force=True, bench_seconds=0
    ).report
    assert found.placement is not None and found.placement.right and found.placement.share == 1.0
    assert found.placement.error < most and found.placement.sqnr > 10


def test_a_batch_is_as_large_there_as_here(tmp_path):
    # With a free batch this provider gives one row, whatever the batch is.
    here("xnnpack")
    with np.load(MODELS / "digits_calibration.npz") as stored:
        batches = [{"image": stored["image"][i : i + 4]} for i in range(0, 32, 4)]
    found = qgraph.optimize(
        MODELS / "digits.onnx", tmp_path / "out.onnx", data=batches, target="xnnpack", scheme="fp32", bench_seconds=0
    )
    assert found.report.placement.right
    assert found.model.graph.inputs[0].shape.is_static()


@pytest.mark.parametrize(
    "target, scheme, words",
    [
        ("qnn", "int4", "something else"),
        ("qnn", "int8-weights", "to the CPU"),
        ("coreml", "int8", "--target arm64"),
        ("nnapi", "int4", "weights in blocks"),
        ("tensorrt", "int4", "--target cuda"),
        ("webgpu", "int8", "WebGPU provider has no"),
        ("openvino", "int2", "2 bits"),
        ("cuda", "int8", "TensorRT"),
    ],
)
def test_what_a_target_has_not_is_an_error_that_names_what_works(target, scheme, words):
    with pytest.raises(OptionError, match=f"{target!r} has no scheme {scheme!r}.*{words}.*It has: "):
        registry.target(target).scheme(scheme)
