"""Measure the runs that the chapter on optimizers reads: toy models.

Run as `OMP_NUM_THREADS=1 python tools/measure_optim.py PART...` in the
repository's root, where a PART is one of the functions below the line. Each
replaces its entry of nbs/results/optim_runs.json and takes 10 to 100 seconds
of one core.
"""

import copy
import json
import platform
import sys
import time
from pathlib import Path

import torch
from torch import nn

from minillm.optim import (
    hidden_matrices,
    lr_at,
    lr_range_test,
    make_optimizer,
    param_groups,
    set_lr,
)
from minillm.pretrain import (
    TrainConfig,
    cross_entropy,
    evaluate_loss,
    get_batch,
)
from minillm.tales import corpus
from minillm.tokenizer import train_bpe
from minillm.transformer import GPT, GPTConfig

OUT = Path("nbs/results/optim_runs.json")
SEEDS = (0, 1, 2)
CONTEXT, VOCAB = 32, 512
SETTING = (
    "GPT of 2 blocks and 2 heads, width 64 unless said, context 32, BPE of "
    "512 from TinyTales; 8 rows a batch unless said; seeds 0, 1, 2 of weights "
    "and batches; AdamW betas 0.9 and 0.95, weight decay 0.1, clipping at 1; "
    "warm-up 20 steps and a linear fall to 0 unless said; losses in nats per "
    "token on the same 8,000 held-out tokens"
)


def texts():
    """Return the training tokens and the held-out ones."""
    docs = corpus(2_000_000)
    tokenizer = train_bpe(docs[:500], VOCAB)
    held_out = tokenizer.encode_documents(corpus(30_000, split="validation"))
    return tokenizer.encode_documents(docs), held_out[:8001]


TOKENS, HELD_OUT = texts()


def model_of(width, seed):
    """Make a fresh model."""
    return GPT(GPTConfig(vocab_size=VOCAB, context_length=CONTEXT,
                         d_model=width, n_layers=2, n_heads=2), seed=seed)


def config(**changes):
    """Return the settings of a run, the usual ones unless changed."""
    base = {"max_steps": 300, "batch_size": 8, "lr": 3e-3, "min_lr": 0.0,
            "warmup_steps": 20, "schedule": "linear", "weight_decay": 0.1}
    return TrainConfig(**base | changes)


def go_on(model, optimizer, cfg, batches, start, stop):
    """Train from one step to another."""
    for step in range(start, stop):
        x, targets = get_batch(TOKENS, cfg.batch_size, CONTEXT, batches)
        loss = cross_entropy(model(x), targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        set_lr(optimizer, lr_at(step, cfg))
        optimizer.step()
        optimizer.zero_grad()


def run(seed, width=64, make=make_optimizer, **changes):
    """Train one model; return its held-out loss and the model."""
    cfg = config(**changes)
    model = model_of(width, seed)
    engine = make(model, cfg)
    batches = torch.Generator().manual_seed(1000 + seed)
    go_on(model, engine, cfg, batches, 0, cfg.max_steps)
    return held_out(model), model


def held_out(model):
    """Return the loss on the held-out tokens, rounded."""
    loss = evaluate_loss(model, HELD_OUT, batch_size=64)
    return round(loss, 4) if loss == loss else 1e9


def ends(**changes):
    """Return the held-out loss of a run for each seed."""
    return [run(seed, **changes)[0] for seed in SEEDS]


# --------------------------------------------------------------- the parts


def optimizers():
    """Try gradient descent, plain and with momentum, at several rates."""
    makers = {
        "SGD": lambda m, c: torch.optim.SGD(m.parameters()),
        "momentum": lambda m, c: torch.optim.SGD(m.parameters(),
                                                 momentum=0.9),
    }
    rates = {"SGD": (0.3, 1.0, 3.0), "momentum": (0.1, 0.3, 1.0)}
    return {f"{name} {lr:g}": {"loss": ends(make=maker, lr=lr)}
            for name, maker in makers.items() for lr in rates[name]}


RATES = (1e-4, 3e-4, 1e-3, 2e-3, 3e-3, 5e-3, 1e-2, 3e-2)
FEW = (3e-4, 1e-3, 2e-3, 5e-3, 1e-2)


def sweep(width, batch_size, steps=300, rates=RATES):
    """Try AdamW at several rates; the range test of each seed beside it."""
    tests = []
    for seed in SEEDS:
        g = torch.Generator().manual_seed(2000 + seed)
        batches = [get_batch(TOKENS, batch_size, CONTEXT, g)
                   for _ in range(100)]
        test = lr_range_test(model_of(width, seed), batches, config(),
                             low=1e-5, high=1.0)
        tests.append(test.suggestion)
    return {
        "loss": {f"{lr:g}": ends(width=width, batch_size=batch_size, lr=lr,
                                 max_steps=steps) for lr in rates},
        "range_test": tests,
    }


def width_32():
    """Sweep a narrow model."""
    return sweep(32, 8, rates=FEW)


def width_64():
    """Sweep the usual model."""
    return sweep(64, 8)


def width_128():
    """Sweep a wide model."""
    return sweep(128, 8, rates=FEW[:4])


def batch_2():
    """Sweep with two rows in a batch."""
    return sweep(64, 2, rates=FEW)


def batch_16():
    """Sweep with 16 rows in a batch."""
    return sweep(64, 16, rates=FEW)


def warmup():
    """Try warm-ups of several lengths at several rates."""
    return {f"{lr:g} {n}": ends(lr=lr, warmup_steps=n, max_steps=200)
            for lr in (2e-3, 5e-3) for n in (0, 10, 50)}


def long_warmup():
    """Give AdamW a warm-up of a third of its 300 steps."""
    return {f"{lr:g}": ends(lr=lr, warmup_steps=100)
            for lr in (2e-3, 5e-3, 1e-2)}


def schedules():
    """Compare schedules at two lengths; "wsd" shares its stable part."""
    result = {}
    for name in ("cosine", "linear", "constant"):
        for steps in (200, 600):
            result[f"{name} {steps}"] = ends(schedule=name, max_steps=steps)
    short, long = (config(schedule="wsd", max_steps=n) for n in (200, 600))
    for seed in SEEDS:
        model = model_of(64, seed)
        engine = make_optimizer(model, long)
        batches = torch.Generator().manual_seed(1000 + seed)
        go_on(model, engine, long, batches, 0, 160)
        fork, state = copy.deepcopy((model, engine)), batches.get_state()
        go_on(model, engine, long, batches, 160, 600)
        result.setdefault("wsd 600", []).append(held_out(model))
        batches.set_state(state)
        go_on(*fork, short, batches, 160, 200)
        result.setdefault("wsd 200", []).append(held_out(fork[0]))
    return result


def peaks():
    """Let two schedules rise to other rates than 0.003."""
    return {f"{name} {lr:g}": ends(schedule=name, max_steps=200, lr=lr)
            for lr in (2e-3, 5e-3) for name in ("cosine", "wsd")}


def decay():
    """Let different parameters decay, strongly, and see what it does."""

    def arm(kind, amount):
        def make(model, cfg):
            params = list(model.parameters())
            inner = {id(p) for p in hidden_matrices(model)}
            chosen = {
                "none": [],
                "hidden matrices": [p for p in params if id(p) in inner],
                "all matrices": param_groups(model, 1.0)[0]["params"],
                "everything": params,
            }[kind]
            ids = {id(p) for p in chosen}
            rest = [p for p in params if id(p) not in ids]
            return torch.optim.AdamW(
                [{"params": chosen, "weight_decay": amount},
                 {"params": rest, "weight_decay": 0.0}],
                lr=cfg.lr, betas=cfg.betas)
        return make

    result = {}
    for kind, amount in (("none", 0.0), ("hidden matrices", 1.0),
                         ("all matrices", 1.0), ("everything", 1.0)):
        losses, gains, rows = [], [], []
        for seed in SEEDS:
            loss, model = run(seed, make=arm(kind, amount), lr=2e-3,
                                 max_steps=400)
            losses.append(loss)
            gains.append(round(torch.cat(
                [p.detach() for n, p in model.named_parameters()
                 if n.endswith("norm.weight")]).mean().item(), 4))
            rows.append(round(
                model.tok_emb.weight.detach().square().mean().sqrt().item(),
                4))
        result[f"{kind} {amount:g}"] = {
            "loss": losses, "mean_gain": gains, "embedding_rms": rows}
    return result


def with_hidden_rate(hidden_lr):
    """Return a maker of AdamW with another rate for hidden matrices."""

    def make(model, cfg):
        inner = hidden_matrices(model)
        scaled = {"params": inner, "weight_decay": cfg.weight_decay,
                  "lr_scale": hidden_lr / cfg.lr}
        return torch.optim.AdamW(
            param_groups(model, cfg.weight_decay, leave_out=inner)
            + [scaled], lr=cfg.lr, betas=cfg.betas)

    return make


def two_rates():
    """Give AdamW itself a lower rate for the hidden matrices."""
    return {f"{lr:g} {hidden_lr:g}": ends(make=with_hidden_rate(hidden_lr),
                                          lr=lr)
            for lr, hidden_lr in [
                *[(lr, hidden_lr) for lr in (5e-3, 1e-2, 3e-2, 1e-1)
                  for hidden_lr in (1e-3, 2e-3, 5e-3)],
                (3e-1, 2e-3)]}


def tuned():
    """Give both a long warm-up, and AdamW its two rates."""
    result = {
        f"AdamW {lr:g} {hidden_lr:g}": ends(
            make=with_hidden_rate(hidden_lr), lr=lr, warmup_steps=100)
        for lr, hidden_lr in [
            (1e-2, 1e-3), (1e-2, 2e-3), (3e-2, 1e-3), (3e-2, 2e-3),
            (3e-2, 5e-3), (1e-1, 2e-3), (1e-1, 5e-3)]}
    result["Muon 0.03 0.03"] = ends(
        optimizer="muon", lr=3e-2, muon_lr=3e-2, warmup_steps=100)
    return result


def muon():
    """Try Muon's rate, its weight decay, and AdamW's rate beside it."""

    def raw(model, cfg):
        engine = make_optimizer(model, cfg)
        engine.param_groups[-1]["weight_decay"] = cfg.weight_decay
        return engine

    result = {}
    for name, maker, lr, muon_lr in [
        *[("", make_optimizer, lr, muon_lr) for lr in (5e-3, 1e-2, 3e-2)
          for muon_lr in (0.01, 0.03, 0.1)],
        ("", make_optimizer, 1e-1, 0.03),
        ("raw decay ", raw, 1e-2, 0.03),
    ]:
        result[f"{name}{lr:g} {muon_lr:g}"] = {"loss": ends(
            make=maker, optimizer="muon", lr=lr, muon_lr=muon_lr)}
    return result


PARTS = (optimizers, width_32, width_64, width_128, batch_2, batch_16,
         warmup, long_warmup, schedules, peaks, decay, muon, two_rates,
         tuned)


def main(names):
    """Run the named parts and write their results."""
    known = {part.__name__: part for part in PARTS}
    for name in names:
        began = time.process_time()
        result = known[name]()
        data = json.loads(OUT.read_text()) if OUT.exists() else {}
        data |= {"machine": "one thread of an Intel Xeon with AMX",
                 "torch": torch.__version__,
                 "python": platform.python_version(),
                 "setting": SETTING, "seeds": list(SEEDS), name: result}
        OUT.write_text(json.dumps(data, indent=1) + "\n")
        print(f"{name}: {time.process_time() - began:.0f} s")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:])
