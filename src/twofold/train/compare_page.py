"""Methods compared, as one HTML page; nothing outside the file is needed."""

from html import escape

from twofold.measure.audit_page import STYLE
from twofold.measure.metrics import Interval
from twofold.train.compare import PROBES, Comparison, Row

BARS = """
.bar { position: relative; width: 9rem; height: .7rem; background: #ececef; display: inline-block }
.bar i { position: absolute; top: 0; bottom: 0; left: 0; background: #8fa9c4 } .base .bar i { background: #c9c9cf }
.bar b { position: absolute; top: .28rem; height: .14rem; background: var(--ink) } td.n { text-align: right }
.base td, .base th { color: var(--pale) } @media print { .bar { print-color-adjust: exact } }
"""


def page(done: Comparison) -> str:
    """Verdict first, then what the probes read, what the features look like, and what the trainings cost."""
    title = f"Methods on {escape(done.data.rstrip('/').rsplit('/', 1)[-1])}"
    every = sorted([*done.rows, *done.baselines], key=lambda row: -row.accuracy["linear"].value)
    body = [
        f"<h1>{title}</h1>",
        f'<p class="pale">{done.items:,} pictures trained on, {done.held_out:,} held out; in gray, what learned '
        "nothing here. Intervals are 95 % over held-out pictures.</p>",
        "<h2>Verdict</h2><ul>",
        *(f"<li>{escape(line)}</li>" for line in done.verdict),
        "</ul><h2>What it does not say</h2><ul>",
        *(f"<li>{escape(line)}</li>" for line in done.caveats),
        "</ul><h2>Labels read from the features</h2>",
        _table(["", "linear", *PROBES], [_accuracies(row) for row in every]),
        "<h2>The features</h2>",
        _table(
            ["", "effective rank", "of", "uniformity", "alignment", "view retrieval"], [_health(row) for row in every]
        ),
        '<p class="pale">Uniformity: lower is spread more evenly, 0 is one point. Alignment: squared distance of two '
        "views of a picture, 0 is best, and what a collapsed encoder has too. View retrieval: how often, in percent, a "
        "view is nearest to the other one of its picture; of what needs no labels, it went best with accuracy.</p>",
        "<h2>Needs and costs</h2>",
        _table(
            ["", "negatives", "slow copy", "mind", "images/s", "seconds", "MiB"],
            [_costs(row) for row in done.rows],
        ),
    ]
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{STYLE}{BARS}</style>" + "\n".join(body) + "</html>\n"
    )


def _table(header: list[str], rows: list[str]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def _line(row: Row, cells: list[str]) -> str:
    kind = "" if row.method else ' class="base"'
    return f"<tr{kind}><th>{escape(row.name)}</th>" + "".join(cells) + "</tr>"


def _accuracies(row: Row) -> str:
    figures = [f'<td class="n">{_percent(row.accuracy[probe])}</td>' for probe in PROBES]
    return _line(row, [f"<td>{_bar(row.accuracy['linear'])}</td>", *figures])


def _bar(value: Interval) -> str:
    low, high = 100 * value.low, 100 * value.high
    return (
        f'<span class="bar"><i style="width:{100 * value.value:.1f}%"></i>'
        f'<b style="left:{low:.1f}%;width:{high - low:.1f}%"></b></span>'
    )


def _percent(value: Interval) -> str:
    return f"{100 * value.value:.1f} <small>{100 * value.low:.0f}–{100 * value.high:.0f}</small>"


def _health(row: Row) -> str:
    agreed = f"{row.alignment:.3f}" if row.alignment is not None else "–"
    found = f"{100 * row.view_retrieval:.1f}" if row.view_retrieval is not None else "–"
    figures = [f"{row.rank:.1f}", str(row.width), f"{row.uniformity:.2f}".replace("-", "−"), agreed, found]
    return _line(row, [f'<td class="n">{figure}</td>' for figure in figures])


def _costs(row: Row) -> str:
    words = (
        []
        if row.facts is None
        else [row.facts.negatives or "no", "yes" if row.facts.momentum else "no", row.facts.mind]
    )
    figures = [
        f"{value:,.0f}" if value is not None else "–" for value in (row.images_per_second, row.seconds, row.memory)
    ]
    return _line(
        row, [*(f"<td>{escape(word)}</td>" for word in words), *(f'<td class="n">{figure}</td>' for figure in figures)]
    )
