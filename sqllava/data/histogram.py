"""Lengths -> a histogram: as numbers, and drawn as a small SVG picture. Used by `check.py`."""

from dataclasses import dataclass

import numpy as np

_BARS = 40
_WIDTH, _HEIGHT, _MARGIN = 640, 240, 40


@dataclass(frozen=True)
class Histogram:
    """Counts of lengths.

    Attributes:
        edges: where the bars begin and end, one more than there are bars.
        counts: how many lengths fall into each; the last bar holds all that are longer, too.
    """

    edges: list[int]
    counts: list[int]


def count(lengths: np.ndarray) -> Histogram:
    """Counts lengths in bars of equal width, so that the longest 0.1 % share the last one."""
    top = int(np.quantile(lengths, 0.999)) + 1 if len(lengths) else 1
    width = -(-top // _BARS)
    bars = np.minimum(lengths // width, _BARS - 1)
    counts = np.bincount(bars, minlength=_BARS)
    return Histogram([width * bar for bar in range(_BARS + 1)], counts.tolist())


def draw(histogram: Histogram, title: str, mark: int | None = None) -> str:
    """The histogram as SVG.

    Args:
        mark: a length to draw a line at, such as the model's longest.
    """
    bottom, span = _HEIGHT - _MARGIN, _WIDTH - 2 * _MARGIN
    highest = max(histogram.counts) or 1
    step = span / len(histogram.counts)
    shapes = []
    for bar, number in enumerate(histogram.counts):
        height = (bottom - _MARGIN) * number / highest
        shapes.append(
            f'<rect x="{_MARGIN + bar * step:.1f}" y="{bottom - height:.1f}" '
            f'width="{step - 1:.1f}" height="{height:.1f}" fill="#1f5fa8"/>'
        )
    last = histogram.edges[-1]
    for share in (0, 0.25, 0.5, 0.75, 1):
        label = f"{round(last * share):,}{'+' if share == 1 else ''}"
        x = _MARGIN + span * share
        shapes.append(f'<text x="{x:.0f}" y="{bottom + 16}" text-anchor="middle">{label}</text>')
    if mark is not None and mark <= last:
        x = _MARGIN + span * mark / last
        shapes.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_MARGIN}" y2="{bottom}" stroke="#b3261e"/>'
        )
    shapes.append(f'<text x="{_MARGIN}" y="{_MARGIN - 6}">{highest:,}</text>')
    shapes.append(f'<text x="{_WIDTH // 2}" y="20" text-anchor="middle">{title}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        'font-family="sans-serif" font-size="12">\n'
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>\n'
        + "\n".join(shapes)
        + "\n</svg>\n"
    )
