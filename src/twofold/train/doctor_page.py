"""What the doctor found, as one HTML page; nothing outside the file is needed."""

import base64
import io
import json
import math
from collections.abc import Sequence
from html import escape

import numpy as np
from PIL import Image

from twofold.measure.audit_page import STYLE
from twofold.measure.collapse import Health
from twofold.measure.negatives import BINS, Microscope
from twofold.train.doctor import Doctored

W, H, LEFT, BELOW = 560, 200, 52, 26  # of a plot, in its own units; what the axes take of it
MORE = """
:root { color-scheme: light dark; --warn: #8a5a00; --one: #2b6cb0; --two: #b8541a; --soft: #f3f3f5 }
@media (prefers-color-scheme: dark) { :root { --ink: #ececf0; --pale: #a0a0aa; --line: #3c3c43; --bad: #ff8a75;
  --good: #6fcf8e; --warn: #e6b450; --one: #7db4ee; --two: #f0a06a; --soft: #26262b } body { background: #18181b } }
.warn { color: var(--warn) } .plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(19rem, 1fr));
  gap: 1rem 1.4rem } svg { width: 100%; height: auto; display: block } svg text { font-size: 11px; fill: var(--pale) }
.axis { stroke: var(--line) } .one, .two, .mark { fill: none; stroke: var(--one); stroke-width: 1.8 }
.two { stroke: var(--two) } .mark { stroke: var(--pale); stroke-dasharray: 4 3 }
.bars { fill: var(--one); opacity: .55 }
.bars.b { fill: var(--two) } .plot h3 { font-size: .95rem } .plot p { font-size: .85rem; color: var(--pale) }
pre { background: var(--soft); padding: .6rem; overflow-x: auto; font-size: .82rem }
.sheet { display: grid; gap: .5rem } .near { display: flex; gap: .35rem; flex-wrap: wrap }
.near figure:first-child { margin-right: .6rem }  @media print { .plot { break-inside: avoid } }
"""
Points = Sequence[tuple[float, float]]


def page(done: Doctored, *, notice: str = "") -> str:
    """Verdicts first, then curves, the embeddings, the negatives, neighbours, and how the run was asked for."""
    title = f"{escape(str(done.record.get('method', 'A run')))} — {escape(done.name)}"
    body = [f"<h1>{title}</h1>", f'<p class="pale">{escape(_what(done))}</p>', "<h2>Verdict</h2>"]
    for verdict in done.verdicts:
        body.append(
            f'<section><h3><span class="badge {verdict.tone}">{escape(verdict.name)}</span> {escape(verdict.says)}</h3>'
            f"<p><small>{escape(verdict.evidence)}</small></p>"
            + (f"<p>{escape(verdict.advice)}</p>" if verdict.advice else "")
            + "</section>"
        )
    body += ["<h2>The training</h2>", f'<div class="plots">{"".join(_curves(done))}</div>']
    if done.health is not None:
        body += ["<h2>The embeddings</h2>", _healths(done.health, done.head)]
        body.append(f'<div class="plots">{_spectrum(done.health)}</div>')
    if done.microscope is not None:
        body += ["<h2>Which negatives get the gradient</h2>", *_negatives(done, done.microscope)]
    if done.neighbours:
        body += ["<h2>Nearest neighbours</h2>", _sheet(done)]
    record = json.dumps(done.record, indent=1, ensure_ascii=False)
    body += ["<h2>As it was asked for</h2>", f"<pre>{escape(record)}</pre>", f"<footer>{escape(notice)}</footer>"]
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{STYLE}{MORE}</style>" + "\n".join(body) + "</html>\n"
    )


def markdown(done: Doctored) -> str:
    """The verdicts, for a pull request or a note."""
    lines = [f"# {done.record.get('method', 'A run')} — {done.name}", "", _what(done), ""]
    for verdict in done.verdicts:
        lines.append(
            f"* **{verdict.name}** ({verdict.tone}): {verdict.says} {verdict.evidence}. {verdict.advice}".rstrip()
        )
    return "\n".join(lines) + "\n"


def _what(done: Doctored) -> str:
    steps = done.log[-1]["step"] if done.log else 0
    said = f"{steps:,} of {done.record.get('steps', steps):,} steps of {done.record.get('batch', '?')}"
    return said + (f" on {done.record['data']}" if "data" in done.record else "")


def _curves(done: Doctored) -> list[str]:
    plots = []
    for name, also, words in (
        ("loss", "chance", "of every batch; dashed: of embeddings that know nothing, where there is such a level"),
        ("rank", None, "effective rank of a batch: how many dimensions are in use"),
        ("spread", None, "of directions: 0 is one point, 1 all around"),
        ("target_variance", None, "of what is predicted: 0 is a constant"),
        ("lr", None, "learning rate"),
    ):
        points = [(line["step"], line[name]) for line in done.log if isinstance(line.get(name), int | float)]
        if len(points) < 2:
            continue
        level = done.log[-1].get(also) if also else None
        low = 0.0 if name != "loss" else None
        plots.append(_plot(name.replace("_", " "), words, [(points, "one")], x="step", level=level, low=low))
    return plots


def _healths(plain: Health, head: Health | None) -> str:
    rows = [
        ("items", "n", "{:,}"),
        ("width", "width", "{:,}"),
        ("effective rank", "rank", "{:.1f}"),
        ("axes that hold 90 % of the variance", "axes", "{}"),
        ("LiDAR", "lidar", "{:.1f}"),
        ("α-ReQ", "alpha", "{:.2f}"),
        ("spread of directions", "spread", "{:.3f}"),
        ("mean cosine of two items", "anisotropy", "{:.3f}"),
        ("uniformity", "uniformity", "{:.2f}"),
        ("alignment of two views", "alignment", "{:.3f}"),
        ("dead units", "dead", "{:.1%}"),
        ("length, mean", "norm", "{:.2f}"),
        ("length, deviation over mean", "norm_varies", "{:.2f}"),
    ]
    columns = [plain, *([head] if head else [])]
    lines = ["<tr><th></th><th>encoder</th>" + ("<th>behind the head</th>" if head else "") + "</tr>"]
    for words, name, form in rows:
        values = [getattr(column, name) for column in columns]
        cells = "".join(f"<td>{'–' if value is None else form.format(value)}</td>" for value in values)
        lines.append(f"<tr><th>{words}</th>{cells}</tr>")
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def _spectrum(found: Health) -> str:
    points = [(k + 1, math.log10(share)) for k, share in enumerate(found.spectrum) if share > 1e-9]
    words = f"log₁₀ of each principal axis's share of the variance; {found.axes} hold 90 %"
    return _plot("spectrum", words, [(points, "one")], x="axis") if len(points) > 1 else ""


def _negatives(done: Doctored, seen: Microscope) -> list[str]:
    now = seen.now
    suggested = seen.suggested
    said = (
        f"At temperature {now.temperature:g}, {now.effective:.0f} of the {seen.negatives:.0f} negatives of an anchor "
        f"share its gradient (exp of the entropy); the hardest hundredth takes {100 * now.hardest:.0f} %. "
        + (
            f"{100 * seen.suspects:.1f} % of the negatives may be false, and take {100 * now.suspects:.0f} %. "
            if seen.suspects
            else ""
        )
        + (
            f"For these embeddings a temperature from {suggested[0]:.2g} to {suggested[1]:.2g} tells hard negatives "
            "from easy ones without giving all to a few; trained at another they would lie differently."
            if suggested
            else "No temperature tells hard negatives from easy ones here."
        )
    )
    curve = [(math.log10(at.temperature), at) for at in seen.curve]
    mark = math.log10(now.temperature)
    plots = [
        _histograms(seen),
        _plot(
            "negatives that share the gradient",
            "of all, by log₁₀ of the temperature; dashed: now",
            [([(x, at.effective / seen.negatives) for x, at in curve], "one")],
            x="log₁₀ τ",
            at=mark,
            low=0.0,
        ),
        _plot(
            "what few of them take",
            "blue: the hardest hundredth; orange: suspected false negatives",
            [([(x, at.hardest) for x, at in curve], "one"), ([(x, at.suspects) for x, at in curve], "two")],
            x="log₁₀ τ",
            at=mark,
            low=0.0,
        ),
    ]
    found = [f"<p>{escape(said)}</p>", f'<div class="plots">{"".join(plots)}</div>']
    for name, pairs in (("Hardest negatives", seen.closest), ("Suspected to be false", seen.suspected)):
        if pairs and done.thumbnails is not None:
            n = seen.anchors // 2
            cases = "".join(
                f'<div class="case">{_figure(done, a % n, "")}{_figure(done, b % n, f"{cosine:.3f}")}</div>'
                for a, b, cosine in pairs
            )
            found.append(f'<h3>{name}</h3><div class="cases">{cases}</div>')
    return found


def _sheet(done: Doctored) -> str:
    rows = []
    for row in done.neighbours:
        near = "".join(_figure(done, item, f"{cosine:.3f}") for item, cosine in row.nearest)
        rows.append(f'<div class="near">{_figure(done, row.item, done.ids[row.item][-24:])}{near}</div>')
    return f'<div class="sheet">{"".join(rows)}</div>'


def _figure(done: Doctored, item: int, words: str) -> str:
    assert done.thumbnails is not None
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(done.thumbnails[item])).save(file, "JPEG", quality=75, optimize=True)
    source = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
    name = escape(done.ids[item], quote=True)
    return f'<figure><img alt="{name}" title="{name}" src="{source}"><figcaption>{escape(words)}</figcaption></figure>'


def _plot(
    name: str,
    words: str,
    lines: Sequence[tuple[Points, str]],
    *,
    x: str,
    level: float | None = None,
    at: float | None = None,
    low: float | None = None,
) -> str:
    """Lines over common axes; `level` is drawn across, `at` upright, both dashed."""
    every = [point for points, _ in lines for point in points]
    ys = [y for _, y in every] + ([level] if level is not None else [])
    left, right = min(p[0] for p in every), max(p[0] for p in every)
    bottom, top = (min(ys) if low is None else min(low, *ys)), max(ys)
    top = top if top > bottom else bottom + 1

    def place(px: float, py: float) -> tuple[float, float]:
        u = (px - left) / ((right - left) or 1)
        v = (py - bottom) / (top - bottom)
        return LEFT + u * (W - LEFT - 8), H - BELOW - v * (H - BELOW - 10)

    drawn = [f'<path class="axis" d="M{LEFT} 8V{H - BELOW}H{W - 6}" fill="none"/>']
    if level is not None:
        _, y = place(left, level)
        drawn.append(f'<path class="mark" d="M{LEFT} {y:.1f}H{W - 6}"/>')
    if at is not None and left <= at <= right:
        along, _ = place(at, bottom)
        drawn.append(f'<path class="mark" d="M{along:.1f} 8V{H - BELOW}"/>')
    for points, kind in lines:
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in (place(*point) for point in points))
        drawn.append(f'<polyline class="{kind}" points="{path}"/>')
    drawn += [
        f'<text x="{LEFT - 5}" y="16" text-anchor="end">{top:.3g}</text>',
        f'<text x="{LEFT - 5}" y="{H - BELOW}" text-anchor="end">{bottom:.3g}</text>',
        f'<text x="{LEFT}" y="{H - 8}">{left:.3g}</text>',
        f'<text x="{W - 6}" y="{H - 8}" text-anchor="end">{x} {right:,.4g}</text>',
    ]
    return _figured(name, words, drawn)


def _histograms(seen: Microscope) -> str:
    top = max(*seen.positive, *seen.negative, 1e-9)
    wide = (W - LEFT - 8) / BINS
    drawn = []
    for shares, kind in ((seen.negative, "bars"), (seen.positive, "bars b")):
        for k, share in enumerate(shares):
            high = share / top * (H - BELOW - 10)
            if share:
                drawn.append(
                    f'<rect class="{kind}" x="{LEFT + k * wide:.1f}" y="{H - BELOW - high:.1f}" width="{wide:.1f}" '
                    f'height="{high:.1f}"/>'
                )
    drawn += [
        f'<path class="axis" d="M{LEFT} {H - BELOW}H{W - 6}" fill="none"/>',
        f'<text x="{LEFT}" y="{H - 8}">cosine −1</text>',
        f'<text x="{(W + LEFT) / 2}" y="{H - 8}" text-anchor="middle">0</text>',
        f'<text x="{W - 6}" y="{H - 8}" text-anchor="end">1</text>',
    ]
    return _figured("similarities", "blue: of negatives; orange: of the two views of a picture", drawn)


def _figured(name: str, words: str, drawn: list[str]) -> str:
    label = escape(f"{name}: {words}", quote=True)
    return (
        f'<div class="plot"><h3>{escape(name)}</h3><svg viewBox="0 0 {W} {H}" role="img" aria-label="{label}">'
        f"{''.join(drawn)}</svg><p>{escape(words)}</p></div>"
    )
