"""The decoders of tools/decoder.py: two styles, one function; a cache that changes nothing; a tied table."""

import dataclasses
import importlib.util
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import qgraph
from qgraph.session import Session, SessionOptions

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def decoder():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("decoder", ROOT / "tools" / "decoder.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["decoder"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["decoder"]


def ids(batch, length, vocabulary=512):
    return np.random.default_rng(length).integers(0, vocabulary, (batch, length))


@pytest.mark.parametrize("head", ["transpose", "gemm", "copy"])
def test_both_styles_are_one_function(decoder, tmp_path, head):
    """Logits and caches, with and without a past; whatever the head is written as."""
    shape = dataclasses.replace(decoder.SHAPES["tiny"], head=head)
    # The runtime's attention takes several new positions behind a past of one sequence only.
    for batch, past in ((2, 0), (1, 5)):
        outputs = {}
        for style in decoder.STYLES:
            path = decoder.write(tmp_path / f"{style}.onnx", shape, style, seed=3)
            with Session(path, SessionOptions(threads=1)) as session:
                outputs[style] = session.run(decoder.feeds(shape, ids(batch, 7), style, past))
        plain, fused = outputs.values()
        assert plain.keys() == fused.keys()
        for name, array in plain.items():
            assert np.abs(array - fused[name]).max() < 1e-4, name
        assert plain["logits"].std() > 0.05


@pytest.mark.parametrize("style", ["plain", "fused"])
def test_steps_with_the_cache_are_the_whole_sequence(decoder, tmp_path, style):
    """A prompt of 5, then one by one."""
    tokens = ids(2, 9)
    path = decoder.write(tmp_path / "m.onnx", "tiny", style)
    with Session(path, SessionOptions(threads=1)) as session:
        whole = session.run(decoder.feeds("tiny", tokens, style))["logits"]
        feeds = decoder.feeds("tiny", tokens[:, :5], style)
        outputs = session.run(feeds)
        logits = [outputs["logits"]]
        for place in range(5, 9):
            feeds = decoder.next_feeds(feeds, outputs, tokens[:, place : place + 1])
            outputs = session.run(feeds)
            logits.append(outputs["logits"])
    assert np.abs(np.concatenate(logits, axis=1) - whole).max() < 1e-4


# The free target quantizes tiny products, too.
@pytest.mark.usefixtures("model_free_cpu")
@pytest.mark.parametrize("head", ["transpose", "gemm", "copy"])
@pytest.mark.parametrize("scheme", ["int4", "int2", "int8-weights"])
def test_a_tied_table_is_quantized_once(decoder, tmp_path, head, scheme):
    """For the head and for the embedding, which then is as far from the original as the head's weights are."""
    shape = dataclasses.replace(decoder.SHAPES["tiny"], head=head)
    path = decoder.write(tmp_path / "m.onnx", shape)
    changes = {"scheme": scheme, "block_size": 32, "check": "parts"}
    report = qgraph.optimize(path, tmp_path / "out.onnx", **changes).report
    assert {node.kernel for node in report.quantized} == {"MatMulNBits", "GatherBlockQuantized"}
    assert len(report.quantized) == 2 * 7 + 2
    model = ir.load(tmp_path / "out.onnx")
    (head_node,) = [n for n in model.graph if n.op_type == "MatMulNBits" and n.attributes["N"].as_int() == 512]
    (table,) = [n for n in model.graph if n.op_type == "GatherBlockQuantized"]
    assert table.inputs[0] is head_node.inputs[1]
    # Nothing of the float table is left.
    bits = {"int4": 4, "int2": 2, "int8-weights": 8}[scheme]
    weights = 512 * 64 + 2 * (64 * (64 + 2 * 32 + 64) + 3 * 64 * 160)
    total = sum(t.const_value.nbytes for t in model.graph.initializers.values())
    assert total < weights * (bits + 32 / 32 + 1) / 8 + 10_000
    tokens = ids(1, 6)
    outputs = []
    for one in (path, tmp_path / "out.onnx"):
        with Session(one, SessionOptions(threads=1)) as session:
            outputs.append(session.run(decoder.feeds(shape, tokens))["logits"])
    error = np.square(outputs[0] - outputs[1]).sum() / np.square(outputs[0]).sum()
    assert error < {"int4": 0.1, "int2": 1.5, "int8-weights": 0.001}[scheme]
