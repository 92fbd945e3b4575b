"""Clicks outlive kills and full disks, become training data, and a model that learns from them forgets nothing."""

import json
import multiprocessing
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from twofold.cli import main
from twofold.errors import UsageError
from twofold.learn import export, learn
from twofold.methods.feedback import WithFeedback
from twofold.methods.siglip import SigLIP
from twofold.models.bundle import Bundle
from twofold.retrieve.corrected import change, corrected
from twofold.retrieve.feedback import Click, Feedback
from twofold.retrieve.index import Index
from twofold.train.feedback import Lesson
from twofold.train.mine import read_negatives

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
def judged(tmp_path_factory, untrained, emoji):
    """Emoji that an untrained model has indexed, by their pictures alone, and what was said of hits of six names."""
    root = tmp_path_factory.mktemp("feedback")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TWOFOLD_CACHE", str(root / "cache"))
        source = replace(emoji, texts=[texts[:1] for texts in emoji.texts])
        Index.build(source, untrained, root / "index", texts="none")
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
    lesson = Lesson(steps=10, lr=1e-3, batch=64, keep=1.0, loss_allowed=1.0)
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


def test_judged_questions_are_hard_negatives_that_align_and_others_read(judged, capsys):
    root, source = judged
    out = root / "clicks.jsonl"
    rows = export(root / "index", out)
    first = json.loads(out.read_text().splitlines()[0])
    assert rows == len(out.read_text().splitlines()) and list(first) == ["anchor", "positive", "negative"]
    assert first["anchor"] == first["positive"] == source.texts[0][0]
    negatives = read_negatives(out, source.ids)
    asked = [at for at in range(len(source)) if (negatives[at] >= 0).any()]
    assert asked == list(range(0, 60, 10))
    assert {source.ids[n] for n in negatives[0].tolist() if n >= 0} == set(
        Feedback(root / "index").judged()[0].negatives
    )
    assert main(["mine", "--feedback", str(root / "index"), "--out", str(root / "c.csv"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == rows
    assert main(["index", "--corrected", str(root / "index"), "--json"]) == 0
    assert "change" in json.loads(capsys.readouterr().out)


def test_nothing_judged_is_nothing_to_learn(judged, tmp_path):
    root, source = judged
    Index.build(source.take(range(9)), Bundle.load(root / "index" / "model"), tmp_path / "fresh")
    with pytest.raises(UsageError, match="Nobody has judged"):
        learn(tmp_path / "fresh", out=tmp_path / "run", pairs=source)


def test_the_loss_is_nothing_where_all_is_kept_and_moves_only_words():
    head = nn.Linear(4, 4, bias=False)
    nn.init.eye_(head.weight)
    method = WithFeedback(
        SigLIP({"image": nn.Identity(), "text": head}, scale=100.0, bias=-50.0),
        torch.eye(4)[:2],
        torch.eye(4),
        torch.tensor([[1, -1, 0, 0], [-1, 1, 0, 0]], dtype=torch.int8),
    )
    with torch.no_grad():
        assert method.said(method.asked()).item() < 1e-6
        assert method.moved(torch.randn(5, 4)).item() == pytest.approx(0, abs=1e-6)
    assert [name for name, p in method.named_parameters() if p.requires_grad] == ["method.pair.towers.text.weight"]
    with torch.no_grad():
        head.weight.copy_(torch.eye(4)[[1, 0, 2, 3]])  # both questions find the wrong one
        assert method.said(method.asked()).item() == pytest.approx(50 + 0.2 * 50, rel=1e-4)  # softplus of ±50
        assert method.moved(torch.eye(4)).item() == pytest.approx(0.5)  # two of four texts are at right angles
