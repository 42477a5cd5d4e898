"""Reading models: what is one, its opsets, and external data that is where it should be."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from qgraph import modelio
from qgraph.errors import ExternalDataError, ModelError
from qgraph.modelio import has_external, read, size_on_disk


def external(location, offset=0, length=2048):
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[512], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        if value is not None:
            tensor.external_data.add(key=key, value=str(value))
    return tensor


def test_read(proto, model_kit, tmp_path):
    onnx.save(proto(), tmp_path / "m.onnx")
    for path in (tmp_path / "m.onnx", str(tmp_path / "m.onnx")):
        model = read(path)
        assert [node.name for node in model.graph] == ["add"]
        assert model_kit.tensors(model)["w"].tolist() == list(range(512))
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
        None,
    ],
    ids=["empty", "text", "image", "archive", "zeros", "a tensor", "cut off"],
)
def test_what_is_no_model(proto, tmp_path, content):
    (tmp_path / "m.onnx").write_bytes(proto().SerializeToString()[:-1000] if content is None else content)
    with pytest.raises(ModelError, match=r"m.onnx' is not (an|a readable) ONNX model: .+"):
        read(tmp_path / "m.onnx")


def test_what_is_no_file(tmp_path):
    with pytest.raises(ModelError, match="There is no model file"):
        read(tmp_path)
    with pytest.raises(ModelError, match=r"There is no model file '.*none.onnx'"):
        read(tmp_path / "none.onnx")


@pytest.mark.parametrize("domain", ["", "ai.onnx"])
def test_opsets(proto, tmp_path, domain):
    onnx.save(proto(opset=7, domain=domain), tmp_path / "m.onnx")
    assert read(tmp_path / "m.onnx").graph.opset_imports[""] == 7
    onnx.save(proto(opset=6, domain=domain), tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="has opset 6; 7 is the oldest that can be converted"):
        read(tmp_path / "m.onnx")


def test_no_opset(proto, tmp_path):
    model = proto(domain="com.microsoft", opset=1)
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="does not say which opset"):
        read(tmp_path / "m.onnx")
    model.graph.node[0].domain = "com.microsoft"
    onnx.save(model, tmp_path / "m.onnx")
    assert len(read(tmp_path / "m.onnx").graph) == 1


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
def test_external_data(proto, model_kit, beside, location, offset, length, first):
    onnx.save(proto(weight=external(location, offset, length)), beside / "m.onnx")
    model = read(beside / "m.onnx")
    assert has_external(model)
    assert model_kit.tensors(model)["w"].tolist() == list(range(first, first + 512))
    assert size_on_disk(beside / "m.onnx") == (beside / "m.onnx").stat().st_size + 4096


@pytest.mark.parametrize("location", ["../w.data", "sub/../../w.data", "absolute", "absolute inside", "link"])
def test_external_data_outside_the_folder(proto, beside, location):
    if location.startswith("absolute"):
        location = str((beside if location.endswith("inside") else beside.parent) / "w.data")
    if location == "link":
        (beside / "link").symlink_to(beside.parent / "w.data")
    onnx.save(proto(weight=external(location)), beside / "m.onnx")
    with pytest.raises(ExternalDataError, match=r"Weight 'w' points to '.*', outside the model's folder"):
        read(beside / "m.onnx")


def test_external_data_that_is_missing(proto, beside):
    onnx.save(proto(weight=external("none.data")), beside / "m.onnx")
    with pytest.raises(ExternalDataError, match=r"Weight 'w' is in 'none\.data', which is not beside the model"):
        read(beside / "m.onnx")


@pytest.mark.parametrize(("offset", "length", "need"), [(0, 2048, 2048), (1024, 2048, 3072), (0, None, 2048)])
def test_external_data_that_is_truncated(proto, beside, offset, length, need):
    onnx.save(proto(weight=external("w.data", offset, length)), beside / "m.onnx")
    (beside / "w.data").write_bytes(bytes(need))
    read(beside / "m.onnx")
    (beside / "w.data").write_bytes(bytes(need - 1))
    with pytest.raises(ExternalDataError, match=rf"needs {need} bytes of 'w\.data', which has only {need - 1}"):
        read(beside / "m.onnx")


def test_external_files_are_all_that_a_model_names(proto, beside):
    onnx.save(proto(weight=external("sub/w.data")), beside / "m.onnx")
    assert modelio.external_files(read(beside / "m.onnx")) == {(beside / "sub" / "w.data").resolve()}
    onnx.save(proto(), beside / "n.onnx")
    assert modelio.external_files(read(beside / "n.onnx")) == set()
