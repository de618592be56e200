"""From a JPEG to 2 views of 224 px and 8 of 96 px beside other libraries: `python benchmarks/data_path.py`.

Gives: benchmarks/results/data_path.json: pictures a second on one core, the libraries in turns, for 32 photographs of
500 x 375 (as most of the web compresses, and heavy) and of 1024 x 768; the floor is decoding alone. silc's `uint8` is
what a worker does for a GPU, which then puts the colours on; `float` does all of it on the CPU, as the peers do. That
crops are Pillow's antialiased bicubic ones is checked in the same run.
Used by: pages.py. Photographs come from the folder that SILC_TEST_DATA names (else ../shared/data): small pictures laid
out like tiles at their own resolution, so that detail is as dense as in a photograph. Without them, drawn noise.
"""

from __future__ import annotations

import io
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import arguments, check, have, interleave, median, pin, ratio, target, timed, write
from PIL import Image
from torch import Tensor

from silc.config import ViewsConfig
from silc.data.images import Picture, shrink_for
from silc.data.views import cut, draw_crops, draw_photometric, photometric, room_for, sample_rng, spare
from silc.parallel import keep_memory

WHY: dict[str, str] = {
    "JPEG of 500x375 to 2 + 8 views, silc uint8": "Decoding alone takes a third of the time, and a picture of this "
    "size can hardly ever be decoded smaller. Most of the rest is PyTorch's antialiased resize, of which about 10 us a "
    "call, two calls a view, compute its weights anew whatever the view holds: 0.2 ms a picture. The bound is the row "
    "`decode only` below: its share is what no faster resize could take away.",
    "JPEG of 500x375 to 2 + 8 views, silc float": "Half of the time is that of the uint8 views; of the other half, "
    "blur in 18 passes over the pixels takes most: PyTorch has no quick convolution of few channels on a CPU.",
}
VIEWS = ViewsConfig(globals=2, global_size=224, locals=8, local_size=96, photometric="dino")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BLUR, SOLARISE = (1.0, 0.1, 0.5), 0.2
PICTURES = {"500x375": (500, 375, 82), "500x375, heavy": (500, 375, 95), "1024x768": (1024, 768, 82)}
"""Width, height, JPEG quality."""
FLOOR, UINT8, FLOAT, DINOV2 = "decode only", "silc uint8", "silc float", "DINOv2"
AREA, CUBIC = "albumentations, area", "albumentations, cubic (aliased)"
MOST_LEVELS = {"whole": 1.0, "scaled": 4.0}
"""Grey levels by which a crop may differ from Pillow's on average; a picture decoded smaller is a little smoother."""

Call = Callable[[bytes], object]


# ---------------------------------------------------------------- photographs


def tiles() -> tuple[list[Image.Image], str]:
    """Small pictures, and what they are."""
    here = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("SILC_TEST_DATA", here))
    names = [folder / name for name in ("coco128/images", "camvid/test", "caltech101/test")]
    files = sorted(path for name in names for path in name.rglob("*.webp"))
    order = np.random.default_rng(0).permutation(len(files))[:400]
    if files:
        return [Image.open(files[i]).convert("RGB") for i in order], "photographs (coco128, camvid, caltech101)"
    rng = np.random.default_rng(0)
    cells = rng.integers(40, 216, (40, 16, 21, 3), dtype=np.uint8)
    large = [Image.fromarray(cell).resize((171, 128), Image.Resampling.BICUBIC) for cell in cells]
    grainy = [np.asarray(image) + rng.normal(0, 8, (128, 171, 1)) for image in large]
    return [Image.fromarray(x.clip(0, 255).astype(np.uint8)) for x in grainy], "drawn noise (no photographs here)"


def photographs(small: Sequence[Image.Image], width: int, height: int, quality: int, count: int) -> list[bytes]:
    made, rng = [], random.Random(0)
    for _ in range(count):
        whole = Image.new("RGB", (width, height))
        for top in range(0, height, 128):
            left = 0
            while left < width:
                tile = rng.choice(small)
                whole.paste(tile, (left, top))
                left += tile.width
        buffer = io.BytesIO()
        whole.save(buffer, "JPEG", quality=quality)
        made.append(buffer.getvalue())
    return made


# ---------------------------------------------------------------- silc


def cut_all(files: Sequence[bytes]) -> tuple[dict[str, Tensor], np.ndarray]:
    """As a worker of the loader: uint8 [G, n, S, S, 3] and [L, n, s, s, 3], and the parameters of their colours."""
    room = room_for(VIEWS, len(files))
    return room, np.stack([cut_one(row, data, room) for row, data in enumerate(files)], 1)


@torch.inference_mode()
def cut_one(row: int, data: bytes, room: dict[str, Tensor]) -> np.ndarray:
    rng, picture = sample_rng(0, row), Picture(data, 10**8)
    crops = draw_crops(picture.height, picture.width, VIEWS, rng)
    image = picture.pixels(shrink_for(spare(crops)))
    cut(image, crops, picture.height, picture.width, [view[row] for kind in room.values() for view in kind])
    return draw_photometric(VIEWS, rng)


def all_on_cpu(files: Sequence[bytes]) -> list[Tensor]:
    """Float, normalised: [G, n, 3, S, S] and [L, n, 3, s, s]."""
    room, params = cut_all(files)
    parts = (params[: VIEWS.globals], params[VIEWS.globals :])
    return [photometric(kind.movedim(-1, -3), part, MEAN, STD) for kind, part in zip(room.values(), parts)]


def crop_checks(size: str, files: Sequence[bytes]) -> list[dict[str, Any]]:
    """silc's crops beside Pillow's, from the same pixels and, where the picture may be decoded smaller, from all."""
    pairs: dict[str, list[tuple[Tensor, Tensor]]] = {"whole": [], "scaled": []}
    for row, data in enumerate(files):
        picture, pillow = Picture(data, 10**8), Image.open(io.BytesIO(data)).convert("RGB")
        crops = draw_crops(picture.height, picture.width, VIEWS, sample_rng(0, row))
        shrink = shrink_for(spare(crops))
        image = picture.pixels(shrink)
        if shrink > 1:  # boxes lie on the pixels of the smaller picture
            crops = [
                c._replace(**{side: getattr(c, side) // shrink * shrink for side in ("top", "left", "height", "width")})
                for c in crops
            ]
        places = [torch.empty((c.size, c.size, 3), dtype=torch.uint8) for c in crops]
        cut(image, crops, picture.height, picture.width, places)
        for c, made in zip(crops, places):
            box = pillow.crop((c.left, c.top, c.left + c.width, c.top + c.height))
            wanted = torch.from_numpy(np.array(box.resize((c.size, c.size), Image.Resampling.BICUBIC)))
            kind = "whole" if shrink == 1 else "scaled"
            pairs[kind].append((made.flatten().float(), (wanted.flip(1) if c.mirrored else wanted).flatten().float()))
    checks = []
    for kind, found in pairs.items():
        if found:
            got, wanted = (torch.cat(side) for side in zip(*found))
            entry = check(f"{size}, decoded {kind}: crops = Pillow's bicubic", got, wanted, 0.1)
            levels = (got - wanted).abs().mean().item()
            checks.append(
                {**entry, "mean_grey_levels": levels, "holds": entry["holds"] and levels <= MOST_LEVELS[kind]}
            )
    return checks


# ---------------------------------------------------------------- peers


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def dinov2_call() -> dict[str, Call]:
    """As shipped: by mistake it blurs with one minus the published probability (0, 0.9, 0.5), about as often in sum."""
    if not (peers := have("dinov2.data.augmentations")):
        return {}
    views = peers[0].DataAugmentationDINO(VIEWS.global_scale, VIEWS.local_scale, 8, 224, 96)
    return {DINOV2: lambda data: views(opened(data))}


def lightly_call() -> dict[str, Call]:
    if not (peers := have("lightly.transforms")):
        return {}
    scales = {"global_crop_scale": VIEWS.global_scale, "local_crop_scale": VIEWS.local_scale}
    views = peers[0].DINOTransform(n_local_views=8, **scales)
    return {"lightly": lambda data: views(opened(data))}


def torchvision_call() -> dict[str, Call]:
    """Its second interface on uint8 tensors, which is the quicker one; decoded as silc does."""
    if not (peers := have("torchvision.transforms.v2")):
        return {}
    v2: Any = peers[0]

    def view(size: int, scale: tuple[float, float], blur: float, solarise: float) -> Any:
        steps = [v2.RandomResizedCrop(size, scale, interpolation=v2.InterpolationMode.BICUBIC, antialias=True)]
        steps += [v2.RandomHorizontalFlip(), v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8)]
        steps += [v2.RandomGrayscale(0.2), v2.RandomApply([v2.GaussianBlur(9, (0.1, 2.0))], blur)]
        steps += [v2.RandomSolarize(128, solarise)] if solarise else []
        return v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])

    views = ten_views(view)

    def call(data: bytes) -> object:
        image = Picture(data, 10**8).pixels()
        return [one(image) for one in views]

    return {"torchvision v2": call}


def albumentations_calls() -> dict[str, Call]:
    if not (peers := have("albumentations", "albumentations.pytorch", "cv2")):
        return {}
    a, to, cv2 = (peer for peer in peers)
    cv2.setNumThreads(1)

    def maker(interpolation: int) -> Call:
        def view(size: int, scale: tuple[float, float], blur: float, solarise: float) -> Any:
            jitter = a.ColorJitter((0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1), p=0.8)
            steps = [a.RandomResizedCrop(size=(size, size), scale=scale, interpolation=interpolation)]
            steps += [a.HorizontalFlip(p=0.5), jitter, a.ToGray(p=0.2)]
            steps += [a.GaussianBlur(blur_limit=(9, 9), sigma_limit=(0.1, 2.0), p=blur)]
            steps += [a.Solarize(threshold_range=(0.5, 0.5), p=solarise)] if solarise else []
            return a.Compose([*steps, a.Normalize(MEAN, STD), to.ToTensorV2()])

        views = ten_views(view)

        def call(data: bytes) -> object:
            image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
            return [one(image=image)["image"] for one in views]

        return call

    return {AREA: maker(cv2.INTER_AREA), CUBIC: maker(cv2.INTER_CUBIC)}


def ten_views(view: Callable[[int, tuple[float, float], float, float], Any]) -> list[Any]:
    first, second = (view(224, VIEWS.global_scale, BLUR[i], SOLARISE * i) for i in (0, 1))
    return [first, second, *[view(96, VIEWS.local_scale, BLUR[2], 0.0)] * 8]


# ---------------------------------------------------------------- all together


def one_by_one(call: Call, files: Sequence[bytes]) -> Callable[[], None]:
    def run() -> None:
        for data in files:
            call(data)

    return run


def main() -> None:
    args = arguments(__doc__)
    pin(1, args.quick)
    keep_memory()  # as `silc train` does; the peers in this process have it too
    torch.manual_seed(0)
    random.seed(0)
    small, origin = tiles()
    peers = {**dinov2_call(), **lightly_call(), **torchvision_call(), **albumentations_calls()}
    count, rows, targets, checks = 2 if args.quick else 32, [], [], []
    for size in list(PICTURES)[:1] if args.quick else PICTURES:
        files = photographs(small, *PICTURES[size], count)
        bits = 8 * sum(map(len, files)) / count / (PICTURES[size][0] * PICTURES[size][1])
        checks += crop_checks(size, files)
        cases: dict[str, Callable[[], object]] = {
            UINT8: lambda files=files: cut_all(files),
            FLOAT: lambda files=files: all_on_cpu(files),
            FLOOR: one_by_one(lambda data: Picture(data, 10**8).pixels(), files),
            **{name: one_by_one(call, files) for name, call in peers.items()},
        }
        seconds = interleave(cases, args.rounds)
        for name, s in seconds.items():
            row = timed(name, s, picture=size, bits_per_pixel=round(bits, 2))
            row["pictures_per_second"] = count / median(s)
            row |= {f"times_the_time_of_{mine}": ratio(s, seconds[mine]) for mine in (UINT8, FLOAT)}
            rows.append(row)
        if size == "500x375":
            claims = ((UINT8, DINOV2, 15.0), (FLOAT, DINOV2, 6.0), (FLOAT, AREA, 1.5))
            for mine, theirs, least in claims:
                if theirs in seconds:
                    what = f"JPEG of 500x375 to 2 + 8 views, {mine}: speed"
                    targets.append(target(what, theirs, ratio(seconds[theirs], seconds[mine]), least=least))
    write(args.out, "data_path", rows, targets, checks, rounds=args.rounds, pictures=count, origin=origin)


if __name__ == "__main__":
    main()
