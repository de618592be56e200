"""A study as data: which recipes, for how long, with which seeds; and the studies that silc comes with.

Gives: Study, Arm, Cell, Grid; `get` (a study by name or from a file), `names`, `config_of`, `merged`.
Used by: study/running, study/page, the command line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from silc import recipes
from silc.config import Config
from silc.data.emoji import Corpus
from silc.plain import from_dict, load_json, nearest, to_dict


@dataclass(frozen=True)
class Arm:
    """One way to train: a recipe and what is changed in it, as nested settings by name."""

    recipe: str
    change: dict[str, Any] = field(default_factory=dict)
    about: str = ""


@dataclass(frozen=True)
class Grid:
    """The corpus of drawings, see data/vectors."""

    scenes: int = 4_000
    size: int = 80
    """Side of a scene in pixels."""
    styles: int = 6
    """Names that fewer styles draw are left out."""
    limit: int | None = 360
    """Names that are kept of these."""
    seed: int = 0


@dataclass(frozen=True)
class Study:
    """Every arm, at every duration, with the seeds of that duration."""

    name: str
    question: str
    arms: dict[str, Arm]
    samples: tuple[int, ...]
    """Durations in pairs seen."""
    seeds: tuple[tuple[int, ...], ...]
    """For each duration."""
    common: dict[str, Any] = field(default_factory=dict)
    """Changed in every arm's recipe, before the arm's own changes."""
    corpus: Grid = field(default_factory=Grid)
    further: tuple[tuple[str, int, tuple[int, ...]], ...] = ()
    """Cells beside the grid: arm, pairs seen, seeds. The baseline at longer durations, say, or more seeds of some."""
    photographs: float = 0.0
    """Share of the pairs that are photographs (--photographs); with it, real photographs are scored too."""
    baseline: str = "clip"
    """The arm that the others are compared with."""
    scores: tuple[str, ...] = ("segment/scenes miou", "segment/known miou", "segment/scenes pixel_accuracy",
                               "zeroshot/style top1", "fewshot/style shot5",
                               "retrieval/scenes text_to_image_r5")  # fmt: skip
    """What is plotted and compared: a set and one of its metrics. The first is the one in question."""
    parts: dict[str, tuple[str, str]] = field(default_factory=dict)
    """What one change buys: its name -> the arm with it and the one without."""
    tuning: bool = False
    """Is it for choosing settings? Then it is scored on segment/tuning, which no other study looks at, and those never
    on segment/tuning."""
    head: dict[str, Any] = field(default_factory=dict)
    """With it, a CAT-Seg head is trained on cells of `head_samples` and `head_seeds`, and scored: changes of the recipe
    catseg."""
    head_samples: tuple[int, ...] = ()
    head_seeds: tuple[int, ...] = (0,)
    begins: bool = False
    """Do all arms begin from a trained model (--start)?"""

    def __post_init__(self) -> None:
        if len(self.samples) != len(self.seeds) or not self.arms:
            raise ValueError(f"study {self.name}: it needs arms, and a tuple of seeds for each of its durations.")
        if self.baseline not in self.arms:
            other = nearest(self.baseline, self.arms)
            raise ValueError(f"study {self.name}: no arm is called {self.baseline!r}.{other}")
        if strange := [arm for arm, *_ in self.further if arm not in self.arms]:
            raise ValueError(f"study {self.name}: no arm is called {strange[0]!r}.{nearest(strange[0], self.arms)}")
        if not 0 <= self.photographs < 1:
            raise ValueError(f"study {self.name}: photographs is a share of the pairs, from 0 to below 1.")

    def head_of(self, cell: Cell) -> dict[str, Any]:
        """Settings of the cell's head; empty where it gets none."""
        return self.head if cell.samples in self.head_samples and cell.seed in self.head_seeds else {}

    def cells(self) -> list[Cell]:
        """First the first seed of each duration, short ones first: a study that is cut off has said something."""
        grid = [Cell(arm, samples, seeds[turn]) for turn in range(max(map(len, self.seeds)))
                for samples, seeds in zip(self.samples, self.seeds) if turn < len(seeds)
                for arm in self.arms]  # fmt: skip
        beside = [Cell(arm, samples, seed) for arm, samples, seeds in self.further for seed in seeds]
        return list(dict.fromkeys([*grid, *beside]))


class Cell(NamedTuple):
    """One run of a study."""

    arm: str
    samples: int
    seed: int

    @property
    def key(self) -> str:
        return f"{self.arm}-{self.samples}-s{self.seed}"


def merged(base: Mapping[str, Any], *changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings with later ones in place of earlier ones."""
    found = dict(base)
    for change in changes:
        for key, value in change.items():
            inner = found.get(key)
            both = isinstance(value, Mapping) and isinstance(inner, Mapping)
            found[key] = merged(inner, value) if both else value  # type: ignore[arg-type]
    return found


def config_of(
    study: Study, cell: Cell, corpus: Corpus, out: Path, start: str = "", photographs: Path | None = None
) -> Config:
    """The settings of one run. ValueError for a recipe or a setting that is none, naming the arm."""
    arm = study.arms[cell.arm]
    data: dict[str, Any] = {"sources": [corpus.shards]}
    if photographs is not None:
        data = {"sources": [corpus.shards, str(photographs)], "weights": [1 - study.photographs, study.photographs]}
    own = {"recipe": cell.arm, "seed": cell.seed, "out": str(out), "train": {"samples": cell.samples},
           "data": data}  # fmt: skip
    if study.begins:
        own["init"] = {"model": start}
    try:
        return from_dict(Config, merged(to_dict(recipes.get(arm.recipe)), study.common, arm.change, own))
    except ValueError as error:
        raise ValueError(f"study {study.name}, arm {cell.arm}: {error}") from None


# ---------------------------------------------------------------- the studies that silc comes with

TINY: dict[str, Any] = {
    "model": {
        "image": {"image_size": 64, "patch": 16, "width": 128, "depth": 4, "heads": 4, "mlp": 512, "pool": "map",
                  "proj": "linear"},
        "text": {"vocab": 4096, "length": 24, "width": 128, "depth": 1, "heads": 4, "mlp": 512, "pool": "mean",
                 "proj": "linear"},
        "preprocess": {"size": 64}, "embed_dim": 128,
    },
    "objective": {"prototypes": {"count": 2048, "hidden": 256, "bottleneck": 64}, "momentum": 0.99,
                  "momentum_batch": 128, "teacher_temp": 0.07},
    "views": {"global_size": 64, "global_scale": [0.5, 1.0], "local_size": 32, "local_scale": [0.05, 0.4],
              "flip": False, "photometric": "none"},
    "data": {"text_key": "captions", "workers": 1},
    "optim": {"lr": 2e-3, "weight_decay": 0.05, "schedule": "cosine", "warmup": 0.05},
    "train": {"batch": 128, "precision": "bf16", "save_every": 250, "keep": 1},
}  # fmt: skip
"""Two million parameters, pictures of 64 px: what a CPU trains in minutes. Captions name sides and colours, so nothing
is mirrored or recoloured."""


HEAD: dict[str, Any] = {
    "model": {"catseg": {"width": 32, "window": 4, "decoder": [16, 8], "guides": [32, 16], "guide_widths": [8, 4],
                         "classes": 64}},
    "init": {"image_size": 128},
    "segment": {"tune": "qv"},
    "optim": {"lr": 1e-3, "warmup": 0.05},
    "train": {"batch": 8, "samples": 1600, "save_every": 200, "log_every": 20},
}  # fmt: skip
"""A CAT-Seg head for these towers: a quarter of the published widths, 200 steps of 8 pictures of 128 px."""
FEW = {"globals": 2, "locals": 4}
ONE = {"globals": 1, "locals": 4}
LEAN = {"globals": 1, "locals": 1, "local_scale": [0.1, 0.6]}
SHALLOW = {**TINY["objective"]["prototypes"], "layers": 2}
LATE = {"weight": 1.0, "start": 0.3}
MEAN = {"image": {"pool": "mean"}}


def main() -> Study:
    """SILC against CLIP, and what each part buys, on equal samples and equal FLOPs."""
    arms = {
        "clip": Arm("clip", {}, "one crop of at least half the picture, softmax loss"),
        "siglip": Arm("siglip", {}, "the same with the sigmoid loss"),
        "views-only": Arm("views-only", {"views": {"globals": 2, "locals": 0}}, "CLIP on two crops, no teacher"),
        "silc": Arm("silc", {"views": FEW}, "two global and four local views, EMA teacher of tower and head"),
        "silc-s": Arm("silc-s", {"views": FEW}, "the same with the sigmoid loss"),
        "silc-head": Arm("silc", {"views": FEW, "objective": {"teacher": "head"}},
                         "silc, whose teacher averages the head alone"),
        "silc-1g": Arm("silc", {"views": ONE}, "silc with one global view"),
        "silc-late": Arm("silc", {"views": {"globals": 1, "locals": 2}, "objective": {"distill": LATE}},
                         "one global and two local views, distillation from 30% of the run on"),
        "silc-lean": Arm("silc", {"views": LEAN, "objective": {"momentum": 0.966, "prototypes": SHALLOW}},
                         "one global and one larger local view, a faster teacher, a head of two layers"),
        "siglip2-style": Arm("siglip2-style", {"views": ONE}, "SigLIP, then distillation and masking in the last 20%"),
        "tips-style": Arm("tips-style", {"views": ONE},
                          "head-only EMA, distillation, and masked prediction on all patches"),
    }  # fmt: skip
    parts = {
        "softmax to sigmoid": ("siglip", "clip"), "a second view": ("views-only", "clip"),
        "distillation": ("silc", "views-only"), "the whole of SILC": ("silc", "clip"),
        "averaging the tower, not the head alone": ("silc", "silc-head"),
        "the second global view of SILC": ("silc", "silc-1g"), "starting late, with fewer views": ("silc-late", "silc"),
        "a lean SILC": ("silc-lean", "clip"),
        "masked prediction": ("tips-style", "silc-1g"),
    }  # fmt: skip
    return Study(
        "main", "Does self-distillation from an EMA teacher help a CLIP, and does it pay for its FLOPs?", arms,
        samples=(12_288, 24_576, 49_152, 98_304), seeds=((0,), (0, 1, 2), (0, 1, 2), (0,)), common=TINY, parts=parts,
        head=HEAD, head_samples=(49_152,), further=(
            *((arm, samples, seeds) for samples, seeds in ((24_576, (3, 4, 5)), (49_152, (3, 4, 5)),
                                                           (98_304, (1, 2, 3, 4)))
              for arm in ("clip", "silc", "silc-lean")),
            *((arm, 98_304, (5, 6, 7)) for arm in ("clip", "silc-lean")), ("silc-1g", 98_304, (1, 2)),
            ("clip", 196_608, (0, 1, 2)), ("clip", 262_144, (0, 1)), ("clip", 307_200, (0,)),
        ),
    )  # fmt: skip


def search() -> Study:
    """Settings that the sources leave open, and cheaper forms of SILC, one change at a time; for choosing."""
    def silc(about: str, views: dict[str, Any] | None = None, **objective: Any) -> Arm:
        return Arm("silc", {"views": {**ONE, **(views or {})}, "objective": objective}, about)

    def late(start: float) -> dict[str, float]:
        return {"weight": 1.0, "start": start}

    arms = {
        "clip": Arm("clip", {}, "the baseline"),
        "silc-1g": silc("silc with one global view; the arms below change it"),
        "late-30": silc("distillation from 30% of the run on", distill=late(0.3)),
        "late-60": silc("distillation from 60% of the run on", distill=late(0.6)),
        "two-locals": silc("two local views instead of four", {"locals": 2}),
        "two-late-30": silc("two local views, from 30% on", {"locals": 2}, distill=late(0.3)),
        "light": silc("distillation at half the weight", distill={"weight": 0.5}),
        "head": silc("the teacher averages the head alone", teacher="head"),
        "head-late-30": silc("the same, from 30% on", teacher="head", distill=late(0.3)),
        "clip-mean": Arm("clip", {"model": MEAN}, "clip, pooling by the mean instead of attention"),
        "silc-mean": Arm("silc", {"model": MEAN, "views": ONE}, "silc with one global view, pooling by the mean"),
        "slow": silc("momentum 0.998 instead of 0.99", momentum=0.998),
        "fast": silc("momentum 0.966", momentum=0.966),
        "sharp": silc("teacher temperature 0.04 instead of 0.07", teacher_temp=0.04),
        "original": silc("the text aligned with the whole picture, not the crop", contrast_views="original"),
        "both": silc("the text aligned with the whole picture and the crop", contrast_views="both"),
        "global": silc("two global views, each distilled into the other", {"globals": 2}, global_to_global=True),
        "colour": silc("DINO's colour augmentation", {"photometric": "dino"}),
        "shallow": silc("a head of two layers instead of three", prototypes=SHALLOW),
        "large-locals": silc("local views of 10 to 60% of the picture", {"local_scale": [0.1, 0.6]}),
    }  # fmt: skip
    left_open = {  # by the sources
        "the whole picture for the text loss": "original", "picture and crop for the text loss": "both",
        "global views into each other": "global", "DINO's colours": "colour", "momentum 0.998, not 0.99": "slow",
        "momentum 0.966, not 0.99": "fast", "a head of two layers, not three": "shallow",
    }  # fmt: skip
    return Study(
        "search", "Which open settings matter, and what is the cheapest SILC that keeps its dense gain?", arms,
        samples=(49_152,), seeds=((0,),), common=TINY, tuning=True,
        further=tuple((arm, 49_152, (1, 2)) for arm in ("clip", "silc-1g", *left_open.values())),
        parts={"SILC with one global view": ("silc-1g", "clip"),
               **{what: (arm, "silc-1g") for what, arm in left_open.items()}},
        scores=("segment/tuning miou", "segment/tuning pixel_accuracy", "zeroshot/style top1", "fewshot/style shot5",
                "retrieval/scenes text_to_image_r5"),
    )  # fmt: skip


def added() -> Study:
    """SILC added to a trained CLIP: how many pairs until the dense gain, and what it costs in zero-shot."""
    plain = {"objective": {"distill": {"weight": 0.0}}, "views": {"locals": 0}, "init": {"freeze": 0.0}}
    arms = {
        "clip": Arm("adapt-10k", plain, "more of what it was trained by"),
        "silc": Arm("adapt-10k", {"objective": {"distill": {"weight": 1.0}}},
                    "heads alone for the first tenth, then distillation ramped in"),
        "silc-anchored": Arm("adapt-10k", {"objective": {"distill": {"weight": 1.0}, "anchor": {"weight": 1.0}}},
                             "the same, held near the model that it began with"),
    }  # fmt: skip
    own = {"init": {"image_lr": 1.0, "text_lr": 1.0}, "objective": {"anchor": {"weight": 0.0}}, "optim": {"lr": 1e-3}}
    common = merged({name: part for name, part in TINY.items() if name != "model"}, {"views": ONE}, own)
    return Study(
        "added", "How many pairs of SILC until a trained CLIP's dense score rises, and what does zero-shot pay?",
        arms, samples=(6_144, 12_288, 24_576, 49_152), seeds=((0,), (0, 1, 2), (0, 1, 2), (0,)), common=common,
        parts={"SILC": ("silc", "clip"), "the anchor": ("silc-anchored", "silc")}, begins=True,
    )  # fmt: skip


def mixed() -> Study:
    """SILC against CLIP where a quarter of the pairs are photographs, scored on real photographs too."""
    chosen = {name: arm for name, arm in main().arms.items() if name in ("clip", "silc")}
    return Study(
        "mixed", "Does what self-distillation does on drawings hold where photographs come in?", chosen,
        samples=(49_152,), seeds=((0, 1, 2),), common=TINY, photographs=0.25,
        corpus=Grid(scenes=12_000), parts={"the whole of SILC": ("silc", "clip")},
        further=(("clip", 163_840, (0, 1, 2)),),  # as many FLOPs as silc has, and a little more
        scores=("segment/scenes miou", "segment/known miou", "zeroshot/style top1", "zeroshot/caltech101 top1",
                "fewshot/caltech101 shot10", "segment/camvid miou", "segment/coco128 pixel_accuracy",
                "retrieval/coco128 text_to_image_r5"),
    )  # fmt: skip


STUDIES: tuple[Callable[[], Study], ...] = (main, search, added, mixed)


def get(name: str) -> Study:
    """A study that silc comes with, or one in a JSON file (settings as in `Study`). ValueError names the nearest."""
    if name.endswith(".json"):
        return load_json(Path(name), Study)
    for make in STUDIES:
        if make.__name__ == name:
            return make()
    raise ValueError(f"no study {name!r}." + nearest(name, names()))


def names() -> dict[str, str]:
    return {make.__name__: (make.__doc__ or "").split("\n")[0].strip() for make in STUDIES}
