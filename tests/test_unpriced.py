"""Where estimates see no gain and the clock does, mixtures are looked for with the times that it measured."""

import pytest

from qgraph.trials import Trial, Trials


def trial(saved=0.0, speed=None, strain=2.0, assignment=None, failed="", stored=False):
    given = {"n": "int8"} if assignment is None else assignment
    made = Trial("t", given, 0.1, strain, 30.0, saved, failed=failed, stored=stored)
    made.speed = {"1": 1.4, "2": 1.1} if speed is None else speed
    return made


@pytest.mark.parametrize(
    "others, found",
    [
        ([trial()], "0"),
        ([trial(speed={"1": 1.2, "2": 1.1}), trial()], "1"),
        ([trial(), trial(strain=0.9, saved=1e-6)], None),
        ([trial(), trial(strain=0.9, assignment={}, speed={"1": 1.0})], "0"),
        ([trial(saved=1e-6)], None),
        ([trial(speed={"1": 1.4, "2": 0.9})], None),
        ([trial(speed={"1": 1.02, "2": 1.02})], None),
        ([trial(stored=True)], None),
        ([trial(speed={})], None),
        ([trial(failed="it cannot be had")], None),
        ([], None),
    ],
)
def test_what_the_clock_says_is_faster(others, found):
    """Only where nothing quantized is within the budget, and the estimates would have nothing tried."""
    trials = Trials(None, "")
    for number, one in enumerate(others):
        trials.add(str(number), one)
    assert trials.unpriced() == found
