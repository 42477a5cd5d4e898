"""What Ctrl-C leaves of a search that had no result yet, in words."""

from __future__ import annotations

import contextlib
import glob
import signal
import threading
from collections.abc import Generator
from pathlib import Path

import click

__all__ = ["told"]


@contextlib.contextmanager
def told(state: str | Path | None) -> Generator[None]:
    """Say of an interrupt what is left of it."""
    before = _states(state)
    try:
        with _ended_like_interrupted():
            yield
    except KeyboardInterrupt:
        after = _states(state)
        words = "Interrupted before a first candidate could be taken; nothing was written"
        if state is None:
            raise click.ClickException(f"{words}.") from None
        if after != before:
            names = ", ".join(str(path) for path in after)
            kept = f"{words} but what was measured and learned, in {names}, from which the next run goes on."
            raise click.ClickException(kept) from None
        if after:
            raise click.ClickException(f"{words}. What was kept before is still there, in {state}.") from None
        raise click.ClickException(f"{words}, and nothing was measured yet that could be kept in {state}.") from None


def _states(state: str | Path | None) -> dict[Path, int]:
    """Files of the search's state, one for each step of a ladder of schemes, and folders of codes: what is in them."""
    if state is None:
        return {}
    path = Path(state)
    found = [path, *path.parent.glob(f"{glob.escape(path.name)}.*")]
    states = {one: one.stat().st_mtime_ns for one in sorted(found) if one.is_file()}
    folders = {one: sum(1 for _ in one.glob("*/*/blocks.json")) for one in found if one.suffix == ".codes"}
    return {**states, **{one: count for one, count in folders.items() if count}}


@contextlib.contextmanager
def _ended_like_interrupted() -> Generator[None]:
    """What asks the process to end, as batch systems do, is as good as Ctrl-C: it leaves no temporary files."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
