"""`twofold compare`."""

import dataclasses
import json as jsonlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from twofold.cli.flags import Data, Folder, assigned, verb
from twofold.cli.show import plain, print_json

if TYPE_CHECKING:
    from twofold.train.compare import Comparison


@verb
def compare(
    methods: Annotated[tuple[str, ...], arg(metavar="METHOD …")] = (),
    /,
    *,
    data: Data,
    out: Folder = Path("compare"),
    encoder: str = "timm:resnet18/16",
    transformer: str = "timm:vit_tiny_patch16_224/8x96x6",
    size: int = 64,
    channels: int = 3,
    policy: str = "simclr",
    batch: int = 128,
    epochs: int = 20,
    seconds: float | None = None,
    limit: int = 4000,
    sweep: Annotated[tuple[str, ...], arg(metavar="NAME=VALUE,… …")] = (),
    seeds: int = 1,
    seed: int = 0,
    jobs: int = 1,
    ray: Annotated[str | None, arg(metavar="ADDRESS")] = None,
    json: bool = False,
) -> None:
    """Which method suits your pictures: train each for the same budget, and measure them beside what learned nothing.

    Without METHOD, all that the data are enough for. A finished run is not run again. Writes compare.jsonl (a line a
    run), compare.json and compare.html.

    examples:
      twofold compare --data photos/
      twofold compare simclr byol vicreg --data tiles/ --policy satellite --seconds 120 --seeds 2
      twofold compare simclr --data tiles/ --sweep temperature=0.1,0.2,0.5 policy=simclr,satellite
      twofold compare --data tiles/ --seeds 3 --ray auto        # on a Ray cluster

    Args:
        methods: of `twofold methods`
        data: pictures with labels, by which what was learned is measured
        out: where the runs and results go
        encoder: a network of timm's, from scratch
        transformer: what methods that hide patches take instead: a vision transformer of about the same cost
        size: pixels a side of a view
        channels: of the pictures
        policy: the views that are compared: a preset's name or a file; methods that hide patches have their own
        batch: pictures a step
        epochs: the budget of each training
        seconds: the budget instead of --epochs: as many whole epochs as fit
        limit: train on so many pictures at most
        sweep: options with several values each, for the methods that have them: batch, policy, lr, temperature, …
        seeds: trainings of each
        seed: the first of them
        jobs: trainings at a time, each in a process of its own with its share of the cores
        ray: train on this Ray cluster: local, auto or ray://host:10001; machines share the folders
        json: print the result as JSON
    """
    from twofold.data.sources import open_source
    from twofold.errors import UsageError
    from twofold.train.compare import SETTING
    from twofold.train.compare import compare as compared
    from twofold.train.compare_page import page

    if min(size, channels, batch, epochs, limit, seeds, jobs) < 1 or (seconds is not None and not seconds > 0):
        raise UsageError(
            "--size, --channels, --batch, --epochs, --seconds, --limit, --seeds and --jobs are greater than 0."
        )
    setting = dataclasses.replace(
        SETTING, encoder=encoder, size=size, channels=channels, policy=policy, batch=batch, epochs=epochs, limit=limit
    )
    result = compared(
        methods,
        open_source(data),
        out=out,
        setting=setting,
        transformer=transformer,
        seconds=seconds,
        sweep={name: values.split(",") for name, values in assigned("sweep", sweep).items()},
        seeds=range(seed, seed + seeds),
        jobs=jobs,
        ray=ray,
        quiet=json,
    )
    figures = summary(result)
    (out / "compare.json").write_text(jsonlib.dumps(figures, indent=1, ensure_ascii=False) + "\n", "utf-8")
    (out / "compare.html").write_text(page(result), "utf-8")
    if json:
        print_json(figures)
    else:
        _print(result, out)


def summary(result: "Comparison") -> dict[str, Any]:
    """The comparison as JSON values, without the hits of each picture."""
    figures = plain(result)
    for row in (*figures["rows"], *figures["baselines"]):
        del row["right"]
    return figures


def _print(result: "Comparison", out: Path) -> None:
    from twofold.terminal import CONSOLE, interval, table

    read = table("labels read from features", "linear", "kNN", "1-shot", "5-shot", "10-shot")
    health = table("features", "effective rank", "of", "alignment", "uniformity")
    costs = table("needs and costs", "images/s", "MiB", "seconds", "negatives", "slow copy")
    for row in (*result.rows, *result.baselines):
        name = row.name if row.method else f"[dim]{row.name}[/dim]"
        shots = (f"{row.accuracy[f'{k}-shot'].value:.3f}" for k in (1, 5, 10))
        read.add_row(name, interval(row.accuracy["linear"]), interval(row.accuracy["knn"]), *shots)
        agreed = "" if row.alignment is None else f"{row.alignment:.3f}"
        health.add_row(name, f"{row.rank:.1f}", str(row.width), agreed, f"{row.uniformity:.2f}")
        if row.facts is not None:
            spent = (row.images_per_second, row.memory, row.seconds)
            figures = ("–" if value is None else f"{value:.0f}" for value in spent)
            costs.add_row(name, *figures, row.facts.negatives or "no", "yes" if row.facts.momentum else "no")
    CONSOLE.print(read, health, costs, sep="\n")
    for line in [*result.verdict, *result.caveats]:
        CONSOLE.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
    print(f"  {out / 'compare.html'}\n  {out / 'compare.json'}")
