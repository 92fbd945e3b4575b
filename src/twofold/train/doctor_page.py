"""What the doctor found, as one HTML page; nothing outside the file is needed."""

import base64
import io
import json
import math
from collections.abc import Callable, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

import numpy as np
from PIL import Image

from twofold.data.atomic import write_atomically
from twofold.data.samples import ATTRIBUTION
from twofold.data.sources import Source
from twofold.errors import TwofoldError
from twofold.measure.audit_page import STYLE
from twofold.measure.charts import heat, histograms, lines, scatter, tree
from twofold.measure.collapse import Health
from twofold.measure.negatives import Microscope
from twofold.measure.structure import Structure
from twofold.progress import TERMINAL
from twofold.train.doctor import Against, Doctored, Side, doctor
from twofold.train.masked import Predicted

CURVES = (  # figures of the log, what they are beside, words, and whether they start at 0
    (
        ("loss",),
        "chance",
        "of every batch; dashed: of embeddings that know nothing, where there is such a level",
        False,
    ),
    (("rank",), "", "effective rank of a batch: how many dimensions are in use", True),
    (("spread",), "", "of directions: 0 is one point, 1 all around", True),
    (
        ("positive", "hardest"),
        "",
        "cosines of fixed pictures: blue two views, orange the hardest hundredth of others",
        True,
    ),
    (("sharing",), "", "how many negatives share an anchor's gradient, of all", True),
    (("target_variance",), "", "of what is predicted: 0 is a constant", True),
    (("ema_gap",), "", "how far the slow copy lies from the encoder, of the weights' length", True),
    (("scale",), "", "one over the temperature, where it is learned", True),
    (("recall",), "", "in validation", True),
    (("lr",), "", "learning rate", True),
)
FIGURES = (
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
)
LOOKED_AT = 400  # items, when a training ends
OF_WHAT = {"batch": "a batch of views", "pairs": "pairs", "queue": "the queue", "corpus": "a sample of the data"}


class _Pictures:
    """Every picture of the page once, as a class of its style sheet, however often it is shown."""

    def __init__(self, done: Doctored):
        self.shown, self.used = done.shown, set[int]()

    def __call__(self, item: int, words: str = "") -> str:
        """A figure of an item, with words beneath."""
        assert self.shown is not None
        name = escape(self.shown.words[item] or self.shown.ids[item], quote=True)
        title = escape(f"{self.shown.ids[item]} {self.shown.words[item]}".strip(), quote=True)
        if self.shown.thumbnails is None:
            body = f'<i class="p word" title="{title}">{escape(name[:60])}</i>'
        else:
            self.used.add(item)
            body = f'<i class="p p{item}" role="img" aria-label="{name}" title="{title}"></i>'
        return f"<figure>{body}<figcaption>{escape(words)}</figcaption></figure>"

    def style(self) -> str:
        if self.shown is None or self.shown.thumbnails is None:
            return ""
        thumbnails = self.shown.thumbnails
        return "".join(f".p{item}{{background-image:url({inline(thumbnails[item])})}}" for item in sorted(self.used))


def inline(pixels: np.ndarray, quality: int = 70) -> str:
    """A picture as a URL that holds it."""
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, "WEBP", quality=quality, method=6)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def notice_of(data: Source | None) -> str:
    """What the licence of the pictures asks a page to say."""
    return ATTRIBUTION if data is not None and data.name == "openmoji" else ""


def page(done: Doctored, *, notice: str = "") -> str:
    """Verdicts first, then curves, embeddings, structure, negatives, neighbours, and how the run was asked for."""
    title = f"{escape(str(done.record.get('method', 'Embeddings')))} — {escape(done.name)}"
    picture = _Pictures(done)
    sections: list[tuple[str, str]] = [("Verdict", _verdicts(done))]
    if curves := _curves(done):
        hint = '<p class="pale hint">Drag across a curve to zoom into all of them; double click to see the whole.</p>'
        sections.append(("The training", hint + f'<div class="plots">{curves}</div>'))
    if done.sides:
        sections.append(("The embeddings", _healths(done)))
    for side in done.sides:
        of = f" of {side.name}" if len(done.sides) > 1 else ""
        sections += [(f"Map{of}", _map(done, side, picture)), (f"Structure{of}", _structure(side.structure, picture))]
    if done.microscopes:
        sections.append(("Which negatives get the gradient", _negatives(done, picture)))
    if done.predicted is not None:
        sections.append(("What is hidden", _predicted(done.predicted)))
    for side in done.sides:
        of = f" of {side.name}" if len(done.sides) > 1 else ""
        rows = [
            picture(row.item) + "".join(picture(item, f"{cosine:.3f}") for item, cosine in row.nearest)
            for row in side.neighbours
        ]
        sheet = "".join(f'<div class="near">{row}</div>' for row in rows)
        sections.append((f"Nearest neighbours{of}", f'<div class="sheet">{sheet}</div>'))
    if done.against is not None:
        sections.append((f"Beside {done.against.name}", _against(done, done.against, picture)))
    if done.policy is not None:
        words = "Pictures, and views of them as the encoder was trained on"
        sections.append(("Views", f'<img class="policy" alt="{words}" src="{inline(done.policy, 60)}">'))
    if done.record:
        record = json.dumps(done.record, indent=1, ensure_ascii=False)
        sections.append(("As it was asked for", f"<pre>{escape(record)}</pre>"))
    if done.environment:
        sections.append(("Where it ran", _table([(name, str(value)) for name, value in done.environment.items()])))
    links = "".join(f'<a href="#s{k}">{escape(name)}</a>' for k, (name, _) in enumerate(sections))
    body = "".join(f'<h2 id="s{k}">{escape(name)}</h2>{text}' for k, (name, text) in enumerate(sections))
    here = files("twofold.train")
    css, js = ((here / f"doctor.{kind}").read_text("utf-8") for kind in ("css", "js"))
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{STYLE}{css}{picture.style()}</style><h1>{title}</h1>"
        f'<p class="pale">{escape(_what(done))}</p><nav>{links}</nav>{body}<footer>{escape(notice)}</footer>'
        f"<script>{js}</script></html>\n"
    )


def reported(run: Path, data: Source, *, quiet: bool = False) -> tuple[Doctored, Path]:
    """Look at a run that has ended and write RUN/doctor.html: by a few hundred of the items it was trained on.

    By the log alone where they cannot be looked at: a report is no reason to lose a training.
    """
    try:
        done = doctor(run, data.split("train") if data.splits is not None else data, limit=LOOKED_AT, quiet=True)
    except TwofoldError as error:
        if not quiet:
            TERMINAL.print(f"  the report is by the log alone: {error}", highlight=False, markup=False)
        done = doctor(run)
    out = run / "doctor.html"
    text = page(done, notice=notice_of(data))
    write_atomically(out, lambda path: path.write_text(text, encoding="utf-8"))
    return done, out


def markdown(done: Doctored) -> str:
    """The verdicts, for a pull request or a note; and, where data were looked at, the figures and softest borders."""
    out = [f"# {done.record.get('method', 'Embeddings')} — {done.name}", "", _what(done), ""]
    for verdict in done.verdicts:
        out.append(
            f"* **{verdict.name}** ({verdict.tone}): {verdict.says} {verdict.evidence}. {verdict.advice}".rstrip()
        )
    for side in done.sides:
        heads = [("encoder", side.health), *([("behind the head", side.head)] if side.head else [])]
        out += ["", f"| {side.name} | " + " | ".join(name for name, _ in heads) + " |", "|---" * (1 + len(heads)) + "|"]
        out += [f"| {words} | {' | '.join(cells)} |" for words, *cells in _figures([each for _, each in heads])]
        out += ["", _sentence(side.promise)] if side.promise else []
        names = [group.name for group in side.structure.groups]
        out += [""] + [
            f"* {names[border.first]} | {names[border.second]}: {100 * border.share:.0f} % of neighbours lie across"
            for border in side.structure.borders[:5]
        ]
    if done.against is not None:
        out += ["", _said_against(done.against)]
    return "\n".join(out) + "\n"


def _what(done: Doctored) -> str:
    if not done.record:
        return f"{len(done.shown.ids):,} items looked at" if done.shown else ""
    steps = done.log[-1]["step"] if done.log else 0
    said = f"{steps:,} of {done.record.get('steps', steps):,} steps of {done.record.get('batch', '?')}"
    return said + (f" on {done.record['data']}" if "data" in done.record else "")


def _verdicts(done: Doctored) -> str:
    return "".join(
        f'<section><h3><span class="badge {verdict.tone}">{escape(verdict.name)}</span> {escape(verdict.says)}</h3>'
        f"<p><small>{escape(verdict.evidence)}</small></p>"
        + (f"<p>{escape(verdict.advice)}</p>" if verdict.advice else "")
        + "</section>"
        for verdict in done.verdicts
    )


def _curves(done: Doctored) -> str:
    plots = []
    for names, also, words, zero in CURVES:
        drawn = []
        for name, kind in zip(names, ("one", "two"), strict=False):
            points = [(line["step"], line[name]) for line in done.log if isinstance(line.get(name), int | float)]
            if len(points) > 1:
                drawn.append((points, kind))
        if drawn:
            level = done.log[-1].get(also) if also else None
            name = " and ".join(names).replace("_", " ")
            plots.append(lines(name, words, drawn, x="step", level=level, low=0.0 if zero else None))
    return "".join(plots)


def _figures(columns: Sequence[Health]) -> list[tuple[str, ...]]:
    rows = []
    for words, name, form in FIGURES:
        values = [getattr(column, name) for column in columns]
        if any(value is not None for value in values):
            rows.append((words, *("–" if value is None else form.format(value) for value in values)))
    return rows


def _healths(done: Doctored) -> str:
    heads, columns = [], []
    for side in done.sides:
        heads.append(side.name if len(done.sides) > 1 else "encoder")
        columns.append(side.health)
        if side.head is not None:
            heads.append("behind the head")
            columns.append(side.head)
    plots = []
    for side in done.sides:
        points = [(k + 1, math.log10(share)) for k, share in enumerate(side.health.spectrum) if share > 1e-9]
        if len(points) > 1:
            words = f"log₁₀ of each principal axis's share of the variance; {side.health.axes} hold 90 %"
            name = "spectrum" if len(done.sides) == 1 else f"spectrum of {side.name}"
            plots.append(lines(name, words, [(points, "one")], x="axis"))
    said = ""
    if done.gap is not None:
        said = (
            f"<p>The means of the two sides lie {done.gap.distance:.2f} apart; that is {100 * done.gap.share:.0f} % of "
            "the mean squared distance between an item of one and an item of the other.</p>"
        )
    said += "".join(f"<p>{escape(_sentence(side.promise))}</p>" for side in done.sides if side.promise)
    return f'{_table(_figures(columns), ("", *heads))}{said}<div class="plots">{"".join(plots)}</div>'


def _sentence(words: str) -> str:
    return f"{words[0].upper()}{words[1:]}."


def _table(rows: Sequence[Sequence[str]], head: Sequence[str] = ()) -> str:
    first = "<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>" if head else ""
    body = "".join(
        f"<tr><th>{escape(name)}</th>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
        for name, *cells in rows
    )
    return f'<div class="wide"><table>{first}{body}</table></div>'


def _map(done: Doctored, side: Side, picture: _Pictures) -> str:
    assert done.shown is not None
    groups = [int(side.structure.labels[item]) for item in side.mapped]
    titles = [f"{done.shown.words[item]} · {done.shown.ids[item]}".strip(" ·") for item in side.mapped]
    if done.shown.thumbnails is not None:
        picture.used |= set(side.mapped)
    key = "".join(
        f'<span class="key"><svg viewBox="0 0 10 10"><circle class="c{k % 10}" cx="5" cy="5" r="5"/></svg>'
        f"{escape(group.name)}</span>"
        for k, group in enumerate(side.structure.groups[:10])
    )
    return (
        "<p>Items that are alike lie near each other (t-SNE); distances between far groups mean nothing.</p>"
        f'<div>{key}</div><div>{scatter(side.places, side.mapped, groups, titles)}<div class="held hint">'
        "Point at an item to see it.</div></div>"
    )


def _structure(found: Structure, picture: _Pictures) -> str:
    names = [group.name for group in found.groups]
    by = "clusters that were found" if found.found else "the labels"
    said = (
        f"By {by}: {100 * found.between:.0f} % of the variance lies between the {len(names)} groups, the silhouette is "
        f"{found.silhouette:.2f} (−1..1; 0 is a border)."
    )
    out = [f"<p>{escape(said)}</p>", '<div class="sheet">']
    for group in found.groups[:16]:
        heart = "".join(picture(item) for item in group.exemplars)
        words = f"{group.name} · {group.size:,} · silhouette {group.silhouette:.2f}"
        out.append(f'<div><p><small>{escape(words)}</small></p><div class="near">{heart}</div></div>')
    out += ["</div>", '<div class="two-up"><div><h3>Whose the neighbours are</h3>']
    out.append(heat(found.confusion, names, found.hierarchy.order))
    out.append('<p class="pale">Per cent of the ten nearest of a row’s items that are of the column.</p></div>')
    out.append(f"<div><h3>Which groups are alike</h3>{tree(found.hierarchy, names)}</div></div>")
    if found.borders:
        out.append("<h3>Softest borders</h3>")
    for border in found.borders[:5]:
        pairs = "".join(
            f'<div class="case">{picture(a)}{picture(b, f"{cosine:.3f}")}</div>' for a, b, cosine in border.pairs
        )
        words = f"{names[border.first]} | {names[border.second]}: {100 * border.share:.0f} % of their neighbours across"
        out.append(f'<p><small>{escape(words)}</small></p><div class="cases">{pairs}</div>')
    strays = [(each.row, f"among {names[each.other]}") for each in found.strays]
    hubs = [(row, f"nearest of {times}") for row, times in found.hubs if times > 20]
    lonely = [(row, f"{mean:.2f}") for row, mean in found.outliers]
    if not found.found:
        out.append(_row("Strays: most neighbours are of another class", strays, picture))
    out.append(_row("Hubs: among the ten nearest of more than twenty others", hubs, picture))
    out.append(_row("Outliers: the mean cosine of their nearest", lonely, picture))
    for same in found.copies[:4]:
        out.append(_row(f"One to the encoder: {len(same)} items", [(row, "") for row in same[:8]], picture))
    return "".join(out)


def _row(title: str, items: Sequence[tuple[int, str]], picture: Callable[[int, str], str]) -> str:
    if not items:
        return ""
    shown = "".join(picture(item, words) for item, words in items)
    return f'<h3>{escape(title)}</h3><div class="near">{shown}</div>'


def _negatives(done: Doctored, picture: _Pictures) -> str:
    rows = [
        (
            OF_WHAT[name],
            f"{seen.negatives:.0f}",
            f"{seen.now.effective:.0f} ({100 * seen.now.effective / seen.negatives:.0f} %)",
            f"{100 * seen.now.hardest:.0f} %",
            f"{seen.hardness:.2f}",
            f"{seen.agreement:.2f}",
            "; ".join(f"{reason} {100 * part:.1f} %, {100 * took:.0f} %" for reason, (part, took) in seen.kinds.items())
            or "–",
        )
        for name, seen in done.microscopes.items()
    ]
    head = (
        "negatives of",
        "how many",
        "share the gradient",
        "hardest 1 % take",
        "cosine of those",
        "of positives",
        "suspects: of the negatives, of the gradient",
    )
    out = [_table(rows, head)]
    for name, seen in done.microscopes.items():
        out.append(f"<h3>{escape(OF_WHAT[name].capitalize())}</h3>{_microscope(name, seen)}")
        if name in ("batch", "pairs"):
            n = len(done.shown.ids) if name == "pairs" and done.shown else seen.anchors // 2
            for words, pairs in (("Hardest negatives", seen.closest), ("Suspected to be false", seen.suspected)):
                if pairs and done.shown is not None:
                    cases = "".join(
                        f'<div class="case">{picture(a % n)}{picture(b % n, f"{cosine:.3f}")}</div>'
                        for a, b, cosine in pairs
                    )
                    out.append(f'<h3>{words}</h3><div class="cases">{cases}</div>')
    return "".join(out)


def _microscope(name: str, seen: Microscope) -> str:
    now, suggested = seen.now, seen.suggested
    said = f"At temperature {now.temperature:.3g}. " + (
        f"For these embeddings a temperature from {suggested[0]:.2g} to {suggested[1]:.2g} tells hard negatives from "
        "easy ones without giving all to a few; trained at another they would lie differently."
        if suggested
        else "No temperature tells hard negatives from easy ones here."
    )
    curve = [(math.log10(at.temperature), at) for at in seen.curve]
    mark = math.log10(now.temperature)
    shares = "of all, by log₁₀ of the temperature; dashed: now"
    few = "blue: the hardest hundredth; orange: suspected false negatives"
    plots = [
        histograms(
            "similarities",
            f"blue: of negatives; orange: of {'pairs' if name == 'pairs' else 'the two views of a picture'}",
            [(seen.negative, "bars"), (seen.positive, "bars b")],
            ("cosine −1", "1"),
        ),
        lines(
            "negatives that share the gradient",
            shares,
            [([(x, at.effective / seen.negatives) for x, at in curve], "one")],
            x="log₁₀ τ",
            at=mark,
            low=0.0,
        ),
        lines(
            "what few of them take",
            few,
            [([(x, at.hardest) for x, at in curve], "one"), ([(x, at.suspects) for x, at in curve], "two")],
            x="log₁₀ τ",
            at=mark,
            low=0.0,
        ),
    ]
    return f'<p>{escape(said)}</p><div class="plots">{"".join(plots)}</div>'


def _predicted(found: Predicted) -> str:
    points = [(away, error) for away, error, _ in found.by_distance]
    words = f"{found.words}, by the distance in patches from what was seen; dashed: of the mean of all"
    plot = lines("error", words, [(points, "one")], x="patches", level=found.constant, low=0.0)
    out = [f'<div class="plots">{plot}</div>']
    if found.painted is None:
        return "".join(out)
    rows = "".join(
        '<div class="near">'
        + "".join(f'<figure class="strip"><img alt="" src="{inline(each)}"></figure>' for each in row)
        + "</div>"
        for row in found.painted
    )
    if found.painted.shape[1] == 3:
        out.append(
            '<h3>A picture, what was seen of it, and the rest painted</h3><p class="pale">A patch is painted but for '
            "its own mean and contrast, which are lent to it here.</p>"
        )
    else:
        out.append("<h3>What there is, and what was seen of it</h3>")
    return "".join([*out, f'<div class="sheet">{rows}</div>'])


def _against(done: Doctored, found: Against, picture: _Pictures) -> str:
    spaces = found.spaces
    gains = [(each.row, f"{each.first:.2f} → {each.second:.2f}") for each in spaces.better]
    losses = [(each.row, f"{each.first:.2f} → {each.second:.2f}") for each in spaces.worse]
    return (
        f"<p>{escape(_said_against(found))}</p>"
        + _row(f"Better with {found.name}", gains, picture)
        + _row(f"Worse with {found.name}", losses, picture)
    )


def _said_against(found: Against) -> str:
    spaces = found.spaces
    return (
        f"Beside {found.name}: CKA {spaces.cka:.2f} (1 is the same space up to rotation); "
        f"{100 * spaces.overlap.value:.0f} % of nearest neighbours in common (chance {100 * spaces.chance:.1f} %). "
        f"{spaces.measure[0].upper()}{spaces.measure[1:]}: {spaces.first} here, {spaces.second} there, "
        f"gain {spaces.gain}."
    )
