"""Every way to store a data set opens as the same kind of items."""

import io
import json
import os
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from twofold.data import sources
from twofold.data.decode import decode
from twofold.data.sources import Column, Source, content_key, open_source
from twofold.errors import DataError, UsageError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TWOFOLD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (value, value, value)).save(file, "PNG")
    return file.getvalue()


def write(folder, *names):
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number))
    return folder


@pytest.fixture
def photos(tmp_path):
    return write(tmp_path / "photos", "a.png", "b.png", "images/c.png")


def csv(folder, text, name="captions.csv", encoding="utf-8"):
    (folder / name).write_bytes(text.encode(encoding))
    return folder / name


# -- Folders --


def test_subfolders_are_labels(tmp_path):
    folder = write(tmp_path / "set", "dog/1.png", "cat/2.JPG", "cat/deep/3.webp", "4.png", "notes.txt", ".trash/5.png")
    source = open_source(folder)
    assert source.ids == ["4.png", "cat/2.JPG", "cat/deep/3.webp", "dog/1.png"]
    assert source.classes == ("cat", "dog")
    assert source.labels.tolist() == [-1, 0, 0, 1]
    assert source.splits is source.texts is None


def test_folders_named_after_splits_are_splits(tmp_path):
    folder = write(tmp_path / "set", "train/cat/1.png", "train/dog/2.png", "validation/dog/3.png", "test/4.png")
    source = open_source(folder)
    assert source.splits == ["test", "train", "train", "val"]
    assert source.classes == ("cat", "dog") and source.labels.tolist() == [-1, 0, 1, 1]
    assert source.split("dev").ids == source.split("val").ids == ["validation/dog/3.png"]
    with pytest.raises(DataError, match=r"no split 'extra'\. Its splits: test, train, val"):
        source.split("extra")


def test_a_flat_folder_has_no_labels_and_an_empty_one_says_what_it_wants(tmp_path):
    source = open_source(write(tmp_path / "flat", "1.png", "2.png"))
    assert source.labels is None and source.classes == ()
    with pytest.raises(DataError, match="has no splits"):
        source.split("train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no pictures.*train\.csv"):
        open_source(tmp_path / "empty")


def test_links_that_go_in_circles_end(tmp_path):
    folder = write(tmp_path / "set", "a/1.png")
    (folder / "a" / "back").symlink_to(folder)
    (folder / "b").symlink_to(write(tmp_path / "elsewhere", "2.png"))
    assert open_source(folder).ids == ["a/1.png", "b/2.png"]


def test_a_name_that_is_not_utf8_still_has_a_printable_id(tmp_path):
    write(tmp_path, "caf\udce9.png")
    source = open_source(tmp_path)
    assert source.ids == ["caf\\udce9.png"]
    assert source.ids[0].encode("utf-8") and decode(source.images[0]).shape == (4, 4, 3)
    assert len(source.keys()[0]) == 32


# -- Manifests --


def test_rows_that_share_their_picture_are_one_item(photos):
    path = csv(
        photos, "filename,caption,split,light\na.png,one,train,day\nb.png,two,val,night\na.png,three,train,day\n"
    )
    source = open_source(path)
    assert source.ids == ["a.png", "b.png"]
    assert source.texts == [["one", "three"], ["two"]]
    assert source.splits == ["train", "val"] and source.meta == {"light": ["day", "night"]}
    assert source.images == [photos / "a.png", photos / "b.png"]


def test_pictures_are_found_beside_the_manifest_in_images_or_where_told(photos, tmp_path):
    path = csv(photos, "image,text\na.png,x\nc.png,y\ngone.png,z\n")
    assert open_source(path).images == [photos / "a.png", photos / "images/c.png", photos / "gone.png"]
    elsewhere = write(tmp_path / "elsewhere", "a.png")
    assert open_source(path, images=elsewhere).images[0] == elsewhere / "a.png"
    with pytest.raises(DataError, match="none of its 3 pictures exist"):
        open_source(csv(tmp_path / "elsewhere", "image\nq.png\nr.png\ns.png\n"))
    with pytest.raises(DataError, match="There is no folder"):
        open_source(path, images=tmp_path / "nowhere")
    with pytest.raises(UsageError, match="goes with a manifest"):
        open_source(photos, images=elsewhere)


def test_all_manifest_formats_say_the_same(photos):
    rows = [
        {"image": "a.png", "caption": "Grün, und rot", "label": "x", "id": "1", "note": "n"},
        {"image": "b.png", "caption": "two", "label": "y", "id": "2", "note": None},
    ]
    (photos / "m.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", "utf-8")
    pq.write_table(pa.Table.from_pylist(rows), photos / "m.parquet")
    csv(photos, 'image,caption,label,id,note\na.png,"Grün, und rot",x,1,n\nb.png,two,y,2,\n', "m.csv")
    csv(photos, "image\tcaption\tlabel\tid\tnote\na.png\tGrün, und rot\tx\t1\tn\nb.png\ttwo\ty\t2\t\n", "m.tsv")
    csv(photos, "image;caption;label;id;note\r\na.png;Grün, und rot;x;1;n\r\nb.png;two;y;2;\r\n", "semicolon.csv")
    for name in ("m.jsonl", "m.parquet", "m.csv", "m.tsv", "semicolon.csv"):
        source = open_source(photos / name)
        assert (source.ids, source.classes, source.labels.tolist()) == (["1", "2"], ("x", "y"), [0, 1]), name
        assert source.texts == [["Grün, und rot"], ["two"]], name


def test_lists_of_captions_and_embedded_pictures_open(tmp_path):
    rows = [
        {"image": {"bytes": png(1), "path": None}, "captions": ["a", "b"]},
        {"image": {"bytes": png(2), "path": None}, "captions": []},
        {"image": {"bytes": png(1), "path": None}, "captions": ["c"]},
        {"image": None, "captions": ["d"]},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "m.parquet")
    source = open_source(tmp_path / "m.parquet")
    assert source.texts == [["a", "b", "c"], [], ["d"]]
    assert source.images == [png(1), png(2), b""]


def test_equal_bytes_without_texts_stay_separate_items(tmp_path):
    pq.write_table(pa.table({"image": [png(1), png(1)], "label": [0, 1]}), tmp_path / "m.parquet")
    assert len(open_source(tmp_path / "m.parquet")) == 2


def test_texts_alone_are_a_source(tmp_path):
    source = open_source(csv(tmp_path, "text,kind\nhello,a\nhello,b\n"))
    assert source.images is None and source.texts == [["hello"], ["hello"]]
    with pytest.raises(DataError, match="has no images"):
        source.keys("image")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,image,text\n1,a.png,x\n1,b.png,y\n", "rows 1 and 2 are both '1' but differ in image"),
        ("image,label\na.png,cat\na.png,dog\n", "rows 1 and 2 are both 'a.png' but differ in label"),
        ("image,split\na.png,train\na.png,test\n", "differ in split"),
        ("id,image\n1,a.png\n,b.png\n", "row 2 has no id"),
        ("image,text\na.png,one, two\n", "line 2 has 3 fields, its header has 2"),
        ("image,image\na.png,b.png\n", "names a column twice"),
        ("colour,shape\nred,round\n", "neither pictures nor texts: its columns are colour, shape"),
        ("image,text\n", "has no rows"),
        ("", "is empty"),
    ],
)
def test_a_manifest_that_contradicts_itself_says_where(photos, text, message):
    with pytest.raises(DataError, match=message):
        open_source(csv(photos, text))


def test_byte_order_marks_are_no_part_of_the_first_column(photos):
    text = "image,caption\na.png,Käse\n"
    for encoding in ("utf-8-sig", "utf-16"):
        assert open_source(csv(photos, text, encoding=encoding)).texts == [["Käse"]]


def test_a_manifest_that_is_not_utf8_says_the_line_and_how_to_convert(photos):
    with pytest.raises(DataError, match=r"captions\.csv line 3 is not UTF-8 \(byte 0xe4\).*iconv"):
        open_source(csv(photos, "image,caption\na.png,x\nb.png,Käse\n", encoding="latin-1"))
    with pytest.raises(DataError, match=r"m\.jsonl line 2 is not JSON"):
        open_source(csv(photos, '{"image": "a.png"}\n{"image": \n', "m.jsonl"))
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        open_source(csv(photos, "PAR1 and no more", "m.parquet"))


def test_numbers_stay_what_they_are_as_labels(photos):
    labels = open_source(csv(photos, "image,label\na.png,3\nb.png,\nimages/c.png,1\n"))
    assert labels.labels.tolist() == [3, -1, 1] and labels.classes == ("0", "1", "2", "3")
    words = open_source(csv(photos, "image,label\na.png,3\nb.png,-1\nimages/c.png,dog\n"))
    assert words.labels.tolist() == [0, -1, 1] and words.classes == ("3", "dog")
    far = open_source(csv(photos, "image,label\na.png,1000000\nb.png,7\nimages/c.png,7\n"))
    assert far.labels.tolist() == [1, 0, 0] and far.classes == ("7", "1000000")
    assert open_source(csv(photos, "image,label\na.png,\nb.png,\n")).labels is None


def test_class_names_come_from_the_schema_or_from_classes_json(tmp_path):
    table = pa.table({"image": [png(1), png(2)], "label": [1, 0]})
    pq.write_table(table.replace_schema_metadata({"classes": '["no", "yes"]'}), tmp_path / "a.parquet")
    assert open_source(tmp_path / "a.parquet").classes == ("no", "yes")
    pq.write_table(table, tmp_path / "b.parquet")
    (tmp_path / "classes.json").write_text('["left", "right"]')
    source = open_source(tmp_path / "b.parquet")
    assert source.classes == ("left", "right") and source.labels.tolist() == [1, 0]
    (tmp_path / "classes.json").write_text('["left"]')
    with pytest.raises(DataError, match="the label '1', which is none of its 1 classes"):
        open_source(tmp_path / "b.parquet")


def test_a_folder_of_tables_named_after_splits_is_one_source(tmp_path):
    for name, values in {"train-00000-of-00002": [1, 2], "train-00001-of-00002": [3], "test": [4]}.items():
        labels = ["b" if value == 4 else "a" for value in values]
        pq.write_table(pa.table({"image": [png(v) for v in values], "label": labels}), tmp_path / f"{name}.parquet")
    source = open_source(tmp_path)
    assert source.splits == ["test", "train", "train", "train"]
    assert source.labels.tolist() == [1, 0, 0, 0] and len(set(source.ids)) == 4


def test_an_item_in_two_splits_is_an_error(photos):
    csv(photos, "image\na.png\n", "train.csv")
    csv(photos, "image\na.png\n", "test.csv")
    with pytest.raises(DataError, match=r"both 'a\.png' but differ in split"):
        open_source(photos)


# -- Arrays --


@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 8, 6, 1), (3, 8, 8, 3), (3, 16, 16, 13)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.float64])
def test_arrays_of_any_depth_and_channels_open(tmp_path, shape, dtype):
    array = (np.random.default_rng(0).random(shape) * 200).astype(dtype)
    np.save(tmp_path / "a.npy", array)
    np.savez(tmp_path / "a.npz", images=array, labels=np.array([[2], [0], [1]]))
    for source in (open_source(tmp_path / "a.npy"), open_source(tmp_path / "a.npz")):
        assert len(source) == 3 and source.ids == ["0", "1", "2"]
        assert np.array_equal(decode(source.images[1], channels=None).reshape(shape[1:]), array[1].astype(np.float32))
    assert source.labels.tolist() == [2, 0, 1]


def test_one_file_of_several_splits_opens(tmp_path):
    rows = np.zeros((3, 4, 4), np.uint8)
    np.savez(tmp_path / "a.npz", train_images=rows, train_labels=np.arange(3), test_images=rows[:1])
    source = open_source(tmp_path / "a.npz")
    assert source.splits == ["train"] * 3 + ["test"] and source.labels.tolist() == [0, 1, 2, -1]


def test_arrays_that_are_no_pictures_say_what_they_are(tmp_path):
    for array, message in [
        (np.zeros((2, 3, 32, 32), np.uint8), r"\(2, 3, 32, 32\); pictures are \[n, height, width\]"),
        (np.zeros((2, 4, 4), np.int64), "is int64"),
        (np.zeros(5), r"shape \(5,\)"),
    ]:
        np.save(tmp_path / "a.npy", array)
        with pytest.raises(DataError, match=message):
            open_source(tmp_path / "a.npy")
    np.savez(tmp_path / "b.npz", images=np.zeros((2, 4, 4), np.uint8), labels=np.zeros((2, 3)))
    with pytest.raises(DataError, match=r"labels has shape \(2, 3\); expected one value for each of the 2"):
        open_source(tmp_path / "b.npz")
    (tmp_path / "c.npz").write_bytes((tmp_path / "b.npz").read_bytes()[:100])
    np.save(tmp_path / "d.npy", np.array([{}]), allow_pickle=True)
    for name in ("c.npz", "d.npy"):
        with pytest.raises(DataError, match="cannot be read as NP"):
            open_source(tmp_path / name)


def test_what_is_not_there_or_not_a_source_says_what_is_one(tmp_path):
    with pytest.raises(DataError, match=r"There is no .*nowhere.*openmoji"):
        open_source(tmp_path / "nowhere")
    with pytest.raises(DataError, match="cannot be opened as a source"):
        open_source(csv(tmp_path, "x", "a.docx"))


# -- Source --


def test_take_takes_from_every_column(photos):
    source = open_source(csv(photos, "image,text,label,split,n\na.png,x,0,train,1\nb.png,y,1,val,2\n"))
    taken = source.take(np.array([1]))
    assert (taken.ids, taken.texts, taken.splits, taken.meta) == (["b.png"], [["y"]], ["val"], {"n": ["2"]})
    assert taken.labels.tolist() == [1] and taken.classes == source.classes and len(taken) == 1


def test_columns_that_disagree_and_ids_that_repeat_are_errors():
    with pytest.raises(DataError, match="2 ids and 1 images"):
        Source("x", ["a", "b"], images=[b""])
    with pytest.raises(DataError, match="'a' stands for two items"):
        Source("x", ["a", "b", "a"])


def test_equal_content_has_equal_keys_wherever_it_lies(tmp_path):
    (tmp_path / "a.png").write_bytes(png(1))
    array = np.zeros((4, 4, 3), np.uint8)
    images = [tmp_path / "a.png", png(1), png(2), array, array.astype(np.uint16), array.reshape(2, 8, 3)]
    keys = Source("x", list("abcdef"), images=images).keys()
    assert keys[0] == keys[1] and len(set(keys)) == 5
    texts = Source("x", ["a", "b", "c"], texts=[["p", "q"], ["p", "q"], ["pq"]]).keys("text")
    assert texts[0] == texts[1] != texts[2]
    assert Source("x", ["a"], texts=[["p"]]).keys("text") == [content_key("p")]
    with pytest.raises(DataError, match=r"no modality 'sound': its modalities are text \(text\)"):
        Source("x", ["a"], texts=[["p"]]).keys("sound")


def test_a_file_is_hashed_once_and_again_when_it_changes(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(png(1))
    source = Source("x", ["a"], images=[path])
    past = time.time_ns() - 10**10
    os.utime(path, ns=(past, past))
    (key,) = source.keys()
    monkeypatch.setattr(sources.hashlib, "file_digest", lambda *_: pytest.fail("was read again"))
    assert source.keys() == [key]
    monkeypatch.undo()
    monkeypatch.setenv("TWOFOLD_CACHE", str(tmp_path / "cache"))
    path.write_bytes(png(2))
    assert source.keys() == [content_key(png(2))] != [key]


def test_a_damaged_memory_of_hashes_or_a_lost_file_costs_nothing_but_time(photos, cache):
    cache.mkdir()
    (cache / "files.sqlite").write_bytes(b"this is no database" * 100)
    source = open_source(csv(photos, "image\na.png\ngone.png\n"))
    assert source.keys()[0] == content_key(png(0)) != source.keys()[1]


# -- Further modalities --


def test_a_column_becomes_a_modality_of_the_kind_that_is_said(tmp_path):
    for name in ("a.ogg", "b.ogg"):
        (tmp_path / name).write_bytes(name.encode())
    rows = "id,text,voice,code,note\n1,one,a.ogg,x = 1,p\n1,two,a.ogg,x = 1,p\n2,three,b.ogg,,q\n"
    source = open_source(csv(tmp_path, rows), columns={"voice": "audio", "code": "text"})
    assert source.modalities == {"text": "text", "voice": "audio", "code": "text"}
    assert source.column("voice") == ("audio", [tmp_path / "a.ogg", tmp_path / "b.ogg"])
    assert source.texts == [["one", "two"], ["three"]] and source.column("text").cells == source.texts
    assert source.column("code") == ("text", [["x = 1"], []]), "a code that stands beside both captions is one code"
    assert source.meta == {"note": ["p", "q"]}
    assert source.keys("voice") == [content_key(b"a.ogg"), content_key(b"b.ogg")]
    assert source.keys("code")[0] == content_key("x = 1")
    assert source.take([1]).column("voice").cells == [tmp_path / "b.ogg"]


@pytest.mark.parametrize("name", ["audio", "sound", "speech", "recording", "path", "file"])
def test_a_column_of_sound_files_is_known_by_its_name(tmp_path, name):
    (tmp_path / "a.ogg").write_bytes(b"a")
    source = open_source(csv(tmp_path, f"{name},transcript\na.ogg,hello\na.ogg,again\n"))
    assert source.modalities == {"text": "text", "audio": "audio"} and source.ids == ["a.ogg"]
    assert source.texts == [["hello", "again"]] and source.column("audio").cells == [tmp_path / "a.ogg"]


def test_words_and_numbers_under_such_names_stay_what_they_are(photos):
    source = open_source(csv(photos, "image,sound,embedding\na.png,loud,0.3\nb.png,none,0.4\n"))
    assert source.modalities == {"image": "image"}
    assert source.meta == {"sound": ["loud", "none"], "embedding": ["0.3", "0.4"]}


def test_a_folder_of_sounds_opens_as_one_of_pictures_does(tmp_path):
    for name in ("train/cat/1.wav", "test/dog/2.ogg"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(b"")
    source = open_source(tmp_path)
    assert source.modalities == {"audio": "audio"} and source.classes == ("cat", "dog")
    assert source.splits == ["test", "train"]


def test_vectors_come_as_arrays_as_lists_and_as_a_file_beside_a_table(photos):
    vectors = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    np.save(photos / "v.npy", vectors)
    np.savez(photos / "v.npz", ids=np.array(["x", "y", "z"]), vectors=vectors)
    np.savez(photos / "two.npz", left=vectors, right=vectors[:, :2], label=np.array([0, 1, 0]))
    pq.write_table(pa.table({"embedding": list(vectors), "text": ["a", "b", "c"]}), photos / "v.parquet")
    table = csv(photos, "image,text\na.png,x\nb.png,y\nimages/c.png,z\n")
    for source in (
        open_source(photos / "v.npy"),
        open_source(photos / "v.npz"),
        open_source(photos / "v.parquet"),
        open_source(table, columns={"vector": photos / "v.npy"}),
    ):
        assert source.column("vector").kind == "vector" and len(set(source.keys("vector"))) == 3
        np.testing.assert_array_equal(np.stack(source.column("vector").cells), vectors)
    assert open_source(photos / "v.npz").ids == ["x", "y", "z"]
    two = open_source(photos / "two.npz", columns={"left": "vector", "right": "vector"})
    assert two.modalities == {"left": "vector", "right": "vector"} and two.labels.tolist() == [0, 1, 0]
    with pytest.raises(DataError, match="has 3 rows and the table 2"):
        open_source(csv(photos, "image\na.png\nb.png\n"), columns={"vector": photos / "v.npy"})
    np.savez(photos / "odd.npz", left=vectors, right=vectors[:2])
    with pytest.raises(DataError, match="different lengths"):
        open_source(photos / "odd.npz")


def test_what_no_modality_can_be_made_of_is_told(photos):
    path = csv(photos, "image,spech,note\na.png,x.ogg,1\n")
    with pytest.raises(UsageError, match="Did you mean 'spech'"):
        open_source(path, columns={"speech": "audio"})
    with pytest.raises(UsageError, match="Did you mean 'audio'"):
        open_source(path, columns={"spech": "adio"})
    with pytest.raises(DataError, match=r"none of its 1 sounds exist, for instance .*x\.ogg"):
        open_source(path, columns={"spech": "audio"})
    with pytest.raises(UsageError, match="'image' is taken for images"):
        open_source(path, columns={"image": "text"})
    with pytest.raises(UsageError, match="goes with a manifest"):
        open_source(photos, columns={"speech": "audio"})
    with pytest.raises(DataError, match=r"no modality 'speech': its modalities are image \(image\)"):
        open_source(path).column("speech")
    with pytest.raises(UsageError, match="given as images= or texts="):
        Source("x", ["a"], columns={"text": Column("text", [["p"]])})
    with pytest.raises(DataError, match="1 ids and 2 speech"):
        Source("x", ["a"], columns={"speech": Column("audio", [b"", b""])})


def test_a_sample_of_sorted_data_has_all_classes_and_grows_by_what_it_had():
    labels = np.repeat(np.arange(5), 40)
    source = Source("sorted", [f"{i:03}" for i in range(200)], texts=[["a"]] * 200, labels=labels)
    some, more = source.sample(50), source.sample(100)
    assert np.bincount(some.labels).min() >= 4 and some.ids == sorted(some.ids)
    assert set(some.ids) < set(more.ids) and source.sample(50).ids == some.ids
    assert source.sample(None) is source is source.sample(200)
