"""The training loop: batches in, checkpoints, logs and a model folder out.

    torchrun --nproc-per-node 8 -m vesl.pipeline.cli train RECIPE

Every rank runs `train`; one process without torchrun is a world of one. The loop knows neither CLIP nor boxes: a model
turns a batch into features, an objective turns the features of all ranks into a loss.
"""

import dataclasses
import hashlib
import json
import logging
import math
import signal
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..contract import ModelError
from . import checkpoint
from .data import Batch
from .encoder import Encoder, export
from .evaluate import evaluate
from .gradients import backward, split
from .journal import Journal, Meter
from .loader import Loader, read_takedown
from .model import Cloc, Features
from .objective import cloc_loss
from .options import Evaluation, Loop, Train
from .ranks import StoppedError, agree, asked_to_stop, joined
from .sets import SetError
from .text import Text, learn_text, load_text, read_texts

log = logging.getLogger(__name__)
GIVE_UP = 100  # steps in a row that are not finite
STATE = frozenset({"step", "skipped", "model", "clip", "optimizer", "loader", "world", "options", "index_sha256"})


def train(
    options: Train, folder: Path, *, evaluations: Mapping[str, Evaluation] | None = None, **places: Any
) -> dict[str, Any]:
    """Train to the end of `options.loop`, from the newest checkpoint in `folder` if there is one.

    `options.data.shards` is named; `places` go to `Loader` (storage_options, images, takedown). Returns the last line
    of the log. Raises ModelError for what cannot be used, and StoppedError.
    """
    with joined() as (rank, world, device):
        _check(options, world)
        torch.manual_seed(options.loop.seed)
        found = checkpoint.latest(folder / "checkpoints")
        state = found[1] if found else None
        if state is not None and not state.keys() >= STATE:
            raise ModelError(f"{folder}: its checkpoint is of another version of vesl; name a new train.folder")
        agree(state["step"] if state else 0, folder, world)
        text = _text(options, folder, rank, places)
        model = Cloc(options.model, options.objective, text, json.loads(state["clip"]) if state else None)
        if device.type == "cpu":  # its fused attention is slow in the backward pass
            model.clip.set_attn_implementation("eager")
        if options.loop.checkpointing:
            model.clip.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.to(device).train()
        run = Run(options, folder, model, text, rank, world, device, state, places)
        found = state = None  # as large as the model and its optimiser
        return run.loop(evaluations or {})


def learning_rate(step: int, loop: Loop) -> float:
    """Of step 0, 1, ...: linear warm-up to `lr`, then half a cosine that reaches 0 after the last."""
    if step < loop.warmup_steps:
        return loop.lr * (step + 1) / loop.warmup_steps
    done = (step - loop.warmup_steps) / max(1, loop.steps - loop.warmup_steps)
    return loop.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def identity(options: Train) -> dict[str, Any]:
    """What of the options decides a run's result, but for the shards' content; the rest may change on the way."""
    words: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(options)))
    for name in ("folder", "evaluate", "scenes"):
        del words[name]
    for name in ("log_steps", "save_steps", "evaluate_steps", "keep", "compile"):
        del words["loop"][name]
    for name in ("shards", "images", "takedown", "workers"):
        del words["data"][name]
    return words


def fingerprint(options: Train, index: bytes) -> str:
    """12 hex digits that name a run by what decides its result; `index` is the shards' index.json."""
    return hashlib.sha256(json.dumps(identity(options), sort_keys=True).encode() + index).hexdigest()[:12]


class Run:
    """The state of a run on one rank, and what is done with it."""

    def __init__(
        self, options: Train, folder: Path, model: Cloc, text: Text, rank: int, world: int, device: torch.device,
        state: dict[str, Any] | None, places: Mapping[str, Any],
    ) -> None:  # fmt: skip
        """Wire model, optimiser and loader, and put `state` into them. Raises ModelError where it does not fit."""
        loop = options.loop
        self.options, self.folder, self.model, self.text = options, folder, model, text
        self.rank, self.world, self.device, self.places = rank, world, device, places
        self.step, self.skipped, self.bad_in_a_row = 0, 0, 0
        decayed = [p for p in model.parameters() if p.ndim > 1]  # ours, as CLIP's code: no gains, biases or scales
        others = [p for p in model.parameters() if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": loop.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=loop.lr, betas=(loop.betas[0], loop.betas[1]), fused=True)
        if state is not None:
            self._restore(state)
        shards = options.data.shards
        assert shards is not None
        self.loader = Loader(
            shards, options.data, text, batch=loop.batch // world, image_px=model.image_px,
            context=model.context, seed=loop.seed, rank=rank, world=world,
            state=state["loader"][rank] if state else None, **places,
        )  # fmt: skip
        if loop.compile:
            model.clip.vision_model.compile()
            model.clip.text_model.compile()
        self.network: nn.Module = model
        if world > 1:
            devices = [device] if device.type == "cuda" else None
            with warnings.catch_warnings():  # newer torch has another name for the option, which older lacks
                warnings.simplefilter("ignore", FutureWarning)
                self.network = DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)

    def loop(self, evaluations: Mapping[str, Evaluation]) -> dict[str, Any]:
        """Run to the last step; save on the way, at the end, and when asked to stop."""
        loop, last = self.options.loop, {}
        journal = Journal(self.folder, self.step, loop.steps) if self.rank == 0 else None
        with journal or nullcontext(), asked_to_stop() as asked:
            meter = Meter(self.device, self.step)
            batches = iter(self.loader)
            while self.step < loop.steps:
                with meter.waiting():
                    batch = next(batches)
                parts = self._step(batch, meter)
                if journal:
                    journal.advance(self.step)
                done = self.step == loop.steps
                if done or self.step % loop.log_steps == 0 or self.step == 1:
                    last = self._line(parts, meter)
                    if journal:
                        journal.write(self.step, last, _numbers(last))
                stop = self._any(asked)
                if done or stop or self.step % loop.save_steps == 0:
                    self.save()
                if stop and not done:
                    said = f"stopped after step {self.step} of {loop.steps}; run again to go on"
                    raise StoppedError(asked[0] if asked else signal.SIGTERM, said)
                if evaluations and loop.evaluate_steps and not done and self.step % loop.evaluate_steps == 0:
                    last |= self._evaluate(evaluations, journal)
                    meter.start(self.step)
            if self.rank == 0 and not (self.folder / "model/cloc.json").exists():
                export(self.model, self.text, self.options.model, self.options.objective, self.folder / "model")
            if evaluations:
                last |= self._evaluate(evaluations, journal, self.folder / "eval.json")
        return last

    def _step(self, batch: Batch, meter: "Meter") -> dict[str, Tensor]:
        loop = self.options.loop
        batch = to_device(batch, self.device)
        batches = split(batch, loop.micro_batch or len(batch.images))
        lr = learning_rate(self.step, loop)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        passes = 0 if loop.compile else 3 + (len(batches) > 1) + loop.checkpointing
        with meter.counting(self.step + 1, passes):
            parts = backward(self.network, batches, self._objective, self.step, self._autocast)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), loop.clip_norm)
        if bool(torch.isfinite(norm)):  # after the ranks' gradients were averaged, so all ranks decide alike
            self.optimizer.step()
            self.model.clamp()
            self.bad_in_a_row = 0
        else:
            self.skipped += 1
            self.bad_in_a_row += 1
            if self.rank == 0:
                log.warning("step %d is not finite and was skipped (%d so far)", self.step + 1, self.skipped)
            if self.bad_in_a_row >= GIVE_UP:
                raise ModelError(f"{GIVE_UP} steps in a row were not finite; lower train.loop.lr, or take fp32")
        self.step += 1
        return parts | {"grad_norm": norm.detach(), "lr": torch.tensor(lr)}

    def _objective(self, features: Features, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        return cloc_loss(features, batch, self.options.objective, step)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.loop.precision == "bf16")

    def _line(self, parts: dict[str, Tensor], meter: Meter) -> dict[str, float]:
        """The log's values: losses averaged over the ranks, rates since the line before."""
        names, values = list(parts), torch.stack([v.float().to(self.device) for v in parts.values()])
        if self.world > 1:
            dist.all_reduce(values)
            values /= self.world
        line = dict(zip(names, values.tolist(), strict=True))
        regions = line.get("region_text", 0.0) + line.get("grounding", 0.0)
        line["loss"] = line["image_text"] + line.get("lambda", 0.0) * regions
        line |= meter.rates(self.step, self.options.loop.batch) | {"skipped_steps": self.skipped}
        return line | {f"data/{name}": count for name, count in sorted(self.loader.counts.items())}

    def _any(self, asked: list[int]) -> bool:
        """Whether any rank was asked to stop."""
        if self.world == 1:
            return bool(asked)
        flag = torch.tensor(len(asked), device=self.device)
        dist.all_reduce(flag)
        return bool(flag)

    def _evaluate(
        self, evaluations: Mapping[str, Evaluation], journal: Journal | None, final: Path | None = None
    ) -> dict[str, float]:
        """Measure the model as it is, on rank 0; the others wait. `final`: where the last measures are written, once.

        What fails on the way is a warning; at the end a ModelError, when the rest is measured and written.
        """
        values: dict[str, float] = {}
        faults: list[str] = []
        if journal and not (final and final.exists()):
            results: dict[str, Any] = {}
            encoder = Encoder(self.model, self.text)
            for name, spec in evaluations.items():
                try:
                    results |= evaluate(encoder, {name: spec}, storage_options=self.places.get("storage_options"))
                except (SetError, ModelError, OSError) as error:
                    faults.append(f"evaluation {name}: {error}")
                    log.warning("%s", faults[-1])
            values = {f"{name}/{k}": m["value"] for name, r in results.items() for k, m in r["metrics"].items()}
            journal.write(self.step, values, "  ".join(f"{k} {v:.3f}" for k, v in values.items()))
            if final and not faults:
                final.write_text(json.dumps(results, indent=1) + "\n")
        if self.world > 1:
            dist.barrier()
        if final and faults:
            raise ModelError(f"{self.folder / 'model'} is finished, but {faults[0]}")
        return values

    def save(self) -> None:
        """Write a checkpoint; every rank gives its place in the data."""
        loaders: list[Any] = [self.loader.state()]
        if self.world > 1:
            loaders = [None] * self.world
            dist.all_gather_object(loaders, self.loader.state())
        if self.rank == 0:
            self._write(loaders)
        if self.world > 1:  # nor may a rank end at once: gloo's thread needs the GIL to let go of what was gathered,
            dist.barrier()  # and would not get it from the destructor that waits for that thread

    def _write(self, loaders: list[Any]) -> None:
        state = {
            "step": self.step,
            "skipped": self.skipped,
            "model": self.model.state_dict(),
            "clip": json.dumps(self.model.clip.config.to_dict()),
            "optimizer": self.optimizer.state_dict(),
            "loader": loaders,
            "world": self.world,
            "options": json.dumps(identity(self.options), sort_keys=True),
            "index_sha256": self.loader.index_sha256,
        }
        checkpoint.save(self.folder / "checkpoints", self.step, state, self.options.loop.keep)

    def _restore(self, state: dict[str, Any]) -> None:
        mine, theirs = identity(self.options), json.loads(state["options"])
        if mine != theirs:
            differ = [f"{b}.{k}" for b in mine for k in mine[b] if mine[b][k] != theirs.get(b, {}).get(k)]
            raise ModelError(f"{self.folder}: its checkpoint has another {', '.join(differ)}; name a new train.folder")
        if state["world"] != self.world:
            raise ModelError(
                f"{self.folder}: was trained by {state['world']} processes, not {self.world}; take as many"
            )
        self.step, self.skipped = state["step"], state["skipped"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        log.info("going on from step %d", self.step)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch's tensors on `device`, copied without waiting where they are pinned."""
    moved = {k: v.to(device, non_blocking=True) for k, v in vars(batch).items() if isinstance(v, Tensor)}
    return dataclasses.replace(batch, **moved)  # type: ignore[arg-type]


def _check(options: Train, world: int) -> None:
    loop = options.loop
    share, rest = divmod(loop.batch, world)
    if rest or not share:
        raise ModelError(f"train.loop.batch: {loop.batch} images cannot be shared equally by {world} processes")
    if loop.micro_batch and loop.micro_batch < share and share % loop.micro_batch:
        raise ModelError(f"train.loop.micro_batch: {loop.micro_batch} does not divide a process's {share} images")


def _text(options: Train, folder: Path, rank: int, places: Mapping[str, Any]) -> Text:
    """The run's tokenizer; one that is learned is learned by rank 0, once, and stays in the run's folder."""
    reference = options.model.text
    kind, _, size = reference.partition(":")
    if kind != "bpe":
        return load_text(reference)
    place = folder / "tokenizer"
    if rank == 0 and not (place / "tokenizer.json").exists():
        assert options.data.shards is not None
        storage = places.get("storage_options")
        takedown = read_takedown(places.get("takedown"), storage, needed=False)
        takedown |= read_takedown(options.data.takedown, storage, needed=True)
        learn_text(read_texts(options.data.shards, 100_000, storage, takedown), int(size)).save(place)
    if dist.is_initialized():
        dist.barrier()
    return load_text(str(place))


def _numbers(line: Mapping[str, float]) -> str:
    names = ("loss", "image_text", "region_text", "grounding", "samples_per_s", "data_wait")
    return "  ".join(f"{name} {line[name]:.3g}" for name in names if name in line)
