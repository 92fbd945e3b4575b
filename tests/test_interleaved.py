"""Documents of pictures and texts: how they are read and packed, and that a model reads each as if it stood alone."""

import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from processes import together
from twofold import runtime
from twofold.cli import main
from twofold.data.documents import PATCH, Documents, Shown, captioned, open_documents, packed
from twofold.data.loader import Batches
from twofold.data.sources import Source
from twofold.errors import BundleError, DataError, UsageError
from twofold.measure.likelihood import caption, score
from twofold.methods import Interleaved, Method
from twofold.models.bundle import Bundle
from twofold.models.causal import Eye, Reader, positions, reader, visible
from twofold.models.encoders import image_encoder
from twofold.models.tokens import patches
from twofold.objectives import next_token
from twofold.train.checkpoint import load
from twofold.train.interleave import Reading, interleave, open_pages, without_pictures
from twofold.train.loop import fit
from twofold.train.optim import Optimizer

SIZE, COLOURS = 16, {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "white": (240, 240, 240)}
TEXTS = [f"the square in this picture is {colour} ." for colour in COLOURS] + ["what follows ?", "and then"]


def seeing(sees="patches", **options) -> Reader:
    torch.manual_seed(0)
    vision = image_encoder("timm:vit_tiny_patch16_224/8x16x1", size=SIZE)
    return reader("llama:tiny", vision, sees=sees, texts=TEXTS, **options)


def squares(n: int = 32) -> Tensor:
    """Pictures of one colour each, in turn, with noise."""
    draw = torch.Generator().manual_seed(1)
    colours = torch.tensor(list(COLOURS.values()))[torch.arange(n) % 4]
    noise = torch.randint(-20, 21, (n, 3, SIZE, SIZE), generator=draw)
    return (colours[:, :, None, None] + noise).clamp(0, 255).byte()


def documents(n: int = 32) -> Documents:
    """A picture and what it shows; every third document has three parts more."""
    parts: list[tuple[str | int, ...]] = [(at, TEXTS[at % 4]) for at in range(n)]
    for at in range(0, n - 1, 3):
        parts[at] = ("what follows ?", *parts[at], at + 1, TEXTS[(at + 1) % 4])
    return Documents("squares", [str(at) for at in range(n)], parts, list(squares(n).numpy()))


def rows(model: Reader, found: Documents, length: int = 48):
    return packed(found, model.encode, length=length, cells=model.eye.cells, start=model.start, end=model.end)


def batches(model: Reader, batch: int = 4, n: int = 32) -> Batches:
    laid = rows(model, documents(n))
    columns = {"image": Shown(squares(n), laid.pictures), "tokens": laid.tokens, "document": laid.document}
    return Batches(columns, batch=batch, seed=0)


def one_batch(model: Reader) -> dict:
    laid = rows(model, documents(8))
    return {
        "tokens": torch.from_numpy(laid.tokens),
        "document": torch.from_numpy(laid.document),
        "image": [Shown(squares(8), laid.pictures)[row] for row in range(len(laid.tokens))],
    }


# Reading


def write(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), "utf-8")
    return path


def test_documents_are_read_in_order_and_a_picture_once(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(b"x")
    a, b, word = {"image": "a.png"}, {"image": "b.png"}, {"text": "Größe"}
    found = open_documents(write(tmp_path / "d.jsonl", [b, word, a, b], "", [{"text": "  "}, a]))
    assert found.parts == [(0, "Größe", 1, 0), (1,)]
    assert found.pictures == [tmp_path / "b.png", tmp_path / "a.png"]
    assert [name.rpartition(" ")[2] for name in found.ids] == ["1", "3"]
    assert found.showing([1]).parts == [(1,)]
    assert found.showing([1]).skipped[0].id == found.ids[0]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('[{"text": "a"', "line 2 is not JSON"),
        ({"text": "a"}, "line 2 is no document"),
        ([{"text": "a"}, "b"], "line 2, part 2"),
        ([{"image": "a.png", "text": "a"}], "line 2, part 1"),
        ([{"picture": "a.png"}], "line 2, part 1"),
        ([{"text": 3}], "line 2, part 1: a text is a string"),
        ([{"image": ""}], "line 2, part 1: the path of a picture"),
    ],
)
def test_what_is_no_document_is_named_by_file_and_line(tmp_path, line, said):
    with pytest.raises(DataError, match=rf"d\.jsonl {said}"):
        open_documents(write(tmp_path / "d.jsonl", [{"text": "a"}], line))


def test_empty_documents_and_missing_pictures_are_skipped_or_raise(tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    path = write(tmp_path / "d.jsonl", [], [{"image": "a.png"}], [{"image": "no.png"}, {"text": "a"}], [{"text": " "}])
    found = open_documents(path)
    assert found.parts == [(0,)]
    assert [skip.id.rpartition(" ")[2] for skip in found.skipped] == ["1", "3", "4"]
    assert "no.png" in found.skipped[1].reason
    with pytest.raises(DataError, match="line 1: an empty document"):
        open_documents(path, on_error="raise")
    with pytest.raises(DataError, match=r"none of its 2 pictures exist.*images=FOLDER"):
        open_documents(path, images=tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"holds no document.*line 1, an empty document"):
        open_documents(write(tmp_path / "e.jsonl", []))
    with pytest.raises(DataError, match="no file"):
        open_documents(tmp_path / "none.jsonl")


def test_a_line_that_is_not_utf_8_is_named(tmp_path):
    (tmp_path / "d.jsonl").write_bytes(b'[{"text": "a"}]\n[{"text": "Gr\xf6\xdfe"}]')
    with pytest.raises(DataError, match=r"d\.jsonl line 2 is not UTF-8"):
        open_documents(tmp_path / "d.jsonl")


def test_pairs_are_documents_of_a_picture_and_a_caption():
    found = captioned(Source("pairs", ["a", "b"], images=[b"1", b"2"], texts=[["x", " ", "y"], ["z"]]))
    assert found.parts == [(0, "x"), (0, "y"), (1, "z")]
    assert found.ids == ["a#0", "a#2", "b#0"]
    with pytest.raises(DataError, match="no pictures with captions"):
        captioned(Source("pictures", ["a"], images=[b"1"]))


# Packing


def pieces(laid) -> list[tuple[list[int], list[int]]]:
    """The documents that lie in rows, and their pictures, in the order of rows."""
    found = []
    for tokens, document, shown in zip(laid.tokens, laid.document, laid.pictures, strict=True):
        shown = list(shown)
        for number in range(1, document.max() + 1):
            own = tokens[document == number].tolist()
            found.append((own, [shown.pop(0) for _ in range(own.count(PATCH) // 3)]))
        assert not shown
    return found


@pytest.mark.parametrize("length", [4, 7, 20, 64])
def test_rows_hold_every_token_and_picture_of_every_document_once(length):
    draw = np.random.default_rng(length)
    words = {str(size): list(range(10, 10 + size)) for size in range(1, 12)}

    def part() -> str | int:
        return int(draw.integers(9)) if draw.random() < 0.4 else str(draw.integers(1, 12))

    def ids(part: str | int) -> list[int]:
        return [PATCH] * 3 if isinstance(part, int) else words[part]

    parts = [tuple(part() for _ in range(draw.integers(1, 6))) for _ in range(40)]
    found = Documents("random", [str(at) for at in range(40)], parts, [b""] * 9)
    laid = packed(found, lambda texts: [words[text] for text in texts], length=length, cells=3, start=1, end=2)
    own = pieces(laid)
    assert all(tokens[0] == 1 and 1 not in tokens[1:] for tokens, _ in own)
    content = [token for tokens, _ in own for token in tokens if token > 2 or token == PATCH]
    expected = [token for one in parts for part in one for token in ids(part)]
    assert sorted(content) == sorted(expected)
    shown = [part for one in parts for part in one if isinstance(part, int)]
    assert sorted(picture for _, pictures in own for picture in pictures) == sorted(shown)
    whole = [([1, *(token for part in one for token in ids(part)), 2], one) for one in parts]
    short = [(tokens, one) for tokens, one in whole if len(tokens) <= length]
    fit_in = [(tokens, [part for part in one if isinstance(part, int)]) for tokens, one in short]
    for each in fit_in:
        assert each in own
    assert laid.split == sum(len(tokens) - 1 > length for tokens, _ in whole)
    filled = (laid.document > 0).sum(1)
    assert (np.sort(laid.document == 0, 1) == (laid.document == 0)).all()  # padding is behind
    assert all(
        a + b > length for a, b in zip(np.sort(filled), np.sort(filled)[1:], strict=False)
    )  # no two rows are one


def test_a_picture_that_no_row_can_hold_is_an_error():
    with pytest.raises(UsageError, match="no room for a picture of 9 patches"):
        packed(documents(4), lambda texts: [[5]] * len(texts), length=9, cells=9, start=1, end=1)


def test_masks_and_positions_are_what_loops_say():
    document = torch.tensor([[1, 1, 1, 2, 3, 3, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]])
    sees, place = visible(document), positions(document)
    for row in range(2):
        for i in range(8):
            own = [j for j in range(i + 1) if document[row, j] == document[row, i]]
            assert sees[row, i].nonzero().flatten().tolist() == own
            assert place[row, i] == len(own) - 1


# Reading by a model


@pytest.mark.parametrize("sees", ["patches", "features"])
def test_no_information_crosses_from_a_document_to_another(sees):
    model = seeing(sees).eval()
    batch = one_batch(model)
    tokens, document, pictures = batch["tokens"], batch["document"], torch.cat(batch["image"])
    row = next(row for row in range(len(tokens)) if document[row].max() > 1)
    before = model.read(tokens, document, pictures)
    for number in range(1, int(document[row].max()) + 1):
        own = document[row] == number
        changed, other = tokens.clone(), pictures.clone()
        said = own & (tokens[row] != PATCH)
        changed[row, said] = (changed[row, said] + 1) % len(model.tokenizer)
        mine = torch.cat(
            [document[r][tokens[r] == PATCH].unflatten(0, (-1, model.eye.cells))[:, 0] for r in range(row + 1)]
        )
        first = sum(len(shown) for shown in batch["image"][:row])
        shown = [first + at for at, one in enumerate(mine[first:].tolist()) if one == number]
        other[shown] = 255 - other[shown]
        after = model.read(changed, document, other)
        assert torch.equal(before.logits[row, ~own], after.logits[row, ~own])
        assert not torch.isclose(before.logits[row, own], after.logits[row, own]).all(1).any()
        assert torch.equal(before.logits[:row], after.logits[:row])


def test_a_document_is_read_as_if_it_stood_alone_and_the_loss_is_that_of_each():
    """transformers' own loss of each document without row, mask or padding, and the next patch by a loop."""
    model = seeing()
    method = Interleaved(model, pixels=0.5).eval()
    batch = one_batch(model)
    out = method(batch, runtime.generator(0))
    nats, words, errors = 0.0, 0, []
    embed = model.language.get_input_embeddings()
    for row in range(len(batch["tokens"])):
        shown = list(batch["image"][row])
        for number in range(1, int(batch["document"][row].max()) + 1):
            ids = batch["tokens"][row][batch["document"][row] == number]
            x, true = embed(ids.clamp_min(0)), {}
            for place in (ids == PATCH).nonzero().flatten().tolist()[:: model.eye.cells]:
                picture = shown.pop(0)[None]
                x[place : place + model.eye.cells] = model.project(model.eye(picture))[0]
                for cell, patch in enumerate(patches(model.eye.standard(picture), (8, 8))[0]):
                    true[place + cell] = (patch - patch.mean()) / (patch.var() + 1e-6).sqrt()
            labels = ids.masked_fill(ids == PATCH, -100)
            alone = model.language(inputs_embeds=x[None], labels=labels[None], output_hidden_states=True)
            count = int((labels[1:] >= 0).sum())
            nats, words = nats + alone.loss * count, words + count
            for place, pixels in true.items():
                errors.append((method.paint(alone.hidden_states[-1][0, place - 1]) - pixels).square().mean())
    torch.testing.assert_close(out.parts["text"], nats / words, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.loss, nats / words + 0.5 * torch.stack(errors).mean(), rtol=1e-5, atol=1e-5)
    assert len(out.z) == 8


def test_next_token_is_minus_the_log_of_the_share():
    logits = torch.tensor([[1.0, 2.0, 3.0]]).log()
    torch.testing.assert_close(next_token(logits, torch.tensor([2])), -torch.tensor([0.5]).log())
    with pytest.raises(ValueError, match="Each token"):
        next_token(logits, torch.tensor([2, 1]))


def test_the_next_patch_is_no_question_where_the_whole_picture_was_seen():
    with pytest.raises(UsageError, match="give the next patch away"):
        Interleaved(seeing("features"), pixels=1.0)
    with pytest.raises(UsageError, match="0 or more"):
        Interleaved(seeing(), pixels=-1.0)


def test_patches_see_nothing_of_each_other():
    eye = Eye(image_encoder("timm:vit_tiny_patch16_224/8x16x1", size=SIZE), "patches")
    x = torch.rand(1, 3, SIZE, SIZE)
    y = x.clone()
    y[..., :8, :8] = 0
    assert torch.equal(eye(x)[0, 1:], eye(y)[0, 1:])
    assert not torch.equal(eye(x)[0, 0], eye(y)[0, 0])


@pytest.mark.parametrize("name", ["timm:resnet18/8", "timm:vit_tiny_patch16_224", "timm:swin_tiny_patch4_window7_224"])
def test_an_eye_takes_convolutions_and_transformers_and_keeps_the_order_of_patches(name):
    vision = image_encoder(name, size=64 if "resnet" in name else None, pretrained=False)
    eye = Eye(vision, "features").eval()
    x = torch.rand(1, 3, vision.size, vision.size)
    h = vision.body.eval().forward_features(eye.standard(x))
    if h.ndim == 4:
        h = h if "swin" in name else h.permute(0, 2, 3, 1)
        expected = torch.stack([h[0, row, column] for row in range(h.shape[1]) for column in range(h.shape[2])])
    else:
        expected = h[0, 1:]  # all but the class token
    assert torch.equal(eye(x)[0], expected)


def test_a_frozen_eye_stays_what_it_is():
    vision = image_encoder("timm:resnet18/8", size=32)
    eye = Eye(vision, "features").freeze().train()
    before = {name: value.clone() for name, value in eye.state_dict().items()}
    first = eye(torch.rand(4, 3, 32, 32))
    assert not first.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in eye.state_dict().items())


def test_features_made_before_are_read_as_their_pictures_are():
    model = seeing("features").eval()
    batch = one_batch(model)
    ready = {**batch, "image": [model.eye(shown) for shown in batch["image"]]}
    method = Interleaved(model)
    torch.testing.assert_close(method(batch, runtime.generator(0)).loss, method(ready, runtime.generator(0)).loss)
    with pytest.raises(ValueError, match="places for patches"):
        model.read(batch["tokens"], batch["document"], torch.cat(batch["image"])[1:])


# As a method


def test_every_parameter_that_learns_gets_a_gradient():
    for method in (Interleaved(seeing(), pixels=1.0), Interleaved(seeing("features"))):
        method(one_batch(method.reader), runtime.generator(0)).loss.backward()
        assert not [name for name, p in method.named_parameters() if p.requires_grad and p.grad is None]


def test_it_is_final_and_its_signature_is_its_configuration():
    assert Interleaved.__bases__ == (Method,)
    page = (Path(__file__).parents[1] / "docs" / "methods" / "interleaved.md").read_text()
    for parameter in list(inspect.signature(Interleaved).parameters.values())[1:]:
        assert f"| `{parameter.name}` | {parameter.default} |" in page


def test_it_learns_to_say_what_a_picture_shows(tmp_path):
    """Without the picture the colour costs ln 4 = 1.39 nats at best."""
    method = Interleaved(seeing(), pixels=0.1)
    done = fit(
        method, batches(method.reader), steps=60, out=tmp_path, optimizer=Optimizer(lr=3e-3, warmup=5), quiet=True
    )
    assert done.log[-1]["pixels"] < done.log[0]["pixels"]
    model = method.reader
    texts = [[model.start, *[PATCH] * model.eye.cells, *ids, model.end] for ids in model.encode(TEXTS[:4])]
    cost = torch.zeros(4, 4)
    for shown, picture in enumerate(squares(8)[4:]):
        for said, ids in enumerate(texts):
            tokens = torch.tensor([ids])
            with torch.no_grad():
                logits = model.read(tokens, torch.ones_like(tokens), picture[None]).logits[0]
            behind = 1 + model.eye.cells
            cost[shown, said] = next_token(logits[behind - 1 : -1], tokens[0, behind:]).sum()
    assert cost.argmin(1).tolist() == [0, 1, 2, 3]
    assert cost.diag().max() < 1.38


def test_stopped_and_started_again_it_ends_with_the_same_weights(tmp_path):
    def train(steps: int, out: Path, stop: int | None = None):
        method = Interleaved(seeing(), pixels=1.0)
        source = batches(method.reader)
        taken = source.__getitem__

        class Stopping:
            batch = source.batch

            def __getitem__(self, step):
                if step == stop:
                    raise KeyboardInterrupt
                return taken(step)

        fit(method, Stopping(), steps=steps, out=out, save_every=2, quiet=True)
        return load(out / "checkpoint.safetensors").tensors

    whole = train(7, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(7, tmp_path / "stopped", stop=5)
    again = train(7, tmp_path / "stopped")
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def gradients() -> dict[str, Tensor]:
    """Of a batch of five rows, whose documents are unevenly many."""
    torch.manual_seed(0)
    method = Interleaved(seeing(), pixels=0.3)
    method(batches(method.reader, batch=5)[0], runtime.generator(0)).loss.backward()
    return {name: p.grad for name, p in method.named_parameters() if p.grad is not None}


def averaged(folder: Path) -> None:
    found = gradients()
    for gradient in found.values():
        torch.distributed.all_reduce(gradient)
        gradient /= runtime.world()[1]
    if runtime.world()[0] == 0:
        torch.save(found, folder / "gradients.pt")


def test_two_processes_have_the_gradients_of_one(tmp_path):
    together(averaged, tmp_path / "two")
    two, one = torch.load(tmp_path / "two" / "gradients.pt"), gradients()
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-6)


def test_a_bundle_keeps_the_reader_and_embeds_pictures(tmp_path):
    model = seeing("features").eval()
    Bundle(Interleaved(model).towers()).save(tmp_path / "bundle")
    again = Bundle.load(tmp_path / "bundle", device="cpu")
    pictures = [picture.transpose(1, 2, 0) for picture in squares(4).numpy()]
    assert np.array_equal(again.encode(pictures), Bundle({"image": model}).encode(pictures))
    tower = again.tower("image").encoder
    assert tower.encode(TEXTS) == model.encode(TEXTS)
    x = model.inputs(pictures)
    tokens = torch.tensor([[model.start, *[PATCH] * model.eye.cells]] * 4)
    states = model.read(tokens, torch.ones_like(tokens), x).states
    torch.testing.assert_close(tower(x), states[:, 1:].mean(1))
    assert torch.equal(
        reader(f"local:{tmp_path / 'bundle'}", model.eye.encoder).language.state_dict()["lm_head.weight"],
        model.language.state_dict()["lm_head.weight"],
    )


# Saying and judging


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> Reader:
    """A reader that knows four colours."""
    method = Interleaved(seeing("features"))
    source, out = batches(method.reader), tmp_path_factory.mktemp("told")
    fit(method, source, steps=80, out=out, optimizer=Optimizer(lr=3e-3, warmup=5), quiet=True)
    return method.reader


def test_a_likelihood_is_the_sum_over_the_text_and_its_end_whatever_stands_beside(told):
    texts = [TEXTS[0], "and then"]
    found = told.likelihood(texts, squares(2))
    for at, text in enumerate(texts):
        alone = told.likelihood([text], squares(2)[at : at + 1])
        torch.testing.assert_close(alone.nats, found.nats[at : at + 1])
        ids = [*told.encode([text])[0], told.end]
        assert found.tokens[at] == len(ids)
        tokens, nats = [told.start, *[PATCH] * told.eye.cells], 0.0
        for token in ids:
            row = torch.tensor([tokens])
            with torch.no_grad():
                logits = told.read(row, torch.ones_like(row), squares(2)[at : at + 1]).logits[0, -1]
            nats += float(logits.log_softmax(0)[token])
            tokens.append(token)
        assert found.nats[at] == pytest.approx(nats, abs=1e-3)
    assert (told.likelihood(texts).tokens == found.tokens).all()


def test_captions_say_what_is_shown_and_beams_find_what_is_no_less_likely(told):
    pictures = squares(8)[4:]
    greedy = told.caption(pictures)
    assert greedy == TEXTS[:4]
    wide = told.caption(pictures, beams=3)
    assert (told.likelihood(wide, pictures).nats >= told.likelihood(greedy, pictures).nats - 1e-3).all()
    begun = "the square in this picture"
    assert told.caption(pictures, prompt=begun) == [text.removeprefix(begun).strip() for text in TEXTS[:4]]
    assert all(len(told.encode([said])[0]) <= 3 for said in told.caption(pictures, most=3))
    assert told.caption(told.eye(pictures).detach()) == greedy
    with pytest.raises(UsageError, match="one beam"):
        told.caption(pictures, beams=0)


def test_the_gain_of_a_right_text_is_above_that_of_a_wrong_one(told):
    pictures = list(squares(4).permute(0, 2, 3, 1).numpy())
    source = Source("squares", [*"abcd"], images=[*pictures[:3], b"no"], texts=[TEXTS[:4], [], TEXTS[:4], TEXTS[:1]])
    scored, skipped = score(told, source, quiet=True)
    assert [skip.id for skip in skipped] == ["d"]
    assert [(one.id, one.text) for one in scored] == [(id, text) for id in "ac" for text in TEXTS[:4]]
    gains = torch.tensor([one.gain for one in scored]).view(2, 4)
    assert gains.argmax(1).tolist() == [0, 2]
    assert (gains.max(1).values > 0.5).all()
    assert gains.min() < 0
    said, skipped = caption(Bundle({"image": told}), source, quiet=True)
    assert [one.id for one in said] == [*"abc"] and [skip.id for skip in skipped] == ["d"]
    with pytest.raises(UsageError, match="says nothing"):
        caption(Bundle({"image": image_encoder("timm:resnet18/8", size=32)}), source)


# From the command line


def run(capsys, *arguments: object) -> dict:
    capsys.readouterr()
    assert main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_pages_are_read_said_and_judged(tmp_path, capsys):
    lines: list[object] = []
    for at, picture in enumerate(squares(24).permute(0, 2, 3, 1).numpy()):
        Image.fromarray(picture).save(tmp_path / f"{at}.png")
        lines.append([{"image": f"{at}.png"}, {"text": TEXTS[at % 4]}])
    (tmp_path / "24.png").write_bytes(b"broken")
    lines += [[{"image": "24.png"}, {"text": "lost"}], [{"image": "25.png"}], []]
    pages, out = write(tmp_path / "pages.jsonl", *lines), tmp_path / "run"
    recipe = ["--language", "llama:tiny", "--size", 32, "--length", 40, "--batch", 4, "--epochs", 40]
    done = run(capsys, "interleave", pages, "--out", out, *recipe)
    assert sorted(int(skip["id"].rpartition(" ")[2]) for skip in done["skipped"]) == [25, 26, 27]
    assert done["last"]["text"] < 0.5
    again = run(capsys, "interleave", pages, "--out", out, *recipe)
    assert again["last"]["loss"] == done["last"]["loss"]
    said = run(capsys, "caption", tmp_path, "--model", out, "--limit", 3, "--out", tmp_path / "said.csv")
    assert len(said["captions"]) == 3
    assert (tmp_path / "said.csv").read_text().splitlines()[0] == "id,caption"
    rows = [f"{at}.png,{TEXTS[(at + (at == 5)) % 4]}" for at in range(12)]  # the sixth text is another picture's
    pairs = write(tmp_path / "pairs.csv", "image,text", *rows)
    assert run(capsys, "score", pairs, "--model", out, "--out", tmp_path / "scores.csv")["texts"] == 12
    worst = (tmp_path / "scores.csv").read_text().splitlines()[1]
    assert worst.startswith("5.png,")


def test_captions_of_a_manifest_are_documents_and_val_chooses(tmp_path):
    rows = [f"{at}.png,{TEXTS[at % 4]},{('train', 'train', 'val')[at % 3]}" for at in range(24)]
    for at, picture in enumerate(squares(24).permute(0, 2, 3, 1).numpy()):
        Image.fromarray(picture).save(tmp_path / f"{at}.png")
    documents, held = open_pages(write(tmp_path / "pairs.csv", "image,text,split", *rows))
    assert (len(documents), len(held or ())) == (16, 8)
    recipe = Reading("llama:tiny", "timm:vit_tiny_patch16_224/8x16x1", "patches", SIZE, length=20, batch=4, epochs=3)
    done = interleave(documents, out=tmp_path / "run", recipe=recipe, held=held, quiet=True)
    costs = [-line["likelihood"] for line in done.run.log if "likelihood" in line]
    assert len(costs) == 3 and done.cost == pytest.approx(min(costs))
    model = done.bundle.tower("image").encoder
    nats = [model.likelihood([text], squares(24)[at : at + 1]) for at, text in enumerate(TEXTS[:4] * 6) if at % 3 == 2]
    expected = -sum(float(one.nats) for one in nats) / sum(int(one.tokens) for one in nats)
    assert done.cost == pytest.approx(expected, abs=1e-3)
    blind = without_pictures(documents)
    assert blind.texts == documents.texts and not blind.pictures


# Language models of others


def folder_of(kind: str, folder: Path) -> Path:
    """A folder as the hub has it, of a small model with weights and the tokenizer of ours."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model = seeing()
    shape: dict[str, Any] = {
        "vocab_size": len(model.tokenizer),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    shape |= {"intermediate_size": 64, "num_key_value_heads": 1} if kind != "gpt2" else {}
    shape |= {"layer_types": ["conv", "full_attention"]} if kind == "lfm2" else {}
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape)).save_pretrained(folder)
    for name, content in model.files.items():
        if name.startswith("tokenizer"):
            (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_language_models_from_a_folder_keep_documents_apart(kind, tmp_path):
    model = reader(f"hf:{folder_of(kind, tmp_path)}", image_encoder("timm:resnet18/8", size=32))
    assert model.spec["name"] == f"hf:{tmp_path.name}"
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 32)


def test_a_recurrent_language_model_is_refused(tmp_path):
    with pytest.raises(UsageError, match="does not keep documents in a row apart"):
        reader(f"hf:{folder_of('lfm2', tmp_path)}", image_encoder("timm:resnet18/8", size=32))


def test_unknown_names_say_what_there_is(tmp_path):
    vision = image_encoder("timm:resnet18/8", size=32)
    with pytest.raises(UsageError, match="llama:small"):
        reader("llama:smal", vision)
    with pytest.raises(UsageError, match="way to see 'feature'"):
        reader("llama:tiny", vision, sees="feature")  # type: ignore[arg-type]
    with pytest.raises(BundleError, match="not a readable causal"):
        (tmp_path / "config.json").write_text("{}")
        reader(f"hf:{tmp_path}", vision)
