"""The command `qgraph deploy`."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from qgraph import deploy as deployment
from qgraph.words import size

__all__ = ["deploy"]

_PATH = click.Path(path_type=Path)


@click.command()
@click.argument("model", type=_PATH)
@click.option("--to", "folder", type=_PATH, required=True, help="The folder to write.")
@click.option("--target", default="cpu", show_default=True, help="Whose provider the examples run on.")
@click.option("--ort", is_flag=True, help="Add .ort files in both styles, and what a reduced build needs.")
@click.option("--for", "platforms", multiple=True, metavar="|".join(deployment.PLATFORMS),
              help="Examples to write; repeatable, or with commas.  [default: all]")  # fmt: skip
@click.option("--data", help="Its first sample travels along; see `qgraph optimize`.  [default: random numbers]")
@click.option("--report", type=_PATH, help="What `qgraph optimize --report` wrote about MODEL, to copy along.")
@click.option("--ort-web", type=_PATH, help="A folder of onnxruntime-web, to copy beside the page.")
@click.option("--force", is_flag=True, help="Replace a folder that was deployed before.")
def deploy(model: Path, folder: Path, target: str, ort: bool, platforms: tuple[str, ...], data: str | None,
           report: Path | None, ort_web: Path | None, force: bool) -> None:  # fmt: skip
    """Write a folder with MODEL, a sample, and examples that run it on phones and in browsers."""
    names = [name.strip() for one in platforms for name in one.split(",")] or list(deployment.PLATFORMS)
    console = Console()
    with console.status("proving the files"):
        done = deployment.deploy(
            model, folder, target=target, ort=ort, platforms=names, data=data, report=report, ort_web=ort_web,
            force=force,
        )  # fmt: skip
    files = done.manifest["files"]
    console.print(f"[bold]{folder}[/]  {len(files) + 2} files, {size(sum(one['bytes'] for one in files.values()))}")
    table = Table.grid(padding=(0, 2))
    for name, one in files.items():
        if name.startswith("model/"):
            table.add_row(name.removeprefix("model/"), size(one["bytes"]))
    for platform, one in done.manifest["examples"].items():
        package = one["package"].replace(":", "/").rpartition("/")[2]
        table.add_row(f"{platform}/", f"{one['provider']}, {package} {one['version']}")
    console.print(table)
    for one in done.manifest["mobile usability"]:
        console.print(f"{one['provider']}: {one['verdict']} ({one['supported']} of {one['nodes']} nodes)", style="dim")
    for note in done.notes:
        console.print(f"note: {note}", style="yellow", markup=False)
