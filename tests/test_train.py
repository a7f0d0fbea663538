"""The trainer: one step, exact resume, and what it refuses."""

import ast
import contextlib
import dataclasses
import json
import math
import os
import random
import signal
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import exact_runs
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import (
    DOCS,
    HELD_OUT,
    SHAPE,
    TOKENIZER,
    TOKENS,
    config,
    run,
    same_weights,
)

from minillm.accounting import flops_per_token
from minillm.checkpoint import load_checkpoint, read_tensors
from minillm.depth import stream_states
from minillm.loading import Mixture, Shards, TokenLoader, tokenize_to_shards
from minillm.train import _KEY_MODULES as KEY_MODULES
from minillm.train import (
    RandomState,
    Recipe,
    Trainer,
    activation_summary,
    known_peak,
    load_run,
    loop_overhead,
    make_loader,
    plot_history,
    quickstart_recipe,
    read_history,
    rng_from_tensors,
    rng_tensors,
    seeded,
    set_checkpointing,
    stats_table,
    tales_model,
    tales_recipe,
    train,
    watch,
)
from minillm.transformer import GPT, GPTConfig

# --- one step ---


def test_accumulation_equals_the_large_batch():
    eot, results = TOKENIZER.end_of_text, []
    shape = dataclasses.replace(SHAPE, dropout=0.0)
    for size, parts in ((8, 1), (2, 4)):
        cfg = config(batch_size=size, grad_accum_steps=parts)
        loader = TokenLoader(TOKENS, size, 32, mode="sequential",
                             align="documents", end_of_text=eot)  # fmt: skip
        trainer = Trainer(GPT(shape, seed=0), loader, cfg, eot)
        loss, norm = trainer.train_step()  # rows of unequal lengths
        results.append((loss, norm, trainer.model))
    (a, n, model_a), (b, m, model_b) = results
    assert math.isclose(a, b, rel_tol=1e-6)
    assert math.isclose(n, m, rel_tol=1e-5)
    for p, q in zip(model_a.parameters(), model_b.parameters()):
        # Adam's first step is a sign: compare where the sign is certain.
        assert ((p - q).abs() > 1e-5).float().mean() < 0.01


def test_clipping_ignores_frozen_parameters():
    cfg = config(grad_clip=1e-9, weight_decay=0.0, warmup_steps=0)
    model = GPT(SHAPE, seed=0)
    model.pos_emb.weight.requires_grad_(False)
    before = model.pos_emb.weight.clone()
    trainer = Trainer(model, TOKENS, cfg)
    trainer.train_step()
    assert torch.equal(model.pos_emb.weight, before)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_loss_stops_and_keeps_the_weights(value):
    trainer = Trainer(GPT(SHAPE, seed=0), TOKENS, config())
    for _ in range(3):
        trainer.train_step()
    hook = trainer.model.norm.register_forward_hook(
        lambda module, inputs, output: output * value)  # fmt: skip
    before = [p.clone() for p in trainer.model.parameters()]
    with pytest.raises(FloatingPointError, match="step 3"):
        trainer.train_step()
    hook.remove()
    for p, q in zip(trainer.model.parameters(), before):
        assert torch.equal(p, q)
    trainer.train_step()  # and it can go on


def test_bfloat16_keeps_float32_weights():
    cfg = config(dtype="bfloat16")
    trainer = Trainer(GPT(SHAPE, seed=0), TOKENS, cfg)
    loss, _ = trainer.train_step()
    reference = Trainer(GPT(SHAPE, seed=0), TOKENS, config())
    assert abs(loss - reference.train_step()[0]) < 0.1
    assert all(p.dtype == torch.float32
               for p in trainer.model.parameters())  # fmt: skip


# --- whole runs ---


def test_run_learns_and_leaves_a_complete_directory(tmp_path):
    cfg = config(max_steps=60, lr=1e-2, eval_every=20, checkpoint_every=20)
    model, result = run(tmp_path / "r", cfg=cfg, floor=0.1)
    held_out = [r["val_loss"] for r in result.history if "val_loss" in r]
    assert held_out[-1] < held_out[0] - 0.5 and len(held_out) == 4
    names = {p.name for p in (tmp_path / "r").iterdir()}
    assert names >= {"run.json", "tokenizer.json", "metrics.jsonl",
                     "loss.png", "loss.svg", "checkpoints"}  # fmt: skip
    assert len(list((tmp_path / "r/checkpoints").glob("step-*"))) == 2
    back = load_run(tmp_path / "r")
    assert same_weights(back.model, model)
    assert back.history == result.history == read_history(tmp_path / "r")
    assert back.train_cfg == cfg and back.cfg == SHAPE and back.floor == 0.1
    assert back.tokenizer.decode(back.tokenizer.encode("story")) == "story"
    for record in result.history:
        assert all(v is None or math.isfinite(v) for v in record.values())


def test_run_in_memory_without_held_out_text():
    model = GPT(SHAPE, seed=0)
    result = train(model, TOKENS, None, config(), progress=False)
    assert result.step == 12 and result.val_loss is None
    assert result.tokens == 12 * 4 * 32 and result.tokens_per_s > 0


def test_train_leaves_the_global_rng_alone():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    run()
    assert torch.equal(state, torch.get_rng_state())


def test_same_seed_same_run():
    a, first = run()
    b, second = run()
    assert same_weights(a, b) and first.val_loss == second.val_loss
    c, _ = run(cfg=config(seed=1))
    assert not same_weights(a, c)


CLOCKS = ("seconds", "tokens_per_s")


def plain(history):
    return [{k: v for k, v in r.items() if k not in CLOCKS} for r in history]


@pytest.mark.parametrize("align", ["windows", "documents"])
@pytest.mark.parametrize("stop", [4, 7])
def test_resume_is_bit_for_bit(tmp_path, align, stop):
    cfg = config(align=align, grad_accum_steps=2)
    straight, expected = run(tmp_path / "a", cfg=cfg)
    run(tmp_path / "b", cfg=cfg, stop_at=stop)
    torch.manual_seed(1234)
    resumed, result = run(tmp_path / "b", cfg=cfg, seed=99, resume=True)
    assert same_weights(straight, resumed)
    assert plain(result.history) == plain(expected.history)


SCRIPT = """
import json, sys
sys.path.insert(0, {tests!r})
import small_runs, exact_runs
{body}
"""


def in_process(body, **names):
    code = SCRIPT.format(
        tests=os.path.dirname(__file__),
        body="".join(f"{k} = {str(v)!r}\n" for k, v in names.items())
        + textwrap.dedent(body),
    )  # fmt: skip
    return subprocess.run(
        [sys.executable, "-c", code], timeout=300, capture_output=True,
        text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    """Straight runs, the same killed in processes, resumed in another."""
    folder = tmp_path_factory.mktemp("exact")
    done = in_process("exact_runs.straight_and_killed(folder)", folder=folder)
    assert done.returncode == 0, done.stderr
    newest = {name: load_run(folder / f"{name}-killed").step
              for name in exact_runs.CASES}  # fmt: skip
    done = in_process("exact_runs.resume_all(folder)", folder=folder)
    assert done.returncode == 0, done.stderr
    return folder, newest


@pytest.mark.parametrize("name", list(exact_runs.CASES))
def test_resume_after_kill_9_is_bit_for_bit(exact, name):
    """Weights, optimizer, generators, next rows, losses and statistics."""
    folder, newest = exact
    a, b = folder / f"{name}-straight", folder / f"{name}-killed"
    assert 0 < newest[name] < exact_runs.N_STEPS
    left, right = load_checkpoint(a), load_checkpoint(b)
    assert left.step == right.step == exact_runs.N_STEPS
    for x, y in ((left.weights, right.weights), (left.tensors, right.tensors)):
        assert x.keys() == y.keys() and any("rng/" in k for k in left.tensors)
        for key in x:
            assert torch.equal(x[key], y[key]), key
    for key in left.info.keys() - {"seconds", "interval"}:
        assert left.info[key] == right.info[key], key
    next_a, next_b = (json.loads((x / "next.json").read_text())
                      for x in (a, b))  # fmt: skip
    assert next_a == next_b
    histories = [
        [{k: v for k, v in r.items() if k not in ("seconds", "tokens_per_s")}
         for r in read_history(x)] for x in (a, b)
    ]  # fmt: skip
    assert histories[0] == histories[1]
    kinds = set().union(*histories[0])
    assert kinds >= {"loss", "val_loss", "stats", "sample", "update_ratio"}
    if name.endswith("-float16"):
        assert "loss_scale" in kinds


def test_interrupt_saves_and_returns(tmp_path):
    handler = signal.getsignal(signal.SIGINT)

    def press(record):
        if record["step"] == 6:
            signal.raise_signal(signal.SIGINT)

    _, result = run(tmp_path / "r", on_record=press)
    assert result.interrupted and result.step == 6
    assert load_run(tmp_path / "r").step == 6
    assert signal.getsignal(signal.SIGINT) is handler
    _, result = run(tmp_path / "r", seed=5, resume=True)
    assert not result.interrupted and result.step == 12


def test_second_interrupt_ends_at_once(tmp_path):
    def press(record):
        if record["step"] == 6:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "r", on_record=press)
    assert load_run(tmp_path / "r").step == 4


def test_run_directories_are_not_overwritten(tmp_path):
    run(tmp_path / "r")
    with pytest.raises(FileExistsError, match="already holds a run"):
        run(tmp_path / "r")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.txt").write_text("do not touch")
    with pytest.raises(FileExistsError, match="already holds files"):
        run(tmp_path / "other")
    assert [p.name for p in (tmp_path / "other").iterdir()
            if p.name != ".lock"] == ["thesis.txt"]  # fmt: skip


def test_resume_refuses_what_does_not_fit(tmp_path):
    run(tmp_path / "r", stop_at=4)
    with pytest.raises(ValueError, match="lr = 0.001"):
        run(tmp_path / "r", cfg=config(lr=2e-3), resume=True)
    with pytest.raises(ValueError, match="another text"):
        train(GPT(SHAPE), TOKENS[5:], HELD_OUT, config(), resume=True,
              out_dir=tmp_path / "r", tokenizer=TOKENIZER,
              progress=False)  # fmt: skip
    _, result = run(tmp_path / "r", cfg=config(max_steps=16), resume=True)
    assert result.step == 16


def test_one_process_per_run(tmp_path):
    seen = []

    def second(record):
        if record["step"] == 2 and not seen:
            seen.append(in_process("small_runs.run(folder, resume=True)",
                                   folder=tmp_path / "r").stderr)

    run(tmp_path / "r", on_record=second)
    assert "another process is training" in seen[0]


def test_half_written_metrics_are_read(tmp_path):
    run(tmp_path / "r")
    whole = read_history(tmp_path / "r")
    with open(tmp_path / "r/metrics.jsonl", "a", encoding="utf-8") as f:
        f.write('{"step": 13, "lo')
    assert read_history(tmp_path / "r") == whole


def test_progress_goes_to_stderr_or_nowhere(capsys):
    run(progress=True)
    out, err = capsys.readouterr()
    assert out == "" and "tokens/s" in err and "12/12" in err
    assert "bits/byte" in err and "<" in err  # elapsed<remaining
    for quiet in (False, None):
        run(progress=quiet)
        assert capsys.readouterr() == ("", "")


def test_plot_has_the_floor():
    _, result = run()
    fig = plot_history(result.history, floor=0.5)
    assert "bits per byte" in fig.axes[0].get_ylabel()
    labels = [line.get_label() for line in fig.axes[0].lines]
    assert any("floor" in label for label in labels)
    nats = [{k: v for k, v in r.items() if k != "val_bits_per_byte"}
            for r in result.history]  # fmt: skip
    assert "nats" in plot_history(nats, floor=0.5).axes[0].get_ylabel()


# --- what goes wrong ---


def test_sigterm_saves_and_returns(tmp_path):
    def press(record):
        if record["step"] == 6:
            signal.raise_signal(signal.SIGTERM)

    _, result = run(tmp_path / "r", on_record=press)
    assert result.interrupted and load_run(tmp_path / "r").step == 6
    assert any("asked to stop" in note for note in result.notes)
    log = (tmp_path / "r/log.txt").read_text()
    assert all(note in log for note in result.notes)


@contextlib.contextmanager
def small_disk(limit):
    """Let the system refuse every file above a size, as a full disk does."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.filterwarnings("ignore:step 4 could not be saved")
def test_failing_checkpoint_warns_and_is_tried_again(tmp_path):
    disks = contextlib.ExitStack()

    def watch_steps(record):  # full from step 4 to step 8
        if "loss" in record and record["step"] == 4:
            disks.enter_context(small_disk(8_000))
        if "loss" in record and record["step"] == 10:
            disks.close()

    with pytest.warns(UserWarning, match="step 8 could not be saved.*none"):
        model, result = run(tmp_path / "r", on_record=watch_steps)
    assert load_run(tmp_path / "r").step == result.step == 12
    straight, _ = run()
    assert same_weights(model, straight)
    assert not list((tmp_path / "r/checkpoints").glob(".step*"))


def test_last_checkpoint_that_fails_raises(tmp_path):
    disks = contextlib.ExitStack()

    def fill(record):
        if "loss" in record and record["step"] == 10:
            disks.enter_context(small_disk(8_000))

    with disks, pytest.raises(OSError, match="newest checkpoint is step 8"):
        run(tmp_path / "r", on_record=fill)
    _, result = run(tmp_path / "r", resume=True)
    assert result.step == 12


def test_failing_metrics_warn_and_are_written_later(tmp_path):
    disks = contextlib.ExitStack()
    path = tmp_path / "r/metrics.jsonl"

    def fill(record):
        if "loss" in record and record["step"] == 4:
            disks.enter_context(small_disk(path.stat().st_size + 30))
        if "loss" in record and record["step"] == 6:
            assert path.stat().st_size > 30  # half a line is there
            disks.close()

    with pytest.warns(UserWarning, match="training goes on"):
        _, result = run(tmp_path / "r", on_record=fill)
    assert read_history(tmp_path / "r") == result.history

    def fill_for_good(record):
        if "loss" in record and record["step"] == 6:
            (tmp_path / "q/metrics.jsonl").unlink()
            (tmp_path / "q/metrics.jsonl").mkdir()

    with pytest.raises(OSError), pytest.warns(UserWarning, match="goes on"):
        run(tmp_path / "q", on_record=fill_for_good)
    assert load_run(tmp_path / "q").step == 12  # the weights are safe


class Poison:
    """A loader whose batch at some steps makes the loss NaN."""

    def __init__(self, model, steps, cfg):
        self.inner = make_loader(TOKENS, cfg, 32)
        self.steps, self.given = steps, 0
        model.norm.register_forward_hook(self.spoil)

    def spoil(self, module, inputs, output):
        bad = module.training and self.given - 1 in self.steps
        return output * math.nan if bad else output

    def __next__(self):
        self.given += 1
        return next(self.inner)

    def state_dict(self):
        return self.inner.state_dict() | {"given": self.given}

    def load_state_dict(self, state):
        self.inner.load_state_dict(state)
        self.given = state["given"]


def poisoned(out_dir, steps, seed=0, resume=False, **changes):
    model, cfg = GPT(SHAPE, seed=seed), config(**changes)
    loader = Poison(model, steps, cfg)
    return model, train(model, loader, HELD_OUT, cfg, out_dir=out_dir,
                        tokenizer=TOKENIZER, progress=False,
                        resume=resume)  # fmt: skip


def test_stop_saves_the_batch_and_the_state_before_it(tmp_path):
    with pytest.raises(FloatingPointError, match="step 6: the loss is nan"):
        poisoned(tmp_path / "r", {6})
    saved = load_run(tmp_path / "r")
    assert saved.step == 6
    bad = read_tensors(tmp_path / "r/bad_batches/step-00000006.safetensors")
    note = json.loads((tmp_path / "r/bad_batches/step-00000006.json")
                      .read_text())  # fmt: skip
    assert note["step"] == 6 and note["loss"] == "nan"
    loader = make_loader(TOKENS, config(), 32)
    state = load_checkpoint(tmp_path / "r").info["loader"]
    loader.load_state_dict(state)
    batch = next(loader)  # the checkpoint's next batch is the bad one
    assert torch.equal(batch.tokens, bad["inputs"])
    assert torch.equal(batch.targets, bad["targets"])
    # Resumed as it is, the run stops at the same place again; with another
    # policy it goes on.
    with pytest.raises(FloatingPointError, match="step 6"):
        poisoned(tmp_path / "r", {6}, seed=9, resume=True)
    _, result = poisoned(tmp_path / "r", {6}, seed=9, resume=True,
                         on_nonfinite="skip")  # fmt: skip
    assert result.step == 12 and result.skipped == 1


def test_skip_goes_on_and_counts(tmp_path):
    model, result = poisoned(tmp_path / "r", {3, 7}, on_nonfinite="skip")
    assert result.skipped == 2 and result.step == 12
    names = sorted(p.name for p in (tmp_path / "r/bad_batches").iterdir())
    assert names[::2] == ["step-00000003.json", "step-00000007.json"]
    skipped = [r.get("skipped", 0) for r in result.history if "lr" in r]
    assert skipped == [0, 1, 1, 2, 2, 2]
    assert all(r["loss"] is not None for r in result.history if "lr" in r)
    assert all(p.isfinite().all() for p in model.parameters())
    assert sum("was skipped" in note for note in result.notes) == 2
    assert load_run(tmp_path / "r").history == result.history


def test_too_many_skipped_steps_stop(tmp_path):
    with pytest.raises(FloatingPointError, match="4 steps in a row"):
        poisoned(tmp_path / "r", set(range(5, 99)), on_nonfinite="skip",
                 max_skipped=3)  # fmt: skip
    assert load_run(tmp_path / "r").step == 8  # three were skipped


def test_skipped_step_changes_no_weight():
    model = GPT(SHAPE, seed=0)
    cfg = config(on_nonfinite="skip")
    trainer = Trainer(model, Poison(model, {2}, cfg), cfg)
    for _ in range(2):
        trainer.train_step()
    before = [p.clone() for p in model.parameters()]
    loss, _ = trainer.train_step()
    assert math.isnan(loss) and trainer.step == 3
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))
    trainer.train_step()
    assert not torch.equal(model.tok_emb.weight, before[0])


def test_float16_overflow_lowers_the_scale_and_keeps_the_weights():
    cfg = config(dtype="float16", warmup_steps=0)
    trainer = Trainer(GPT(SHAPE, seed=0), TOKENS, cfg)
    trainer.scaler.current = 2.0**40
    before = [p.clone() for p in trainer.model.parameters()]
    loss, norm = trainer.train_step()
    assert math.isfinite(loss) and not math.isfinite(norm)
    assert trainer.scaler.get_scale() == 2.0**39 and trainer.skipped == 0
    assert all(torch.equal(p, q)
               for p, q in zip(trainer.model.parameters(), before))
    trainer.scaler.current = 2.0**10
    assert math.isfinite(trainer.train_step()[1])
    assert not torch.equal(trainer.model.tok_emb.weight, before[0])


def test_out_of_memory_says_what_to_change(tmp_path):
    model, cfg = GPT(SHAPE, seed=0), config(batch_size=4)

    def hook(module, inputs):
        if trainer_steps and module.training:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to ...")

    trainer_steps = []
    model.norm.register_forward_pre_hook(hook)
    with pytest.raises(RuntimeError, match="batch_size=2, grad_accum_steps=2"):
        train(model, TOKENS, None, cfg, out_dir=tmp_path / "r",
              progress=False, on_record=trainer_steps.append)  # fmt: skip
    assert load_run(tmp_path / "r").step == 2  # what was done is saved


# --- what a run tells ---


def test_watch_measures_and_leaves_no_hook():
    model = GPT(SHAPE, seed=0).eval()
    x = torch.from_numpy(TOKENS[:64].astype("int64")).view(2, 32)
    with watch(model) as seen:
        logits = model(x)
    block = stream_states(model, x)[1]
    assert seen["blocks.0"]["std"] == pytest.approx(
        block.std(correction=0).item(), rel=1e-5)
    assert seen["lm_head"]["max"] == pytest.approx(
        logits.abs().max().item(), rel=1e-5)
    assert set(seen) == {"blocks.0", "blocks.1", "norm", "lm_head"} | {
        f"blocks.{i}.{part}" for i in (0, 1)
        for part in ("attn", "ffn", "ffn.hidden")}  # fmt: skip
    with pytest.raises(RuntimeError), watch(model):
        raise RuntimeError
    assert not any(m._forward_hooks for m in model.modules())
    plain = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU())
    with watch(plain) as seen:
        plain(torch.ones(2, 4))
    assert list(seen) == ["0"]


def test_dead_units_are_counted():
    x = torch.zeros(5, 7, 10)
    x[2, 3, :4] = torch.tensor([1.0, -2.0, 1e-5, 3.0])
    mean, std, largest, dead = activation_summary(x).tolist()
    assert dead == pytest.approx(0.7) and largest == 3.0
    assert activation_summary(torch.zeros(2, 3))[3] == 1.0


def test_statistics_are_right_and_change_nothing():
    cfg = config(stats_every=3, log_every=3, grad_accum_steps=2)
    model, result = run(cfg=cfg)
    without, _ = run(cfg=config(grad_accum_steps=2))
    assert same_weights(model, without)
    steps, names, table = stats_table(result.history, "updates")
    assert steps == [3, 6, 9, 12] and table.shape == (4, len(names))
    assert names == [n for n, _ in model.named_parameters()]
    ratios = [r["update_ratio"] for r in result.history if "loss" in r]
    matrix = [p.dim() >= 2 for p in model.parameters()]
    assert ratios == pytest.approx(np.median(table[:, matrix], axis=1))
    with pytest.raises(ValueError, match="stats_every"):
        stats_table([], "updates")
    # One step by hand.
    trainer = Trainer(GPT(SHAPE, seed=0), TOKENS, config(stats_every=1))
    before = {n: p.clone() for n, p in trainer.model.named_parameters()}
    _, norm = trainer.train_step()
    record = trainer.statistics.record
    square = sum(record["gradients"][n] ** 2 * p.numel()
                 for n, p in before.items())  # fmt: skip
    assert math.sqrt(square) == pytest.approx(norm, rel=1e-4)
    p = trainer.model.blocks[0].ffn.up_proj.weight
    name = "blocks.0.ffn.up_proj.weight"
    change = (p - before[name]).square().mean().sqrt()
    size = before[name].square().mean().sqrt()
    assert record["updates"][name] == pytest.approx(
        (change / size).item(), rel=1e-4)
    assert record["weights"][name] == pytest.approx(size.item(), rel=1e-5)


def test_clipped_share_and_mfu():
    _, result = run(cfg=config(grad_clip=1e-3), peak_flops=1e12)
    records = [r for r in result.history if "lr" in r]
    assert all(r["clipped"] == 1.0 and 0 < r["mfu"] < 1 for r in records)
    r = records[-1]
    expected = r["tokens_per_s"] * flops_per_token(SHAPE) / 1e12
    assert r["mfu"] == pytest.approx(expected)
    _, result = run(cfg=config(grad_clip=math.inf))
    for r in result.history:
        assert "mfu" not in r and r.get("clipped", 0.0) == 0.0


def test_known_peaks():
    assert known_peak("NVIDIA H100 80GB HBM3", torch.bfloat16) == 989.5e12
    assert known_peak("NVIDIA A100-SXM4-80GB", torch.bfloat16) == 312e12
    assert known_peak("Tesla T4", torch.float16) == 65e12
    assert known_peak("Tesla T4", torch.float32) is None
    assert known_peak("NVIDIA H100 PCIe", torch.bfloat16) is None
    assert known_peak("Unheard of", torch.bfloat16) is None


def test_samples_are_written_and_disturb_nothing():
    model, result = run(cfg=config(sample_every=6))
    texts = [r["sample"] for r in result.history if "sample" in r]
    assert len(texts) == 2 and all(isinstance(t, str) for t in texts)
    without, _ = run()
    assert same_weights(model, without)
    with pytest.raises(ValueError, match="sample_every=6 needs a tokenizer"):
        run(cfg=config(sample_every=6), tokenizer=None)


class FakeWriter:
    made = []

    def __init__(self, folder, purge_step=None):
        self.folder, self.purge_step = folder, purge_step
        self.scalars, self.texts, self.closed = {}, {}, False
        FakeWriter.made.append(self)

    def add_scalar(self, name, value, step):
        self.scalars[name, step] = value

    def add_text(self, name, text, step):
        self.texts[step] = text

    def close(self):
        self.closed = True


def test_tensorboard(tmp_path, monkeypatch):
    FakeWriter.made.clear()
    fake = types.ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = FakeWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    cfg = config(log_to="tensorboard", sample_every=6, stats_every=6)
    run(tmp_path / "r", cfg=cfg, stop_at=8)
    _, result = run(tmp_path / "r", cfg=cfg, resume=True)
    first, second = FakeWriter.made
    assert first.purge_step == 1 and second.purge_step == 9
    assert first.closed and second.closed and set(first.texts) == {6}
    seen = first.scalars | second.scalars
    for r in result.history:
        for key in r.keys() & {"loss", "val_loss", "grad_norm"}:
            assert seen[key, r["step"]] == r[key]
    assert ("stats/activations/blocks.0/std", 6) in seen


def test_wandb(tmp_path, monkeypatch):
    calls, logged = [], []

    class FakeRun:
        def log(self, values, step):
            logged.append((step, values))
            if step == 10:
                raise ConnectionError("no network")

        def finish(self):
            calls.append("finish")

    fake = types.ModuleType("wandb")
    fake.init = lambda **options: (calls.append(options), FakeRun())[1]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    cfg = config(log_to="wandb")
    run(tmp_path / "r", cfg=cfg, stop_at=4)
    with pytest.warns(UserWarning, match="no network"):
        _, result = run(tmp_path / "r", cfg=cfg, resume=True)
    assert result.step == 12  # a broken network does not stop a run
    a, end, b = calls[:3]
    assert end == "finish" and a["id"] == b["id"] and a["name"] == "r"
    assert a["config"]["training"]["lr"] == cfg.lr
    assert [s for s, v in logged if "loss" in v][:2] == [2, 4]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_missing_loggers(tmp_path, monkeypatch, name):
    module = {"tensorboard": "torch.utils.tensorboard"}.get(name, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=f"pip install {name}"):
        run(tmp_path / "r", cfg=config(log_to=name))
    with pytest.raises(ValueError, match="needs a run's directory"):
        run(cfg=config(log_to=name))


def test_result_and_run_say_where_and_why(tmp_path):
    _, result = run(tmp_path / "r")
    assert result.device == "cpu" and result.dtype == "float32"
    assert "cpu" in result.choice and result.choice in result.notes[0]
    machine = json.loads((tmp_path / "r/run.json").read_text())["machine"]
    assert machine["choice"] == result.choice
    assert sum(result.parts.values()) <= result.seconds
    assert result.parts["forward"] > 0


def test_best_checkpoint_is_kept(tmp_path):
    cfg = config(max_steps=24, lr=3e-2, warmup_steps=0, schedule="constant",
                 keep_checkpoints=1, eval_every=3, checkpoint_every=6)
    worse = {9, 12, 15, 18, 21, 24}

    def spoil(record):  # the model gets worse after step 6
        if record["step"] == 6 and "loss" in record:
            trained.norm.weight.data.mul_(-1.0)
        return record

    trained = GPT(SHAPE, seed=0)
    result = train(trained, TOKENS, HELD_OUT, cfg, out_dir=tmp_path / "r",
                   tokenizer=TOKENIZER, progress=False, on_record=spoil)
    values = {r["step"]: r["val_loss"] for r in result.history
              if "val_loss" in r and r["step"]}  # fmt: skip
    best = min(values, key=values.get)
    assert result.best_step == best
    names = {p.name for p in (tmp_path / "r/checkpoints").glob("step-*")}
    assert names == {f"step-{best:08d}", "step-00000024"} and worse
    assert load_run(tmp_path / "r", best=True).step == best
    assert load_run(tmp_path / "r").step == 24


def test_evaluation_on_training_text():
    _, result = run()
    asked = [r for r in result.history if "train_eval_loss" in r]
    assert [r["step"] for r in asked] == [12]
    _, result = run(cfg=config(stats_every=12))
    asked = [r for r in result.history if "train_eval_loss" in r]
    assert [r["step"] for r in asked] == [0, 4, 8, 12]


# --- loaders and generators ---


def test_make_loader_takes_what_loading_gives(tmp_path):
    eot = TOKENIZER.end_of_text
    windows = make_loader(torch.from_numpy(TOKENS.astype("int64")), config(),
                          32)
    again = make_loader(TOKENS, config(), 32)
    assert torch.equal(next(windows).tokens, next(again).tokens)
    documents = make_loader(TOKENS, config(align="documents"), 32, eot)
    assert (documents.mode, documents.bucket) == ("sequential", 16)
    tokenize_to_shards(DOCS[:360], TOKENIZER, tmp_path / "shards")
    shards = make_loader(Shards(tmp_path / "shards"),
                         config(align="documents"), 32)  # fmt: skip
    assert shards.end_of_text == eot
    assert torch.equal(next(shards).tokens, next(documents).tokens)
    with pytest.raises(ValueError, match="needs a tokenizer"):
        make_loader(TOKENS, config(align="documents"), 32)
    loader = TokenLoader(TOKENS, 8, 32)
    with pytest.raises(ValueError, match="8 rows and batch_size is 4"):
        make_loader(loader, config(), 32)
    mixture = Mixture({"a": loader}, {"a": 1})
    with pytest.raises(ValueError, match="8 rows"):
        make_loader(mixture, config(), 32)
    assert make_loader(mixture, config(batch_size=8), 32) is mixture


@given(st.integers(0, 2**32 - 1), st.booleans())
@settings(max_examples=20, deadline=None)
def test_random_state_round_trip(seed, odd):
    """All generators come back, also in the middle of a pair of normals."""
    cpu = torch.device("cpu")
    with seeded(seed, cpu):
        if odd:
            random.gauss(0, 1)
            np.random.normal()
        state = RandomState.capture(cpu)
        draws = [torch.rand(3).tolist(), random.gauss(0, 1), random.random(),
                 np.random.normal(), np.random.rand()]  # fmt: skip
        back = rng_from_tensors(rng_tensors(state))
        for s in (state, back):
            s.restore(cpu)
            assert draws == [
                torch.rand(3).tolist(), random.gauss(0, 1), random.random(),
                np.random.normal(), np.random.rand()]  # fmt: skip


def test_train_leaves_every_global_generator_alone():
    before = (random.getstate(), np.random.get_state()[1].tolist())
    run()
    assert before == (random.getstate(), np.random.get_state()[1].tolist())


def test_overhead_is_accounted_for():
    cfg = config(max_steps=12, batch_size=8)
    seconds = loop_overhead(GPT(SHAPE, seed=0), TOKENS, cfg,
                            tokenizer=TOKENIZER)  # fmt: skip
    assert set(seconds) == {"data", "forward", "backward", "clip",
                            "optimizer", "rest"}  # fmt: skip
    assert all(v >= 0 for v in seconds.values())
    with pytest.raises(ValueError, match="at least 3"):
        loop_overhead(GPT(SHAPE), TOKENS, config(max_steps=2))


def test_checkpointing_needs_a_gpt():
    layer = torch.nn.Linear(2, 2)
    set_checkpointing(layer, False)
    with pytest.raises(ValueError, match="cannot recompute"):
        set_checkpointing(layer, True)


def test_compiled_model_is_used_for_steps(monkeypatch):
    import minillm.train as module

    calls = []

    def compiled(model):
        return lambda x: (calls.append(len(x)), model(x))[1]

    monkeypatch.setattr(module, "compiled", compiled)
    model, result = run(cfg=config(compile=True, stats_every=6))
    assert len(calls) == 10  # two of twelve steps are watched
    plain_model, _ = run()
    assert same_weights(model, plain_model)


# --- the shared model ---

SHARED = """
import json, sys
from minillm.pretrain import TrainConfig
from minillm.train import Recipe, tales_model
from minillm.transformer import GPTConfig
recipe = Recipe(
    GPTConfig(vocab_size=300, context_length=64, d_model=16, n_layers=1,
              n_heads=2),
    TrainConfig(max_steps=6, batch_size=2, warmup_steps=1, eval_every=3,
                align="documents", checkpoint_every=2, device="cpu"),
    corpus_bytes=40_000, val_bytes=4_000, tokenizer_bytes=20_000,
)
run = tales_model(recipe=recipe)
total = sum(p.double().abs().sum().item() for p in run.model.parameters())
print(json.dumps([str(run.run_dir), total, run.history]))
"""


def test_shared_model_with_two_processes_at_once(tmp_path):
    env = os.environ | {"MINILLM_CACHE": str(tmp_path)}
    both = [subprocess.Popen([sys.executable, "-c", SHARED], env=env,
                             stdout=subprocess.PIPE, text=True)
            for _ in range(2)]  # fmt: skip
    a, b = (json.loads(p.communicate(timeout=300)[0]) for p in both)
    assert a == b  # the same clock readings too: trained once, read twice


def test_shared_model_is_resumed_and_retrained(tmp_path, monkeypatch):
    monkeypatch.setenv("MINILLM_CACHE", str(tmp_path))
    recipe = Recipe(
        GPTConfig(vocab_size=300, context_length=64, d_model=16, n_layers=1,
                  n_heads=2),
        config(max_steps=6, batch_size=2, align="documents"),
        corpus_bytes=40_000, val_bytes=4_000, tokenizer_bytes=20_000,
    )  # fmt: skip
    first = tales_model(recipe=recipe)
    assert first.step == 6 and first.tokenizer.vocab_size == 300
    again = tales_model(recipe=recipe)
    assert again.history == first.history
    # A damaged cache is repaired; another recipe gets its own place.
    for path in first.run_dir.glob("checkpoints/*/model.safetensors"):
        path.write_bytes(b"damaged")
    with pytest.warns(UserWarning, match="made anew"):
        repaired = tales_model(recipe=recipe)
    assert same_weights(repaired.model, first.model)
    recipe.training.lr = 2e-3
    assert tales_model(recipe=recipe).run_dir != first.run_dir


def test_recipes_are_consistent():
    for recipe in (quickstart_recipe(), tales_recipe()):
        assert recipe.training.align == "documents"
        assert recipe.tokenizer_bytes <= recipe.corpus_bytes
    assert tales_recipe().training.device == "cpu"


def test_cache_key_names_every_module_that_matters():
    """What train imports decides the shared model, but for a few."""
    import minillm

    root = Path(minillm.__file__).parent
    seen, todo = set(), ["train"]
    while todo:
        name = todo.pop()
        if name in seen or not (root / f"{name}.py").is_file():
            continue
        seen.add(name)
        tree = ast.parse((root / f"{name}.py").read_text(encoding="utf-8"))
        for node in tree.body:  # imports of the whole module only
            if isinstance(node, ast.ImportFrom):
                whole = f"{'minillm.' * node.level}{node.module or ''}"
                if whole.startswith("minillm."):
                    todo.append(whole.removeprefix("minillm."))
    harmless = {"accounting", "depth", "files", "flash"}
    assert seen - harmless == set(KEY_MODULES)


def test_cache_key_is_of_these_modules(tmp_path, monkeypatch):
    """The list is what `tales_model` hashes, and not another one."""
    monkeypatch.setenv("MINILLM_CACHE", str(tmp_path))
    asked = []

    class Enough(Exception):
        pass

    def source_hash(*modules, extra=""):
        asked.extend(modules)
        raise Enough

    monkeypatch.setattr("minillm.train.source_hash", source_hash)
    with pytest.raises(Enough):
        tales_model()
    assert asked == [f"minillm.{m}" for m in KEY_MODULES]
