"""`twofold embed`."""

from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from twofold.cli.flags import Columns, Data, OnError, assigned, model_of, verb
from twofold.cli.show import print_json, print_skipped


@verb
def embed(
    data: Data,
    /,
    *,
    model: Annotated[str, arg(metavar="MODEL")] = "efficientnet-lite0",
    out: Annotated[Path, arg(metavar="FILE.npz")],
    modality: str = "image",
    columns: Columns = (),
    images: Annotated[Path | None, arg(metavar="DIR")] = None,
    on_error: OnError = "skip",
    json: bool = False,
) -> None:
    """Turn pictures, texts, sounds, videos or vectors into vectors: an NPZ with `ids` and `vectors`, float32 [n, d].

    An item with several texts has as many rows, each with its id. What comes out is data again: `vectors` is a column.

    examples:
      twofold embed photos/ --out photos.npz
      twofold embed captions.csv --model runs/b --modality text --out captions.npz
      twofold embed spoken.csv --model hf:openai/whisper-base --columns speech=audio --modality speech --out spoken.npz

    Args:
        data: what to embed
        model: a bundle, the folder of a run, or the name of an encoder
        out: the file to write
        modality: which column to embed
        columns: which further columns of a manifest are modalities, each of a kind: image, text, audio, video, vector
        images: where the manifest's files are, if not beside it
        on_error: what to do with a file that cannot be read
        json: print the result as JSON
    """
    import numpy as np

    from twofold.data.atomic import write_atomically
    from twofold.data.sources import open_source
    from twofold.measure.embed import embed

    source = open_source(data, images=images, columns=assigned("columns", columns))
    done = embed(model_of(model, source, modality), source, modality, on_error=on_error, quiet=json)
    ids = np.repeat(np.array(done.ids), np.diff(done.offsets))

    def write(path: Path) -> None:
        with open(path, "wb") as file:
            np.savez(file, ids=ids, vectors=done.matrix)

    write_atomically(out, write)
    if json:
        print_json({"out": str(out), "items": len(done.ids), "dim": done.matrix.shape[1], "skipped": done.skipped})
    else:
        print_skipped(done.skipped)
        print(f"  {len(done.ids):,} vectors of {done.matrix.shape[1]} in {out}")
