"""An audit of pairs as one HTML page: the worst ones with what would fit better; nothing outside the file is needed."""

import base64
from collections.abc import Callable
from html import escape
from typing import TYPE_CHECKING

from twofold.data.decode import thumbnail
from twofold.data.sources import Source
from twofold.errors import DecodeError

if TYPE_CHECKING:
    from twofold.train.pairs import Audit, Pair

SHOWN = 120
SIDE = 160  # pixels

STYLE = """
:root { color-scheme: light dark; --ink: light-dark(#1c1c1e, #ececea); --pale: light-dark(#5e6066, #a2a5ad);
  --line: light-dark(#dcdce0, #34373d); --bad: light-dark(#a8321c, #f2917d); --paper: light-dark(#fff, #16171a) }
body { font: 16px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 72rem;
  margin: 0 auto; padding: 1rem }
h1 { font-size: 1.5rem; margin: .2rem 0 } h2 { font-size: 1.15rem; margin: 2rem 0 .6rem }
.pale, small { color: var(--pale) } b { color: var(--bad) }
.pairs { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(22rem, 100%), 1fr)) }
article { border: 1px solid var(--line); border-radius: .6rem; padding: .8rem; display: flex; gap: .9rem }
article img { width: 8rem; height: 8rem; object-fit: contain; flex: none }
article div { min-width: 0; overflow-wrap: anywhere }
blockquote { margin: 0 0 .4rem; font-size: 1.05rem }
ul { margin: .3rem 0; padding-left: 1.1rem; font-size: .87rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { text-align: left; padding: .15rem .9rem .15rem 0 }
.bar, .bar i { display: block; height: .5rem; border-radius: .3rem } .bar i { background: var(--bad) }
.bar { background: var(--line); max-width: 22rem }
@media (max-width: 30rem) { article { display: block } }
"""

NAMES = {
    "cosine": "how near the two are, by heads that never saw the item",
    "rarity_first": "the same, beside all that the item could be paired with",
    "rarity_second": "the same, beside all that the text could belong to",
    "neighbours": "whether items that are alike have texts alike",
    "neighbours_back": "whether texts that are alike stand at items alike",
    "siblings": "whether the item's other texts say the same",
}


def page(audit: "Audit", *, notice: str = "") -> str:
    """The page's HTML; `notice` is what the licence of the pictures asks for."""
    title = f"Pairs that may not belong together in {escape(audit.source.name.rstrip('/').rsplit('/', 1)[-1])}"
    value, low, high = (f"{100 * share:.1f}" for share in audit.noise)
    shown, likely = audit.pairs[:SHOWN], sum(one.wrong > 0.5 for one in audit.pairs)
    body = [
        f"<h1>{title}</h1>",
        f"<p>Of {len(audit.pairs):,} pairs of {' and '.join(map(escape, audit.towers))} about <b>{value} %</b> do not "
        f"belong together (95 %: {low} to {high}); {likely:,} are more likely wrong than right. Percentages below are "
        "the probability that the pair is wrong.</p>",
        f'<div class="bar" role="img" aria-label="{value} %"><i style="width:{value}%"></i></div>',
        f"<h2>The {len(shown)} least likely pairs</h2>",
        '<div class="pairs">',
        *(_pair(audit, place, one) for place, one in enumerate(shown)),
        "</div>",
        *_alike(audit),
        "<h2>What the judgement weighs</h2><table><tbody>",
        *(
            f"<tr><td>{escape(NAMES.get(name, name))}</td><td>{weight:+.2f}</td></tr>"
            for name, weight in audit.evidence.items()
        ),
        "</tbody></table>",
        '<p class="pale">Weights of a logistic regression between the given pairs and made ones, each kind of evidence '
        f"in standard deviations. {escape(notice)}</p>",
    ]
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{STYLE}</style>" + "\n".join(body) + "</html>\n"
    )


def _pair(audit: "Audit", place: int, one: "Pair") -> str:
    fits = audit.better.get(place, [])
    better = "".join(f"<li>{escape(text or id)}</li>" for id, text in fits)
    reasons = "".join(f"<li>{escape(reason)}</li>" for reason in one.reasons)
    return (
        f"<article>{_picture(audit.source, one.item)}<div><blockquote>{escape(one.text or one.id)}</blockquote>"
        f"<small><b>{100 * one.wrong:.0f} %</b> · {escape(one.id)} · rank {one.rank:,} of {one.among:,}</small>"
        + (f"<ul>{reasons}</ul>" if reasons else "")
        + (f'<small>would fit better:</small><ul class="pale">{better}</ul>' if better else "")
        + "</div></article>"
    )


def _picture(source: Source, item: int) -> str:
    if source.images is None:
        return ""
    try:
        content = thumbnail(source.images[item], SIDE, name=source.ids[item], kind="WEBP")
    except DecodeError:
        return ""
    return f'<img alt="" src="data:image/webp;base64,{base64.b64encode(content).decode()}">'


def _alike(audit: "Audit") -> list[str]:
    at: Callable[[str], int] = {id: item for item, id in enumerate(audit.source.ids)}.__getitem__
    said = []
    for name, twins in audit.alike.items():
        if not twins:
            continue
        said.append(f"<h2>{escape(name.capitalize())}s that are hardly different</h2><div class='pairs'>")
        for one, other, cosine in twins[:24]:
            said.append(
                f"<article>{_picture(audit.source, at(one))}{_picture(audit.source, at(other))}<div><small>"
                f"{escape(one)} and {escape(other)}, cosine {cosine:.3f}</small></div></article>"
            )
        said.append("</div>")
    return said
