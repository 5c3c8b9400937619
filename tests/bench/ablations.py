"""The paper's ablations on scenes: the recipe `deploy/recipes/scenes.yaml`, shortened, with one thing changed a row.

    python tests/bench/ablations.py STORE [--steps 600] [--batch 64] [--seeds 3] [--only ROW ...]

Two runs at a time, one thread each; a run that is done is not repeated. Prints mean and standard deviation over the
seeds, in per cent. Every row sees the same number of images; the clean row has its own, noiseless scenes.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

RECIPE = Path(__file__).parents[2] / "deploy/recipes/scenes.yaml"
CLEAN = [f"train.scenes.{noise}=0.0" for noise in ("missing", "duplicated", "shifted", "wrong_phrase", "caption_noise")]
CLIP = "CLIP alone, regions by RoIAlign"
ROWS: dict[str, list[str]] = {
    "as the recipe": [],
    "RoIAlign for the Prompter": ["train.model.region=roialign"],
    "no conflict filter": ["train.objective.conflict_cosine=null"],
    "no grounding loss": ["train.objective.grounding=none"],
    "grounding by L1 + GIoU": ["train.objective.grounding=l1_giou"],
    "M = 2": ["train.data.regions=2"],
    "M = 1": ["train.data.regions=1"],
    "no noise in the scenes": CLEAN,
    "image tokens averaged": ["train.model.prompt_pool=image"],
    "no positions for image tokens": ["train.model.positions=false"],
    CLIP: ["train.objective.region_weight=0.0", "train.evaluate.regions.by=roialign"],
}
SHOWN = {
    "regions/macc": "mAcc",
    "crops/macc": "mAcc of crops",
    "grounding/acc50": "acc@0.5",
    "pairs/i2t_1": "i2t R@1",
    "pairs/t2i_1": "t2i R@1",
}


def run(name: str, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """Train one row with one seed, measure it, and return the measures in 0..1."""
    recipe = yaml.safe_load(RECIPE.read_text())
    recipe["train"]["evaluate"]["crops"] = {"kind": "regions", "by": "crop"}
    if name in (CLIP, "no grounding loss"):
        del recipe["train"]["evaluate"]["grounding"]
    folder = options.store / "ablations" / f"{name}, {options.steps} of {options.batch}, seed {seed}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    sets = {
        "store": options.store,
        "train.folder": folder,
        "train.loop.steps": options.steps,
        "train.loop.batch": options.batch,
        "train.loop.seed": seed,
        "train.loop.save_steps": options.steps,
        "train.loop.evaluate_steps": "null",
        "train.data.workers": 0,
        "train.objective.conflict_from_step": options.steps // 8,
    }
    arguments = [f"{key}={value}" for key, value in sets.items()] + ROWS[name]
    done = folder / "model/eval.json"
    if not done.exists():
        for command in (["train"], ["eval", str(folder / "model")]):
            command = [command[0], str(folder / "recipe.yaml"), *command[1:]]
            vesl = [sys.executable, "-m", "vesl.pipeline.cli", *command]
            vesl += [word for text in arguments for word in ("--set", text)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            finished = subprocess.run(vesl, env=environment, capture_output=True, text=True, check=False)
            if finished.returncode:
                raise SystemExit(f"{name}, seed {seed}: {finished.stderr[-2000:]}")
    results = json.loads(done.read_text())
    return {f"{s}/{k}": m["value"] for s, r in results.items() for k, m in r["metrics"].items()}


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=list(ROWS), choices=list(ROWS))
    options = parser.parse_args()
    options.store.mkdir(parents=True, exist_ok=True)
    jobs = [(name, seed) for seed in range(options.seeds) for name in options.only]
    with ThreadPoolExecutor(2) as pool:
        found = dict(zip(jobs, pool.map(lambda job: run(*job, options), jobs), strict=True))
    print(f"{options.steps} steps of {options.batch}, {options.seeds} seeds\n")
    print(f"{'':34}" + "".join(f"{title:>16}" for title in SHOWN.values()))
    for name in options.only:
        cells = []
        for key in SHOWN:
            values = [100 * found[name, seed][key] for seed in range(options.seeds) if key in found[name, seed]]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):6.1f} ± {spread:4.1f}" if values else "-")
        print(f"{name:34}" + "".join(f"{cell:>16}" for cell in cells))


if __name__ == "__main__":
    main()
