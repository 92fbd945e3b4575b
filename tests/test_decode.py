"""Pixels from whatever a picture is stored as."""

import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from twofold.data.decode import Skipped, decode, fit, promote, skip_report, stream
from twofold.errors import DecodeError, UsageError


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def png(pixels: np.ndarray, color: int) -> bytes:
    """A 16-bit PNG: Pillow cannot write one in colour."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, color, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def tiff(pixels: np.ndarray, order: str, compression: int) -> bytes:
    """A 16-bit RGB TIFF of one strip; compression 1 is none, 8 is deflate."""
    height, width, channels = pixels.shape
    data = pixels.astype(order + "u2").tobytes()
    data = zlib.compress(data) if compression == 8 else data
    bits, strip = 8 + 2 + 12 * 10 + 4, 8 + 2 + 12 * 10 + 4 + 2 * channels
    fields = [
        (256, 3, 1, width),
        (257, 3, 1, height),
        (258, 3, channels, bits),
        (259, 3, 1, compression),
        (262, 3, 1, 2),
        (273, 4, 1, strip),
        (277, 3, 1, channels),
        (278, 4, 1, height),
        (279, 4, 1, len(data)),
        (284, 3, 1, 1),
    ]
    out = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8) + struct.pack(order + "H", len(fields))
    for tag, kind, count, value in fields:
        short = kind == 3 and count == 1
        out += struct.pack(order + "HHI", tag, kind, count)
        out += struct.pack(order + "HH", value, 0) if short else struct.pack(order + "I", value)
    return out + struct.pack(order + "I", 0) + struct.pack(order + "H" * channels, *[16] * channels) + data


@pytest.fixture
def rgb() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)


@pytest.fixture
def deep() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 65536, (6, 9, 3), np.uint16)


def test_a_lossless_file_gives_its_pixels_from_bytes_path_array_and_picture(rgb, tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(Image.fromarray(rgb)))
    for image in ((tmp_path / "a.png").read_bytes(), tmp_path / "a.png", rgb, Image.fromarray(rgb)):
        assert np.array_equal(decode(image), rgb)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_ends_upright(orientation, rgb):
    # How a camera stores the upright picture for each orientation (EXIF 2.3, tag 274).
    stored = {
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.transpose(1, 0, 2),
        6: lambda x: np.rot90(x, 1),
        7: lambda x: np.rot90(x, 2).transpose(1, 0, 2),
        8: lambda x: np.rot90(x, -1),
    }[orientation](rgb)
    exif = Image.Exif()
    exif[274] = orientation
    assert np.array_equal(decode(encoded(Image.fromarray(np.ascontiguousarray(stored)), exif=exif)), rgb)


def test_a_damaged_exif_block_costs_the_rotation_not_the_picture(rgb):
    data = encoded(Image.fromarray(rgb), exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01")
    assert np.array_equal(decode(data), rgb)


def test_cmyk_becomes_the_rgb_it_stands_for():
    cmyk = Image.new("CMYK", (8, 8), (255, 0, 0, 0))  # full cyan: no red
    assert decode(encoded(cmyk, "JPEG"))[4, 4] == pytest.approx([0, 255, 255], abs=3)


def test_what_is_transparent_becomes_white():
    pixels = np.zeros((1, 3, 4), np.uint8)
    pixels[0, :, 3] = [0, 51, 255]  # black: absent, at one fifth, full
    assert decode(encoded(Image.fromarray(pixels)))[0, :, 0].tolist() == [255, 204, 0]


def test_palettes_grey_and_bilevel_become_colour(rgb):
    palette = Image.fromarray(rgb).quantize(8)
    assert np.array_equal(decode(encoded(palette)), np.asarray(palette.convert("RGB")))
    grey = Image.fromarray(rgb[:, :, 0])
    assert np.array_equal(decode(encoded(grey)), np.repeat(rgb[:, :, :1], 3, axis=2))
    bilevel = decode(encoded(Image.fromarray(rgb[:, :, 0] > 127)))
    assert set(np.unique(bilevel)) <= {0, 255}
    see_through = Image.fromarray(np.zeros((2, 2), np.uint8)).convert("P")
    assert decode(encoded(see_through, transparency=0)).min() == 255


def test_sixteen_bits_stay_sixteen_bits_in_grey_and_colour(deep):
    grey = decode(encoded(Image.fromarray(deep[:, :, 0])), channels=1)
    assert grey.dtype == np.uint16 and np.array_equal(grey[:, :, 0], deep[:, :, 0])
    assert np.array_equal(decode(png(deep, color=2)), deep)
    for order in "<>":
        for compression in (1, 8):
            assert np.array_equal(decode(tiff(deep, order, compression)), deep), (order, compression)


def test_sixteen_bit_alpha_is_composited_exactly(deep):
    alpha = np.full((6, 9, 1), 32768, np.uint16)
    expected = np.round((deep * 32768.0 + 65535.0 * (65535 - 32768)) / 65535)
    assert np.array_equal(decode(png(np.concatenate([deep, alpha], 2), color=6)), expected)
    assert np.array_equal(decode(png(np.concatenate([deep[:, :, :1], alpha], 2), color=4))[:, :, 1], expected[:, :, 0])


def test_arrays_of_any_channels_and_depth_come_through(tmp_path):
    many = np.random.default_rng(0).random((5, 4, 13))
    np.save(tmp_path / "tile.npy", many)
    assert np.array_equal(decode(tmp_path / "tile.npy", channels=13), many.astype(np.float32))
    assert decode(np.zeros((4, 4), np.uint16), channels=None).shape == (4, 4, 1)
    assert decode(np.zeros((4, 4, 13), np.uint8), channels=None).shape == (4, 4, 13)


def test_luminance_is_what_pillow_calls_grey(rgb):
    assert (
        np.abs(decode(rgb, channels=1)[:, :, 0].astype(int) - np.asarray(Image.fromarray(rgb).convert("L"))).max() <= 1
    )


BROKEN = {
    "empty": (b"", "empty"),
    "text": (b"hello, this is no picture", "not a picture"),
    "truncated": (encoded(Image.effect_noise((64, 64), 50), "JPEG")[:600], "truncated"),
    "bit rot": (encoded(Image.effect_noise((64, 64), 50))[:200] + b"\xff" * 400, "damaged"),
    "a bomb": (encoded(Image.new("1", (12_000, 12_000))), "larger than"),
    "four channels": (np.zeros((4, 4, 4), np.uint8), "has 4 channels, expected 3"),
    "whole numbers": (np.zeros((4, 4, 3), np.int64), "int64"),
    "NaN": (np.full((4, 4, 3), np.nan), "not finite"),
    "no pixels": (np.zeros((0, 4, 3), np.uint8), "shape"),
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_cannot_be_decoded_is_named_with_its_reason(case):
    image, reason = BROKEN[case]
    with pytest.raises(DecodeError, match=reason) as caught:
        decode(image, name="photo 7")
    assert caught.value.item == "photo 7"


def test_files_that_are_not_there_or_no_files_are_named(tmp_path):
    with pytest.raises(DecodeError, match=r"gone\.jpg: no such file"):
        decode(tmp_path / "gone.jpg")
    with pytest.raises(DecodeError, match="a folder"):
        decode(tmp_path)
    (tmp_path / "code.npy").write_bytes(b"\x93NUMPY\x01\x00 not really")
    with pytest.raises(DecodeError, match="damaged"):
        decode(tmp_path / "code.npy")
    np.save(tmp_path / "pickle.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(DecodeError, match="Python objects"):
        decode(tmp_path / "pickle.npy")


@pytest.mark.parametrize("cut", range(0, 900, 60))
def test_a_file_cut_anywhere_decodes_or_raises_decode_error_only(cut):
    data = encoded(Image.effect_noise((32, 32), 50), "PNG")
    with contextlib.suppress(DecodeError):
        assert decode(data[:cut]).shape == (32, 32, 3)


def test_crop_keeps_the_middle_and_pad_keeps_everything():
    wide = np.zeros((4, 8, 3), np.uint8)
    wide[:, 2:6] = 200
    assert (fit(wide, 4) == 200).all()
    padded = fit(wide, 8, how="pad")
    assert np.array_equal(padded[2:6], wide) and not padded[:2].any() and not padded[6:].any()
    assert fit(wide, 4, how="stretch").shape == (4, 4, 3)
    with pytest.raises(UsageError, match="Did you mean 'crop'"):
        fit(wide, 4, how="corp")


@pytest.mark.parametrize("how", ["crop", "pad", "stretch"])
def test_resizing_agrees_over_depths_and_keeps_them(how):
    image = np.random.default_rng(0).integers(0, 256, (40, 61, 3), np.uint8)
    fitted = fit(image, 16, how=how)
    assert fitted.dtype == np.uint8
    for dtype, scale in ((np.uint16, 257), (np.float32, 1 / 255)):
        other = fit(promote(image, np.dtype(dtype)), 16, how=how)
        assert other.dtype == dtype
        assert np.abs(other / scale - fitted).max() <= 1
    assert np.array_equal(fit(image[:, :, :1], 16, how=how)[:, :, 0].astype(int).shape, (16, 16))


def test_shrinking_is_antialiased():
    stripes = np.zeros((64, 64, 1), np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(fit(stripes, 8).astype(int)[:, 1:-1] - 127).max() <= 1


def test_stream_keeps_the_order_and_names_what_it_skips():
    images = [np.full((4, 4, 3), value, np.uint8) for value in range(100)]
    images[3] = images[50] = b""
    skipped: list[Skipped] = []
    names = [f"item {index}" for index in range(100)]
    got = list(stream(images, 4, names=names, skipped=skipped))
    assert [index for index, _ in got] == [index for index in range(100) if index not in (3, 50)]
    assert all((pixels == index).all() for index, pixels in got)
    assert skipped == [Skipped("item 3", "empty"), Skipped("item 50", "empty")]
    report = skip_report(skipped, 100)
    assert "2 of 100" in report and "item 3, item 50" in report and "2 × empty" in report
    with pytest.raises(DecodeError, match="item 3"):
        list(stream(images, 4, on_error="raise", names=names))


def test_stream_may_be_left_early():
    images = [np.zeros((4, 4, 3), np.uint8)] * 1000
    pictures = stream(images, 4)
    assert next(pictures)[0] == 0
    pictures.close()
    assert list(stream([], 4)) == []
