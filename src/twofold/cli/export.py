"""`twofold export`."""

from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from twofold.cli.flags import Folder, verb
from twofold.cli.show import print_json


@verb
def export(
    model: Annotated[Path, arg(metavar="MODEL")],
    /,
    *,
    to: Annotated[str, arg(metavar="onnx|timm|sentence-transformers")],
    out: Folder,
    json: bool = False,
) -> None:
    """Write a model's towers for other libraries: each loads what it is given, and gives the same vectors.

    onnx: a graph a tower, checked against the model. timm: the picture encoder without its head, for
    timm.create_model("local-dir:DIR"). sentence-transformers: the text tower with its head, for SentenceTransformer.

    examples:
      twofold export runs/b --to onnx --out graphs
      twofold export runs/a --to timm --out backbone
      twofold export runs/b --to sentence-transformers --out text-tower

    Args:
        model: a bundle, or the folder of a run
        to: for which library
        out: a new folder
        json: print the result as JSON
    """
    from twofold.models.bundle import Bundle
    from twofold.models.export import export

    written = export(Bundle.load(model), to, out)
    if json:
        print_json({"to": to, "files": written})
    else:
        print("\n".join(f"  {path}" for path in written))
