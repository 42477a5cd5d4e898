"""A result on disk that is not yet where it is to stand."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from pathlib import Path

from qgraph.errors import ModelError

__all__ = ["Staged"]


class Staged:
    """A model written in full beside its destination, not yet in place."""

    def __init__(self, path: Path, destination: Path):
        self.path = path
        self.destination = destination

    @property
    def nbytes(self) -> int:
        """Size on disk, external data included."""
        return sum(f.stat().st_size for f in self.path.parent.iterdir())

    def discard(self) -> None:
        """Remove the files."""
        shutil.rmtree(self.path.parent, ignore_errors=True)

    def commit(self) -> None:
        """Move into place, data first; on failure whatever stood there before stands again."""
        folder = self.destination.parent.resolve()
        names = sorted((f.name for f in self.path.parent.iterdir()), key=lambda n: n == self.path.name)
        moved: list[tuple[Path, Path | None]] = []
        try:
            for name in names:
                final = folder / name
                saved: Path | None = None
                if final.is_dir():
                    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
                if final.exists():
                    saved = self.path.parent / (name + ".previous")
                    final.replace(saved)
                moved.append((final, saved))
                (self.path.parent / name).replace(final)
        except BaseException as error:
            for final, saved in reversed(moved):
                with contextlib.suppress(OSError):
                    if saved is not None:
                        saved.replace(final)
                    else:
                        final.unlink(missing_ok=True)
            if not isinstance(error, OSError):
                raise
            raise ModelError(f"Cannot write {str(self.destination)!r}: {error.strerror}.") from error
