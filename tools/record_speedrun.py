"""Run the speed-run's recipes and write nbs/results.

    python tools/record_speedrun.py                # the ladder, three seeds
    python tools/record_speedrun.py --variants     # what did not help
    python tools/record_speedrun.py --tales        # TinyTales, five minutes
    python tools/record_speedrun.py --fit 24       # steps that take 24 s

Run it on an otherwise idle machine, after `minillm download shakespeare`; or
give --text FILE. A run that the results have already is not done again.
"""

import argparse
import hashlib
import json
import math
import platform
from dataclasses import asdict, replace
from pathlib import Path
from time import process_time

import torch
from torch.nn import functional as F

from minillm.bench import processor
from minillm.files import read_json, write_json
from minillm.pretrain import bytes_per_token, evaluate_loss
from minillm.speedrun import (
    TARGET,
    SpeedGPT,
    five_minutes_recipe,
    read_shakespeare,
    recipes,
    run_speedrun,
    variants,
)

RESULTS = Path(__file__).resolve().parent.parent / "nbs" / "results"


def machine(note: str) -> str:
    """Name what the figures were measured on."""
    flags = [name for name, probe in (
        ("AVX512_BF16", "_is_avx512_bf16_supported"),
        ("AMX", "_is_amx_tile_supported"),
    ) if getattr(torch.cpu, probe, bool)()]
    parts = [processor(), *flags, f"{torch.get_num_threads()} threads",
             f"Python {platform.python_version()}",
             f"torch {torch.__version__}"]
    return ", ".join(parts + [note] * bool(note))


def fused(q, k, v, mask):
    """Attend through torch's kernel."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def plain(q, k, v, mask):
    """Attend by products written out."""
    scores = torch.baddbmm(mask, q.flatten(0, 1), k.flatten(0, 1).mT,
                           alpha=q.shape[-1] ** -0.5)
    return (scores.softmax(-1) @ v.flatten(0, 1)).view(q.shape)


def attention_times() -> list[dict]:
    """Time attention forward and backward: fused, and written out."""
    rows = []
    for T, B, H, K in ((64, 12, 4, 32), (256, 8, 2, 64), (1024, 1, 12, 64)):
        for dtype in (torch.float32, torch.bfloat16):
            parts = [torch.randn(B, H, T, K, dtype=dtype, requires_grad=True)
                     for _ in range(3)]
            mask = parts[0].new_full((T, T), -torch.inf).triu(1)
            row = {"T": T, "B": B, "H": H, "K": K,
                   "dtype": str(dtype).removeprefix("torch.")}
            for name, attend in (("fused", fused), ("plain", plain)):
                best = {"forward": 1e9, "backward": 1e9}
                for _ in range(12):
                    a = process_time()
                    out = attend(*parts, mask)
                    b = process_time()
                    torch.autograd.grad(out, parts, out.detach())
                    c = process_time()
                    best["forward"] = min(best["forward"], b - a)
                    best["backward"] = min(best["backward"], c - b)
                row[name] = {k: 1e3 * s for k, s in best.items()}
            rows.append(row)
            print(row, flush=True)
    return rows


def record(result, recipe) -> dict:
    """Return a run as JSON can hold it, with the settings it had."""
    row = {k: getattr(result, k) for k in (
        "recipe", "seed", "loss", "targets", "steps", "tokens", "seconds",
        "cpu_seconds", "threads", "parameters", "curve")}
    return row | {"change": recipe.change, "settings": asdict(recipe)}


def step_seconds(text: str, recipe, n_steps: int = 30) -> float:
    """Measure the CPU seconds of one step, torch's warm-up left out."""
    few = [replace(recipe, training=replace(recipe.training, max_steps=n))
           for n in (10, 10 + n_steps)]
    seconds = [run_speedrun(text, r).cpu_seconds for r in few]
    return (seconds[1] - seconds[0]) / n_steps


def refresh(path: Path, head: dict, todo: list, text: str) -> None:
    """Do the runs that the file lacks; write it after each."""
    for kind, recipe, seed in todo:
        data = read_json(path) if path.is_file() else {}
        runs = data.get(kind, [])
        done = [r for r in runs if r["seed"] == seed
                and r["recipe"] == recipe.name]
        if any(_plain(r["settings"]) == _plain(asdict(recipe))
               and r["threads"] == torch.get_num_threads() for r in done):
            continue
        result = run_speedrun(text, recipe, seed=seed, eval_every=max(
            1, recipe.training.max_steps // 6))
        data = read_json(path) if path.is_file() else {}
        runs = [r for r in data.get(kind, []) if r not in done]
        runs.append(record(result, recipe))
        write_json(path, data | head | {kind: runs})
        print(f"{recipe.name:12} seed {seed}  {result.loss:.4f}  "
              f"{result.seconds:6.1f} s  {result.cpu_seconds:6.1f} CPU s",
              flush=True)


def _plain(settings: dict) -> str:
    """Compare settings as JSON: tuples are lists there."""
    return json.dumps(settings, sort_keys=True)


def main() -> None:
    """Read the command line and record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", help="names of recipes")
    parser.add_argument("--note", default="", help="for the machine's line")
    parser.add_argument("--clock", default="seconds",
                        choices=["seconds", "cpu_seconds"],
                        help="cpu_seconds: where other work goes on")
    parser.add_argument("--variants", action="store_true")
    parser.add_argument("--kernels", action="store_true")
    parser.add_argument("--tales", action="store_true")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--fit", type=float, metavar="SECONDS")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.tales:
        record_tales(args)
        return
    text = read_shakespeare(args.text)
    chosen = recipes()
    if args.only:
        chosen = {name: chosen[name] for name in args.only}
    if args.fit:
        for recipe in chosen.values():
            each = step_seconds(text, recipe) / args.threads
            print(f"{recipe.name:12} {1e3 * each:7.2f} ms a step: "
                  f"{args.fit / each:7.0f} steps in {args.fit} s")
        return
    head = {"machine": machine(args.note), "target": TARGET,
            "clock": args.clock,
            "sha256": hashlib.sha256(text.encode()).hexdigest()}
    path = RESULTS / "speedrun_shakespeare.json"
    if args.kernels or not path.is_file():
        old = read_json(path) if path.is_file() else {}
        write_json(path, old | head | {"attention": attention_times()})
    todo = [("runs", r, seed) for seed in args.seeds for r in chosen.values()]
    if args.variants:
        best = recipes()["best"]
        budget = best.training.max_steps * step_seconds(text, best)
        todo = []
        for recipe in variants().values():
            n = max(1, round(budget / step_seconds(text, recipe)))
            todo += [("variants", replace(recipe, training=replace(
                recipe.training, max_steps=n)), args.seeds[0])]
    refresh(path, head, todo, text)


def record_tales(args: argparse.Namespace) -> None:
    """Train TinyTales for some minutes and write what it reached."""
    from minillm.tales import tale_log2_prob
    from minillm.train import quickstart_recipe, train

    rows, seconds = [], 60 * args.minutes
    for name, recipe, plain in (
        ("quickstart's settings", quickstart_recipe(), False),
        ("five_minutes_recipe()", five_minutes_recipe(), True),
    ):
        tokenizer, tokens, held_out = recipe.tokenizer_and_tokens()
        texts = recipe.held_out()
        floor = -sum(map(tale_log2_prob, texts)) / sum(
            len(text.encode()) for text in texts)
        cfg = recipe.training
        trial = train(
            SpeedGPT(recipe.model, plain_attention=plain, seed=0), tokens,
            None, replace(cfg, max_steps=60), progress=False)
        steps = int(seconds / (trial.seconds / trial.step))
        model = SpeedGPT(recipe.model, plain_attention=plain, seed=cfg.seed)
        result = train(model, tokens, held_out, replace(
            cfg, max_steps=steps, eval_every=max(1, steps // 10)),
            tokenizer=tokenizer)
        nats = evaluate_loss(model, held_out,
                             end_of_text=tokenizer.end_of_text)
        size = bytes_per_token(held_out, tokenizer)
        rows.append({
            "change": name, "steps": steps, "tokens": result.tokens,
            "seconds": result.seconds, "floor": floor,
            "ratio": nats / math.log(2) / size / floor,
            "curve": [[r["seconds"], r["val_bits_per_byte"]]
                      for r in result.history if "val_loss" in r],
            "settings": asdict(recipe)})
        print(rows[-1]["change"], steps, rows[-1]["ratio"], flush=True)
    write_json(RESULTS / "tales_five_minutes.json", {
        "machine": machine(args.note), "about":
        f"{args.minutes:g} minutes of training each", "rows": rows})


if __name__ == "__main__":
    main()
