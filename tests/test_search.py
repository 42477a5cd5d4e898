"""The search and what it remembers, on made-up nodes: noise adds up, time saved adds up, nothing is built."""

import dataclasses
import json
import math
import time
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qgraph.builder import digest
from qgraph.errors import AuditError, DataError, ExecutionError, ModelError, NothingQuantizedError
from qgraph.judge import Verdict
from qgraph.race import Race
from qgraph.report import Budget, Fidelity, OutputError
from qgraph.search import Search
from qgraph.sensitivity import Estimate
from qgraph.trials import Trial, Trials

FOREVER = 1e9
LEARNED = "(learned)"


@dataclasses.dataclass
class Staged:
    nbytes: int = 1
    gone: bool = False

    def discard(self):
        assert not self.gone, "thrown away twice"
        self.gone = True


@dataclasses.dataclass
class Built:
    assignment: dict
    learned: bool = False
    stored: bool = False
    staged: Staged = dataclasses.field(default_factory=Staged)

    @property
    def runnable(self):
        assert not self.staged.gone, "its files are gone"
        return {**self.assignment, **({LEARNED: ""} if self.learned else {})}


class Builder:
    """(node, scheme) -> seconds saved; each node goes where saving less price is largest, if that is above zero."""

    def __init__(self, saved, refused=(), broken=()):
        self.saved, self.refused, self.broken = saved, set(refused), set(broken)
        self.calls, self.learned, self.learning, self.learns = [], 0, 0.0, False
        self.fixed = False
        self.variants, self.variant, self.calibrated, self.fixed = ("none",), "none", False, False

    def paid(self, built):
        return 0.0

    def layers(self):
        return {}

    def savings(self):
        return dict(self.saved)

    def learning_seconds(self, assignment):
        return self.learning

    def assignment(self, prices=None, scheme=None):
        best = {}
        for (node, name), saved in self.saved.items():
            gain = saved - (prices or {}).get((node, name), 0.0)
            if gain > best.get(node, (0.0, ""))[0]:
                best[node] = gain, name
        found = {node: name for node, (_, name) in best.items()}
        if not found:
            raise NothingQuantizedError("nothing pays")
        return found

    def build(self, prices=None, scheme=None, learn=None):
        learn = self.learns if learn is None else learn
        self.calls.append(dict(prices or {}))
        self.learned += learn
        if scheme is not None:
            return Built({})
        found = self.assignment(prices)
        if self.broken & set(found):
            raise AuditError("it does not fuse")
        kept = {node: name for node, name in found.items() if node not in self.refused}
        if not kept:
            raise NothingQuantizedError("nothing is left")
        return Built(kept, learn)


class Judge:
    """The true noise of an assignment, under a limit."""

    def __init__(self, noise, limit, base=0.0):
        self.noise, self.limit, self.base, self.seen = noise, limit, base, []

    def total(self, assignment):
        whole = self.base + sum(self.noise.get(pair, 0.0) for pair in assignment.items())
        return whole / 1.25 if LEARNED in assignment else whole

    def judge(self, assignment):
        self.seen.append(dict(assignment))
        noise = self.total(assignment)
        sqnr = -10 * math.log10(noise) if noise > 0 else math.inf
        fidelity = Fidelity(1, True, {"y": OutputError(sqnr, 1 - noise, 0.0, None)})
        return Verdict(fidelity, {"cosine": noise}, noise / self.limit)


def searched(saved, noise, limit, estimates=None, deadline=FOREVER, trials=None, run=True, base=0.0, **more):
    """(search, builder, judge) after a run; `estimates` are what the search believes the noise to be."""
    builder = Builder(saved, more.pop("refused", ()), more.pop("broken", ()))
    judge = Judge(noise, limit, base)
    believed = [Estimate(n, "MatMul", s, (estimates or noise)[n, s], saved[n, s]) for n, s in saved]
    trials = trials if trials is not None else Trials(None, "key")
    builder.learning = more.pop("learning", 0.0)
    search = Search(builder, judge, lambda: believed, trials, deadline, lambda *_: None, **more)
    if run:
        search.run()
    return search, builder, judge


def best_of(search):
    return search.trials.trials[search.within()[0]]


POSITIVE = st.floats(1e-6, 1.0)
NODES = st.lists(st.tuples(POSITIVE, st.floats(1e-6, 1e-2)), min_size=1, max_size=12)


def nodes_of(pairs):
    saved = {(f"n{i}", "int8"): saving for i, (saving, _) in enumerate(pairs)}
    return saved, {(f"n{i}", "int8"): noise for i, (_, noise) in enumerate(pairs)}


# -- laws -----------------------------------------------------------------------------------------------------------


@given(NODES, st.floats(0.01, 1.5))
def test_finds_about_the_best_that_prices_can_find(pairs, share):
    """Of nodes in the order of saving per noise, it takes nearly as many as the budget holds, and never more."""
    saved, noise = nodes_of(pairs)
    limit = share * sum(noise.values())
    search, _, judge = searched(saved, noise, limit)
    for key in search.within():
        trial = search.trials.trials[key]
        assert judge.total(trial.assignment) <= limit * (1 + 1e-9)
    found = best_of(search)
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
def test_is_never_outside_whatever_it_believes(pairs, share, seed):
    saved, noise = nodes_of(pairs)
    wrong = np.random.default_rng(seed).lognormal(0, 2, len(noise))
    estimates = {key: value * factor for (key, value), factor in zip(noise.items(), wrong, strict=True)}
    limit = share * sum(noise.values())
    search, builder, judge = searched(saved, noise, limit, estimates)
    assert search.within(), "float is always there"
    for key in search.within():
        built = search.get(key)
        assert judge.total(built.assignment) <= limit * (1 + 1e-9)
        assert built.assignment == search.trials.trials[key].assignment
    assert len(builder.calls) <= 60


@settings(max_examples=30)
@given(NODES, st.floats(0.01, 0.9), st.integers(0, 100))
def test_the_same_input_gives_the_same_search(pairs, share, seed):
    saved, noise = nodes_of(pairs)
    wrong = np.random.default_rng(seed).lognormal(0, 1, len(noise))
    estimates = {key: value * factor for (key, value), factor in zip(noise.items(), wrong, strict=True)}
    limit = share * sum(noise.values())
    first, _, _ = searched(saved, noise, limit, estimates)
    second, _, _ = searched(saved, noise, limit, estimates)
    assert first.trials.trials == second.trials.trials
    assert first.within() == second.within()


@given(NODES, st.floats(0.01, 1.5))
def test_names_are_unique_and_the_first_two_are_known(pairs, share):
    saved, noise = nodes_of(pairs)
    search, _, _ = searched(saved, noise, share * sum(noise.values()), {k: v * 3 for k, v in noise.items()})
    names = [trial.name for trial in search.trials.trials.values()]
    assert names[:2] == ["fp32", "fastest"]
    assert len(set(names)) == len(names)


# -- two schemes ----------------------------------------------------------------------------------------------------


def test_a_node_may_go_to_its_second_best_scheme():
    saved = {("a", "int8"): 10.0, ("a", "int8-dynamic"): 8.0, ("b", "int8"): 5.0}
    noise = {("a", "int8"): 1e-2, ("a", "int8-dynamic"): 1e-4, ("b", "int8"): 1e-4}
    search, _, _ = searched(saved, noise, 1e-3)
    assert best_of(search).assignment == {"a": "int8-dynamic", "b": "int8"}


def test_what_fits_at_once_is_not_searched_further():
    saved, noise = nodes_of([(1.0, 1e-3), (2.0, 1e-3)])
    search, builder, _ = searched(saved, noise, 1.0)
    assert [trial.name for trial in search.trials.trials.values()] == ["fp32", "fastest"]
    assert len(builder.calls) == 2


# -- any time -------------------------------------------------------------------------------------------------------


def test_without_time_there_are_float_and_the_fastest():
    saved, noise = nodes_of([(1.0, 1e-3), (2.0, 1e-2)])
    search, builder, _ = searched(saved, noise, 2e-3, deadline=0.0)
    assert [trial.name for trial in search.trials.trials.values()] == ["fp32", "fastest"]
    assert [search.trials.trials[key].name for key in search.within()] == ["fp32"]
    assert len(builder.calls) == 2


def test_stops_when_the_next_candidate_would_be_late():
    saved, noise = nodes_of([(1.0, 10.0**-i) for i in range(2, 10)])
    builder_time = 0.02

    class Slow(Builder):
        def build(self, *args, **more):
            time.sleep(builder_time)
            return super().build(*args, **more)

    believed = [Estimate(n, "MatMul", s, noise[n, s], saved[n, s]) for n, s in saved]
    start = time.monotonic()
    search = Search(Slow(saved), Judge(noise, 1e-6), lambda: believed, Trials(None, ""), start + 0.1, lambda *_: None)
    search.run()
    assert 2 <= len(search.trials.trials) <= 6
    assert search.within()


def test_force_takes_the_fastest_at_once():
    saved, noise = nodes_of([(1.0, 1e-3), (2.0, 1e-2)])
    search, builder, _ = searched(saved, noise, 1e-9, unlimited=True)
    assert best_of(search).name == "fastest" and not best_of(search).within
    assert len(builder.calls) == 2


def test_nothing_but_float():
    search, _, _ = searched({}, {}, 1e-3)
    assert [trial.name for trial in search.trials.trials.values()] == ["fp32"]
    assert search.get(search.within()[0]).assignment == {}
    # Even that may lose too much.
    search, _, _ = searched({}, {}, 1e-3, base=1.0)
    assert search.within() == []


# -- what goes wrong ------------------------------------------------------------------------------------------------


def test_a_candidate_that_cannot_be_built_is_remembered_as_such():
    saved, noise = nodes_of([(1.0, 1e-3), (2.0, 1e-2)])
    search, _, _ = searched(saved, noise, 1.0, broken=["n1"])
    failed = [trial for trial in search.trials.trials.values() if trial.failed]
    assert failed[0].failed == "it does not fuse" and failed[0].strain == math.inf
    assert failed[0].candidate(False).verdict == "it does not fuse" and failed[0].candidate(False).loss is None
    assert best_of(search).assignment in ({}, {"n0": "int8"})


def test_what_the_audit_took_out_is_not_in_the_trial():
    saved, noise = nodes_of([(1.0, 1e-3), (2.0, 1e-2)])
    search, _, judge = searched(saved, noise, 1.0, refused=["n1"])
    assert best_of(search).assignment == {"n0": "int8"} == judge.seen[-1]
    assert best_of(search).saved == 1.0


def test_files_of_few_trials_are_kept_and_those_of_others_built_again():
    saved, noise = nodes_of([(1.0, 10.0 ** (-i / 2)) for i in range(2, 14)])
    search, builder, _ = searched(
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


# -- learned roundings ----------------------------------------------------------------------------------------------


def test_learning_makes_the_fastest_fit():
    saved, noise = nodes_of([(1.0, 1e-3), (2.0, 1e-2)])
    search, builder, _ = searched(saved, noise, 9e-3, learning=1.0)
    found = best_of(search)
    assert (found.name, found.assignment) == ("fastest, learned", {"n0": "int8", "n1": "int8"})
    assert found.loss == pytest.approx(11e-3 / 1.25) and builder.learned == 1
    assert [t.name for t in search.trials.trials.values()] == ["fp32", "fastest", "fastest, learned"]
    # Its files are made again as they were.
    key = search.within()[0]
    search.built.pop(key)
    assert search.get(key).learned and builder.learned == 2


def test_learning_that_does_not_suffice_leaves_the_search_to_go_on():
    saved, noise = nodes_of([(1.0, 1e-3), (2.0, 1e-2)])
    search, builder, _ = searched(saved, noise, 8e-3, learning=1.0)
    assert best_of(search).assignment == {"n0": "int8"}
    # What fits is judged with learned roundings, since it will have them.
    tried = [trial for trial in search.trials.trials.values() if trial.name.startswith("mixed")]
    assert tried and all(trial.learned for trial in tried) and builder.learned > 1
    assert all(trial.within for trial in map(search.trials.trials.get, search.within()))


def test_what_fits_at_once_is_learned_with_the_time_that_is_left():
    saved, noise = nodes_of([(1.0, 1e-3), (2.0, 1e-2)])
    search, builder, _ = searched(saved, noise, 1.0, learning=50.0, deadline=time.monotonic() + 100)
    assert best_of(search).name == "fastest, learned" and builder.learned == 1
    asked, _, _ = searched(saved, noise, 1.0, learning=50.0, deadline=time.monotonic() + 100, run=False)
    asked.builder.fixed = True
    asked.run()
    assert best_of(asked).name == "fastest", "ranges that were asked for are not chosen anew for nothing"


def test_what_is_about_as_fast_and_as_small_goes_first_if_it_loses_less():
    def trial(saved, strain, disk):
        return Trial("", {"n0": "int8"}, 0.0, strain, 0.0, saved, disk)

    tried = {"fast": trial(1.0, 0.9, 100), "fine": trial(0.98, 0.1, 120), "large": trial(0.99, 0.2, 130)}
    search, _, _ = searched(*nodes_of([(1.0, 1e-3)]), 1.0, run=False)
    for key, one in {**tried, "slow": trial(0.9, 0.0, 50)}.items():
        search.trials.add(key, one)
    assert search.within() == ["fine", "fast", "large", "slow"]


def test_nothing_is_learned_where_there_is_no_time():
    saved, noise = nodes_of([(1.0, 1e-3), (2.0, 1e-2)])
    for more in ({"limit": 9e-3, "learning": 0.0},
                 {"limit": 1.0, "learning": 100.0, "deadline": time.monotonic() + 50},
                 {"limit": 9e-3, "learning": 100.0, "deadline": time.monotonic() + 10}):  # fmt: skip
        _, builder, _ = searched(saved, noise, **more)
        assert builder.learned == 0, more


# -- measured noise -------------------------------------------------------------------------------------------------


def test_measured_noise_replaces_estimates_and_scales_the_others():
    saved, noise = nodes_of([(1.0, 1e-3), (1.0, 2e-3), (1.0, 4e-4)])
    estimates = {key: value / 10 for key, value in noise.items()}
    search, builder, _ = searched(saved, noise, 1.0, estimates, run=False)
    search.noises.measure(2, lambda: False)
    assert search.trials.noises == {("n1", "int8"): pytest.approx(2e-3), ("n0", "int8"): pytest.approx(1e-3)}
    for key, value in search.noises.values().items():
        assert value == pytest.approx(noise[key])
    # Each alone, all others forbidden.
    assert builder.calls[0] == {key: -1.0 if key == ("n1", "int8") else math.inf for key in saved}
    count = len(builder.calls)
    search.noises.measure(2, lambda: False)
    assert len(builder.calls) == count, "what is known is not measured again"


def test_measured_times_replace_estimates():
    saved, noise = nodes_of([(1.0, 1e-3), (2.0, 1e-3)])
    search, _, _ = searched(saved, noise, 1.0)
    assert best_of(search).saved == 3.0
    search.relearn({("n0", "int8"): (1.0, 5.0)})
    assert next(t for t in search.trials.trials.values() if t.name == "fastest").saved == -2.0
    assert best_of(search).name == "fp32", "by what is known now it saves more"


# -- what is remembered ---------------------------------------------------------------------------------------------


def trial(name="mixed 1", **more):
    return Trial(
        name, {"a": "int8", "b": "int8-dynamic"}, **{"loss": 0.1, "strain": 0.5, "sqnr": 20.0, "saved": 1.0} | more
    )


def test_a_search_goes_on_where_it_was(tmp_path):
    saved, noise = nodes_of([(1.0, 10.0 ** (-i / 2)) for i in range(2, 10)])
    path = tmp_path / "state.json"
    first, builder, _ = searched(saved, noise, 1e-3, trials=Trials(path, "key"))
    again = Trials(path, "key")
    assert again.resumed == len(first.trials.trials)
    assert again.trials == first.trials.trials and again.noises == first.trials.noises
    second, builder, judge = searched(saved, noise, 1e-3, trials=again)
    assert builder.calls == [] and judge.seen == []
    assert second.within() == first.within()
    assert [p.name for p in tmp_path.iterdir()] == ["state.json"]


def test_an_interrupted_search_has_kept_what_it_had(tmp_path):
    saved, noise = nodes_of([(1.0, 10.0 ** (-i / 2)) for i in range(2, 10)])
    path = tmp_path / "state.json"

    class Stopped(Judge):
        def judge(self, assignment):
            if len(self.seen) == 11:  # the float graph, the fastest, each node alone, one mixture
                raise KeyboardInterrupt
            return super().judge(assignment)

    believed = [Estimate(n, "MatMul", s, noise[n, s], saved[n, s]) for n, s in saved]
    search = Search(Builder(saved), Stopped(noise, 1e-3), lambda: believed, Trials(path, ""), FOREVER, lambda *_: None)
    with pytest.raises(KeyboardInterrupt):
        search.run()
    kept = Trials(path, "")
    assert kept.resumed == 3 and kept.trials == search.trials.trials
    assert search.within()


@pytest.mark.parametrize(
    "one",
    [trial(), trial(strain=math.inf, loss=math.inf, sqnr=-math.inf, failed="it did not fuse"),
     trial(sqnr=math.inf, speed={"1": 2.0, "2": 0.5}, disk=7)],
)  # fmt: skip
def test_trials_are_saved_and_loaded(tmp_path, one):
    stored = Trials(tmp_path / "s", "key")
    stored.add("digest", one)
    stored.noises["a", "int8"] = 0.25
    stored.save()
    found = Trials(tmp_path / "s", "key")
    assert found.trials == {"digest": one} and found.noises == {("a", "int8"): 0.25} and found.resumed == 1


@pytest.mark.parametrize("change", [{"key": "other"}, {"version": 0}])
def test_a_state_of_something_else_is_refused(tmp_path, change):
    Trials(tmp_path / "s", "key").add("digest", trial())
    (tmp_path / "s").write_text(json.dumps({**json.loads((tmp_path / "s").read_text()), **change}))
    with pytest.raises(DataError, match="another model, other data or other options"):
        Trials(tmp_path / "s", "key")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"key": "key", "version": 1}', '{"key": "key", "version": 1, "trials": {}, "noises": [[1]]}',
     '{"key": "key", "version": 1, "trials": {"a": {"name": "x"}}, "noises": []}',
     '{"key": "key", "version": 1, "trials": [], "noises": []}'],
)  # fmt: skip
def test_a_damaged_state_is_an_error_and_stays(tmp_path, text):
    (tmp_path / "s").write_text(text)
    with pytest.raises(DataError, match="holds no state of a search"):
        Trials(tmp_path / "s", "key")
    assert (tmp_path / "s").read_text() == text


def test_a_state_that_cannot_be_written(tmp_path):
    with pytest.raises(ModelError, match="Cannot write the search's state"):
        Trials(tmp_path / "no" / "s", "key").add("digest", trial())


@pytest.mark.parametrize(
    "one, chosen, verdict",
    [
        (trial(), True, "chosen"),
        (trial(), False, "within"),
        (trial(strain=1.0), False, "within"),
        (trial(strain=1.001), False, "loses too much"),
        (trial(speed={"1": 2.0, "2": 0.9}), False, "slower"),
        (trial(failed="no kernel"), False, "no kernel"),
    ],
)
def test_verdicts(one, chosen, verdict):
    found = one.candidate(chosen)
    assert found.verdict == verdict
    assert found.nodes == {"int8": 1, "int8-dynamic": 1}


def test_speeds_are_one_number():
    assert trial().slowest == 1.0 and trial().rate == 1.0
    assert trial(speed={"1": 2.0, "2": 3.0}).rate == 6.0
    assert trial(speed={"1": 4.0, "2": 0.5}).rate == 0.5, "slower anywhere is slower"


def test_words_of_failure_name_the_closest_first():
    stored = Trials(None, "")
    for number, strain in enumerate([9.0, 2.0, 5.0, math.inf, 3.0]):
        stored.add(
            str(number), trial(f"c{number}", strain=strain, loss=strain, failed="broken" if strain == math.inf else "")
        )
    words = stored.nothing("Nothing is within the budget", Budget("top1", 0.01, "loss of top1 at most 1%"))
    assert "(loss of top1 at most 1%)" in words and "loses 2 of top1 (20.0 dB)" in words
    assert words.index("c1") < words.index("c4") < words.index("c2") < words.index("c0") and "c3" not in words


def test_digests_tell_assignments_apart():
    assert digest({"a": "x", "b": "y"}) == digest({"b": "y", "a": "x"})
    assert len({digest({}), digest({"a": "x"}), digest({"a": "y"}), digest({"b": "x"})}) == 4


def test_an_execution_error_of_one_candidate_does_not_end_the_search():
    saved, noise = nodes_of([(1.0, 1e-3), (2.0, 1e-2)])

    class Broken(Builder):
        def build(self, prices=None, scheme=None, learn=None):
            learn = self.learns if learn is None else learn
            if scheme is None:
                raise ExecutionError("it cannot be loaded")
            return super().build(prices, scheme, learn)

    believed = [Estimate(n, "MatMul", s, noise[n, s], saved[n, s]) for n, s in saved]
    search = Search(Broken(saved), Judge(noise, 1.0), lambda: believed, Trials(None, ""), FOREVER, lambda *_: None)
    search.run()
    assert [search.trials.trials[key].name for key in search.within()] == ["fp32"]


def test_where_nothing_pays_by_estimate_the_clock_is_asked():
    """All layers are forced once; what they save is nothing by estimate, so that they come behind the float graph."""
    saved, noise = nodes_of([(-1.0, 1e-4), (-2.0, 1e-4)])

    class Calibrated(Builder):
        def __init__(self, saved):
            super().__init__(saved)
            self.calibrated = True

        def layers(self):
            return dict.fromkeys(self.saved, -10.0)

        def learning_seconds(self, assignment):
            return 0.0

    builder = Calibrated(saved)
    search = Search(builder, Judge(noise, 1.0), list, Trials(None, ""), FOREVER, lambda *_: None)
    search.run()
    found = [search.trials.trials[key] for key in search.within()]
    assert [len(trial.assignment) for trial in found] == [0, 2]
    assert found[1].saved == 0.0 and found[1].name.startswith("all layers")


def test_the_clock_is_not_asked_between_the_same_kernels():
    """Two ways to scale channels give the same kernels: what differs is noise of the clock, and the loss."""
    saved, noise = nodes_of([(1.0, 1e-3), (2.0, 1e-3)])
    search, _, _ = searched(saved, noise, 1.0)
    trials = search.trials.trials
    fast = best_of(search)
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


class Scaled(Builder):
    """Two variants: in the second a multiplication takes some seconds, and noise is a share of what it was."""

    def __init__(self, saved, paid, changes=True):
        super().__init__(saved)
        self.variants, self.variant, self.calibrated = ("folded", "explicit"), "folded", True
        self.seconds, self.changes = paid, changes

    def differs(self):
        return self.changes

    def paid(self, built):
        return self.seconds if self.variant == "explicit" else 0.0


def _searched_with(paid, share, limit=1.0, changes=True, fixed=False):
    saved, noise = nodes_of([(10.0, 1e-3), (20.0, 2e-3)])
    builder = Scaled(saved, paid, changes)
    builder.fixed = fixed

    class Variant(Judge):
        def total(self, assignment):
            whole = super().total(assignment)
            return whole * share if builder.variant == "explicit" else whole

    search = Search(builder, Variant(noise, limit), list, Trials(None, ""), FOREVER, lambda *_: None)
    search.run()
    return search


@pytest.mark.parametrize(
    ("paid", "share", "variant"), [(0.5, 0.5, "explicit"), (2.0, 0.5, "folded"), (0.5, 1, "folded")]
)
def test_multiplications_are_taken_where_no_clock_shows_the_time_and_the_loss_is_less(paid, share, variant):
    search = _searched_with(paid, share)
    best = best_of(search)
    assert best.variant == variant
    explicit = next(trial for trial in search.trials.trials.values() if trial.variant == "explicit")
    assert explicit.saved == pytest.approx(30 - paid)
    assert explicit.name == "fastest, explicit"


def test_multiplications_are_not_tried_where_nothing_would_be_multiplied_or_ranges_were_asked_for():
    for changes, fixed in ((False, False), (True, True)):
        search = _searched_with(0.5, 0.5, changes=changes, fixed=fixed)
        assert {trial.variant for trial in search.trials.trials.values() if trial.assignment} == {"folded"}


def test_the_time_of_multiplications_is_kept_with_the_state(tmp_path):
    search = _searched_with(0.5, 0.5)
    trials = Trials(tmp_path / "state.json", "key")
    for key, trial in search.trials.trials.items():
        trials.add(key, trial)
    again = Search(
        Scaled({("a", "int8"): 10.0}, 0.5), Judge({}, 1.0), list, Trials(tmp_path / "state.json", "key"), FOREVER, print
    )
    explicit = next(trial for trial in again.trials.trials.values() if trial.variant == "explicit")
    assert explicit.paid == 0.5
    assert explicit.saved == again._sum(explicit.assignment) - 0.5


def test_variants_of_one_assignment_take_no_other_its_turn_at_the_clock():
    saved, noise = nodes_of([(1.0, 1e-3), (40.0, 1e-3)])
    search, _, _ = searched(saved, noise, 1.0)
    trials = search.trials.trials
    fast = best_of(search)
    for number in range(3):
        trials[f"twin{number}"] = dataclasses.replace(fast, name=f"twin{number}", strain=fast.strain / (2 + number))
    other = dataclasses.replace(fast, name="other", assignment={"n1": "int8"}, saved=40.0, strain=2 * fast.strain)
    trials["other"] = other
    search.built["other"] = Built(other.assignment)
    for number in range(3):
        search.built[f"twin{number}"] = Built(fast.assignment)

    class Clock:
        seconds = 1.0

        def measure(self, runnable):
            return [SimpleNamespace(threads=1, ratio=3.0 if runnable == other.assignment else 2.0)]

    class Report:
        notes: ClassVar = []

    keys = [key for key in search.within() if trials[key].assignment]
    assert keys.index("other") >= 3
    best, speeds = Race(Clock(), Report()).fastest(search, keys)
    assert best == "other" and speeds[0].ratio == 3.0
