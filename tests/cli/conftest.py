"""A folder to call the command line in, and what is left there."""

import numpy as np
import onnx_ir as ir
import pytest


@pytest.fixture
def work(model_kit, tmp_path, monkeypatch):
    """A folder with a model, its data, and other data that is wrong in one way each; it is the current folder."""
    n = model_kit.normal
    model = model_kit.text(
        """g (float[batch, 16] image) => (float[batch, 4] logits) {
            h = Gemm <transB = 1> (image, W, b)
            r = Relu (h)
            logits = Gemm <transB = 1> (r, V)
        }""",
        W=n(16, 16),
        b=n(16),
        V=n(4, 16),
    )
    for node in model.graph:
        node.name = f"/net/{node.outputs[0].name}"
    monkeypatch.chdir(tmp_path)
    ir.save(model, "m.onnx")
    good = n(12, 16, seed=1)
    np.savez("data.npz", image=good)
    np.save("data.npy", good)
    np.savez("nan.npz", image=np.where(np.arange(16) == 3, np.nan, good))
    np.savez("inf.npz", image=np.where(np.arange(16) == 3, np.inf, good))
    np.savez("named.npz", imag=good)
    np.savez("shape.npz", image=good[:, :5])
    np.savez("type.npz", image=good.astype(np.int64))
    np.savez("none.npz", image=good[:0])
    (tmp_path / "text.onnx").write_text("this is no model")
    (tmp_path / "empty.onnx").write_bytes(b"")
    (tmp_path / "text.npz").write_text("this is no data")
    (tmp_path / "void").mkdir()
    tiny = model_kit.text("g (float[2, 16] image) => (float[2, 16] y) { y = Relu (image) }")
    ir.save(tiny, "relu.onnx")
    return tmp_path


@pytest.fixture
def listing():
    """Gives all that a folder holds: contents by path, None for folders."""
    return lambda folder: {p.relative_to(folder): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}
