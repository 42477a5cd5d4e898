"""What the runtime says of a model, without what is noise to a reader."""

from __future__ import annotations

import re

__all__ = ["complaint"]

_NOISES = (
    re.compile(r"^\d+ : [A-Z_]+ : "),
    re.compile(r"^Load model from .*? failed: ?"),
    re.compile(r"^/\S*/onnxruntime/\S+:\d+ .*?\) (?=[A-Z])"),
)
"""Codes, temporary files, and places in the runtime's own source."""
_LONGEST = 500


def complaint(error: Exception) -> str:
    """The first line of the runtime's message."""
    text = str(error).replace("[ONNXRuntimeError] : ", "").strip()
    line = text.splitlines()[0] if text else type(error).__name__
    for noise in _NOISES:
        line = noise.sub("", line)
    if "is not a registered function/op" in line:
        line += ". Operators of libraries of your own cannot be run here, and so nothing can be proved of them."
    return line[:_LONGEST]
