"""Learned codes that outlive an interrupted run: what goes on is what would have been, and nothing stale is used."""

import contextlib
import functools
import importlib
import json
import signal
import subprocess
import sys
import time

import numpy as np
import onnx_ir as ir
import pytest

import qgraph
from qgraph.blocks import Blocks
from qgraph.errors import DataError, ModelError
from qgraph.fingerprint import fingerprint
from qgraph.kept import Kept, contents

KEY = {"model": "m", "set of data": "d"}
STACK = """
g (float[n, 8, 192] x) => (float[n, 8, 192] y) {
    a = MatMul (x, A)
    b = Relu (a)
    c = MatMul (b, B)
    d = Add (c, x)
    e = MatMul (d, C)
    f = Relu (e)
    h = MatMul (f, D)
    y = Add (h, d)
}
"""


def blocks(seed=0, zero=True):
    rng = np.random.default_rng(seed)
    codes, scale = rng.integers(0, 16, (6, 40)), rng.random((6, 2)) + 0.1
    return Blocks.of(codes, scale, rng.integers(0, 16, (6, 2)) if zero else None, 4, 32)


def same(one, other):
    zeros = [None if b.zero_point is None else b.zero_point.tobytes() for b in (one, other)]
    assert one.codes.tobytes() == other.codes.tobytes() and one.scale.tobytes() == other.scale.tobytes()
    assert zeros[0] == zeros[1] and (one.bits, one.inner) == (other.bits, other.inner)


# -- the folder --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero", [False, True])
def test_what_is_kept_comes_back_mapped(tmp_path, zero):
    store = Kept(tmp_path / "s.codes" / "folded", KEY)
    assert not (tmp_path / "s.codes").exists() and len(store) == 0 and "one" not in store
    store["one"] = blocks(1, zero)
    told = []
    again = Kept(tmp_path / "s.codes" / "folded", KEY, told.append)
    assert told == [f"The codes of 1 weights were learned before, and taken from {str(tmp_path / 's.codes/folded')!r}."]
    for one in (store, again):
        same(one["one"], blocks(1, zero))
        assert isinstance(one["one"].codes.base, np.memmap), "in no one's memory"
    assert list(again) == ["one"] and "two" not in again
    again["two"] = blocks(1, zero)
    del again["two"]
    assert list(store) == ["one"]
    with pytest.raises(KeyError):
        del again["two"]
    again["one"] = blocks(2, zero)
    same(Kept(tmp_path / "s.codes" / "folded", KEY)["one"], blocks(2, zero))


def test_codes_of_another_key_are_an_error_that_names_what_differs(tmp_path):
    Kept(tmp_path / "c", KEY)["one"] = blocks()
    with pytest.raises(DataError, match="learned with another set of data, which are of no use here"):
        Kept(tmp_path / "c", {**KEY, "set of data": "e"})
    for text in ("{", "[]", "{}"):
        (tmp_path / "c" / "key.json").write_text(text)
        with pytest.raises(DataError, match="holds no codes that were learned"):
            Kept(tmp_path / "c", KEY)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no codes that were learned"):
        Kept(tmp_path / "empty", KEY)


@pytest.mark.parametrize("damage", ["flipped", "truncated", "gone", "entry", "bits"])
def test_a_damaged_entry_is_as_good_as_none(tmp_path, damage):
    Kept(tmp_path / "c", KEY)["one"] = blocks()
    codes, entry = tmp_path / "c" / "one" / "codes.npy", tmp_path / "c" / "one" / "blocks.json"
    raw = bytearray(codes.read_bytes())
    raw[-1] ^= 1
    if damage == "flipped":
        codes.write_bytes(raw)
    elif damage == "truncated":
        codes.write_bytes(raw[:-3])
    elif damage == "gone":
        (tmp_path / "c" / "one" / "zero_point.npy").unlink()
    elif damage == "entry":
        entry.write_text("{")
    else:
        entry.write_text(json.dumps({**json.loads(entry.read_text()), "bits": 2}))
    store = Kept(tmp_path / "c", KEY)
    assert "one" not in store
    store["one"] = blocks()
    same(Kept(tmp_path / "c", KEY)["one"], blocks())


def test_what_was_half_written_is_no_entry_and_goes(tmp_path, monkeypatch):
    store = Kept(tmp_path / "c", KEY)
    store["one"] = blocks()
    real = np.save

    def fail(file, array):
        real(file, array)
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "save", fail)
    with pytest.raises(KeyboardInterrupt):
        store["two"] = blocks()
    monkeypatch.undo()
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["key.json", "one"]
    (tmp_path / "c" / ".part-killed").mkdir()
    assert list(Kept(tmp_path / "c", KEY)) == ["one"]
    assert not (tmp_path / "c" / ".part-killed").exists()


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="Cannot keep codes"):
        Kept(tmp_path / "file" / "c", KEY)["one"] = blocks()


def test_contents_tell_every_byte(model_kit, tmp_path):
    """A fingerprint looks at the ends of a large weight, which is enough for ranges and not for codes."""
    weight = model_kit.normal(192, 192)
    other = weight.copy()
    other[96, 96] += 1
    text = "g (float[n, 192] x) => (float[n, 192] y) { y = MatMul (x, W) }"
    models = [model_kit.text(text, W=weight), model_kit.text(text, W=other)]
    assert fingerprint(models[0]) == fingerprint(models[1])
    assert contents(models[0]) != contents(models[1])
    ir.save(models[0], tmp_path / "m.onnx", external_data="m.data", size_threshold_bytes=0)
    stored = ir.load(tmp_path / "m.onnx")
    assert isinstance(stored.graph.initializers["W"].const_value, ir.ExternalTensor)
    assert contents(stored) == contents(models[0])


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def work(model_kit, tmp_path, monkeypatch):
    """A model of four layers that learn, and data."""
    monkeypatch.chdir(tmp_path)
    shapes = {"A": (192, 256), "B": (256, 192), "C": (192, 256), "D": (256, 192)}
    weights = {name: model_kit.normal(*shape, seed=ord(name), scale=0.1) for name, shape in shapes.items()}
    ir.save(model_kit.text(STACK, **weights), "m.onnx")
    mixer = np.eye(192) + np.random.default_rng(9).standard_normal((192, 192)) / 15
    np.savez("d.npz", x=(np.random.default_rng(1).standard_normal((48, 8, 192)) @ mixer).astype(np.float32))
    return tmp_path


def run(output="o.onnx", check="parts", state="s.json", data="d.npz", model="m.onnx", **more):
    options = {"scheme": "int4", "bench_seconds": 0, "force": True, "time_limit": 600, "check": check, "state": state}
    return qgraph.optimize(model, output, data=data, **{**options, **more})


def stopped(at, **more):
    """A run that is interrupted before layer `at` is solved."""

    def stop(what, done, total):
        if what.startswith("rounding blocks") and done == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(progress=stop, **more)


@pytest.fixture
def solved(monkeypatch):
    """The shapes of the weights that codes are found for."""
    module = importlib.import_module("qgraph.passes.round_blocks")
    real, seen = module.round_blocks, []

    def counted(target, *others):
        seen.append(target.shape)
        return real(target, *others)

    monkeypatch.setattr(module, "round_blocks", counted)
    return seen


def names(folder):
    return {path.name for path in folder.iterdir()}


def kept_names(work):
    return [p.name for p in (work / "s.json.codes" / "folded").iterdir() if p.is_dir()]


@pytest.mark.parametrize("check", ["parts", "none", "whole"])
@pytest.mark.usefixtures("model_free_cpu")
def test_an_interrupted_run_goes_on_to_the_same_file(work, solved, check):
    run("whole.onnx", check, state=None)
    assert len(solved) == 4
    (work / "o.onnx").write_bytes(b"stood before")
    before = names(work)
    stopped(2, check=check)
    assert (work / "o.onnx").read_bytes() == b"stood before", "nothing is written"
    assert names(work) - before <= {"s.json", "s.json.codes"}, "nothing is left but the state"
    assert len(kept_names(work)) == 2
    solved.clear()
    result = run(check=check)
    assert len(solved) == 2, "the others were learned before"
    assert any("codes of 2 weights were learned before" in note for note in result.report.notes)
    assert (work / "o.onnx").read_bytes() == (work / "whole.onnx").read_bytes()
    solved.clear()
    run("third.onnx", check)
    assert not solved
    assert (work / "third.onnx").read_bytes() == (work / "whole.onnx").read_bytes()


@pytest.mark.usefixtures("model_free_cpu")
def test_stale_codes_are_never_used(work, solved):
    stopped(2)
    before = {p: p.read_bytes() for p in sorted((work / "s.json.codes").rglob("*")) if p.is_file()}
    np.savez("other.npz", x=np.load("d.npz")["x"] * np.float32(1.5))
    shifted = ir.load("m.onnx")
    array = np.array(shifted.graph.initializers["D"].const_value.numpy())
    array[128, 96] += 1.0  # neither end of it
    shifted.graph.initializers["D"].const_value = ir.Tensor(array, name="D")
    ir.save(shifted, "shifted.onnx")
    solved.clear()
    for change, what in (
        ({"data": "other.npz"}, "set of data"),
        ({"memory": 64 << 20}, "--memory"),
        ({"model": "shifted.onnx"}, "choice of options"),
    ):
        with pytest.raises(DataError, match=f"learned with another {what}.*Name another --state"):
            run(**change)
    assert not solved and not (work / "o.onnx").exists()
    assert {p: p.read_bytes() for p in before} == before


@pytest.mark.usefixtures("model_free_cpu")
def test_other_blocks_are_another_matter(work, solved):
    """Channels are scaled for the blocks that there are."""
    run()
    solved.clear()
    with pytest.raises(DataError, match="another choice of options"):
        run("two.onnx", block_size=32)
    assert not solved and not (work / "two.onnx").exists()


@pytest.mark.usefixtures("model_free_cpu")
def test_a_damaged_weight_is_learned_anew(work, solved):
    run()
    expected = (work / "o.onnx").read_bytes()
    name = kept_names(work)[0]
    codes = work / "s.json.codes" / "folded" / name / "codes.npy"
    raw = bytearray(codes.read_bytes())
    raw[-5] ^= 255
    codes.write_bytes(raw)
    solved.clear()
    run()
    assert len(solved) == 1
    assert (work / "o.onnx").read_bytes() == expected


@pytest.mark.usefixtures("model_free_cpu")
def test_without_data_nothing_is_kept(work):
    run(data=None)
    assert sorted(names(work)) == ["d.npz", "m.onnx", "o.onnx"]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM], ids=["kill", "ctrl-c", "term"])
def test_a_process_that_ends_in_the_middle(work, model_kit, how):
    """On a model that takes its time."""
    layers = "\n".join(f"v{i + 1} = MatMul (v{i}, W{i})" for i in range(10))
    text = f"g (float[n, 8, 768] v0) => (float[n, 8, 768] v10) {{ {layers} }}"
    weights = {f"W{i}": model_kit.normal(768, 768, seed=i, scale=0.04) for i in range(10)}
    ir.save(model_kit.text(text, **weights), "b.onnx")
    np.savez("b.npz", v0=np.random.default_rng(1).standard_normal((16, 8, 768)).astype(np.float32))
    command = [sys.executable, "-c", "from qgraph.cli import main; main()", "optimize", "b.onnx", "o.onnx", "--data",
               "b.npz", "--scheme", "int4", "--check", "parts", "--state", "s.json"]  # fmt: skip
    there = names(work)
    # What is started in the background may have been told to ignore ctrl-c, and would hand that on.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=heed)
    folder = work / "s.json.codes" / "folded"
    limit = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < limit:
        with contextlib.suppress(OSError):
            if sum(p.is_dir() and not p.name.startswith(".") for p in folder.iterdir()) >= 2:
                break
        time.sleep(0.01)
    process.send_signal(how)
    output, _ = process.communicate(timeout=60)
    kept = len(Kept(folder, json.loads((folder / "key.json").read_text())))
    assert 2 <= kept < 10, output
    assert not (work / "o.onnx").exists()
    if how != signal.SIGKILL:
        assert process.returncode == 1
        said = " ".join(output.split())
        assert "nothing was written but" in said and "s.json.codes" in said and "goes on" in said, output
        assert names(work) - there == {"s.json.codes"}
    again = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"codes of {kept} weights were learned before" in " ".join(again.stdout.split())
    run("direct.onnx", model="b.onnx", data="b.npz", state=None)
    assert (work / "o.onnx").read_bytes() == (work / "direct.onnx").read_bytes()
