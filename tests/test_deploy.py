"""Deployed folders: every file proved, nothing half-written, and the page run in a real browser where there is one."""

import hashlib
import importlib.util
import json
import os
import shutil
from pathlib import Path

import click.testing
import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from qgraph import registry
from qgraph.cli import main
from qgraph.deploy import deploy
from qgraph.deploy import examples as deploy_examples
from qgraph.deploy import providers as deploy_providers
from qgraph.deploy import sample as deploy_sample
from qgraph.deploy import versions as deploy_versions
from qgraph.deploy.usability import usability
from qgraph.errors import AccuracyError, DataError, ExecutionError, ModelError, OptionError
from qgraph.session import Session, SessionOptions

ROOT = Path(__file__).parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ORT_WEB = os.environ.get("ORT_WEB")


@pytest.fixture
def model(model_kit, tmp_path):
    """A float model on disk with one image, and a sample of it."""
    n = model_kit.normal
    made = model_kit.text(
        """g (float[batch, 1, 8, 8] image) => (float[batch, 4] logits) {
            c = Conv (image, K)
            r = Relu (c)
            f = Flatten (r)
            logits = MatMul (f, W)
        }""",
        opset=17,
        K=n(3, 1, 3, 3),
        W=n(108, 4),
    )
    made.ir_version = 8
    ir.save(made, tmp_path / "m.onnx")
    np.savez(tmp_path / "data.npz", image=n(5, 1, 8, 8, seed=1))
    return tmp_path / "m.onnx"


@pytest.fixture
def many(model_kit, tmp_path):
    """Tokens in int64, an image in uint8, halves and truths in; floats, halves and int64 out; names that hurt."""
    made = model_kit.text(
        """g (int64[1, 6] ids, uint8[1, 4, 4, 3] image, float16[1, 6] half, bool[1, 6] mask)
            => (float[1, 6] scores, float16[1, 6] doubled, int64[1] best) {
            e = Gather (T, ids)
            m = Cast <to = 1> (mask)
            i = Cast <to = 1> (image)
            s = ReduceSum <keepdims = 0> (i)
            a = Mul (e, m)
            scores = Add (a, s)
            doubled = Add (half, half)
            best = ArgMax <axis = 1, keepdims = 0> (scores)
        }""",
        opset=17,
        T=model_kit.normal(50),
    )
    made.ir_version = 8
    for value, name in zip(
        [*made.graph.inputs, *made.graph.outputs],
        ['to"ken$ids', "ima\\(ge", "half`|", "mask</script>", "scores", "doubled", "b\u00e9st"],
        strict=True,
    ):
        value.name = name
    ir.save(made, tmp_path / "many.onnx")
    return tmp_path / "many.onnx"


def tree(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def checker():
    """tools/check_deploy.py, which drives the browser."""
    spec = importlib.util.spec_from_file_location("check_deploy", ROOT / "tools" / "check_deploy.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


def load(folder, one):
    return np.fromfile(folder / one["file"], one["type"]).reshape(one["shape"])


# -- what is in a folder --------------------------------------------------------------------------------------------


def test_everything_is_there_and_proved(model, tmp_path):
    report = json.dumps({"sha256": hashlib.sha256(model.read_bytes()).hexdigest()}).encode()
    (tmp_path / "r.json").write_bytes(report)
    done = deploy(model, tmp_path / "out", ort=True, data=tmp_path / "data.npz", report=tmp_path / "r.json")
    out = tmp_path / "out"
    files = tree(out)
    assert files["model/model.onnx"] == model.read_bytes()
    assert files["report.json"] == report
    assert {
        "README.md",
        "manifest.json",
        "SHA256SUMS",
        "model/model.ort",
        "model/model.with_runtime_opt.ort",
        "model/model.required_operators_and_types.config",
        "model/model.with_runtime_opt.required_operators_and_types.config",
        "android/build.gradle.kts",
        "android/src/main/AndroidManifest.xml",
        "android/src/main/kotlin/example/MainActivity.kt",
        "android/src/main/kotlin/example/Runner.kt",
        "ios/Package.swift",
        "ios/Sources/Example/main.swift",
        "ios/Sources/ModelRunner/Runner.swift",
        "web/index.html",
        "web/app.js",
        "web/show.js",
    } < files.keys()
    manifest = json.loads(files["manifest.json"])
    assert manifest == json.loads(json.dumps(done.manifest))
    assert manifest["inputs"] == [{"name": "image", "type": "float32", "shape": ["batch", 1, 8, 8]}]
    assert manifest["outputs"] == [{"name": "logits", "type": "float32", "shape": ["batch", 4]}]
    assert manifest["operators"] == {"ai.onnx:Conv": 1, "ai.onnx:Flatten": 1, "ai.onnx:MatMul": 1, "ai.onnx:Relu": 1}
    assert (manifest["ir_version"], manifest["opset"], manifest["oldest onnxruntime"]) == (8, {"ai.onnx": 17}, "1.15")
    assert [one["style"] for one in manifest["ort"]] == ["Fixed", "Runtime"]
    assert "Conv" in files["model/model.required_operators_and_types.config"].decode()
    assert not done.notes
    # Each file's checksum, twice: in the manifest and as a tool reads them.
    for name, one in manifest["files"].items():
        assert (one["bytes"], one["sha256"]) == (len(files[name]), hashlib.sha256(files[name]).hexdigest())
    sums = dict(reversed(line.split("  ")) for line in files["SHA256SUMS"].decode().splitlines())
    assert sums == {name: hashlib.sha256(b).hexdigest() for name, b in files.items() if name != "SHA256SUMS"}
    # Nothing names the machine, and nothing but the folder was left.
    assert not any(str(tmp_path).encode() in content for content in files.values())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data.npz", "m.onnx", "out", "r.json"]


def test_the_sample_is_of_the_data_and_the_result_the_runtimes(model, tmp_path):
    manifest = deploy(model, tmp_path / "out", ort=True, data=tmp_path / "data.npz", platforms=["web"]).manifest
    feed = load(tmp_path / "out", manifest["sample"]["inputs"][0])
    np.testing.assert_array_equal(feed, np.load(tmp_path / "data.npz")["image"][:1])
    expected = load(tmp_path / "out", manifest["sample"]["expected"][0])
    assert manifest["sample"]["expected"][0]["first"] == expected.reshape(-1).tolist()
    for name in ("model.onnx", "model.ort", "model.with_runtime_opt.ort"):
        replay = (("session.enable_saved_runtime_optimizations", "1"),) if "runtime" in name else ()
        with Session(tmp_path / "out" / "model" / name, SessionOptions(config=replay)) as session:
            np.testing.assert_allclose(session.run({"image": feed})["logits"], expected, atol=1e-4)


def test_the_same_bytes_twice(model, tmp_path):
    for name in ("a", "b"):
        deploy(model, tmp_path / name)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_with_ort_files_the_same_but_for_the_order_in_which_the_runtime_writes_its_tables(model, tmp_path):
    for name in ("a", "b"):
        deploy(model, tmp_path / name, ort=True)
    first, second = tree(tmp_path / "a"), tree(tmp_path / "b")
    assert {name: len(content) for name, content in first.items()} == {n: len(c) for n, c in second.items()}
    sums = {"manifest.json", "SHA256SUMS"}
    assert {name for name in first if first[name] != second[name]} - sums <= {
        "model/model.ort",
        "model/model.with_runtime_opt.ort",
    }
    before, after = (json.loads(one["manifest.json"]) | {"files": None} for one in (first, second))
    assert before == after


def test_random_sample_is_told(model, tmp_path):
    done = deploy(model, tmp_path / "out", platforms=["web"])
    assert done.manifest["sample"]["from"] == "seeded random numbers" and "--data" in done.notes[0]
    assert done.notes[0] in (tmp_path / "out" / "README.md").read_text()
    assert not (tmp_path / "out" / "ios").exists() and list(done.manifest["examples"]) == ["web"]


def test_weights_beside_the_model_come_into_one_file(model, tmp_path):
    big = ir.load(model)
    (tmp_path / "sub").mkdir()
    ir.save(big, tmp_path / "sub" / "m.onnx", external_data="w.bin", size_threshold_bytes=1)
    done = deploy(tmp_path / "sub" / "m.onnx", tmp_path / "out", data=tmp_path / "data.npz")
    assert [p.name for p in (tmp_path / "out" / "model").iterdir()] == ["model.onnx"]
    same = deploy(model, tmp_path / "other", data=tmp_path / "data.npz")
    assert same.manifest["sample"] == done.manifest["sample"]
    assert "in its file" in done.notes[0]


def test_weights_too_large_for_one_file_stay_beside_it(model, tmp_path, monkeypatch):
    monkeypatch.setattr("qgraph.deploy.job._ONE_FILE", 1000)
    (tmp_path / "sub").mkdir()
    ir.save(ir.load(model), tmp_path / "sub" / "m.onnx", external_data="w.bin", size_threshold_bytes=1)
    done = deploy(tmp_path / "sub" / "m.onnx", tmp_path / "out", data=tmp_path / "data.npz")
    assert sorted(p.name for p in (tmp_path / "out" / "model").iterdir()) == ["model.onnx", "w.bin"]
    assert "w.bin" in done.notes[0] and '["w.bin"]' in (tmp_path / "out" / "web" / "app.js").read_text()
    assert '"w.bin"' in (tmp_path / "out/android/src/main/kotlin/example/Runner.kt").read_text()
    with pytest.raises(ModelError, match="2 GB"):
        deploy(tmp_path / "sub" / "m.onnx", tmp_path / "more", ort=True)
    assert not (tmp_path / "more").exists()


# -- .ort -----------------------------------------------------------------------------------------------------------


def test_halves_do_not_double(model_kit, tmp_path):
    half = model_kit.text(
        "g (float16[1, 64] x) => (float16[1, 128] y) { y = MatMul (x, W) }",
        opset=17,
        W=model_kit.normal(64, 128).astype(np.float16),
    )
    half.ir_version = 8
    ir.save(half, tmp_path / "half.onnx")
    done = deploy(tmp_path / "half.onnx", tmp_path / "out", ort=True)
    fixed, runtime = done.manifest["ort"]
    weights = 64 * 128 * 2
    assert fixed["sizes"]["all"] > 2 * weights, "the runtime no longer widens halves: the second level can go"
    assert fixed["level"] == "extended" and fixed["bytes"] < 1.3 * weights and runtime["bytes"] < 1.3 * weights
    assert any("widens" in note for note in done.notes)
    # The package for iOS has no halves, which is told, and that for Android has.
    assert list(done.manifest["examples"]) == ["android", "web"]
    assert any("ios" in note and "float16" in note for note in done.notes)


def test_other_numbers_are_refused(model, tmp_path, monkeypatch):
    monkeypatch.setattr("qgraph.deploy.sample._EXACT", -1.0)
    with pytest.raises(AccuracyError, match="other numbers"):
        deploy(model, tmp_path / "out", ort=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data.npz", "m.onnx"]


# -- what is refused, and what stands then --------------------------------------------------------------------------


def test_a_folder_in_the_way(model, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    deploy(model, out, platforms=["web"])  # an empty folder is not in the way
    with pytest.raises(OptionError, match="not empty"):
        deploy(model, out)
    before = tree(out)
    with pytest.raises(OptionError, match="is in"):
        deploy(out / "model" / "model.onnx", out, force=True)
    with pytest.raises(DataError):
        deploy(model, out, force=True, data=tmp_path / "none.npz")
    assert tree(out) == before
    deploy(model, out, force=True, platforms=["ios"])
    assert (out / "ios").is_dir() and not (out / "web").exists()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(OptionError, match="never replaced"):
        deploy(model, out, force=True)
    assert (out / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target": "cup"}, "'cpu'"),
        ({"platforms": ["webb"]}, "'web'"),
        ({"report": "none.json"}, "no report"),
        ({"ort_web": "."}, "lacks ort.wasm"),
    ],
)
def test_options_that_cannot_be(model, tmp_path, options, words):
    with pytest.raises(OptionError, match=words):
        deploy(model, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_model_that_does_not_run(model, tmp_path):
    broken = ir.load(model)
    broken.graph[0].op_type = "Konv"
    ir.save(broken, tmp_path / "broken.onnx")
    with pytest.raises(ExecutionError, match="Konv"):
        deploy(tmp_path / "broken.onnx", tmp_path / "out")
    with pytest.raises(ModelError):
        deploy(model, tmp_path / "none" / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken.onnx", "data.npz", "m.onnx"]


def test_failure_at_the_last_step_leaves_the_old_folder(model, tmp_path, monkeypatch):
    deploy(model, tmp_path / "out", platforms=["web"])
    before, real = tree(tmp_path / "out"), Path.replace

    def failing(self, other):
        if self.name == "made":
            raise OSError(28, "No space left on device")
        return real(self, other)

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(ModelError, match="No space left"):
        deploy(model, tmp_path / "out", force=True)
    assert tree(tmp_path / "out") == before


# -- providers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "android", "ios", "web"),
    [
        ("XnnpackExecutionProvider", "options.addXnnpack(", "appendXnnpackExecutionProvider", '["wasm"]'),
        ("NNAPIExecutionProvider", "options.addNnapi()", None, '["wasm"]'),
        ("CoreMLExecutionProvider", None, "appendCoreMLExecutionProvider(", '["wasm"]'),
        ("QNNExecutionProvider", "libQnnHtp.so", None, '["wasm"]'),
        ("WebGpuExecutionProvider", None, None, '["webgpu", "wasm"]'),
        ("MoonExecutionProvider", None, None, '["wasm"]'),
    ],
)
def test_options_of_providers(model, tmp_path, monkeypatch, name, android, ios, web):
    target = registry.target("cpu")
    monkeypatch.setattr(target, "provider", name, raising=False)
    monkeypatch.setattr(registry, "target", lambda _: target)
    done = deploy(model, tmp_path / "out", data=tmp_path / "data.npz")
    code = {
        "android": (tmp_path / "out/android/src/main/kotlin/example/Runner.kt").read_text(),
        "ios": (tmp_path / "out/ios/Sources/ModelRunner/Runner.swift").read_text(),
    }
    for platform, wanted in (("android", android), ("ios", ios)):
        body = code[platform].partition("options = ")[2].partition("return options")[0]
        assert wanted in body if wanted is not None else "options." not in body.partition("\n")[2]
        assert any(platform in note for note in done.notes) == (wanted is None)
    assert web in (tmp_path / "out/web/app.js").read_text()
    gradle = (tmp_path / "out/android/build.gradle.kts").read_text()
    assert ("onnxruntime-android-qnn:" in gradle) == name.startswith("QNN")
    assert ("libcdsprpc" in (tmp_path / "out/android/src/main/AndroidManifest.xml").read_text()) == name.startswith("Q")


def test_every_platform_falls_back_on_its_cpu():
    for platform in deploy_providers.PLATFORMS:
        assert deploy_providers.provider_on(platform, "CPUExecutionProvider").code in ((), ('"wasm"',))


# -- literals -------------------------------------------------------------------------------------------------------


def test_names_are_literals_in_each_language(many, tmp_path):
    done = deploy(many, tmp_path / "out")
    script = (tmp_path / "out/web/app.js").read_text()
    listed = script.partition("const INPUTS = ")[2].partition("];")[0].rstrip().removesuffix(",") + "]"
    inputs = json.loads(listed)
    assert [one["name"] for one in inputs] == ['to"ken$ids', "ima\\(ge", "half`|", "mask</script>"]
    assert [one["type"] for one in inputs] == ["int64", "uint8", "float16", "bool"]
    assert inputs[1]["shape"] == [1, 4, 4, 3]
    kotlin = (tmp_path / "out/android/src/main/kotlin/example/Runner.kt").read_text()
    assert 'Tensor("to\\"ken\\$ids", OnnxJavaType.INT64, longArrayOf(1, 6), "input_0.bin"),' in kotlin
    assert 'Tensor("ima\\\\(ge", OnnxJavaType.UINT8, longArrayOf(1, 4, 4, 3), "input_1.bin"),' in kotlin
    assert 'Tensor("b\\u00e9st", OnnxJavaType.INT64, longArrayOf(1), "expected_2.bin"),' in kotlin
    assert any("ios" in note and "bool, float16" in note for note in done.notes)
    assert [deploy_examples._swift(t) for t in ('a"b', "\\(x)", "\u00e9", "a\nb")] == [
        '"a\\"b"', '"\\\\(x)"', '"\u00e9"', '"a\\u{a}b"',
    ]  # fmt: skip


def test_nothing_is_left_to_fill_in(many, model, tmp_path):
    for name, one in (("a", many), ("b", model)):
        deploy(one, tmp_path / name)
        for path, content in tree(tmp_path / name).items():
            if not path.startswith(("model/", "sample/")):
                assert b"@@" not in content, path


# -- parts ----------------------------------------------------------------------------------------------------------


def test_difference():
    one = {"y": np.array([1.0, -4.0, np.inf, np.nan])}
    assert deploy_sample.difference(one, {"y": one["y"].copy()}) == 0
    assert deploy_sample.difference(one, {"y": np.array([1.0, -3.0, np.inf, np.nan])}) == 0.25
    for other in ([1.0, -4.0, 0.0, np.nan], [1.0, -4.0, np.inf, 0.0], [np.nan, -4.0, np.inf, np.nan], [1.0]):
        assert deploy_sample.difference(one, {"y": np.array(other)}) == np.inf
    assert deploy_sample.difference({"y": np.zeros(3)}, {"y": np.full(3, 0.5)}) == 0.5
    half = {"y": np.array([1, 2], ml_dtypes.bfloat16)}
    assert deploy_sample.difference(half, half) == 0


def test_tolerance_is_wider_where_numbers_are_rounded():
    exact = deploy_sample.tolerance({"float32", "int64"})
    assert exact < deploy_sample.tolerance({"float32", "int8"}) == deploy_sample.tolerance({"float16"})


@pytest.mark.parametrize(
    ("opset", "version", "bits", "oldest"),
    [(17, 8, None, "1.15"), (17, 8, 4, "1.17"), (17, 8, 8, "1.22"), (17, 8, 2, "1.24"), (21, 10, None, "1.18"),
     (21, 10, 4, "1.18"), (23, 8, None, "1.23"), (17, 11, 4, "1.23"), (26, 8, None, "1.25")],
)  # fmt: skip
def test_oldest_runtime(model_kit, opset, version, bits, oldest):
    made = model_kit.text("g (float[1, 64] x) => (float[1, 64] y) { y = Relu (x) }", opset=opset)
    made.ir_version = version
    if bits is not None:
        node = ir.node("MatMulNBits", [made.graph.inputs[0]], {"bits": bits}, domain="com.microsoft")
        made.graph.append(node)
    assert deploy_versions.oldest_runtime(made) == (oldest, [])
    made.graph.append(ir.node("Mystery", [made.graph.inputs[0]], domain="my.own"))
    assert deploy_versions.oldest_runtime(made) == (oldest, ["my.own:Mystery"])


def test_usability_says_what_the_runtimes_check_says(model, model_kit, tmp_path):
    found = {one.provider: one for one in usability(model)}
    assert list(found) == ["NNAPI", "CoreML NeuralNetwork", "CoreML MLProgram"]
    assert found["NNAPI"].supported == 0 and found["NNAPI"].fixed == "should work well"
    fixed = ir.load(model)
    fixed.graph.inputs[0].shape = ir.Shape([1, 1, 8, 8])
    fixed.graph.outputs[0].shape = ir.Shape([1, 4])
    ir.save(fixed, tmp_path / "fixed.onnx")
    one = usability(tmp_path / "fixed.onnx")[0]
    assert (one.verdict, one.supported, one.nodes, one.partitions, one.fixed) == ("should work well", 4, 4, 1, None)
    (tmp_path / "text.onnx").write_text("no model")
    assert "failed" in usability(tmp_path / "text.onnx")


# -- the command ----------------------------------------------------------------------------------------------------


def test_command(model, tmp_path):
    def run(*arguments):
        found = click.testing.CliRunner().invoke(main, [str(a) for a in ("deploy", model, *arguments)])
        assert found.exception is None or isinstance(found.exception, SystemExit), found.exception
        return found

    found = run("--to", tmp_path / "out", "--for", "web,ios", "--data", tmp_path / "data.npz", "--ort")
    assert found.exit_code == 0 and "model.ort" in found.output and "onnxruntime-web" in found.output
    assert not (tmp_path / "out" / "android").exists()
    again = run("--to", tmp_path / "out")
    assert again.exit_code == 1 and again.output.startswith("Error: ") and "--force" in again.output
    assert run("--to", tmp_path / "out", "--force").exit_code == 0


# -- the page, in a real browser --------------------------------------------------------------------------------------


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine")
@pytest.mark.skipif(ORT_WEB is None, reason="ORT_WEB does not name a folder of onnxruntime-web (npm i onnxruntime-web)")
@pytest.mark.parametrize("which", ["model", "many"])
def test_the_page_gives_the_expected_result(which, request, tmp_path):
    tool = checker()
    data = tmp_path / "data.npz" if which == "model" else None
    done = deploy(request.getfixturevalue(which), tmp_path / "out", data=data, platforms=["web"], ort_web=ORT_WEB)
    title, words = tool.check(tmp_path / "out", CHROMIUM, tmp_path / "page.png")
    assert title.startswith("ok difference"), words
    assert (tmp_path / "page.png").stat().st_size > 10_000
    # A page that is always content says nothing: with a wrong expectation it must not be.
    one = tmp_path / "out" / done.manifest["sample"]["expected"][0]["file"]
    one.write_bytes(np.full(one.stat().st_size // 4, 7e3, np.float32).tobytes())
    title, words = tool.check(tmp_path / "out", CHROMIUM)
    assert title.startswith("error difference") and "not the expected one" in words
    (tmp_path / "out" / "model" / "model.onnx").unlink()
    assert tool.check(tmp_path / "out", CHROMIUM)[0].startswith("error cannot load")


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine")
@pytest.mark.skipif(ORT_WEB is None, reason="ORT_WEB does not name a folder of onnxruntime-web (npm i onnxruntime-web)")
def test_the_page_says_that_there_is_no_webgpu(model, tmp_path, monkeypatch):
    target = registry.target("cpu")
    monkeypatch.setattr(target, "provider", "WebGpuExecutionProvider", raising=False)
    monkeypatch.setattr(registry, "target", lambda _: target)
    deploy(model, tmp_path / "out", platforms=["web"], ort_web=ORT_WEB)
    title, words = checker().check(tmp_path / "out", CHROMIUM)
    assert title.startswith("ok difference") and "no WebGPU here" in words
