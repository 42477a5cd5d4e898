"""Trials: what was tried is kept, told and taken up again."""

import json
import math

import pytest

from qgraph.builder import digest
from qgraph.errors import DataError, ModelError
from qgraph.report import Budget
from qgraph.search import Search
from qgraph.sensitivity import Estimate
from qgraph.trials import Trial, Trials


def trial(name="mixed 1", **more):
    return Trial(
        name, {"a": "int8", "b": "int8-dynamic"}, **{"loss": 0.1, "strain": 0.5, "sqnr": 20.0, "saved": 1.0} | more
    )


def test_a_search_goes_on_where_it_was(lab, tmp_path):
    saved, noise = lab.nodes_of([(1.0, 10.0 ** (-i / 2)) for i in range(2, 10)])
    path = tmp_path / "state.json"
    first, builder, _ = lab.searched(saved, noise, 1e-3, trials=Trials(path, "key"))
    again = Trials(path, "key")
    assert again.resumed == len(first.trials.trials)
    assert again.trials == first.trials.trials and again.noises == first.trials.noises
    second, builder, judge = lab.searched(saved, noise, 1e-3, trials=again)
    assert builder.calls == [] and judge.seen == []
    assert second.within() == first.within()
    assert [p.name for p in tmp_path.iterdir()] == ["state.json"]


def test_an_interrupted_search_has_kept_what_it_had(lab, tmp_path):
    saved, noise = lab.nodes_of([(1.0, 10.0 ** (-i / 2)) for i in range(2, 10)])
    path = tmp_path / "state.json"

    class Stopped(lab.Judge):
        def judge(self, assignment, learned=False):
            if len(self.seen) == 11:  # the float graph, the fastest, each node alone, one mixture
                raise KeyboardInterrupt
            return super().judge(assignment, learned)

    believed = [Estimate(n, "MatMul", s, noise[n, s], saved[n, s]) for n, s in saved]
    search = Search(
        lab.Builder(saved), Stopped(noise, 1e-3), lambda: believed, Trials(path, ""), lab.FOREVER, lambda *_: None
    )
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
