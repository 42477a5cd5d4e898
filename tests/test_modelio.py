import copy
import errno
import gc
import shutil
import tempfile
import weakref
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from qgraph import modelio
from qgraph.errors import ExternalDataError, ModelError
from qgraph.fingerprint import fingerprint
from qgraph.modelio import Workspace, has_external, read, size_on_disk, stage
from qgraph.session import Session, max_ir_version


def proto(opset=21, domain="", weight=None):
    """y = x + w."""
    weight = numpy_helper.from_array(np.arange(512, dtype=np.float32), "w") if weight is None else weight
    shape = list(weight.dims)
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"], name="add")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [weight],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid(domain, opset)], ir_version=8)


def external(location, offset=0, length=2048):
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[512], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        if value is not None:
            tensor.external_data.add(key=key, value=str(value))
    return tensor


def weights(model):
    return {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# -- reading -----------------------------------------------------------------------------------------------------------


def test_read(tmp_path):
    onnx.save(proto(), tmp_path / "m.onnx")
    for path in (tmp_path / "m.onnx", str(tmp_path / "m.onnx")):
        model = read(path)
        assert [node.name for node in model.graph] == ["add"]
        assert weights(model)["w"].tolist() == list(range(512))
        assert not has_external(model)
    assert size_on_disk(tmp_path / "m.onnx") == (tmp_path / "m.onnx").stat().st_size


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello, this is no model",
        b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
        b"PK\x03\x04" + bytes(100),
        bytes(1000),
        numpy_helper.from_array(np.ones(3)).SerializeToString(),
        proto().SerializeToString()[:-1000],
    ],
    ids=["empty", "text", "image", "archive", "zeros", "a tensor", "cut off"],
)
def test_what_is_no_model(tmp_path, content):
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(ModelError, match=r"m.onnx' is not (an|a readable) ONNX model: .+"):
        read(tmp_path / "m.onnx")


def test_what_is_no_file(tmp_path):
    with pytest.raises(ModelError, match="There is no model file"):
        read(tmp_path)
    with pytest.raises(ModelError, match=r"There is no model file '.*none.onnx'"):
        read(tmp_path / "none.onnx")


@pytest.mark.parametrize("domain", ["", "ai.onnx"])
def test_opsets(tmp_path, domain):
    onnx.save(proto(opset=7, domain=domain), tmp_path / "m.onnx")
    assert read(tmp_path / "m.onnx").graph.opset_imports[""] == 7
    onnx.save(proto(opset=6, domain=domain), tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="has opset 6; 7 is the oldest that can be converted"):
        read(tmp_path / "m.onnx")


def test_no_opset(tmp_path):
    model = proto(domain="com.microsoft", opset=1)
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="does not say which opset"):
        read(tmp_path / "m.onnx")
    model.graph.node[0].domain = "com.microsoft"
    onnx.save(model, tmp_path / "m.onnx")
    assert len(read(tmp_path / "m.onnx").graph) == 1


# -- external data -----------------------------------------------------------------------------------------------------


@pytest.fixture
def beside(tmp_path):
    """A folder for the model with `w.data` in it, 4096 bytes, and a like file outside."""
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for path in (folder / "w.data", folder / "sub" / "w.data", tmp_path / "w.data"):
        path.write_bytes(np.arange(1024, dtype=np.float32).tobytes())
    return folder


@pytest.mark.parametrize(
    ("location", "offset", "length", "first"),
    [("w.data", 0, 2048, 0), ("w.data", 2048, 2048, 512), ("w.data", None, None, 0), ("sub/w.data", 0, 2048, 0)],
)
def test_external_data(beside, location, offset, length, first):
    onnx.save(proto(weight=external(location, offset, length)), beside / "m.onnx")
    model = read(beside / "m.onnx")
    assert has_external(model)
    assert weights(model)["w"].tolist() == list(range(first, first + 512))
    assert size_on_disk(beside / "m.onnx") == (beside / "m.onnx").stat().st_size + 4096


@pytest.mark.parametrize("location", ["../w.data", "sub/../../w.data", "absolute", "absolute inside", "link"])
def test_external_data_outside_the_folder(beside, location):
    if location.startswith("absolute"):
        location = str((beside if location.endswith("inside") else beside.parent) / "w.data")
    if location == "link":
        (beside / "link").symlink_to(beside.parent / "w.data")
    onnx.save(proto(weight=external(location)), beside / "m.onnx")
    with pytest.raises(ExternalDataError, match=r"Weight 'w' points to '.*', outside the model's folder"):
        read(beside / "m.onnx")


def test_external_data_that_is_missing(beside):
    onnx.save(proto(weight=external("none.data")), beside / "m.onnx")
    with pytest.raises(ExternalDataError, match=r"Weight 'w' is in 'none\.data', which is not beside the model"):
        read(beside / "m.onnx")


@pytest.mark.parametrize(("offset", "length", "need"), [(0, 2048, 2048), (1024, 2048, 3072), (0, None, 2048)])
def test_external_data_that_is_truncated(beside, offset, length, need):
    onnx.save(proto(weight=external("w.data", offset, length)), beside / "m.onnx")
    (beside / "w.data").write_bytes(bytes(need))
    read(beside / "m.onnx")
    (beside / "w.data").write_bytes(bytes(need - 1))
    with pytest.raises(ExternalDataError, match=rf"needs {need} bytes of 'w\.data', which has only {need - 1}"):
        read(beside / "m.onnx")


# -- fingerprint -------------------------------------------------------------------------------------------------------


def test_the_fingerprint_is_of_the_model_and_not_of_its_file(tiny_chain, tmp_path):
    expected = fingerprint(tiny_chain(width=512))
    assert len(expected) == 64
    assert fingerprint(tiny_chain(width=512)) == expected
    assert fingerprint(tiny_chain(width=512).clone()) == expected
    for data in (None, "m.data"):
        ir.save(tiny_chain(width=512), tmp_path / "m.onnx", external_data=data, size_threshold_bytes=10)
        assert fingerprint(read(tmp_path / "m.onnx")) == expected


def rename(model):
    model.graph[1].outputs[0].name = "another"


def rename_input(model):
    model.graph.inputs[0].name = "another"


def another_operator(model):
    model.graph[2].op_type = "Abs"


def another_domain(model):
    model.graph[2].domain = "com.microsoft"


def another_attribute(model):
    model.graph[2].attributes.add(ir.AttrInt64("axis", 1))


def another_weight(model):
    tensor = model.graph.initializers["w"].const_value.numpy().copy()
    tensor[-1] += 1e-6
    model.graph.initializers["w"].const_value = ir.tensor(tensor, name="w")


def another_type(model):
    tensor = model.graph.initializers["w"].const_value.numpy()
    model.graph.initializers["w"].const_value = ir.tensor(tensor.view(np.int32), name="w")


def another_shape(model):
    tensor = model.graph.initializers["w"].const_value.numpy()
    model.graph.initializers["w"].const_value = ir.tensor(tensor.reshape(1, -1), name="w")


def another_order_of_inputs(model):
    node = model.graph[0]
    first, second = node.inputs
    node.replace_input_with(0, second)
    node.replace_input_with(1, first)


CHANGES = [
    rename,
    rename_input,
    another_operator,
    another_domain,
    another_attribute,
    another_weight,
    another_type,
    another_shape,
    another_order_of_inputs,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("width", [4, 1 << 15], ids=["small", "large"])
def test_the_fingerprint_tells_models_apart(tiny_chain, change, width):
    model = tiny_chain(width=width, weight=1.0)
    before = fingerprint(model)
    change(model)
    assert fingerprint(model) != before


@pytest.mark.parametrize("inside", [False, True])
def test_constants_and_bodies_count(inside):
    """Exporters write weights as Constant nodes, too."""

    def model(constant, where="cond"):
        body = [
            helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.float32([constant]))),
            helper.make_node("Add", ["x", "c"], ["sum"]),
        ]
        info = helper.make_tensor_value_info
        if inside:
            branch = helper.make_graph(body, "body", [], [info("sum", TensorProto.FLOAT, [1])])
            body = [helper.make_node("If", ["cond"], ["sum"], then_branch=branch, else_branch=copy.deepcopy(branch))]
        inputs = [info("x", TensorProto.FLOAT, [1]), info("cond", TensorProto.BOOL, [])]
        return ir.from_proto(
            helper.make_model(helper.make_graph(body, "g", inputs, [info("sum", TensorProto.FLOAT, [1])]))
        )

    assert fingerprint(model(1.0)) == fingerprint(model(1.0))
    assert fingerprint(model(1.0)) != fingerprint(model(2.0))


# -- the workspace -----------------------------------------------------------------------------------------------------


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


def test_small_models_stay_in_memory(tiny_chain, tmp_path):
    model = tiny_chain(width=512)
    with Workspace(tmp_path / "out.onnx") as workspace:
        assert workspace.spill(model) is None
        assert not has_external(model)
        assert files(tmp_path) == {}


def run(model, folder=None, width=512):
    with Session(model, folder=folder) as session:
        return session.run({"x": np.linspace(-1, 1, width, dtype=np.float32)[None]})["y"]


def test_spilled_weights_lie_in_one_file_that_all_copies_share(tiny_chain, tmp_path, monkeypatch):
    monkeypatch.setattr(modelio, "_SPILL_BYTES", 1000)
    model = tiny_chain(width=512)
    expected = weights(tiny_chain(width=512))
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


def test_weights_that_lie_in_one_folder_stay_there(tiny_chain, tmp_path, monkeypatch):
    monkeypatch.setattr(modelio, "_SPILL_BYTES", 1)
    ir.save(tiny_chain(width=512), tmp_path / "m.onnx", external_data="m.data", size_threshold_bytes=10)
    model = read(tmp_path / "m.onnx")
    # Some more in memory is no reason to copy the rest.
    model.graph.initializers["c"].const_value = ir.tensor(weights(model)["c"].copy(), name="c")
    with Workspace() as workspace:
        assert workspace.spill(model) == tmp_path
        assert list(workspace.folder.iterdir()) == []


def test_weights_of_several_folders_are_brought_together(tiny_chain, tmp_path):
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


# -- writing -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def destination(tmp_path):
    """A path whose folder holds nothing else."""
    (tmp_path / "results").mkdir()
    return tmp_path / "results" / "out.onnx"


def test_a_staged_model_is_whole_but_not_in_place(tiny_chain, destination):
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
def test_weights_go_to_a_file_of_their_own(tiny_chain, destination, monkeypatch, why):
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
def test_nothing_refers_to_the_workspace(tiny_chain, destination, monkeypatch, as_external):
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
def test_the_data_takes_a_name_that_is_not_to_be_replaced(tiny_chain, destination, avoid, name):
    for one in avoid:
        (destination.parent / one).write_text("precious")
    with Workspace(destination) as workspace:
        stage(
            tiny_chain(width=512), destination, workspace, True, {(destination.parent / one).resolve() for one in avoid}
        ).commit()
    assert set(files(destination.parent)) == {"out.onnx", name, *avoid}
    assert all((destination.parent / one).read_text() == "precious" for one in avoid)
    np.testing.assert_array_equal(run(destination), run(tiny_chain(width=512)))


def test_external_files_are_all_that_a_model_names(beside):
    onnx.save(proto(weight=external("sub/w.data")), beside / "m.onnx")
    assert modelio.external_files(read(beside / "m.onnx")) == {(beside / "sub" / "w.data").resolve()}
    onnx.save(proto(), beside / "n.onnx")
    assert modelio.external_files(read(beside / "n.onnx")) == set()


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
def test_the_same_model_gives_the_same_bytes(tiny_chain, destination, as_external):
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


def test_lazy_weights_are_evaluated_one_at_a_time(tiny_chain, destination):
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


@pytest.mark.parametrize("existing", [(), ("out.onnx",), ("out.onnx", "out.onnx.data")])
def test_a_result_replaces_the_old_one_with_no_trace(tiny_chain, destination, existing):
    for name in existing:
        (destination.parent / name).write_text("old")
    with Workspace(destination) as workspace:
        stage(tiny_chain(width=512), destination, workspace, external=True).commit()
    assert set(files(destination.parent)) == {"out.onnx", "out.onnx.data"}
    np.testing.assert_array_equal(run(destination), run(tiny_chain(width=512)))


def test_the_data_is_in_place_before_the_model(tiny_chain, destination, monkeypatch):
    replace, seen = Path.replace, []

    def watching(self, target):
        seen.append(Path(target).name)
        return replace(self, target)

    with Workspace(destination) as workspace:
        staged = stage(tiny_chain(width=512), destination, workspace, external=True)
        monkeypatch.setattr(Path, "replace", watching)
        staged.commit()
    assert seen == ["out.onnx.data", "out.onnx"]


@pytest.mark.parametrize("existing", [(), ("out.onnx",), ("out.onnx", "out.onnx.data")])
@pytest.mark.parametrize("as_external", [False, True])
def test_when_moving_fails_the_old_files_stand(tiny_chain, destination, monkeypatch, existing, as_external):
    """Whichever of the moves it is that fails."""
    for name in existing:
        (destination.parent / name).write_text("old " + name)
    before, replace, failures = files(destination.parent), Path.replace, 0
    for fail_at in range(1, 10):
        count = 0

        def failing(self, target, fail_at=fail_at):
            nonlocal count
            count += 1
            if count == fail_at:
                raise OSError(errno.ENOSPC, "No space left on device")
            return replace(self, target)

        with Workspace(destination) as workspace:
            staged = stage(tiny_chain(width=512), destination, workspace, as_external)
            monkeypatch.setattr(Path, "replace", failing)
            try:
                staged.commit()
            except ModelError as error:
                failures += 1
                assert "out.onnx': No space left on device" in str(error)
                assert {k: v for k, v in files(destination.parent).items() if not k.startswith(".")} == before
            else:
                break
            finally:
                monkeypatch.setattr(Path, "replace", replace)
        assert files(destination.parent) == before
    moved = ["out.onnx.data", "out.onnx"] if as_external else ["out.onnx"]
    assert failures == len(moved) + len(set(moved) & set(existing))


@pytest.mark.parametrize("fail_at", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", [KeyboardInterrupt, MemoryError, ZeroDivisionError])
def test_any_exception_while_moving_leaves_the_old_files(tiny_chain, destination, monkeypatch, fail_at, kind):
    for name in ("out.onnx", "out.onnx.data"):
        (destination.parent / name).write_text("old " + name)
    before, replace, count = files(destination.parent), Path.replace, 0

    def failing(self, target):
        nonlocal count
        count += 1
        if count == fail_at:
            raise kind
        return replace(self, target)

    with Workspace(destination) as workspace:
        staged = stage(tiny_chain(width=512), destination, workspace, True)
        monkeypatch.setattr(Path, "replace", failing)
        with pytest.raises(kind):
            staged.commit()
        monkeypatch.setattr(Path, "replace", replace)
    assert files(destination.parent) == before


def test_a_folder_in_the_way(tiny_chain, destination):
    (destination.parent / "out.onnx.data").mkdir()
    with Workspace(destination) as workspace:
        staged = stage(tiny_chain(width=512), destination, workspace, external=True)
        with pytest.raises(ModelError, match="Is a directory"):
            staged.commit()
    assert files(destination.parent) == {}


@pytest.mark.skipif(not hasattr(Path, "symlink_to"), reason="links")
def test_a_link_is_replaced_and_not_followed(tiny_chain, destination, tmp_path):
    (tmp_path / "elsewhere.onnx").write_text("precious")
    destination.symlink_to(tmp_path / "elsewhere.onnx")
    with Workspace(destination) as workspace:
        stage(tiny_chain(width=512), destination, workspace).commit()
    assert (tmp_path / "elsewhere.onnx").read_text() == "precious"
    assert not destination.is_symlink()
    read(destination)


def test_when_writing_fails_the_old_file_stands(tiny_chain, destination, monkeypatch):
    destination.write_text("old")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ir, "save", full)
    with Workspace(destination) as workspace, pytest.raises(ModelError, match=r"out.onnx': No space left on device"):
        stage(tiny_chain(width=512), destination, workspace)
    assert files(destination.parent) == {"out.onnx": b"old"}


def test_a_workspace_that_is_already_gone_can_be_closed():
    workspace = Workspace()
    shutil.rmtree(workspace.folder)
    workspace.close()


def test_small_external_weights_that_someone_looks_at(tmp_path):
    """They go into the model's own file, which must not fail on a view that is still held."""
    model = proto(weight=numpy_helper.from_array(np.arange(8, dtype=np.float32), "w"))
    onnx.save_model(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    for given in (read(tmp_path / "m.onnx"), modelio.copied(ir.load(tmp_path / "m.onnx"))):
        view = given.graph.initializers["w"].const_value.numpy()
        with Workspace(tmp_path / "out.onnx") as workspace:
            stage(given, tmp_path / "out.onnx", workspace, external=True).commit()
        assert weights(read(tmp_path / "out.onnx"))["w"].tolist() == view.tolist() == list(range(8))
