"""The search on made-up nodes: what it tries, in which order, and what it takes."""

import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qgraph.errors import ExecutionError
from qgraph.search import Search
from qgraph.sensitivity import Estimate
from qgraph.trials import Trial, Trials

POSITIVE = st.floats(1e-6, 1.0)
NODES = st.lists(st.tuples(POSITIVE, st.floats(1e-6, 1e-2)), min_size=1, max_size=12)


@given(NODES, st.floats(0.01, 1.5))
def test_finds_about_the_best_that_prices_can_find(lab, pairs, share):
    """Of nodes in the order of saving per noise, it takes nearly as many as the budget holds, and never more."""
    saved, noise = lab.nodes_of(pairs)
    limit = share * sum(noise.values())
    search, _, judge = lab.searched(saved, noise, limit)
    for key in search.within():
        trial = search.trials.trials[key]
        assert judge.total(trial.assignment) <= limit * (1 + 1e-9)
    found = lab.best_of(search)
    order = sorted(saved, key=lambda key: saved[key] / noise[key], reverse=True)
    spent, gained, prices = 0.0, 0.0, []
    for key in order:
        if spent + noise[key] > limit:
            break
        spent, gained = spent + noise[key], gained + saved[key]
        prices.append((saved[key] / noise[key], gained))
    if len(prices) == len(order):
        assert found.saved == pytest.approx(sum(saved.values()))
        return
    # What is dearer by a fifth than the one that does not fit is for certain in it.
    dear = [gain for price, gain in prices if price > 1.2 * saved[key] / noise[key]]
    # Of what saves nearly as much, which no clock tells apart, the more faithful one is the best.
    assert found.saved >= (dear[-1] if dear else 0.0) * 0.97


@given(NODES, st.floats(0.01, 1.5), st.integers(0, 100))
def test_is_never_outside_whatever_it_believes(lab, pairs, share, seed):
    saved, noise = lab.nodes_of(pairs)
    wrong = np.random.default_rng(seed).lognormal(0, 2, len(noise))
    estimates = {key: value * factor for (key, value), factor in zip(noise.items(), wrong, strict=True)}
    limit = share * sum(noise.values())
    search, builder, judge = lab.searched(saved, noise, limit, estimates)
    assert search.within(), "float is always there"
    for key in search.within():
        built = search.get(key)
        assert judge.total(built.assignment) <= limit * (1 + 1e-9)
        assert built.assignment == search.trials.trials[key].assignment
    assert len(builder.calls) <= 60


@settings(max_examples=30)
@given(NODES, st.floats(0.01, 0.9), st.integers(0, 100))
def test_the_same_input_gives_the_same_search(lab, pairs, share, seed):
    saved, noise = lab.nodes_of(pairs)
    wrong = np.random.default_rng(seed).lognormal(0, 1, len(noise))
    estimates = {key: value * factor for (key, value), factor in zip(noise.items(), wrong, strict=True)}
    limit = share * sum(noise.values())
    first, _, _ = lab.searched(saved, noise, limit, estimates)
    second, _, _ = lab.searched(saved, noise, limit, estimates)
    assert first.trials.trials == second.trials.trials
    assert first.within() == second.within()


@given(NODES, st.floats(0.01, 1.5))
def test_names_are_unique_and_the_first_two_are_known(lab, pairs, share):
    saved, noise = lab.nodes_of(pairs)
    search, _, _ = lab.searched(saved, noise, share * sum(noise.values()), {k: v * 3 for k, v in noise.items()})
    names = [trial.name for trial in search.trials.trials.values()]
    assert names[:2] == ["fp32", "fastest"]
    assert len(set(names)) == len(names)


def test_a_node_may_go_to_its_second_best_scheme(lab):
    saved = {("a", "int8"): 10.0, ("a", "int8-dynamic"): 8.0, ("b", "int8"): 5.0}
    noise = {("a", "int8"): 1e-2, ("a", "int8-dynamic"): 1e-4, ("b", "int8"): 1e-4}
    search, _, _ = lab.searched(saved, noise, 1e-3)
    assert lab.best_of(search).assignment == {"a": "int8-dynamic", "b": "int8"}


def test_what_fits_at_once_is_not_searched_further(lab):
    saved, noise = lab.nodes_of([(1.0, 1e-3), (2.0, 1e-3)])
    search, builder, _ = lab.searched(saved, noise, 1.0)
    assert [trial.name for trial in search.trials.trials.values()] == ["fp32", "fastest"]
    assert len(builder.calls) == 2


def test_without_time_there_are_float_and_the_fastest(lab):
    saved, noise = lab.nodes_of([(1.0, 1e-3), (2.0, 1e-2)])
    search, builder, _ = lab.searched(saved, noise, 2e-3, deadline=0.0)
    assert [trial.name for trial in search.trials.trials.values()] == ["fp32", "fastest"]
    assert [search.trials.trials[key].name for key in search.within()] == ["fp32"]
    assert len(builder.calls) == 2


def test_stops_when_the_next_candidate_would_be_late(lab):
    saved, noise = lab.nodes_of([(1.0, 10.0**-i) for i in range(2, 10)])
    builder_time = 0.02

    class Slow(lab.Builder):
        def build(self, *args, **more):
            time.sleep(builder_time)
            return super().build(*args, **more)

    believed = [Estimate(n, "MatMul", s, noise[n, s], saved[n, s]) for n, s in saved]
    start = time.monotonic()
    search = Search(
        Slow(saved), lab.Judge(noise, 1e-6), lambda: believed, Trials(None, ""), start + 0.1, lambda *_: None
    )
    search.run()
    assert 2 <= len(search.trials.trials) <= 6
    assert search.within()


def test_force_takes_the_fastest_at_once(lab):
    saved, noise = lab.nodes_of([(1.0, 1e-3), (2.0, 1e-2)])
    search, builder, _ = lab.searched(saved, noise, 1e-9, unlimited=True)
    assert lab.best_of(search).name == "fastest" and not lab.best_of(search).within
    assert len(builder.calls) == 2


def test_nothing_but_float(lab):
    search, _, _ = lab.searched({}, {}, 1e-3)
    assert [trial.name for trial in search.trials.trials.values()] == ["fp32"]
    assert search.get(search.within()[0]).assignment == {}
    # Even that may lose too much.
    search, _, _ = lab.searched({}, {}, 1e-3, base=1.0)
    assert search.within() == []


def test_a_candidate_that_cannot_be_built_is_remembered_as_such(lab):
    saved, noise = lab.nodes_of([(1.0, 1e-3), (2.0, 1e-2)])
    search, _, _ = lab.searched(saved, noise, 1.0, broken=["n1"])
    failed = [trial for trial in search.trials.trials.values() if trial.failed]
    assert failed[0].failed == "it does not fuse" and failed[0].strain == math.inf
    assert failed[0].candidate(False).verdict == "it does not fuse" and failed[0].candidate(False).loss is None
    assert lab.best_of(search).assignment in ({}, {"n0": "int8"})


def test_what_the_audit_took_out_is_not_in_the_trial(lab):
    saved, noise = lab.nodes_of([(1.0, 1e-3), (2.0, 1e-2)])
    search, _, judge = lab.searched(saved, noise, 1.0, refused=["n1"])
    assert lab.best_of(search).assignment == {"n0": "int8"} == judge.seen[-1]
    assert lab.best_of(search).saved == 1.0


def test_files_of_few_trials_are_kept_and_those_of_others_built_again(lab):
    saved, noise = lab.nodes_of([(1.0, 10.0 ** (-i / 2)) for i in range(2, 14)])
    search, builder, _ = lab.searched(
        saved, noise, 1e-4, {k: v * (2 if i % 2 else 0.5) for i, (k, v) in enumerate(noise.items())}
    )
    assert len(search.trials.trials) >= 4
    assert len(search.built) <= 4
    assert not any(built.staged.gone for built in search.built.values())
    for key, trial in search.trials.trials.items():
        count = len(builder.calls)
        there = key in search.built
        assert search.get(key).assignment == trial.assignment
        assert (len(builder.calls) == count) == there


def test_learning_makes_the_fastest_fit(lab):
    saved, noise = lab.nodes_of([(1.0, 1e-3), (2.0, 1e-2)])
    search, builder, _ = lab.searched(saved, noise, 9e-3, learning=1.0)
    found = lab.best_of(search)
    assert (found.name, found.assignment) == ("fastest, learned", {"n0": "int8", "n1": "int8"})
    assert found.loss == pytest.approx(11e-3 / 1.25) and builder.learned == 1
    assert [t.name for t in search.trials.trials.values()] == ["fp32", "fastest", "fastest, learned"]
    # Its files are made again as they were.
    key = search.within()[0]
    search.built.pop(key)
    assert search.get(key).learned and builder.learned == 2


def test_learning_that_does_not_suffice_leaves_the_search_to_go_on(lab):
    saved, noise = lab.nodes_of([(1.0, 1e-3), (2.0, 1e-2)])
    search, builder, _ = lab.searched(saved, noise, 8e-3, learning=1.0)
    assert lab.best_of(search).assignment == {"n0": "int8"}
    # What fits is judged with learned roundings, since it will have them.
    tried = [trial for trial in search.trials.trials.values() if trial.name.startswith("mixed")]
    assert tried and all(trial.learned for trial in tried) and builder.learned > 1
    assert all(trial.within for trial in map(search.trials.trials.get, search.within()))


def test_what_is_given_up_is_what_learning_leaves(lab):
    saved, noise = lab.nodes_of([(1.0 + i / 100, 1e-3) for i in range(20)])
    search, _, _ = lab.searched(saved, noise, 20e-3 / 1.25 / 1.05, learning=1.0)
    mixed = next(trial for trial in search.trials.trials.values() if trial.name.startswith("mixed"))
    # 5 % too much with learned roundings, and 31 % without: a fifth of the nodes goes, not a third.
    assert len(mixed.assignment) >= 16 and mixed.within and len(lab.best_of(search).assignment) >= 17


def test_what_fits_at_once_is_learned_with_the_time_that_is_left(lab):
    saved, noise = lab.nodes_of([(1.0, 1e-3), (2.0, 1e-2)])
    search, builder, _ = lab.searched(saved, noise, 1.0, learning=50.0, deadline=time.monotonic() + 100)
    assert lab.best_of(search).name == "fastest, learned" and builder.learned == 1
    asked, _, _ = lab.searched(saved, noise, 1.0, learning=50.0, deadline=time.monotonic() + 100, run=False)
    asked.builder.fixed = True
    asked.run()
    assert lab.best_of(asked).name == "fastest", "ranges that were asked for are not chosen anew for nothing"


def test_what_is_about_as_fast_and_as_small_goes_first_if_it_loses_less(lab):
    def trial(saved, strain, disk):
        return Trial("", {"n0": "int8"}, 0.0, strain, 0.0, saved, disk)

    tried = {"fast": trial(1.0, 0.9, 100), "fine": trial(0.98, 0.1, 120), "large": trial(0.99, 0.2, 130)}
    search, _, _ = lab.searched(*lab.nodes_of([(1.0, 1e-3)]), 1.0, run=False)
    for key, one in {**tried, "slow": trial(0.9, 0.0, 50)}.items():
        search.trials.add(key, one)
    assert search.within() == ["fine", "fast", "large", "slow"]


def test_nothing_is_learned_where_there_is_no_time(lab):
    saved, noise = lab.nodes_of([(1.0, 1e-3), (2.0, 1e-2)])
    for more in ({"limit": 9e-3, "learning": 0.0},
                 {"limit": 1.0, "learning": 100.0, "deadline": time.monotonic() + 50},
                 {"limit": 9e-3, "learning": 100.0, "deadline": time.monotonic() + 10}):  # fmt: skip
        _, builder, _ = lab.searched(saved, noise, **more)
        assert builder.learned == 0, more


def test_measured_noise_replaces_estimates_and_scales_the_others(lab):
    saved, noise = lab.nodes_of([(1.0, 1e-3), (1.0, 2e-3), (1.0, 4e-4)])
    estimates = {key: value / 10 for key, value in noise.items()}
    search, builder, _ = lab.searched(saved, noise, 1.0, estimates, run=False)
    search.noises.measure(2, lambda: False)
    assert search.trials.noises == {("n1", "int8"): pytest.approx(2e-3), ("n0", "int8"): pytest.approx(1e-3)}
    for key, value in search.noises.values().items():
        assert value == pytest.approx(noise[key])
    # Each alone, all others forbidden.
    assert builder.calls[0] == {key: -1.0 if key == ("n1", "int8") else math.inf for key in saved}
    count = len(builder.calls)
    search.noises.measure(2, lambda: False)
    assert len(builder.calls) == count, "what is known is not measured again"


def test_measured_times_replace_estimates(lab):
    saved, noise = lab.nodes_of([(1.0, 1e-3), (2.0, 1e-3)])
    search, _, _ = lab.searched(saved, noise, 1.0)
    assert lab.best_of(search).saved == 3.0
    search.relearn({("n0", "int8"): (1.0, 5.0)})
    assert next(t for t in search.trials.trials.values() if t.name == "fastest").saved == -2.0
    assert lab.best_of(search).name == "fp32", "by what is known now it saves more"


def test_an_execution_error_of_one_candidate_does_not_end_the_search(lab):
    saved, noise = lab.nodes_of([(1.0, 1e-3), (2.0, 1e-2)])

    class Broken(lab.Builder):
        def build(self, prices=None, scheme=None, learn=None):
            learn = self.learns if learn is None else learn
            if scheme is None:
                raise ExecutionError("it cannot be loaded")
            return super().build(prices, scheme, learn)

    believed = [Estimate(n, "MatMul", s, noise[n, s], saved[n, s]) for n, s in saved]
    search = Search(
        Broken(saved), lab.Judge(noise, 1.0), lambda: believed, Trials(None, ""), lab.FOREVER, lambda *_: None
    )
    search.run()
    assert [search.trials.trials[key].name for key in search.within()] == ["fp32"]


def test_where_nothing_pays_by_estimate_the_clock_is_asked(lab):
    """All layers are forced once; what they save is nothing by estimate, so that they come behind the float graph."""
    saved, noise = lab.nodes_of([(-1.0, 1e-4), (-2.0, 1e-4)])

    class Calibrated(lab.Builder):
        def __init__(self, saved):
            super().__init__(saved)
            self.calibrated = True

        def layers(self):
            return dict.fromkeys(self.saved, -10.0)

        def learning_seconds(self, assignment):
            return 0.0

    builder = Calibrated(saved)
    search = Search(builder, lab.Judge(noise, 1.0), list, Trials(None, ""), lab.FOREVER, lambda *_: None)
    search.run()
    found = [search.trials.trials[key] for key in search.within()]
    assert [len(trial.assignment) for trial in found] == [0, 2]
    assert found[1].saved == 0.0 and found[1].name.startswith("all layers")
