"""Pipelines: flat lists of passes, each of which also works alone on an onnx_ir.Model."""

import numpy as np
import onnx_ir as ir
import pytest
from qgraph.passes import pipelines

from qgraph import passes, registry
from qgraph.data import inputs_of, load
from qgraph.errors import NothingQuantizedError, OptionError
from qgraph.pipeline import Context, Pipeline
from qgraph.targets import KERNEL


@pytest.fixture
def model(model_kit):
    n = model_kit.normal
    return model_kit.text(
        """g (float[1, 3, 8, 8] x) => (float[1, 5] y) {
            c = Conv <pads = [1, 1, 1, 1]> (x, W)
            b = BatchNormalization (c, s, t, m, v)
            r = Relu (b)
            d = Conv <pads = [1, 1, 1, 1]> (r, V)
            a = Add (d, r)
            p = GlobalAveragePool (a)
            f = Flatten (p)
            k = MatMul (f, G)
            y = Add (k, g0)
        }""",
        W=n(4, 3, 3, 3),
        V=n(4, 4, 3, 3),
        G=n(4, 5),
        g0=n(5),
        s=1 + 0.2 * n(4),
        t=n(4),
        m=n(4),
        v=np.abs(n(4)) + 0.5,
    )


def context(kit, model, **more):
    target = kit.free()
    return Context(target, target.scheme("int8"), load(kit.feeds(model), inputs_of(model)), **more)


def test_static_is_a_flat_list_of_all_the_passes(model_kit, model):
    pipeline = pipelines.static(context(model_kit, model))
    names = [type(one).__name__ for one in pipeline.passes]
    assert str(pipeline) == " -> ".join(names)
    assert set(names) <= set(passes.__all__)
    assert names.index("Canonicalize") < names.index("FuseLayers") < names.index("Annotate")
    assert names.index("Annotate") < names.index("InsertObservers") < names.index("Calibrate")
    assert names.index("CalibrateWeights") < names.index("CorrectBias") < names.index("InsertQDQ")
    writers = {"InsertQDQ", "InsertDynamic", "InsertDynamicLSTM", "InsertBlocks", "InsertRows"}
    assert all(names.index("CorrectBias") < names.index(name) < names.index("FoldWeights") for name in writers)
    halves = [*pipelines.prepare(context(model_kit, model)).passes, *pipelines.write(context(model_kit, model)).passes]
    assert names == [type(one).__name__ for one in halves], "what the search does in two steps"


def test_plan_changes_no_number(model_kit, model):
    after = model.clone()
    pipelines.plan(context(model_kit, model))(after)
    model_kit.same(model, after, tolerance=1e-4)
    assert [node.op_type for node in after.graph if KERNEL in node.meta] == [
        "Conv", "Conv", "Add", "GlobalAveragePool", "Flatten", "Gemm",
    ]  # fmt: skip


def test_static(model_kit, model):
    feeds = model_kit.feeds(model)
    after = model.clone()
    result = pipelines.static(context(model_kit, model))(after)
    assert result.model is after and result.modified
    assert model_kit.sqnr(model, after, feeds) > 25


def test_static_without_data_is_an_error(model_kit):
    target = model_kit.free()
    with pytest.raises(OptionError, match="calibration data"):
        pipelines.static(Context(target, target.scheme("int8"), None))


def test_plan_without_data(model_kit, model):
    target = model_kit.free()
    pipelines.plan(Context(target, target.scheme("int8"), None))(model)
    assert model_kit.integer(model)


def test_steps_tell_what_changed(model_kit, model):
    pipeline = pipelines.static(context(model_kit, model))
    pipeline(model)
    steps = {step.name: step for step in pipeline.steps}
    assert [step.name for step in pipeline.steps] == [type(one).__name__ for one in pipeline.passes]
    assert steps["FuseLayers"].operators == {"BatchNormalization": -1}
    assert steps["BiasForm"].operators == {"Add": -1, "Gemm": 1, "MatMul": -1}
    assert steps["InsertQDQ"].operators["QuantizeLinear"] > 0
    assert steps["FoldWeights"].operators["QuantizeLinear"] == -3
    assert all(step.seconds >= 0 for step in pipeline.steps)


def test_progress(model_kit, model):
    seen = []
    pipelines.static(context(model_kit, model, progress=lambda *event: seen.append(event)))(model)
    assert {"Canonicalize", "Annotate", "calibrating", "FoldWeights"} <= {what for what, _, _ in seen}


def test_errors_of_passes_come_through_as_they_are(model_kit):
    model = model_kit.text("g (float[2] x) => (float[2] y) { y = Erf (x) }")
    with pytest.raises(NothingQuantizedError):
        pipelines.static(context(model_kit, model))(model)


def test_pipelines_are_found_by_entry_point():
    assert registry.pipelines() == [
        "assign",
        "float",
        "plan",
        "prepare",
        "quantize",
        "scale",
        "shrink",
        "static",
        "survey",
        "widen",
        "write",
    ]
    assert all(callable(registry.pipeline(name)) for name in registry.pipelines())
    assert registry.pipeline("static") is pipelines.static
    with pytest.raises(OptionError, match="Did you mean 'static'"):
        registry.pipeline("statik")


def test_every_pass_is_registered_and_documented():
    listed = registry.passes()
    assert sorted(listed) == sorted(passes.__all__)
    assert all(line for line in listed.values())


def test_passes_are_passes_of_onnx_ir(model_kit, model):
    for name in passes.__all__:
        assert issubclass(getattr(passes, name), ir.passes.PassBase)
    # ...and run in anyone's pipeline.
    after = model.clone()
    result = ir.passes.Sequential(passes.Canonicalize(), passes.FuseLayers(), passes.BiasForm())(after)
    assert result.modified
    model_kit.same(model, after, tolerance=1e-4)


@pytest.mark.parametrize("name", ["Canonicalize", "FuseLayers", "Recognize", "BiasForm"])
def test_each_rewriting_pass_alone_keeps_the_numbers(model_kit, model, name):
    after = model.clone()
    getattr(passes, name)()(after)
    model_kit.same(model, after, tolerance=1e-4)


@pytest.mark.parametrize("name", ["Canonicalize", "FuseLayers", "Recognize", "BiasForm", "InsertObservers",
                                  "CalibrateWeights", "CorrectBias", "InsertQDQ", "FoldWeights"])  # fmt: skip
def test_each_pass_alone_does_no_harm_where_it_has_nothing_to_do(model_kit, name):
    model = model_kit.text("g (float[2, 4] x) => (float[2, 4] y) { y = Erf (x) }")
    after = model.clone()
    result = getattr(passes, name)()(after)
    assert name == "Canonicalize" or not result.modified
    assert model_kit.ops(after) == ["Erf"]
    model_kit.same(model, after)


def test_a_pipeline_of_no_pass():
    with pytest.raises(ValueError, match="at least one"):
        Pipeline()


@pytest.mark.filterwarnings("ignore")
def test_passes_on_a_torch_export(model_kit):
    torch = pytest.importorskip("torch")
    pytest.importorskip("onnxscript")

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 8, 3, padding=1)
            self.norm = torch.nn.BatchNorm2d(8)
            self.head = torch.nn.Linear(8, 4)

        def forward(self, x):
            x = torch.relu(self.norm(self.conv(x)))
            return self.head(torch.nn.functional.gelu(x.mean((2, 3))))

    torch.manual_seed(0)
    net = Net().eval()
    image = torch.randn(1, 3, 8, 8)
    program = torch.onnx.export(net, (image,), dynamo=True)
    model = program.model
    feeds = [{model.graph.inputs[0].name: np.random.default_rng(i).standard_normal((1, 3, 8, 8), np.float32)}
             for i in range(8)]  # fmt: skip
    original = model.clone()
    after = model_kit.static(model, feeds)
    assert {"Conv", "Gemm"} <= {node.op_type for node in after.graph if KERNEL in node.meta}
    assert model_kit.sqnr(original, after, feeds) > 25


def test_what_a_pass_refuses_is_told_in_its_step(model_kit):
    """The steps of a report carry the reasons of the passes that scale channels."""
    model = model_kit.text("g (float[4, 8] x) => (float[4, 8] y) { y = MatMul (x, W) }", W=model_kit.normal(8, 8))
    target = model_kit.free()
    data = load(model_kit.feeds(model), inputs_of(model))
    pipeline = registry.pipeline("prepare")(Context(target, target.scheme("int8"), data, smoothing="folded"))
    pipeline(model)
    told = {step.name: step.refused for step in pipeline.steps}
    assert list(told["Smooth"]) == [node.name for node in model.graph if node.op_type == "MatMul"]
    assert all(told["Smooth"].values()) and told["Survey"] == {}
