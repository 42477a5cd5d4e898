"""The CUDA target: what it plans, written and checked on the CPU provider, which computes the same operators."""

import numpy as np
import onnx_ir as ir
import pytest

import qgraph
from qgraph import registry
from qgraph.errors import OptionError
from qgraph.session import has_provider
from qgraph.targets import Form, Kernel

LAYERS = """
g (float[n, 128] x) => (float[n, 96] y) {
    a = MatMul (x, A)
    b = Add (a, bias)
    c = Relu (b)
    y = MatMul (c, B)
}
"""
elsewhere = pytest.mark.skipif(has_provider("CUDAExecutionProvider"), reason="the provider is here, and is asked")


@pytest.fixture
def layers(model_kit):
    return model_kit.text(
        LAYERS,
        A=model_kit.normal(128, 256) / 11,
        bias=model_kit.normal(256),
        B=model_kit.normal(256, 96, seed=1) / 16,
    )


def samples(model_kit, scale=1.0):
    return [{"x": model_kit.normal(8, 128, seed=i) * np.float32(scale)} for i in range(8)]


def types_of(model, operator):
    return {value.dtype for node in model.graph if node.op_type == operator for value in node.outputs}


@elsewhere
def test_half_precision_everywhere_and_the_ends_in_float(layers, model_kit):
    found = qgraph.optimize(layers, data=samples(model_kit), target="cuda", scheme="fp16")
    assert types_of(found.model, "MatMul") | types_of(found.model, "Gemm") == {ir.DataType.FLOAT16}
    assert {value.dtype for value in (*found.model.graph.inputs, *found.model.graph.outputs)} == {ir.DataType.FLOAT}
    assert 50 < found.report.fidelity.worst.sqnr < 90
    assert all(node.scheme == "fp16" for node in found.report.nodes if node.op_type == "MatMul")
    assert any("runs models on CUDAExecutionProvider" in note for note in found.report.notes)
    assert found.report.speed == [], "nothing is said of a speed that was not measured there"


@elsewhere
@pytest.mark.parametrize("scheme, least", [("int8-weights", 35), ("int4", 14), ("int2", 2)])
def test_products_in_blocks_of_half_precision(layers, model_kit, scheme, least):
    found = qgraph.optimize(layers, data=samples(model_kit), target="cuda", scheme=scheme, force=True)
    blocks = [node for node in found.model.graph if node.op_type == "MatMulNBits"]
    assert len(blocks) == 2
    assert {value.dtype for node in blocks for value in (node.inputs[0], node.inputs[2])} == {ir.DataType.FLOAT16}
    assert {node.attributes.get_int("block_size") for node in blocks} == {32}
    assert found.report.fidelity.worst.sqnr > least


@elsewhere
def test_what_overflows_stays_in_float32_with_its_reason(layers, model_kit):
    found = qgraph.optimize(layers, data=samples(model_kit, 3e4), target="cuda", scheme="fp16", force=True)
    reasons = {node.op_type: node.reason for node in found.report.refused}
    assert any("65504" in str(reason) for reason in reasons.values()), reasons
    assert found.report.fidelity.worst.sqnr > 50


@elsewhere
def test_a_node_that_is_kept_in_float_stays_so(layers, model_kit):
    named = {n.name: n for n in qgraph.optimize(layers, data=samples(model_kit), target="cuda").report.nodes}
    product = next(name for name, node in named.items() if node.op_type == "MatMulNBits")
    found = qgraph.optimize(layers, data=samples(model_kit), target="cuda", scheme="fp16", keep_float=(product,))
    kept = next(node for node in found.model.graph if node.name == product)
    assert kept.outputs[0].dtype == ir.DataType.FLOAT
    assert any(node.name == product and "option" in str(node.reason) for node in found.report.refused)


@pytest.mark.parametrize("scheme", ["int8", "int8-dynamic", "bf16", "e4m3"])
def test_what_it_has_no_kernels_for_is_refused_with_the_reason(scheme):
    with pytest.raises(OptionError, match=r"Target 'cuda' has no scheme .*(TensorRT|fp16|fused)"):
        registry.target("cuda").scheme(scheme)


def test_few_rows_want_few_bits_and_many_rows_want_halves(model_kit):
    """One row is bound by the bytes of the weights; what unpacking takes shows with many."""
    target = registry.target("cuda")
    auto = {part.name: part for part in target.scheme("auto").parts}

    def seconds(rows, scheme):
        model = model_kit.text(
            f"g (float[{rows}, 4096] x) => (float[{rows}, 4096] y) {{ y = MatMul (x, W) }}",
            W=np.zeros((4096, 4096), np.float32),
        )
        kernel = target.kernel(model.graph[0], auto[scheme])
        assert isinstance(kernel, Kernel)
        assert kernel.form is (Form.HALF if scheme == "fp16" else Form.WEIGHTS)
        return kernel.integer_seconds

    assert seconds(1, "int4") < seconds(1, "int8-weights") < seconds(1, "fp16")
    assert seconds(4096, "int4") - seconds(4096, "fp16") > seconds(1, "int4") - seconds(1, "fp16")
