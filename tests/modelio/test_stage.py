"""Staging: the whole model is written beside its place, lazily, and is the same bytes again."""

import weakref

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qgraph import modelio
from qgraph.fingerprint import fingerprint
from qgraph.modelio import Workspace, has_external, read, size_on_disk, stage
from qgraph.session import Session, max_ir_version


def test_a_staged_model_is_whole_but_not_in_place(run, files, tiny_chain, destination):
    with Workspace(destination) as workspace:
        staged = stage(tiny_chain(width=512), destination, workspace)
        assert not destination.exists()
        np.testing.assert_array_equal(run(staged.path), run(tiny_chain(width=512)))
        assert staged.nbytes == staged.path.stat().st_size
        staged.commit()
    assert set(files(destination.parent)) == {"out.onnx"}
    np.testing.assert_array_equal(run(destination), run(tiny_chain(width=512)))
    assert fingerprint(read(destination)) == fingerprint(tiny_chain(width=512))


@pytest.mark.parametrize("why", ["asked", "large"])
def test_weights_go_to_a_file_of_their_own(run, files, tiny_chain, destination, monkeypatch, why):
    if why == "large":
        monkeypatch.setattr(modelio, "_INLINE_BYTES", 1000)
    with Workspace(destination) as workspace:
        staged = stage(tiny_chain(width=512), destination, workspace, external=why == "asked")
        assert staged.nbytes == size_on_disk(staged.path) > 4096
        np.testing.assert_array_equal(run(staged.path), run(tiny_chain(width=512)))
        staged.commit()
    written = files(destination.parent)
    assert set(written) == {"out.onnx", "out.onnx.data"}
    assert len(written["out.onnx"]) < 1000
    assert has_external(read(destination))
    np.testing.assert_array_equal(run(destination), run(tiny_chain(width=512)))


@pytest.mark.parametrize("as_external", [False, True])
def test_nothing_refers_to_the_workspace(run, files, tiny_chain, destination, monkeypatch, as_external):
    monkeypatch.setattr(modelio, "_SPILL_BYTES", 1000)
    model = tiny_chain(width=512)
    with Workspace(destination) as workspace:
        workspace.spill(model)
        stage(model, destination, workspace, as_external).commit()
    assert set(files(destination.parent)) == ({"out.onnx", "out.onnx.data"} if as_external else {"out.onnx"})
    np.testing.assert_array_equal(run(destination), run(tiny_chain(width=512)))


@pytest.mark.parametrize(
    "avoid, name",
    [
        ((), "out.onnx.data"),
        (("other.data",), "out.onnx.data"),
        (("out.onnx.data",), "out.onnx.1.data"),
        (("out.onnx.data", "out.onnx.1.data"), "out.onnx.2.data"),
    ],
)
def test_the_data_takes_a_name_that_is_not_to_be_replaced(run, files, tiny_chain, destination, avoid, name):
    for one in avoid:
        (destination.parent / one).write_text("precious")
    with Workspace(destination) as workspace:
        stage(
            tiny_chain(width=512), destination, workspace, True, {(destination.parent / one).resolve() for one in avoid}
        ).commit()
    assert set(files(destination.parent)) == {"out.onnx", name, *avoid}
    assert all((destination.parent / one).read_text() == "precious" for one in avoid)
    np.testing.assert_array_equal(run(destination), run(tiny_chain(width=512)))


@pytest.mark.parametrize("spilled", [False, True])
@pytest.mark.parametrize("as_external", [False, True])
def test_staging_does_not_change_the_model(tiny_chain, destination, monkeypatch, as_external, spilled):
    monkeypatch.setattr(modelio, "_SPILL_BYTES", 1000 if spilled else 1 << 20)
    model = tiny_chain(width=512)
    with Workspace(destination) as workspace:
        workspace.spill(model)
        tensors = {name: value.const_value for name, value in model.graph.initializers.items()}
        before = ir.to_proto(model).SerializeToString()
        stage(model, destination, workspace, as_external)
        assert ir.to_proto(model).SerializeToString() == before
        assert all(model.graph.initializers[name].const_value is tensor for name, tensor in tensors.items())


@pytest.mark.parametrize("as_external", [False, True])
def test_the_same_model_gives_the_same_bytes(files, tiny_chain, destination, as_external):
    found = []
    for _ in range(2):
        with Workspace(destination) as workspace:
            stage(tiny_chain(width=512), destination, workspace, as_external).commit()
        found.append(files(destination.parent))
    assert found[0] == found[1]


def test_the_ir_version_is_one_that_the_runtime_reads(tiny_chain, destination):
    for version, expected in ((99, max_ir_version()), (8, 8)):
        model = tiny_chain()
        model.ir_version = version
        with Workspace(destination) as workspace:
            stage(model, destination, workspace).commit()
        assert onnx.load(destination).ir_version == expected
        with Session(destination):
            pass


def test_lazy_weights_are_evaluated_one_at_a_time(run, tiny_chain, destination):
    model, alive, most = tiny_chain(width=512), [], []

    def lazily(name, tensor):
        def evaluate():
            array = tensor.numpy().copy()
            alive.append(weakref.ref(array))
            most.append(sum(ref() is not None for ref in alive))
            return ir.tensor(array, name=name)

        return ir.LazyTensor(evaluate, tensor.dtype, ir.Shape(tensor.shape), name=name)

    for name, value in model.graph.initializers.items():
        value.const_value = lazily(name, value.const_value)
    steps = []
    with Workspace(destination) as workspace:
        stage(model, destination, workspace, external=True, progress=lambda *s: steps.append(s)).commit()
    assert len(alive) == 2 and max(most) == 1
    assert steps == [(1, 2), (2, 2)]
    np.testing.assert_array_equal(run(destination), run(tiny_chain(width=512)))
