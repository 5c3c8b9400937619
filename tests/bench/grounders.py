"""What grounding costs beside the model's forward.

    python tests/bench/grounders.py [--full owl|dino] [--images N] [--px N]

--full takes a randomly initialised OWLv2-B (0.6 GB) or Grounding DINO-T (0.7 GB) of full size and times each moment of
a step on this machine's CPU; without it, what lies around the forward is timed on one core.
"""

import argparse
import io
import itertools
import os
import tempfile
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


def post_dino() -> None:
    """The same for Grounding DINO, from its logits; and from the pairs of either to the bytes of the step's table."""
    import pyarrow as pa
    import torch

    from vesl.models.contract import Detections
    from vesl.models.grounders import dino
    from vesl.pipeline.steps import ground
    from vesl.pipeline.store import encode_table

    random = torch.Generator().manual_seed(0)
    logits, boxes = (torch.randn((BATCH, 900, n), generator=random) for n in (256, 4))
    boxes = boxes.sigmoid() / 2 + 0.25
    slots = torch.tensor([PHRASES, *(slot for k in range(PHRASES) for slot in (k, k, PHRASES)), PHRASES])
    slots = slots.expand(BATCH, -1).contiguous()  # phrases of two tokens
    best = torch.stack([logits[..., 1 + 3 * k : 3 + 3 * k].amax(-1) for k in range(PHRASES)], -1).sigmoid()
    floor = float(torch.quantile(best[0].flatten(), 1 - STORED / best[0].numel()))

    def work() -> list[Any]:
        return list(dino.pairs(logits, boxes, slots, PHRASES, floor))

    pairs = sum(len(scores) for *_, scores in work()) / BATCH
    print(f"pairs    {BATCH / seconds(work, 10):8.0f} images/s of a core, {pairs:.0f} pairs each, Grounding DINO")
    found = [Detections(box, slot.astype(np.int16), score) for box, slot, score in work()]
    batch, options = pa.table({"key": [f"{k:024x}" for k in range(BATCH)]}), ground.Ground("tiny@1")
    table = ground._table(batch, found, [PHRASES] * BATCH, options)
    made = seconds(lambda: ground._table(batch, found, [PHRASES] * BATCH, options), 10)
    written = seconds(lambda: encode_table(table, {}), 10)
    print(f"table    {BATCH / made:8.0f} images/s of a core; as Parquet {BATCH / written:.0f} images/s")


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


def owlv2(side: int, large: bool = False, **options: Any) -> Any:
    """OWLv2 at random weights and full size (B/16, or L/14), as a grounder."""
    from transformers import Owlv2Config, Owlv2ForObjectDetection
    from transformers.models.owlv2.image_processing_pil_owlv2 import Owlv2ImageProcessorPil

    from vesl.models.device import place
    from vesl.models.grounders import owl
    from vesl.models.options import Grounding

    chosen = Grounding("random@0", score_floor=0.02, **options)
    device, dtype = place(chosen)
    sizes: dict[str, Any] = {}
    if large:
        vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
        text = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
        sizes = {"vision_config": vision | {"patch_size": 14, "image_size": 1008}, "text_config": text}
        sizes["projection_dim"] = 768
    model = Owlv2ForObjectDetection(Owlv2Config(**sizes)).to(dtype).eval().requires_grad_(False)
    owl.see_at(model, side)
    model.class_head.float()
    model.box_head.float()
    return owl.Owl(chosen, model.to(device), owl.Sight.of(Owlv2ImageProcessorPil(), True, side), words())


def grounding_dino(side: int, tiny: bool = False, **options: Any) -> Any:
    """Grounding DINO-T at random weights and full size, as a grounder; or a tiny one."""
    from transformers import BertConfig, BertTokenizerFast, GroundingDinoConfig, GroundingDinoForObjectDetection
    from transformers.models.grounding_dino.image_processing_pil_grounding_dino import GroundingDinoImageProcessorPil

    from vesl.models.device import place
    from vesl.models.grounders import dino, mixed
    from vesl.models.options import Grounding

    chosen = Grounding("random@0", score_floor=0.02, image_px=side, **options)
    device, dtype = place(chosen)
    names = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 1012: ".", 1029: "?"}
    names |= {2000 + k: word for k, word in enumerate(["phrase", "of", "image", *map(str, range(1000))])}
    words = BertTokenizerFast(vocab={names.get(k, f"[unused{k}]"): k for k in range(4000)})
    config = GroundingDinoConfig(
        **({"encoder_layers": 1, "decoder_layers": 2, "num_queries": 20} if tiny else {}),
        text_config=BertConfig(vocab_size=4000, num_hidden_layers=1 if tiny else 12),
    )
    model = GroundingDinoForObjectDetection(config).eval().requires_grad_(False)
    look = dino._look(chosen, GroundingDinoImageProcessorPil(), dino._Fit(model.config))
    asker = dino.Asker(words, config.max_text_len)
    return dino.DinoGrounder(mixed.Mixed(model.to(device), device, dtype), asker, look, chosen, device)


class Clock:
    """Wall seconds within functions that it was put around, by name."""

    def __init__(self) -> None:
        self.took: dict[str, float] = {}

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, timed."""

        def timed(*args: Any) -> Any:
            start = time.perf_counter()
            made = function(*args)
            self.took[name] = self.took.get(name, 0.0) + time.perf_counter() - start
            return made

        return timed


def full(which: str, images: int, side: int) -> None:
    """Where the time of a step goes: everything that it does for some images of several sizes, in one thread."""
    import pyarrow as pa
    import torch

    from vesl.models.grounders import dino, owl
    from vesl.pipeline.steps import ground
    from vesl.pipeline.store import Store, encode_table

    clock = Clock()
    grounder = {"owl": owlv2, "dino": grounding_dino}[which](side)
    if which == "owl":
        towers = ["text tower", "forward"]
        names = {"scale": "_sight", "tokenise": "_read", "text tower": "_embed", "forward": "_score"}
        owl.decode = clock.around("decode", owl.decode)
        owl.best_pairs = clock.around("pairs", owl.best_pairs)
        owl.apart = clock.around("apart", owl.apart)
    else:
        towers = ["forward"]
        names = {"tokenise": "_asker", "forward": "_network"}
        dino.decode = clock.around("decode", dino.decode)
        dino.pairs = clock.around("pairs", dino.pairs)
        resize = clock.around("scale", grounder._look.resize)
        object.__setattr__(grounder._look, "resize", resize)
    for name, attribute in names.items():
        timed = clock.around(name, inner := getattr(grounder, attribute))
        for constant in {"side", "padded", "padding"} & set(dir(inner)):
            setattr(timed, constant, getattr(inner, constant))
        setattr(grounder, attribute, timed)
    shapes = [(1024, 768), (1024, 683), (1000, 750), (768, 1024)]
    jpegs = [photograph(*shapes[k % len(shapes)], k) for k in range(images)]
    asked = [[f"phrase {k} of image {n}" for k in range(PHRASES)] for n in range(images)]
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder, {})
        store.create("images", b"".join(jpegs))
        ends = np.cumsum([0, *map(len, jpegs)]).tolist()
        start = time.perf_counter()
        read = clock.around("read", store.read_ranges)("images", list(itertools.pairwise(ends)))
        found = grounder(grounder.prepare(read, asked))
        batch = pa.table({"key": [f"{k:024x}" for k in range(images)]})
        options = ground.Ground("tiny@1")
        table = clock.around("table", ground._table)(batch, found, [PHRASES] * images, options)
        clock.around("write", lambda: store.create("part.parquet", encode_table(table, {})))()
        whole = time.perf_counter() - start
    took = clock.took | {"the rest": whole - sum(clock.took.values())}
    title = {"owl": "OWLv2-B", "dino": "Grounding DINO-T"}[which]
    print(f"{title}, {images} images at {side} px, {PHRASES} new phrases each, {torch.get_num_threads()} threads")
    for name, spent in took.items():
        print(f"{name:10} {spent / images * 1000:9.1f} ms an image  {spent / whole:6.1%}")
    inside = sum(took[name] for name in towers)
    print(f"outside the network {1 - inside / whole:.2%}; read, decode, scale and tokenise run ahead in threads")


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", choices=("owl", "dino"))
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--px", type=int, help="side (448), of Grounding DINO the short side (800)")
    chosen = parser.parse_args()
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(variable, "1")  # before torch is imported, which reads them then
    import torch

    if chosen.full:
        full(chosen.full, chosen.images, chosen.px or {"owl": 448, "dino": 800}[chosen.full])
    else:
        torch.set_num_threads(1)
        post()
        post_dino()
        scaling()
        remembered()


if __name__ == "__main__":
    main()
