"""An audit as one HTML page with pictures of the worst mistakes; nothing outside the file is needed."""

import base64
import io
from html import escape

import numpy as np
from PIL import Image

from twofold.measure.metrics import Interval
from twofold.measure.policy_audit import OPEN, PRICE, Audit, Case, Finding, Loss, price, sentence

QUALITY = 72  # of the pictures, as JPEG

STYLE = """
:root { color-scheme: light; --ink: #1c1c1e; --pale: #6b6b73; --line: #dcdce0; --bad: #a8321c; --good: #1d6b3a }
body { font: 16px/1.45 system-ui, sans-serif; color: var(--ink); background: #fff; max-width: 60rem;
       margin: 0 auto; padding: 1rem }
h1 { font-size: 1.5rem; margin: .2rem 0 } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem }
h3 { font-size: 1.05rem; margin: 0 } p { margin: .3rem 0 } .pale, small { color: var(--pale) }
ul { padding-left: 1.2rem; margin: .4rem 0 } code { font-size: .9em; overflow-wrap: anywhere }
table { border-collapse: collapse; font-variant-numeric: tabular-nums } .wide { overflow-x: auto }
th, td { text-align: left; padding: .15rem .8rem .15rem 0; vertical-align: top; white-space: nowrap }
th { font-weight: 500; color: var(--pale) }
@media (max-width: 40rem) { th, td { white-space: normal; padding-right: .5rem } }
section { border-top: 1px solid var(--line); padding: .9rem 0 }
.badge { font-size: .8rem; border: 1px solid; border-radius: 1rem; padding: 0 .55rem; white-space: nowrap }
.bad { color: var(--bad) } .good { color: var(--good) } .none { color: var(--pale) }
.cases { display: flex; flex-wrap: wrap; gap: .8rem 1.6rem; margin-top: .7rem }
.case { display: flex; gap: .3rem } figure { margin: 0; width: 72px } figure img { width: 72px; height: 72px;
  image-rendering: auto; border: 1px solid var(--line); display: block }
figcaption { font-size: .72rem; line-height: 1.2; color: var(--pale); overflow-wrap: anywhere }
footer { border-top: 1px solid var(--line); margin-top: 2rem; padding-top: .6rem; font-size: .85rem }
"""
TONES = {"free": "good", "costs": "bad", "costs much": "bad", "not free": "bad"}


def page(audit: Audit, *, notice: str = "") -> str:
    """The page's HTML; `notice` is what the licence of the pictures asks for."""
    title = f"What a policy costs on {escape(audit.source.name.rstrip('/').rsplit('/', 1)[-1])}"
    body = [
        f"<h1>{title}</h1>",
        f'<p class="pale">{len(audit.source):,} pictures, {audit.views} views each and operation, seen through '
        f"{escape(audit.encoder)} beside an 8×8 thumbnail. Intervals are 95 % over pictures; those of losses hold for "
        "all operations and all that was asked at once.</p>",
        "<h2>Verdict</h2><ul>",
        *(f"<li>{escape(line)}</li>" for line in audit.verdict),
        "</ul>",
        "<h2>As a whole</h2>",
        _overview(audit),
        "<h2>Operations of the policy, each alone</h2>",
        *(_section(audit, finding) for finding in audit.operations),
    ]
    if audit.candidates:
        body += ["<h2>Not in the policy, tried</h2>", *(_section(audit, finding) for finding in audit.candidates)]
    body += ["<h2>The whole policy</h2>", _section(audit, audit.whole), "<h2>The proposed policy</h2>"]
    body += [_section(audit, audit.better), f"<footer>{escape(notice)}<p>{_legend()}</p></footer>"]
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{STYLE}</style>" + "\n".join(body) + "</html>\n"
    )


def _legend() -> str:
    return (
        "Confusion: the share of changed views whose nearest original is another picture. Foreign: how well a probe "
        "tells changed views from originals, as an AUC; .5 where the data hold such pictures anyway. Losses: a probe "
        "fitted on views and tested on views of other pictures, against originals and originals; of a family of "
        "captions, the share of views that lie nearer to another member. Below a mistake: the picture, its view, and "
        "what the view was taken for."
    )


def _overview(audit: Audit) -> str:
    rows: list[tuple[str, ...]] = [
        ("", "policy", "proposed"),
        ("nearer to another picture", *_both(audit, "confusion")),
    ]
    for name, top in audit.shortcuts.items():
        rows.append((f"{name} finds the partner", _share(top), _share(audit.shortcuts_left[name])))
    columns = {loss.name: [loss] for loss in audit.whole.losses if loss.kind == "column"}
    for loss in audit.better.losses:
        if loss.name in columns:
            columns[loss.name].append(loss)
    rows += [(f"{name} lost, points", *(_points(loss.fall) for loss in pair)) for name, pair in columns.items()]
    cells = [
        "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row) + "</tr>"
        for tag, row in zip(["th", *["td"] * len(rows)], rows, strict=False)
    ]
    chance = f'<p class="pale">Shortcuts: top-1 among {audit.among}, chance {100 / audit.among:.1f} %; '
    return f'<div class="wide"><table>{"".join(cells)}</table></div>{chance}above {100 * OPEN:.0f} % they are open.</p>'


def _both(audit: Audit, name: str) -> tuple[str, str]:
    first, second = getattr(audit.whole, name), getattr(audit.better, name)
    return (_share(first) if first else "–"), (_share(second) if second else "–")


def _section(audit: Audit, finding: Finding) -> str:
    badge = ""
    if finding.name in {each.name for each in (*audit.operations, *audit.candidates)}:
        badge = f'<span class="badge {TONES.get(finding.verdict, "none")}">{finding.verdict}</span>'
    lines = [f"<section><h3>{escape(finding.name)} {badge}</h3><p><small>{escape(finding.setting)}</small></p>"]
    lines.append(f"<p>{escape(sentence(price(finding)))}.</p>")
    if finding.confusion and finding.foreign:
        rows = [
            ("changed views", f"{100 * finding.changed:.0f} %", ""),
            ("confusion", _share(finding.confusion), ""),
            ("foreign", f"AUC {finding.foreign}", ""),
            *((_name(loss), f"{_points(loss.fall)} points lost", _of(loss)) for loss in _shown(finding)),
        ]
        table = "".join(f"<tr><th>{escape(a)}</th><td>{escape(b)}</td><td>{escape(c)}</td></tr>" for a, b, c in rows)
        lines.append(f'<div class="wide"><table>{table}</table></div>')
    if finding.cases:
        lines.append(f'<div class="cases">{"".join(_case(audit, case) for case in finding.cases)}</div>')
    return "".join([*lines, "</section>"])


def _shown(finding: Finding) -> list[Loss]:
    """Every column, the families and words that lose most."""
    columns = [loss for loss in finding.losses if loss.kind == "column"]
    others = [loss for loss in finding.losses if loss.kind != "column" and loss.fall.value >= PRICE]
    families = [loss for loss in others if loss.kind == "family"][:4]
    return [*columns, *families, *(loss for loss in others if loss.kind == "word")]


def _name(loss: Loss) -> str:
    return {"column": loss.name, "word": f"word “{loss.name}”", "family": f"which “{loss.name}”"}[loss.kind]


def _of(loss: Loss) -> str:
    if loss.kind == "family":
        return f"of {loss.members} that differ in a word"
    return f"from {loss.measure} {loss.before:.3f}, {loss.members} items"


def _case(audit: Audit, case: Case) -> str:
    pictures = (
        (audit.originals[case.item], _caption(audit, case.item)),
        (case.view, "its view"),
        (audit.originals[case.nearest], f"taken for {_caption(audit, case.nearest)}"),
    )
    figures = "".join(
        f'<figure><img alt="" src="{_inline(pixels)}"><figcaption>{escape(words)}</figcaption></figure>'
        for pixels, words in pictures
    )
    return f'<div class="case">{figures}</div>'


def _caption(audit: Audit, item: int) -> str:
    source = audit.source
    if source.texts is not None and source.texts[item]:
        return source.texts[item][0][:48]
    if source.labels is not None and source.labels[item] >= 0:
        k = int(source.labels[item])
        return source.classes[k] if k < len(source.classes) else str(k)
    return source.ids[item][-24:]


def _inline(pixels: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=QUALITY, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _share(value: Interval) -> str:
    return f"{100 * value.value:.0f} % [{100 * value.low:.0f}, {100 * value.high:.0f}]"


def _points(fall: Interval) -> str:
    return f"{100 * fall.value:.1f} [{100 * fall.low:.1f}, {100 * fall.high:.1f}]".replace("-", "−")
