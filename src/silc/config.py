"""Every setting of silc as frozen, typed data.

Gives: `Config` and its parts.
Used by: everyone. Defaults live here and nowhere else; `recipes.py` derives named configs from them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Activation = Literal["gelu", "gelu_tanh", "quick_gelu"]
PositionResize = Literal["bicubic-antialias", "bicubic", "bilinear-antialias"]


# ---------------------------------------------------------------- model


@dataclass(frozen=True)
class ImageTowerConfig:
    """A ViT. The switches `pool`, `pre_norm`, `act`, `patch_bias` and `proj` tell the released families apart."""

    image_size: int = 256
    """Side of the square whose patch grid the position table has, in pixels; other sizes resize the table."""
    patch: int = 16
    """Side of a patch in pixels."""
    width: int = 768
    """Width of the tokens."""
    depth: int = 12
    """Number of blocks."""
    heads: int = 12
    """Attention heads; they share the width."""
    mlp: int = 3072
    """Hidden width of the MLPs (also of the MAP head's)."""
    pool: Literal["map", "cls", "mean"] = "map"
    """From tokens to one vector: attention pooling (SigLIP), class token (CLIP), or mean."""
    act: Activation = "gelu_tanh"
    """Activation of the MLPs; the tanh form is what JAX calls gelu."""
    norm_eps: float = 1e-6
    """Epsilon of the layer norms: 1e-6 in SigLIP, 1e-5 in CLIP."""
    pre_norm: bool = False
    """A norm before the first block (CLIP)."""
    patch_bias: bool = True
    """Does the patch embedding have a bias? (CLIP's has none.)"""
    proj: Literal["none", "linear", "affine"] = "none"
    """Map from width to the shared space: nothing (SigLIP), a matrix (CLIP), a matrix with bias."""
    position_resize: Literal["bicubic-antialias", "bicubic", "bilinear-antialias"] = "bicubic-antialias"
    """How the position table is resized for pictures of another size; a loaded model does as its own library does."""

    @property
    def grid(self) -> int:
        return self.image_size // self.patch


@dataclass(frozen=True)
class TextTowerConfig:
    vocab: int = 32000
    """Size of the vocabulary; a run takes its tokenizer's."""
    length: int = 64
    """Tokens of every text: longer ones are cut before their end token, shorter ones padded."""
    width: int = 768
    """Width of the tokens."""
    depth: int = 12
    """Number of blocks."""
    heads: int = 12
    """Attention heads; they share the width."""
    mlp: int = 3072
    """Hidden width of the MLPs."""
    act: Activation = "gelu_tanh"
    """Activation of the MLPs."""
    norm_eps: float = 1e-6
    """Epsilon of the layer norms."""
    causal: bool = False
    """Does a token see only what comes before it? (CLIP)"""
    pool: Literal["last", "eos", "mean"] = "last"
    """Read the last position (SigLIP), the first end token (CLIP), or the mean over all but padding."""
    eos_id: int = 1
    """End token; a run takes its tokenizer's."""
    pad_id: int = 1
    """Padding token; a run takes its tokenizer's."""
    proj: Literal["linear", "affine"] = "affine"
    """Map from width to the shared space, without or with bias."""


@dataclass(frozen=True)
class PreprocessConfig:
    """From a picture to pixels; stored with every checkpoint so that nobody retypes it."""

    size: int = 256
    """Side of the square input in pixels."""
    resize: Literal["squash", "crop"] = "squash"
    """`squash`: both sides to `size` (SigLIP); `crop`: short side to `size`, then the centre square (CLIP)."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """Antialiased either way."""
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Subtracted from each channel of pixels in [0, 1]."""
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Divides each channel after that."""


@dataclass(frozen=True)
class CatSegConfig:
    """The CAT-Seg head (arXiv 2303.11797, CVPR 2024 version), without what the tower decides: grid and widths."""

    width: int = 128
    """Width of the cost embedding, and of both projected guidances."""
    layers: int = 2
    """Aggregation layers, each spatial (two windowed blocks) then over classes; 0: the model has no such head."""
    heads: int = 4
    """Attention heads of both."""
    window: int = 12
    """Side of the attention windows in patches; a grid that it does not divide takes its next smaller divisor, or,
    having none, is one window."""
    classes: int = 256
    """Fewer classes are padded to so many; of more, those with the highest cost anywhere are kept."""
    pool: int = 2
    """Side of the cells over which positions are averaged for the attention over classes, in training."""
    decoder: tuple[int, int] = (64, 32)
    """Widths of the two upsampling stages."""
    guides: tuple[int, int] = (256, 128)
    """Widths of the two inner maps of the tower once enlarged twice and four times."""
    guide_widths: tuple[int, int] = (32, 16)
    """What these are projected to before they join the decoder."""


@dataclass(frozen=True)
class ModelConfig:
    image: ImageTowerConfig = field(default_factory=ImageTowerConfig)
    text: TextTowerConfig = field(default_factory=TextTowerConfig)
    preprocess: PreprocessConfig = field(default_factory=PreprocessConfig)
    embed_dim: int = 768
    """Width of the space that pictures and texts share."""
    scale_init: float = 10.0
    """Initial inverse temperature exp(logit_scale): 10 for the sigmoid loss, 1/0.07 for softmax."""
    bias_init: float | None = -10.0
    """Initial logit bias of the sigmoid loss; None for softmax, which has no bias."""
    catseg: CatSegConfig = field(default_factory=lambda: CatSegConfig(layers=0))
    """The head for open-vocabulary segmentation, where there is one."""


# ---------------------------------------------------------------- training


@dataclass(frozen=True)
class Term:
    """One named term of the loss."""

    weight: float = 0.0
    """0 switches the term off altogether."""
    start: float = 0.0
    """Share of the run after which the term begins: 0.8 is `the last 20%`."""
    ramp: float = 0.0
    """Share of the run over which its weight then grows from zero; it begins when the towers do (--init.freeze)."""


@dataclass(frozen=True)
class PrototypeConfig:
    """The projection head and its prototypes (DINO form)."""

    count: int = 65536
    """K, the number of prototypes."""
    hidden: int = 2048
    """Hidden width of the MLP before them."""
    bottleneck: int = 256
    """Width in which cosines with the prototypes are taken."""
    layers: int = 3
    """Layers of that MLP."""


@dataclass(frozen=True)
class ObjectiveConfig:
    kind: Literal["softmax", "sigmoid", "auto"] = "softmax"
    """Form of the image-text contrastive loss; `auto`: sigmoid for a model with a logit bias, softmax without."""
    contrast: Term = Term(1.0)
    """The image-text term."""
    contrast_views: Literal["global", "original", "both"] = "global"
    """Which views the text is aligned with. The paper says every global view; SigLIP 2 says the original image."""
    max_scale: float = 100.0
    """Clamp of the inverse temperature."""
    distill: Term = Term(0.0)
    """Local-to-global self-distillation, SILC section 3 / DINO."""
    global_to_global: bool = False
    """Also distil every teacher view into the *other* global student views."""
    masked: Term = Term(0.0)
    """Masked patch prediction against the teacher's patch prototypes."""
    masked_form: Literal["masked", "all"] = "masked"
    """`masked`: only hidden patches count (iBOT); `all`: visible ones too (TIPSv2)."""
    mask_ratio: float = 0.5
    """Share of patches hidden from the student."""
    anchor: Term = Term(0.0)
    """Keeps embeddings of pictures and texts near those of the model that the run began with; costs its forward."""
    prototypes: PrototypeConfig = field(default_factory=PrototypeConfig)
    teacher: Literal["full", "head"] = "full"
    """`full`: EMA copy of tower and head; `head`: EMA of the head only on the student's own features (TIPSv2)."""
    momentum: float = 0.966
    """EMA momentum at a batch of `momentum_batch`; fixed, and scaled to the batch as m^(batch / momentum_batch)."""
    momentum_batch: int = 16384
    teacher_temp: float = 0.04
    """Temperature of the teacher's targets; lower is sharper."""
    student_temp: float = 0.1
    """Temperature of the student's predictions."""
    centre_momentum: float = 0.9
    """Momentum of the mean that is subtracted from the teacher's logits."""


@dataclass(frozen=True)
class ViewsConfig:
    globals: int = 1
    """Large views a picture: the text's, the teacher's, or both."""
    global_size: int = 256
    """Side of a global view in pixels; 0: the image size of the model."""
    global_scale: tuple[float, float] = (0.4, 1.0)
    """Area of the crop as a share of the picture."""
    locals: int = 0
    """Small views a picture, seen by the student alone."""
    local_size: int = 96
    """Side of a local view in pixels; 0: three sevenths of a global one (96 of 224), in whole patches."""
    local_scale: tuple[float, float] = (0.05, 0.4)
    """Area of the crop as a share of the picture."""
    flip: bool = True
    """Mirror half of the views; off where captions say left and right."""
    photometric: Literal["none", "dino", "grey", "ssd"] = "none"
    """`dino`: colour jitter, grey, blur and solarise with the published probabilities; `grey`: of these what a
    one-channel picture can bear, brightness, contrast and blur; `ssd`: colours alone, stronger, each in half of the
    views."""


@dataclass(frozen=True)
class DataConfig:
    sources: tuple[str, ...] = ()
    """Folders, .csv/.tsv/.jsonl/.parquet files, or tar shards (`name-{0000..0099}.tar`); local or any fsspec URL."""
    weights: tuple[float, ...] = ()
    """Share of each source in the mixture; empty: in proportion to their sizes."""
    image_key: str = "image"
    """Column of the picture's path."""
    images: tuple[str, ...] = ()
    """Pictures without captions, which feed the teacher's terms alone: folders, or any of the above."""
    text_key: str = "caption"
    """Column, or for a shard's `.json` member the key, of the caption; a list of captions is sampled from."""
    tokenizer: str = "train"
    """`train` one on the captions, `bytes`, or a tokenizer.json / SentencePiece .model / folder."""
    workers: int = 2
    """Processes that decode and crop; 0 does it in the training process."""
    max_pixels: int = 100_000_000
    """Larger pictures are skipped before they are decoded."""
    max_bad_fraction: float = 0.05
    """Share of unreadable samples above which the run stops."""


@dataclass(frozen=True)
class InitConfig:
    """Start from a trained model instead of from nothing. Its architecture and tokenizer then replace the config's."""

    model: str = ""
    """What silc.load opens: a run, a folder or file of silc, transformers, open_clip, timm or big_vision, or hf:ID."""
    image_size: int = 0
    """Side in pixels to which the position table is resized; 0 leaves it."""
    minimum: float = 0.9
    """Share of the towers' tensors that must be found there."""
    freeze: float = 0.0
    """Share of the run in which the towers stand still while new heads learn to read them."""
    image_lr: float = 1.0
    """Learning rate of the image tower as a multiple of --optim.lr, which the heads have."""
    text_lr: float = 1.0
    """The same of the text tower and the temperature."""
    lora: int = 0
    """Rank of LoRA adapters on q and v of both towers, which then stay as they are; 0: none. Needs silc[lora]."""


@dataclass(frozen=True)
class SegmentConfig:
    """Training for segmentation, which a model with a CAT-Seg head (--model.catseg.layers) gets. --data.sources are
    then sets of pictures with masks."""

    split: str = "train"
    """Of the sets that have splits."""
    kind: str = ""
    """Layout, as coco-stuff, where a folder can be read in several ways."""
    prompt: str = "A photo of a {} in the scene"
    """What is said of every class."""
    tune: Literal["qv", "none", "all"] = "qv"
    """Weights of the towers that train beside the head: queries and values of every block, nothing, or everything."""
    zoom: tuple[float, float] = (1.0, 1.0)
    """A crop's side is that of the picture's short one divided by a factor in this range, which begins at 1."""


@dataclass(frozen=True)
class RetentionConfig:
    """What the run must not forget: a score, compared with its value at step 0."""

    set: str = ""
    """One of --eval.sets; empty: the first zeroshot one, if any, of a run that began with a model."""
    metric: str = ""
    """One of its metrics; empty: the first."""
    max_drop: float = 3.0
    """Points (hundredths) that it may fall."""
    action: Literal["warn", "save", "stop"] = "warn"
    """`save` also keeps the last model within bounds in RUN/retained; `stop` does that and ends the run."""


@dataclass(frozen=True)
class OptimConfig:
    lr: float = 1e-3
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's."""
    eps: float = 1e-8
    """AdamW's."""
    weight_decay: float = 1e-4
    """On matrices only."""
    clip: float = 1.0
    """Largest norm of the gradient; 0 leaves it."""
    schedule: Literal["cosine", "rsqrt", "constant"] = "cosine"
    """Of the learning rate, after the warm-up."""
    warmup: float = 0.05
    """Share of the run that warms up."""
    cooldown: float = 0.2
    """Share of the run in which `rsqrt` and `constant` fall linearly to zero."""


@dataclass(frozen=True)
class TrainConfig:
    batch: int = 4096
    """Pairs per optimiser step over all processes."""
    images: int = 0
    """Pictures of --data.images per step beside them."""
    samples: int = 1_000_000
    """Pairs seen in the whole run; steps = samples // batch."""
    accumulate: int = 1
    """Micro-batches per step; the contrastive gradient stays that of the whole batch."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """`auto`: bf16 compute on a GPU, fp32 on a CPU. Weights, teacher, losses and norms stay fp32."""
    device: str = "auto"
    """`auto` takes a GPU where there is one."""
    threads: int = 0
    """CPU threads; 0 leaves PyTorch's choice."""
    compile: bool = False
    """Compile each block (torch.compile); the first step takes long."""
    cuda_graphs: bool = False
    """With --train.compile on a GPU, replay each block as a CUDA graph; not yet run on one."""
    checkpoint_blocks: bool = False
    """Recompute each block in the backward pass instead of storing it."""
    shard: int = 1
    """Processes that share one copy of weights and optimiser state (FSDP2); 1 replicates (DDP)."""
    save_every: int = 1000
    """Steps between checkpoints."""
    keep: int = 2
    """Checkpoints that are kept."""
    log_every: int = 10
    """Steps between rows of metrics.jsonl."""
    max_nonfinite: int = 3
    """Skipped steps (NaN or infinite gradient) after which the run stops."""


@dataclass(frozen=True)
class EvalConfig:
    every: int = 0
    """Steps between evaluations; 0: only at the start and the end."""
    sets: dict[str, str] = field(default_factory=dict)
    """Name -> folder; the name is a task, or a task and a label: `zeroshot/pets`."""


@dataclass(frozen=True)
class LogConfig:
    tensorboard: bool = False
    """Mirror the numbers to RUN/tensorboard."""
    wandb: bool = False
    """Mirror the numbers to Weights & Biases (goes on the network)."""


@dataclass(frozen=True)
class Config:
    recipe: str = "custom"
    """Name of what this config was derived from."""
    out: str = "runs/silc"
    """The run folder; an interrupted run in it is gone on with."""
    seed: int = 0
    """Of weights, order, crops and masks."""
    init: InitConfig = field(default_factory=InitConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)
    data: DataConfig = field(default_factory=DataConfig)
    segment: SegmentConfig = field(default_factory=SegmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    retention: RetentionConfig = field(default_factory=RetentionConfig)
    log: LogConfig = field(default_factory=LogConfig)

    @property
    def steps(self) -> int:
        return max(1, self.train.samples // self.train.batch)

    @property
    def ema_momentum(self) -> float:
        """EMA momentum at this run's batch: the teacher remembers as many samples as at `momentum_batch`."""
        return float(self.objective.momentum ** (self.train.batch / self.objective.momentum_batch))
