"""What a reader of pictures and texts says of pictures, and how likely it finds what others said of them."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from twofold.data.decode import OnError, Skipped, ahead
from twofold.data.sources import Source
from twofold.errors import DataError, UsageError
from twofold.models.base import device_of, moved
from twofold.models.bundle import Bundle
from twofold.models.captioner import Looker, Speaker, Teller
from twofold.models.causal import Reader
from twofold.progress import Line

BATCH = 32  # pictures at a time
OTHERS = 8  # pictures that a text's own is compared with


class Captioned(NamedTuple):
    """A picture and what was said of it."""

    id: str
    caption: str


class Scored(NamedTuple):
    """A text and how likely it is, in nats; `gain` is how much likelier it is behind its picture than behind others."""

    id: str
    text: str
    nats: float
    tokens: int
    gain: float


def reader_of(model: Bundle | Reader | Speaker) -> Reader | Speaker:
    """The reader of pictures that a bundle holds, or the two halves of a captioner; UsageError where it holds none."""
    if isinstance(model, Reader | Speaker):
        return model
    encoders = [tower.encoder for tower in model.towers.values()]
    lookers = [encoder for encoder in encoders if isinstance(encoder, Looker)]
    tellers = [encoder for encoder in encoders if isinstance(encoder, Teller)]
    if lookers and tellers:
        return Speaker(lookers[0], tellers[0])
    found = [encoder for encoder in encoders if isinstance(encoder, Reader)]
    if not found:
        names = " and ".join(tower.encoder.spec["name"] for tower in model.towers.values())
        raise UsageError(
            f"This bundle says nothing: it holds {names}. What `twofold interleave` or `twofold train coca` made does."
        )
    return found[0]


def caption(
    model: Bundle | Reader | Speaker,
    source: Source,
    *,
    prompt: str = "",
    beams: int = 1,
    most: int = 40,
    on_error: OnError = "skip",
    quiet: bool = False,
) -> tuple[list[Captioned], list[Skipped]]:
    """A caption of each picture of `source`, of `most` tokens at most, and the pictures that cannot be read."""
    reader, said = reader_of(model), list[Captioned]()
    skipped: list[Skipped] = []
    for items, x in _batches(reader, source, "caption", on_error, skipped, quiet=quiet):
        texts = reader.caption(x, prompt=prompt, beams=beams, most=most)
        said += [Captioned(source.ids[item], text) for item, text in zip(items, texts, strict=True)]
    return said, skipped


def score(
    model: Bundle | Reader | Speaker, source: Source, *, on_error: OnError = "skip", quiet: bool = False
) -> tuple[list[Scored], list[Skipped]]:
    """How likely each text of `source` is behind its picture, and the pictures that cannot be read.

    `nats` falls with a text's length, and with how rare its words are anywhere. `gain` takes that out: it is the
    logarithm of p(text | its picture) over the average of p(text | another picture), for eight others of the source.
    (Behind no picture at all a text is unlikely to a model that has only ever seen captions.) NaN without any other.
    """
    if source.texts is None:
        raise DataError(f"{source.name} has no texts to score.")
    reader, scored = reader_of(model), list[Scored]()
    skipped: list[Skipped] = []
    others, seen_of_others = _others(reader, source)
    for items, x in _batches(reader, source, "score", on_error, skipped, quiet=quiet):
        owner = [at for at, item in enumerate(items) for _ in source.texts[item]]
        texts = [text for item in items for text in source.texts[item]]
        if not texts:
            continue
        with torch.no_grad():
            seen = reader.eye(x)  # once, however many texts a picture has
        behind = reader.likelihood(texts, seen[owner])
        elsewhere = torch.full((len(others), len(texts)), -torch.inf, device=seen.device)
        for row, (other, shown) in enumerate(zip(others, seen_of_others, strict=True)):
            foreign = [place for place, own in enumerate(owner) if items[own] != other]
            if foreign:
                pictures = shown.expand(len(foreign), *shown.shape)
                elsewhere[row, foreign] = reader.likelihood([texts[place] for place in foreign], pictures).nats
        count = elsewhere.isfinite().sum(0)
        gains = torch.where(count > 0, behind.nats - (elsewhere.logsumexp(0) - count.log()), torch.nan)
        for at, text, nats, tokens, gain in zip(
            owner, texts, behind.nats.tolist(), behind.tokens.tolist(), gains.tolist(), strict=True
        ):
            scored.append(Scored(source.ids[items[at]], text, nats, tokens, gain))
    return scored, skipped


def _others(reader: Reader | Speaker, source: Source) -> tuple[list[int], Tensor]:
    """Pictures from all over the source, and what the eye sees in them; those that cannot be read are left out."""
    spread = sorted({round(at * (len(source) - 1) / max(OTHERS - 1, 1)) for at in range(OTHERS)})
    found = list(_batches(reader, source.take(spread), "look", "skip", [], quiet=True))
    with torch.no_grad():
        seen = [reader.eye(x) for _, x in found]
    none = torch.zeros(0, device=device_of(reader))
    return [spread[at] for items, _ in found for at in items], torch.cat(seen) if seen else none


def _batches(
    reader: Reader | Speaker, source: Source, doing: str, on_error: OnError, skipped: list[Skipped], *, quiet: bool
) -> Iterator[tuple[Sequence[int], Any]]:
    """Which items, and their pictures, on the reader's device."""
    if source.images is None:
        raise DataError(f"{source.name} has no pictures.")
    device = device_of(reader)

    def prepare(item: Any, name: str) -> Any:
        return reader.prepare(item, name=name)

    at: list[int] = []
    ready: list[Any] = []
    with Line(doing, unit="images", quiet=quiet) as line:
        for index, prepared in ahead(source.images, prepare, on_error=on_error, names=source.ids, skipped=skipped):
            at.append(index)
            ready.append(prepared)
            if len(ready) == BATCH:
                yield at, moved(reader.batch(ready), device)
                line.update(index + 1, len(source))
                at, ready = [], []
        if ready:
            yield at, moved(reader.batch(ready), device)
            line.update(len(source), len(source))
