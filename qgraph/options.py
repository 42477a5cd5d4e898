"""What a caller can choose about the main job, as frozen data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from qgraph import caches, calibration, metrics, shards
from qgraph.checks import CHECKS
from qgraph.errors import OptionError, unknown
from qgraph.metrics import Limit, Outputs
from qgraph.observers import OBSERVERS
from qgraph.qconfigs import QCONFIGS
from qgraph.targets import AUTO, WEIGHTS

__all__ = ["UNFOLLOWED", "Options", "refuse_overwriting", "spared"]

UNFOLLOWED = "The override {!r} has no effect: nothing that it matches has a kernel in that scheme."
"""Told of a pattern of `choices`."""


def spared(writes: Iterable[str | Path | None], data: set[Path]) -> set[Path]:
    """The model's own external data, as resolved paths, over which nothing is written.

    Raises:
        OptionError: names the file.
    """
    for path in writes:
        if path is not None and Path(path).resolve() in data:
            raise OptionError(f"{str(path)!r} holds weights of the input, which would be replaced; name another file.")
    return data


def refuse_overwriting(writes: Mapping[str, str | Path | None], reads: Mapping[str, object]) -> None:
    """Check that no file is written over one that is read, over another one that is written, or over a device.

    Args:
        writes: what is written -> its path.
        reads: what is read -> its path; whatever is no path is passed over.

    Raises:
        OptionError: names both.
    """
    taken = {Path(path).resolve(): what for what, path in reads.items() if isinstance(path, (str, Path))}
    for what, path in writes.items():
        if path is None:
            continue
        if _is_special(Path(path)):
            raise OptionError(f"The {what} is moved into place, which {str(path)!r} does not allow; name a plain file.")
        if Path(path).resolve() in taken:
            raise OptionError(f"The {what} would replace the {taken[Path(path).resolve()]}; name another file.")
        taken[Path(path).resolve()] = what


def _is_special(path: Path) -> bool:
    """Whether it is a device, a pipe or the like, or a link among the devices, whose place no file may take."""
    try:
        found = path.exists() and not path.is_file() and not path.is_dir()
    except OSError:
        return False
    return found or path.absolute().parent == Path("/dev")


@dataclasses.dataclass(frozen=True)
class Options:
    """How to optimize.

    Attributes:
        target: name of the target; `cpu` is the machine this runs on.
        scheme: name of the scheme, one of the target's; `auto` chooses node by node.
        max_loss: what may be lost of the metric: "1%" of the original's value, or 0.5 in the metric's points; None for
            1% unless another limit is given.
        min_sqnr: least signal to noise ratio of the worst output, dB.
        min_cosine: least mean cosine similarity of the worst output with the original's.
        min_agreement: least share of samples with the same largest element.
        metric: name of the metric of `max_loss`, `package.module:function`, or a function; see `qgraph.metrics`.
        time_limit: seconds after which the search takes the best that it has.
        state: file in which the search keeps what it has measured, and from which it goes on; codes that are learned
            of weights in blocks lie in the folder `<state>.codes`.
        block_size: weights that share a scale where weights are in blocks: 32, 64 or 128; None for the scheme's own.
        bits_per_weight: largest mean of stored bits, scales included, over the weights of products and tables; the
            scheme of each is then chosen among the weight-only ones so that least is lost.
        kv_cache: keep the caches of keys and values in "int8" or "int4": inputs and outputs of the model change their
            type then; None leaves them in float.
        choices: pattern of node names (shell style) or operator type -> scheme, or "float". Names go before operators.
        observer: name of the observer; None for the scheme's own.
        qconfig: static ranges as PyTorch's `get_default_qconfig` has them: "fbgemm", "x86", "onednn" or "qnnpack".
        keep_float: patterns of node names or operator types to leave in float.
        memory: bytes that the observed values of one calibration run may take.
        ranges: file of saved ranges to use instead of running the calibration data.
        save_ranges: file to save the observed ranges in.
        bench_seconds: about how long to time both models for each thread count; 0 does not time, and so cannot promise
            that the result is not slower.
        pack: store ternary weights in 1.6 bits and binary ones in 1, unpacked by the runtime as it loads the model.
        check: how much is proved before the result is written: "whole" loads, runs, compares and times all of it;
            "parts" its graph without weights, and each quantized product by itself, in the memory of one weight; "none"
            nothing. None for the whole where it fits into memory, and its parts where it does not.
        max_shard_size: most bytes of a file of weights beside the model, as 2_000_000_000 or "2GB": what exceeds it
            goes into several. None for one file, and "2GB" on targets that are browsers.
        force: write the result even if it is slower than its input, or outside the budget.
    """

    target: str = "cpu"
    scheme: str = "auto"
    max_loss: str | float | None = None
    min_sqnr: float | None = None
    min_cosine: float | None = None
    min_agreement: float | None = None
    metric: str | Callable[[Outputs], float] | None = None
    time_limit: float = 60.0
    state: Path | str | None = None
    block_size: int | None = None
    bits_per_weight: float | None = None
    choices: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])
    observer: str | None = None
    qconfig: str | None = None
    keep_float: tuple[str, ...] = ()
    memory: int = calibration.DEFAULT_BUDGET
    ranges: Path | str | None = None
    save_ranges: Path | str | None = None
    bench_seconds: float = 4.0
    pack: bool = False
    kv_cache: str | None = None
    check: str | None = None
    max_shard_size: str | int | None = None
    force: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            OptionError: a single string where several patterns are expected, or options that exclude each other.
        """
        if isinstance(self.keep_float, str):
            raise OptionError(f"keep_float takes several patterns: write ({self.keep_float!r},).")
        if self.observer is not None and self.observer not in OBSERVERS:
            raise unknown("observer", self.observer, OBSERVERS)
        if self.qconfig is not None and self.qconfig not in QCONFIGS:
            raise unknown("qconfig", self.qconfig, QCONFIGS)
        if self.ranges is not None and self.observer is not None:
            raise OptionError("Saved ranges bring their observer with them: give either the ranges or an observer.")
        if self.check is not None and self.check not in CHECKS:
            raise unknown("check", self.check, CHECKS)
        if self.qconfig is not None and self.observer is not None:
            raise OptionError("A qconfig brings its observers with it: give either the qconfig or an observer.")
        if self.max_shard_size is not None:
            shards.parsed(self.max_shard_size)
        if self.memory <= 0 or not (0 <= self.bench_seconds < math.inf and self.time_limit >= 0):
            raise OptionError(
                "memory must be positive, bench_seconds and time_limit not negative, and bench_seconds finite."
            )
        if self.bits_per_weight is not None and self.scheme not in ("auto", WEIGHTS):
            raise OptionError(f"bits_per_weight chooses the schemes itself: leave out scheme={self.scheme!r}.")
        if self.bits_per_weight is not None and not self.bits_per_weight > 0:
            raise OptionError(f"bits_per_weight is a positive number, and not {self.bits_per_weight}.")
        if self.block_size not in (None, 32, 64, 128):
            raise OptionError(f"Kernels take blocks of 32, 64 or 128 weights, and not {self.block_size}.")
        if self.kv_cache not in (None, *caches.FORMATS):
            raise unknown("kv_cache", str(self.kv_cache), caches.FORMATS)
        for name, value in (("min_cosine", self.min_cosine), ("min_agreement", self.min_agreement)):
            if value is not None and not 0 <= value <= 1:
                raise OptionError(f"{name} lies between 0 and 1, and {value} does not.")
        if self.min_sqnr is not None and not math.isfinite(self.min_sqnr):
            raise OptionError(f"min_sqnr is a finite number of dB, and not {self.min_sqnr}.")
        self.limits()

    @property
    def why_whole(self) -> str | None:
        """The option that needs the whole model to be run, in the command line's words."""
        names = ("max_loss", "min_sqnr", "min_cosine", "min_agreement", "metric", "bits_per_weight")
        given = next((name for name in names if getattr(self, name) is not None), None)
        return None if given is None else "--" + given.replace("_", "-")

    @property
    def open(self) -> bool:
        """Whether nothing says that activations go into integers: no scheme for a part, and nothing about ranges."""
        given = (self.observer, self.qconfig, self.ranges, self.save_ranges)
        named = any(scheme != "float" for scheme in self.choices.values())
        return self.scheme == AUTO and self.bits_per_weight is None and not named and all(x is None for x in given)

    @property
    def identity(self) -> tuple[object, ...]:
        """What measurements depend on, beside the model, the target, the scheme and the budget."""
        return (
            self.keep_float,
            sorted(self.choices.items()),
            self.observer,
            self.qconfig,
            self.ranges,
            self.block_size,
            self.pack,
            self.bits_per_weight,
            self.kv_cache,
        )

    def limits(self, language: bool = False) -> list[Limit]:
        """The budget, first what `max_loss` says; what the metric allows by itself where nothing is said.

        Args:
            language: whether it is a language model's, whose default metric is the divergence of its predictions, and
                not the mean cosine.

        Raises:
            OptionError: there is no such metric, or the loss is no number.
        """
        found: list[Limit] = []
        default = metrics.LANGUAGE if language else metrics.DEFAULT
        if self.min_sqnr is not None:
            words = f"SQNR at least {self.min_sqnr:g} dB"
            found.append(Limit(metrics.METRICS["sqnr"], 10 ** (-self.min_sqnr / 10), False, words))
        for name, value in (("cosine", self.min_cosine), ("agreement", self.min_agreement)):
            if value is not None:
                found.append(Limit(metrics.METRICS[name], 1 - value, False, f"{name} at least {value:g}"))
        if self.bits_per_weight is not None and self.max_loss is None and not found:
            # The size is the limit, and the least loss within it is what is asked for.
            measure = metrics.metric(self.metric or default)
            found.append(dataclasses.replace(metrics.loss_limit("100%", measure), text="the least loss for the size"))
        elif self.max_loss is not None or self.metric is not None or not found:
            measure = metrics.metric(self.metric or default)
            found.insert(0, metrics.loss_limit(measure.allowed if self.max_loss is None else self.max_loss, measure))
        return found
