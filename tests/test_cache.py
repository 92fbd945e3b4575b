"""The cache of decoded pictures: built once, by one process, whole or not at all."""

import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from twofold.data.cache import decoded
from twofold.data.decode import Skipped, decode, fit
from twofold.data.sources import Source, open_source
from twofold.errors import DataError, DecodeError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TWOFOLD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def source_of(*images, name="test"):
    return Source(name, [f"item {index}" for index in range(len(images))], images=images)


def noise(seed, *shape, dtype=np.uint8):
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape or (12, 10, 3), dtype)


def calls():
    seen = []
    return seen, lambda done, total: seen.append((done, total))


def test_it_holds_what_decoding_gives_and_decodes_once():
    source = source_of(*(noise(seed) for seed in range(5)))
    seen, progress = calls()
    got = decoded(source, 8, progress=progress)
    expected = np.stack([fit(decode(image), 8).transpose(2, 0, 1) for image in source.images])
    assert np.array_equal(got.pixels, expected) and got.pixels.dtype == np.uint8
    assert got.kept.tolist() == list(range(5)) and got.skipped == []
    assert seen == [(done, 5) for done in range(1, 6)]
    again = decoded(source_of(*source.images, name="other"), 8, progress=lambda *_: pytest.fail("decoded twice"))
    assert np.array_equal(again.pixels, expected) and not again.pixels.flags.writeable


@pytest.mark.parametrize(
    "change", [{"size": 4}, {"how": "pad"}, {"channels": 1}, {"images": [noise(1), noise(0)]}, {"images": [noise(0)]}]
)
def test_other_pictures_order_size_fit_or_channels_are_other_entries(change):
    images = [noise(0), noise(1)]
    decoded(source_of(*images), 8)
    seen, progress = calls()
    change = {"size": 8, "images": images} | change
    decoded(source_of(*change.pop("images")), change.pop("size"), **change, progress=progress)
    assert seen


def test_what_cannot_be_decoded_is_skipped_and_named_or_raised():
    source = source_of(noise(0), b"", noise(1), b"no picture")
    for _ in range(2):  # built, then found
        got = decoded(source, 8)
        assert got.kept.tolist() == [0, 2] and got.pixels.shape == (2, 3, 8, 8)
        assert got.skipped[0] == Skipped("item 1", "empty") and got.skipped[1].id == "item 3"
        assert np.array_equal(got.pixels[1], fit(noise(1), 8).transpose(2, 0, 1))
    with pytest.raises(DecodeError, match="item 1: empty"):
        decoded(source, 8, on_error="raise")


def test_a_failed_build_leaves_nothing_behind(cache):
    with pytest.raises(DecodeError, match="item 1: empty"):
        decoded(source_of(noise(0), b""), 8, on_error="raise")
    with pytest.raises(DataError, match="None of the 2 pictures of test could be used: item 0: empty"):
        decoded(source_of(b"", b""), 8)
    assert [path.suffix for path in (cache / "pixels").iterdir()] == [".lock", ".lock"]
    with pytest.raises(DataError, match="test has no images"):
        decoded(Source("test", ["a"], texts=[["b"]]), 8)


def test_where_depths_meet_all_get_the_deepest():
    small, deep = noise(0, 8, 8, 3), noise(1, 8, 8, 3, dtype=np.uint16)
    got = decoded(source_of(small, small, deep, small), 8)
    assert got.pixels.dtype == np.uint16
    expected = [small * np.uint16(257), small * np.uint16(257), deep, small * np.uint16(257)]
    assert np.array_equal(got.pixels.transpose(0, 2, 3, 1), expected)
    fine = np.random.default_rng(2).random((8, 8, 3), np.float32)
    got = decoded(source_of(deep, small, fine), 8).pixels.transpose(0, 2, 3, 1)
    assert got.dtype == np.float32
    assert np.allclose(got, [deep / 65535, small / 255, fine], atol=1e-7)


def test_of_mixed_channels_the_odd_ones_are_skipped_unless_a_number_is_given():
    source = source_of(noise(0, 8, 8, 5), noise(1, 8, 8, 3), b"", noise(2, 8, 8, 5))
    got = decoded(source, 8, channels=None)
    assert got.kept.tolist() == [0, 3]
    assert got.skipped == [
        Skipped("item 1", "has 3 channels, the pictures before it 5"),
        Skipped("item 2", "empty"),
    ]


@pytest.mark.parametrize("damage", ["pixels cut", "about cut", "about gone", "pixels gone"])
def test_a_damaged_entry_is_built_again(cache, damage):
    source = source_of(noise(0), noise(1))
    before = np.array(decoded(source, 8).pixels)
    (entry,) = (path for path in (cache / "pixels").iterdir() if path.is_dir())
    name, what = damage.split()
    path = entry / {"pixels": "pixels", "about": "about.json"}[name]
    if what == "cut":
        path.write_bytes(path.read_bytes()[:20])
    else:
        path.unlink()
    assert np.array_equal(decoded(source, 8).pixels, before)


def test_a_folder_of_files_is_found_again_after_it_moved(tmp_path):
    for seed in range(3):
        (tmp_path / "a").mkdir(exist_ok=True)
        np.save(tmp_path / "a" / f"{seed}.npy", noise(seed))
    before = decoded(open_source(tmp_path / "a"), 8).pixels
    shutil.move(tmp_path / "a", tmp_path / "b")
    after = decoded(open_source(tmp_path / "b"), 8, progress=lambda *_: pytest.fail("decoded twice")).pixels
    assert np.array_equal(before, after)


def test_no_room_on_the_disk_says_where_to_make_some(monkeypatch):
    monkeypatch.setattr("twofold.data.cache.os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(DataError, match=r"No space left.*TWOFOLD_CACHE"):
        decoded(source_of(noise(0)), 8)


BUILD = """
import sys, time
from pathlib import Path
from twofold.data.cache import decoded
from twofold.data.sources import open_source

folder, me, pause = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
source = open_source(folder / "pictures.npy")
done = []

def progress(count, total):
    done.append(count)
    (folder / f"{me}.at").write_text(str(count))
    time.sleep(pause)

(folder / f"{me}.ready").touch()
while not (folder / "go").exists():
    time.sleep(0.005)
pixels = decoded(source, 8, progress=progress).pixels
print(len(done), int(pixels.astype("int64").sum()))
"""


def started(folder, me, pause):
    command = [sys.executable, "-c", BUILD, str(folder), me, str(pause)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def wait_for(condition, process, seconds=90):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)


def test_two_processes_at_once_build_once_and_agree(tmp_path):
    pictures = noise(0, 40, 9, 9, 3)
    np.save(tmp_path / "pictures.npy", pictures)
    both = [started(tmp_path, me, 0.02) for me in ("one", "two")]
    for me, process in zip(("one", "two"), both, strict=True):
        wait_for((tmp_path / f"{me}.ready").exists, process)
    (tmp_path / "go").touch()
    outputs = [process.communicate(timeout=90)[0].split() for process in both]
    assert sorted(int(built) for built, _ in outputs) == [0, 40]
    expected = sum(int(fit(picture, 8).astype(np.int64).sum()) for picture in pictures)
    assert [int(total) for _, total in outputs] == [expected, expected]


def test_a_build_that_is_killed_is_not_taken_for_complete(tmp_path, cache):
    pictures = noise(0, 40, 9, 9, 3)
    np.save(tmp_path / "pictures.npy", pictures)
    (tmp_path / "go").touch()
    process = started(tmp_path, "one", 0.05)
    at = tmp_path / "one.at"
    wait_for(lambda: at.exists() and at.read_text() not in ("", "1", "2", "3"), process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=90)
    assert process.returncode == -signal.SIGKILL
    left = [path.suffix for path in (cache / "pixels").iterdir()]
    assert sorted(left) == [".lock", ".partial"]
    seen, progress = calls()
    got = decoded(open_source(tmp_path / "pictures.npy"), 8, progress=progress)
    assert len(seen) == 40
    assert np.array_equal(got.pixels, np.stack([fit(picture, 8).transpose(2, 0, 1) for picture in pictures]))
    assert not list((cache / "pixels").glob("*.partial"))
