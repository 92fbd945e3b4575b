"""Vectors on disk: what was appended is there for good, and nothing that is damaged is believed."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from twofold.data.vectors import Vectors
from twofold.errors import StoreError, UsageError


def rows(keys, dim=4):
    """A vector for each key that can be told from its key."""
    return np.stack([np.full(dim, int(key[1:]), np.float32) for key in keys])


def names(start, stop):
    return [f"k{number}" for number in range(start, stop)]


def test_what_is_appended_is_there_when_opened_again(tmp_path):
    vectors = Vectors(tmp_path, "abc", 4)
    assert len(vectors) == 0 and not tmp_path.joinpath("abc").exists()
    vectors.append(names(0, 5), rows(names(0, 5)))
    vectors.append(names(5, 8), rows(names(5, 8)))
    for each in (vectors, Vectors(tmp_path, "abc", 4)):
        assert len(each) == 8 and "k7" in each and "k8" not in each
        order = ["k7", "k0", "k5", "k7"]
        got = each.get(order)
        assert got.dtype == np.float32 and np.array_equal(got, rows(order))
        assert sorted(each.keys()) == names(0, 8)
    assert vectors.get([]).shape == (0, 4)


def test_missing_says_where_and_once():
    vectors = Vectors("unused", "abc", 4)
    assert vectors.missing(["a", "b", "a"]) == [0, 1]


def test_appending_twice_keeps_the_first_and_writes_nothing(tmp_path):
    vectors = Vectors(tmp_path, "abc", 4)
    vectors.append(["k1", "k2", "k1"], rows(["k1", "k2", "k3"]))
    before = list(tmp_path.rglob("*"))
    vectors.append(["k1"], rows(["k9"]))
    vectors.append([], np.empty((0, 4)))
    assert np.array_equal(vectors.get(["k1", "k2"]), rows(["k1", "k2"])) and list(tmp_path.rglob("*")) == before


def test_encoders_do_not_meet(tmp_path):
    Vectors(tmp_path, "abc", 4).append(["k1"], rows(["k1"]))
    assert "k1" not in Vectors(tmp_path, "abd", 4)
    with pytest.raises(StoreError, match="holds vectors of 4 numbers, this encoder makes 8"):
        Vectors(tmp_path, "abc", 8)
    with pytest.raises(UsageError, match="no fingerprint"):
        Vectors(tmp_path, "../abc", 4)


def test_vectors_that_cannot_be_right_are_refused(tmp_path):
    vectors = Vectors(tmp_path, "abc", 4)
    with pytest.raises(StoreError, match=r"2 keys came with vectors of shape \(1, 4\)"):
        vectors.append(["k1", "k2"], rows(["k1"]))
    with pytest.raises(StoreError, match="k2 is not finite"):
        vectors.append(["k1", "k2"], np.stack([np.ones(4), np.full(4, np.nan)]))
    with pytest.raises(StoreError, match="no vector for 1 of 1 keys, for instance k5"):
        vectors.get(["k5"])
    assert len(vectors) == 0


@pytest.mark.parametrize("damage", ["cut", "one bit", "empty", "other bytes"])
def test_a_damaged_file_is_named_and_moved_aside_and_its_keys_are_missing(tmp_path, damage):
    vectors = Vectors(tmp_path, "abc", 4)
    vectors.append(names(0, 3), rows(names(0, 3)))
    (path,) = (tmp_path / "abc").glob("*.arrow")
    vectors.append(names(3, 6), rows(names(3, 6)))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()  # the open map keeps the old file
    path.write_bytes({"cut": data[:100], "one bit": data, "empty": b"", "other bytes": b"x" * 500}[damage])
    with pytest.warns(UserWarning, match=rf"{path.name} is damaged.*moved to"):
        again = Vectors(tmp_path, "abc", 4)
    assert path.with_name(path.name + ".damaged").exists() and not path.exists()
    assert again.missing(names(0, 6)) == [0, 1, 2]
    again.append(names(0, 3), rows(names(0, 3)))
    assert np.array_equal(Vectors(tmp_path, "abc", 4).get(names(0, 6)), rows(names(0, 6)))


def test_compacting_changes_the_files_only(tmp_path):
    vectors = Vectors(tmp_path, "abc", 4)
    for number in range(5):
        vectors.append([f"k{number}"], rows([f"k{number}"]))
    reader = Vectors(tmp_path, "abc", 4)
    vectors.compact()
    assert len(list((tmp_path / "abc").iterdir())) == 1
    for each in (vectors, reader, Vectors(tmp_path, "abc", 4)):
        assert np.array_equal(each.get(names(0, 5)), rows(names(0, 5))) and each.missing(names(0, 6)) == [5]


WRITE = """
import sys
from pathlib import Path
import numpy as np
from twofold.data.vectors import Vectors

folder, start, stop = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
vectors = Vectors(folder, "abc", 4)
for number in range(start, stop):
    vectors.append([f"k{number}"], np.full((1, 4), number, np.float32))
    print(number, flush=True)
"""


def writer(folder, start, stop):
    command = [sys.executable, "-c", WRITE, str(folder), str(start), str(stop)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_two_processes_may_append_at_once(tmp_path):
    here = Vectors(tmp_path, "abc", 4)
    both = [writer(tmp_path, 0, 30), writer(tmp_path, 20, 50)]
    assert all(process.communicate(timeout=90) and process.returncode == 0 for process in both)
    assert here.missing(names(0, 51)) == [50]
    assert np.array_equal(here.get(names(0, 50)), rows(names(0, 50)))


def test_what_was_acknowledged_survives_a_kill(tmp_path):
    process = writer(tmp_path, 0, 100_000)
    said = [int(process.stdout.readline()) for _ in range(20)]
    os.kill(process.pid, signal.SIGKILL)
    said += [int(line) for line in process.communicate(timeout=90)[0].split("\n") if line]
    vectors = Vectors(tmp_path, "abc", 4)
    keys = [f"k{number}" for number in said]
    assert vectors.missing(keys) == [] and np.array_equal(vectors.get(keys), rows(keys))
    assert not list((tmp_path / "abc").glob("*.damaged"))


def test_what_a_killed_process_left_half_written_is_swept_up_later(tmp_path):
    Vectors(tmp_path, "abc", 4).append(["k1"], rows(["k1"]))
    for name, age in (("old", 7200), ("new", 0)):
        path = tmp_path / "abc" / f".{name}.arrow.1234.tmp"
        path.write_bytes(b"half")
        os.utime(path, (time.time() - age,) * 2)
    assert len(Vectors(tmp_path, "abc", 4)) == 1
    assert [path.name for path in (tmp_path / "abc").glob(".*")] == [".new.arrow.1234.tmp"]
