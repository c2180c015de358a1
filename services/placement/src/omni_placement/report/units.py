"""Figures as people read them."""

from math import log10


def tokens(count: float) -> str:
    """Three digits and a unit: 12.3 M."""
    for factor, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(count) >= factor:
            return f"{_three(count / factor)}{unit}"
    return _three(count)


def size(count: float) -> str:
    """Bytes, in powers of 1024."""
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, _ = value / 1024, units.pop(0)
    return f"{_three(value)} {units[0]}"


def times(ratio: float) -> str:
    return f"{_three(ratio)}×"


def percent(share: float) -> str:
    if abs(share) >= 10:
        return f"{100 * share:,.0f}%"
    return f"{_three(100 * share)}%"


def duration(seconds: float) -> str:
    if seconds < 1:
        return f"{_three(seconds * 1e3)} ms"
    return f"{_three(seconds)} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _three(value: float) -> str:
    """Three digits, never an exponent."""
    if value == 0:
        return "0"
    decimals = max(0, 2 - int(log10(abs(value)))) if abs(value) >= 1 else 2 if abs(value) >= 0.01 else 4
    text = f"{value:.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
