"""`python -m qgraph.footprint MODEL FEEDS PROVIDERS`: load, run once, print what it took as JSON.

A module of its own, because resident memory can only be told apart in a fresh process.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np

from qgraph.session import Session, SessionOptions

__all__ = ["main"]


def _resident() -> int:
    """Resident bytes of this process; 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    import resource

    return pages * resource.getpagesize()


def main(model: str, feeds: str, providers: str) -> None:
    """Measure `model` on the arrays of the file `feeds`."""
    with np.load(feeds) as stored:
        # Written with a prefix, since an input may be called like a parameter of `savez`.
        arrays = {name[1:]: array for name, array in stored.items()}
    options = SessionOptions(providers=tuple(json.loads(providers)))
    before = _resident()
    start = time.perf_counter()
    with Session(Path(model), options) as session:
        seconds = time.perf_counter() - start
        session.call(arrays)
        print(json.dumps({"load_seconds": seconds, "resident": max(0, _resident() - before)}))


if __name__ == "__main__":
    main(*sys.argv[1:4])
