"""The same bytes for the same input, whatever the order of the data, the memory and the way it comes."""

import dataclasses

import numpy as np
import onnx_ir as ir

import qgraph

QUIET = qgraph.Options(bench_seconds=0)


def test_same_bytes_for_the_same_input_and_in_any_order_of_the_data(model_kit, model_free_cpu, cnn, tmp_path):
    ir.save(cnn, tmp_path / "in.onnx")
    feeds = model_kit.feeds(cnn, 10)
    shuffled = [feeds[i] for i in np.random.default_rng(1).permutation(len(feeds))]
    results = []
    for name, data in (("a", feeds), ("b", feeds), ("c", shuffled)):
        qgraph.optimize(tmp_path / "in.onnx", tmp_path / name, data=data, options=QUIET)
        results.append((tmp_path / name).read_bytes())
    assert results[0] == results[1]
    assert results[0] == results[2]


def test_same_bytes_for_any_memory_budget(model_kit, model_free_cpu, cnn, tmp_path):
    ir.save(cnn, tmp_path / "in.onnx")
    feeds = model_kit.feeds(cnn, 6)
    results = []
    for memory in (1, 60_000, 1 << 28):
        # Roundings are learned where their moments fit into the memory, and else not; here they are not.
        options = dataclasses.replace(QUIET, memory=memory, time_limit=0)
        qgraph.optimize(tmp_path / "in.onnx", tmp_path / "out", data=feeds, options=options)
        results.append((tmp_path / "out").read_bytes())
    assert results[0] == results[1] == results[2]


def test_shuffled_data_of_a_dynamic_shape_gives_the_same_bytes(model_kit, model_free_cpu, mlp, tmp_path):
    ir.save(mlp, tmp_path / "in.onnx")
    feeds = [{"x": model_kit.normal(1 + i, 128, seed=i)} for i in range(8)]
    qgraph.optimize(tmp_path / "in.onnx", tmp_path / "a", data=feeds, options=QUIET)
    qgraph.optimize(tmp_path / "in.onnx", tmp_path / "b", data=feeds[::-1], options=QUIET)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_in_memory_and_file_give_the_same_bytes(model_kit, model_free_cpu, mlp, tmp_path):
    ir.save(mlp, tmp_path / "in.onnx")
    feeds = model_kit.feeds(mlp, 6)
    qgraph.optimize(tmp_path / "in.onnx", tmp_path / "a.onnx", data=feeds, options=QUIET)
    qgraph.optimize(ir.load(tmp_path / "in.onnx"), tmp_path / "b.onnx", data=feeds, options=QUIET)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_a_loader_that_shuffles(model_kit, model_free_cpu, mlp, tmp_path):
    """Calibration, the split and the comparison go through the data several times, and must see the same."""
    feeds, random = model_kit.feeds(mlp, 10), np.random.default_rng(0)

    class Loader:
        def __iter__(self):
            return iter([feeds[i] for i in random.permutation(len(feeds))])

    sources = [feeds, Loader(), Loader, lambda: (feed for feed in Loader()), iter(Loader())]
    for number, data in enumerate(sources):
        qgraph.optimize(mlp, tmp_path / str(number), data=data, options=QUIET)
    assert len({(tmp_path / str(number)).read_bytes() for number in range(len(sources))}) == 1
