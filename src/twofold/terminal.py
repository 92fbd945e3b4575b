"""How results look in a terminal: tables that the command line and the demo share."""

from collections.abc import Iterable, Mapping

from rich.console import Console
from rich.table import Table

from twofold.measure.evaluate import Evaluation, Labels, Paired
from twofold.measure.metrics import Interval
from twofold.measure.policy_audit import Audit, Finding
from twofold.retrieve.store import Hit
from twofold.train.compare_policies import Comparison

CONSOLE = Console()


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
        yield labels_table(measured.labels)
    if measured.paired is not None:
        yield recall_table({"": measured.paired})


def labels_table(labels: Mapping[str, Labels]) -> Table:
    made = table("accuracy on test", "kNN", "linear", "chance")
    for name, probes in labels.items():
        made.add_row(name, interval(probes.knn.accuracy), interval(probes.linear.accuracy), f"{probes.knn.chance:.3f}")
    return made


def recall_table(measured: Mapping[str, Paired]) -> Table:
    """Recall both ways and median rank for each of `measured`, and the recall of a random order beneath."""
    first = next(iter(measured.values()))
    ks = list(first.text_to_image.recall)
    made = table("held-out recall", *(f"R@{k}" for k in ks), "rank")
    for direction, words in (("text_to_image", "text → image"), ("image_to_text", "image → text")):
        for name, paired in measured.items():
            found = getattr(paired, direction)
            made.add_row(
                f"{words} {name}".strip(), *(interval(found.recall[k]) for k in ks), f"{found.median_rank:.0f}"
            )
        chance = getattr(first, direction).chance
        made.add_row(f"[dim]{words} chance[/dim]", *(f"[dim]{chance[k]:.3f}        [/dim]" for k in ks), "")
    return made


def hits_table(hits: Iterable[Hit]) -> Table:
    made = Table(box=None, padding=(0, 2), pad_edge=True)
    for column in ("score", "id", "what"):
        made.add_column(column, justify="right" if column == "score" else "left")
    for hit in hits:
        made.add_row(f"{hit.score:.3f}", hit.id, described(hit))
    return made


def described(hit: Hit) -> str:
    """An item in words: its emoji if it is one, then its first text, file or label."""
    words = hit.meta.get("text") or hit.meta.get("image") or hit.meta.get("label") or ""
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
