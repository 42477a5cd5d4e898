"""The command `profile`: time the kernels of this machine, or of another one by way of a kit."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console

from qgraph import profile_view, profiles, registry, terminal
from qgraph.errors import OptionError
from qgraph.profiling import kit as profile_kit
from qgraph.profiling import measure as profiling
from qgraph.targets import Target
from qgraph.targets.cpu import Cpu
from qgraph.words import size

__all__ = ["profile"]

_PATH = click.Path(path_type=Path)
_PHONE = "arm64"


def _cpu(target: Target) -> Cpu:
    if not isinstance(target, Cpu):
        raise OptionError(f"Target {target.name!r} has no costs to measure; take a CPU target, as arm64 or x86-vnni.")
    return target


@click.command()
@click.option(
    "--seconds", default=180.0, show_default=True, type=click.FloatRange(1), help="About how long to measure."
)
@click.option("--export", "kit", type=_PATH, metavar="FOLDER", help="Write a kit for a device without Python.")
@click.option("--import", "results", type=_PATH, metavar="FILE", help="Make a target of a kit's results.json.")
@click.option("--target", "name", help="What to call the target of imported results.")
@click.option("--like", help=f"Target whose formats the kit has.  [default: {_PHONE}; what the results say]")
@click.option(
    "--provider", type=click.Choice(list(profile_kit.PROVIDERS)), help="What the kit runs on.  [default: cpu]"
)
def profile(
    seconds: float, kit: Path | None, results: Path | None, name: str | None, like: str | None, provider: str | None
) -> None:
    """Time the kernels that the costs are about, and keep them as this machine's profile, or as a target.

    The target `cpu` takes this machine's profile from then on. Interrupted after three rounds, what they gave is kept;
    before that nothing is written.
    """
    console = Console()
    if kit is not None and results is not None:
        raise OptionError("Export a kit or import its results: one at a time.")
    if (results is None) != (name is None):
        raise OptionError("--import and --target go together: the results, and what to call them.")
    if kit is None and (provider is not None or (like is not None and results is None)):
        raise OptionError("--provider is for --export, and --like for --export and --import.")
    if kit is not None:
        made = profile_kit.export(kit, _cpu(registry.installed(like or _PHONE)), provider or "cpu", seconds)
        console.print(f"{kit}: {size(made)}. README.md there says how to run it.")
        return
    if results is not None and name is not None:
        if name == profiles.HERE or registry.is_installed(name):
            raise OptionError(f"There is a target {name!r} already; name the new one otherwise.")
        said = profile_kit.told(results)
        found = profile_kit.read(results, name, _cpu(registry.installed(like or str(said.get("like")))), said)
    else:
        with terminal.progress(console) as progress:
            found = profiling.here(_cpu(registry.installed("cpu")), seconds, progress)
    path = profiles.save(found)
    profile_view.show(console, found)
    used = "the targets cpu and this-machine use it" if results is None else f"use it with --target {found.name}"
    console.print(f"Kept in {path}; {used}.")
