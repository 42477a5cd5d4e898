"""Islands of integers as the cheapest cut has them, at estimated and at measured costs."""

import itertools

import pytest
from qgraph.passes import Annotate, BiasForm, Canonicalize, FuseLayers, MeasureShapes

from qgraph.data import inputs_of, load
from qgraph.errors import NothingQuantizedError
from qgraph.targets import ABSORBED, KERNEL
from qgraph.targets.cpu import x86_vnni


def test_float_operator_in_the_middle_makes_two_islands(model_kit, specs, annotated, chain):
    assert annotated(chain) == {"a", "b", "c", "y"}
    assert specs(chain) == {"x", "a", "b", "t", "c", "y"}
    assert "no integer kernel for Erf" in model_kit.reasons(chain)["t"]


def test_island_that_costs_more_at_its_edges_stays_in_float(model_kit, priced, annotated, chain):
    # First island: gains 16, pays 2. Second: gains 1, pays 2.
    assert annotated(chain, priced({"c": (10, 9.5), "y": (10, 9.5)})) == {"a", "b"}
    assert "the way in and out costs" in model_kit.reasons(chain)["c"]


def test_edges_are_paid_once_for_the_island(priced, annotated, chain):
    # Each gains 1.8 and two crossings of 1 are to be paid: together they pay, alone they would not.
    assert annotated(chain, priced(dict.fromkeys("abcy", (10, 8.2)))) == {"a", "b", "c", "y"}


def test_all_islands_too_dear_is_an_error_with_reasons(priced, annotated, chain):
    with pytest.raises(NothingQuantizedError, match=r"'int8'.*'priced'.*4 x Conv.*1 x Erf: .*no integer kernel"):
        annotated(chain, priced(dict.fromkeys("abcy", (10, 9.5))))


def test_slower_kernel_stays_in_float_and_says_so(model_kit, priced, annotated, chain):
    assert annotated(chain, priced({"a": (10, 20)})) == {"b", "c", "y"}
    assert "slower" in model_kit.reasons(chain)["a"]


def test_slower_kernel_joins_where_leaving_costs_more(priced, annotated, chain):
    # `a` loses 1 against the crossing of `x` and its own: both are paid by `b` anyway, so `a` leaves...
    assert annotated(chain.clone(), priced({"a": (10, 11)})) == {"b", "c", "y"}
    # ...but in the middle of an island a loss of 1 is less than two crossings.
    Canonicalize()(chain)
    erf = chain.graph[2]
    erf.outputs[0].replace_all_uses_with(erf.inputs[0])
    chain.graph.remove(erf, safe=True)
    assert annotated(chain.clone(), priced({"b": (10, 11)})) == {"a", "b", "c", "y"}
    assert annotated(chain, priced({"b": (10, 13)})) == {"a", "c", "y"}


def test_residual_block_is_one_island(model_kit, priced, specs, groups, annotated, residual):
    times = {"p": (10, 10.5)}
    # The Add alone loses 0.5, but would cost three crossings in float.
    assert annotated(residual, priced(times)) == {"s", "a", "b", "p"}
    assert specs(residual) == {"x", "r", "ar", "b", "y"}
    absorbed = {node.name: node.meta[ABSORBED] for node in residual.graph if ABSORBED in node.meta}
    assert absorbed == {"r": "s", "ar": "a", "y": "p"}
    assert not groups(residual)


def test_add_that_loses_more_than_its_edges_leaves(priced, annotated, residual):
    assert annotated(residual, priced({"p": (10, 14)})) == {"s", "a", "b"}


def test_stem_that_loses_is_left_out_and_its_result_is_quantized(model_kit, priced, specs, annotated, residual):
    assert annotated(residual, priced({"s": (10, 20)})) == {"a", "b", "p"}
    assert specs(residual) == {"r", "ar", "b", "y"}
    assert model_kit.reasons(residual)["r"] == "onnxruntime's CPU provider has no integer kernel for Relu"


def test_cut_is_the_cheapest_of_all(priced, annotated, residual):
    """Against every subset of the nodes, with costs counted by hand."""
    times = {"s": (5, 6), "a": (9, 4), "b": (4, 3.5), "p": (2, 2.5)}
    found = annotated(residual, priced(times, crossing=0.8))

    def cost(chosen):
        total = sum(times[node][node in chosen] for node in times)
        makers = {"r": "s", "ar": "a", "b": "b", "y": "p"}
        readers = {"x": {"s"}, "r": {"a", "p"}, "ar": {"b"}, "b": {"p"}, "y": {"caller"}}
        for name, who in readers.items():
            made = makers.get(name) in chosen
            if not made and who & chosen:
                total += 0.8
            if made and who - chosen:
                total += 0.8
        return total

    best = min((frozenset(c) for k in range(5) for c in itertools.combinations(times, k)), key=cost)
    assert found == best


def test_depthwise_between_two_layers(model_kit, priced, annotated):
    n = model_kit.normal
    text = """g (float[1, 8, 8, 8] x) => (float[1, 8, 8, 8] y) {
        a = Conv <pads = [0, 0, 0, 0]> (x, A)
        d = Conv <pads = [1, 1, 1, 1], group = 8> (a, D)
        y = Conv (d, C)
    }"""
    weights = {"A": n(8, 8, 1, 1), "D": n(8, 1, 3, 3), "C": n(8, 8, 1, 1, seed=1)}
    assert annotated(model_kit.text(text, **weights), priced({"d": (10, 11.5)})) == {"a", "d", "y"}
    assert annotated(model_kit.text(text, **weights), priced({"d": (10, 12.5)})) == {"a", "y"}


def test_real_costs_take_a_wide_block_and_leave_a_thin_stem(model_kit, annotated):
    n = model_kit.normal
    model = model_kit.text(
        """g (float[1, 3, 56, 56] x) => (float[1, 64, 28, 28] y) {
            stem = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (x, S)
            r = Relu (stem)
            a = Conv <pads = [1, 1, 1, 1]> (r, A)
            ra = Relu (a)
            b = Conv <pads = [1, 1, 1, 1]> (ra, B)
            rb = Relu (b)
            y = Conv <pads = [1, 1, 1, 1]> (rb, C)
        }""",
        S=n(64, 3, 3, 3),
        A=n(64, 64, 3, 3),
        B=n(64, 64, 3, 3, seed=1),
        C=n(64, 64, 3, 3, seed=2),
    )
    assert annotated(model, x86_vnni()) >= {"a", "b", "y"}


def test_measured_times_replace_the_estimates(model_kit, priced, chain):
    Canonicalize()(chain)
    for node in chain.graph:
        node.name = node.outputs[0].name
    target = priced()
    times = {("a", "int8"): (1.0, 30.0), ("b", "int8-dynamic"): (1.0, 30.0)}
    Annotate(target, target.scheme("int8"), measured=times)(chain)
    assert {node.name for node in chain.graph if KERNEL in node.meta} == {"b", "c", "y"}


def test_a_last_layer_is_spared_where_that_costs_little(model_kit, priced, annotated):
    n = model_kit.normal
    model = model_kit.text(
        """g (float[1, 8, 8, 8] x) => (float[1, 4, 8, 8] y) {
            a = Conv <pads = [1, 1, 1, 1]> (x, A)
            b = Conv <pads = [1, 1, 1, 1]> (a, B)
            y = Conv <pads = [1, 1, 1, 1]> (b, C)
        }""",
        A=n(8, 8, 3, 3),
        B=n(8, 8, 3, 3, seed=1),
        C=n(4, 8, 3, 3),
    )
    assert annotated(model.clone(), priced({"y": (10, 2)})) == {"a", "b", "y"}
    # Gains 0.1 of about 8.
    after = model.clone()
    assert annotated(after, priced({"y": (2.1, 2)})) == {"a", "b"}
    assert "a last layer" in model_kit.reasons(after)["y"]


def test_costs_with_dynamic_shapes_rest_on_the_run(model_kit):
    n = model_kit.normal

    def plan(rows):
        model = model_kit.text(
            """g (float[n, 256] x) => (float[n, 256] y) { h = MatMul (x, W)  r = Relu (h)  y = MatMul (r, V) }""",
            W=n(256, 256),
            V=n(256, 256, seed=1),
        )
        Canonicalize()(model)
        if rows is not None:
            MeasureShapes(load([{"x": n(rows, 256)}], inputs_of(model)))(model)
        target = x86_vnni()
        Annotate(target, target.scheme("int8"))(model)
        return [node.meta[KERNEL] for node in model.graph if KERNEL in node.meta]

    few, many = plan(8), plan(512)
    assert len(few) == len(many) == 2
    assert many[0].float_seconds > 20 * few[0].float_seconds
    assert plan(None), "without data a guess must do"


def test_empty_and_weightless_graphs(priced, model_kit):
    target = priced()
    for text in (
        "g (float[2] x) => (float[2] y) { y = Erf (x) }",
        "g (float[2] x) => (float[2] x) { }",
    ):
        model = model_kit.text(text)
        with pytest.raises(NothingQuantizedError):
            Annotate(target, target.scheme("int8"))(model)


def test_after_fusion_the_whole_preparation(model_kit, specs, annotated):
    n = model_kit.normal
    model = model_kit.text(
        """g (float[1, 8, 16] x) => (float[1, 8, 16] y) {
            h = MatMul (x, W)
            a = Add (h, b)
            r = Relu (a)
            k = MatMul (r, V)
            y = Add (k, c)
        }""",
        W=n(16, 16),
        V=n(16, 16, seed=1),
        b=n(16),
        c=n(16, seed=1),
    )
    for one in (Canonicalize(), FuseLayers(), BiasForm()):
        one(model)
    assert annotated(model) == {"h", "k"}
    assert specs(model) == {"x", "r"}
