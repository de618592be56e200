"""Crop boxes, cutting, and the photometric augmentation.

Gives: tests of data/views against a plain-Python crop sampler, hand-computed colours and an explicit Gaussian.
Used by: pytest.
"""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from silc.config import ViewsConfig
from silc.data.images import resize
from silc.data.views import (
    PHOTOMETRIC,
    Crop,
    crop_box,
    cut,
    draw_crops,
    draw_photometric,
    room_for,
    sample_rng,
    spare,
)
from silc.data.views import photometric as augmented

IDENTITY = (1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0)
LUMA = torch.tensor([0.299, 0.587, 0.114])


def params(**changes: float) -> np.ndarray:
    row = dict(zip(PHOTOMETRIC, IDENTITY)) | changes
    return np.array(list(row.values()), np.float32).reshape(1, 1, -1)


def photometric(pixels: Tensor, rows: np.ndarray) -> Tensor:
    """Without normalisation: in [0, 1]."""
    return augmented(pixels, rows, (0, 0, 0), (1, 1, 1))


def cut_views(image: Tensor, views: ViewsConfig, rng: np.random.Generator) -> dict[str, Tensor]:
    """Draw and cut as a worker does: {kind: uint8 [count, 3, size, size]}."""
    height, width = image.shape[1:]
    room = room_for(views, 1)
    cut(image, draw_crops(height, width, views, rng), height, width, [v[0] for kind in room.values() for v in kind])
    return {name: kind[:, 0].movedim(-1, -3) for name, kind in room.items()}


def picture(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


# ---------------------------------------------------------------- random numbers


def test_numbers_are_a_function_of_seed_and_position():
    draws = {(s, p): tuple(sample_rng(s, p).random(3)) for s in (0, 1, 2**40) for p in (0, 1, 2, 10**12)}
    assert len(set(draws.values())) == len(draws)
    assert all(tuple(sample_rng(s, p).random(3)) == drawn for (s, p), drawn in draws.items())
    sample_rng(-1, 0)


def test_views_are_a_function_of_seed_and_position():
    views = ViewsConfig(globals=2, global_size=32, locals=3, local_size=16)
    image = picture(3, 60, 90)

    def make(position: int) -> tuple[Tensor, Tensor, Tensor]:
        rng = sample_rng(7, position)
        cuts = cut_views(image, views, rng)
        return cuts["globals"], cuts["locals"], torch.from_numpy(draw_photometric(views, rng))

    torch.manual_seed(1)
    first, other = make(5), make(6)
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(first, make(5)))
    assert not any(torch.equal(a, b) for a, b in zip(first, other))


# ---------------------------------------------------------------- crops


def plain_crop(height: int, width: int, scale: tuple[float, float], rng: random.Random) -> tuple[int, int, int, int]:
    """RandomResizedCrop as its documentation describes it."""
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    if width / height < 3 / 4:
        w, h = width, round(width / (3 / 4))
    elif width / height > 4 / 3:
        w, h = round(height * 4 / 3), height
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize("size", [(375, 500), (500, 375), (256, 256), (60, 200), (4, 5)])
@pytest.mark.parametrize("scale", [(0.4, 1.0), (0.05, 0.4)])
def test_crop_boxes_are_distributed_as_random_resized_crop(size, scale):
    count = 6000
    rng, plain = sample_rng(0, 0), random.Random(0)
    ours = np.array([crop_box(*size, scale, rng) for _ in range(count)], float)
    theirs = np.array([plain_crop(*size, scale, plain) for _ in range(count)], float)
    for a, b in ((ours, theirs), (ours**2, theirs**2), (ours[:, 2:3] * ours[:, 3:], theirs[:, 2:3] * theirs[:, 3:])):
        error = np.sqrt((a.var(0) + b.var(0)) / count)
        assert (np.abs(a.mean(0) - b.mean(0)) < 4.5 * error + 1e-9).all()
    for column in range(4):
        # Kolmogorov-Smirnov distance, at about one in a million
        grid = np.unique(np.concatenate([ours[:, column], theirs[:, column]]))
        a, b = (np.searchsorted(np.sort(x[:, column]), grid, side="right") / count for x in (ours, theirs))
        assert np.abs(a - b).max() < 2.7 * math.sqrt(2 / count)


@given(height=st.integers(1, 700), width=st.integers(1, 700), low=st.floats(0.001, 1), seed=st.integers(0, 2**31))
@settings(max_examples=200, deadline=None)
def test_crop_boxes_stay_inside(height, width, low, seed):
    top, left, h, w = crop_box(height, width, (low, 1.0), sample_rng(seed, 0))
    assert h >= 1 and w >= 1 and 0 <= top <= height - h and 0 <= left <= width - w


def test_fallback_is_the_largest_centred_box_of_allowed_ratio():
    # No crop of 90% of the area and a ratio near 1 fits these
    assert crop_box(100, 1000, (0.9, 1.0), sample_rng(0, 0)) == (0, 433, 100, 133)
    assert crop_box(1000, 100, (0.9, 1.0), sample_rng(0, 0)) == (433, 0, 133, 100)


@pytest.mark.parametrize("height, width", [(1, 1), (1, 300), (300, 1), (5, 7), (240, 320)])
def test_cut_gives_the_views_asked_for(height, width):
    views = ViewsConfig(globals=2, global_size=40, locals=3, local_size=24)
    out = cut_views(picture(3, height, width), views, sample_rng(0, 1))
    assert {k: tuple(v.shape) for k, v in out.items()} == {"globals": (2, 3, 40, 40), "locals": (3, 3, 24, 24)}
    assert all(v.dtype == torch.uint8 for v in out.values())
    assert set(cut_views(picture(3, height, width), ViewsConfig(global_size=8), sample_rng(0, 1))) == {"globals"}


def test_cut_is_the_resized_box():
    views = ViewsConfig(globals=1, global_size=32, flip=False)
    image = picture(3, 90, 70)
    top, left, h, w = crop_box(90, 70, views.global_scale, sample_rng(3, 4))
    expected = resize(image[:, top : top + h, left : left + w], 32, 32, "bicubic")
    assert torch.equal(cut_views(image, views, sample_rng(3, 4))["globals"][0], expected)


def test_a_crop_of_a_picture_decoded_smaller_is_the_same_part_of_it():
    ramp = torch.linspace(0, 255, 256).expand(3, 192, 256).round().byte()
    half = ramp[:, ::2, ::2]
    for position in range(20):
        crops = draw_crops(192, 256, ViewsConfig(globals=2, global_size=32), sample_rng(0, position))
        whole, small = (room_for(ViewsConfig(globals=2, global_size=32), 1)["globals"] for _ in range(2))
        cut(ramp, crops, 192, 256, list(whole[:, 0]))
        cut(half, crops, 192, 256, list(small[:, 0]))
        assert (whole.float() - small.float()).abs().max() < 4


def test_half_of_the_views_are_mirrored():
    ramp = torch.arange(64, dtype=torch.uint8).expand(3, 64, 64)
    views = ViewsConfig(globals=1, global_size=16, locals=4, local_size=16)
    falls = [
        bool(view[0, 0, 0] > view[0, 0, -1])
        for position in range(200)
        for kind in cut_views(ramp, views, sample_rng(0, position)).values()
        for view in kind
    ]
    assert len(falls) == 1000 and 420 < sum(falls) < 580
    straight = ViewsConfig(globals=4, global_size=16, flip=False)
    assert all((v[0, 0, 0] < v[0, 0, -1]) for v in cut_views(ramp, straight, sample_rng(0, 0))["globals"])


def test_spare_is_how_much_smaller_a_picture_may_be_decoded():
    crops = [Crop(0, 0, 448, 448, False, 224), Crop(5, 5, 100, 400, True, 96)]
    assert spare(crops) == pytest.approx(2.0)  # the second has 200 pixels a side on average, for 96
    assert spare([*crops, Crop(0, 0, 48, 48, False, 96)]) == pytest.approx(0.5)
    assert spare([]) == math.inf


# ---------------------------------------------------------------- photometric


def test_identity_parameters_only_divide_by_255():
    pixels = picture(2, 5, 3, 17, 17)
    unchanged = np.broadcast_to(params()[0, 0], (2, 5, len(PHOTOMETRIC)))
    out = photometric(pixels, unchanged)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, pixels.float() / 255, rtol=0, atol=1e-6)
    torch.testing.assert_close(photometric(pixels.float() / 255, unchanged), out, rtol=0, atol=1e-6)


def test_normalisation_is_part_of_it():
    views, mean, std = ViewsConfig(globals=2, locals=2), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    pixels = picture(4, 6, 3, 20, 20)
    drawn = np.stack([draw_photometric(views, sample_rng(4, p)) for p in range(6)], axis=1)
    shift, scale = (torch.tensor(v)[:, None, None] for v in (mean, std))
    torch.testing.assert_close(augmented(pixels, drawn, mean, std), (photometric(pixels, drawn) - shift) / scale)


def test_drawn_probabilities_are_the_published_ones():
    views = ViewsConfig(globals=2, locals=3)
    drawn = torch.from_numpy(np.stack([draw_photometric(views, sample_rng(0, p)) for p in range(4000)]))
    assert drawn.shape == (4000, 5, len(PHOTOMETRIC)) and drawn.dtype == torch.float32
    brightness, contrast, saturation, hue, grey, sigma, solarise = drawn.unbind(-1)
    jittered = brightness != 1
    assert jittered.float().mean() == pytest.approx(0.8, abs=0.01)
    assert torch.equal(jittered, contrast != 1) and torch.equal(jittered, hue != 0)
    for column, low, high in ((brightness, 0.6, 1.4), (contrast, 0.6, 1.4), (saturation, 0.8, 1.2), (hue, -0.1, 0.1)):
        values = column[jittered]
        assert values.min() == pytest.approx(low, abs=0.002) and values.max() == pytest.approx(high, abs=0.002)
        assert values.mean() == pytest.approx((low + high) / 2, abs=0.01)
    assert grey.mean() == pytest.approx(0.2, abs=0.01)
    assert (sigma > 0).float().mean(0).tolist() == pytest.approx([1.0, 0.1, 0.5, 0.5, 0.5], abs=0.035)
    assert 0.1 <= sigma[sigma > 0].min() < 0.11 and 1.99 < sigma.max() <= 2.0
    assert solarise.mean(0).tolist() == pytest.approx([0, 0.2, 0, 0, 0], abs=0.03)


def test_a_single_global_view_is_blurred_half_the_time_and_never_solarised():
    views = ViewsConfig(globals=1, locals=0)
    drawn = np.stack([draw_photometric(views, sample_rng(1, p)) for p in range(2000)])
    assert (drawn[..., 5] > 0).mean() == pytest.approx(0.5, abs=0.05)
    assert drawn[..., 6].sum() == 0


def test_brightness_scales_and_clamps():
    pixels = torch.tensor([10, 100, 240], dtype=torch.uint8).view(1, 1, 3, 1, 1).expand(1, 1, 3, 4, 4)
    out = photometric(pixels, params(brightness=1.3))[0, 0, :, 0, 0]
    assert torch.allclose(out, torch.tensor([13.0, 130.0, 255.0]) / 255)


def test_contrast_is_about_the_mean_luma_after_brightness():
    pixels = picture(1, 1, 3, 6, 6)
    x = pixels.float() / 255 * 0.7
    mean = (x[0, 0] * LUMA[:, None, None]).sum(0).mean()
    out = photometric(pixels, params(brightness=0.7, contrast=1.4))
    assert torch.allclose(out, (mean + 1.4 * (x - mean)).clamp(0, 1), atol=1e-6)


def test_saturation_moves_towards_luma_and_grey_is_luma():
    pixels = picture(1, 1, 3, 6, 6)
    x = pixels.float() / 255
    luma = (x * LUMA[:, None, None]).sum(2, keepdim=True)
    assert torch.allclose(photometric(pixels, params(saturation=0.8)), luma + 0.8 * (x - luma), atol=1e-6)
    assert torch.allclose(photometric(pixels, params(grey=1.0, hue=0.07)), luma.expand_as(x), atol=1e-6)


def test_hue_is_a_rotation_in_yiq():
    yiq = torch.tensor([[0.299, 0.587, 0.114], [0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]])
    angle = -0.08 * 2 * math.pi  # from I towards Q is from red towards violet, so a positive hue turns back
    turn = torch.tensor([[1, 0, 0], [0, math.cos(angle), -math.sin(angle)], [0, math.sin(angle), math.cos(angle)]])
    colour = torch.tensor([120, 90, 140], dtype=torch.uint8)
    expected = torch.linalg.inv(yiq) @ turn @ yiq @ (colour.float() / 255)
    out = photometric(colour.view(1, 1, 3, 1, 1), params(hue=0.08)).flatten()
    assert torch.allclose(out, expected, atol=1e-5)
    red, green, blue = photometric(torch.tensor([255, 0, 0]).view(1, 1, 3, 1, 1).byte(), params(hue=1 / 3)).flatten()
    assert green > 0.5 > red and green > 0.5 > blue
    grey = photometric(torch.full((1, 1, 3, 2, 2), 77, dtype=torch.uint8), params(hue=0.1, saturation=1.2))
    assert torch.allclose(grey, torch.full_like(grey, 77 / 255), atol=1e-6)


def test_solarise_inverts_from_128_on():
    pixels = torch.tensor([0, 127, 128, 255], dtype=torch.uint8).view(1, 1, 1, 1, 4).expand(1, 1, 3, 1, 4)
    out = photometric(pixels, params(solarise=1.0))[0, 0, 0, 0]
    assert torch.equal((out * 255).round(), torch.tensor([0.0, 127.0, 127.0, 0.0]))


def gaussian_blur(x: np.ndarray, sigma: float) -> np.ndarray:
    """[H, W] blurred by definition: nine taps, mirrored border."""
    reach = 4
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    weights /= weights.sum()
    for axis in (0, 1):
        padding = [(reach, reach) if a == axis else (0, 0) for a in (0, 1)]
        padded = np.pad(x, padding, mode="reflect")
        x = sum(w * np.roll(padded, -k, axis).take(range(x.shape[axis]), axis) for k, w in enumerate(weights))
    return x


@pytest.mark.parametrize("sigma", [0.1, 0.6, 1.3, 2.0])
def test_blur_is_a_gaussian_with_mirrored_border(sigma):
    pixels = picture(1, 1, 3, 32, 40)
    out = photometric(pixels, params(sigma=sigma))[0, 0].numpy()
    for channel in range(3):
        expected = gaussian_blur(pixels[0, 0, channel].double().numpy() / 255, sigma)
        assert np.abs(out[channel] - expected).max() < 1e-5


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_blur_fits_any_size(size):
    flat = torch.full((1, 1, 3, size, size), 200, dtype=torch.uint8)
    assert torch.allclose(photometric(flat, params(sigma=2.0)), torch.tensor(200 / 255), atol=1e-6)


def test_every_sample_and_view_has_its_own_parameters():
    views = ViewsConfig(globals=2, locals=2)
    pixels = picture(4, 6, 3, 20, 20)
    drawn = np.stack([draw_photometric(views, sample_rng(2, p)) for p in range(6)], axis=1)
    together = photometric(pixels, drawn)
    assert together.min() >= -1e-6 and together.max() <= 1 + 1e-6
    for v in range(4):
        for b in range(6):
            alone = photometric(pixels[v : v + 1, b : b + 1], drawn[v : v + 1, b : b + 1])
            assert torch.allclose(together[v, b], alone[0, 0], atol=1e-5)
    assert torch.equal(together, photometric(pixels, drawn))


def test_grey_keeps_one_channel_pictures_grey_and_still_changes_them():
    views = ViewsConfig(globals=2, locals=2, photometric="grey")
    params = np.stack([draw_photometric(views, sample_rng(0, i)) for i in range(64)], 1)[:2]
    one = torch.randint(256, (2, 64, 1, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    made = augmented(one.expand(-1, -1, 3, -1, -1), params, (0.5,) * 3, (0.5,) * 3)
    assert (made - made[:, :, :1]).abs().max() < 1e-5
    plain = (one.float() / 255 - 0.5) / 0.5
    assert ((made - plain).abs().amax((2, 3, 4)) > 0.05).float().mean() > 0.7


def test_autocast_does_not_coarsen_the_pixels():
    pixels, row = picture(1, 2, 3, 24, 24), params(brightness=1.1, hue=0.05, sigma=0.0)
    row = np.concatenate([row, params(sigma=1.5)], 1)
    expected = photometric(pixels, row)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(photometric(pixels, row), expected)


# ---------------------------------------------------------------- beside the published augmentation


def published(image: Image.Image, row: np.ndarray, rng: random.Random) -> np.ndarray:
    """One view by Pillow alone, op by op on 8-bit pixels as the DINO papers' code does it: jitter in random order with
    hue turned in HSV, grey, blur, solarise. [3, H, W] in [0, 1]."""
    brightness, contrast, saturation, hue, grey, sigma, solarise = row.tolist()

    def turned(x: Image.Image) -> Image.Image:
        h, s, v = x.convert("HSV").split()
        return Image.merge("HSV", (h.point(lambda p: (p + round(hue * 255)) % 256), s, v)).convert("RGB")

    steps = [
        lambda x: ImageEnhance.Brightness(x).enhance(brightness),
        lambda x: ImageEnhance.Contrast(x).enhance(contrast),
        lambda x: ImageEnhance.Color(x).enhance(saturation),
        turned,
    ]
    rng.shuffle(steps)
    for step in steps if brightness != 1 else ():
        image = step(image)
    if grey:
        image = ImageOps.grayscale(image).convert("RGB")
    pixels = np.asarray(image, float).transpose(2, 0, 1) / 255
    if sigma:
        pixels = np.stack([gaussian_blur(channel, sigma) for channel in pixels])
    if solarise:
        pixels = np.where(pixels >= 127.5 / 255, 1 - pixels, pixels)
    return pixels


def test_statistics_of_photographs_are_those_of_the_published_augmentation(photographs):
    """The same draws put on real pictures in both ways. What differs (order, clamps, hue in YIQ) must not show in the
    distribution of brightness, spread, colourfulness and sharpness of the views: Kolmogorov-Smirnov, and means."""
    views, rng = ViewsConfig(globals=2, locals=2, local_size=64), random.Random(0)
    files = sorted((photographs / "coco128").rglob("*.webp"))[:40]
    rows, ours, theirs = [], [], []
    for position, file in enumerate(files):
        small = Image.open(file).convert("RGB").resize((64, 64))
        drawn = draw_photometric(views, sample_rng(3, position))
        pixels = torch.from_numpy(np.array(small)).permute(2, 0, 1).expand(4, 1, 3, 64, 64)
        rows += list(drawn)
        ours += list(photometric(pixels, drawn[:, None])[:, 0].double().numpy())
        theirs += [published(small, row, rng) for row in drawn]

    def measured(x: np.ndarray) -> list[float]:
        luma = np.tensordot((0.299, 0.587, 0.114), x, 1)
        return [luma.mean(), luma.std(), (x.max(0) - x.min(0)).mean(), np.abs(np.diff(luma, axis=1)).mean()]

    a, b = (np.array([measured(x) for x in side]) for side in (ours, theirs))
    for column, name in enumerate(("brightness", "spread", "colourfulness", "sharpness")):
        grid = np.concatenate([a[:, column], b[:, column]])
        share = [np.searchsorted(np.sort(x[:, column]), grid, side="right") / len(x) for x in (a, b)]
        # 160 views each: at 0.19 two samples of one distribution differ by chance in one of 200 draws
        assert np.abs(share[0] - share[1]).max() < 0.15, name
        assert abs(a[:, column].mean() / b[:, column].mean() - 1) < 0.05, name
        assert np.corrcoef(a[:, column], b[:, column])[0, 1] > 0.95, name
