"""How much is proved: the whole by default where it fits, parts in the memory of one weight, or nothing."""

import json

import click.testing
import numpy as np
import onnx_ir as ir
import pytest

import qgraph
from qgraph import checks, part_checks
from qgraph.cli import main
from qgraph.errors import AuditError, OptionError


@pytest.fixture
def saved(model_kit, tmp_path):
    """A table and two products, saved."""
    model = model_kit.text(
        """g (int64[n] ids) => (float[n, 96] y) {
        [pick] x = Gather (T, ids) [up] h = MatMul (x, A) r = Relu (h) [down] y = Gemm <transB = 1> (r, B, c) }""",
        T=model_kit.normal(200, 128),
        A=model_kit.normal(128, 160),
        B=model_kit.normal(96, 160),
        c=model_kit.normal(96),
    )
    ir.save(model, tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def test_the_whole_where_it_fits(saved, monkeypatch):
    """Weights three times over; what only the whole can tell is not asked of parts."""
    model = ir.load(saved)
    size = 4 * (200 * 128 + 128 * 160 + 96 * 160 + 96)
    for free, expected in ((3 * size, "whole"), (3 * size - 1, "parts"), (None, "whole")):
        monkeypatch.setattr(checks, "available_memory", lambda free=free: free)
        check, note = checks.chosen(model, None, None)
        assert (check, note is None) == (expected, expected == "whole")
    monkeypatch.setattr(checks, "available_memory", lambda: 0)
    assert checks.chosen(model, None, "--max-loss") == ("whole", None)
    assert checks.chosen(model, "whole", None) == ("whole", None)
    with pytest.raises(OptionError, match="--max-loss needs the whole model to be run"):
        checks.chosen(model, "none", "--max-loss")


def test_the_systems_memory():
    """More than nothing."""
    free = checks.available_memory()
    assert free is None or free > 1 << 20


@pytest.mark.usefixtures("model_free_cpu")
def test_parts(saved, tmp_path, model_kit):
    """Each weight has an error, as it is on random rows; the kernels are the runtime's; the promise is smaller."""
    report = qgraph.optimize(saved, tmp_path / "out.onnx", scheme="int4", check="parts", block_size=32).report
    assert report.check == "parts"
    assert {node.name: node.kernel for node in report.quantized} == {
        "pick": "Gather",
        "up": "MatMulNBits",
        "down": "MatMulNBits",
    }
    found = {one.node: one for one in report.sensitivity}
    assert set(found) == {"pick", "up", "down"}
    assert not any(one.exact for one in found.values())
    # 4 bits and 8 bits.
    assert 15 < -10 * np.log10(found["up"].noise) < 26
    assert 15 < -10 * np.log10(found["down"].noise) < 26
    assert 38 < -10 * np.log10(found["pick"].noise) < 55
    assert [one.noise for one in report.sensitivity] == sorted((one.noise for one in found.values()), reverse=True)
    assert report.fidelity is None
    assert not report.speed
    assert "nothing is promised about its accuracy or its speed" in report.notes[-1]
    assert "3 of its 3 quantized nodes were run by themselves" in report.notes[-1]
    feeds = [{"ids": np.arange(9) * 7}]
    assert model_kit.sqnr(ir.load(saved), ir.load(tmp_path / "out.onnx"), feeds) > 12


@pytest.mark.usefixtures("model_free_cpu")
def test_nothing(saved, tmp_path, monkeypatch):
    """No session is made, and the report says so."""
    from qgraph import session

    monkeypatch.setattr(session.Session, "__init__", lambda *_: pytest.fail("a session"))
    session.max_ir_version.cache_clear()
    monkeypatch.setattr("qgraph.job.max_ir_version", lambda: 10)
    monkeypatch.setattr("qgraph.modelio.max_ir_version", lambda: 10)
    found = click.testing.CliRunner().invoke(
        main,
        [str(a) for a in ("optimize", saved, tmp_path / "o.onnx", "--scheme", "int4", "--check", "none",
                          "--report", tmp_path / "r.json")],
        terminal_width=300,
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    assert "Nothing was checked (--check none)" in " ".join(found.output.split())
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["check"] == "none"
    assert report["sensitivity"] == []
    assert {node["kernel"] for node in report["nodes"] if node["kernel"]} == {"MatMulNBits", "Gather"}


@pytest.mark.usefixtures("model_free_cpu")
def test_a_part_that_is_wrong_is_found(saved, tmp_path, monkeypatch):
    """Codes of another weight do not pass."""
    right = part_checks.Strips

    def wrong(tensor):
        made = right(tensor)
        window = made.window
        made.window = lambda *where, **more: -window(*where, **more)
        return made

    monkeypatch.setattr(part_checks, "Strips", wrong)
    with pytest.raises(AuditError, match=r"keeps -6.* dB of what it computes in float"):
        qgraph.optimize(saved, tmp_path / "out.onnx", scheme="int4", check="parts", block_size=32)
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize("change", [{"max_loss": "1%"}, {"min_sqnr": 20.0}, {"min_cosine": 0.9}])
def test_budgets_need_the_whole(saved, change):
    """An error, and no budget that nobody holds to."""
    with pytest.raises(OptionError, match=f"--{next(iter(change)).replace('_', '-')} needs the whole model"):
        qgraph.optimize(saved, scheme="int4", check="parts", **change)


def test_an_unknown_check(saved):
    """Is named."""
    with pytest.raises(OptionError, match="'part'"):
        qgraph.optimize(saved, check="part")
