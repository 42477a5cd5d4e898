"""A model through the whole static pipeline, and what holds for every result."""

import onnx_ir as ir
import pytest

from qgraph import audit
from qgraph.targets import KERNEL


@pytest.fixture
def quantized(model_kit, tmp_path):
    """The whole static pipeline on a copy, and what holds for any result."""

    def apply(model, feeds=None, least=28.0, clean=True, **options):
        feeds = model_kit.feeds(model) if feeds is None else feeds
        after = model_kit.static(model.clone(), feeds, **options)
        for node in after.graph:
            if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
                scale, zero = node.inputs[1].const_value, node.inputs[2].const_value
                assert tuple(scale.shape) == tuple(zero.shape)
                if "axis" not in node.attributes:
                    assert tuple(scale.shape) == (), "the runtime's kernels refuse scales shaped [1]"
            if node.op_type == "DequantizeLinear":
                users = node.outputs[0].uses()
                integer = [u for u in users if KERNEL in u.node.meta and u.idx in u.node.meta[KERNEL].activations]
                assert not integer or len(users) == 1, "each integer reader has a DequantizeLinear of its own"
        read = {v for node in after.graph for v in node.inputs} | set(after.graph.outputs)
        read |= {v for body in after.graph.subgraphs() for node in body for v in node.inputs}
        assert not [name for name, v in after.graph.initializers.items() if v not in read], "dead initializers"
        if clean:
            ir.save(after, tmp_path / "audited.onnx")
            found = audit.audit(tmp_path / "audited.onnx", audit.plan_of(after), model_kit.free())
            assert found.clean, found
        assert model_kit.sqnr(model, after, feeds) > least
        return after

    return apply
