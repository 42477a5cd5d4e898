"""What else a file holds: metadata, other domains, external data, values that are no tensors."""

from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

import qgraph
from qgraph.errors import ExternalDataError, QGraphError

pytestmark = pytest.mark.usefixtures("model_free_cpu")


def test_metadata_survives(model_kit, compiled):
    n = model_kit.normal
    model = model_kit.text("g (float[n, 8] x) => (float[n, 8] y) { y = MatMul (x, W) }", opset=17, W=n(8, 8))
    model.metadata_props["author"] = "someone"
    model.graph.metadata_props["g"] = "kept"
    model.producer_name, model.doc_string, model.graph.name = "maker", "about", "main graph"
    model.domain, model.model_version = "org.example", 7
    model.graph.inputs[0].doc_string = "the input"
    result = compiled(model)
    found = result.model
    assert found.metadata_props["author"] == "someone"
    assert found.graph.metadata_props["g"] == "kept"
    assert (found.producer_name, found.doc_string, found.graph.name) == ("maker", "about", "main graph")
    assert (found.domain, found.model_version) == ("org.example", 7)
    assert found.graph.inputs[0].doc_string == "the input"


def test_contrib_operators_and_their_domain_survive(model_kit, compiled):
    n = model_kit.normal
    model = model_kit.text(
        """<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>
        g (float[2, 8] x) => (float[2, 8] y) {
            h = MatMul (x, W)
            y = com.microsoft.Gelu (h)
        }""",
        W=n(8, 8),
    )
    result = compiled(model)
    assert "com.microsoft" in result.model.graph.opset_imports
    assert "domain" in next(node.reason for node in result.report.refused)


def test_external_data(model_kit, tmp_path):
    n = model_kit.normal
    model = model_kit.text(
        "g (float[4, 64] x) => (float[4, 64] y) { h = MatMul (x, W)  y = MatMul (h, V) }",
        W=n(64, 64),
        V=n(64, 64, seed=1),
    )
    source = tmp_path / "in"
    source.mkdir()
    ir.save(model, source / "m.onnx", external_data="weights.bin", size_threshold_bytes=64)
    before = {p.name: p.read_bytes() for p in source.iterdir()}
    feeds = model_kit.feeds(model)
    target = tmp_path / "m.onnx"
    qgraph.optimize(source / "m.onnx", target, data=feeds, options=qgraph.Options(bench_seconds=0))
    assert {p.name: p.read_bytes() for p in source.iterdir()} == before
    assert model_kit.sqnr(source / "m.onnx", target, feeds) > 25
    assert sorted(p.name for p in tmp_path.iterdir()) in (["in", "m.onnx"], ["in", "m.onnx", "m.onnx.data"])


@pytest.mark.parametrize("harm", ["missing", "truncated", "outside"])
def test_broken_external_data(model_kit, tmp_path, harm):
    model = model_kit.text("g (float[4, 64] x) => (float[4, 64] y) { y = MatMul (x, W) }", W=model_kit.normal(64, 64))
    source = tmp_path / "in.onnx"
    ir.save(model, source, external_data="w.bin", size_threshold_bytes=64)
    data: Path = tmp_path / "w.bin"
    if harm == "missing":
        data.unlink()
    elif harm == "truncated":
        data.write_bytes(data.read_bytes()[:100])
    else:
        proto = onnx.load(source, load_external_data=False)
        for entry in proto.graph.initializer[0].external_data:
            if entry.key == "location":
                entry.value = "../w.bin"
        source.write_bytes(proto.SerializeToString())
    with pytest.raises(ExternalDataError, match="W"):
        qgraph.optimize(source, tmp_path / "out.onnx", data=model_kit.feeds(model))
    assert not (tmp_path / "out.onnx").exists()


def test_model_without_the_default_domain(model_kit, tmp_path):
    model = model_kit.text(
        """<ir_version: 8, opset_import: ["com.microsoft" : 1]>
        g (float[2, 8] x) => (float[2, 8] y) { y = com.microsoft.Gelu (x) }"""
    )
    ir.save(model, tmp_path / "in.onnx")
    with pytest.raises(QGraphError, match="default ONNX domain"):
        qgraph.optimize(tmp_path / "in.onnx", tmp_path / "out.onnx", data=model_kit.feeds(model))


def test_sequence_and_optional_values_pass_through(model_kit, compiled):
    n = model_kit.normal
    model = model_kit.text(
        """g (float[2, 8] x) => (float[2, 16] y) {
            h = MatMul (x, W)
            s = SequenceConstruct (x, h)
            y = ConcatFromSequence <axis = 1> (s)
        }""",
        W=n(8, 8),
    )
    compiled(model)
