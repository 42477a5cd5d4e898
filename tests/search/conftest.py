"""Made-up nodes for the search: noise adds up, time saved adds up, nothing is built."""

import dataclasses
import math
from types import SimpleNamespace

import pytest

from qgraph.errors import AuditError, NothingQuantizedError
from qgraph.judge import Verdict
from qgraph.report import Fidelity, OutputError
from qgraph.search import Search
from qgraph.sensitivity import Estimate
from qgraph.trials import Trials

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
        self.order = None
        self.prepared = SimpleNamespace(graph=[])
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

    def judge(self, assignment, learned=False):
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


def nodes_of(pairs):
    saved = {(f"n{i}", "int8"): saving for i, (saving, _) in enumerate(pairs)}
    return saved, {(f"n{i}", "int8"): noise for i, (_, noise) in enumerate(pairs)}


class Scaled(Builder):
    """Two variants: in the second a multiplication takes some seconds, and noise is a share of what it was."""

    def __init__(self, saved, paid, changes=True, more=()):
        super().__init__(saved)
        self.variants, self.variant, self.calibrated = ("folded", "explicit", *more), "folded", True
        self.seconds, self.changes = {"folded": 0.0, "explicit": paid}, changes

    def differs(self):
        return self.changes

    def paid(self, built):
        return self.seconds[self.variant]


def scaled(paid, share, limit=1.0, changes=True, fixed=False, more=None):
    more = more or {}
    saved, noise = nodes_of([(10.0, 1e-3), (20.0, 2e-3)])
    builder = Scaled(saved, paid, changes, more)
    builder.seconds.update({name: seconds for name, (seconds, _) in more.items()})
    builder.fixed = fixed
    shares = {"folded": 1.0, "explicit": share, **{name: part for name, (_, part) in more.items()}}

    class Variant(Judge):
        def total(self, assignment):
            return super().total(assignment) * shares[builder.variant]

    search = Search(builder, Variant(noise, limit), list, Trials(None, ""), FOREVER, lambda *_: None)
    search.run()
    return search


@pytest.fixture(scope="session")
def lab():
    """All of it."""
    names = (Staged, Built, Builder, Judge, Scaled, searched, best_of, nodes_of, scaled)
    return SimpleNamespace(FOREVER=FOREVER, LEARNED=LEARNED, **{one.__name__: one for one in names})
