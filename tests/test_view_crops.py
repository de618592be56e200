"""Crops beside Pillow's: antialiased bicubic of the same box, of the same pixels and of a picture decoded smaller.

Gives: tests of data/views and data/images together, on JPEG files.
Used by: pytest.
"""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from silc.config import ViewsConfig
from silc.data import views as views_module
from silc.data.images import Picture, shrink_for
from silc.data.views import cut, draw_crops, draw_photometric, photometric, sample_rng, spare


def scene(height: int, width: int) -> Image.Image:
    """Shading, edges and grain."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:height, 0:width].astype(float)
    pixels = 128 + 70 * np.sin(x / 37 + y / 53)[..., None] * (1, 0.7, -0.8)
    pixels = pixels + np.where((x // 9 + y // 13) % 2 == 0, 25, -25)[..., None]
    return Image.fromarray((pixels + rng.normal(0, 6, (height, width, 3))).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("height, width, shrink, most", [(375, 500, 1, 0.5), (768, 1024, 2, 3.5), (1600, 1600, 4, 4.0)])
def test_a_crop_is_pillows_bicubic_of_its_box(height, width, shrink, most):
    """Within half a grey level on average where all pixels were decoded; where fewer were, the picture is a little
    smoother than the same box of the whole picture."""
    buffer = io.BytesIO()
    scene(height, width).save(buffer, "JPEG", quality=92)
    picture, whole = Picture(buffer.getvalue(), 10**8), Image.open(buffer)
    views = ViewsConfig(globals=6, global_size=224, global_scale=(0.4, 1.0), locals=6, local_size=96)
    seed = next(s for s in range(50) if shrink_for(spare(draw_crops(height, width, views, sample_rng(0, s)))) == shrink)
    # boxes that lie on the pixels of the smaller picture too, so that nothing but the decoding differs
    crops = [
        c._replace(**{side: getattr(c, side) // shrink * shrink for side in ("top", "left", "height", "width")})
        for c in draw_crops(height, width, views, sample_rng(0, seed))
    ]
    out = [torch.empty(c.size, c.size, 3, dtype=torch.uint8) for c in crops]
    cut(picture.pixels(shrink), crops, height, width, out)
    for c, made in zip(crops, out):
        box = whole.crop((c.left, c.top, c.left + c.width, c.top + c.height))
        wanted = np.asarray(box.resize((c.size, c.size), Image.Resampling.BICUBIC), float)
        difference = np.abs(made.numpy() - (wanted[:, ::-1] if c.mirrored else wanted))
        assert difference.mean() < most
        assert shrink > 1 or np.quantile(difference, 0.999) <= 2


@pytest.mark.parametrize("at_once", [1, 5 * 3 * 20 * 20])
def test_how_many_views_are_worked_on_at_a_time_changes_nothing(at_once, monkeypatch):
    views = ViewsConfig(globals=2, locals=2)
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 6, 20, 20, 3), dtype=np.uint8))
    rows = np.stack([draw_photometric(views, sample_rng(2, p)) for p in range(6)], 1)
    plain = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    expected = photometric(pixels.movedim(-1, -3).contiguous(), rows, *plain)
    monkeypatch.setattr(views_module, "IN_CACHE", at_once)
    # channels last, as the loader hands them over
    torch.testing.assert_close(photometric(pixels.movedim(-1, -3), rows, *plain), expected, rtol=0, atol=1e-6)


def test_augmented_pixels_can_be_trained_on():
    pixels = torch.randint(0, 256, (2, 3, 3, 16, 16), dtype=torch.uint8)
    rows = np.stack([draw_photometric(ViewsConfig(globals=2), sample_rng(0, p)) for p in range(3)], 1)
    out = photometric(pixels, rows, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    weight = torch.ones(3, requires_grad=True)
    (out * weight[:, None, None]).sum().backward()
    assert not out.is_inference() and weight.grad is not None
