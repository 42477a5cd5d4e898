"""Networks that are compiled as a whole, and an older result that a failure must leave alone."""

import numpy as np
import onnx_ir as ir
import pytest


@pytest.fixture
def cnn(model_kit):
    """A stem, a residual block, a pool and a classifier; wide enough to pay."""
    n = model_kit.normal
    return model_kit.text(
        """g (float[1, 32, 14, 14] image) => (float[1, 10] logits) {
            c0 = Conv <pads = [1, 1, 1, 1]> (image, W0, b0)
            r0 = Relu (c0)
            c1 = Conv <pads = [1, 1, 1, 1]> (r0, W1)
            n1 = BatchNormalization (c1, s1, t1, m1, v1)
            r1 = Relu (n1)
            c2 = Conv <pads = [1, 1, 1, 1]> (r1, W2, b2)
            a = Add (c2, r0)
            r2 = Relu (a)
            p = GlobalAveragePool (r2)
            f = Flatten (p)
            logits = Gemm <transB = 1> (f, G, g0)
        }""",
        W0=n(64, 32, 3, 3, scale=0.08),
        b0=n(64, scale=0.1),
        W1=n(64, 64, 3, 3, scale=0.06),
        s1=1 + n(64, scale=0.1),
        t1=n(64, seed=1, scale=0.1),
        m1=n(64, seed=2, scale=0.1),
        v1=np.abs(n(64, seed=3)) + 0.5,
        W2=n(64, 64, 3, 3, seed=1, scale=0.06),
        b2=n(64, seed=4, scale=0.1),
        G=n(10, 64, scale=0.2),
        g0=n(10),
    )


@pytest.fixture
def mlp(model_kit):
    n = model_kit.normal
    return model_kit.text(
        """g (float[batch, 128] x) => (float[batch, 16] y) {
            h = Gemm <transB = 1> (x, W, b)
            r = Relu (h)
            k = Gemm <transB = 1> (r, V, c)
            s = Relu (k)
            y = Gemm <transB = 1> (s, U, d)
        }""",
        W=n(256, 128, scale=0.1),
        b=n(256, scale=0.1),
        V=n(256, 256, scale=0.08),
        c=n(256, scale=0.1, seed=1),
        U=n(16, 256, scale=0.1),
        d=n(16),
    )


@pytest.fixture
def standing(mlp, tmp_path):
    """A model, and an older output that a failure must leave alone."""
    ir.save(mlp, tmp_path / "in.onnx")
    (tmp_path / "out.onnx").write_bytes(b"the old one")
    return tmp_path


@pytest.fixture
def untouched():
    """Checks that a folder holds the model and the older output of `standing`, and nothing else."""

    def check(folder, names=("in.onnx", "out.onnx")):
        assert sorted(p.name for p in folder.iterdir()) == sorted(names)
        assert (folder / "out.onnx").read_bytes() == b"the old one"

    return check
