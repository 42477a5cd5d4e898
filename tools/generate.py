"""Greedy generation with a cache of keys and values, by an original and its optimized form: same words, how fast?

    python tools/generate.py ORIGINAL OTHER [--data prompts.npz] [--prompt 32] [--tokens 64]

Both continue the same prompts, token by token, each reading the cache that it wrote. Shown are the share of tokens that
are equal up to the first difference of each prompt, behind which the two read different texts; the share of all that
are equal where the other is given the original's tokens at each step; and tokens per second of prompt and generation,
in alternating blocks, one live session at a time, at each number of threads. Prompts are the beginnings of `input_ids`
of an .npz file, or random tokens.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from qgraph import modelio
from qgraph.decoding import Decoder
from qgraph.feeds import inputs_of
from qgraph.session import Session, SessionOptions
from qgraph.synthetic import table_rows

_FILE = click.Path(path_type=Path, exists=True)
Feeds = dict[str, NDArray[Any]]


@dataclasses.dataclass
class Generator:
    """A decoder file and how its outputs become inputs."""

    path: Path

    def __post_init__(self) -> None:
        model = modelio.read(self.path)
        found = Decoder.of(inputs_of(model))
        if found is None:
            raise click.ClickException(f"{self.path} takes no cache of keys and values, or more than one knows of.")
        self.decoder = found
        ids = next(v for v in model.graph.inputs if v.name == found.ids.name)
        self.vocabulary = table_rows(ids) or 0
        outputs = [str(v.name) for v in model.graph.outputs]
        presents = [name for name in outputs if "present" in name or "cache" in name]
        # Exporters write the caches in the same order on both sides.
        if len(presents) != len(found.caches):
            raise click.ClickException(f"{self.path} gives {len(presents)} caches, but takes {len(found.caches)}.")
        self.caches = dict(zip(presents, [spec.name for spec in found.caches], strict=True))
        self.logits = next(name for name in outputs if name not in presents)

    def start(self, prompt: NDArray[np.integer[Any]]) -> Feeds:
        """Feeds of a prompt [1, tokens]."""
        return self.decoder.complete({self.decoder.ids.name: prompt.astype(self.decoder.ids.dtype)})

    def run(self, session: Session, feeds: Feeds) -> tuple[NDArray[Any], Feeds]:
        """(logits of the last token, the cache)."""
        outputs = session.run(feeds)
        return outputs[self.logits][0, -1], {name: outputs[key] for key, name in self.caches.items()}

    def after(self, token: int, cache: Feeds) -> Feeds:
        """Feeds of one more token."""
        ids = self.decoder.ids
        return self.decoder.complete({ids.name: np.array([[token]], ids.dtype), **cache})

    def generate(
        self, session: Session, prompt: NDArray[np.integer[Any]], count: int, forced: list[int] | None = None
    ) -> tuple[list[int], float, float]:
        """(greedy tokens, seconds of the prompt, seconds of the rest); `forced` tokens are read in place of its own."""
        start = time.perf_counter()
        logits, cache = self.run(session, self.start(prompt))
        tokens = [int(logits.argmax())]
        middle = time.perf_counter()
        while len(tokens) < count:
            read = tokens[-1] if forced is None else forced[len(tokens) - 1]
            logits, cache = self.run(session, self.after(read, cache))
            tokens.append(int(logits.argmax()))
        return tokens, middle - start, time.perf_counter() - middle


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How far one decoder's greedy texts are another's.

    Attributes:
        free: share of tokens before the first difference of each text.
        forced: share of tokens that are equal where both read the original's.
        first: place of the first difference of each text; None where there is none.
    """

    free: float
    forced: float
    first: tuple[int | None, ...]

    @staticmethod
    def of(expected: list[list[int]], free: list[list[int]], forced: list[list[int]]) -> Agreement:
        """From the original's texts, the other's own, and those that it wrote while it read the original's."""
        first = tuple(
            next((at for at, (a, b) in enumerate(zip(*pair, strict=True)) if a != b), None)
            for pair in zip(expected, free, strict=True)
        )
        length = len(expected[0])
        alike = np.mean([length if at is None else at for at in first]) / length
        return Agreement(float(alike), float((np.array(expected) == np.array(forced)).mean()), first)


def agreement(first: Generator, second: Generator, prompts: list[NDArray[np.integer[Any]]], tokens: int) -> Agreement:
    """Of `tokens` greedy tokens behind each of `prompts` [1, length]."""
    expected = texts(first, prompts, tokens)
    return Agreement.of(expected, texts(second, prompts, tokens), texts(second, prompts, tokens, expected))


def _prompts(data: Path | None, first: Generator, count: int, length: int) -> list[NDArray[np.integer[Any]]]:
    if data is None:
        rng = np.random.default_rng(0)
        return [rng.integers(0, first.vocabulary, (1, length)) for _ in range(count)]
    with np.load(data) as stored:
        ids = stored[first.decoder.ids.name]
    return [ids[i : i + 1, :length] for i in range(min(count, len(ids)))]


@click.command(help=(__doc__ or "").splitlines()[0])
@click.argument("original", type=_FILE)
@click.argument("other", type=_FILE)
@click.option("--data", type=_FILE, help="Prompts: input_ids of an .npz file.")
@click.option("--prompts", "count", default=32, show_default=True, help="Number of prompts compared.")
@click.option("--prompt", "length", default=32, show_default=True, help="Tokens of a prompt.")
@click.option("--tokens", default=64, show_default=True, help="Tokens to generate.")
@click.option("--threads", multiple=True, default=(1, 2), show_default=True, help="Intra-op threads.")
@click.option("--blocks", default=3, show_default=True, help="Pairs of timed blocks; 0 does not time.")
def main(
    original: Path, other: Path, data: Path | None, count: int, length: int, tokens: int, threads: tuple[int, ...],
    blocks: int,
) -> None:  # fmt: skip
    """Compare and time two decoders."""
    first, second = Generator(original), Generator(other)
    prompts = _prompts(data, first, count, length)
    found = agreement(first, second, prompts, tokens)
    console = Console(width=120)
    same = sum(at is None for at in found.first)
    places = [at for at in found.first if at is not None]
    where = f"; the others differ first at token {int(np.median(places))} (median)" if places else ""
    console.print(f"{len(prompts)} prompts of {length} tokens, {tokens} generated each:")
    console.print(f"  by itself: {found.free:.1%} equal before the first difference, {same} texts to the end{where}")
    console.print(f"  given the original's tokens: {found.forced:.1%} equal")
    if not blocks:
        return
    table = Table("threads", "prompt, tokens/s", "", "gain", "generated, tokens/s", "", "gain", "range")
    for number in threads:
        pairs = [_timed(first, second, prompts[0], tokens, number, turn) for turn in range(blocks)]
        times = np.array(pairs)  # [pairs, model, part]
        ratio = times[:, 0] / times[:, 1]
        rates = np.median(np.array([prompts[0].shape[1], tokens - 1]) / times, axis=0)
        gain = np.median(ratio, axis=0)
        table.add_row(
            str(number), *(f"{r:.1f}" for r in rates[:, 0]), f"{gain[0]:.2f}x", *(f"{r:.1f}" for r in rates[:, 1]),
            f"{gain[1]:.2f}x", f"{ratio[:, 1].min():.2f}-{ratio[:, 1].max():.2f}",
        )  # fmt: skip
    console.print(table)


def texts(
    one: Generator, prompts: list[NDArray[np.integer[Any]]], tokens: int, forced: list[list[int]] | None = None
) -> list[list[int]]:
    """Greedy tokens behind each prompt; `forced` ones are read in place of its own."""
    with Session(one.path, SessionOptions()) as session:
        return [one.generate(session, p, tokens, forced[i] if forced else None)[0] for i, p in enumerate(prompts)]


def _timed(
    first: Generator, second: Generator, prompt: NDArray[np.integer[Any]], tokens: int, threads: int, turn: int
) -> list[tuple[float, float]]:
    """(seconds of the prompt, seconds of the rest) of both, in turns which comes first."""
    found: dict[int, tuple[float, float]] = {}
    for at in (0, 1) if turn % 2 == 0 else (1, 0):
        one = (first, second)[at]
        with Session(one.path, SessionOptions(threads=threads)) as session:
            one.generate(session, prompt, 3)
            found[at] = one.generate(session, prompt, tokens)[1:]
    return [found[0], found[1]]


if __name__ == "__main__":
    main()
