"""Named configs. A recipe is a function that returns a `Config`; its name is the function's with dashes.

Gives: get (by name), names, one function per recipe.
Used by: cli.py, quickstart.py.
"""

from __future__ import annotations

from dataclasses import replace

from silc.config import (
    CatSegConfig,
    Config,
    DataConfig,
    EvalConfig,
    ImageTowerConfig,
    InitConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    PreprocessConfig,
    PrototypeConfig,
    RetentionConfig,
    Term,
    TextTowerConfig,
    TrainConfig,
    ViewsConfig,
)
from silc.plain import nearest

SOFTMAX_SCALE = 1 / 0.07
DINO_VIEWS = ViewsConfig(globals=2, locals=8, photometric="dino")


def clip() -> Config:
    """CLIP ViT-B/16 at 256 px: softmax contrastive loss on one mildly cropped view. The baseline of the paper."""
    model = ModelConfig(scale_init=SOFTMAX_SCALE, bias_init=None)
    optim = OptimConfig(schedule="rsqrt", warmup=0.04, cooldown=0.04)
    return Config("clip", model=model, optim=optim, train=TrainConfig(batch=16384, samples=20_000_000_000))


def siglip() -> Config:
    """SigLIP ViT-B/16: the sigmoid contrastive loss."""
    base = clip()
    return replace(base, recipe="siglip", model=ModelConfig(), objective=replace(base.objective, kind="sigmoid"))


def views_only() -> Config:
    """Two augmented global views, each aligned with the text, without distillation: the paper's strong baseline."""
    return replace(clip(), recipe="views-only", views=replace(DINO_VIEWS, locals=0))


def silc() -> Config:
    """SILC-C: softmax contrastive on 2 global views + distillation of 8 local views from an EMA teacher."""
    base = clip()
    return replace(base, recipe="silc", views=DINO_VIEWS, objective=replace(base.objective, distill=Term(1.0)))


def silc_lean() -> Config:
    """SILC for 1.4 times CLIP's FLOPs instead of 3.2: one global and one larger local view, a head of two layers.

    Not of the paper: found by this project's studies at toy size (docs/experiments/main)."""
    base = silc()
    views = replace(DINO_VIEWS, globals=1, locals=1, local_scale=(0.1, 0.6))
    prototypes = replace(base.objective.prototypes, layers=2)
    return replace(base, recipe="silc-lean", views=views, objective=replace(base.objective, prototypes=prototypes))


def silc_s() -> Config:
    """SILC-S: the same with the sigmoid loss."""
    base = siglip()
    return replace(base, recipe="silc-s", views=DINO_VIEWS, objective=replace(base.objective, distill=Term(1.0)))


def siglip2_style() -> Config:
    """SigLIP 2's terms, without its captioning decoder: sigmoid, then distillation and masking in the last 20%.

    The text loss reads the original image, the other two one augmented global view; weights as published for B."""
    base = silc_s()
    objective = replace(
        base.objective, contrast_views="original", distill=Term(0.25, 0.8), masked=Term(0.0625, 0.8), mask_ratio=0.5
    )
    return replace(base, recipe="siglip2-style", objective=objective, views=replace(DINO_VIEWS, globals=1))


def tips_style() -> Config:
    """TIPSv2's terms: softmax, distillation, masked prediction on all tokens, head-only EMA; only crops and flips."""
    base = silc()
    objective = replace(
        base.objective, masked=Term(2.0), masked_form="all", mask_ratio=0.75, teacher="head", contrast_views="global"
    )
    views = ViewsConfig(globals=1, locals=6)
    return replace(base, recipe="tips-style", objective=objective, views=views)


def _adapt(name: str, samples: int, batch: int, lr: float, tower_lr: float, anchor: float) -> Config:
    """Continued training: heads warmed up on frozen towers, distillation ramped in, small steps, a slow teacher."""
    objective = ObjectiveConfig(
        kind="auto",
        distill=Term(0.5, ramp=0.2),
        anchor=Term(anchor),
        prototypes=PrototypeConfig(count=8192),
        teacher="full",
        momentum=0.999,
        momentum_batch=batch,
        teacher_temp=0.05,
    )
    views = ViewsConfig(globals=1, global_size=0, global_scale=(0.5, 1.0), locals=6, local_size=0)
    return Config(
        name,
        init=InitConfig(freeze=0.1, image_lr=tower_lr, text_lr=tower_lr),
        objective=objective,
        views=views,
        optim=OptimConfig(lr=lr, betas=(0.9, 0.98), weight_decay=0.01, warmup=0.05),
        train=TrainConfig(batch=batch, samples=samples, save_every=200),
        eval=EvalConfig(every=200),
        retention=RetentionConfig(action="save"),
    )


def adapt_10k() -> Config:
    """Add SILC to a trained model (--init.model) with about 10,000 pairs of a domain: short, anchored, tiny steps."""
    return _adapt("adapt-10k", samples=100_000, batch=128, lr=5e-4, tower_lr=0.01, anchor=1.0)


def adapt_100k() -> Config:
    """The same with about 100,000 pairs: ten times the samples, a lighter anchor."""
    return _adapt("adapt-100k", samples=1_000_000, batch=512, lr=5e-4, tower_lr=0.02, anchor=0.5)


def adapt_1m() -> Config:
    """The same with a million pairs and more: no anchor, larger steps."""
    return _adapt("adapt-1m", samples=10_000_000, batch=2048, lr=1e-3, tower_lr=0.03, anchor=0.0)


def high_resolution() -> Config:
    """A short last stage of a trained model (--init.model) at a larger --init.image-size; the terms stay on."""
    base = _adapt("high-resolution", samples=2_000_000, batch=512, lr=2e-4, tower_lr=0.05, anchor=0.0)
    init = replace(base.init, image_size=384)
    return replace(base, init=init, views=replace(base.views, global_scale=(0.7, 1.0)))


def mu() -> Config:
    """Everything on, as small as it gets (width 32, depth 2): for tests and for trying commands."""
    image = ImageTowerConfig(image_size=32, patch=8, width=32, depth=2, heads=2, mlp=64)
    text = TextTowerConfig(vocab=384, length=16, width=32, depth=2, heads=2, mlp=64)
    model = ModelConfig(image, text, PreprocessConfig(size=32), embed_dim=32, scale_init=SOFTMAX_SCALE, bias_init=None)
    objective = ObjectiveConfig(
        distill=Term(1.0),
        masked=Term(0.5),
        prototypes=PrototypeConfig(count=64, hidden=32, bottleneck=16),
        momentum=0.99,
        momentum_batch=16,
    )
    return Config(
        "mu",
        model=model,
        objective=objective,
        views=ViewsConfig(globals=2, global_size=32, locals=2, local_size=16, photometric="dino"),
        data=DataConfig(workers=0),
        optim=OptimConfig(lr=2e-3, warmup=0.1),
        train=TrainConfig(batch=16, samples=640, save_every=20, log_every=5),
    )


def quickstart() -> Config:
    """SILC on composed emoji scenes, sized for two CPU cores and ten minutes: few tokens, head-only EMA."""
    image = ImageTowerConfig(image_size=64, patch=16, width=128, depth=4, heads=4, mlp=512, pool="mean", proj="linear")
    text = TextTowerConfig(vocab=4096, length=24, width=128, depth=1, heads=4, mlp=512, pool="mean", proj="linear")
    preprocess = PreprocessConfig(size=64)
    objective = ObjectiveConfig(
        distill=Term(0.5),
        prototypes=PrototypeConfig(count=2048, hidden=256, bottleneck=64),
        teacher="head",
        momentum=0.99,
        momentum_batch=256,
        teacher_temp=0.05,
    )
    return Config(
        "quickstart",
        model=ModelConfig(image, text, preprocess, embed_dim=128, scale_init=SOFTMAX_SCALE, bias_init=None),
        objective=objective,
        views=ViewsConfig(globals=1, global_size=64, global_scale=(0.8, 1.0), locals=3, local_size=32, flip=False),
        data=DataConfig(text_key="captions", workers=1),
        optim=OptimConfig(lr=2e-3, weight_decay=0.05),
        train=TrainConfig(batch=256, samples=256 * 800, save_every=250, log_every=10),
    )


def catseg() -> Config:
    """A CAT-Seg head on a trained model (--init.model): open-vocabulary segmentation from pictures with masks.

    Hyper-parameters as published for ViT-B/16 on COCO-Stuff: 80,000 steps of 4 crops of 384 px. --init.image-size 336
    for patches of 14 px."""
    return Config(
        "catseg",
        init=InitConfig(image_size=384, image_lr=0.01, text_lr=0.01),
        model=ModelConfig(catseg=CatSegConfig()),
        objective=ObjectiveConfig(kind="auto"),
        views=ViewsConfig(global_size=0, photometric="ssd"),
        optim=OptimConfig(lr=2e-4, betas=(0.9, 0.999), weight_decay=1e-4, clip=0.01, warmup=0.0),
        train=TrainConfig(batch=4, samples=320_000, save_every=5000),
        eval=EvalConfig(every=5000),
    )


RECIPES = (clip, siglip, silc, silc_lean, silc_s, views_only, siglip2_style, tips_style,
           adapt_10k, adapt_100k, adapt_1m, high_resolution, catseg, quickstart, mu)


def names() -> dict[str, str]:
    """Recipe name -> first line of what it is."""
    return {f.__name__.replace("_", "-"): (f.__doc__ or "").split("\n")[0].strip() for f in RECIPES}


def get(name: str) -> Config:
    """The recipe of that name. ValueError names the nearest one otherwise."""
    for recipe in RECIPES:
        if recipe.__name__.replace("_", "-") == name.replace("_", "-"):
            return recipe()
    raise ValueError(f"no recipe {name!r}." + nearest(name, names()))
