"""What a person sees of a profile in a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qgraph.profiles import Profile, RowTime

__all__ = ["show"]

_APART = 1.3
_MOST_APART = 12


def show(console: Console, profile: Profile) -> None:
    """The measured rows, how well the fit meets them, and what differs from the profile that comes with qgraph."""
    table = Table.grid(padding=(0, 2))
    for side in ("left", "left", "right", "right", "right", "right"):
        table.add_column(justify="right" if side == "right" else "left", no_wrap=side == "right")
    part = ""
    for row in profile.rows:
        if row.table != part:
            part = row.table
            heads = ("into us", "out us") if part == "crossing" else ("float us", "integer us")
            names = (part, "", *heads, "" if part == "crossing" else "ratio", "fit")
            table.add_row(*(Text(head, style="bold" if head == part else "dim") for head in names))
        table.add_row(*_row(row))
    console.print(table)
    _apart(console, profile)
    for name, words in profile.refused.items():
        console.print(Text(f"refused: {name}: {words}", style="yellow"))
    console.print(
        f"{profile.measured}; {profile.rounds} rounds in {profile.seconds:.0f} s; the fit is off by "
        f"{profile.error:.0%} in the median",
        style="dim",
    )


def _row(row: RowTime) -> tuple[Text, ...]:
    ratio = Text(f"{row.ratio:.2f}x", style="green" if row.ratio >= 1 else "red")
    if row.table == "crossing":
        ratio = Text("")
    return (
        Text(f"  {row.name}"),
        Text(row.form, style="dim"),
        Text(f"{row.before * 1e6:.1f}"),
        Text(f"{row.after * 1e6:.1f}"),
        ratio,
        Text(f"{row.error:+.0%}", style="dim" if abs(row.error) < _APART - 1 else "yellow"),
    )


def _apart(console: Console, profile: Profile) -> None:
    """The kernels whose gain is not what the shipped profile says, the farthest first."""

    def factor(row: RowTime) -> float:
        return max(row.ratio / row.shipped, row.shipped / row.ratio)

    found = [row for row in profile.rows if row.table not in ("crossing", "run") and factor(row) > _APART]
    if not found:
        console.print("Every ratio is near that of the profile that comes with qgraph.")
        return
    console.print(f"Not as in the profile that comes with qgraph (by more than {_APART - 1:.0%}):")
    for row in sorted(found, key=factor, reverse=True)[:_MOST_APART]:
        console.print(Text(f"  {row.name}, {row.form}: {row.ratio:.2f}x, there {row.shipped:.2f}x"))
    if len(found) > _MOST_APART:
        console.print(f"  and {len(found) - _MOST_APART} more", style="dim")
