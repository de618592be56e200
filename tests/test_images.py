"""Decoding, resizing and preprocessing of pictures, and every way in which a file can be bad.

Gives: tests of data/images against Pillow, hand-computed pixels and damaged files.
Used by: pytest.
"""

from __future__ import annotations

import io
import pickle
import struct
import time
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from torch import Tensor

from silc.config import PreprocessConfig
from silc.data.images import BadSample, Picture, decode, normalise, preprocess, resize

LIMIT = 10_000_000


def photo(height: int, width: int, seed: int = 0) -> Image.Image:
    """Smooth shading, hard edges and grain: what tells a good resize from an aliased one."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width].astype(float)
    shading = 128 + 80 * np.sin(x / 37 + y / 53)[..., None] * (1, 0.7, -0.8)
    stripes = np.where((x // 5 + y // 9) % 2 == 0, 25, -25)[..., None]
    pixels = shading + stripes * (x > width / 2)[..., None] + rng.normal(0, 6, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def cause(data: bytes, max_pixels: int = LIMIT) -> str:
    with pytest.raises(BadSample) as caught:
        decode(data, max_pixels)
    return caught.value.cause


@pytest.mark.parametrize("kind, options", [("PNG", {}), ("BMP", {}), ("WEBP", {"lossless": True})])
def test_lossless_formats_come_back_exactly(kind, options):
    image = photo(30, 41)
    out = decode(encoded(image, kind, **options), LIMIT)
    assert out.dtype == torch.uint8 and torch.equal(out, pixels(image))


def test_jpeg_and_gif_are_what_pillow_reads():
    image = photo(30, 41)
    for kind in ("JPEG", "GIF"):
        data = encoded(image, kind)
        assert torch.equal(decode(data, LIMIT), pixels(Image.open(io.BytesIO(data))))


def outcome(data: bytes, at_least: int) -> Tensor | str:
    try:
        return decode(data, LIMIT, at_least)
    except BadSample as bad:
        return bad.cause


def test_the_quick_way_through_a_jpeg_is_pillows(monkeypatch):
    """Pixels and causes are those of Pillow alone: whole, scaled, and with bytes missing, changed or added."""
    options = [{"subsampling": s, "progressive": p} for s in (0, 1, 2) for p in (False, True)]
    options += [{"restart_marker_blocks": 2}, {"keep_rgb": True}]
    files = [encoded(photo(61, 45 + i), "JPEG", **each) for i, each in enumerate(options)]
    files += [encoded(photo(33, 47).convert(mode), "JPEG") for mode in ("L", "CMYK")]
    rng = np.random.default_rng(0)
    for data in list(files):
        for kind in range(20):
            broken, at = bytearray(data), int(rng.integers(2, len(data)))
            if kind % 4 == 0:
                del broken[at:]
            elif kind % 4 == 1:
                broken[at] ^= 1 << int(rng.integers(8))
            elif kind % 4 == 2:
                del broken[at : at + 3]
            else:
                broken[at:at] = rng.bytes(5)
            files.append(bytes(broken))
    quick = [outcome(data, at_least) for data in files for at_least in (0, 20)]
    ways: list[bool] = []
    way = Picture._quick_jpeg
    monkeypatch.setattr(Picture, "_quick_jpeg", lambda self, shrink: ways.append(way(self, shrink) is not None))
    slow = [outcome(data, at_least) for data in files for at_least in (0, 20)]
    assert all(a == b if isinstance(a, str) or isinstance(b, str) else torch.equal(a, b) for a, b in zip(quick, slow))
    assert sum(ways) > 100 and len(ways) - sum(ways) > 50, "both ways were gone"


def test_the_size_of_an_upright_picture_is_known_before_decoding():
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("JPEG", "PNG"):
        picture = Picture(encoded(photo(24, 40), kind, exif=exif), LIMIT)
        assert (picture.height, picture.width) == (40, 24) == picture.pixels().shape[1:]
    assert Picture(encoded(photo(25, 41), "JPEG"), LIMIT).pixels(2).shape == (3, 13, 21)


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(data, LIMIT)[:, 0, 0].tolist() == [255, 0, 0]


def test_alpha_is_composited_on_white():
    image = Image.new("RGBA", (2, 1))
    image.putpixel((0, 0), (200, 0, 100, 128))
    image.putpixel((1, 0), (9, 9, 9, 0))
    out = decode(encoded(image, "PNG"), LIMIT)
    # 255 + (c - 255) * 128 / 255
    assert out[:, 0, 0].tolist() == pytest.approx([227, 127, 177], abs=1)
    assert out[:, 0, 1].tolist() == [255, 255, 255]
    grey = Image.new("LA", (1, 1), (0, 0))
    assert decode(encoded(grey, "PNG"), LIMIT).flatten().tolist() == [255, 255, 255]


def test_transparent_palette_entry_is_white():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    out = decode(encoded(image, "PNG", transparency=0), LIMIT)
    assert out[:, 0, 0].tolist() == [255, 255, 255] and out[:, 0, 1].tolist() == [40, 50, 60]


def test_sixteen_bit_grey_is_scaled_not_clipped():
    ramp = np.array([[0, 256, 257 * 100, 65535]], dtype=np.uint16)
    out = decode(encoded(Image.fromarray(ramp), "PNG"), LIMIT)
    assert out[0, 0].tolist() == [0, 1, 100, 255] and torch.equal(out[0], out[2])


def test_grey_bilevel_and_cmyk_become_rgb():
    assert decode(encoded(Image.new("L", (2, 2), 77), "PNG"), LIMIT).unique().tolist() == [77]
    assert decode(encoded(Image.new("1", (2, 2), 1), "PNG"), LIMIT).unique().tolist() == [255]
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    red = decode(encoded(cmyk, "JPEG", quality=100), LIMIT)[:, 8, 8].tolist()
    assert red == pytest.approx([255, 0, 0], abs=3)


def stored_as(upright: np.ndarray, orientation: int) -> np.ndarray:
    """How a camera stores an upright picture [H, W, 3] under each EXIF orientation (independent of Pillow)."""
    turned = {
        1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, 1), 7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
        8: lambda a: np.rot90(a, -1),
    }  # fmt: skip
    return np.ascontiguousarray(turned[orientation](upright))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    upright = np.zeros((24, 40, 3), np.uint8)
    upright[:8, :8] = 255  # a white top left corner and a grey top right one
    upright[:8, -8:] = 128
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(stored_as(upright, orientation)), "PNG", exif=exif)
    assert torch.equal(decode(data, LIMIT), torch.from_numpy(upright).permute(2, 0, 1))
    jpeg = decode(encoded(Image.fromarray(stored_as(upright, orientation)), "JPEG", exif=exif), LIMIT, at_least=12)
    assert jpeg.shape == (3, 12, 20) and jpeg[0, 1, 1] > 240 and abs(int(jpeg[0, 1, -2]) - 128) < 15


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_does_not_lose_the_picture():
    image = photo(16, 24)
    data = encoded(image, "JPEG", exif=b"Exif\x00\x00MM\x00*\x00\x00\xff\xff\x00\x09garbage")
    assert decode(data, LIMIT).shape == (3, 16, 24)


@pytest.mark.parametrize("at_least, expected", [(0, 600), (301, 600), (300, 300), (151, 300), (150, 150), (10, 75)])
def test_scaled_jpeg_keeps_at_least_the_short_side(at_least, expected):
    data = encoded(photo(600, 808), "JPEG", quality=95)
    out = decode(data, LIMIT, at_least)
    assert out.shape == (3, expected, 808 * expected // 600)
    full = decode(data, LIMIT)
    reference = resize(full, *out.shape[-2:], "bilinear")
    assert (reference.float() - out.float()).abs().mean() < 4


@pytest.mark.parametrize("kind", ["JPEG", "progressive", "PNG", "WEBP", "GIF", "BMP"])
def test_a_cut_off_file_is_never_half_loaded(kind):
    options = {"progressive": True} if kind == "progressive" else {}
    data = encoded(photo(40, 56), "JPEG" if kind == "progressive" else kind, **options)
    whole = decode(data, LIMIT)
    refused = 0
    for end in range(1, len(data), max(1, len(data) // 60)):
        try:
            assert torch.equal(decode(data[:end], LIMIT), whole), "returned, though not whole"
        except BadSample as bad:
            # two bytes of signature or less say nothing
            assert bad.cause == "truncated" or end < 4
            refused += 1
    assert refused >= 55
    assert cause(data[: len(data) // 2]) == "truncated"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
def test_damaged_bytes_raise_bad_sample_or_decode(kind):
    data = encoded(photo(40, 56), kind)
    rng = np.random.default_rng(1)
    for _ in range(60):
        broken = bytearray(data)
        for place in rng.integers(0, len(data), 6):
            broken[place] = rng.integers(256)
        try:
            assert decode(bytes(broken), LIMIT).dtype == torch.uint8
        except BadSample as bad:
            assert bad.cause in {"not an image", "truncated", "damaged", "too large"}


def test_flipped_png_data_is_damaged():
    data = bytearray(encoded(photo(40, 56), "PNG"))
    data[len(data) // 2] ^= 0xFF
    assert cause(bytes(data)) == "damaged"


def test_files_that_are_no_images():
    assert cause(b"") == "empty"
    assert cause(b"<!DOCTYPE html><html><body>404 not found</body></html>") == "not an image"
    assert cause(b"\x00" * 500) == "not an image"
    assert cause(b"RIFF\x24\x00\x00\x00WAVEfmt " + b"\x00" * 30) == "not an image"
    assert cause(b"%PDF-1.7 ...") == "not an image"
    # A format Pillow knows, but which is not on the list
    assert cause(encoded(photo(8, 8), "TIFF")) == "not an image"


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\x00" * 100))


def test_a_huge_header_is_refused_before_anything_is_decoded(monkeypatch):
    # Pillow allocates the pixels in load; were it reached, the cause would be another
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    start = time.perf_counter()
    assert cause(png_header(30_000, 30_000), max_pixels=100_000_000) == "too large"
    # Within Pillow's limit, beyond ours, and one that would pass both
    assert cause(png_header(8_000, 8_000), max_pixels=60_000_000) == "too large"
    assert cause(png_header(8_000, 1_000), max_pixels=8_000_000 - 1) == "too large"
    assert time.perf_counter() - start < 0.5
    # Pillow's own limit is still in force for one who asks for more
    assert cause(png_header(30_000, 30_000), max_pixels=10**12) == "too large"


def test_max_pixels_is_inclusive():
    data = encoded(photo(20, 30), "PNG")
    assert decode(data, 600).shape == (3, 20, 30)
    assert cause(data, 599) == "too large"


def test_max_pixels_counts_the_header_not_the_scaled_size():
    data = encoded(photo(400, 400), "JPEG")
    with pytest.raises(BadSample, match="too large"):
        decode(data, 100_000, at_least=50)


def test_bad_sample_survives_the_way_out_of_a_worker():
    assert pickle.loads(pickle.dumps(BadSample("truncated"))).cause == "truncated"


@pytest.mark.parametrize("size", [(224, 224), (96, 131), (700, 500)])
@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_resize_is_pillows_antialiased_resize(size, mode):
    image = photo(375, 500)
    filters = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
    reference = pixels(image.resize(size[::-1], filters[mode])).float()
    difference = (resize(pixels(image), *size, mode).float() - reference).abs()
    assert difference.mean() < 0.5 and difference.max() <= 2


def test_resize_does_not_depend_on_the_memory_layout():
    image = pixels(photo(60, 80))
    assert torch.equal(resize(image, 33, 21, "bicubic"), resize(image.contiguous(), 33, 21, "bicubic"))
    assert resize(image, 60, 80, "bicubic") is image


def test_squash_ignores_the_aspect_ratio():
    image = photo(60, 100)
    out = preprocess(pixels(image), PreprocessConfig(size=32, resize="squash"))
    reference = pixels(image.resize((32, 32), Image.Resampling.BILINEAR)).float()
    assert out.shape == (3, 32, 32) and out.is_contiguous()
    assert (out.float() - reference).abs().mean() < 0.5


@pytest.mark.parametrize("height, width", [(60, 101), (101, 60), (64, 64), (33, 40)])
def test_crop_is_short_side_then_centre_square(height, width):
    image = photo(height, width)
    out = preprocess(pixels(image), PreprocessConfig(size=32, resize="crop", interpolation="bicubic"))
    w, h = (32, 32 * height // width) if width < height else (32 * width // height, 32)
    left, top = round((w - 32) / 2), round((h - 32) / 2)
    square = image.resize((w, h), Image.Resampling.BICUBIC).crop((left, top, left + 32, top + 32))
    assert (out.float() - pixels(square).float()).abs().mean() < 0.5


def test_a_strip_does_not_become_gigabytes():
    out = preprocess(torch.full((3, 1, 100_000), 9, dtype=torch.uint8), PreprocessConfig(size=64, resize="crop"))
    assert out.shape == (3, 64, 64) and out.unique().tolist() == [9]


def test_normalise_values():
    image = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1).expand(2, 3, 4, 5)
    out = normalise(image, (0.5, 0.2, 0.0), (0.5, 0.1, 2.0))
    assert out.shape == image.shape and out.dtype == torch.float32
    assert torch.allclose(out[0, :, 0, 0], torch.tensor([-1.0, 0.0, 0.5]), atol=1e-6)
    assert torch.allclose(normalise(image.float() / 255, (0.5, 0.2, 0.0), (0.5, 0.1, 2.0)), out)
