"""Step time of CLOC over that of a plain CLIP (same towers, same batch), beside the ratio of their counted operations.

    python tests/bench/cloc_step.py [--size scenes|s16|b16|l14] [--batch 64] [--pairs 7]

Captions have 36 tokens and phrases 2 to 6, as in table 1 of the paper; four regions an image. Steps of the two are
taken in turn, and the ratio is that of each pair; operations are those of products and convolutions, forward and back.
"""

import argparse
import statistics
import time
from dataclasses import replace

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vesl.models.cloc.data import Batch
from vesl.models.cloc.gradients import backward
from vesl.models.cloc.model import Cloc
from vesl.models.cloc.objective import cloc_loss
from vesl.models.cloc.options import Model, Objective
from vesl.models.cloc.text import learn_text

SIZES = {
    "scenes": Model(image_px=64, patch_px=8, vision_width=128, vision_layers=4, vision_heads=2, text_width=128,
                    text_layers=2, text_heads=2, embed_dim=128, context=77),
    "s16": Model(vision_width=384, vision_heads=6, text_width=384, text_heads=6, embed_dim=384),
    "b16": Model(),
    "l14": Model(image_px=336, patch_px=14, vision_width=1024, vision_layers=24, vision_heads=16, text_width=768,
                 text_heads=12, embed_dim=768),
}  # fmt: skip


def made(model: Model, count: int, device: torch.device, regions: int = 4) -> Batch:
    """A batch of noise with texts of realistic lengths; about two in three phrases of a batch are different."""
    torch.manual_seed(0)
    captions = torch.randint(3, 250, (count, 36))
    different = max(1, count * regions * 2 // 3)
    phrases = torch.randint(3, 250, (different, 6))
    captions[:, -1] = 1
    for row, length in zip(phrases, torch.randint(2, 7, (different,)).tolist(), strict=True):
        row[length - 1 :] = 1
    low = torch.rand(count, regions, 2) * 0.5
    phrase = torch.randint(0, different, (count, regions))
    batch = Batch(
        images=torch.randint(0, 256, (count, 3, model.image_px, model.image_px), dtype=torch.uint8),
        captions=captions,
        boxes=torch.cat([low, low + 0.1 + 0.4 * torch.rand(count, regions, 2)], -1),
        valid=torch.ones(count, regions, dtype=torch.bool),
        phrases=phrases,
        phrase=phrase,
        text_id=phrase + 1,
        keys=(),
    )
    return replace(batch, **{k: v.to(device) for k, v in vars(batch).items() if isinstance(v, torch.Tensor)})


class Contestant:
    """One of the two, with its optimiser."""

    def __init__(self, model: Model, objective: Objective, device: torch.device) -> None:
        torch.manual_seed(0)
        self.objective, self.device = objective, device
        self.model = Cloc(model, objective, learn_text(["a word"], 300)).to(device).train()
        if device.type == "cpu":
            self.model.clip.set_attn_implementation("eager")
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-4, fused=True)

    def step(self, batches: list[Batch]) -> float:
        """Seconds of one step."""
        start = self._now()
        self.optimizer.zero_grad(set_to_none=True)
        backward(
            self.model,
            batches,
            lambda found, batch, step: cloc_loss(found, batch, self.objective, step),
            10_000,
            lambda: torch.autocast(self.device.type, torch.bfloat16),
        )
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return self._now() - start

    def flops(self, batches: list[Batch]) -> float:
        """Operations of one step."""
        with FlopCounterMode(display=False) as counter:
            self.step(batches)
        return float(counter.get_total_flops())

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="scenes")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=7)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = SIZES[options.size]
    batch = [made(model, options.batch, device)]
    cloc = Contestant(model, Objective(), device)
    clip = Contestant(model, Objective(region_weight=0.0), device)
    counted = cloc.flops(batch) / clip.flops(batch)
    pairs = [(cloc.step(batch), clip.step(batch)) for _ in range(options.pairs)]
    ratio = statistics.median(a / b for a, b in pairs)
    a, b = (statistics.median(times) for times in zip(*pairs, strict=True))
    print(f"{options.size}, batch {options.batch}, {device}: CLOC {a * 1e3:.0f} ms, CLIP {b * 1e3:.0f} ms a step")
    print(f"time ratio {ratio:.3f}; operations ratio {counted:.3f}; time over operations {ratio / counted:.3f}")


if __name__ == "__main__":
    main()
