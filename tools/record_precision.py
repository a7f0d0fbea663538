"""Record the times that the chapter on precision and memory quotes.

    python tools/record_precision.py

One training step of the preset tales-1m on 8 rows, forward and backward: in
float32, under 16-bit autocast, with recomputed blocks, and through
torch.compile. CPU time of one thread, the median of interleaved rounds, so
that other work on the machine matters little. Takes about two minutes of one
core, most of it compiling, and writes nbs/results/precision.json.
"""

import statistics
import time
import warnings
from pathlib import Path

import torch

from minillm.bench import processor
from minillm.files import write_json
from minillm.precision import checkpointed, compiled
from minillm.pretrain import autocast, cross_entropy
from minillm.transformer import GPT, GPTConfig

ROOT = Path(__file__).resolve().parent.parent
ROWS, ROUNDS = 8, 9
VARIANTS = {  # name: dtype, whether blocks are recomputed, compiled
    "float32": ("float32", False, False),
    "bfloat16": ("bfloat16", False, False),
    "float16": ("float16", False, False),
    "recomputed float32": ("float32", True, False),
    "recomputed bfloat16": ("bfloat16", True, False),
    "compiled float32": ("float32", False, True),
    "compiled bfloat16": ("bfloat16", False, True),
}


def main() -> None:
    torch.set_num_threads(1)
    cpu, cfg = torch.device("cpu"), GPTConfig.preset("tales-1m")
    model = GPT(cfg, seed=0)
    run_compiled = compiled(model)
    g = torch.Generator().manual_seed(0)
    size = (ROWS, cfg.context_length + 1)
    ids = torch.randint(cfg.vocab_size, size, generator=g)
    x, targets = ids[:, :-1], ids[:, 1:]

    def recomputed(tokens: torch.Tensor) -> torch.Tensor:
        """Return the logits, every block to be run again in backward."""
        h = model.embed(tokens)
        for block in model.blocks:
            h = checkpointed(block, h)
        return model.lm_head(model.norm(h))

    def step(name: str) -> tuple[float, float]:
        """Take one step; return its CPU seconds and its loss."""
        dtype, again, compile_it = VARIANTS[name]
        forward = recomputed if again else model
        start = time.process_time()
        with autocast(cpu, getattr(torch, dtype)):
            logits = (run_compiled if compile_it else forward)(x)
        loss = cross_entropy(logits, targets)
        loss.backward()
        seconds = time.process_time() - start
        model.zero_grad()
        return seconds, loss.item()

    waits, losses = {}, {}
    for name in VARIANTS:  # the first call compiles
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            losses[name] = step(name)[1]
        waits[name] = time.perf_counter() - start
        print(f"{name:20s} first step {waits[name]:6.1f} s", flush=True)
    times = {name: [] for name in VARIANTS}
    for _ in range(ROUNDS):
        for name in VARIANTS:
            times[name].append(step(name)[0])
    medians = {name: statistics.median(t) for name, t in times.items()}
    for name, seconds in medians.items():
        print(f"{name:20s} {seconds * 1e3:7.1f} ms, "
              f"{medians['float32'] / seconds:.2f} times float32")
    record = {
        "machine": f"{processor()}, one thread, torch {torch.__version__}",
        "settings": {"preset": "tales-1m", "rows": ROWS, "rounds": ROUNDS,
                     "clock": "CPU time of a forward and backward pass"},
        "compile_fallback": run_compiled.reason,
        "seconds": {k: round(v, 5) for k, v in medians.items()},
        "losses": losses,
        "first_call_wall_seconds": {k: round(v, 1) for k, v in waits.items()},
    }  # fmt: skip
    write_json(ROOT / "nbs" / "results" / "precision.json", record)


if __name__ == "__main__":
    main()
