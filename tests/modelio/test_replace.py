"""Moving into place: a result replaces the old one with no trace, and when that fails the old files stand."""

import errno
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qgraph.errors import ModelError
from qgraph.modelio import Workspace, read, stage


@pytest.mark.parametrize("existing", [(), ("out.onnx",), ("out.onnx", "out.onnx.data")])
def test_a_result_replaces_the_old_one_with_no_trace(run, files, tiny_chain, destination, existing):
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
def test_when_moving_fails_the_old_files_stand(files, tiny_chain, destination, monkeypatch, existing, as_external):
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
def test_any_exception_while_moving_leaves_the_old_files(files, tiny_chain, destination, monkeypatch, fail_at, kind):
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


def test_a_folder_in_the_way(files, tiny_chain, destination):
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


def test_when_writing_fails_the_old_file_stands(files, tiny_chain, destination, monkeypatch):
    destination.write_text("old")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ir, "save", full)
    with Workspace(destination) as workspace, pytest.raises(ModelError, match=r"out.onnx': No space left on device"):
        stage(tiny_chain(width=512), destination, workspace)
    assert files(destination.parent) == {"out.onnx": b"old"}
