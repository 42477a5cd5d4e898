"""Whether a file is the report of the model that it is to travel with."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from qgraph.errors import OptionError, first_line
from qgraph.fingerprint import of_file

__all__ = ["check"]

_PAGE = re.compile(r'<meta name="qgraph-sha256" content="([0-9a-f]{64})">')
_AGAIN = "qgraph optimize writes one with --report, together with the model"


def check(report: Path, model: Path) -> None:
    """Make sure that `report`, a page or JSON of `qgraph optimize`, is about the file `model`.

    Raises:
        OptionError: it is no such report, or one of another model.
    """
    try:
        text = report.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        raise OptionError(f"There is no report {str(report)!r}; {_AGAIN}.") from None
    except OSError as error:
        raise OptionError(f"{str(report)!r} cannot be read as a report: {first_line(error)}; {_AGAIN}.") from error
    told = _told(text)
    if told is None:
        raise OptionError(f"{str(report)!r} is no report of an optimization, or one of an older qgraph; {_AGAIN}.")
    if told != of_file(model):
        raise OptionError(
            f"{str(report)!r} is the report of another model, or of {model.name} before it was changed (its checksum "
            f"is {told[:12]}...): {_AGAIN}."
        )


def _told(text: str) -> str | None:
    """The checksum of the model that a report is about."""
    page = _PAGE.search(text)
    if page is not None:
        return page[1]
    try:
        found: Any = json.loads(text)
    except ValueError:
        return None
    told = found.get("sha256") if isinstance(found, dict) else None
    return told if isinstance(told, str) else None
