"""The workspace beside the result: weights spilled to it, shared by copies, gone with its last reference."""

import errno
import gc
import shutil
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from qgraph import modelio
from qgraph.errors import ModelError
from qgraph.modelio import Workspace, has_external, read, stage
from qgraph.session import Session


def test_a_workspace_lies_beside_the_result_and_goes_away(tmp_path):
    with Workspace(tmp_path / "out.onnx") as workspace:
        assert workspace.folder.parent == tmp_path
        assert workspace.folder.is_dir()
        (workspace.folder / "file").write_text("x")
    assert list(tmp_path.iterdir()) == []
    with Workspace() as workspace:
        assert workspace.folder.parent == Path(tempfile.gettempdir())
    assert not workspace.folder.exists()


def test_places_where_nothing_can_be_written(tmp_path, monkeypatch):
    with pytest.raises(ModelError, match=r"The folder '.*none' does not exist"):
        Workspace(tmp_path / "none" / "out.onnx")
    with pytest.raises(ModelError, match="is a folder; name a file"):
        Workspace(tmp_path)

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    with pytest.raises(ModelError, match=r"Cannot write in '.*': Permission denied"):
        Workspace(tmp_path / "out.onnx")


def test_a_workspace_goes_with_its_last_reference(tmp_path):
    workspace = Workspace(tmp_path / "out.onnx")
    (workspace.folder / "file").write_text("x")
    del workspace
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_small_models_stay_in_memory(files, tiny_chain, tmp_path):
    model = tiny_chain(width=512)
    with Workspace(tmp_path / "out.onnx") as workspace:
        assert workspace.spill(model) is None
        assert not has_external(model)
        assert files(tmp_path) == {}


def test_spilled_weights_lie_in_one_file_that_all_copies_share(
    model_kit, run, files, tiny_chain, tmp_path, monkeypatch
):
    monkeypatch.setattr(modelio, "_SPILL_BYTES", 1000)
    model = tiny_chain(width=512)
    expected = model_kit.tensors(tiny_chain(width=512))
    with Workspace(tmp_path / "out.onnx") as workspace:
        folder = workspace.spill(model)
        assert folder is not None and folder.is_relative_to(workspace.folder)
        tensors = {name: value.const_value for name, value in model.graph.initializers.items()}
        assert all(isinstance(tensor, ir.ExternalTensor) for tensor in tensors.values())
        assert {Path(tensor.path) for tensor in tensors.values()} == {folder / "weights.data"}
        copied = model.clone()
        for name, value in copied.graph.initializers.items():
            assert value.const_value is tensors[name]
            np.testing.assert_array_equal(value.const_value.numpy(), expected[name])
        assert len(ir.to_proto(copied).SerializeToString()) < 1000
        # What is spilled is not spilled again.
        before = set(files(tmp_path))
        assert workspace.spill(copied) == folder and set(files(tmp_path)) == before
        np.testing.assert_array_equal(run(copied, folder), run(tiny_chain(width=512)))


def test_weights_that_lie_in_one_folder_stay_there(model_kit, tiny_chain, tmp_path, monkeypatch):
    monkeypatch.setattr(modelio, "_SPILL_BYTES", 1)
    ir.save(tiny_chain(width=512), tmp_path / "m.onnx", external_data="m.data", size_threshold_bytes=10)
    model = read(tmp_path / "m.onnx")
    # Some more in memory is no reason to copy the rest.
    model.graph.initializers["c"].const_value = ir.tensor(model_kit.tensors(model)["c"].copy(), name="c")
    with Workspace() as workspace:
        assert workspace.spill(model) == tmp_path
        assert list(workspace.folder.iterdir()) == []


def test_weights_of_several_folders_are_brought_together(run, tiny_chain, tmp_path):
    model = tiny_chain(width=512)
    for name in ("w", "c"):
        (tmp_path / name).mkdir()
        ir.save(tiny_chain(width=512), tmp_path / name / "m.onnx", external_data="m.data", size_threshold_bytes=10)
        model.graph.initializers[name].const_value = (
            read(tmp_path / name / "m.onnx").graph.initializers[name].const_value
        )
    with Workspace() as workspace:
        folder = workspace.spill(model)
        assert folder is not None and folder.is_relative_to(workspace.folder)
        np.testing.assert_array_equal(run(model, folder), run(tiny_chain(width=512)))


def test_weights_inside_bodies_are_spilled(monkeypatch):
    monkeypatch.setattr(modelio, "_SPILL_BYTES", 1000)
    info = helper.make_tensor_value_info
    branches = {}
    for number, name in enumerate(("then_branch", "else_branch")):
        weight = numpy_helper.from_array(np.full(512, number + 1, np.float32), f"w{number}")
        node = helper.make_node("Mul", ["x", f"w{number}"], [f"product{number}"])
        output = [info(f"product{number}", TensorProto.FLOAT, [512])]
        branches[name] = helper.make_graph([node], name, [], output, [weight])
    inputs = [info("x", TensorProto.FLOAT, [512]), info("cond", TensorProto.BOOL, [])]
    graph = helper.make_graph(
        [helper.make_node("If", ["cond"], ["y"], **branches)], "g", inputs, [info("y", TensorProto.FLOAT, [512])]
    )
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=8))
    with Workspace() as workspace:
        folder = workspace.spill(model)
        assert has_external(model)
        with Session(model, folder=folder) as session:
            for condition, expected in ((True, 1.0), (False, 2.0)):
                feeds = {"x": np.ones(512, np.float32), "cond": np.array(condition)}
                assert session.run(feeds)["y"].tolist() == [expected] * 512


def test_a_workspace_that_is_already_gone_can_be_closed():
    workspace = Workspace()
    shutil.rmtree(workspace.folder)
    workspace.close()


def test_small_external_weights_that_someone_looks_at(proto, model_kit, tmp_path):
    """They go into the model's own file, which must not fail on a view that is still held."""
    model = proto(weight=numpy_helper.from_array(np.arange(8, dtype=np.float32), "w"))
    onnx.save_model(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    for given in (read(tmp_path / "m.onnx"), modelio.copied(ir.load(tmp_path / "m.onnx"))):
        view = given.graph.initializers["w"].const_value.numpy()
        with Workspace(tmp_path / "out.onnx") as workspace:
            stage(given, tmp_path / "out.onnx", workspace, external=True).commit()
        assert model_kit.tensors(read(tmp_path / "out.onnx"))["w"].tolist() == view.tolist() == list(range(8))
