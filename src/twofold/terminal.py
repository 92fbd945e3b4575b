"""How results look in a terminal: tables that the command line and the demo share."""

from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from twofold.errors import TwofoldError
from twofold.measure.calibrate import Calibrated
from twofold.measure.evaluate import Evaluation, Paired, Space
from twofold.measure.hubness import Gap
from twofold.measure.labelled import Labels, against
from twofold.measure.metrics import Interval, points
from twofold.measure.policy_audit import Audit, Finding
from twofold.measure.retrieval import Retrieval
from twofold.measure.selection import TRUST
from twofold.measure.suite import Suite
from twofold.measure.zero_shot import ZeroShot
from twofold.retrieve.corrected import DEEP, Change, Corrected
from twofold.retrieve.store import Hit
from twofold.train.compare_policies import Comparison

CONSOLE = Console()
QUESTIONS = 20  # judged questions that are shown one by one


def table(*columns: str) -> Table:
    """A plain table, narrow enough for 80 columns; the first one holds words, the others figures."""
    made = Table(box=None, padding=(0, 1), pad_edge=True)
    for place, column in enumerate(columns):
        made.add_column(column, justify="right" if place else "left", no_wrap=True)
    return made


def interval(value: Interval) -> str:
    low, high = (f"{bound:.2f}".removeprefix("0") for bound in (value.low, value.high))
    return f"{value.value:.3f} [dim]{low}–{high}[/dim]"


def evaluation_tables(measured: Evaluation) -> Iterable[Table]:
    """One table for labels, one for retrieval; intervals are 95 % bootstrap."""
    if measured.labels is not None:
        yield from label_tables(measured.labels)
    if measured.zero_shot is not None:
        yield zero_shot_table(measured.zero_shot)
    if measured.paired is not None:
        yield recall_table({"": measured.paired})
        yield ranking_table(measured.paired)
        yield from (groups_table(way, found) for way, found in measured.paired.items() if found.by)
    if measured.space is not None:
        yield space_table(measured.space)
        yield gap_table(measured.space.gap)


def label_tables(labels: Mapping[str, Labels], models: Sequence[str] = ("trained",)) -> Iterable[Table]:
    """What probes read, what few labels give, what is found and clustered; and `models` against all others."""
    more = [kind for kind in ("attentive", "fine_tuned") if any(getattr(probes, kind) for probes in labels.values())]
    names = [kind.replace("_", "-") for kind in more]
    read = table("accuracy on test", "kNN", "linear", *names, "chance")
    few = sorted({k for probes in labels.values() for part in (probes.few, probes.shares) for k in part.accuracy})
    shots, shares = [k for k in few if k >= 1], [k for k in few if k < 1]
    some = table("from few labels", *(f"{k:g} a class" for k in shots), *(f"{100 * k:g} %" for k in shares))
    order = table("the same label", "R@1", "R@5", "mAP", "NMI", "ARI")
    for name, probes in labels.items():
        optional = [getattr(probes, kind) for kind in more]
        cells = [interval(probe.accuracy) if probe else "" for probe in (probes.knn, probes.linear, *optional)]
        read.add_row(name, *cells, f"{probes.knn.chance:.3f}")
        given = [probes.few.accuracy.get(k) for k in shots] + [probes.shares.accuracy.get(k) for k in shares]
        some.add_row(name, *(interval(value) if value else "" for value in given))
        found, clusters = probes.found, probes.clusters
        order.add_row(
            name,
            *(interval(found.recall[k]) if found else "" for k in (1, 5)),
            interval(found.map) if found else "",
            *((f"{value.value:.3f}" for value in clusters[:2]) if clusters else ("", "")),
        )
    first = next((probes.found for probes in labels.values() if probes.found), None)
    if first is not None:
        order.add_row("[dim]chance[/dim]", *(f"[dim]{first.chance[k]:.3f}        [/dim]" for k in (1, 5)))
    yield read
    yield some
    yield order
    others = [(one, other) for one in models if one in labels for other in labels if other != one]
    others = [pair for place, pair in enumerate(others) if pair[::-1] not in others[:place]]
    if others:
        yield differences_table(labels, others, "fine_tuned" if "fine_tuned" in more else "5")


def differences_table(labels: Mapping[str, Labels], pairs: Sequence[tuple[str, str]], last: str) -> Table:
    """Paired differences in points of accuracy on the same items; those whose interval holds 0 are pale."""
    probes = {"linear": "linear", "kNN": "knn", {"5": "5 a class"}.get(last, "fine-tuned"): last}
    made = table("points ahead of", *probes)
    for one, other in pairs:
        cells = []
        for probe in probes.values():
            try:
                found = against(labels[one], labels[other], probe)
            except TwofoldError:  # a probe that one of them has not
                cells.append("–")
                continue
            cells.append(str(found) if found.sure else f"[dim]{found}[/dim]")
        made.add_row(other if len({pair[0] for pair in pairs}) == 1 else f"{one} − {other}", *cells)
    return made


def unlabelled_table(found: Mapping[str, Mapping[str, float]]) -> Table:
    """Scores by model, higher is better, those that went with accuracy first; below, their correlation with it."""
    names = sorted(next(iter(found.values())), key=lambda name: -TRUST[name].across.value)[:5]
    made = table("without labels", *names)
    for model, own in found.items():
        made.add_row(model, *(f"{own[name]:.3f}" for name in names))
    made.add_row("[dim]goes with kNN by[/dim]", *(f"[dim]{TRUST[name].across.value:.2f}[/dim]" for name in names))
    return made


def suite_tables(done: Suite) -> Iterable[Table]:
    """One table of all data sets, where there are several; then each by itself."""
    if len(done.found) > 1:
        for probe in ("linear", "knn"):
            made = table({"linear": "linear", "knn": "kNN"}[probe], *done.found)
            for name in next(iter(done.found.values())):
                cells = [interval(getattr(labels[name], probe).accuracy) for labels in done.found.values()]
                made.add_row(name, *cells)
            yield made
    for data, own in done.shifts.items():
        made = table(f"away from home: {data}", "points of linear accuracy")
        for name, gap in own.items():
            made.add_row(name, points(gap))
        yield made
    for data, labels in done.found.items():
        learned, asked = done.sizes[data]
        yield table(f"[bold]{data}[/bold]: {learned:,} labels, {asked:,} tested")
        yield from label_tables(labels, done.models)


def recall_table(measured: Mapping[str, Paired]) -> Table:
    """Recall both ways and median rank for each of `measured`, and the recall of a random order beneath."""
    first = next(iter(measured.values()))
    ks = list(next(iter(first.values())).recall)
    made = table("held-out recall", *(f"R@{k}" for k in ks), "rank")
    for way, one in first.items():
        for name, paired in measured.items():
            found = paired[way]
            made.add_row(
                f"{arrow(way)} {name}".strip(),
                *(interval(found.recall[k]) for k in ks),
                f"{found.median_rank:.0f}",
            )
        made.add_row(f"[dim]{arrow(way)} chance[/dim]", *(f"[dim]{one.chance[k]:.3f}        [/dim]" for k in ks))
    return made


def groups_table(way: str, found: Retrieval) -> Table:
    """Recall of the queries of each group, against the same gallery."""
    made = table(arrow(way), "queries", *(f"R@{k}" for k in found.recall))
    for name, part in found.by.items():
        named = name if len(name) <= 20 else f"{name[:19]}⋯"
        made.add_row(named, str(len(part.ranks)), *(interval(recall) for recall in part.recall.values()))
    return made


def zero_shot_table(found: ZeroShot) -> Table:
    made = table("zero-shot", "accuracy", "top 5", "chance")
    made.add_row("\n".join(found.templates), interval(found.accuracy), interval(found.top5), f"{found.chance:.3f}")
    return made


def ranking_table(paired: Paired) -> Table:
    """What the order as a whole is worth, all positives counted."""
    made = table("all positives", "mAP", "nDCG@10")
    for way, found in paired.items():
        made.add_row(arrow(way), interval(found.map), interval(found.ndcg))
    return made


def space_table(space: Space) -> Table:
    """How unevenly queries fall upon items, and the modality gap."""
    k = next(iter(space.hubness.values())).k
    made = table(f"hubs of first {k}", "skewness", "left out", "by chance", "worst")
    for way, found in space.hubness.items():
        name, count = space.hubs[way][0]
        worst = f"{count}× {name if len(name) <= 20 else '⋯' + name[-19:]}"
        made.add_row(arrow(way), f"{found.skewness:.2f}", f"{found.anti_hubs:.1%}", f"{found.chance:.1%}", worst)
    return made


def gap_table(gap: Gap) -> Table:
    made = table("modality gap", "between means", "of squared distances", "norms of the means")
    made.add_row("", f"{gap.distance:.3f}", f"{gap.share:.0%}", " ".join(f"{norm:.2f}" for norm in gap.norms))
    return made


def calibration_tables(done: Calibrated) -> Iterable[Table]:
    """What remedies gained, and how far promises hold."""
    if done.tried:
        made = table("gain in points", "R@1", "R@10", "mAP")
        for remedy in done.tried:
            assert remedy.gain is not None
            gain = [remedy.gain.recall[1], remedy.gain.recall[10], remedy.gain.map]
            taken = " (taken)" if done.calibration.remedy is remedy else ""
            figures = (f"{100 * g.value:+.1f} [dim]{100 * g.low:+.1f} {100 * g.high:+.1f}[/dim]" for g in gain)
            made.add_row(f"{remedy.kind}{taken}", *figures)
        yield made
    made = table(f"hits, {arrow(done.way)}", "ECE", "Brier")
    if done.raw is not None:
        made.add_row("SigLIP's sigmoid, training odds", interval(done.raw.ece), interval(done.raw.brier))
    made.add_row(f"{done.calibration.kind}, cross-validated", interval(done.honesty.ece), interval(done.honesty.brier))
    yield made
    made = table("no good match below", "costs, of true queries")
    made.add_row(f"{done.calibration.threshold:.3f}", f"{done.calibration.cost:.0%}")
    yield made


def arrow(way: str) -> str:
    """ "text_to_image" for people."""
    return way.replace("_to_", " → ")


def hits_table(hits: Iterable[Hit]) -> Table:
    """What an item is in words is cut to one line; `--json` has all of it."""
    made = Table(box=None, padding=(0, 2), pad_edge=True)
    hits = list(hits)
    sure, placed = any(hit.probability is not None for hit in hits), any(hit.spaces for hit in hits)
    columns = ["probability"] * sure + ["score"] + ["found by"] * placed + ["id", "what"]
    for column in columns:
        right = column in ("score", "probability")
        made.add_column(column, justify="right" if right else "left", no_wrap=column not in ("id", "what"))
    for hit in hits:
        promised = ["" if hit.probability is None else percent(hit.probability)] * sure
        spaces = [place for place in hit.spaces if place.space != "items" or place is hit.spaces[0]]
        places = [" · ".join(f"{place.space} {place.rank}" for place in spaces)] if placed else []
        words = Text(" ".join(described(hit).split()), no_wrap=True, overflow="ellipsis")
        made.add_row(*promised, f"{hit.score:.3f}", *places, Text(hit.id, overflow="fold"), words)
    return made


def percent(p: float) -> str:
    """A probability as a person reads it; no finite sample shows 0 or 100."""
    return "< 1 %" if p < 0.01 else "> 99 %" if p > 0.99 else f"{100 * p:.0f} %"


def described(hit: Hit) -> str:
    """An item in words: its emoji if it is one, then its first text, file or label."""
    nearest = next((place.text for place in hit.spaces if place.text), None)
    words = nearest or hit.meta.get("text") or hit.meta.get("image") or hit.meta.get("label") or ""
    return f"{hit.meta.get('emoji', '')} {words}".strip()


def audit_tables(audit: Audit) -> Iterable[Table]:
    """One table for operations and the whole, one for shortcuts."""
    made = table("operation", "confused", "foreign", "most lost, points", "verdict")
    for finding in (*audit.operations, *audit.candidates):
        tried = "" if finding in audit.operations else " [dim]tried[/dim]"
        made.add_row(f"{finding.name}{tried}", *_figures(finding), finding.verdict)
    made.add_row("whole policy", *_figures(audit.whole), "")
    made.add_row("proposed", *_figures(audit.better), "")
    yield made
    found = table(f"finds a partner among {audit.among}", "policy", "proposed")
    for name, top in audit.shortcuts.items():
        found.add_row(name, interval(top), interval(audit.shortcuts_left[name]))
    found.add_row("[dim]chance[/dim]", f"[dim]{1 / audit.among:.3f}       [/dim]", "")
    yield found


def _figures(finding: Finding) -> tuple[str, str, str]:
    worst = finding.paid[0] if finding.paid else None
    lost = f"{worst.name} {100 * worst.fall.value:.0f}" if worst else "–"
    return (
        interval(finding.confusion) if finding.confusion else "–",
        f"{finding.foreign.value:.2f}" if finding.foreign else "–",
        lost if len(lost) <= 28 else f"…{lost[-27:]}",
    )


def comparison_table(compared: Comparison) -> Table:
    """Policies by what short trainings under them are worth; under each figure lies that of every seed."""
    made = table("trained under", "retrieval", "kNN", "rank", "alignment", "uniformity")
    for score in compared.scores:
        means = (sum(values) / len(values) for values in (score.rank, score.alignment, score.uniformity))
        rank, alignment, uniformity = means
        made.add_row(
            score.name,
            interval(score.retrieval),
            interval(score.knn) if score.knn else "–",
            f"{rank:.1f}",
            f"{alignment:.3f}",
            f"{uniformity:.2f}",
        )
        by_seed = [" ".join(f"{value:.3f}" for value in values) for values in (score.retrieval_seeds, score.knn_seeds)]
        made.add_row("[dim]by seed[/dim]", *(f"[dim]{values}[/dim]" for values in by_seed))
    chance = compared.chance
    made.add_row(
        "[dim]chance[/dim]", *(f"[dim]{chance[k]:.3f}[/dim]" if k in chance else "" for k in ("retrieval", "knn"))
    )
    return made


def corrected_tables(rows: Sequence[Corrected], come: Change) -> Iterable[Table]:
    """What was asked, where the item found right stood and stands, and what all of it comes to."""
    made = table("judged questions", "right", "wrong", "place before", "now")
    for row in rows[:QUESTIONS]:
        asked = " + ".join(filter(None, (row.judged.text, *(f"like {id}" for id in row.judged.like))))
        places = [f"> {DEEP}" if rank is None else str(rank) for rank in row.ranks]
        found = places if row.judged.positives else ["", ""]
        made.add_row(escape(asked[:44]), str(len(row.judged.positives)), str(len(row.judged.negatives)), *found)
    yield made
    sums = table(f"all {come.questions:,}" if len(rows) > QUESTIONS else "together", "before", "now")
    if come.right:
        sums.add_row("mean place of the right one", *(f"{place:.1f}" for place in come.rank))
        sums.add_row("right one in the first place", *(f"{share:.3f}" for share in come.first))
    sums.add_row("wrong ones among the first ten", *(f"{count:.2f}" for count in come.wrong))
    yield sums
