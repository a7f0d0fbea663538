"""Runs that are killed with signal 9 and resumed, for the resume proofs."""

import dataclasses
import json
import os
import random
import signal
import warnings
from pathlib import Path

import torch
from small_runs import HELD_OUT, SHAPE, TOKENIZER, TOKENS, config

from minillm.loading import Mixture, TokenLoader
from minillm.train import Trainer, train
from minillm.transformer import GPT

N_STEPS = 12
CASES = {  # name: changes of the training's settings
    "adamw": {},
    "muon": {"optimizer": "muon"},
    "adamw-bfloat16": {"dtype": "bfloat16"},
    "muon-bfloat16": {"optimizer": "muon", "dtype": "bfloat16"},
    "adamw-float16": {"dtype": "float16"},
    "checkpointed": {"checkpoint_blocks": True},
    "documents": {"align": "documents"},
}


def settings(name):
    return config(
        max_steps=N_STEPS, grad_accum_steps=2, checkpoint_every=3,
        log_every=4, eval_every=6, stats_every=4, sample_every=5,
        **CASES[name],
    )  # fmt: skip


def text(name):
    """Return a mixture of packed and random rows, or the plain tokens."""
    if name == "documents":
        return TOKENS
    half, eot = len(TOKENS) // 2, TOKENIZER.end_of_text
    return Mixture(
        {"a": TokenLoader(TOKENS[:half], 4, 32, mode="packed",
                          end_of_text=eot, pool=8),
         "b": TokenLoader(TOKENS[half:], 4, 32, end_of_text=eot, seed=3)},
        {"a": 0.7, "b": 0.3},
    )  # fmt: skip


def one(name, run_dir, **options):
    """Train one case; leave what the loader would give next."""
    model = GPT(SHAPE, seed=0)
    train(model, text(name), HELD_OUT, settings(name), out_dir=run_dir,
          tokenizer=TOKENIZER, progress=False, **options)  # fmt: skip
    from minillm.checkpoint import load_checkpoint

    loader = Trainer(GPT(SHAPE), text(name), settings(name),
                     TOKENIZER.end_of_text).loader  # fmt: skip
    loader.load_state_dict(load_checkpoint(run_dir).info["loader"])
    batch = next(loader)
    rows = {f.name: getattr(batch, f.name).tolist()
            for f in dataclasses.fields(batch)}  # fmt: skip
    (Path(run_dir) / "next.json").write_text(json.dumps(rows))


def kill_in_child(name, run_dir, step):
    """Train in a process that gets signal 9 when a step begins."""
    pid = os.fork()
    if not pid:
        train_step = Trainer.train_step

        def deadly(trainer):
            if trainer.step == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return train_step(trainer)

        Trainer.train_step = deadly
        one(name, run_dir)
        os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == 9


def straight_and_killed(folder):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for seed, name in enumerate(CASES):
        step = random.Random(seed).randrange(4, N_STEPS)
        kill_in_child(name, f"{folder}/{name}-killed", step)
        one(name, f"{folder}/{name}-straight")


def resume_all(folder):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for name in CASES:
        torch.manual_seed(hash(name) % 1000)
        one(name, f"{folder}/{name}-killed", resume=True)
