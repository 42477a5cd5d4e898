"""Bits per weight: the allocation keeps its size, and nothing within the size on the hulls is better."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qgraph import mixing
from qgraph.errors import OptionError
from qgraph.mixing import Choice
from qgraph.rules import Rules

options = st.lists(
    st.lists(st.tuples(st.integers(1, 40), st.floats(0, 10)), min_size=1, max_size=3), min_size=1, max_size=5
)


def choices(found):
    return {(f"n{i}",): [Choice(f"s{j}", b, n) for j, (b, n) in enumerate(one)] for i, one in enumerate(found)}


@settings(max_examples=200, deadline=None)
@given(options, st.floats(0, 1))
def test_within_the_size_and_next_to_the_best(found, share):
    table = choices(found)
    least = sum(min(c.bits for c in one) for one in table.values())
    most = sum(max(c.bits for c in one) for one in table.values())
    budget = least + share * (most - least)
    chosen = mixing.allocate(table, budget)
    assert chosen.keys() == {name for names in table for name in names}
    picked = [next(c for c in table[names] if c.scheme == chosen[names[0]]) for names in table]
    assert sum(c.bits for c in picked) <= budget + 1e-9
    noise = sum(c.noise for c in picked)
    best = min(
        sum(c.noise for c in one)
        for one in itertools.product(*table.values())
        if sum(c.bits for c in one) <= budget + 1e-9
    )
    # A step that does not fit is all that can be missed.
    widest = max((max(c.noise for c in one) - min(c.noise for c in one) for one in table.values()), default=0.0)
    assert best - 1e-9 <= noise <= best + widest + 1e-9


def test_the_noisiest_weight_per_byte_gets_the_bits():
    table = {
        ("small",): [Choice("int2", 20, 1.0), Choice("int4", 40, 0.1)],
        ("large",): [Choice("int2", 200, 1.0), Choice("int4", 400, 0.1)],
        ("robust",): [Choice("int2", 20, 0.01), Choice("int4", 40, 0.001)],
    }
    assert mixing.allocate(table, 260) == {"small": "int4", "large": "int2", "robust": "int2"}
    assert set(mixing.allocate(table, 480).values()) == {"int4"}


def test_readers_of_one_weight_stay_together():
    table = {("a", "b"): [Choice("int2", 20, 1.0), Choice("int4", 40, 0.1)], ("c",): [Choice("int2", 20, 0.5)]}
    assert mixing.allocate(table, 60) == {"a": "int4", "b": "int4", "c": "int2"}


def test_too_small_a_size_says_what_the_least_is():
    with pytest.raises(OptionError, match=r"take 0\.00 MB"):
        mixing.allocate({("a",): [Choice("int2", 20, 1.0)]}, 10)


def test_bits_are_those_of_the_file(model_kit):
    """Scales and zero points count, and so does what fills the last block up."""
    target = model_kit.free().in_blocks(32)
    model = model_kit.text("g (float[n, 80] x) => (float[n, 24] y) { y = MatMul (x, W) }", W=model_kit.normal(80, 24))
    rules = Rules(target, target.scheme("int4"))
    found, count = mixing.choices(model, rules, {})
    ((choice,),) = found.values()
    assert count == 80 * 24
    assert choice.bits == 24 * 3 * (32 * 4 + 32 + 4)
    assert np.isclose(choice.bits / count, 6.15)
