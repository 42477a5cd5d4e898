"""The clock between candidates, and multiplications that it does not show."""

import dataclasses
from types import SimpleNamespace
from typing import ClassVar

import pytest

from qgraph.race import Race
from qgraph.search import Search
from qgraph.trials import Trials


def test_the_clock_is_not_asked_between_the_same_kernels(lab):
    """Two ways to scale channels give the same kernels: what differs is noise of the clock, and the loss."""
    saved, noise = lab.nodes_of([(1.0, 1e-3), (2.0, 1e-3)])
    search, _, _ = lab.searched(saved, noise, 1.0)
    trials = search.trials.trials
    fast = lab.best_of(search)
    trials["twin"] = dataclasses.replace(fast, name="twin", strain=2 * fast.strain)
    asked = []

    class Clock:
        seconds = 1.0

        def measure(self, runnable):
            asked.append(runnable)
            return []

    class Report:
        notes: ClassVar = []

    keys = [key for key in search.within() if trials[key].assignment]
    assert keys[-1] == "twin" and len(keys) == 2
    best, _ = Race(Clock(), Report()).fastest(search, keys)
    assert best == keys[0] and len(asked) == 1


@pytest.mark.parametrize(
    ("paid", "share", "variant"), [(0.5, 0.5, "explicit"), (2.0, 0.5, "folded"), (0.5, 1, "folded")]
)
def test_multiplications_are_taken_where_no_clock_shows_the_time_and_the_loss_is_less(lab, paid, share, variant):
    search = lab.scaled(paid, share)
    best = lab.best_of(search)
    assert best.variant == variant
    explicit = next(trial for trial in search.trials.trials.values() if trial.variant == "explicit")
    assert explicit.saved == pytest.approx(30 - paid)
    assert explicit.name == "fastest, explicit"


@pytest.mark.parametrize(("paid", "share", "variant"), [(0.7, 0.2, "aside"), (2.0, 0.2, "explicit")])
def test_channels_are_set_aside_where_no_clock_shows_the_time_and_the_loss_is_less(lab, paid, share, variant):
    search = lab.scaled(0.5, 0.5, more={"aside": (paid, share)})
    assert lab.best_of(search).variant == variant
    assert next(trial for trial in search.trials.trials.values() if trial.variant == "aside").name == "fastest, aside"


def test_learned_codes_of_what_only_the_clock_may_like_stand_beside_it(lab):
    saved, noise = lab.nodes_of([(-0.5, 1e-3)])
    builder = lab.Builder(saved)
    builder.calibrated = True
    builder.learning, builder.layers = 1.0, lambda: {("n0", "int8"): -5.0}
    search = Search(builder, lab.Judge(noise, 1.0), list, Trials(None, ""), lab.FOREVER, lambda *_: None)
    search.run()
    found = {trial.learned: trial.saved for trial in search.trials.trials.values() if trial.assignment}
    assert found == {False: 0.0, True: 0.0}


def test_multiplications_are_not_tried_where_nothing_would_be_multiplied_or_ranges_were_asked_for(lab):
    for changes, fixed in ((False, False), (True, True)):
        search = lab.scaled(0.5, 0.5, changes=changes, fixed=fixed)
        assert {trial.variant for trial in search.trials.trials.values() if trial.assignment} == {"folded"}


def test_the_time_of_multiplications_is_kept_with_the_state(lab, tmp_path):
    search = lab.scaled(0.5, 0.5)
    trials = Trials(tmp_path / "state.json", "key")
    for key, trial in search.trials.trials.items():
        trials.add(key, trial)
    again = Search(
        lab.Scaled({("a", "int8"): 10.0}, 0.5),
        lab.Judge({}, 1.0),
        list,
        Trials(tmp_path / "state.json", "key"),
        lab.FOREVER,
        print,
    )
    explicit = next(trial for trial in again.trials.trials.values() if trial.variant == "explicit")
    assert explicit.paid == 0.5
    assert explicit.saved == again._sum(explicit.assignment) - 0.5


@pytest.mark.parametrize(("disk", "chosen"), [(1, "other"), (2, "twin2")])
def test_variants_of_one_assignment_take_no_other_its_turn_at_the_clock(lab, disk, chosen):
    """Unless the other loses more, is larger, and no faster by estimate: then only noise could speak for it."""
    saved, noise = lab.nodes_of([(1.0, 1e-3), (40.0, 1e-3)])
    search, _, _ = lab.searched(saved, noise, 1.0)
    trials = search.trials.trials
    fast = lab.best_of(search)
    for number in range(3):
        trials[f"twin{number}"] = dataclasses.replace(fast, name=f"twin{number}", strain=fast.strain / (2 + number))
    other = dataclasses.replace(
        fast, name="other", assignment={"n1": "int8"}, saved=40.0, strain=2 * fast.strain, disk=disk
    )
    trials["other"] = other
    search.built["other"] = lab.Built(other.assignment)
    for number in range(3):
        search.built[f"twin{number}"] = lab.Built(fast.assignment)

    class Clock:
        seconds = 1.0

        def measure(self, runnable):
            return [SimpleNamespace(threads=1, ratio=3.0 if runnable == other.assignment else 2.0)]

    class Report:
        notes: ClassVar = []

    keys = [key for key in search.within() if trials[key].assignment]
    assert keys.index("other") >= 3
    best, speeds = Race(Clock(), Report()).fastest(search, keys)
    assert best == chosen and speeds[0].ratio == (3.0 if chosen == "other" else 2.0)
