"""CoCa's towers: what each token sees, and that a bundle of them finds, says and scores."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from twofold import runtime
from twofold.data.loader import Batches
from twofold.data.sources import Source
from twofold.errors import UsageError
from twofold.measure.likelihood import caption, reader_of, score
from twofold.methods import CoCa
from twofold.models.bundle import Bundle
from twofold.models.captioner import EDGE, PAD, Speaker, captioner
from twofold.models.encoders import image_encoder
from twofold.objectives import clip
from twofold.train.loop import fit
from twofold.train.optim import Optimizer
from twofold.train.train import Setting, train

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (20, 60, 230), "grey": (128, 128, 128)}
TEXTS = [f"a {colour} square on {place}" for colour in COLOURS for place in ("the floor", "a table that stands there")]


def towers():
    torch.manual_seed(0)
    return captioner("coca:tiny", image_encoder("timm:resnet18/8", size=16, small_stem=True), TEXTS)


def pictures() -> list[np.ndarray]:
    return [np.full((16, 16, 3), COLOURS[text.split()[1]], np.uint8) for text in TEXTS]


def batch(made) -> dict:
    return {"image": made["image"].inputs(pictures()), "text": made["text"].inputs(TEXTS)}


def test_words_see_neither_what_follows_them_nor_the_token_that_stands_for_the_text():
    teller = towers()["text"]
    tokens = teller.inputs([TEXTS[1]])
    n = tokens["input_ids"].shape[1]
    for place in range(1, n):
        changed = tokens["input_ids"].clone()
        changed[0, place] = 5
        before, after = (teller.read({**tokens, "input_ids": ids}) for ids in (tokens["input_ids"], changed))
        differs = (before[0] - after[0]).abs().amax(2)[0] > 1e-6
        assert differs.tolist() == [False] * place + [True] * (n - place)
        assert not torch.allclose(before[1], after[1])  # the text's token sees them all
    with torch.no_grad():
        words = teller.read(tokens)[0]
        teller.last += 1
        assert torch.equal(teller.read(tokens)[0], words)


def test_other_texts_of_the_batch_change_nothing():
    made = towers()
    teller, shown = made["text"], made["image"].shown(made["image"].inputs(pictures()))
    short, long = sorted(TEXTS, key=len)[0], sorted(TEXTS, key=len)[-1]
    alone, beside = teller.inputs([short]), teller.inputs([short, long])
    assert beside["input_ids"][0, -1] == PAD and alone["input_ids"][0, -1] == EDGE
    (words, text), (padded, texts) = teller.read(alone), teller.read(beside)
    n = words.shape[1]
    torch.testing.assert_close(texts[:1], text, rtol=1e-4, atol=1e-5)
    told = teller.tell(words, shown[:1])
    torch.testing.assert_close(teller.tell(padded, shown[:2])[:1, :n], told, rtol=1e-4, atol=1e-5)


def test_the_reading_half_is_blind_and_the_telling_half_is_not():
    made = towers()
    words, _ = made["text"].read(made["text"].inputs(TEXTS[:1]))
    shown = made["image"].shown(made["image"].inputs(pictures()[::4]))
    one, other = (made["text"].tell(words, shown[row : row + 1]) for row in (0, 1))
    assert (one - other).abs().max() > 1e-4


def test_the_loss_is_clips_and_twice_what_a_word_costs():
    made = towers()
    method, rows = CoCa(made).eval(), batch(made)  # BatchNorm would see other pictures with each batch
    out = method(rows, runtime.generator(0))
    looker, teller = made["image"], made["text"]
    contrast = clip(looker(rows["image"]), teller(rows["text"]), scale=torch.tensor(1 / 0.07))
    costs = []
    for row, text in enumerate(TEXTS):  # text by text, word by word
        tokens = teller.inputs([text])
        logits = teller.tell(teller.read(tokens)[0], looker.shown(rows["image"][row : row + 1]))[0]
        costs += [F.cross_entropy(logits[at], tokens["input_ids"][0, at + 1]) for at in range(len(logits) - 1)]
    expected = contrast + 2 * torch.stack(costs).mean()
    torch.testing.assert_close(out.loss, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(UsageError, match="one above 0"):
        CoCa(made, contrast=0.0, caption=0.0)


def test_it_learns_to_name_colours_and_a_bundle_says_them(tmp_path):
    source = Source("squares", [str(at) for at in range(8)], images=pictures(), texts=[[text] for text in TEXTS])
    setting = Setting(encoder="timm:resnet18/8", size=16, small_stem=True, text="coca:tiny", policy="none", batch=8)
    setting = Setting(**{**vars(setting), "epochs": 40})
    train("coca", source, out=tmp_path, setting=setting, optimizer=Optimizer(lr=3e-3, warmup=5), quiet=True)
    bundle = Bundle.load(tmp_path, device="cpu")
    speaker = reader_of(bundle)
    assert isinstance(speaker, Speaker)

    said, _ = caption(bundle, source, quiet=True)
    assert [one.caption.split()[1] for one in said] == [text.split()[1] for text in TEXTS]
    told, _ = caption(bundle, source.take([0]), prompt="a", most=3, quiet=True)
    assert len(told[0].caption.split()) <= 4 and told[0].caption.startswith("a ")
    gains = [one.gain for one in score(bundle, source, quiet=True)[0]]
    assert min(gains) > 0
    cosines = bundle.encode(TEXTS[::2]) @ bundle.encode(pictures()[::2]).T
    assert cosines.argmax(1).tolist() == [0, 1, 2, 3]
    with pytest.raises(UsageError, match="beams"):
        caption(bundle, source, beams=2, quiet=True)


def test_chunks_are_refused(tmp_path):
    made = towers()
    columns = {"image": made["image"].inputs(pictures()), "text": made["text"].inputs(TEXTS)["input_ids"]}
    with pytest.raises(UsageError, match="whole batches"):
        fit(CoCa(made), Batches(columns, batch=8, seed=0), steps=1, out=tmp_path, chunk=2, quiet=True)
