"""Clicks outlive kills and full disks, become training data, and a model that learns from them forgets nothing."""

import multiprocessing
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from twofold.data.samples import openmoji
from twofold.learn import learn
from twofold.models.bundle import Bundle, Tower
from twofold.models.encoders import image_encoder, text_encoder
from twofold.retrieve.corrected import change, corrected
from twofold.retrieve.feedback import Click, Feedback
from twofold.retrieve.index import Index
from twofold.train.feedback import Lesson

# -- clicks on the disk


def test_a_click_cut_inside_a_letter_costs_that_click_only(tmp_path):
    feedback = Feedback(tmp_path)
    feedback.add(Click("früh", (), "1", True))
    whole = feedback.path.read_bytes()
    torn = whole[: whole.index("ü".encode()) + 1]  # not UTF-8 any more
    feedback.path.write_bytes(whole + torn)
    feedback.add(Click("spät", (), "2", False))
    assert [(click.text, click.id) for click in feedback] == [("früh", "1"), ("spät", "2")]


def _click(folder: Path, writer: int) -> None:
    for n in range(50):
        Feedback(folder).add(Click("x" * 3000, (), f"{writer}-{n}", True))


def test_two_writers_lose_nothing(tmp_path):
    context = multiprocessing.get_context("fork" if not torch.cuda.is_initialized() else "spawn")
    writers = [context.Process(target=_click, args=(tmp_path, n)) for n in range(2)]
    for one in writers:
        one.start()
    for one in writers:
        one.join()
    assert sorted(click.id for click in Feedback(tmp_path)) == sorted(f"{w}-{n}" for w in range(2) for n in range(50))


def test_a_full_disk_keeps_no_part_of_a_click(tmp_path, monkeypatch):
    feedback = Feedback(tmp_path)
    feedback.add(Click("a", (), "1", True))
    before = feedback.path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("twofold.retrieve.feedback.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        feedback.add(Click("b", (), "2", True))
    assert feedback.path.read_bytes() == before


# -- learning


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """150 emoji that a random model has indexed, without their names, and what was said of hits of six names."""
    root = tmp_path_factory.mktemp("feedback")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TWOFOLD_CACHE", str(root / "cache"))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            image = image_encoder("timm:resnet18/4", size=32, small_stem=True)
            text = Tower(text_encoder("minilm"), nn.Sequential(nn.Linear(384, image.dim)))
            bundle = Bundle({"image": image, "text": text}, {"data": "openmoji"})
        source = openmoji().take(range(0, 4450, 30))
        source = replace(source, texts=[texts[:1] for texts in source.texts])
        Index.build(source, bundle, root / "index", texts="none")
        with closing(Index.open(root / "index")) as index:
            for at in range(0, 60, 10):
                words = source.texts[at][0]
                Feedback(root / "index").add(Click(words, (), source.ids[at], True))
                for hit in index.search(words, k=5):
                    if hit.id != source.ids[at]:
                        Feedback(root / "index").add(Click(words, (), hit.id, False))
        yield root, source


def test_what_was_said_is_learned_and_the_index_shows_it(judged):
    root, source = judged
    lesson = Lesson(steps=20, lr=1e-3, batch=64, keep=1.0, loss_allowed=1.0)
    done = learn(root / "index", out=root / "run", pairs=source, lesson=lesson, quiet=True)
    said = [line["said"] for line in done.run.log]
    assert said[-1] < said[0] and not done.worse
    old = Bundle.load(root / "index" / "model")
    assert done.bundle.tower_fingerprint("image") == old.tower_fingerprint("image")  # the index keeps its vectors
    assert done.bundle.tower_fingerprint("text") != old.tower_fingerprint("text")
    with closing(Index.open(root / "index")) as index:
        assert corrected(index) == []  # nothing has changed yet
    built = Index.build(source, done.bundle, root / "index")
    assert built.embedded == 0
    with closing(Index.open(root / "index")) as index:
        come = change(corrected(index))
        found = [hit.id for hit in index.search(source.texts[0][0], k=100)]
        assert corrected(index)[0].after.ids == found
    assert come.questions == come.right == 6
    again = learn(root / "index", out=root / "again", pairs=source, lesson=Lesson(steps=5, batch=64), quiet=True)
    assert again.ordered[0] == pytest.approx(done.ordered[1])  # it goes on from what was learned
