"""What a review found and was mended: layers that share what they read, layers without outputs, wishes in the cut."""

import dataclasses

import numpy as np
import pytest

import qgraph
from qgraph import audit, islands, modelio, pricing, registry
from qgraph.audit import Plan
from qgraph.builder import Builder
from qgraph.data import inputs_of, load
from qgraph.pipeline import Context
from qgraph.targets import KERNEL, Form, Kernel

QUIET = {"bench_seconds": 0.0, "time_limit": 10.0}


@pytest.fixture
def builder(model_kit, tmp_path):
    """Maker of a builder for a model and data, channels unscaled."""

    def build(model, feeds, scheme="int8", target=None):
        workspace = modelio.Workspace(None, None)
        target = target or registry.target("cpu")
        context = Context(target, target.scheme(scheme), load(feeds, inputs_of(model)), workspace.spill(model))
        made = Builder(model, context, workspace, None, False, set(), lambda *_: None)
        made.variant = "none"
        return made

    return build


def test_means_correct_the_biases_of_sums_only(model_kit):
    """An LSTM that reads what a product reads has that value's means, and no bias that they say anything about."""
    n = model_kit.normal
    model = model_kit.text(
        """g (float[T, 1, 32] x) => (float[T, 1, 1, 32] z, float[T, 1, 32] y) {
            Y = LSTM <hidden_size = 32> (x, W, R, B)
            z = Add (Y, c)
            p = MatMul (x, w)
            y = Add (p, b)
        }""",
        W=n(1, 128, 32, scale=0.2),
        R=n(1, 128, 32, scale=0.2, seed=1),
        B=n(1, 256, scale=0.1),
        c=n(32),
        w=n(32, 32, scale=0.2),
        b=n(32, seed=2),
    )
    before = model_kit.tensors(model)["c"].copy()
    feeds = [{"x": n(20, 1, 32, seed=seed) + 1} for seed in range(8)]
    target = model_kit.free()
    context = Context(target, target.scheme("auto"), load(feeds, inputs_of(model)))
    prepared = registry.pipeline("prepare")(context)(model).model
    lstm = next(node for node in prepared.graph if node.op_type == "LSTM")
    dynamic = dataclasses.replace(context, choices={"LSTM": "int8-dynamic", "MatMul": "int8"})
    written = registry.pipeline("write")(dynamic)(prepared.clone()).model
    assert lstm.name in {node.name for node in written.graph if KERNEL in node.meta}, "or nothing is tested"
    summands = [value for node in written.graph if node.op_type == "Add" for value in node.inputs]
    kept = [v.const_value.numpy() for v in summands if v is not None and v.const_value is not None]
    assert any(array.size == 32 and np.array_equal(array.reshape(-1), before) for array in kept)


def test_a_shared_weight_is_rounded_the_same_whatever_was_built_before(builder, model_kit):
    """Codes of one layer alone are known; of two layers that share the weight, they are nobody's."""
    n = model_kit.normal
    model = model_kit.text(
        "g (float[N, 8, 64] x) => (float[N, 8, 64] y) { a = MatMul (x, W) r = Relu (a) y = MatMul (r, W) }",
        W=n(64, 64, scale=0.15),
    )
    feeds = [{"x": n(1, 8, 64, seed=seed)} for seed in range(6)]
    one, both = {"a_MatMul": "int8"}, {"a_MatMul": "int8", "y_MatMul": "int8"}

    def written(made, assignment):
        built = made.build(pricing.only(assignment, made.savings()), learn=True)
        assert built.assignment == assignment
        return built.staged.path.read_bytes()

    fresh = written(builder(model, feeds, target=model_kit.free()), both)
    used = builder(model, feeds, target=model_kit.free())
    written(used, one)
    assert written(used, both) == fresh


def test_a_layer_without_outputs_is_no_layer(model_kit):
    n = model_kit.normal
    model = model_kit.text(
        """g (float[N, 4, 64] x) => (float[N, 4, 8] y, float[N, 4, 0] e) {
            a = MatMul (x, W)
            r = Relu (a)
            y = MatMul (r, A)
            e = MatMul (r, B)
        }""",
        W=n(64, 64, scale=0.1),
        A=n(64, 8, scale=0.1),
        B=np.zeros((64, 0), np.float32),
    )
    feeds = [{"x": n(1, 4, 64, seed=seed)} for seed in range(8)]
    found = qgraph.optimize(model, None, data=feeds, scheme="int8", force=True, **QUIET).report
    assert found.fidelity is not None and set(found.fidelity.outputs) == {"y", "e"}


@pytest.mark.parametrize("wish", [-1.0, 0.0])
def test_a_kernel_that_is_wanted_costs_less_than_nothing(model_kit, wish):
    """Its price was a negative capacity, which no cut knows: the wish was lost, or the total wrong."""
    text = "g (float[4, 64] x) => (float[4, 8] y) { a = MatMul (x, A) y = Sigmoid (a) }"
    model = model_kit.text(text, A=model_kit.normal(64, 8))
    target = registry.target("cpu")
    node = model.graph[0]
    kernel = target.kernel(node, target.scheme("int8"))
    kernel = dataclasses.replace(kernel, float_seconds=1e-9, integer_seconds=1e-9 + wish)
    total, chosen = islands.cheapest(model.graph, {node: kernel}, {node: []}, target)
    cost = target.quantize_cost(node.inputs[0])
    assert chosen == ({node} if wish else set())
    assert total == pytest.approx(min(1e-9, 1e-9 + wish + cost), abs=1e-11)


def test_a_kernel_that_reads_floats_may_read_dequantized_ones(model_kit):
    """The sum of a dynamic kernel is in the runtime's graph as it was planned, whatever made its float input."""
    model = model_kit.text("g (float[2, 4] x) => (float[2, 4] y) { [d] d = Relu (x) [y] y = Add (d, d) }")
    relu, add = model.graph
    usual = Kernel(("Add",), {})
    for form, plain in ((Form.QDQ, True), (Form.DYNAMIC, False), (Form.WEIGHTS, False)):
        add.meta[KERNEL] = dataclasses.replace(usual, form=form)
        plan: Plan = audit.plan_of(model)
        assert (add.name in plan.plain) == plain, form
    assert relu.name in plan.floats
