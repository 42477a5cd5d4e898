"""Numbers in words: the units in which the terminal and the page say the same things."""

from __future__ import annotations

__all__ = ["decibels", "milliseconds", "percent", "runs", "size", "smaller", "times"]


def size(count: int) -> str:
    """Bytes in words."""
    amount = float(count)
    for unit in ("B", "kB", "MB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.2f} GB"


def milliseconds(seconds: float) -> str:
    """Seconds as milliseconds, three digits; as seconds from one on, as microseconds where they are few."""
    if 0 < abs(seconds) < 1e-5:
        return f"{seconds * 1e6:.3g} us"
    return f"{seconds * 1e3:.3g} ms" if abs(seconds) < 1 else f"{seconds:.2f} s"


def smaller(before: int, after: int) -> str:
    """Two sizes in bytes, compared."""
    ratio = before / max(1, after)
    return f"{ratio:.2f}x smaller" if ratio >= 1 else f"{1 / max(ratio, 1e-9):.2f}x larger"


def decibels(value: float) -> str:
    """A signal to noise ratio; infinite is no noise at all."""
    return "identical" if value == float("inf") else f"{value:.1f} dB"


def runs(count: int) -> str:
    """A number of runs."""
    return f"{count} run{'s' * (count != 1)}"


def times(ratio: float) -> str:
    """A ratio of times, before / after."""
    return f"{ratio:.2f}x {'faster' if ratio >= 1 else 'slower'}"


def percent(share: float) -> str:
    """A share; only all of it is 100 %."""
    return "100 %" if share >= 1 else f"{min(100 * share, 99.9):.3g} %"
