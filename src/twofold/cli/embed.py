"""`twofold embed`."""

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from twofold.cli.flags import Data, OnError, model_of, verb
from twofold.cli.show import print_json, print_skipped


@verb
def embed(
    data: Data,
    /,
    *,
    model: Annotated[str, arg(metavar="MODEL")] = "efficientnet-lite0",
    out: Annotated[Path, arg(metavar="FILE.npz")],
    modality: Literal["image", "text"] = "image",
    on_error: OnError = "skip",
    json: bool = False,
) -> None:
    """Turn pictures or texts into vectors: an NPZ with `ids` and `vectors`, float32 [n, d].

    examples:
      twofold embed photos/ --out photos.npz
      twofold embed captions.csv --model runs/b --modality text --out captions.npz

    Args:
        data: what to embed
        model: a bundle, the folder of a run, or the name of an encoder
        out: the file to write
        modality: which column to embed
        on_error: what to do with a picture that cannot be read
        json: print the result as JSON
    """
    import numpy as np

    from twofold.data.atomic import write_atomically
    from twofold.data.sources import open_source
    from twofold.measure.embed import embed

    done = embed(model_of(model, modality), open_source(data), modality, on_error=on_error, quiet=json)

    def write(path: Path) -> None:
        with open(path, "wb") as file:
            np.savez(file, ids=np.array(done.ids), vectors=done.matrix)

    write_atomically(out, write)
    if json:
        print_json({"out": str(out), "items": len(done.ids), "dim": done.matrix.shape[1], "skipped": done.skipped})
    else:
        print_skipped(done.skipped)
        print(f"  {len(done.ids):,} vectors of {done.matrix.shape[1]} in {out}")
