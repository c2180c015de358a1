"""A drawing of goodput over load, as SVG, without a library."""

from collections.abc import Sequence
from html import escape

from fleetsim.report import Fleet
from fleetsim.systems import SYSTEMS

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 560, 360, 60, 40, 40
_COLOURS = ("#c0392b", "#2c3e50", "#2980b9", "#27ae60", "#8e44ad", "#d35400", "#16a085", "#7f8c8d")


def svg(fleets: Sequence[Fleet]) -> str:
    """One panel for each fleet that was swept: requests per second that keep the SLO over those that arrive."""
    panels = [fleet for fleet in fleets if fleet.sweep]
    size = f'width="{_WIDTH * max(1, len(panels)) + 160}" height="{_HEIGHT}"'
    body = [_panel(fleet, index * _WIDTH) for index, fleet in enumerate(panels)]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11">',
            *body,
            "</svg>",
            "",
        ]
    )


def _panel(fleet: Fleet, left: int) -> str:
    level = fleet.at_knee
    rate = next(iter(level.outcomes.values()))[0].offered_per_s / level.speed
    most = fleet.speeds[-1] * rate
    width, height = _WIDTH - _LEFT - 40, _HEIGHT - _TOP - _BOTTOM

    def place(x: float, y: float) -> str:
        return f"{left + _LEFT + x / most * width:.1f},{_TOP + height - y / most * height:.1f}"

    lines = [
        f'<text x="{left + _LEFT}" y="20">{escape(fleet.title)}: requests/s that keep the SLO, over requests/s</text>',
        f'<polyline fill="none" stroke="#bbb" points="{place(0, 0)} {place(most, most)}"/>',
    ]
    for tick in range(0, int(most) + 1, max(1, int(most) // 6)):
        (x, y), (x0, y0) = place(tick, 0).split(","), place(0, tick).split(",")
        lines.append(f'<text x="{x}" y="{float(y) + 16:.1f}" text-anchor="middle">{tick}</text>')
        lines.append(f'<text x="{float(x0) - 8:.1f}" y="{y0}" text-anchor="end">{tick}</text>')
    for index, (system, kept) in enumerate(fleet.sweep.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        points = " ".join(place(s * rate, s * rate * share) for s, share in zip(fleet.speeds, kept, strict=True))
        lines.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{points}"/>')
        below = _TOP + 14 * (index + 1)
        lines.append(
            f'<text x="{left + _LEFT + 10}" y="{below}" fill="{colour}">{escape(SYSTEMS[system].title)}</text>'
        )
    return "\n".join(lines)
