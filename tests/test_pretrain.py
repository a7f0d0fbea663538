"""The loss, the batches, the configuration and the evaluation."""

import dataclasses
import json
import math
from typing import Literal, get_args, get_origin

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import DOCS, HELD_OUT, SHAPE, TOKENIZER, TOKENS, config
from torch.nn import functional as F

from minillm.pretrain import (
    FROM_ZERO,
    IGNORE_INDEX,
    TrainConfig,
    autocast,
    bytes_per_token,
    check_setting,
    cross_entropy,
    document_rows,
    evaluate_loss,
    first_tokens,
    gather_rows,
    get_batch,
    window_rows,
)
from minillm.tokenizer import CharTokenizer
from minillm.train import train
from minillm.transformer import GPT

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
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs)
        (g,) = torch.autograd.grad(ours, logits)
        (h,) = torch.autograd.grad(theirs, logits)
        torch.testing.assert_close(g, h)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_cross_entropy_is_minus_log_softmax(data):
    n, vocab = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 7))
    scale = data.draw(st.sampled_from([0.0, 1.0, 50.0, 1e4]))
    seed = data.draw(st.integers(0, 2**31))
    torch.manual_seed(seed)
    logits = scale * torch.randn(n, vocab)
    ids = data.draw(st.lists(st.sampled_from([IGNORE_INDEX, *range(vocab)]),
                             min_size=n, max_size=n))  # fmt: skip
    wide, total = logits.double(), 0.0
    for row, i in zip(wide, ids):
        if i != IGNORE_INDEX:
            top = row.max()
            total += (top + (row - top).exp().sum().log() - row[i]).item()
    targets = torch.tensor(ids)
    n_counted = max(1, sum(i != IGNORE_INDEX for i in ids))
    close = {"rel_tol": 1e-5, "abs_tol": 1e-5}
    got = cross_entropy(logits, targets, reduction="sum").item()
    assert math.isclose(got, total, **close) and got >= 0
    mean = cross_entropy(logits, targets).item()
    assert math.isclose(mean, total / n_counted, **close)


def test_cross_entropy_has_the_gradient_p_minus_one_hot():
    torch.manual_seed(0)
    logits = torch.randn(5, 6, requires_grad=True)
    targets = torch.tensor([0, 1, IGNORE_INDEX, 5, 3])
    (g,) = torch.autograd.grad(cross_entropy(logits, targets), logits)
    p = logits.detach().double().softmax(-1)
    kept = targets != IGNORE_INDEX
    p[kept] -= F.one_hot(targets[kept], 6)
    p[~kept] = 0
    torch.testing.assert_close(g.double(), p / 4, rtol=1e-5, atol=1e-7)
    wide = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([[0, 4, IGNORE_INDEX], [2, 2, 1]])
    assert cross_entropy(wide, targets).dtype == torch.float64
    assert torch.autograd.gradcheck(lambda z: cross_entropy(z, targets), wide)


def test_cross_entropy_survives_large_logits_and_no_targets():
    logits = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    assert cross_entropy(logits, torch.tensor([0])) == 0
    assert cross_entropy(logits, torch.tensor([1])) == 2e4
    loss = cross_entropy(logits, torch.tensor([IGNORE_INDEX]))
    loss.backward()
    assert loss == 0 and torch.equal(logits.grad, torch.zeros(1, 3))


def test_cross_entropy_of_one_token_and_of_none():
    assert cross_entropy(torch.zeros(4), torch.tensor(2)).item() == (
        pytest.approx(math.log(4))
    )
    empty = cross_entropy(torch.zeros(0, 4), torch.zeros(0).long())
    assert empty == 0
    one = cross_entropy(torch.zeros(2, 1), torch.zeros(2).long())
    assert one == 0  # a vocabulary of one token leaves no doubt
    across = torch.randn(5, 2, 3).transpose(0, 1)  # not contiguous
    cross_entropy(across, torch.zeros(2, 5).long())


def test_cross_entropy_refuses():
    zeros = torch.zeros(2, 3, 5)
    with pytest.raises(ValueError, match="need targets of shape"):
        cross_entropy(zeros, torch.zeros(2, 4).long())
    with pytest.raises(ValueError, match=r"targets\.long\(\)"):
        cross_entropy(zeros, torch.zeros(2, 3, dtype=torch.int32))
    with pytest.raises(ValueError, match="'none'.*'mean' or 'sum'"):
        cross_entropy(zeros, torch.zeros(2, 3).long(), reduction="none")


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


@pytest.mark.parametrize("wrong", ["batch_size", "context_length"])
def test_get_batch_refuses_no_rows(wrong):
    sizes = {"batch_size": 2, "context_length": 3} | {wrong: 0}
    with pytest.raises(ValueError, match=f"{wrong} is 0"):
        get_batch(np.arange(9), **sizes)


def asked(starts, lengths):
    """List the places of all targets of some rows."""
    return [i for s, n in zip(starts.tolist(), lengths.tolist())
            for i in range(s + 1, s + n + 1)]  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=40),
       st.integers(1, 12))  # fmt: skip
def test_rows_ask_for_each_token_once(ids, T):
    tokens = np.array(ids, dtype=np.uint16)  # 0 ends a document
    starts, lengths = window_rows(len(tokens), T)
    assert asked(starts, lengths) == list(range(1, len(tokens)))
    starts, lengths = document_rows(tokens, T, 0)
    assert asked(starts, lengths) == list(range(len(tokens)))
    assert 1 <= lengths.min() and lengths.max() <= T
    for s, n in zip(starts.tolist(), lengths.tolist()):
        inside = tokens[s + 1 : s + n]  # an END_OF_TEXT can only be last
        assert (inside != 0).all()
    x, y = gather_rows(tokens, starts, lengths, end_of_text=0)
    flat = np.concatenate([[0], tokens])
    for k, (s, n) in enumerate(zip(starts.tolist(), lengths.tolist())):
        assert x[k, :n].tolist() == flat[s + 1 : s + 1 + n].tolist()
        assert y[k, :n].tolist() == tokens[s + 1 : s + 1 + n].tolist()
        assert (y[k, n:] == IGNORE_INDEX).all()


def test_document_rows_hold_whole_documents():
    eot = TOKENIZER.end_of_text
    starts, lengths = document_rows(TOKENS, 1000, eot)
    assert len(starts) == 360
    x, y = gather_rows(TOKENS, starts, lengths, end_of_text=eot)
    for i in range(360):
        kept = y[i][y[i] != IGNORE_INDEX].tolist()
        assert x[i, 0] == eot and kept[-1] == eot
        assert TOKENIZER.decode(kept[:-1]) == DOCS[i]
    same = gather_rows(torch.from_numpy(TOKENS.astype(np.int64)), starts,
                       lengths, end_of_text=eot)  # fmt: skip
    assert torch.equal(same[0], x) and torch.equal(same[1], y)


# --- configuration ---


@pytest.mark.parametrize("wrong", [
    {"lr": 0.0}, {"lr": math.nan}, {"lr": math.inf}, {"lr": -1e-3},
    {"lr": "1e-3"}, {"lr": True}, {"lr": None}, {"min_lr": 1.0},
    {"min_lr": -1.0}, {"max_steps": 0}, {"max_steps": 1000.0},
    {"max_steps": "1000"}, {"max_steps": True}, {"max_steps": None},
    {"betas": (0.9, 1.0)}, {"betas": (0.9,)}, {"betas": 0.9},
    {"betas": "ab"}, {"betas": ("0.9", 0.95)}, {"betas": (True, 0.95)},
    {"grad_clip": 0.0}, {"grad_clip": math.nan}, {"schedule": "cosin"},
    {"schedule": None}, {"align": "rows"}, {"dtype": "int8"},
    {"dtype": torch.float32}, {"device": 0}, {"batch_size": 0},
    {"weight_decay": -0.1}, {"weight_decay": math.inf}, {"compile": 1},
    {"keep_best": "no"}, {"seed": -1}, {"warmup_steps": -1},
    {"decay_fraction": 0.0}, {"decay_fraction": 1.5}, {"log_to": "tensor"},
    {"optimizer": "adam"}, {"on_nonfinite": "ignore"}, {"max_skipped": 0},
])  # fmt: skip
def test_config_refuses(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=name):
        TrainConfig(**wrong)
    with pytest.raises(ValueError, match=name):
        dataclasses.replace(TrainConfig(), **wrong)


def test_config_says_value_limit_and_remedy():
    with pytest.raises(ValueError, match=r"lr is '1e-3'; it must be a number "
                       r"above 0, such as 0\.001"):  # fmt: skip
        TrainConfig(lr="1e-3")
    with pytest.raises(ValueError, match=r"max_steps is 1000\.0; it must be a "
                       "whole number of at least 1, such as 1000"):
        TrainConfig(max_steps=1e3)
    with pytest.raises(ValueError, match="0.01, above lr = 0.001; lower"):
        TrainConfig(min_lr=1e-2)


def test_config_of_numpy_numbers_and_whole_rates_can_be_written():
    cfg = TrainConfig(max_steps=np.int64(7), lr=np.float32(0.5), min_lr=0,
                      grad_clip=np.inf, betas=[0, np.float64(0.5)])
    assert type(cfg.max_steps) is int and type(cfg.lr) is float
    assert cfg.betas == (0.0, 0.5) and type(cfg.betas) is tuple
    again = TrainConfig(**json.loads(json.dumps(dataclasses.asdict(cfg))))
    assert again == cfg


def test_every_field_has_a_kind_that_is_checked():
    for f in dataclasses.fields(TrainConfig):
        if f.name == "betas":
            continue
        value = check_setting(f.name, f.default, f.type, f.default)
        assert value == f.default and type(value) is type(f.default)
        known = f.type in (int, float, bool, str)
        assert known or get_origin(f.type) is Literal and get_args(f.type)
        with pytest.raises(ValueError, match=f"{f.name} is None"):
            check_setting(f.name, None, f.type, f.default)
    assert FROM_ZERO < {f.name for f in dataclasses.fields(TrainConfig)}


# --- evaluation ---


def test_evaluation_is_exact_and_leaves_no_trace():
    model = GPT(SHAPE, seed=0).train()
    model.blocks[0].eval()
    state = torch.get_rng_state()
    a = evaluate_loss(model, HELD_OUT, batch_size=1)
    b = evaluate_loss(model, HELD_OUT, batch_size=50)
    assert math.isclose(a, b, rel_tol=1e-5)
    assert model.training and torch.equal(state, torch.get_rng_state())
    assert not model.blocks[0].training  # each part gets its own mode back
    assert all(p.grad is None for p in model.parameters())
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
    wide = evaluate_loss(model, swapped) - evaluate_loss(model, HELD_OUT)
    assert abs(wide) > 1e-6  # windows do see the neighbours


def test_evaluation_in_bfloat16_is_close():
    model = GPT(SHAPE, seed=0)
    low = evaluate_loss(model, HELD_OUT, dtype=torch.bfloat16)
    assert abs(low - evaluate_loss(model, HELD_OUT)) < 0.02
    x = torch.ones(2, 2)
    for dtype in (torch.float32, torch.bfloat16):
        with autocast(torch.device("cpu"), dtype):
            assert (x @ x).dtype == dtype


@pytest.mark.parametrize("options, words", [
    ({}, "1 tokens leave nothing"), ({"context_length": 0}, "is 0"),
    ({"batch_size": 0}, "batch_size 0"),
])  # fmt: skip
def test_evaluation_refuses(options, words):
    tokens = HELD_OUT if options else HELD_OUT[:1]
    model = GPT(SHAPE, seed=0).train()
    with pytest.raises(ValueError, match=words):
        evaluate_loss(model, tokens, **options)
    assert model.training


def test_evaluation_of_two_tokens():
    model = GPT(SHAPE, seed=0).eval()
    ids = torch.from_numpy(HELD_OUT[:2].astype(np.int64))
    alone = F.cross_entropy(model(ids[None, :1])[0], ids[1:]).item()
    assert evaluate_loss(model, HELD_OUT[:2]) == pytest.approx(alone)


def test_bytes_per_token_counts_bytes_not_characters():
    text = ["añb", "çç"]
    tokenizer = CharTokenizer.train("".join(text))
    ids = tokenizer.encode_documents(text)
    assert bytes_per_token(ids, tokenizer) == (4 + 4) / (3 + 2 + 2)
    with pytest.raises(ValueError, match="no tokens"):
        bytes_per_token(ids[:0], tokenizer)


def test_first_tokens_ends_with_a_document():
    eot = TOKENIZER.end_of_text
    part = first_tokens(TOKENS, 100, eot)
    assert 0 < len(part) <= 100 and part[-1] == eot
    assert len(first_tokens(TOKENS, 100)) == 100
    assert len(first_tokens(TOKENS, 10**9, eot)) == len(TOKENS)
    assert len(first_tokens(TOKENS, 3, eot)) == 3  # no document ends by then
