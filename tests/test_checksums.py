"""A report names every file of what was written, by checksum, and travels with just these."""

import dataclasses
import hashlib
import json
import tracemalloc

import numpy as np
import onnx_ir as ir
import pytest

import qgraph
from qgraph import fingerprint, html
from qgraph.deploy import reports
from qgraph.errors import ExternalDataError, OptionError
from qgraph.report import Report, WrittenFile

TEXT = "net (float[1, 64] x) => (float[1, 64] y) { a = MatMul(x, v) r = Relu(a) y = MatMul(r, w) }"


def stored(kit, path, data="m.data", size=64):
    """A model on disk, its weights in a file beside it."""
    text = TEXT.replace("64", str(size))
    model = kit.text(text, v=kit.normal(size, size), w=kit.normal(size, size, seed=1))
    ir.save(model, path, external_data=data, size_threshold_bytes=0)
    return path


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def told(model_kit, tmp_path):
    """(model with external data, its report as JSON, the same as a page), in one folder."""
    model = stored(model_kit, tmp_path / "m.onnx")
    files = fingerprint.of_files(model)
    report = Report("in.onnx", "x86", "int8", "ort", sha256=files[0].sha256, files=files)
    report.save(tmp_path / "r.json")
    (tmp_path / "r.html").write_text(html.render(report))
    return model, tmp_path / "r.json", tmp_path / "r.html"


def test_all_files_are_named(model_kit, tmp_path):
    (tmp_path / "part").mkdir()
    model = stored(model_kit, tmp_path / "m.onnx", "part/m.data")
    data = tmp_path / "part" / "m.data"
    assert fingerprint.of_files(model) == [
        WrittenFile("m.onnx", model.stat().st_size, digest(model)),
        WrittenFile("part/m.data", data.stat().st_size, digest(data)),
    ]
    data.unlink()
    with pytest.raises(ExternalDataError):
        fingerprint.of_files(model)


def test_gigabytes_are_not_read_at_once(model_kit, tmp_path):
    model = stored(model_kit, tmp_path / "m.onnx", size=2048)
    fingerprint.of_files(model)
    tracemalloc.start()
    _, data = fingerprint.of_files(model)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert data.bytes >= 2 * 4 * 2048**2 and peak < data.bytes / 8, peak


def test_what_is_optimized_reports_its_files(model_kit, tmp_path):
    stored(model_kit, tmp_path / "m.onnx", size=256)
    feeds = [{"x": model_kit.normal(1, 256, seed=seed)} for seed in range(6)]
    found = qgraph.optimize(
        tmp_path / "m.onnx", tmp_path / "o.onnx", data=feeds, evaluation=feeds[:2], bench_seconds=0.0, max_loss="50%",
        force=True,
    )  # fmt: skip
    names = [one.name for one in found.report.files]
    assert names[0] == "o.onnx" and len(names) > 1
    assert [(one.bytes, one.sha256) for one in found.report.files] == [
        ((tmp_path / name).stat().st_size, digest(tmp_path / name)) for name in names
    ]
    assert found.report.sha256 == found.report.files[0].sha256
    found.report.save(tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text())["files"][1]["sha256"] == digest(tmp_path / names[1])
    reports.check(tmp_path / "r.json", tmp_path / "o.onnx")


def test_nothing_written_names_no_files(model_kit):
    model = model_kit.text(TEXT, v=model_kit.normal(64, 64), w=model_kit.normal(64, 64))
    feeds = [{"x": model_kit.normal(1, 64, seed=seed)} for seed in range(4)]
    found = qgraph.optimize(model, data=feeds, evaluation=feeds[:1], bench_seconds=0.0, max_loss="50%", force=True)
    assert found.report.sha256 is None and found.report.files == []


@pytest.mark.parametrize("form", [1, 2], ids=["json", "html"])
def test_it_travels_with_its_own_weights_only(told, form):
    model, report = told[0], told[form]
    reports.check(report, model)
    data = model.with_name("m.data")
    changed = bytearray(data.read_bytes())
    changed[-1] ^= 1
    data.write_bytes(changed)
    with pytest.raises(OptionError, match=r"other weights, or of those in 'm\.data' before they were changed"):
        reports.check(report, model)


@pytest.mark.parametrize("form", [1, 2], ids=["json", "html"])
def test_a_report_that_says_nothing_of_the_weights_is_refused(told, form, tmp_path):
    model = told[0]
    plain = Report("in.onnx", "x86", "int8", "ort", sha256=digest(model))
    name = tmp_path / ("p.json" if form == 1 else "p.html")
    name.write_text(json.dumps(plain.to_dict()) if form == 1 else html.render(plain))
    with pytest.raises(OptionError, match=r"says nothing of the weights in 'm\.data'"):
        reports.check(name, model)


def test_a_page_tells_names_with_signs_in_them(model_kit, tmp_path):
    model = stored(model_kit, tmp_path / "m.onnx", "a&b 'c' <d>.data")
    files = fingerprint.of_files(model)
    report = Report("in.onnx", "x86", "int8", "ort", sha256=files[0].sha256, files=files)
    (tmp_path / "r.html").write_text(html.render(report))
    reports.check(tmp_path / "r.html", model)
    wrong = dataclasses.replace(report, files=[files[0], dataclasses.replace(files[1], sha256="0" * 64)])
    (tmp_path / "w.html").write_text(html.render(wrong))
    with pytest.raises(OptionError, match="other weights"):
        reports.check(tmp_path / "w.html", model)


@pytest.mark.parametrize("files", [3, [1], [{"name": "m.data"}], {"a": 1}, None])
def test_nonsense_in_place_of_files_is_no_report(told, files, tmp_path):
    (tmp_path / "n.json").write_text(json.dumps({"sha256": digest(told[0]), "files": files}))
    with pytest.raises(OptionError, match="is no report"):
        reports.check(tmp_path / "n.json", told[0])


def test_a_model_in_one_file_needs_no_list(model_kit, tmp_path):
    model = model_kit.text(TEXT, v=model_kit.normal(64, 64), w=np.ones((64, 64), np.float32))
    ir.save(model, tmp_path / "m.onnx")
    (tmp_path / "r.json").write_text(json.dumps({"sha256": digest(tmp_path / "m.onnx")}))
    reports.check(tmp_path / "r.json", tmp_path / "m.onnx")
