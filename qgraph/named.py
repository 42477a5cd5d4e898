"""A user's function by its name, `package.module:function`."""

from __future__ import annotations

import importlib
import re
import sys
from typing import Any

from qgraph.errors import QGraphError, first_line

__all__ = ["is_name", "load"]


def is_name(text: str) -> bool:
    """Whether `text` names a function so."""
    return re.fullmatch(r"[\w.]+:[\w.]+", text) is not None


def load(text: str, error: type[QGraphError], what: str = "") -> Any:
    """What `text` names; modules of the working directory are found, too.

    Args:
        text: `package.module:function`.
        error: raised when it cannot be imported.
        what: it is, for the message.
    """
    module, _, attribute = text.partition(":")
    added = "" not in sys.path
    if added:
        sys.path.insert(0, "")
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as cause:
        raise error(f"Cannot import {what}{text!r}: {type(cause).__name__}: {first_line(cause)}") from cause
    finally:
        if added:
            sys.path.remove("")
    return found
