"""What comes back, as JSON or as tables in the terminal."""

import csv
import json as jsonlib
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def print_json(result: Any) -> None:
    print(jsonlib.dumps(plain(result), ensure_ascii=False))


def plain(result: Any) -> Any:
    """A result as JSON values: named tuples become objects, arrays lists, paths and other keys strings."""
    if isinstance(result, tuple) and hasattr(result, "_asdict"):
        return plain(result._asdict())
    if isinstance(result, dict):
        return {str(key): plain(value) for key, value in result.items()}
    if isinstance(result, list | tuple):
        return [plain(value) for value in result]
    if hasattr(result, "tolist"):
        return result.tolist()
    return str(result) if isinstance(result, Path) else result


def write_csv(path: Path, header: tuple[str, ...], rows: Iterable[Iterable[Any]]) -> None:
    """Rows as a CSV file, whole or not at all."""
    from twofold.data.atomic import write_atomically

    def write(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(header)
            writer.writerows(rows)

    write_atomically(path, write)


def print_skipped(skipped: Sequence) -> None:
    for item in skipped[:5]:
        print(f"  skipped {item.id}: {item.reason}", file=sys.stderr)
    if len(skipped) > 5:
        print(f"  … {len(skipped)} items skipped in all", file=sys.stderr)


def print_evaluation(measured: Any) -> None:
    from twofold.terminal import CONSOLE, evaluation_tables

    print_skipped(measured.skipped)
    CONSOLE.print(*evaluation_tables(measured), sep="\n")


def print_suite(done: Any) -> None:
    from twofold.terminal import CONSOLE, suite_tables

    CONSOLE.print(*suite_tables(done), sep="\n")


def print_unlabelled(found: dict[str, dict[str, float]]) -> None:
    """Scores that need no labels, and how far each can be trusted."""
    from twofold.measure.selection import BEST, trusted
    from twofold.terminal import CONSOLE, unlabelled_table

    CONSOLE.print(unlabelled_table(found))
    print(f"  most promising: {next(iter(found))}\n  {BEST}: {trusted(BEST)}")


def print_hits(hits: list) -> None:
    from twofold.terminal import CONSOLE, hits_table

    CONSOLE.print(hits_table(hits))


def print_verdict(retriever: Any, hits: list, *, from_best: bool) -> None:
    """What a reader of the hits must know: which remedy ordered them, and whether none is a match. To stderr.

    A page that does not begin with the best hit says nothing about whether there is one.
    """
    calibration = retriever.calibration_of(hits)
    if calibration is None:
        return
    if calibration.remedy is not None:
        gain = calibration.remedy.gain
        said = f", {100 * gain.recall[1].value:+.1f} points of R@1 on {gain.split}" if gain else ""
        print(f"  ordered by {calibration.remedy.kind}{said}; scores are not plain cosines", file=sys.stderr)
    if from_best and retriever.no_good_match(hits):
        kept = 1 - calibration.cost
        print(f"  no good match: {kept:.0%} of queries with an answer have a better best hit", file=sys.stderr)


def print_hints(hints: list[str]) -> None:
    for hint in hints:
        print(f"  {hint}", file=sys.stderr)


def print_checked(checked: Any) -> None:
    """An index's facts and findings, with a few of the ids that each concerns."""
    print(f"  {checked.path}: {checked.items:,} items, {checked.contents:,} vectors [{checked.dim}] of")
    print(f"  {checked.fingerprint}: " + ("whole" if checked.whole else "not whole"))
    for one in checked.findings:
        shown = ", ".join(one.ids[:5]) + (", …" if len(one.ids) > 5 else "")
        print(f"  {one.what}: {len(one.ids):,} {one.said}: {shown}")
    if not checked.whole:
        print(f"  twofold index --repair {checked.path} mends this")


def print_corrected(rows: list, come: Any) -> None:
    """Judged questions with the place of what was found right, before and now, and their means."""
    from twofold.terminal import CONSOLE, corrected_tables

    CONSOLE.print(*corrected_tables(rows, come), sep="\n")


def print_verdicts(done: Any) -> None:
    """What the doctor found, worst first: evidence and advice beneath each."""
    from twofold.terminal import CONSOLE

    tones = {"good": "green", "warn": "yellow", "bad": "red"}
    for verdict in done.verdicts:
        CONSOLE.print(f"  [{tones[verdict.tone]}]{verdict.name}[/] · {verdict.says}", highlight=False)
        CONSOLE.print(f"    {verdict.evidence}", highlight=False, markup=False, style="dim")
        if verdict.advice:
            CONSOLE.print(f"    → {verdict.advice}", highlight=False, markup=False)
    for side in done.sides:
        if side.promise:
            CONSOLE.print(f"  {side.promise}", highlight=False, markup=False)


def print_report(reported: tuple[Any, Path] | None) -> None:
    """The verdicts on a training that ended, where it was looked at, and where its page lies."""
    if reported is not None:
        print_verdicts(reported[0])
        print(f"  {reported[1]}")


def print_calibrated(done: Any) -> None:
    from twofold.terminal import CONSOLE, calibration_tables

    print_skipped(done.skipped)
    CONSOLE.print(*calibration_tables(done), sep="\n")


def print_audit(done: Any, out: Path) -> None:
    from twofold.terminal import CONSOLE, audit_tables

    print_skipped(done.skipped)
    CONSOLE.print(*audit_tables(done), sep="\n")
    for line in done.verdict:
        CONSOLE.print(f"  {line}", highlight=False, markup=False)
    print(f"  {out / 'audit.html'}\n  {out / 'proposed.toml'}")


def print_comparison(result: Any) -> None:
    from twofold.terminal import CONSOLE, comparison_table

    CONSOLE.print(comparison_table(result))
