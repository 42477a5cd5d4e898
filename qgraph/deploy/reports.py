"""Whether a file is the report of the model that it is to travel with."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

from qgraph.errors import OptionError, first_line
from qgraph.fingerprint import of_file, of_files

__all__ = ["check"]

_PAGE = re.compile(r'<meta name="qgraph-sha256" content="([0-9a-f]{64})">')
_DATA = re.compile(r'<meta name="qgraph-data" content="([0-9a-f]{64}) ([^"]+)">')
_AGAIN = "qgraph optimize writes one with --report, together with the model"


def check(report: Path, model: Path) -> None:
    """Make sure that `report`, a page or JSON of `qgraph optimize`, is about the file `model` and its external data.

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
    expected, data = told
    if expected != of_file(model):
        raise OptionError(
            f"{str(report)!r} is the report of another model, or of {model.name} before it was changed (its checksum "
            f"is {expected[:12]}...): {_AGAIN}."
        )
    for file in of_files(model)[1:]:
        if file.name not in data:
            raise OptionError(
                f"{str(report)!r} says nothing of the weights in {file.name!r}: an older qgraph wrote it; {_AGAIN}."
            )
        if data[file.name] != file.sha256:
            raise OptionError(
                f"{str(report)!r} is the report of other weights, or of those in {file.name!r} before they were "
                f"changed (their checksum is {data[file.name][:12]}...): {_AGAIN}."
            )


def _told(text: str) -> tuple[str, dict[str, str]] | None:
    """The checksums of the model that a report is about: of its .onnx, and of external data by name."""
    page = _PAGE.search(text)
    if page is not None:
        return page[1], {html.unescape(name): digest for digest, name in _DATA.findall(text)}
    try:
        found: Any = json.loads(text)
        told, files = found.get("sha256"), found.get("files", [])
        data = {str(one["name"]): str(one["sha256"]) for one in files}
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    return (told, data) if isinstance(told, str) else None
