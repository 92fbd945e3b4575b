"""Clips are the same however they are stored, are sampled by (seed, step) alone, and are trained and measured on."""

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from twofold import embed
from twofold.cli import main
from twofold.data import video
from twofold.data.cache import decoded_clips
from twofold.data.loader import Batches, Windows
from twofold.data.samples import DIRECTIONS, motion
from twofold.data.sources import Column, Source, open_source
from twofold.data.video import Sheet, watch, windows
from twofold.errors import DataError, DecodeError, UsageError
from twofold.models.bundle import Bundle
from twofold.models.encoders import encoder, image_encoder, inference, video_encoder
from twofold.models.predictor import Blocks
from twofold.models.tokens import ClipTokens, centred
from twofold.objectives import token_variance
from twofold.train.optim import Optimizer
from twofold.train.train import Setting, train

SIDE = 32


def clip(seed: int = 0, frames: int = 6) -> np.ndarray:
    """A soft blotch of colour that moves to the right, [t, h, w, 3]."""
    colour, start = np.random.default_rng(seed).random((2, 3))
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    times = np.arange(frames) / frames
    blots = [np.exp(-8 * ((x - (start[0] + time) % 1) ** 2 + (y - start[1]) ** 2)) for time in times]
    return np.round(np.stack(blots)[..., None] * colour * 255).astype(np.uint8)


def stored(frames: np.ndarray, kind: str = "matroska", codec: str = "ffv1", pixels: str = "bgr0") -> bytes:
    """A video file; as FFV1 in a Matroska it loses nothing."""
    out = io.BytesIO()
    with av.open(out, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=10)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixels
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format=pixels)))
        container.mux(stream.encode(None))
    return out.getvalue()


def gif(frames: np.ndarray) -> bytes:
    out = io.BytesIO()
    first, *others = (Image.fromarray(frame) for frame in frames)
    first.save(out, "GIF", save_all=True, append_images=others, duration=100)
    return out.getvalue()


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def sheet(frames: np.ndarray, rows: int) -> bytes:
    lines = np.split(frames, rows)
    return png(np.concatenate([np.concatenate(list(line), 1) for line in lines]))


def folder(path: Path, frames: np.ndarray, name: str = "{:03}.png") -> Path:
    path.mkdir(parents=True)
    for number, frame in enumerate(frames):
        (path / name.format(number)).write_bytes(png(frame))
    return path


# --- decoding ---------------------------------------------------------------------------------------------------------


def test_a_clip_is_the_same_as_file_folder_sheet_strip_and_array(tmp_path):
    frames = clip()
    (tmp_path / "strip.png").write_bytes(sheet(frames, 1))
    (tmp_path / "column.png").write_bytes(sheet(frames, 6))
    (tmp_path / "sheet.png").write_bytes(sheet(frames, 2))
    ways = [
        *(frames, stored(frames), folder(tmp_path / "frames", frames)),
        *(tmp_path / "strip.png", tmp_path / "column.png"),
        *(Sheet(tmp_path / "sheet.png", 2, 3), Sheet(sheet(frames, 3), 3, 2)),
    ]
    for way in ways:
        assert np.array_equal(watch(way, SIDE), frames), way
    many = clip(0, 12)
    assert np.array_equal(watch(folder(tmp_path / "many", many, "frame{}.png"), SIDE), many), "10 comes after 9"
    half = watch(frames, 16, channels=1)
    assert half.shape == (6, 16, 16, 1)


@pytest.mark.parametrize(
    ("kind", "codec", "pixels"),
    [("mp4", "libx264", "yuv420p"), ("webm", "libvpx-vp9", "yuv420p"), ("avi", "mpeg4", "yuv420p"), ("gif", "", "")],
)
def test_every_format_shows_the_same(kind, codec, pixels):
    frames = clip()
    seen = watch(gif(frames) if kind == "gif" else stored(frames, kind, codec, pixels), SIDE)
    assert seen.shape == frames.shape
    distance = np.abs(seen[:, None].astype(int) - frames.astype(int)).mean((2, 3, 4))
    assert (distance.argmin(1) == np.arange(6)).all() and np.diag(distance).max() < 8


def test_what_a_phone_filmed_upright_is_upright():
    """The file holds lying frames, and in its header a matrix that turns them by a quarter to the right."""
    frames = clip()
    content = bytearray(stored(frames, "mp4", "libx264", "yuv420p"))
    at = content.index(b"tkhd") + 4 + 40
    one = 1 << 16
    turn = [0, one, 0, -one & 0xFFFFFFFF, 0, 0, SIDE * one, 0, 1 << 30]
    content[at : at + 36] = b"".join(value.to_bytes(4, "big") for value in turn)
    plain = watch(stored(frames, "mp4", "libx264", "yuv420p"), SIDE)
    assert np.array_equal(watch(bytes(content), SIDE), np.rot90(plain, -1, (1, 2)))


def test_only_the_first_frames_of_what_is_long_are_decoded(monkeypatch):
    monkeypatch.setattr(video, "LONGEST", 4)
    assert np.array_equal(watch(stored(clip()), SIDE), clip()[:4])


@pytest.mark.parametrize(
    ("item", "told"),
    [
        (b"", "empty"),
        (b"no video at all", "not a video that can be decoded"),
        (stored(clip())[:200], "not a video that can be decoded|empty"),
        (stored(clip()[:1]), "one frame: a picture, not a clip"),
        (gif(clip()[:1]), "one frame"),
        (clip()[:1], "one frame"),
        (np.zeros((6, 32), np.uint8), r"shape \(6, 32\); clips are \[t, h, w, c\]"),
        (Sheet(sheet(clip(), 2), 3, 5), "64×96 pixels are not 3×5 frames"),
        (Sheet(b"", 1, 2), "empty"),
        (Path("gone.mp4"), "no such file"),
    ],
)
def test_what_is_no_clip_is_told_by_name(item, told):
    with pytest.raises(DecodeError, match=f"^clip7: .*({told})"):
        watch(item, SIDE, name="clip7")


def test_files_and_folders_that_hold_no_clip_are_told(tmp_path):
    (tmp_path / "square.png").write_bytes(png(clip()[0]))
    (tmp_path / "nothing").mkdir()
    mixed = folder(tmp_path / "mixed", clip())
    (mixed / "002.png").write_bytes(b"broken")
    cases = {"square.png": "a picture of 32×32, not a clip; .*video:4x4", "nothing": "a folder without frames"}
    for name, told in {**cases, "mixed": "not a picture"}.items():
        with pytest.raises(DecodeError, match=told):
            watch(tmp_path / name, SIDE)


# --- sampling ---------------------------------------------------------------------------------------------------------


def test_a_window_has_its_stride_wherever_the_clip_is_long_enough():
    at = np.linspace(0, 0.999, 50)
    for count in (2, 3, 8, 15, 16, 40):
        found = windows(np.full(50, count), 8, 2, at)
        assert found.min() == 0 and found.max() == count - 1, "any frame can be in it, and no other"
        steps = np.diff(found, axis=1)
        if count > 14:
            assert (steps == 2).all() and len(np.unique(found[:, 0])) == count - 14
        else:  # all of the clip, as evenly as whole frames allow
            assert (found == found[0]).all() and np.ptp(steps) <= 1 and (found[0, [0, -1]] == [0, count - 1]).all()
    assert windows(np.array([20]), 4, 3)[0].tolist() == [5, 8, 11, 14], "the middle"


def test_a_batch_of_windows_is_a_function_of_the_step():
    counts = [5, 9, 3, 12]
    rows = np.arange(sum(counts))[:, None, None, None].repeat(2, 3)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    columns = {"video": Windows(rows, offsets, frames=3, stride=2), "item": np.arange(4)}
    batches, again = (Batches(columns, batch=4, seed=1) for _ in range(2))
    starts: list[set[int]] = [set() for _ in counts]
    for step in range(60):
        batch = batches[step]
        assert torch.equal(batch["video"], again[step]["video"]) and batch["video"].shape == (4, 3, 1, 1, 2)
        for item, window in zip(batch["item"].tolist(), batch["video"][:, :, 0, 0, 0].tolist(), strict=True):
            inside = [row - offsets[item] for row in window]
            expected = [0, 1, 2] if counts[item] == 3 else [inside[0] + 2 * place for place in range(3)]
            assert inside == expected and inside[-1] < counts[item]
            starts[item].add(int(inside[0]))
    assert [len(found) for found in starts] == [1, 5, 1, 8]


def test_clips_of_any_length_are_decoded_once_and_broken_ones_are_skipped(tmp_path):
    cells = [stored(clip(0, 3)), b"broken", folder(tmp_path / "a", clip(1, 5)), clip(2, 4)]
    source = Source("s", [*"abcd"], columns={"video": Column("video", cells)})
    found = decoded_clips(source, "video", SIDE)
    assert found.kept.tolist() == [0, 2, 3] and found.offsets.tolist() == [0, 3, 8, 12]
    assert found.skipped[0].id == "b" and "not a video" in found.skipped[0].reason
    assert np.array_equal(found.frames[3:8], clip(1, 5).transpose(0, 3, 1, 2))
    again = decoded_clips(source, "video", SIDE, progress=lambda *_: pytest.fail("decoded again"))
    assert np.array_equal(again.frames, found.frames) and again.skipped == found.skipped
    with pytest.raises(DecodeError, match="b: not a video"):
        decoded_clips(source, "video", SIDE, on_error="raise")
    with pytest.raises(DataError, match="None of the 1 clips of s"):
        decoded_clips(source.take([1]), "video", SIDE)


# --- sources ----------------------------------------------------------------------------------------------------------


def test_equal_clips_have_equal_keys(tmp_path):
    one, two = folder(tmp_path / "a", clip(0)), folder(tmp_path / "b", clip(0), "frame{}.png")
    backwards = folder(tmp_path / "c", clip(0)[::-1])
    (tmp_path / "sheet.png").write_bytes(sheet(clip(0), 2))
    picture = tmp_path / "sheet.png"
    cells = [one, two, backwards, Sheet(picture, 2, 3), Sheet(picture.read_bytes(), 2, 3), Sheet(picture, 3, 2), b"x"]
    keys = Source("s", [*"abcdefg"], columns={"v": Column("video", cells)}).keys("v")
    assert keys[0] == keys[1] and keys[3] != keys[5] and len(set(keys)) == 6 - (keys[3] == keys[4])


def test_a_manifest_says_how_its_sheets_are_divided(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(sheet(clip(ord(name)), 2))
    (tmp_path / "clips.csv").write_text("file,label,split\na.png,run,train\nb.png,walk,test\n,walk,test\n")
    source = open_source(tmp_path / "clips.csv", columns={"file": "video:2x3"})
    assert source.modalities == {"file": "video"} and source.only("video") == "file"
    assert source.column("file").cells == [Sheet(tmp_path / "a.png", 2, 3), Sheet(tmp_path / "b.png", 2, 3), b""]
    assert source.classes == ("run", "walk")
    with pytest.raises(UsageError, match="kind of column"):
        open_source(tmp_path / "clips.csv", columns={"file": "video:2"})
    with pytest.raises(DataError, match=r"no modality 'video': its modalities are image \(image\)"):
        open_source(tmp_path / "clips.csv").only("video")


@pytest.mark.parametrize("name", ["video", "clip"])
def test_a_column_of_videos_is_known_by_its_name(tmp_path, name):
    (tmp_path / "a.mp4").write_bytes(b"a")
    source = open_source(_written(tmp_path / "m.csv", f"{name},caption\na.mp4,runs\n"))
    assert open_source(_written(tmp_path / "p.csv", "path\na.mp4\n")).modalities == {"video": "video"}
    assert source.modalities == {"text": "text", "video": "video"} and source.ids == ["a.mp4"]
    words = open_source(_written(tmp_path / "w.csv", f"id,caption,{name}\n1,runs,an example\n"))
    assert words.modalities == {"text": "text"} and words.meta == {name: ["an example"]}


def _written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_folders_of_videos_of_frames_and_of_sheets_open(tmp_path):
    for name in ("train/run/1.mp4", "train/walk/2.webm", "test/run/3.mp4"):
        kind = ("webm", "libvpx-vp9") if name.endswith("webm") else ("mp4", "libx264")
        (tmp_path / "files" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "files" / name).write_bytes(stored(clip(), *kind, "yuv420p"))
    files = open_source(tmp_path / "files")
    assert files.modalities == {"video": "video"} and files.ids == [
        "test/run/3.mp4",
        "train/run/1.mp4",
        "train/walk/2.webm",
    ]
    assert files.classes == ("run", "walk") and files.splits == ["test", "train", "train"]

    folder(tmp_path / "frames/run/a", clip())
    folder(tmp_path / "frames/walk/b", clip())
    (tmp_path / "frames/walk/c.gif").write_bytes(gif(clip()))
    frames = open_source(tmp_path / "frames", columns={"video": "video"})
    assert frames.ids == ["run/a", "walk/b", "walk/c.gif"] and frames.labels.tolist() == [0, 1, 1]
    assert all(watch(cell, SIDE).shape == (6, SIDE, SIDE, 3) for cell in frames.column("video").cells)
    sheets = open_source(tmp_path / "frames", columns={"video": "video:1x2"})
    assert sheets.column("video").cells[0] == Sheet(tmp_path / "frames/run/a/000.png", 1, 2)


# --- the sample -------------------------------------------------------------------------------------------------------


def test_what_drifts_drifts_as_its_label_says():
    source = motion(32, 8)
    assert source.classes == DIRECTIONS and len(source) == 40
    assert all(
        np.array_equal(a, b) for a, b in zip(*(motion(32, 8).column("video").cells for _ in range(2)), strict=True)
    )
    compass = {"north": (-1, 0), "south": (1, 0), "west": (0, -1), "east": (0, 1)}
    for frames, label, speed in zip(source.column("video").cells, source.labels, source.meta["speed"], strict=True):
        still = np.median(frames, 0)
        seen = [np.abs(frame - still).sum(2) for frame in (frames[0], frames[4])]
        overlap = {
            (down, right): (np.roll(seen[0], (down, right), (0, 1)) * seen[1]).sum()
            for down in range(-9, 10)
            for right in range(-9, 10)
        }
        parts = [shift for word, shift in compass.items() if word in DIRECTIONS[label]]
        way = np.sum(parts, 0) / np.linalg.norm(np.sum(parts, 0)) * 4 * speed
        assert np.abs(np.array(max(overlap, key=overlap.get)) - way).max() <= 2, (DIRECTIONS[label], speed)


# --- encoders ---------------------------------------------------------------------------------------------------------


def tubelets() -> object:
    torch.manual_seed(0)
    picture = image_encoder("timm:vit_tiny_patch16_224/8x16x1", size=SIDE)
    return video_encoder(picture, frames=4, stride=1)


def test_a_clip_has_the_same_features_whatever_it_is_embedded_with_and_from_a_bundle(tmp_path):
    model = tubelets()
    source = Source("s", [*"abc"], columns={"film": Column("video", [clip(0), stored(clip(1, 9)), b"no"])})
    done = embed(model, source, "film", quiet=True)
    assert done.ids == ["a", "b"] and done.skipped[0].id == "c"
    Bundle({"video": model}, {}).save(tmp_path / "b")
    again = Bundle.load(tmp_path / "b")
    assert again.fingerprint == Bundle({"video": model}).fingerprint
    for item, row in zip((clip(0), stored(clip(1, 9))), done.matrix, strict=True):
        alone = again.encode([item], modality="video", normalize_embeddings=False)[0]
        np.testing.assert_allclose(alone, row, rtol=1e-4, atol=1e-5)
    assert again.encode([clip(0)]).shape == (1, 16), "frames go to the tower that watches"


def test_frames_by_themselves_have_no_order_and_tubelets_have():
    torch.manual_seed(0)
    single = video_encoder(
        image_encoder("timm:resnet10t", size=SIDE, pretrained=False), frames=4, stride=1, tubelet=None
    )
    for model, ordered in ((tubelets(), True), (single, False)):
        x = model.inputs([clip(0, 4)])
        with inference(model):
            assert torch.allclose(model(x), model(x.flip(1)), atol=1e-5) is not ordered


def test_without_what_positions_have_in_common_tokens_differ_from_the_start():
    """V-JEPA follows an encoder that begins untrained: where all of its tokens are alike, so they stay."""
    x = torch.from_numpy(np.stack(motion(8, 8, frames=8).column("video").cells)).permute(0, 1, 4, 2, 3) / 255
    found = []
    for change in (lambda picture: picture, centred):
        torch.manual_seed(0)
        picture = change(image_encoder("timm:vit_tiny_patch16_224/8x64x2", size=SIDE))
        found.append(token_variance(ClipTokens(picture, frames=8)(x)).item())
    assert found[0] < 0.1 < 0.4 < found[1]


def test_names_of_video_encoders(tmp_path):
    named = encoder("video:timm:vit_tiny_patch16_224/8x16x1@untrained")
    assert (named.kind, named.frames, named.stride, named.spec["tubelet"]) == ("video", 16, 4, 2)
    assert encoder("frames:efficientnet-lite0").kind == "video"
    torch.manual_seed(0)
    picture = image_encoder("timm:vit_tiny_patch16_224/8x16x1", size=SIDE)
    Bundle({"image": picture}).save(tmp_path / "p")
    start = encoder(f"video:local:{tmp_path / 'p'}")
    assert torch.equal(start.tokens.blocks[0].attn.qkv.weight, picture.body.blocks[0].attn.qkv.weight)
    with pytest.raises(UsageError, match="plain vision transformer"):
        encoder("video:efficientnet-lite0")
    with pytest.raises(UsageError, match="two frames or more"):
        video_encoder(picture, frames=1, tubelet=None)


def test_what_the_page_shows_runs(tmp_path, monkeypatch, capsys):
    page = Path(__file__).parents[1] / "docs" / "how-to" / "video.md"
    (tmp_path / "clips").mkdir()
    for name in "ab":
        (tmp_path / f"clips/{name}.png").write_bytes(sheet(clip(ord(name), 16), 4))
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(block, names)
    assert "{'video': 'video'}" in capsys.readouterr().out
    assert names["still"].matrix.shape == (2, 1280)


# --- the command line -------------------------------------------------------------------------------------------------


def test_vjepa_trains_on_a_folder_of_clips_and_is_evaluated(tmp_path, capsys):
    for split, count in (("train", 6), ("test", 3)):
        for label in ("right", "left"):
            (tmp_path / "clips" / split / label).mkdir(parents=True)
            for seed in range(count):
                frames = clip(seed + 10 * (split == "test"))
                way = frames if label == "right" else frames[::-1]
                (tmp_path / "clips" / split / label / f"{seed}.mkv").write_bytes(stored(way))
    (tmp_path / "clips/train/left/cut.mkv").write_bytes(b"cut off")
    small = "--encoder timm:vit_tiny_patch16_224/8x16x1 --size 32 --frames 4 --stride 1 --batch 6 --epochs 2"
    heads = "--predictor.depth 1 --predictor.width 16 --predictor.heads 1"
    command = [
        "train",
        "vjepa",
        str(tmp_path / "clips"),
        "--out",
        str(tmp_path / "run"),
        *small.split(),
        *heads.split(),
    ]
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 4
    measure = ["evaluate", str(tmp_path / "run"), "--data", str(tmp_path / "clips"), "--attentive"]
    assert main([*measure, "--json"]) == 0
    labels = json.loads(capsys.readouterr().out)["labels"]
    assert labels.keys() == {"trained", "untrained", "pixels", "colours"} and labels["pixels"]["attentive"] is None
    assert labels["trained"]["attentive"]["chance"] == 0.5
    assert main(["train", "vjepa", "openmoji", "--out", str(tmp_path / "no"), *small.split()]) != 0
    assert "no modality 'video'" in capsys.readouterr().err


def test_a_run_of_clips_starts_from_what_a_run_of_pictures_has_learned(tmp_path):
    torch.manual_seed(0)
    learned = image_encoder("timm:vit_tiny_patch16_224/8x16x1", size=SIDE)
    Bundle({"image": learned}).save(tmp_path / "pictures" / "bundle")
    source = Source("s", [*"abcd"], columns={"video": Column("video", [clip(seed) for seed in range(4)])})
    setting = Setting(encoder=f"run:{tmp_path / 'pictures'}", batch=4, epochs=1)
    options = {"frames": 4, "stride": 1, "predictor": Blocks(1, 16, 1)}
    still = Optimizer(lr=1e-9, weight_decay=0.0)
    train("vjepa", source, out=tmp_path / "run", setting=setting, optimizer=still, options=options, quiet=True)
    tokens = Bundle.load(tmp_path / "run").towers["video"].encoder.tokens
    torch.testing.assert_close(tokens.blocks[0].attn.qkv.weight, learned.body.blocks[0].attn.qkv.weight)
    with pytest.raises(UsageError, match="3 channels of 32 pixels a side: leave --size out"):
        train("vjepa", source, out=tmp_path / "no", setting=replace(setting, size=64), options=options, quiet=True)
