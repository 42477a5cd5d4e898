"""Rules: which kernels come into question for a node, after all that the caller, the runtime and prices say."""

import math

import pytest
from qgraph.passes import Canonicalize

from qgraph.errors import OptionError
from qgraph.graph import ORIGINS
from qgraph.rules import Rules
from qgraph.targets.cpu import x86_vnni


@pytest.fixture
def nodes(model_kit):
    """Two products, an Erf and a table, by name."""
    model = model_kit.text(
        """g (float[4, 128] x, int64[4] i) => (float[4, 128] y, float[4, 8] t) {
            a = MatMul (x, A)
            e = Erf (a)
            y = Gemm (e, B)
            t = Gather (T, i)
        }""",
        A=model_kit.normal(128, 128),
        B=model_kit.normal(128, 128),
        T=model_kit.normal(9, 8),
    )
    Canonicalize()(model)
    for node in model.graph:
        node.name = f"/{node.outputs[0].name}"
    return {node.name: node for node in model.graph}


@pytest.fixture
def rules():
    """Rules of the real CPU target and all its schemes."""
    target = x86_vnni()
    return lambda choices=None, scheme="auto", **more: Rules(target, target.scheme(scheme), choices, **more)


def schemes(rules, node):
    return set(rules.kernels(node)[0])


EVERY = {"int8", "int8-dynamic", "int8-weights"}


def test_without_choices_all_of_the_scheme(nodes, rules):
    assert schemes(rules(), nodes["/a"]) == schemes(rules(), nodes["/y"]) == EVERY
    assert schemes(rules(), nodes["/t"]) == {"int8-weights"}
    found, reason = rules().kernels(nodes["/e"])
    assert not found and reason == "onnxruntime's CPU provider has no integer kernel for Erf"
    assert schemes(rules(scheme="int8-dynamic"), nodes["/a"]) == {"int8-dynamic"}
    assert rules(scheme="fp32").kernels(nodes["/a"]) == ({}, "no scheme was asked for")
    for name, kernel in rules().kernels(nodes["/a"])[0].items():
        assert kernel.scheme == name and kernel.float_seconds > 0


@pytest.mark.parametrize(
    "choices, expected",
    [
        ({"MatMul": "int8-dynamic"}, {"int8-dynamic"}),
        ({"MatMul": "float"}, set()),
        ({"/a": "int8", "MatMul": "float"}, {"int8"}),
        ({"MatMul": "float", "/a": "int8"}, {"int8"}),
        ({"/*": "float", "/a": "int8"}, {"int8"}),
        ({"/a": "int8", "/*": "float"}, set()),
        ({"/?": "int8", "MatMul": "float"}, {"int8"}),
        ({"MatMul": "auto"}, EVERY),
        ({"Gemm": "float"}, EVERY),
        ({"/b": "float", "/[bc]": "float"}, EVERY),
    ],
)
def test_names_go_before_operators_and_later_before_earlier(nodes, rules, choices, expected):
    assert schemes(rules(choices), nodes["/a"]) == expected


def test_a_choice_may_name_a_scheme_that_was_not_asked_for(nodes, rules):
    assert schemes(rules({"/a": "int8-weights"}, scheme="int8"), nodes["/a"]) == {"int8-weights"}
    assert schemes(rules({"/a": "int8-weights"}, scheme="int8"), nodes["/y"]) == {"int8"}


def test_choices_hold_for_what_was_merged_into_a_node(nodes, rules):
    nodes["/y"].meta[ORIGINS] = [("/y/MatMul", "MatMul"), ("/y/Add", "Add")]
    assert schemes(rules({"/y/Add": "float"}), nodes["/y"]) == set()
    assert schemes(rules({"Add": "int8"}), nodes["/y"]) == {"int8"}
    assert schemes(rules({"Add": "float", "/y": "int8"}), nodes["/y"]) == {"int8"}
    used = rules({"/y/*": "float"})
    used.kernels(nodes["/y"])
    used.check_used(nodes.values())


def test_what_is_left_in_float_says_by_which_option(nodes, rules):
    found = rules({"/a*": "float"})
    assert found.kernels(nodes["/a"]) == ({}, "left in float by the option '/a*'")
    assert found.keeps_float(nodes["/a"]) and not found.keeps_float(nodes["/y"])
    assert not rules({"/a": "int8"}).keeps_float(nodes["/a"])


@pytest.mark.parametrize("name, near", [("int9", "int8"), ("int8-dynamc", "int8-dynamic"), ("flat", "float")])
def test_an_unknown_scheme_names_the_nearest(rules, name, near):
    with pytest.raises(OptionError, match=rf"scheme for '/a': '{name}'. Did you mean '{near}'"):
        rules({"/a": name})


@pytest.mark.parametrize("pattern, near", [("/b", ""), ("MatMull", "Did you mean 'MatMul'"), ("/z*", "Known")])
def test_a_pattern_without_effect_names_the_nearest(nodes, rules, pattern, near):
    found = rules({pattern: "float", "Gemm": "float"})
    for node in nodes.values():
        found.kernels(node)
    with pytest.raises(OptionError, match=rf"node or operator to choose for.*{near}"):
        found.check_used(nodes.values())


def test_a_name_that_cannot_be_what_was_chosen_is_an_error_and_a_pattern_is_not(nodes, rules):
    with pytest.raises(OptionError, match=r"Node '/e' cannot be 'int8': .*no integer kernel for Erf"):
        rules({"/e": "int8"}).kernels(nodes["/e"])
    assert schemes(rules({"/*": "int8"}), nodes["/e"]) == set()
    assert schemes(rules({"Erf": "int8"}), nodes["/e"]) == set()


def test_refusals_measurements_and_prices_are_by_node_and_scheme(nodes, rules):
    key = ("/a", "int8")
    refused = rules(refused={key: "it did not fuse"})
    assert schemes(refused, nodes["/a"]) == EVERY - {"int8"} and schemes(refused, nodes["/y"]) == EVERY
    assert refused.kernels(nodes["/a"])[1] == "it did not fuse"
    plain = rules().kernels(nodes["/a"])[0]
    measured = rules(measured={key: (5.0, 3.0)}).kernels(nodes["/a"])[0]
    assert (measured["int8"].float_seconds, measured["int8"].integer_seconds) == (5.0, 3.0)
    assert measured["int8-dynamic"] == plain["int8-dynamic"]
    priced = rules(prices={key: 2.0}).kernels(nodes["/a"])[0]
    assert priced["int8"].integer_seconds == plain["int8"].integer_seconds + 2.0
    assert priced["int8"].float_seconds == plain["int8"].float_seconds
    both = rules(measured={key: (5.0, 3.0)}, prices={key: -1.0}).kernels(nodes["/a"])[0]
    assert both["int8"].integer_seconds == 2.0


def test_an_infinite_price_forbids(nodes, rules):
    forbidden = {("/a", name): math.inf for name in EVERY}
    found, reason = rules(prices=forbidden).kernels(nodes["/a"])
    assert not found and "too little for the accuracy that it loses" in reason
    one = rules(prices={("/a", "int8"): math.inf})
    assert schemes(one, nodes["/a"]) == EVERY - {"int8"}
