"""`twofold doctor`."""

from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from twofold.cli.flags import verb
from twofold.cli.show import print_json, print_verdicts


@verb
def doctor(
    run: Annotated[str, arg(metavar="RUN|BUNDLE")],
    /,
    *,
    data: Annotated[str | None, arg(metavar="DATA")] = None,
    against: Annotated[str | None, arg(metavar="OTHER")] = None,
    out: Annotated[Path | None, arg(metavar="FILE")] = None,
    limit: int = 1000,
    temperature: float | None = None,
    images: Annotated[Path | None, arg(metavar="DIR")] = None,
    json: bool = False,
) -> None:
    """Is it learning? Verdicts on a run, with their evidence and what to do, in the terminal and on one page.

    examples:
      twofold doctor runs/a
      twofold doctor runs/a --data photos/
      twofold doctor runs/a --data photos/ --temperature 0.1 --out doctor.html
      twofold doctor runs/a --data photos/ --against runs/b
      twofold doctor efficientnet-lite0 --data photos/
      twofold doctor runs/a --json

    Args:
        run: the folder of a run, which may still be training; or a bundle, or the name of an encoder of pictures
        data: items to look at with the encoders: embeddings, classes, negatives, neighbours
        against: another run, bundle or encoder on the same data: how alike they are, what each finds better
        out: the page; RUN/doctor.html where it is not given. One that ends in .md holds words and figures
        limit: look at so many items, drawn at random
        temperature: of the microscope, instead of the run's own
        images: where the manifest's files are, if not beside it
        json: print the result as JSON, without the pictures
    """
    from twofold.data.atomic import write_atomically
    from twofold.data.sources import open_source
    from twofold.train.doctor import doctor as examine
    from twofold.train.doctor_page import markdown, notice_of, page

    source = open_source(data, images=images) if data is not None else None
    done = examine(run, source, against=against, limit=limit, temperature=temperature, quiet=json)
    out = out or (Path(run) if Path(run).is_dir() else Path()) / "doctor.html"
    text = markdown(done) if out.suffix == ".md" else page(done, notice=notice_of(source))
    write_atomically(out, lambda path: path.write_text(text, encoding="utf-8"))
    if json:
        print_json({**done.figures, "worst": done.worst, "page": str(out)})
        return
    print_verdicts(done)
    print(f"  {out}")
