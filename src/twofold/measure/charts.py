"""Charts as SVG and HTML in text: nothing but strings, so that a page needs nothing outside itself.

Colours come from the page's style: classes `one`, `two`, `mark`, `bars`, `axis`, and `c0` … `c9` for groups.
"""

import math
from collections.abc import Sequence
from html import escape

import numpy as np
from jaxtyping import Float

from twofold.measure.structure import Hierarchy

W, H, LEFT, BELOW = 560, 200, 80, 32  # of a plot, in its own units; what the axes take of it
ROW, TREE, NAME = 18, 300, 200  # of a dendrogram: height of a leaf, width of the lines, room for names
Points = Sequence[tuple[float, float]]


def lines(
    name: str,
    words: str,
    drawn: Sequence[tuple[Points, str]],
    *,
    x: str,
    level: float | None = None,
    at: float | None = None,
    low: float | None = None,
) -> str:
    """Lines over common axes; `level` is drawn across, `at` upright, both dashed.

    A plot over steps carries its numbers and says `data-x`, so that the page's script can zoom into it.
    """
    every = [point for points, _ in drawn for point in points]
    ys = [y for _, y in every] + ([level] if level is not None else [])
    left, right = min(p[0] for p in every), max(p[0] for p in every)
    bottom, top = (min(ys) if low is None else min(low, *ys)), max(ys)
    top = top if top > bottom else bottom + 1

    def place(px: float, py: float) -> tuple[float, float]:
        u = (px - left) / ((right - left) or 1)
        v = (py - bottom) / (top - bottom)
        return LEFT + u * (W - LEFT - 8), H - BELOW - v * (H - BELOW - 10)

    parts = [f'<path class="axis" d="M{LEFT} 8V{H - BELOW}H{W - 6}" fill="none"/>']
    if level is not None:
        parts.append(f'<path class="mark level" data-y="{level:.6g}" d="M{LEFT} {place(left, level)[1]:.1f}H{W - 6}"/>')
    if at is not None and left <= at <= right:
        parts.append(f'<path class="mark" d="M{place(at, bottom)[0]:.1f} 8V{H - BELOW}"/>')
    for points, kind in drawn:
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in (place(*point) for point in points))
        numbers = " ".join(f"{a:.6g},{b:.5g}" for a, b in points)
        parts.append(f'<polyline class="{kind}" points="{path}" data-p="{numbers}"/>')
    parts += [
        f'<text class="top" x="{LEFT - 5}" y="22" text-anchor="end">{top:.3g}</text>',
        f'<text class="bottom" x="{LEFT - 5}" y="{H - BELOW}" text-anchor="end">{bottom:.3g}</text>',
        f'<text class="left" x="{LEFT}" y="{H - 8}">{left:.4g}</text>',
        f'<text class="right" x="{W - 6}" y="{H - 8}" text-anchor="end">{right:,.4g}</text>',
        f'<text x="{(LEFT + W) / 2}" y="{H - 8}" text-anchor="middle">{escape(x)}</text>',
    ]
    zoomed = "" if x != "step" else ' data-x="step"' + (' data-low="0"' if low is not None else "")
    return figure(name, words, parts, zoomed)


def histograms(name: str, words: str, shares: Sequence[tuple[Sequence[float], str]], ends: tuple[str, str]) -> str:
    """Bars of shares over equal bins, over each other; `ends` are the words under the first bin and the last."""
    top = max(1e-9, *(max(each) for each, _ in shares))
    parts = []
    for each, kind in shares:
        wide = (W - LEFT - 8) / len(each)
        for k, share in enumerate(each):
            if share:
                high = share / top * (H - BELOW - 10)
                parts.append(
                    f'<rect class="{kind}" x="{LEFT + k * wide:.1f}" y="{H - BELOW - high:.1f}" width="{wide:.1f}" '
                    f'height="{high:.1f}"/>'
                )
    parts += [
        f'<path class="axis" d="M{LEFT} {H - BELOW}H{W - 6}" fill="none"/>',
        f'<text x="{LEFT}" y="{H - 8}">{escape(ends[0])}</text>',
        f'<text x="{W - 6}" y="{H - 8}" text-anchor="end">{escape(ends[1])}</text>',
    ]
    return figure(name, words, parts)


def figure(name: str, words: str, parts: Sequence[str], attributes: str = "") -> str:
    """A titled plot of W × H units with its words beneath; `attributes` are the picture's, as HTML."""
    label = escape(f"{name}: {words}", quote=True)
    return (
        f'<div class="plot"><h3>{escape(name)}</h3><svg viewBox="0 0 {W} {H}" role="img" aria-label="{label}"'
        f"{attributes}>"
        f"{''.join(parts)}</svg><p>{escape(words)}</p></div>"
    )


def heat(table: Float[np.ndarray, "c c"], names: Sequence[str], order: Sequence[int], *, most: int = 24) -> str:
    """A table of shares, darker where there are more; rows and columns in `order`. Of many only the most confused."""
    if len(order) > most:
        mixed = (1 - np.diag(table)).argsort()[::-1][:most]
        order = [k for k in order if k in set(mixed.tolist())]
    lines = ["<tr><th></th>" + "".join(f'<th class="up"><span>{escape(names[k])}</span></th>' for k in order) + "</tr>"]
    for row in order:
        cells = "".join(
            f'<td style="--s:{round(100 * math.sqrt(table[row, k]))}%" title="{escape(names[row], quote=True)} → '
            f'{escape(names[k], quote=True)}">{f"{100 * table[row, k]:.0f}" if table[row, k] >= 0.005 else ""}</td>'
            for k in order
        )
        lines.append(f"<tr><th>{escape(names[row])}</th>{cells}</tr>")
    return f'<div class="wide"><table class="heat">{"".join(lines)}</table></div>'


def tree(found: Hierarchy, names: Sequence[str]) -> str:
    """A dendrogram: classes down the right, joined to the left at their mean cosine distance."""
    count = len(names)
    place = {leaf: ROW * (k + 0.5) for k, leaf in enumerate(found.order)}
    reach: dict[int, float] = {leaf: 0.0 for leaf in range(count)}
    top = max([height for _, _, height in found.merges] + [1e-9])

    def along(height: float) -> float:
        return 4 + TREE * (1 - height / top)

    parts = []
    for k, (a, b, height) in enumerate(found.merges):
        x = along(height)
        parts.append(f'<path class="one" d="M{along(reach[a]):.1f} {place[a]:.1f}H{x:.1f}V{place[b]:.1f}')
        parts[-1] += f'H{along(reach[b]):.1f}"/>'
        place[count + k], reach[count + k] = (place[a] + place[b]) / 2, height
    for leaf in range(count):
        parts.append(f'<text x="{TREE + 10}" y="{place[leaf] + 4:.1f}">{escape(names[leaf][:30])}</text>')
    high = ROW * count + 16
    parts.append(f'<text x="4" y="{high - 2}">{top:.2f}</text><text x="{TREE - 8}" y="{high - 2}">0</text>')
    words = "Classes joined two by two, at the mean cosine distance of their directions"
    return (
        f'<svg class="tree" viewBox="0 0 {TREE + NAME} {high}" role="img" aria-label="{words}">{"".join(parts)}</svg>'
        f'<p class="pale">{words}.</p>'
    )


def scatter(
    places: Float[np.ndarray, "m 2"], items: Sequence[int], groups: Sequence[int], titles: Sequence[str]
) -> str:
    """Points in a square, coloured by group (−1 pale); each says which item it is, for a script to show."""
    parts = [
        f'<circle class="{f"c{group % 10}" if group >= 0 else "cn"}" cx="{10 + 480 * x:.1f}" cy="{10 + 480 * y:.1f}" '
        f'r="4.5" data-i="{item}" tabindex="0"><title>{escape(title)}</title></circle>'
        for (x, y), item, group, title in zip(places.tolist(), items, groups, titles, strict=True)
    ]
    return f'<svg class="map" viewBox="0 0 500 500" role="img" aria-label="Map of the items">{"".join(parts)}</svg>'
