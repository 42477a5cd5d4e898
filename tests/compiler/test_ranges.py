"""Ranges saved and given back: the same model, also of a search, and no other."""

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest

import qgraph
from qgraph.errors import DataError

# One way to quantize, and no budget that would send a noisy node back to float.
INT8 = qgraph.Options(bench_seconds=0, scheme="int8", max_loss="100%")


def test_ranges_saved_and_given_back(model_kit, model_free_cpu, mlp, tmp_path):
    ir.save(mlp, tmp_path / "in.onnx")
    feeds, ranges = model_kit.feeds(mlp, 8), tmp_path / "ranges.npz"
    source = tmp_path / "in.onnx"
    qgraph.optimize(source, tmp_path / "a", data=feeds, options=dataclasses.replace(INT8, save_ranges=ranges))
    qgraph.optimize(source, tmp_path / "b", data=feeds, options=dataclasses.replace(INT8, ranges=ranges))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    # They are really used: other data changes nothing.
    others = model_kit.feeds(mlp, 8, seed=5)
    qgraph.optimize(source, tmp_path / "c", data=others, options=dataclasses.replace(INT8, ranges=ranges))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "c").read_bytes()
    mlp.graph.initializers["d"].const_value = ir.tensor(np.zeros(16, np.float32))
    ir.save(mlp, tmp_path / "other.onnx")
    with pytest.raises(DataError, match="another model"):
        qgraph.optimize(
            tmp_path / "other.onnx", tmp_path / "d", data=feeds, options=dataclasses.replace(INT8, ranges=ranges)
        )


def test_ranges_of_a_model_with_absorbed_activations(model_kit, model_free_cpu, cnn, tmp_path):
    feeds = model_kit.feeds(cnn, 6)
    job = {"options": INT8, "data": feeds}
    first = qgraph.optimize(cnn, tmp_path / "a", save_ranges=str(tmp_path / "ranges.npz"), **job)
    assert "Relu" not in {node.op_type for node in first.report.nodes}
    qgraph.optimize(cnn, tmp_path / "b", ranges=str(tmp_path / "ranges.npz"), **job)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    # What needs fewer ranges finds all of them.
    report = qgraph.optimize(cnn, ranges=tmp_path / "ranges.npz", keep_float=("Gemm",), **job).report
    assert "Gemm" in {node.op_type for node in report.refused}
    with pytest.raises(DataError, match="lacks the range"):
        qgraph.optimize(cnn, save_ranges=tmp_path / "few.npz", keep_float=("Gemm",), **job)
        qgraph.optimize(cnn, ranges=tmp_path / "few.npz", **job)


@pytest.mark.parametrize("order", ["given", "reversed"])
def test_ranges_of_a_search_hold_for_all_its_candidates(model_kit, model_free_cpu, mlp, tmp_path, order):
    """Nodes that the fastest candidate has in no static kernel may be static in a later one: their ranges are kept."""
    feeds = model_kit.feeds(mlp, 8)
    job = {"bench_seconds": 0, "data": feeds if order == "given" else feeds[::-1], "min_sqnr": 45}
    first = qgraph.optimize(mlp, tmp_path / "a", save_ranges=tmp_path / "ranges.npz", **job).report
    second = qgraph.optimize(mlp, tmp_path / "b", ranges=tmp_path / "ranges.npz", **job).report
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert len(first.candidates) > 2
    assert first.candidates == second.candidates


def test_ranges_on_other_data_are_those_of_the_first(model_kit, model_free_cpu, mlp, tmp_path):
    """Channels must not be scaled by what other data says while their ranges stay."""
    scale = np.exp(model_kit.normal(128, seed=8))
    feeds = [{"x": feed["x"] * scale} for feed in model_kit.feeds(mlp, 8, free=8)]
    other = [{"x": feed["x"] * scale[::-1]} for feed in model_kit.feeds(mlp, 8, free=8, seed=4)]
    job = {"options": INT8, "evaluation": feeds}
    first = qgraph.optimize(mlp, tmp_path / "a", data=feeds, save_ranges=tmp_path / "ranges.npz", **job).report
    second = qgraph.optimize(mlp, tmp_path / "b", data=other, ranges=tmp_path / "ranges.npz", **job).report
    assert first.fidelity.worst.sqnr == second.fidelity.worst.sqnr > 20
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
