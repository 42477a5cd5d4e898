"""Libraries that log what is told in a report anyway, or what is no fault here."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Generator

__all__ = ["quiet"]


@contextlib.contextmanager
def quiet(name: str, level: int = logging.CRITICAL) -> Generator[None]:
    """The logger of that name says nothing below `level`."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)
