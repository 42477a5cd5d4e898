"""The command line: thin click commands, no logic. Every error of qgraph's is one message and exit code 1."""

from __future__ import annotations

import errno
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.console import Console

import qgraph
from qgraph import bench as timing
from qgraph import (
    checks,
    config,
    elsewhere,
    html,
    inspection,
    interrupted,
    modelio,
    observers,
    ranking,
    registry,
    terminal,
)
from qgraph import data as sources
from qgraph.cli_deploy import deploy
from qgraph.cli_profile import profile
from qgraph.compare import Runnable
from qgraph.compare import compare as compare_models
from qgraph.errors import OptionError, QGraphError, first_line
from qgraph.options import refuse_overwriting
from qgraph.qconfigs import QCONFIGS

__all__ = ["main"]

_DATA_HELP = (
    ".npz (arrays under the inputs' names, samples along axis 0), .npy, a folder of them, a folder of ONNX "
    "test_data_set_* folders, or package.module:function that returns feeds."
)
_MODEL = click.Path(path_type=Path)


class _Group(click.Group):
    """A group whose errors are messages, and that names the nearest command to an unknown one."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except QGraphError as error:
            raise click.ClickException(str(error)) from error
        except KeyboardInterrupt:
            raise click.ClickException("Interrupted; nothing was written.") from None
        except OSError as error:
            if error.errno == errno.EPIPE:  # click's own
                raise
            what = "" if error.filename is None else f" {str(error.filename)!r}"
            raise click.ClickException(f"The system cannot use{what or ' a file'}: {first_line(error)}.") from error
        except MemoryError:
            raise click.ClickException("Out of memory. Lower --memory, or use fewer or smaller samples.") from None


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(qgraph.__version__, prog_name="qgraph")
def main() -> None:
    """Quantize ONNX models so that they run fast, small and faithfully on ONNX Runtime."""


def _common(command: Callable[..., None]) -> Callable[..., None]:
    """--target."""

    @click.option("--target", default="cpu", show_default=True, help="Where the model will run; see `qgraph targets`.")
    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        command(*args, **kwargs)

    return wrapped


def _new_file(ctx: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
    """Refuse a file that cannot be written while nothing has been done yet."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise OptionError(f"Cannot write to {str(path)!r}: it is a folder, or in a folder that does not exist.")
    return path


def _configured(ctx: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
    """Options of a file become the defaults; what stands on the command line goes before."""
    if path is not None:
        names = [max(p.opts, key=len).lstrip("-") for p in ctx.command.params if isinstance(p, click.Option)]
        found = config.load(path, set(names) - {"config", "save-config"})
        places = {max(p.opts, key=len).lstrip("-").replace("-", "_"): p.name for p in ctx.command.params}
        ctx.default_map = {str(places[name]): value for name, value in found.items()}
    return path


def _overrides(ctx: click.Context, parameter: click.Parameter, pairs: tuple[str, ...]) -> dict[str, str]:
    """PATTERN=SCHEME, split at the last equals sign: names may hold some."""
    found: dict[str, str] = {}
    for pair in pairs:
        pattern, equals, scheme = pair.rpartition("=")
        if not equals or not pattern or not scheme:
            raise OptionError(f"An override is PATTERN=SCHEME, as '/encoder/*=float' or 'Gemm=int8', and not {pair!r}.")
        found[pattern] = scheme
    return found


@main.command()
@click.argument("model", type=_MODEL)
@click.argument("output", type=_MODEL)
@click.option("--data", help="Calibration data, a few dozen typical inputs: " + _DATA_HELP)
@click.option("--eval", "evaluation", help="Data to judge the result on; by default a part of --data is held back.")
@_common
@click.option("--scheme", default="auto", show_default=True, help="The numbers to use; see `qgraph targets`.")
@click.option("--max-loss", help="What the metric may lose: 1% of its value, or 0.5 points.  [default: 1%; 5% of kl]")
@click.option(
    "--metric",
    help="cosine, agreement, kl, bits, perplexity, top1, top5 (which need labels), or package.module:function.",
)
@click.option("--min-sqnr", type=float, metavar="DB", help="Least signal to noise ratio of the worst output.")
@click.option("--min-cosine", type=float, help="Least mean cosine similarity of the worst output.")
@click.option("--min-agreement", type=float, help="Least share of samples with the same largest element.")
@click.option("--time-limit", default=60.0, show_default=True, metavar="SECONDS", type=click.FloatRange(0),
              help="When to stop searching and take the best that was found; timing it comes on top.")  # fmt: skip
@click.option("--state", type=_MODEL, callback=_new_file, help="Keep what was measured here, and go on from it.")
@click.option("--block-size", type=int, metavar="32|64|128",
              help="Weights that share a scale in blocks: few are more faithful, many are faster.")  # fmt: skip
@click.option("--bits-per-weight", type=float, metavar="BITS",
              help="Most bits of a weight on average; each gets what loses least within that.")  # fmt: skip
@click.option("--override", "choices", multiple=True, metavar="PATTERN=SCHEME", callback=_overrides,
              help="Scheme, or float, of nodes by name or operator; repeatable.")  # fmt: skip
@click.option("--keep-float", multiple=True, metavar="PATTERN", help="Node name pattern or operator; repeatable.")
@click.option("--observer", help=f"How ranges are chosen: {', '.join(observers.OBSERVERS)}.  [default: histogram]")
@click.option("--qconfig", metavar="NAME", help=f"Ranges as PyTorch has them: {', '.join(QCONFIGS)}.")
@click.option(
    "--memory",
    default=256,
    show_default=True,
    metavar="MB",
    type=click.IntRange(1),
    help="What the observed values of one calibration run may take.",
)
@click.option("--save-ranges", type=_MODEL, callback=_new_file, help="Save the observed statistics here.")
@click.option(
    "--ranges",
    type=_MODEL,
    help="Use saved statistics of this model instead of observing --data (which is still compared on).",
)
@click.option(
    "--bench-seconds",
    default=4.0,
    show_default=True,
    type=click.FloatRange(0),
    help="Time to measure speed, for each candidate and number of threads; 0 to skip.",
)
@click.option(
    "--kv-cache", type=click.Choice(["int8", "int4"]), help="Keys and values cached so; inputs and outputs change type."
)
@click.option("--pack", is_flag=True, help="Ternary weights in 1.6 bits on disk, binary in 1; unpacked at load.")
@click.option("--max-shard-size", metavar="SIZE", help="Largest file of weights.  [default: any; 2GB for browsers]")
@click.option("--check", type=click.Choice(checks.CHECKS),
              help="What to prove: parts needs little memory, none proves nothing.  [default: what fits]")  # fmt: skip
@click.option("--force", is_flag=True, help="Write the result even if it is slower, or outside the budget.")
@click.option(
    "--report",
    "report_path",
    type=_MODEL,
    callback=_new_file,
    help="Write all that was decided and measured: a page for .html, else JSON.",
)
@click.option("--config", "config_path", type=_MODEL, is_eager=True, callback=_configured,
              help="TOML file with any of these options; the command line goes before it.")  # fmt: skip
@click.option("--save-config", type=_MODEL, callback=_new_file, help="Write the options given as such a file.")
@click.pass_context
def optimize(ctx: click.Context, /, model: Path, output: Path, data: str | None, evaluation: str | None,
             report_path: Path | None, memory: int, keep_float: tuple[str, ...], config_path: Path | None,
             save_config: Path | None, **options: Any) -> None:  # fmt: skip
    """Quantize MODEL within a budget of accuracy, prove the result on the runtime, and write it to OUTPUT."""
    console = Console()
    refuse_overwriting(
        {
            "output": output,
            "report": report_path,
            "file of saved ranges": options["save_ranges"],
            "state of the search": options["state"],
            "configuration": save_config,
        },
        {"input": model, "calibration data": data, "evaluation data": evaluation, "file of ranges": options["ranges"]},
    )
    if report_path is not None and html.is_page(report_path):
        html.require()
    chosen = qgraph.Options(memory=memory << 20, keep_float=keep_float, **options)
    if save_config is not None:
        config.save(config.given(ctx), save_config)
    with interrupted.told(chosen.state), terminal.progress(console) as progress:
        result = qgraph.optimize(
            model, output, data=data, evaluation=evaluation, options=chosen, progress=progress
        )  # fmt: skip
    if report_path is not None and html.is_page(report_path):
        html.save(result.report, report_path)
    elif report_path is not None:
        result.report.save(report_path)
    terminal.show_report(console, result.report)


@main.command()
@click.argument("model", type=_MODEL)
@click.option("--data", required=True, help=_DATA_HELP)
@_common
@click.option("--scheme", default="auto", show_default=True, help="The numbers to look at.")
@click.option("--exact", default=8, show_default=True, type=click.IntRange(0),
              help="How many of the worst to measure end to end; the rest are estimates.")  # fmt: skip
@click.option("--all", "everything", is_flag=True, help="List every node.")
def sensitivity(model: Path, data: str, target: str, scheme: str, exact: int, everything: bool) -> None:
    """Rank MODEL's nodes by what quantizing each of them alone loses, and show what it saves."""
    console = Console()
    with terminal.progress(console) as progress:
        found = ranking.rank(model, data, target, scheme, exact, progress)
    terminal.show_sensitivity(console, found, everything)


@main.command()
@click.argument("model", type=_MODEL)
@_common
@click.option("--scheme", help="The numbers to use.  [default: int8 where the target has it, else auto]")
@click.option("--data", help="Data whose first sample tells the sizes of dynamic dimensions: " + _DATA_HELP)
@click.option("--nodes", is_flag=True, help="List every node.")
def inspect(model: Path, target: str, scheme: str | None, data: str | None, nodes: bool) -> None:
    """Show MODEL's operators and sizes, what would be quantized, and why the rest would not."""
    terminal.show_inspection(Console(), model, inspection.inspect(model, target, scheme, data), nodes)


@main.command()
@click.argument("original", type=_MODEL)
@click.argument("other", type=_MODEL)
@click.option("--data", required=True, help=_DATA_HELP)
@_common
def validate(original: Path, other: Path, data: str, target: str) -> None:
    """Compare the outputs of OTHER with those of ORIGINAL on data."""
    inputs = sources.inputs_of(modelio.read(original))
    modelio.read(other)
    where = registry.target(target)
    dataset = sources.load(data, inputs)
    found = compare_models(Runnable(original), Runnable(other), dataset, where.options())
    console = Console()
    terminal.show_fidelity(console, found)
    for note in elsewhere.notes(where):
        console.print(f"note: {note}", style="yellow")
    told: list[str] = []
    placed = elsewhere.proved(where, other, Runnable(original), dataset, told.append)
    if placed is not None:
        terminal.show_placement(console, placed)
    for note in told:
        console.print(f"note: {note}", style="yellow")


@main.command()
@click.argument("first", type=_MODEL)
@click.argument("second", type=_MODEL)
@click.option("--data", required=True, help=_DATA_HELP)
@click.option("--seconds", default=10.0, show_default=True, type=click.FloatRange(0.1), help="For each thread count.")
@click.option("--threads", multiple=True, type=click.IntRange(1), help="Repeatable.  [default: 1 and all cores]")
@_common
def bench(first: Path, second: Path, data: str, seconds: float, threads: tuple[int, ...], target: str) -> None:
    """Time SECOND against FIRST in alternating blocks, one live session at a time."""
    inputs = sources.inputs_of(modelio.read(first))
    modelio.read(second)
    feeds = sources.load(data, inputs).first().feeds
    where = registry.target(target)
    if not where.here:
        raise OptionError(f"Nothing is timed for {target!r} here: the installed onnxruntime has no {where.provider}.")
    options = where.options()
    console = Console()
    with terminal.progress(console) as progress:
        speeds = [
            timing.alternate(Runnable(first), Runnable(second), feeds, options, count, seconds,
                             functools.partial(progress, f"timing on {count} threads"))
            for count in threads or sorted({1, timing.all_threads()})
        ]  # fmt: skip
    terminal.show_speed(console, speeds)


@main.command()
def targets() -> None:
    """List the targets."""
    terminal.show_targets(Console(), {name: registry.target(name) for name in registry.targets()})


@main.command()
def passes() -> None:
    """List the passes and pipelines."""
    terminal.show_passes(Console(), registry.passes(), registry.pipelines())


main.add_command(deploy)
main.add_command(profile)
