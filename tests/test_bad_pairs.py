"""A table of pairs as people have them: some files missing, some texts blank, long or twice. Every command that takes
pairs goes on with what is whole, says what it left out and why, and loses nothing else."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from twofold.cli import main
from twofold.data.sources import Column, open_source
from twofold.errors import DataError
from twofold.measure.matched import matched
from twofold.models.bundle import Bundle, Tower
from twofold.models.encoders import encoder, image_encoder
from twofold.train.align import align
from twofold.train.mine import mine
from twofold.train.pairs import audit_pairs

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 220), "white": (230, 230, 230)}
SPLITS = ("train", "val", "test")
LONG = ("very long words " * 700)[:10_000]
WHOLE = 36  # items that are as they should be


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """messy.csv, its pictures, two small encoders (image, text) and a bundle of them (model)."""
    folder = tmp_path_factory.mktemp("messy")
    rows = ["image,caption,split,place"]
    for i in range(WHOLE):
        colour, split = [*COLOURS][i % 4], SPLITS[max(0, i % 5 - 2)]
        paint(folder / f"{i}.png", COLOURS[colour], i)
        rows += [f"{i}.png,{text},{split},{'ab'[i % 2]}" for text in (f"{colour} thing {i}", f"{i}: this is {colour}")]
    for at, split in enumerate(SPLITS):
        for kind, text in (("mute", ""), ("blank", '"   "'), ("long", LONG)):
            paint(folder / f"{kind}-{split}.png", (10 * at, 90, 50 * len(kind)), at)
            rows.append(f"{kind}-{split}.png,{text},{split},a")
        (folder / f"broken-{split}.png").write_bytes(b"no picture")
        rows += [f"broken-{split}.png,a broken {split},{split},b", f"lost-{split}.png,a lost {split},{split},b"]
        rows.append(f",a text without a picture {split},{split},b")
    (folder / "messy.csv").write_text("\n".join(rows) + "\n")
    torch.manual_seed(0)
    sees = image_encoder("timm:resnet18/8", size=32, small_stem=True)
    reads = encoder("bpe:tiny", column=Column("text", [[row.split(",")[1] for row in rows]]))
    Bundle({"image": Tower(sees)}).save(folder / "image" / "bundle")
    Bundle({"text": Tower(reads)}).save(folder / "text" / "bundle")
    heads = {"image": torch.nn.Linear(sees.dim, 8), "text": torch.nn.Linear(reads.dim, 8)}
    Bundle({"image": Tower(sees, heads["image"]), "text": Tower(reads, heads["text"])}).save(
        folder / "model" / "bundle"
    )
    return folder


def paint(path: Path, colour: tuple[int, int, int], seed: int) -> None:
    draw = np.random.default_rng(seed).normal(0, 20, (32, 32, 3))
    Image.fromarray(np.clip(draw + colour, 0, 255).astype(np.uint8)).save(path)


def told(capsys, *words: object) -> dict:
    assert main([*map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def reasons(skipped: list[dict]) -> dict[str, str]:
    return {each["id"]: each["reason"] for each in skipped}


LEFT_OUT = {
    "mute": "has no text",
    "blank": "has no text",
    "lost": "no such file",
    "broken": "not a picture",
    "": "has no image",
}
"""Why an item is left out, by how its name begins; one that is only a text is named by its row."""


def check_told(skipped: dict[str, str], splits: tuple[str, ...]) -> None:
    assert len(skipped) == len(LEFT_OUT) * len(splits)
    for name, reason in skipped.items():
        kind, _, split = name.removesuffix(".png").partition("-")
        assert LEFT_OUT[kind if split else ""] in reason and (not split or split in splits)


def test_align_learns_from_what_is_whole_and_names_the_rest(folder, tmp_path, capsys):
    towers = ["--towers", f"image=local:{folder / 'image'}", f"text=local:{folder / 'text'}"]
    small = ["--batch", 8, "--epochs", 1, "--dim", 8, "--hidden", 0, "--no-report"]
    done = told(capsys, "align", folder / "messy.csv", "--out", tmp_path / "run", *towers, *small)
    check_told(reasons(done["skipped"]), ("train", "val"))
    check_told(reasons(done["evaluation"]["skipped"]), ("test",))
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["items"] == sum(i % 5 < 3 for i in range(WHOLE)) + 1, "with the one whose text is long"


def test_what_is_measured_and_calibrated_says_what_it_lacks(folder, capsys):
    found = told(capsys, "evaluate", folder / "model", "--data", folder / "messy.csv")
    check_told(reasons(found["skipped"]), ("test",))
    assert found["paired"]["image_to_text"]["gallery"] == 2 * sum(i % 5 == 4 for i in range(WHOLE)) + 1
    check_told(
        reasons(told(capsys, "calibrate", folder / "model", "--data", folder / "messy.csv")["skipped"]), ("val",)
    )


def test_pairs_and_hard_negatives_are_of_what_is_whole(folder, tmp_path, capsys):
    whole = sum(i % 5 < 3 for i in range(WHOLE))
    found = told(capsys, "mine", folder / "messy.csv", "--model", folder / "model", "--out", tmp_path / "hard.csv")
    check_told(reasons(found["skipped"]), ("train",))
    towers = ["--towers", f"image=local:{folder / 'image'}", f"text=local:{folder / 'text'}"]
    few = ["--folds", 2, "--epochs", 1]
    found = told(capsys, "pairs", folder / "messy.csv", "--out", tmp_path / "audit", *towers, *few)
    check_told(reasons(found["skipped"]), ("train",))
    judged = (tmp_path / "audit" / "pairs.csv").read_text().splitlines()
    assert len(judged) == 1 + 2 * whole + 1 and sum(LONG.strip() in row for row in judged) == 1


def test_a_file_of_another_kind_is_refused_before_anything_is_mined(folder, tmp_path, capsys):
    words = ["mine", folder / "messy.csv", "--model", tmp_path / "no model", "--out", tmp_path / "hard.txt"]
    assert main([*map(str, words)]) == 2
    assert "written as .jsonl, .csv, .parquet" in capsys.readouterr().err


def test_an_index_has_all_pictures_that_can_be_seen_with_or_without_words(folder, tmp_path, capsys):
    table = tmp_path / "messy.csv"
    table.write_text((folder / "messy.csv").read_text())
    where = ["--images", folder, "--model", folder / "model", "--out", tmp_path / "index", "--texts", "none"]
    made = told(capsys, "index", table, *where)
    assert {reason.split()[0] for reason in reasons(made["skipped"]).values()} == {"no", "not", "has"}
    assert made["items"] == WHOLE + 9, "mute, blank and long ones are found by their looks"
    assert len(told(capsys, "search", tmp_path / "index", LONG)) == 10


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (",one\n,two\n", "has no image"),
        ("0.png,\n1.png,   \n", "text that is not blank"),
        ("0.png,one\n,two\n1.png,\n", "can be read on both sides; there must be two"),
    ],
)
def test_a_table_with_one_side_alone_is_refused_with_the_reason(rows, says, folder, tmp_path):
    table = tmp_path / "one.csv"
    table.write_text(f"image,caption\n{rows}")
    source = open_source(table, images=folder)
    towers = {"image": f"local:{folder / 'image'}", "text": f"local:{folder / 'text'}"}
    with pytest.raises(DataError, match=says):
        align(source, out=tmp_path / "run", towers=towers, quiet=True)
    with pytest.raises(DataError, match=says):
        audit_pairs(source, out=tmp_path / "audit", towers=towers, quiet=True)
    if "one" not in rows or rows.startswith(","):
        model = Bundle.load(folder / "model")
        with pytest.raises(DataError, match="no item with both image and text"):
            matched(model, source, ("image", "text"), quiet=True)
        with pytest.raises(DataError, match="no item with both image and text"):
            mine(source, model, quiet=True)
