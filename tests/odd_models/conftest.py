"""Any model, however odd, through the whole compilation, and what holds for every result."""

import contextlib
import json

import onnx
import onnx_ir as ir
import pytest

import qgraph


@pytest.fixture
def compiled(model_kit, tmp_path):
    """Writes the model, optimizes the file, and checks all that holds for any model."""

    def compile_model(model, feeds=None, least=25.0, **options):
        options = {"scheme": "int8", "max_loss": "100%", **options}
        source, target = tmp_path / "in.onnx", tmp_path / "out.onnx"
        ir.save(model, source)
        feeds = model_kit.feeds(model) if feeds is None else feeds
        result = qgraph.optimize(source, target, data=feeds, options=qgraph.Options(bench_seconds=0, **options))
        with contextlib.suppress(onnx.checker.ValidationError):
            onnx.checker.check_model(onnx.load(source))
            onnx.checker.check_model(onnx.load(target))
        before, after = onnx.load(source).graph, onnx.load(target).graph
        assert [o.name for o in after.output] == [o.name for o in before.output]
        given = {i.name for i in before.initializer}
        kept = [i for i in before.input if i.name not in given or i.name in {v.name for v in after.input}]
        assert list(after.input) == kept
        assert model_kit.sqnr(source, target, feeds) >= least
        assert result.report.quantized
        assert all((node.kernel is None) != (node.reason is None) for node in result.report.nodes)
        assert all(node.name for node in result.report.nodes)
        read = {name for node in _all_nodes(after) for name in node.input} | {o.name for o in after.output}
        assert not [i.name for i in after.initializer if i.name not in read], "dead initializers"
        json.dumps(result.report.to_dict(), allow_nan=False)
        assert not list(tmp_path.glob(".qgraph-*"))
        return result

    return compile_model


def _all_nodes(graph):
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for body in [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]:
                yield from _all_nodes(body)


@pytest.fixture
def kernels():
    """The kernels of a result's integer nodes, by name."""
    return lambda result: {node.name: node.kernel for node in result.report.quantized}
