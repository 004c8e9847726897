"""Draws a sweep as one SVG picture: recall against milliseconds, the size of a mark by the bytes of a vector.

Colours are Okabe and Ito's, which people who are colour-blind can tell apart; lines differ by their dashes and marks by
their numbers too. The picture follows the dark mode of what shows it, and refers to no other file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from clip_batch.index.merge.sweep import Candidate, EffortResult, Sweep

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#888888", "currentColor")
"""One for each index key; a sweep of more keys starts again."""

DASHES = {0: "none", 10: "7 4", 30: "2 3"}
"""The line of each re-ranking factor."""

LEFT, TOP, WIDTH, HEIGHT = 64, 100, 560, 400
"""Where the plot lies in the picture."""

LIST, LINE = LEFT + WIDTH + 56, 22
"""Where the list of candidates begins, from the left, and the height of its lines."""

COLUMNS = (56, 108, 180, 240)
"""Where a line's number, recall, milliseconds and bytes end; its key comes last, as it may be long."""

WHOLE_WIDTH = LIST + 620
SMALLEST, LARGEST = 4.0, 14.0
"""Radii of the marks of the fewest and of the most bytes that are told apart."""

RECALLS = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 1.0)
"""Recalls that may have a line across the plot."""

LABEL = 16.0
"""Width and height of a mark's number."""

STYLE = """
svg { color: #1a1a1a; background: #ffffff; font: 13px system-ui, sans-serif; }
text { fill: currentColor; } .quiet { opacity: 0.75; } .mark { fill-opacity: 0.45; } .large { fill-opacity: 0; }
.grid { stroke: currentColor; stroke-opacity: 0.15; } .goal { stroke: currentColor; stroke-dasharray: 4 4; }
.leader { stroke: currentColor; stroke-opacity: 0.6; }
.taken { stroke: currentColor; stroke-width: 2; fill: none; } .bold { font-weight: bold; }
.end { text-anchor: end; } .middle { text-anchor: middle; }
@media (prefers-color-scheme: dark) { svg { color: #e8e8e8; background: #16181c; } }
"""


@dataclass(frozen=True)
class Axes:
    """Milliseconds from `low` to `high` on a scale of powers of ten, and recalls from `least` to 1.

    The recall's scale spreads what is near 1, where candidates differ.
    """

    low: float
    high: float
    least: float

    def x(self, ms: float) -> float:
        """The place from the left of some milliseconds."""
        return LEFT + WIDTH * math.log(max(ms, self.low) / self.low) / math.log(self.high / self.low)

    def y(self, recall: float) -> float:
        """The place from the top of a recall."""
        return TOP + HEIGHT * (1 - (_spread(recall) - _spread(self.least)) / (_spread(1.0) - _spread(self.least)))

    @classmethod
    def around(cls, results: Sequence[EffortResult], goal: float) -> Axes:
        """The axes on which all results and the recall asked for have their place."""
        times = [result.ms for result in results] or [1.0]
        lowest = min([goal, *(result.recall for result in results)])
        least = max((recall for recall in RECALLS[:5] if recall < lowest), default=0.0)
        return cls(min(times) / 1.3, max(times) * 1.3, least)


def svg(sweep: Sweep) -> str:
    """The picture of a sweep as the text of an SVG file."""
    results = [result for candidate in sweep.candidates for result in candidate.tries]
    axes = Axes.around(results, sweep.recall)
    height = max(TOP + HEIGHT + 70, TOP + LINE * (len(sweep.candidates) + 5))
    title = f"Recall and time of {len(sweep.candidates)} candidates"
    about = f"{sweep.sample:,} of {sweep.rows:,} {sweep.modality} rows of {sweep.dim} dimensions; one thread"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WHOLE_WIDTH} {height}" width="{WHOLE_WIDTH}"'
            f' height="{height}" role="img" aria-label="{title}">',
            f"<style>{STYLE}</style>",
            _text(LEFT, 30, title, "bold"),
            _text(LEFT, 50, about, "quiet"),
            *_grid(axes, sweep.recall),
            *_curves(axes, sweep.candidates),
            *_marks(axes, sweep),
            *_list(sweep),
            "</svg>\n",
        ]
    )


def shown(candidate: Candidate) -> EffortResult:
    """The result that a candidate's mark shows: the best one, or that of the highest recall."""
    return candidate.best or max(candidate.tries, key=lambda each: each.recall)


def radius(size: int, sizes: Sequence[int]) -> float:
    """The radius of the mark of a candidate of so many bytes a vector: its area grows with the bytes."""
    return max(SMALLEST, LARGEST * math.sqrt(size / max(sizes)))


def label_places(marks: Sequence[tuple[float, float, float]]) -> list[tuple[float, float]]:
    """The centre of the number of each mark (x, y, radius): beside it, where it covers the fewest marks and numbers."""
    places: list[tuple[float, float]] = []
    for x, y, size in marks:
        away = size + LABEL / 2
        around = [
            (x + far * away * math.cos(angle), y + far * away * math.sin(angle))
            for far in (1.0, 1.8, 2.6)
            for angle in (math.pi * step / 4 for step in (7, 1, 5, 3, 0, 4, 6, 2))
        ]
        places.append(min(around, key=lambda place: _covered(place, places, marks)))
    return places


def _covered(
    place: tuple[float, float], labels: Sequence[tuple[float, float]], marks: Sequence[tuple[float, float, float]]
) -> int:
    """How many numbers and marks a number at a place would cover; the plot's edges count too."""
    x, y = place
    numbers = sum(abs(x - left) < LABEL and abs(y - top) < LABEL for left, top in labels)
    covered = sum(math.hypot(x - left, y - top) < size + LABEL / 2 - 1 for left, top, size in marks)
    outside = not (LEFT <= x <= LEFT + WIDTH and TOP - LABEL <= y <= TOP + HEIGHT)
    return 2 * numbers + covered + 2 * outside


def _spread(recall: float) -> float:
    return -math.log10(1.01 - recall)


def _text(x: float, y: float, text: str, style: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{style}">{escape(text)}</text>'


def _grid(axes: Axes, goal: float) -> Iterator[str]:
    """Lines across the plot with what they stand for, and the recall asked for."""
    bottom, right = TOP + HEIGHT, LEFT + WIDTH
    for recall in RECALLS:
        if recall >= axes.least:
            y = axes.y(recall)
            yield f'<line x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>'
            yield _text(LEFT - 8, y + 4, f"{recall:g}", "end")
    for ms in _ticks(axes.low, axes.high):
        x = axes.x(ms)
        yield f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}" class="grid"/>'
        yield _text(x, bottom + 18, f"{ms:g}", "middle")
    y = axes.y(goal)
    yield f'<line x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" class="goal"/>'
    yield _text(right + 6, y + 4, "goal", "quiet")
    yield _text(LEFT + WIDTH / 2, bottom + 40, "milliseconds a query", "middle quiet")
    yield _text(LEFT - 44, TOP - 22, "recall@10", "quiet")


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from low to high: 1, 2 and 5 by powers of ten, or where these are many the powers alone."""
    powers = [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    steps = (1, 2, 5) if high < 1000 * low else (1,)
    return [round(step * power, 9) for power in powers for step in steps if low <= step * power <= high]


def _colours(candidates: Sequence[Candidate]) -> dict[str, str]:
    keys = dict.fromkeys(candidate.key for candidate in candidates)
    return {key: COLOURS[number % len(COLOURS)] for number, key in enumerate(keys)}


def _curves(axes: Axes, candidates: Sequence[Candidate]) -> Iterator[str]:
    """The line of each candidate through all of its efforts."""
    colours = _colours(candidates)
    for candidate in candidates:
        points = " ".join(f"{axes.x(one.ms):.1f},{axes.y(one.recall):.1f}" for one in candidate.tries)
        dash = DASHES.get(candidate.rerank, "none")
        yield (
            f'<polyline points="{points}" fill="none" stroke="{colours[candidate.key]}" stroke-width="1.5"'
            f' stroke-opacity="0.7" stroke-dasharray="{dash}"/>'
        )


def _marks(axes: Axes, sweep: Sweep) -> Iterator[str]:
    """A numbered mark for each candidate, which says its figures where a pointer rests on it."""
    colours, sizes = _colours(sweep.candidates), [candidate.bytes_per_vector for candidate in sweep.candidates]
    marks = []
    for number, candidate in enumerate(sweep.candidates, 1):
        result, size = shown(candidate), radius(candidate.bytes_per_vector, sizes)
        x, y, colour = axes.x(result.ms), axes.y(result.recall), colours[candidate.key]
        marks.append((x, y, size))
        style = "mark" if candidate.fits else "large"
        yield (
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size:.1f}" class="{style}" fill="{colour}" stroke="{colour}">'
            f"<title>{escape(f'{number}. {_name(candidate)}: {_figures(candidate)}')}</title></circle>"
        )
        if candidate == sweep.recommended:
            yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size + 4:.1f}" class="taken"/>'
    for number, (place, mark) in enumerate(zip(label_places(marks), marks, strict=True), 1):
        yield from _number(number, place, mark)


def _number(number: int, place: tuple[float, float], mark: tuple[float, float, float]) -> Iterator[str]:
    """The number of a mark (x, y, radius), with a line to it where it could not be beside it."""
    (x, y), (left, top, size) = place, mark
    if (away := math.dist(place, (left, top))) > size + LABEL:
        near, far = size / away, 1 - LABEL / 2 / away
        start, end = [(left + share * (x - left), top + share * (y - top)) for share in (near, far)]
        yield f'<line x1="{start[0]:.1f}" y1="{start[1]:.1f}" x2="{end[0]:.1f}" y2="{end[1]:.1f}" class="leader"/>'
    yield _text(x, y + 4, f"{number}", "middle")


def _list(sweep: Sweep) -> Iterator[str]:
    """The candidates by their numbers, and what the marks mean."""
    colours = _colours(sweep.candidates)
    for end, heading in zip(COLUMNS[1:], ("recall", "ms", "B/vector"), strict=True):
        yield _text(LIST + end, TOP - 26, heading, "end quiet")
    for number, candidate in enumerate(sweep.candidates, 1):
        y, colour = TOP + LINE * (number - 1), colours[candidate.key]
        dash = DASHES.get(candidate.rerank, "none")
        style = "bold" if candidate == sweep.recommended else ""
        yield (
            f'<line x1="{LIST}" x2="{LIST + 28}" y1="{y - 4}" y2="{y - 4}" stroke="{colour}" stroke-width="3"'
            f' stroke-dasharray="{dash}"/>'
        )
        result = shown(candidate)
        columns = f"{number}", f"{result.recall:.3f}", f"{result.ms:.3g}", f"{candidate.bytes_per_vector:,}"
        for end, figure in zip(COLUMNS, columns, strict=True):
            yield _text(LIST + end, y, figure, f"{style} end")
        yield _text(LIST + COLUMNS[-1] + 16, y, _name(candidate), style)
    below = TOP + LINE * (len(sweep.candidates) + 1)
    ring = "Ring: the recommended one." if sweep.recommended else "None reaches the goal within the memory."
    for number, line in enumerate(
        (
            "A mark lies at the least effort that reaches the goal, or else at the highest recall.",
            "Its area: bytes a vector in memory; empty: too large for the memory.",
            f"Dashed: --rerank 10; dotted: --rerank 30. {ring}",
        )
    ):
        yield _text(LIST, below + 18 * number, line, "quiet")


def _name(candidate: Candidate) -> str:
    return candidate.key + (f" --rerank {candidate.rerank}" if candidate.rerank else "")


def _figures(candidate: Candidate) -> str:
    result = shown(candidate)
    return f"{result.recall:.3f}, {result.ms:.3g} ms, {candidate.bytes_per_vector:,} B"
