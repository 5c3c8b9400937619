"""Every number of a training run, with its default: the paper's where it states one, ours (marked "ours") where not.

Free of torch, so that a recipe is read and checked without it.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from .scenes import Scenes


def _positive(options: Any, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise ValueError(f"{name}: {value} is not a positive number")


@dataclass(frozen=True, kw_only=True)
class Model:
    """The two CLIP towers (defaults: ViT-B/16) and the Prompter on top of the image tower's tokens."""

    init: str | None = None  # start from a CLIP: a local folder, or org/name@revision; the sizes below are then its own
    image_px: int = 224
    patch_px: int = 16
    vision_width: int = 768
    vision_layers: int = 12
    vision_heads: int = 12
    text_width: int = 512
    text_layers: int = 12
    text_heads: int = 8
    embed_dim: int = 512
    context: int = 77  # text tokens at most
    tokenizer: str | None = None  # bpe:8192 is learned from the shards; or a folder, or org/name@revision (paper: T5's)
    pool: Literal["class", "attention"] = "class"  # the paper pools by attention; a class token makes a drop-in CLIP
    region: Literal["prompter", "roialign"] = "prompter"  # what turns a box into a feature
    prompt_pool: Literal["prompt", "image"] = "prompt"  # ours: the tokens that the Prompter averages
    positions: bool = True  # ours: the corners' encoding is added to the image tokens at the Prompter's input

    def __post_init__(self) -> None:
        _positive(self, "image_px", "patch_px", "vision_layers", "text_layers", "embed_dim")
        _positive(self, "vision_width", "vision_heads", "text_width", "text_heads")
        if self.context < 2:
            raise ValueError(f"context: {self.context} tokens are too few for a word and the end token")
        if self.image_px % self.patch_px:
            raise ValueError(f"patch_px: {self.patch_px} does not divide image_px, {self.image_px}")
        for tower, unit in (("vision", 4), ("text", 1)):  # positions take a sine and a cosine of x and of y
            width, heads = getattr(self, f"{tower}_width"), getattr(self, f"{tower}_heads")
            if width % heads or width % unit:
                multiple = f"{tower}_heads, {heads}" + (", and of 4" if unit > 1 else "")
                raise ValueError(f"{tower}_width: {width} is no multiple of {multiple}")
        kind, colon, size = self.text.partition(":")
        if kind == "bpe" and not (colon and size.isdecimal() and int(size) >= 300):
            raise ValueError(f"tokenizer: {self.tokenizer!r}: a learned one needs 300 tokens or more, as in bpe:8192")

    @property
    def text(self) -> str:
        """The tokenizer that is meant: the one named, else that of the CLIP to start from, else a learned one."""
        return self.tokenizer or self.init or "bpe:8192"


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Section 3: L_CLIP + weight x (share of images with regions) x (L_CLOC + L_ground)."""

    region_weight: float = 1.0  # 0 trains a plain CLIP: no Prompter, no region texts
    grounding: Literal["mse", "l1_giou", "none"] = "mse"  # ours: the mean squared error of the four coordinates
    conflict_cosine: float | None = 0.9  # texts more alike than this are no negatives of each other; null: no filter
    conflict_from_step: int = 2000  # ours: an untrained text tower finds all texts alike
    temperatures: Literal["shared", "own"] = "shared"  # ours: one for both contrasts
    tile: int | None = None  # rows of the logits that are in memory at once; null: all

    def __post_init__(self) -> None:
        _positive(self, "tile")
        if self.region_weight < 0:
            raise ValueError(f"region_weight: {self.region_weight} is negative")


@dataclass(frozen=True, kw_only=True)
class Data:
    """What is read, and how a sample becomes a row of a batch."""

    shards: str | None = None  # a folder or bucket with shards and index.json; null: the recipe's own `pack`
    images: str | None = None  # where referenced images lie; null: the recipe's store
    takedown: str | None = None  # a folder of more takedown lists than those in `takedown/` of the recipe's store
    regions: int = 4  # M: sampled per image and step
    alt_text: float = 0.0  # ours: how often the alt text takes the caption's place
    shuffle: int = 10_000  # ours: samples that are shuffled together
    workers: int = 2  # loading processes per rank; 0: in the training process itself

    def __post_init__(self) -> None:
        _positive(self, "regions", "shuffle")
        if self.workers < 0:
            raise ValueError(f"workers: {self.workers} is negative")
        if not 0 <= self.alt_text <= 1:
            raise ValueError(f"alt_text: {self.alt_text} is not a share between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class Loop:
    """The optimisation. `batch` counts images over all ranks."""

    steps: int = 439_087
    batch: int = 32_768
    micro_batch: int | None = None  # images per rank and forward pass; null: the rank's whole share
    lr: float = 5e-4
    warmup_steps: int = 2000
    betas: tuple[float, ...] = (0.9, 0.98)
    weight_decay: float = 0.2
    clip_norm: float = 1.0  # ours
    precision: Literal["fp32", "bf16"] = "bf16"
    compile: bool = False
    checkpointing: bool = False  # activations are computed twice instead of kept
    seed: int = 0
    log_steps: int = 50
    save_steps: int = 1000
    evaluate_steps: int | None = None  # how often `evaluate` is run on the way; null: at the end only
    keep: int = 2  # checkpoints that stay

    def __post_init__(self) -> None:
        _positive(self, "steps", "batch", "micro_batch", "lr", "clip_norm", "log_steps", "save_steps", "evaluate_steps")
        _positive(self, "keep")
        if self.warmup_steps < 0 or self.weight_decay < 0:
            name = "warmup_steps" if self.warmup_steps < 0 else "weight_decay"
            raise ValueError(f"{name}: {getattr(self, name)} is negative")
        if not 0 <= self.seed < 1 << 63:
            raise ValueError(f"seed: {self.seed} is not from 0 to below 2**63")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: {list(self.betas)} are not two numbers from 0 to below 1")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One evaluation set: COCO-format `annotations` with `images`; `shards`; or `images` with a folder for each class.

    Where shards hold references, `images` is the store with the images, or null: the one that the shards lie in.

    With none of them, the test scenes of a recipe that trains on scenes, or the shards that are trained on.

    regions: boxes to class names; retrieval: regions to their texts and back; grounding: texts to boxes;
    zeroshot: images to class names; pairs: images to captions and back.
    """

    kind: Literal["regions", "retrieval", "grounding", "zeroshot", "pairs"]
    annotations: str | None = None
    images: str | None = None
    shards: str | None = None
    limit: int | None = None  # images, taken evenly over the set
    templates: tuple[str, ...] = ("a photo of a {}.",)  # beside the bare names, for regions and zeroshot
    by: Literal["prompter", "roialign", "crop"] = "prompter"  # makes a box a feature; a plain CLIP has no Prompter


@dataclass(frozen=True, kw_only=True)
class Train:
    """The `train` block of a recipe."""

    folder: str | None = None  # checkpoints, logs, the finished model; null: STORE/train/<fingerprint>
    scenes: Scenes | None = None  # draw scenes into STORE/scenes/<fingerprint> and train on them
    model: Model = Model()
    objective: Objective = Objective()
    data: Data = Data()
    loop: Loop = Loop()
    evaluate: dict[str, Evaluation] = field(default_factory=dict)
