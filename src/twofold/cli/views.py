"""`twofold views`."""

import dataclasses
import json as jsonlib
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from twofold.cli.flags import Data, Folder, call, described, model_of
from twofold.cli.policies import policy_changes
from twofold.cli.show import (
    plain,
    print_audit,
    print_comparison,
    print_json,
    print_skipped,
)


def views(arguments: list[str]) -> None:
    """Look at what a policy makes of pictures; with --audit, measure what it destroys and propose a better one.

    Writes sheet.png (originals and their views) and ladder.png (each operation from off to full). --audit adds
    audit.html, audit.json and proposed.toml, a policy to train with. --compare trains briefly under each policy.

    --policy.FIELD VALUE changes a field of the policy, as in `--policy natural --policy.hue 0 --policy.area 0.3 1`.

    examples:
      twofold views photos/ --policy simclr
      twofold views tiles/ --policy simclr --size 96 --audit
      twofold views tiles/ --compare simclr views/proposed.toml

    """
    from twofold.train.compare_policies import SHORT

    arguments, changes = policy_changes(arguments)

    def verb(
        data: Data,
        /,
        *,
        policy: str = "simclr",
        out: Folder = Path("views"),
        size: int | None = None,
        channels: int = 3,
        rows: int = 8,
        audit: bool = False,
        items: int = 512,
        views: int = 4,
        columns: tuple[str, ...] = (),
        model: Annotated[str | None, arg(metavar="MODEL")] = None,
        compare: Annotated[tuple[str, ...], arg(metavar="POLICY …")] = (),
        epochs: int = SHORT.epochs,
        seeds: int = 2,
        seed: int = 0,
        json: bool = False,
    ) -> None:
        """
        Args:
            data: pictures, with labels, captions or metadata columns if there are any
            policy: the name of a preset, or a .toml or .json file
            out: where the pages and pictures go
            size: pixels a side of a view as it will be trained; the policy's or the pictures' own where not given
            channels: of the pictures
            rows: pictures on the contact sheet
            audit: measure confusion, loss and shortcuts, for each operation and the whole
            items: pictures that the audit looks at
            views: of each picture and operation
            columns: metadata columns to probe for, and "label"; those of few values where not given
            model: what the audit sees with: a bundle, the folder of a run, or the name of an encoder
            compare: policies to train briefly under
            epochs: of each training
            seeds: trainings under each policy
            seed: another sample, and other views
            json: print the result as JSON
        """
        from twofold.data.sources import open_source
        from twofold.errors import UsageError
        from twofold.views import policies

        if min(rows, items, views, epochs, seeds) < 1:
            raise UsageError("--rows, --items, --views, --epochs and --seeds are whole numbers from 1 up.")
        source = open_source(data)
        chosen = tuple(dataclasses.replace(one, **changes) for one in policies(policy))
        figures: dict[str, Any] = {}
        if not compare or audit:
            figures |= _sheets(source, chosen, out, size=size, channels=channels, rows=rows, seed=seed, quiet=json)
        if audit:
            from twofold.measure.policy_audit import audit as audited

            done = audited(
                chosen,
                source,
                encoder=model_of(model, source, "image") if model else None,
                columns=columns or None,
                items=items,
                views=views,
                size=size,
                channels=channels,
                seed=seed,
                quiet=json,
            )
            figures |= {"audit": _write_audit(done, out)}
            if not json:
                print_audit(done, out)
        if compare:
            from twofold.train.compare_policies import compare as compared

            setting = dataclasses.replace(SHORT, size=size or SHORT.size, channels=channels, epochs=epochs)
            result = compared(
                compare, source, out=out / "compare", setting=setting, seeds=range(seed, seed + seeds), quiet=json
            )
            figures |= {"compare": result}
            if not json:
                print_comparison(result)
        if json:
            print_json(figures)

    call(verb, "views", arguments, description=described(views))


def _sheets(
    source: Any, policies: tuple, out: Path, *, size: int | None, channels: int, rows: int, seed: int, quiet: bool
) -> dict[str, Any]:
    """Write the contact sheet and the ladder; where they lie."""
    import numpy as np
    import torch

    from twofold import runtime
    from twofold.data.cache import decoded
    from twofold.measure.policy_audit import picture_side
    from twofold.views.sheet import contact_sheet, strength_ladder

    some = torch.randperm(len(source), generator=runtime.generator(seed, "sheet")).tolist()[:rows]
    few = source.take(some)
    side = size or min(max(policy.size for policy in policies), picture_side(few))
    pictures = decoded(few, side if side <= 64 else side * 8 // 7, channels=channels)
    images = torch.from_numpy(np.array(pictures.pixels))
    sized = [dataclasses.replace(policy, size=side) for policy in policies]
    out.mkdir(parents=True, exist_ok=True)
    paths = {"sheet": out / "sheet.png", "ladder": out / "ladder.png"}
    contact_sheet(sized, images, runtime.generator(seed, "views")).save(paths["sheet"])
    strength_ladder(sized[0], images[0], runtime.generator(seed, "ladder")).save(paths["ladder"])
    said = list(dict.fromkeys(map(str, sized)))
    if not quiet:
        print_skipped(pictures.skipped)
        print("\n".join(f"  {policy}" for policy in said))
        print(f"  {paths['sheet']}\n  {paths['ladder']}")
    return {name: str(path) for name, path in paths.items()} | {"policies": said}


def _write_audit(done: Any, out: Path) -> dict[str, Any]:
    """Leave the page, the figures and the proposed policy in `out`; the figures."""
    from twofold.data.samples import ATTRIBUTION
    from twofold.measure.audit_page import page
    from twofold.views import files

    figures = plain(done.to_dict())
    notice = ATTRIBUTION if done.source.name == "openmoji" else ""
    (out / "audit.html").write_text(page(done, notice=notice), "utf-8")
    (out / "audit.json").write_text(jsonlib.dumps(figures, indent=1, ensure_ascii=False) + "\n", "utf-8")
    files.write([policy.to_dict() for policy in dict.fromkeys(done.proposed)], out / "proposed.toml")
    return figures
