"""Record the runs that the chapter on pretraining argues from.

    python tools/record_batch_size.py

Batch sizes: every run sees the same number of tokens, so a batch of twice the
rows gets half the steps. For each size learning rates a factor of 2 apart are
tried with one seed until the best has worse neighbours, and the best is run
with three seeds. Then windows against documents, three seeds each, and one
long run. Takes about 5 minutes of one core, shared by two processes of one
thread each, and writes nbs/results/batch_size_runs.json.
"""

import math
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from minillm.bench import processor
from minillm.files import write_json
from minillm.loading import TokenLoader
from minillm.pretrain import (
    IGNORE_INDEX,
    bytes_per_token,
    cross_entropy,
    document_rows,
    evaluate_loss,
    gather_rows,
)
from minillm.tales import corpus, tale_log2_prob
from minillm.tokenizer import train_bpe
from minillm.transformer import GPT, GPTConfig

ROOT = Path(__file__).resolve().parent.parent
SIZES = (2, 4, 8, 16, 32, 64)  # rows of 64 tokens
SEEDS = (0, 1, 2)
BUDGET = 150_000  # tokens in every run
MODEL = {"vocab_size": 512, "context_length": 64, "d_model": 64,
         "n_layers": 2, "n_heads": 2}  # fmt: skip
STORY = 384  # the context of windows against documents: a whole story
ADAM = {"betas": (0.9, 0.95), "weight_decay": 0.1}
WARMUP = 0.1  # of the tokens; then the rate falls in a straight line to 0
BASE_LR = 6e-3  # the middle rate for 8 rows


def texts() -> dict:
    """Return the chapter's training and held-out text, and the floor."""
    docs, held_out = corpus(2_000_000), corpus(60_000, split="validation")
    tokenizer = train_bpe(docs[:500], MODEL["vocab_size"])
    ids = tokenizer.encode_documents(held_out)
    n_bytes = sum(len(doc.encode()) for doc in held_out)
    return {
        "tokens": tokenizer.encode_documents(docs), "held_out": ids,
        "end_of_text": tokenizer.end_of_text,
        "bytes_per_token": bytes_per_token(ids, tokenizer),
        "floor": -sum(map(tale_log2_prob, held_out)) / n_bytes,
    }  # fmt: skip


def train_once(
    text: dict,  # from `texts`
    size: int,  # rows in a batch
    lr: float,  # the largest learning rate
    seed: int,  # of the weights and of the batches
    *,
    align: str = "windows",  # or "documents"
    context_length: int = 64,  # T
    budget: int = BUDGET,  # tokens that are targets
    n_evals: int = 1,  # evaluations, evenly spaced, the last at the end
) -> tuple[dict, GPT]:  # settings, losses and CPU time; the model
    """Train one model on the budget of tokens."""
    loader = TokenLoader(
        text["tokens"], size, context_length, align=align, seed=seed,
        mode="random" if align == "windows" else "sequential",
        bucket=16 if align == "documents" else 0,
        end_of_text=text["end_of_text"],
    )  # fmt: skip
    cfg = GPTConfig(**MODEL | {"context_length": context_length})
    model = GPT(cfg, seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, **ADAM)
    alone = text["end_of_text"] if context_length == STORY else None
    seen, steps, seconds, curve = 0, 0, 0.0, []
    while seen < budget:
        start = time.process_time()
        batch = next(loader)
        n_targets = int((batch.targets != IGNORE_INDEX).sum())
        done = (seen + n_targets / 2) / budget
        rate = lr * max(0, min(done / WARMUP, (1 - done) / (1 - WARMUP)))
        optimizer.param_groups[0]["lr"] = rate
        loss = cross_entropy(model(batch.tokens), batch.targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen, steps = seen + n_targets, steps + 1
        seconds += time.process_time() - start
        if seen >= budget * (len(curve) + 1) / n_evals:
            nats = evaluate_loss(model, text["held_out"], batch_size=64,
                                 end_of_text=alone)  # fmt: skip
            curve.append([seen, round(nats, 4)])
    record = {"batch_size": size, "lr": lr, "seed": seed, "steps": steps,
              "tokens": seen, "held_out": curve[-1][1],
              "cpu_seconds": round(seconds, 1)}  # fmt: skip
    return record | ({"curve": curve} if n_evals > 1 else {}), model


def tune(
    text: dict,  # from `texts`
    size: int,  # rows in a batch
) -> list[dict]:  # the runs, in the order in which they were made
    """Find the best rate with seed 0, then run it with all seeds."""
    runs: dict[tuple, dict] = {}

    def loss(lr: float, seed: int = 0) -> float:
        """Return the held-out loss of a run, training it if need be."""
        key = float(f"{lr:.3g}"), seed
        if key not in runs:
            runs[key] = train_once(text, size, *key)[0]
            print(f"batch {size:3d} lr {key[0]:.5f} seed {seed}: "
                  f"{runs[key]['held_out']}", flush=True)  # fmt: skip
        return runs[key]["held_out"]

    best = BASE_LR * math.sqrt(size / 8)
    while (better := min((best, best / 2, best * 2), key=loss)) != best:
        best = better
    for seed in SEEDS:
        loss(best, seed)
    return list(runs.values())


@torch.no_grad()
def loss_by_place(
    model: GPT,
    text: dict,  # from `texts`
    width: int = 32,  # targets in one part of a story
) -> list[float]:  # nats per token, first part first
    """Return the held-out loss by the place in the story."""
    rows = document_rows(text["held_out"], STORY, text["end_of_text"])
    x, targets = gather_rows(text["held_out"], *rows,
                             end_of_text=text["end_of_text"])  # fmt: skip
    nats = F.cross_entropy(model(x).transpose(1, 2), targets,
                           ignore_index=IGNORE_INDEX, reduction="none")
    counts = (targets != IGNORE_INDEX).sum(0).numpy()
    parts = np.arange(0, 10 * width, width)
    sums = np.add.reduceat(nats.sum(0).numpy()[: 10 * width], parts)
    return (sums / np.add.reduceat(counts[: 10 * width], parts)).tolist()


def compare_rows(
    text: dict,  # from `texts`
    align: str,  # "windows" or "documents"
) -> list[dict]:  # a run for each seed
    """Train on windows or documents as long as a story."""
    rows = []
    for seed in SEEDS:
        run, model = train_once(text, 2, BASE_LR / 2, seed, align=align,
                                context_length=STORY)  # fmt: skip
        places = [round(v, 4) for v in loss_by_place(model, text)]
        rows.append(run | {"align": align, "by_place": places})
        print(align, seed, run["held_out"], flush=True)
    return rows


def main() -> None:
    torch.set_num_threads(1)
    text = texts()
    with ProcessPoolExecutor(
        2, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        tuned = pool.map(partial(tune, text), SIZES)
        rows = pool.map(partial(compare_rows, text), ("windows", "documents"))
        runs = [run for group in tuned for run in group]
        best = min(runs, key=lambda run: run["held_out"])
        long = pool.submit(train_once, text, best["batch_size"], best["lr"], 0,
                           budget=8 * BUDGET, n_evals=40)  # fmt: skip
        rows = [run for group in rows for run in group]
        long = long.result()[0]
    print(f"long run: {long['held_out']}")
    record = {
        "machine": f"{processor()}, one thread, torch {torch.__version__}",
        "settings": {"model": MODEL, "adamw": ADAM, "warmup": WARMUP,
                     "budget": BUDGET, "seeds": SEEDS, "story": STORY},
        "measure": "nats per token of held-out stories: in windows of 64; "
                   "one story a row for windows against documents",
        "bytes_per_token": text["bytes_per_token"],
        "floor_bits_per_byte": text["floor"],
        "runs": runs, "rows": rows, "long": long,
    }  # fmt: skip
    write_json(ROOT / "nbs" / "results" / "batch_size_runs.json", record)


if __name__ == "__main__":
    main()
