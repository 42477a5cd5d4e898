"""Annotate: islands as the cheapest cut has them, parameters shared where codes only move, a reason for the rest."""

import dataclasses
import itertools

import numpy as np
import onnx_ir as ir
import pytest
from qgraph.passes import Annotate, BiasForm, Canonicalize, FuseLayers, MeasureShapes
from qgraph.passes.annotate import GROUP

from qgraph.data import inputs_of, load
from qgraph.errors import NothingQuantizedError, OptionError
from qgraph.formats import INT8, UINT8
from qgraph.graph import ORIGINS
from qgraph.targets import ABSORBED, KERNEL, REASON, SPEC, Output, Refusal
from qgraph.targets.cpu import Cpu, x86_vnni


class Priced(Cpu):
    """The CPU's kernels at given times: node -> (float, integer), (10, 2) where not given; crossings cost the same."""

    def __init__(self, times=None, crossing=1.0):
        super().__init__("priced", "tests: given costs", UINT8, INT8)
        self.times, self.crossing = times or {}, crossing

    def kernel(self, node, scheme):
        found = super().kernel(node, scheme)
        if isinstance(found, Refusal):
            return found
        in_float, in_integers = self.times.get(node.name, (10.0, 2.0))
        return dataclasses.replace(found, float_seconds=in_float, integer_seconds=in_integers)

    def quantize_cost(self, value):
        return self.crossing

    def dequantize_cost(self, value):
        return self.crossing


@pytest.fixture
def annotated(model_kit):
    """Canonicalizes, names nodes after their first outputs, annotates; returns the names of the integer nodes."""

    def apply(model, target=None, keep_float=(), **options):
        Canonicalize()(model)
        for node in model.graph:
            node.name = node.outputs[0].name
        before = ir.to_proto(model)
        target = target or Priced()
        Annotate(target, target.scheme("int8"), keep_float, **options)(model)
        assert ir.to_proto(model) == before, "only meta may be written"
        for node in model.graph:
            assert (KERNEL in node.meta) != (REASON in node.meta), node.name
        return {node.name for node in model.graph if KERNEL in node.meta}

    return apply


def value(model, name):
    return next(v for v in [*model.graph.inputs, *(v for node in model.graph for v in node.outputs)] if v.name == name)


def specs(model):
    values = [*model.graph.inputs, *(v for node in model.graph for v in node.outputs)]
    return {v.name for v in values if SPEC in v.meta}


def groups(model):
    found = {}
    for v in [*model.graph.inputs, *(v for node in model.graph for v in node.outputs)]:
        if GROUP in v.meta:
            found.setdefault(v.meta[GROUP], set()).add(v.name)
    return sorted(sorted(names) for names in found.values() if len(names) > 1)


@pytest.fixture
def chain(model_kit):
    """Two convolutions, an operator that only exists in float, and two more."""
    n = model_kit.normal
    return model_kit.text(
        """g (float[1, 4, 8, 8] x) => (float[1, 4, 8, 8] y) {
            a = Conv <pads = [1, 1, 1, 1]> (x, A)
            b = Conv <pads = [1, 1, 1, 1]> (a, B)
            t = Erf (b)
            c = Conv <pads = [1, 1, 1, 1]> (t, C)
            y = Conv <pads = [1, 1, 1, 1]> (c, D)
        }""",
        **{name: n(4, 4, 3, 3, seed=i) for i, name in enumerate("ABCD")},
    )


def test_float_operator_in_the_middle_makes_two_islands(model_kit, annotated, chain):
    assert annotated(chain) == {"a", "b", "c", "y"}
    assert specs(chain) == {"x", "a", "b", "t", "c", "y"}
    assert "no integer kernel for Erf" in model_kit.reasons(chain)["t"]


def test_island_that_costs_more_at_its_edges_stays_in_float(model_kit, annotated, chain):
    # First island: gains 16, pays 2. Second: gains 1, pays 2.
    assert annotated(chain, Priced({"c": (10, 9.5), "y": (10, 9.5)})) == {"a", "b"}
    assert "the way in and out costs" in model_kit.reasons(chain)["c"]


def test_edges_are_paid_once_for_the_island(annotated, chain):
    # Each gains 1.8 and two crossings of 1 are to be paid: together they pay, alone they would not.
    assert annotated(chain, Priced(dict.fromkeys("abcy", (10, 8.2)))) == {"a", "b", "c", "y"}


def test_all_islands_too_dear_is_an_error_with_reasons(annotated, chain):
    with pytest.raises(NothingQuantizedError, match=r"'int8'.*'priced'.*4 x Conv.*1 x Erf: .*no integer kernel"):
        annotated(chain, Priced(dict.fromkeys("abcy", (10, 9.5))))


def test_slower_kernel_stays_in_float_and_says_so(model_kit, annotated, chain):
    assert annotated(chain, Priced({"a": (10, 20)})) == {"b", "c", "y"}
    assert "slower" in model_kit.reasons(chain)["a"]


def test_slower_kernel_joins_where_leaving_costs_more(annotated, chain):
    # `a` loses 1 against the crossing of `x` and its own: both are paid by `b` anyway, so `a` leaves...
    assert annotated(chain.clone(), Priced({"a": (10, 11)})) == {"b", "c", "y"}
    # ...but in the middle of an island a loss of 1 is less than two crossings.
    Canonicalize()(chain)
    erf = chain.graph[2]
    erf.outputs[0].replace_all_uses_with(erf.inputs[0])
    chain.graph.remove(erf, safe=True)
    assert annotated(chain.clone(), Priced({"b": (10, 11)})) == {"a", "b", "c", "y"}
    assert annotated(chain, Priced({"b": (10, 13)})) == {"a", "c", "y"}


@pytest.fixture
def residual(model_kit):
    n = model_kit.normal
    return model_kit.text(
        """g (float[1, 4, 8, 8] x) => (float[1, 4, 8, 8] y) {
            s = Conv <pads = [1, 1, 1, 1]> (x, A)
            r = Relu (s)
            a = Conv <pads = [1, 1, 1, 1]> (r, B)
            ar = Relu (a)
            b = Conv <pads = [1, 1, 1, 1]> (ar, C)
            p = Add (b, r)
            y = Relu (p)
        }""",
        **{name: n(4, 4, 3, 3, seed=i) for i, name in enumerate("ABC")},
    )


def test_residual_block_is_one_island(model_kit, annotated, residual):
    times = {"p": (10, 10.5)}
    # The Add alone loses 0.5, but would cost three crossings in float.
    assert annotated(residual, Priced(times)) == {"s", "a", "b", "p"}
    assert specs(residual) == {"x", "r", "ar", "b", "y"}
    absorbed = {node.name: node.meta[ABSORBED] for node in residual.graph if ABSORBED in node.meta}
    assert absorbed == {"r": "s", "ar": "a", "y": "p"}
    assert not groups(residual)


def test_add_that_loses_more_than_its_edges_leaves(annotated, residual):
    assert annotated(residual, Priced({"p": (10, 14)})) == {"s", "a", "b"}


def test_stem_that_loses_is_left_out_and_its_result_is_quantized(model_kit, annotated, residual):
    assert annotated(residual, Priced({"s": (10, 20)})) == {"a", "b", "p"}
    assert specs(residual) == {"r", "ar", "b", "y"}
    assert model_kit.reasons(residual)["r"] == "onnxruntime's CPU provider has no integer kernel for Relu"


def test_cut_is_the_cheapest_of_all(annotated, residual):
    """Against every subset of the nodes, with costs counted by hand."""
    times = {"s": (5, 6), "a": (9, 4), "b": (4, 3.5), "p": (2, 2.5)}
    found = annotated(residual, Priced(times, crossing=0.8))

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


def test_depthwise_between_two_layers(model_kit, annotated):
    n = model_kit.normal
    text = """g (float[1, 8, 8, 8] x) => (float[1, 8, 8, 8] y) {
        a = Conv <pads = [0, 0, 0, 0]> (x, A)
        d = Conv <pads = [1, 1, 1, 1], group = 8> (a, D)
        y = Conv (d, C)
    }"""
    weights = {"A": n(8, 8, 1, 1), "D": n(8, 1, 3, 3), "C": n(8, 8, 1, 1, seed=1)}
    assert annotated(model_kit.text(text, **weights), Priced({"d": (10, 11.5)})) == {"a", "d", "y"}
    assert annotated(model_kit.text(text, **weights), Priced({"d": (10, 12.5)})) == {"a", "y"}


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


def test_movers_share_the_parameters_of_what_they_move(model_kit, annotated):
    n = model_kit.normal
    model = model_kit.text(
        """g (float[1, 4, 8, 8] x) => (float[1, 4, 8, 8] y) {
            a = Conv <pads = [1, 1, 1, 1]> (x, A)
            t = Transpose <perm = [0, 1, 3, 2]> (a)
            r = Reshape (t, shape)
            y = Conv <pads = [1, 1, 1, 1]> (r, B)
        }""",
        A=n(4, 4, 3, 3),
        B=n(4, 4, 3, 3),
        shape=[1, 4, 8, 8],
    )
    assert annotated(model) == {"a", "t", "r", "y"}
    assert groups(model) == [["a", "r", "t"]]


def test_inputs_of_concat_share(model_kit, annotated):
    n = model_kit.normal
    model = model_kit.text(
        """g (float[1, 4, 8, 8] x) => (float[1, 8, 8, 8] y, float[1, 8, 8, 8] z) {
            a = Conv <pads = [1, 1, 1, 1]> (x, A)
            b = Conv <pads = [1, 1, 1, 1]> (x, B)
            y = Concat <axis = 1> (a, b)
            z = Concat <axis = 1> (b, x)
        }""",
        A=n(4, 4, 3, 3),
        B=n(4, 4, 3, 3),
    )
    assert annotated(model) == {"a", "b", "y", "z"}
    assert groups(model) == [["a", "b", "x", "y", "z"]]


def test_outputs_of_split_share(model_kit, annotated):
    n = model_kit.normal
    model = model_kit.text(
        """g (float[1, 4, 8, 8] x) => (float[1, 2, 8, 8] y, float[1, 2, 8, 8] p) {
            a = Conv <pads = [1, 1, 1, 1]> (x, A)
            p, q = Split <axis = 1, num_outputs = 2> (a)
            y = Conv <pads = [1, 1, 1, 1]> (q, B)
        }""",
        A=n(4, 4, 3, 3),
        B=n(2, 2, 3, 3),
    )
    assert annotated(model) == {"a", "p", "y"}
    assert groups(model) == [["a", "p", "q"]]


def test_movers_of_floats_alone_stay(model_kit, annotated):
    n = model_kit.normal
    model = model_kit.text(
        """g (float[2, 16] x) => (float[4, 4] y) {
            t = Transpose (x)
            e = Erf (t)
            r = Reshape (e, shape)
            y = MatMul (r, W)
        }""",
        shape=[4, 8],
        W=n(8, 4),
    )
    assert annotated(model, Priced({"t": (1, 0.5), "r": (1, 1.2)})) == {"y"}


@pytest.mark.parametrize("pattern", ["b", "b*", "?"])
def test_keep_float(model_kit, annotated, chain, pattern):
    if pattern == "?":
        with pytest.raises(NothingQuantizedError, match=r"left in float by the option '\?'"):
            annotated(chain, keep_float=(pattern,))
        return
    assert annotated(chain, keep_float=(pattern,)) == {"a", "c", "y"}
    assert model_kit.reasons(chain)["b"] == f"left in float by the option {pattern!r}"


def test_keep_float_of_an_operator_and_of_a_name_with_brackets(model_kit, annotated, chain):
    with pytest.raises(NothingQuantizedError):
        annotated(chain.clone(), keep_float=("Conv",))
    Canonicalize()(chain)
    for node in chain.graph:
        node.name = f"/layers[0]/{node.outputs[0].name}"
    target = Priced()
    Annotate(target, target.scheme("int8"), ("/layers[0]/b",))(chain)
    assert [node.name for node in chain.graph if KERNEL in node.meta] == [f"/layers[0]/{c}" for c in "acy"]


def test_keep_float_of_a_node_that_was_merged_into_another(model_kit, annotated):
    n = model_kit.normal
    model = model_kit.text(
        """g (float[1, 4, 8, 8] x) => (float[1, 4, 8, 8] y) {
            c = Conv <pads = [1, 1, 1, 1]> (x, A)
            b = BatchNormalization (c, s, t, m, v)
            y = Conv <pads = [1, 1, 1, 1]> (b, B)
        }""",
        A=n(4, 4, 3, 3),
        B=n(4, 4, 3, 3, seed=1),
        **{name: np.ones(4, np.float32) for name in "stmv"},
    )
    for node in model.graph:
        node.name = f"/net/{node.op_type}/{node.outputs[0].name}"
    Canonicalize()(model)
    FuseLayers()(model)
    assert ("/net/BatchNormalization/b", "BatchNormalization") in model.graph[0].meta[ORIGINS]
    for pattern in ("/net/BatchNormalization/b", "*/b", "BatchNormalization"):
        assert annotated(model.clone(), keep_float=(pattern,)) == {"y"}, pattern


@pytest.mark.parametrize(
    "pattern, near", [("Cov", "Conv"), ("none*", "There are|Known"), ("BatchNormalization", "Known")]
)
def test_keep_float_without_effect_is_an_error(annotated, chain, pattern, near):
    with pytest.raises(OptionError, match=rf"node or operator to choose for.*{pattern[:3]}.*({near})"):
        annotated(chain, keep_float=("b", pattern))


def test_keep_float_in_a_body_has_an_effect(model_kit, annotated):
    n = model_kit.normal
    model = model_kit.text(
        """g (float[2, 8] x, bool f) => (float[2, 8] y) {
            a = MatMul (x, W)
            y = If (f) <
                then_branch = t () => (float[2, 8] u) { u = Elu (a) },
                else_branch = e () => (float[2, 8] v) { v = Neg (a) }
            >
        }""",
        W=n(8, 8),
    )
    assert annotated(model, keep_float=("Elu",)) == {"a"}


def test_kept_relu_is_not_absorbed(model_kit, annotated, residual):
    assert annotated(residual, keep_float=("ar",)) == {"s", "a", "b", "p"}
    assert {node.name for node in residual.graph if ABSORBED in node.meta} == {"r", "y"}
    assert model_kit.reasons(residual)["ar"] == "left in float by the option 'ar'"
    assert {"a", "ar"} <= specs(residual), "quantized before it and after it"


def test_refused_nodes_keep_the_reason_they_were_given(model_kit, annotated, chain):
    refused = {("b", "int8"): "the runtime did not like it", ("nobody", "int8"): "..."}
    assert annotated(chain, refused=refused) == {"a", "c", "y"}
    assert model_kit.reasons(chain)["b"] == "the runtime did not like it"


def test_what_is_refused_in_one_scheme_may_run_in_another(model_kit, annotated, chain):
    assert annotated(chain, refused={("b", "int8-dynamic"): "..."}) == {"a", "b", "c", "y"}


@pytest.mark.parametrize("layer", ["MatMul (x, W)", "Gemm (x, W, b)"])
@pytest.mark.parametrize(
    "follower, keep, absorbed",
    [
        ("Relu (h)", (), True),
        ("Clip (h, zero, six)", (), True),
        ("Clip (h, one, six)", (), False),
        ("Clip (h, zero, top)", (), False),
        ("Gelu (h)", (), False),
        ("Relu (h)", ("r",), False),
    ],
)
def test_product_before_an_absorbable_activation_ends_in_integers(
    model_kit, annotated, layer, follower, keep, absorbed
):
    n = model_kit.normal
    constants = {"zero": 0, "one": 1, "six": 6}
    model = model_kit.text(
        f"g (float[4, 16] x, float top) => (float[4, 16] y) {{ h = {layer}  r = {follower}  y = Erf (r) }}",
        W=n(16, 16),
        **({"b": n(16)} if "b" in layer else {}),
        **{name: np.array(v, np.float32) for name, v in constants.items() if name in follower},
    )
    assert annotated(model, keep_float=keep) == {"h"}
    kernel = model.graph[0].meta[KERNEL]
    assert kernel.output is (Output.QUANTIZED if absorbed else Output.FLOAT)
    assert (ABSORBED in model.graph[1].meta) == absorbed
    assert specs(model) == ({"x", "r"} if absorbed else {"x"})
    assert absorbed == (kernel.result is not None)


def test_product_before_an_activation_that_is_not_its_only_reader_writes_float(model_kit, annotated):
    n = model_kit.normal
    model = model_kit.text(
        "g (float[4, 16] x) => (float[4, 16] y, float[4, 16] r) { h = MatMul (x, W)  r = Relu (h)  y = Erf (h) }",
        W=n(16, 16),
    )
    assert annotated(model) == {"h"}
    assert model.graph[0].meta[KERNEL].output is Output.FLOAT
    assert specs(model) == {"x"}


@pytest.mark.parametrize(
    "first, second, shared",
    [("Relu (a)", "Relu (b)", True), ("Relu (a)", "Neg (b)", False), ("Relu (a)", "Clip (b, zero, six)", False)],
)
def test_inputs_of_concat_share_only_if_their_bounds_are_the_same(model_kit, annotated, first, second, shared):
    n = model_kit.normal
    model = model_kit.text(
        f"""g (float[1, 4, 8, 8] x) => (float[1, 8, 8, 8] y) {{
            a = Conv <pads = [1, 1, 1, 1]> (x, A)
            b = Conv <pads = [1, 1, 1, 1]> (x, B)
            r = {first}
            s = {second}
            y = Concat <axis = 1> (r, s)
        }}""",
        A=n(4, 4, 3, 3),
        B=n(4, 4, 3, 3, seed=1),
        **{name: np.array(v, np.float32) for name, v in {"zero": 0, "six": 6}.items() if name in second},
    )
    assert annotated(model) == {"a", "b", "y"}
    assert groups(model) == ([["r", "s", "y"]] if shared else [])


def test_concat_absorbs_nothing(model_kit, annotated):
    n = model_kit.normal
    model = model_kit.text(
        """g (float[1, 4, 8, 8] x) => (float[1, 8, 8, 8] y) {
            a = Conv <pads = [1, 1, 1, 1]> (x, A)
            b = Conv <pads = [1, 1, 1, 1]> (x, B)
            c = Concat <axis = 1> (a, b)
            y = Relu (c)
        }""",
        A=n(4, 4, 3, 3),
        B=n(4, 4, 3, 3, seed=1),
    )
    assert annotated(model) == {"a", "b", "c"}
    assert not [node for node in model.graph if ABSORBED in node.meta]
    assert groups(model) == [["a", "b", "c"]]


def test_measured_times_replace_the_estimates(model_kit, chain):
    Canonicalize()(chain)
    for node in chain.graph:
        node.name = node.outputs[0].name
    target = Priced()
    times = {("a", "int8"): (1.0, 30.0), ("b", "int8-dynamic"): (1.0, 30.0)}
    Annotate(target, target.scheme("int8"), measured=times)(chain)
    assert {node.name for node in chain.graph if KERNEL in node.meta} == {"b", "c", "y"}


def test_relu_read_in_a_body_or_bounds_computed_are_not_absorbed(model_kit, annotated):
    n = model_kit.normal
    model = model_kit.text(
        """g (float[1, 4, 8, 8] x, bool f, float top) => (float[1, 4, 8, 8] y, float[1, 4, 8, 8] k) {
            a = Conv <pads = [1, 1, 1, 1]> (x, A)
            y = If (f) <
                then_branch = t () => (float[1, 4, 8, 8] u) { u = Relu (a) },
                else_branch = e () => (float[1, 4, 8, 8] v) { v = Neg (a) }
            >
            b = Conv <pads = [1, 1, 1, 1]> (x, B)
            k = Clip (b, , top)
        }""",
        A=n(4, 4, 3, 3),
        B=n(4, 4, 3, 3),
    )
    assert annotated(model) == {"a", "b"}
    assert specs(model) == {"x", "a", "b"}


@pytest.mark.parametrize(
    "text, reason",
    [
        ("t = Conv (C, W4)", "'C' is a constant"),
        ("t = Conv (d, W4)", "'d' is a constant or has a default"),
        ("t = Gemm (M, W)", "'M' is a constant"),
        ("t = MatMul (W, x)", "the weight is on the left"),
        ("t = MatMul (x, x)", "product of two activations"),
        ("t = Add (x, M)", "one side is a constant"),
        ("t = Sigmoid (M)", "'M' is a constant"),
        ("t = Transpose (M)", "'M' is a constant"),
        ("t = Concat <axis = 0> (x, M)", "'M' is a constant"),
        ("t = Gemm (x, W, col)", "one number per column"),
        ("t, u = Split <axis = 0, num_outputs = 2> (x)", "only when all its outputs are read"),
        ("t = Softmax (x)", "integer Softmax is several times slower"),
    ],
)
def test_reasons_of_refused_forms(model_kit, text, reason):
    n = model_kit.normal
    known = {"C": n(1, 4, 8, 8), "d": n(1, 4, 8, 8), "W4": n(4, 4, 3, 3), "M": n(8, 8), "W": n(8, 8), "col": n(8, 1)}
    used = {k: v for k, v in known.items() if k in text.replace("Conv", "").replace("Concat", "").replace("MatMul", "")}
    model = model_kit.text(
        f"g (float[8, 8] x) => (float[8, 8] y) {{ y = MatMul (x, V)  {text} }}", V=n(8, 8, seed=1), **used
    )
    if "d" in used and "(d" in text:
        model.graph.inputs.append(model.graph.initializers["d"])
    # Not canonicalized: constants would be folded, the unread node would go.
    ir.passes.common.ShapeInferencePass()(model)
    target = Priced()
    Annotate(target, target.scheme("int8"))(model)
    assert reason in model.graph[1].meta[REASON]


def test_a_last_layer_is_spared_where_that_costs_little(model_kit, annotated):
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
    assert annotated(model.clone(), Priced({"y": (10, 2)})) == {"a", "b", "y"}
    # Gains 0.1 of about 8.
    after = model.clone()
    assert annotated(after, Priced({"y": (2.1, 2)})) == {"a", "b"}
    assert "a last layer" in model_kit.reasons(after)["y"]


@pytest.mark.parametrize("operator, reason", [("MatMul (h, V)", "float16"), ("Erf (h)", "no integer kernel for Erf")])
def test_reasons(model_kit, operator, reason):
    n = model_kit.normal
    model = model_kit.text(
        f"""g (float[2, 8] x) => (float16[2, 8] y) {{
            a = MatMul (x, W)
            h = Cast <to = 10> (a)
            y = {operator}
        }}""",
        W=n(8, 8),
        **({"V": n(8, 8).astype("float16")} if "V" in operator else {}),
    )
    Canonicalize()(model)
    target = Priced()
    Annotate(target, target.scheme("int8"))(model)
    assert reason in model.graph[2].meta[REASON]


def test_layers_in_bodies_have_a_reason(model_kit, annotated):
    n = model_kit.normal
    model = model_kit.text(
        """g (float[2, 8] x, bool f) => (float[2, 8] y) {
            a = MatMul (x, W)
            y = If (f) <
                then_branch = t () => (float[2, 8] u) { u = MatMul (a, W) },
                else_branch = e () => (float[2, 8] v) { v = Neg (a) }
            >
        }""",
        W=n(8, 8),
    )
    annotated(model)
    inner = model.graph[1].attributes["then_branch"].as_graph()[0]
    assert "inside a body" in inner.meta[REASON]


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


def test_empty_and_weightless_graphs(model_kit):
    target = Priced()
    for text in (
        "g (float[2] x) => (float[2] y) { y = Erf (x) }",
        "g (float[2] x) => (float[2] x) { }",
    ):
        model = model_kit.text(text)
        with pytest.raises(NothingQuantizedError):
            Annotate(target, target.scheme("int8"))(model)


def test_after_fusion_the_whole_preparation(model_kit, annotated):
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
