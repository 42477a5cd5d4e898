"""Data split in two: disjoint, complete, and the same in any order."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from qgraph.data import Batch, InputSpec, load

F32 = np.dtype(np.float32)
ONE = [InputSpec("x", F32, (None, 3))]


@settings(max_examples=40)
@given(
    st.integers(4, 30),
    st.integers(0, 5),
    st.floats(0.01, 0.6),
    st.sampled_from([np.float32, np.float64]),
    st.randoms(use_true_random=False),
)
def test_a_split_is_disjoint_complete_and_independent_of_order(array, contents, count, twins, share, kind, random):
    rows = [{"x": array(1, 3, seed=n).astype(kind)} for n in range(count)]
    rows += [dict(rows[n % count]) for n in range(twins)]
    rest, held = load(rows, ONE).split(share)
    assert held is not None
    one, other = contents(rest), contents(held)
    assert not set(one) & set(other)
    assert sorted(one + other) == sorted(contents(load(rows, ONE)))
    assert len(set(other)) == max(1, round(share * count))
    random.shuffle(rows)
    again, held_again = load(rows, ONE).split(share)
    assert sorted(contents(again)) == sorted(one) and sorted(contents(held_again)) == sorted(other)
    assert load(rows, ONE).first().digest == load(rows[::-1], ONE).first().digest


def test_too_few_batches_are_not_split(array):
    rows = [{"x": array(1, 3, seed=n)} for n in range(3)]
    data = load(rows * 3, ONE)
    rest, held = data.split(0.3)
    assert rest is data and held is None
    assert load([*rows, {"x": array(1, 3, seed=9)}], ONE).split(0.3)[1] is not None


def test_a_part_can_be_split_again(array, contents):
    data = load([{"x": array(1, 3, seed=n)} for n in range(20)], ONE)
    rest, held = data.split(0.5)
    parts = [*rest.split(0.3), *held.split(0.3)]
    found = [key for part in parts for key in contents(part)]
    assert sorted(found) == sorted(contents(data))


def test_parts_of_a_generator(array, contents):
    rows = [{"x": array(1, 3, seed=n)} for n in range(8)]
    rest, held = load(iter(rows), ONE).split(0.25)
    assert (rest.count(), held.count()) == (6, 2)
    assert sorted(contents(rest) + contents(held)) == sorted(row["x"].tobytes() for row in rows)


def test_the_digest_is_of_contents_alone(array):
    one = Batch("a", {"x": array(1, 4), "y": array(2, 2)})
    assert one.digest == Batch("b", {"y": array(2, 2), "x": array(1, 4)}).digest
    assert one.digest != Batch("a", {"x": array(1, 4), "y": array(2, 2) + 1}).digest
    assert Batch("a", {"x": array(2, 2)}).digest != Batch("a", {"x": array(2, 2).reshape(4, 1)}).digest
    assert Batch("a", {"x": array(2, 2)}).digest != Batch("a", {"z": array(2, 2)}).digest
