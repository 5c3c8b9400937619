"""What grounding costs beside the model's forward, on one core: python tests/bench/grounders.py [--full [IMAGES] [PX]].

--full takes a randomly initialised OWLv2-B of full size (0.6 GB) and times each moment of a step on this machine's CPU.
"""

import argparse
import io
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

BATCH, CELLS, PHRASES = 32, 32 * 32, 20  # OWLv2-L at 448 px: 1,024 boxes an image
STORED = 300


def seconds(work: Callable[[], object], rounds: int) -> float:
    """CPU seconds of a round: other programs on the machine do not count."""
    work()
    start = time.process_time()
    for _ in range(rounds):
        work()
    return (time.process_time() - start) / rounds


def photograph(width: int, height: int, seed: int) -> bytes:
    """A JPEG with about a photograph's detail."""
    rough = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(rough).resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def post() -> None:
    """From scored boxes to the pairs of each image."""
    import torch

    from vesl.models.grounders import owl

    random = torch.Generator().manual_seed(0)
    corners = torch.rand((BATCH, CELLS, 2, 2), generator=random).sort(dim=2).values
    boxes = corners.flatten(2)[..., [0, 1, 2, 3]]
    scores = torch.rand((BATCH, CELLS, PHRASES), generator=random)
    scores *= 0.02 / torch.quantile(scores[0].flatten(), 1 - STORED / (CELLS * PHRASES))  # so many reach the floor
    wanted = torch.ones((BATCH, PHRASES), dtype=torch.bool)

    def work() -> list[Any]:
        return owl.apart(*(t.numpy() for t in owl.best_pairs(boxes, scores, wanted, owl.MOST)), 0.02)

    pairs = sum(len(found.scores) for found in work()) / BATCH
    rate = BATCH / seconds(work, 10)
    print(f"pairs    {rate:8.0f} images/s of a core, {pairs:.0f} pairs each of {CELLS} boxes x {PHRASES} phrases")


def scaling() -> None:
    """From a stored JPEG to the square that OWLv2 sees, by ours and by the library's."""
    from transformers.models.owlv2.image_processing_pil_owlv2 import Owlv2ImageProcessorPil

    from vesl.models.grounders import owl
    from vesl.transforms.images import decode

    jpeg = photograph(1024, 768, 0)
    image = decode(jpeg)
    print(f"decode   {seconds(lambda: decode(jpeg), 10) * 1000:8.1f} ms, 1024x768")
    for side in (448, 960):
        theirs = Owlv2ImageProcessorPil(size={"height": side, "width": side})
        mine = owl.Sight.of(theirs, True, side)
        own, other = seconds(lambda s=mine: s(image), 5), seconds(lambda s=theirs: s(image, return_tensors="np"), 2)
        print(f"to {side:4}  {own * 1000:8.1f} ms; the library {other * 1000:.0f} ms")


def remembered(batches: int = 300, kinds: int = 1_000_000) -> None:
    """Phrases drawn by Zipf's law (the n-th as often as 1 / n) from a million: how many are embedded, and how fast."""
    import torch

    from vesl.models.grounders import owl

    chance = 1 / np.arange(1, kinds + 1)
    drawn = np.random.default_rng(0).choice(kinds, (batches, BATCH * PHRASES), p=chance / chance.sum())
    batch_keys = [[int(k).to_bytes(128, "little") for k in dict.fromkeys(row.tolist())] for row in drawn]
    memory, embedded = owl.Memory(200_000), 0
    row = torch.zeros(1, 512)

    def embed(new: list[int]) -> torch.Tensor:
        nonlocal embedded
        embedded += len(new)
        return row.expand(len(new), -1)

    start = time.process_time()
    for keys in batch_keys:
        memory(keys, embed)
    each = (time.process_time() - start) / batches
    distinct = sum(len(keys) for keys in batch_keys)
    last = sum(len(keys) for keys in batch_keys[-50:])
    print(
        f"memory   of {drawn.size} phrases {distinct} are distinct within their batch and {embedded} were embedded "
        f"({1 - embedded / drawn.size:.0%} saved); {each * 1000:.1f} ms a batch of {last / 50:.0f} distinct"
    )


def words() -> Any:
    """A CLIP tokenizer without merges: letters only, so phrases are as long as they get."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    vocab = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: k for k, token in enumerate(vocab)}, merges=[], pad_token="!")


def full(images: int, side: int) -> None:
    """Where the time of a step goes."""
    import torch
    from transformers import Owlv2Config, Owlv2ForObjectDetection
    from transformers.models.owlv2.image_processing_pil_owlv2 import Owlv2ImageProcessorPil

    from vesl.models.grounders import owl
    from vesl.models.options import Grounding
    from vesl.transforms.images import decode

    model = Owlv2ForObjectDetection(Owlv2Config()).eval().requires_grad_(False)
    owl.see_at(model, side)
    sight = owl.Sight.of(Owlv2ImageProcessorPil(), True, side)
    grounder = owl.Owl(Grounding("random@0", score_floor=0.0), model, sight, words())
    jpegs = [photograph(1024, 768, k) for k in range(images)]
    asked = [[f"phrase {k} of image {n}" for k in range(PHRASES)] for n in range(images)]
    took: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        made = work()
        took[name] = time.perf_counter() - start
        return made

    pictures = timed("decode", lambda: [decode(jpeg) for jpeg in jpegs])
    timed("scale", lambda: [sight(picture) for picture in pictures])
    prepared = grounder.prepare(jpegs, asked)
    timed("tokenise", lambda: grounder._read([phrase for own in asked for phrase in own]))
    with torch.inference_mode():
        texts = timed("text tower", lambda: grounder._embed(prepared.tokens))
        boxes, scores = timed("forward", lambda: grounder._score(prepared.pixels, texts, prepared.asked))
        pairs = timed("pairs", lambda: owl.best_pairs(boxes, scores, prepared.asked >= 0, owl.MOST))
        timed("apart", lambda: owl.apart(*(t.numpy() for t in pairs), 0.02))
    whole = sum(took.values())
    print(f"OWLv2-B, {images} images at {side} px, {PHRASES} new phrases each, {torch.get_num_threads()} threads")
    for name, spent in took.items():
        print(f"{name:10} {spent / images * 1000:9.1f} ms an image  {spent / whole:6.1%}")
    outside = 1 - (took["forward"] + took["text tower"]) / whole
    print(f"outside the towers {outside:.2%}; decode, scale and tokenise run ahead in threads")


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", nargs="*", type=int, metavar="N", help="images (2) and their side in pixels (448)")
    chosen = parser.parse_args().full
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(variable, "1")  # before torch is imported, which reads them then
    import torch

    if chosen is None:
        torch.set_num_threads(1)
        post()
        scaling()
        remembered()
    else:
        full(*(chosen + [2, 448][len(chosen) :]))


if __name__ == "__main__":
    main()
