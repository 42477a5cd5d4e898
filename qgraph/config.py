"""Options in a TOML file: the command line's names as keys, overrides by node name or operator in a table.

scheme = "auto"
max-loss = "1%"
keep-float = ["Softmax"]

[override]
"/encoder/layer.0/*" = "float"
Gemm = "int8"
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import click
import tomli_w

from qgraph.errors import ModelError, OptionError, first_line, unknown

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["given", "load", "save"]

_OVERRIDE = "override"


def load(path: Path, known: Collection[str]) -> dict[str, Any]:
    """Options by their name in Python (underscores); the table of overrides as "pattern=scheme" strings.

    Args:
        path: the file.
        known: names that may stand in it, with dashes.

    Raises:
        OptionError: no such file, not TOML, or a key that is not known; names the nearest.
    """
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise OptionError(f"Cannot read the configuration {str(path)!r}: {first_line(error)}") from error
    options: dict[str, Any] = {}
    for key, value in found.items():
        name = key.replace("_", "-")
        if name not in known:
            raise unknown(f"key in {path.name!r}:", key, known)
        if name == _OVERRIDE:
            if not isinstance(value, dict):
                raise OptionError(f"In {path.name!r}, override is a table of patterns: [override], then lines.")
            value = [f"{pattern}={scheme}" for pattern, scheme in value.items()]
        elif isinstance(value, (dict, list)) and not _is_list_of_text(value):
            raise OptionError(f"In {path.name!r}, {key} is neither a number, a text nor a list of texts.")
        options[name.replace("-", "_")] = value
    return options


def _is_list_of_text(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def given(ctx: click.Context) -> dict[str, Any]:
    """The options that are not defaults, by their long names."""
    found: dict[str, Any] = {}
    for parameter in ctx.command.params:
        source = ctx.get_parameter_source(str(parameter.name))
        known = source not in (click.core.ParameterSource.DEFAULT, None)
        if isinstance(parameter, click.Option) and known and parameter.name not in ("config_path", "save_config"):
            found[max(parameter.opts, key=len).lstrip("-")] = ctx.params[str(parameter.name)]
    return found


def save(options: Mapping[str, Any], path: Path) -> None:
    """Write options (underscores or dashes), beside and moved into place; what is None or empty is left out.

    Raises:
        ModelError: the file cannot be written.
    """
    plain: dict[str, Any] = {}
    for key, value in options.items():
        name = key.replace("_", "-")
        if value is None or value == () or value == {}:
            continue
        if name == _OVERRIDE:
            plain[name] = dict(value)
        elif isinstance(value, tuple):
            plain[name] = [str(item) for item in value]
        else:
            plain[name] = value if isinstance(value, (bool, int, float)) else str(value)
    # Tables go last in TOML.
    ordered = dict(sorted(plain.items(), key=lambda item: isinstance(item[1], dict)))
    temporary = path.with_name(f".{path.name}.part")
    try:
        temporary.write_text(tomli_w.dumps(ordered), encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise ModelError(f"Cannot write the configuration to {str(path)!r}: {error.strerror}.") from error
