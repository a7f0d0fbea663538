"""The trainer: arithmetic, batches, exact resume, and what it refuses."""

import dataclasses
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from minillm.tokenizer import CharTokenizer
from minillm.train import (
    IGNORE_INDEX,
    BatchLoader,
    Recipe,
    TrainConfig,
    Trainer,
    bytes_per_token,
    cross_entropy,
    document_rows,
    evaluate_loss,
    first_tokens,
    gather_rows,
    get_batch,
    load_checkpoint,
    load_run,
    lr_at,
    make_optimizer,
    param_groups,
    pick_device,
    pick_dtype,
    plot_history,
    quickstart_recipe,
    read_history,
    read_tensors,
    save_checkpoint,
    tales_model,
    tales_recipe,
    train,
    window_rows,
)
from minillm.transformer import GPT, GPTConfig

DOCS = [f"story {i}: " + "abcdefgh ij"[: 3 + i % 8] * (1 + i % 5)
        for i in range(400)]  # fmt: skip
TOKENIZER = CharTokenizer.train("".join(DOCS))
TOKENS = TOKENIZER.encode_documents(DOCS[:360])
HELD_OUT = TOKENIZER.encode_documents(DOCS[360:])
SHAPE = GPTConfig(vocab_size=TOKENIZER.vocab_size, context_length=32,
                  d_model=16, n_layers=2, n_heads=2, dropout=0.1)  # fmt: skip


def config(**changes):
    base = dict(max_steps=12, batch_size=4, warmup_steps=2, eval_every=4,
                checkpoint_every=4, log_every=2, device="cpu",
                dtype="float32")  # fmt: skip
    return TrainConfig(**base | changes)


def run(out_dir=None, *, seed=0, cfg=None, **options):
    options = {"tokenizer": TOKENIZER, "progress": False} | options
    model = GPT(SHAPE, seed=seed)
    return model, train(model, TOKENS, HELD_OUT, cfg or config(),
                        out_dir=out_dir, **options)  # fmt: skip


def same_weights(a, b):
    return all(torch.equal(p, q)
               for p, q in zip(a.parameters(), b.parameters()))  # fmt: skip


# --- the loss ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_equals_torch(dtype):
    torch.manual_seed(0)
    logits = (5 * torch.randn(3, 7, 50)).to(dtype).requires_grad_()
    targets = torch.randint(50, (3, 7))
    targets[0, 3:] = IGNORE_INDEX
    for reduction in ("mean", "sum"):
        ours = cross_entropy(logits, targets, reduction=reduction)
        theirs = F.cross_entropy(logits.float().flatten(0, 1),
                                 targets.flatten(), reduction=reduction)
        torch.testing.assert_close(ours, theirs)
        (g,) = torch.autograd.grad(ours, logits)
        (h,) = torch.autograd.grad(theirs, logits)
        torch.testing.assert_close(g, h)


def test_cross_entropy_survives_large_logits_and_no_targets():
    logits = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    assert cross_entropy(logits, torch.tensor([0])) == 0
    assert cross_entropy(logits, torch.tensor([1])) == 2e4
    loss = cross_entropy(logits, torch.tensor([IGNORE_INDEX]))
    loss.backward()
    assert loss == 0 and torch.equal(logits.grad, torch.zeros(1, 3))


def test_cross_entropy_refuses_shapes():
    with pytest.raises(ValueError, match="need targets of shape"):
        cross_entropy(torch.zeros(2, 3, 5), torch.zeros(2, 4).long())


# --- batches ---


@pytest.mark.parametrize("kind", ["uint16", "uint32", "int64", "torch"])
def test_get_batch_shifts_by_one_and_reaches_the_end(kind):
    tokens = np.arange(20)
    tokens = torch.arange(20) if kind == "torch" else tokens.astype(kind)
    x, y = get_batch(tokens, 500, 6, torch.Generator().manual_seed(0))
    assert x.dtype == y.dtype == torch.int64 and x.shape == (500, 6)
    assert torch.equal(y, x + 1)
    assert sorted(set(x[:, 0].tolist())) == list(range(20 - 6))
    assert y.max() == 19


def test_get_batch_reads_a_memory_map(tmp_path):
    np.arange(50, dtype=np.uint16).tofile(tmp_path / "t.bin")
    tokens = np.memmap(tmp_path / "t.bin", dtype=np.uint16, mode="r")
    x, y = get_batch(tokens, 4, 8, torch.Generator().manual_seed(0))
    assert torch.equal(y, x + 1)


def test_shortest_text():
    x, y = get_batch(np.arange(9), 3, 8)
    assert x[0, 0] == 0 and y[0, -1] == 8
    with pytest.raises(ValueError, match="8 tokens.*needs 9"):
        get_batch(np.arange(8), 3, 8)
    with pytest.raises(ValueError, match="smaller context_length"):
        train(GPT(SHAPE), TOKENS[:20], None, config(), progress=False)


def test_rows_ask_for_each_token_once():
    for starts, lengths in (
        window_rows(len(TOKENS), 32),
        document_rows(TOKENS, 32, TOKENIZER.end_of_text),
    ):
        asked = torch.cat([torch.arange(s + 1, s + n + 1)
                           for s, n in zip(starts, lengths)])  # fmt: skip
        first = 1 if starts[0] == 0 else 0  # windows have nothing before 0
        assert torch.equal(asked, torch.arange(first, len(TOKENS)))
        assert lengths.max() <= 32 and lengths.min() >= 1


def test_document_rows_hold_whole_documents():
    eot = TOKENIZER.end_of_text
    starts, lengths = document_rows(TOKENS, 1000, eot)
    assert len(starts) == 360
    x, y = gather_rows(TOKENS, starts, lengths, end_of_text=eot)
    for i in range(360):
        kept = y[i][y[i] != IGNORE_INDEX].tolist()
        assert x[i, 0] == eot and kept[-1] == eot
        assert TOKENIZER.decode(kept[:-1]) == DOCS[i]


def test_loader_goes_through_all_documents_each_epoch():
    loader = BatchLoader(TOKENS, 7, 64, align="documents",
                         end_of_text=TOKENIZER.end_of_text)  # fmt: skip
    n_batches = len(loader.batches)
    for _ in range(2):
        count = sum(int((loader.next_batch()[1] != IGNORE_INDEX).sum())
                    for _ in range(n_batches))  # fmt: skip
        assert count == len(TOKENS)


@pytest.mark.parametrize("align", ["windows", "documents"])
def test_loader_state_gives_the_same_next_batches(align):
    def make():
        return BatchLoader(TOKENS, 4, 32, align=align, seed=3,
                           end_of_text=TOKENIZER.end_of_text)  # fmt: skip

    loader = make()
    for _ in range(150):  # over the end of an epoch of documents
        loader.next_batch()
    state = {k: v.clone() for k, v in loader.state().items()}
    expected = [loader.next_batch() for _ in range(120)]
    again = make()
    again.load_state(state)
    for x, y in expected:
        a, b = again.next_batch()
        assert torch.equal(a, x) and torch.equal(b, y)


def test_documents_need_an_end_of_text():
    with pytest.raises(ValueError, match="align='windows'"):
        BatchLoader(TOKENS, 4, 32, align="documents")


# --- configuration, optimizer, schedule ---


@pytest.mark.parametrize("wrong", [
    {"lr": 0.0}, {"lr": math.nan}, {"min_lr": 1.0}, {"max_steps": 0},
    {"betas": (0.9, 1.0)}, {"grad_clip": 0.0}, {"schedule": "cosin"},
    {"align": "rows"}, {"dtype": "int8"}, {"batch_size": 0},
    {"weight_decay": -0.1},
])  # fmt: skip
def test_config_refuses(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TrainConfig(**wrong)


def test_param_groups():
    model = GPT(SHAPE)
    decay, rest = param_groups(model, 0.3)
    assert decay["weight_decay"] == 0.3 and rest["weight_decay"] == 0.0
    assert all(p.dim() >= 2 for p in decay["params"])
    assert all(p.dim() < 2 for p in rest["params"])
    together = {id(p) for p in decay["params"] + rest["params"]}
    assert together == {id(p) for p in model.parameters()}
    model.pos_emb.weight.requires_grad_(False)
    decay, _ = param_groups(model, 0.3)
    assert all(p is not model.pos_emb.weight for p in decay["params"])


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_schedule(schedule):
    cfg = TrainConfig(lr=1.0, min_lr=0.1, warmup_steps=10, max_steps=100,
                      schedule=schedule)  # fmt: skip
    rates = [lr_at(s, cfg) for s in range(100)]
    assert 0 < rates[0] < 0.11 and rates[10] == 1.0
    assert all(b > a for a, b in zip(rates[:10], rates[1:11]))
    assert all(b <= a for a, b in zip(rates[10:], rates[11:]))
    assert math.isclose(rates[-1], 1.0 if schedule == "constant" else 0.1)
    assert lr_at(1000, cfg) == rates[-1]


def test_schedule_without_room():
    cfg = TrainConfig(max_steps=1, warmup_steps=0, lr=1.0, min_lr=0.5)
    assert 0.5 <= lr_at(0, cfg) <= 1.0


# --- one step ---


def test_accumulation_equals_the_large_batch():
    eot, results = TOKENIZER.end_of_text, []
    shape = dataclasses.replace(SHAPE, dropout=0.0)
    for size, parts in ((8, 1), (2, 4)):
        cfg = config(batch_size=size, grad_accum_steps=parts,
                     align="documents")  # fmt: skip
        trainer = Trainer(GPT(shape, seed=0), TOKENS, cfg, eot)
        rows = document_rows(TOKENS, 32, eot)
        chosen = torch.arange(8).split(size)
        trainer.loader.batches = list(chosen)  # rows of unequal lengths
        assert len(set(rows[1][:8].tolist())) > 1
        loss, norm = trainer.train_step()
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


# --- evaluation ---


def test_evaluation_is_exact_and_leaves_no_trace():
    model = GPT(SHAPE, seed=0).train()
    state = torch.get_rng_state()
    a = evaluate_loss(model, HELD_OUT, batch_size=1)
    b = evaluate_loss(model, HELD_OUT, batch_size=50)
    assert math.isclose(a, b, rel_tol=1e-5)
    assert model.training and torch.equal(state, torch.get_rng_state())
    model.eval()
    total = 0.0
    starts, lengths = window_rows(len(HELD_OUT), 32)
    for s, n in zip(starts.tolist(), lengths.tolist()):
        ids = torch.from_numpy(HELD_OUT[s : s + n + 1].astype(np.int64))
        total += F.cross_entropy(model(ids[None, :-1])[0], ids[1:],
                                 reduction="sum").item()  # fmt: skip
    assert math.isclose(a, total / (len(HELD_OUT) - 1), rel_tol=1e-5)


def test_documents_are_scored_alone():
    eot = TOKENIZER.end_of_text
    shape = dataclasses.replace(SHAPE, context_length=128)
    model = GPT(shape, seed=0)
    whole = evaluate_loss(model, HELD_OUT, end_of_text=eot)
    swapped = TOKENIZER.encode_documents(DOCS[360:][::-1])
    assert math.isclose(
        whole, evaluate_loss(model, swapped, end_of_text=eot), rel_tol=1e-5
    )


def test_bytes_per_token_counts_bytes_not_characters():
    text = ["añb", "çç"]
    tokenizer = CharTokenizer.train("".join(text))
    ids = tokenizer.encode_documents(text)
    assert bytes_per_token(ids, tokenizer) == (4 + 4) / (3 + 2 + 2)


def test_first_tokens_ends_with_a_document():
    eot = TOKENIZER.end_of_text
    part = first_tokens(TOKENS, 100, eot)
    assert 0 < len(part) <= 100 and part[-1] == eot
    assert len(first_tokens(TOKENS, 100)) == 100
    assert len(first_tokens(TOKENS, 10**9, eot)) == len(TOKENS)


# --- devices ---


def test_devices_and_dtypes():
    assert pick_device("cpu").type == "cpu"
    assert pick_device("auto").type in ("cpu", "cuda", "mps")
    with pytest.raises(ValueError, match="not available"):
        pick_device("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="cuda:3"):
            pick_device("cuda:3")
    cpu = torch.device("cpu")
    with pytest.raises(ValueError, match="float16"):
        pick_dtype("float16", cpu)
    assert pick_dtype("float32", cpu) == torch.float32
    assert pick_dtype("auto", torch.device("mps")) == torch.float32


def test_cuda_without_bfloat16_gets_float16(monkeypatch):
    cuda = torch.device("cuda")
    for major, expected in ((7, torch.float16), (8, torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability",
                            lambda device, major=major: (major, 5))
        assert pick_dtype("auto", cuda) == expected


# --- checkpoints ---


def test_checkpoint_round_trip(tmp_path):
    model = GPT(SHAPE, seed=1)
    optimizer = make_optimizer(model, config())
    cross_entropy(model(torch.zeros(1, 8).long()),
                  torch.ones(1, 8).long()).backward()
    optimizer.step()
    save_checkpoint(tmp_path / "c", model, optimizer, 7)
    back = load_checkpoint(tmp_path / "c")
    assert back.step == 7 and back.cfg == SHAPE
    assert same_weights(back.build_model(), model)
    other = make_optimizer(model, config())
    back.load_optimizer(other, model)
    for p in model.parameters():
        for key, value in optimizer.state[p].items():
            assert torch.equal(other.state[p][key], value)
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


class Trap:
    def __reduce__(self):
        return (os.system, ("echo unpickled > trap.txt",))


@pytest.mark.parametrize("name", ["w.pt", "w.bin", "w.pkl", "w.safetensors"])
def test_pickles_are_never_read(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(pickle.dumps(Trap()))
    torch.save({"w": Trap()}, tmp_path / f"zip-{name}")
    for path in (tmp_path / name, tmp_path / f"zip-{name}"):
        for read in (read_tensors, load_checkpoint):
            with pytest.raises(ValueError, match="pickle") as caught:
                read(path)
            assert "\n" not in str(caught.value)
    assert not (tmp_path / "trap.txt").exists()


def test_a_file_whose_length_begins_like_a_pickle_is_read(tmp_path):
    path, first = tmp_path / "w.safetensors", set()
    for n in range(0, 2048, 8):  # the length is a multiple of 8
        save_file({"w": torch.arange(3.0)}, path, {"note": "x" * n})
        first.add(path.read_bytes()[0])
        assert torch.equal(read_tensors(path)["w"], torch.arange(3.0))
    assert 0x80 in first


@pytest.mark.parametrize("content", [b"", b"x", b"hello world " * 10,
                                     b"\xff" * 64, b"\x08" + b"\0" * 7 + b"{"])
def test_foreign_files_give_one_line(tmp_path, content):
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="not a safetensors") as caught:
        read_tensors(tmp_path / "w.safetensors")
    assert "\n" not in str(caught.value)


def test_missing_and_foreign_directories(tmp_path):
    for read in (load_checkpoint, load_run):
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "nowhere")
        with pytest.raises(ValueError, match="not a minillm"):
            read(tmp_path)
    (tmp_path / "checkpoint.json").write_text('{"format": "x"}')
    with pytest.raises(ValueError, match="not a minillm"):
        load_checkpoint(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match="JSON"):
        load_run(tmp_path)


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "head"])
def test_damaged_checkpoint_falls_back(tmp_path, damage):
    run(tmp_path / "r")
    newest = tmp_path / "r/checkpoints/step-00000012"
    path = newest / "model.safetensors"
    if damage == "flip":
        data = bytearray(path.read_bytes())
        data[-9] ^= 1
        path.write_bytes(data)
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "remove":
        path.unlink()
    else:
        (newest / "checkpoint.json").write_text("{}")
    with pytest.raises((ValueError, FileNotFoundError)):
        load_checkpoint(newest)
    with pytest.warns(UserWarning, match="skipped"):
        assert load_run(tmp_path / "r").step == 8


def test_crash_while_writing_keeps_the_previous_one(tmp_path, monkeypatch):
    model = GPT(SHAPE, seed=0)
    save_checkpoint(tmp_path / "c", model, step=1)
    import minillm.train as module

    def no_space(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(module, "write_json", no_space)
    with pytest.raises(OSError, match="no space"):
        save_checkpoint(tmp_path / "c", model, step=2)
    monkeypatch.undo()
    assert load_checkpoint(tmp_path / "c").step == 1
    save_checkpoint(tmp_path / "c", model, step=3)
    assert load_checkpoint(tmp_path / "c").step == 3
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_weights_of_another_model_are_refused(tmp_path):
    save_checkpoint(tmp_path / "c", GPT(SHAPE), step=1)
    shape = dataclasses.replace(SHAPE, d_model=32)
    trainer = Trainer(GPT(shape), TOKENS, config())
    with pytest.raises(ValueError, match="another model"):
        trainer.restore(load_checkpoint(tmp_path / "c"))
    trainer = Trainer(GPT(SHAPE), TOKENS, config())
    with pytest.raises(ValueError, match="no state of the training"):
        trainer.restore(load_checkpoint(tmp_path / "c"))


# --- whole runs ---


def test_run_learns_and_leaves_a_complete_directory(tmp_path):
    cfg = config(max_steps=60, lr=1e-2, eval_every=20, checkpoint_every=20)
    model, result = run(tmp_path / "r", cfg=cfg, floor=0.1)
    held_out = [r["val_loss"] for r in result.history if "val_loss" in r]
    assert held_out[-1] < held_out[0] - 0.5 and len(held_out) == 4
    names = {p.name for p in (tmp_path / "r").iterdir()}
    assert names >= {"run.json", "tokenizer.json", "metrics.jsonl",
                     "loss.png", "loss.svg", "checkpoints"}  # fmt: skip
    assert len(list((tmp_path / "r/checkpoints").iterdir())) == 2
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


@pytest.mark.parametrize("align", ["windows", "documents"])
@pytest.mark.parametrize("stop", [4, 7])
def test_resume_is_bit_for_bit(tmp_path, align, stop):
    cfg = config(align=align, grad_accum_steps=2)
    straight, expected = run(tmp_path / "a", cfg=cfg)
    run(tmp_path / "b", cfg=cfg, stop_at=stop)
    torch.manual_seed(1234)
    resumed, result = run(tmp_path / "b", cfg=cfg, seed=99, resume=True)
    assert same_weights(straight, resumed)
    clock = ("seconds", "tokens_per_s")

    def plain(history):
        return {
            (r["step"], k): v for r in history for k, v in r.items()
            if k not in clock and r["step"] % 2 == 0
        }  # fmt: skip

    assert plain(result.history)[12, "val_loss"] == expected.val_loss
    common = plain(result.history).keys() & plain(expected.history).keys()
    if stop == 4:
        for key in common:
            assert plain(result.history)[key] == plain(expected.history)[key]


SCRIPT = """
import json, sys
sys.path.insert(0, {tests!r})
import test_train as t
stop = int(sys.argv[2]) or None
cfg = t.config(align="documents", grad_accum_steps=2, checkpoint_every=3)
options = dict(resume=sys.argv[3] == "resume")
if sys.argv[3] == "kill":
    import os, signal
    def die(record):
        if record["step"] == stop and "loss" in record:
            os._exit(9)
    t.run(sys.argv[1], cfg=cfg, on_record=die)
model, result = t.run(sys.argv[1], cfg=cfg, stop_at=stop, **options)
"""


def in_process(*args):
    code = textwrap.dedent(SCRIPT).format(tests=os.path.dirname(__file__))
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)], timeout=300,
        capture_output=True, text=True,
    )  # fmt: skip


def test_resume_in_a_fresh_process_after_a_kill(tmp_path):
    assert in_process(tmp_path / "a", 0, "new").returncode == 0
    killed = in_process(tmp_path / "b", 8, "kill")  # last checkpoint: 6
    assert killed.returncode == 9, killed.stderr
    assert load_run(tmp_path / "b").step == 6
    done = in_process(tmp_path / "b", 0, "resume")
    assert done.returncode == 0, done.stderr
    a, b = load_checkpoint(tmp_path / "a"), load_checkpoint(tmp_path / "b")
    assert a.step == b.step == 12
    for left, right in ((a.weights, b.weights), (a.tensors, b.tensors)):
        assert left.keys() == right.keys()
        assert all(torch.equal(left[k], right[k]) for k in left)
    steps = [r["step"] for r in read_history(tmp_path / "b") if "loss" in r]
    assert steps == sorted(set(steps))  # nothing twice


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
            seen.append(in_process(tmp_path / "r", 0, "resume").stderr)

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


# --- the shared model ---

SHARED = """
import json, sys
from minillm.train import Recipe, TrainConfig, tales_model
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
    with pytest.warns(UserWarning, match="skipped"):
        repaired = tales_model(recipe=recipe)
    assert same_weights(repaired.model, first.model)
    recipe.training.lr = 2e-3
    assert tales_model(recipe=recipe).run_dir != first.run_dir


def test_recipes_are_consistent():
    for recipe in (quickstart_recipe(), tales_recipe()):
        assert recipe.training.align == "documents"
        assert recipe.tokenizer_bytes <= recipe.corpus_bytes
    assert tales_recipe().training.device == "cpu"
