"""Old opsets: raised with the meaning that their operators had, or refused with what to do."""

import numpy as np
import onnx_ir as ir
import pytest

import qgraph
from qgraph.errors import ModelError

pytestmark = pytest.mark.usefixtures("model_free_cpu")


@pytest.mark.parametrize("opset", [7, 8, 9, 10, 11, 12, 13, 15, 17, 18])
def test_old_opsets_are_raised_with_their_meaning(model_kit, kernels, compiled, opset):
    # Softmax without an axis flattened to two dimensions before opset 13, BatchNormalization had `spatial` before 9.
    n = model_kit.normal
    model = model_kit.text(
        """g (float[1, 3, 8, 8] x) => (float[1, 4, 8, 8] y) {
            c = Conv <pads = [1, 1, 1, 1]> (x, W)
            b = BatchNormalization (c, s, t, m, v)
            r = Relu (b)
            y = Softmax (r)
        }""",
        opset=opset,
        W=n(4, 3, 3, 3),
        s=1 + 0.1 * n(4),
        t=n(4, seed=1),
        m=n(4, seed=2),
        v=np.abs(n(4, seed=3)) + 0.5,
    )
    result = compiled(model, least=15)
    assert "QLinearConv" in kernels(result).values()
    assert not any(node.op_type == "BatchNormalization" for node in result.report.nodes)


def test_opset_6_is_an_error_that_says_what_to_do(model_kit, tmp_path):
    model = model_kit.text("g (float[1, 4] x) => (float[1, 4] y) { y = Relu (x) }", opset=6)
    ir.save(model, tmp_path / "in.onnx")
    with pytest.raises(ModelError, match="opset 6"):
        qgraph.optimize(tmp_path / "in.onnx", tmp_path / "out.onnx", data=[])


def test_old_form_of_gemm_broadcast_dropout_and_upsample(model_kit, kernels, compiled):
    n = model_kit.normal
    model = model_kit.text(
        """g (float[1, 3, 8, 8] x) => (float[1, 5] y) {
            c = Conv <pads = [1, 1, 1, 1]> (x, W)
            u = Upsample <mode = "nearest"> (c, k)
            d = Dropout <ratio = 0.5> (u)
            p = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (d)
            f = Flatten (p)
            y = Gemm <transB = 1> (f, G, b)
        }""",
        opset=9,
        W=n(4, 3, 3, 3),
        k=np.array([1, 1, 2, 2], np.float32),
        G=n(5, 256, scale=0.1),
        b=n(5),
    )
    assert {"QLinearConv", "QGemm"} <= set(kernels(compiled(model)).values())
