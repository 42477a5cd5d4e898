"""Text that is on any machine with Python: its own standard library, files in a fixed order, split by file.

Which text it is depends on the version of Python, not on the machine.
"""

from __future__ import annotations

import ast
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np

__all__ = ["docstring_sentences", "source_files"]

_SEED = 0
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
_LEAST_BYTES = 2000
_LEAST_WORDS, _MOST_WORDS = 6, 60
_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
_PROSE = re.compile(r"[A-Z][A-Za-z0-9 ,;:'\"()/_.-]+[.!?]")


def source_files() -> list[Path]:
    """The standard library's Python sources without its tests and generated tables, in a fixed, mixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    large = (path for path in root.rglob("*.py") if path.stat().st_size > _LEAST_BYTES)
    files = sorted(path for path in large if not _LEFT_OUT & set(path.relative_to(root).parts))
    return [files[i] for i in np.random.default_rng(_SEED).permutation(len(files))]


def docstring_sentences(path: Path) -> Iterator[str]:
    """Sentences of the docstrings in a source file, in order, each once."""
    seen: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        for paragraph in re.split(r"\n\s*\n", ast.get_docstring(node) or ""):
            for sentence in _SENTENCE.split(" ".join(paragraph.split())):
                words = sentence.count(" ") + 1
                if _LEAST_WORDS <= words <= _MOST_WORDS and _PROSE.fullmatch(sentence) and sentence not in seen:
                    seen.add(sentence)
                    yield sentence
