"""Sampling: each rule against a naive version, draws against exact odds."""
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stand_ins import END, Bytes
from torch import nn

from minillm.sample import (
    NextLogits,
    apply_repetition_penalty,
    apply_temperature,
    apply_top_k,
    apply_top_p,
    check_sampling,
    choose_tokens,
    generate,
    greedy,
    next_tokens,
    sample_tokens,
    stream_text,
)
from minillm.tokenizer import decode_pieces
from minillm.transformer import GPT, GPTConfig


class Causal(nn.Module):
    """A small causal stand-in: a decaying sum of embeddings, dropout."""

    def __init__(self, vocab_size=11, context_length=6, d=8):
        super().__init__()
        torch.manual_seed(0)
        self.cfg = SimpleNamespace(context_length=context_length)
        self.emb, self.drop = nn.Embedding(vocab_size, d), nn.Dropout(0.5)
        self.head = nn.Linear(d, vocab_size)
        self.seen = []

    def forward(self, tokens):
        assert tokens.shape[1] <= self.cfg.context_length
        assert not torch.is_grad_enabled() and not self.training
        self.seen.append(tokens.clone())
        t = torch.arange(tokens.shape[1])
        w = 0.7 ** (t[:, None] - t).clamp(min=0) * (t[:, None] >= t)
        return 2 * self.head(self.drop(w @ self.emb(tokens)))


class Script(nn.Module):
    """Emit a fixed sequence of ids after the prompt's first token."""

    def __init__(self, ids, vocab_size=257):
        super().__init__()
        self.cfg = SimpleNamespace(context_length=64)
        self.ids, self.vocab_size = ids, vocab_size

    def forward(self, tokens):
        out = torch.zeros(*tokens.shape, self.vocab_size)
        out[:, -1, self.ids[tokens.shape[1] - 1]] = 100.0
        return out


logit_rows = st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=40)
tied_rows = st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), min_size=1,
                     max_size=20)


def kept(logits):
    return [i for i, v in enumerate(logits.tolist()) if v != -math.inf]


def ranking(row):
    return sorted(range(len(row)), key=lambda i: (-row[i], i))


# ---- the rules

@given(st.one_of(logit_rows, tied_rows), st.integers(1, 50))
def test_top_k_equals_naive(row, k):
    out = apply_top_k(torch.tensor(row), k)
    assert kept(out) == sorted(ranking(row)[:k])
    assert all(out[i] == torch.tensor(row)[i] for i in kept(out))


@given(st.one_of(logit_rows, tied_rows), st.floats(0.01, 1.0))
def test_top_p_equals_naive(row, p):
    probs = torch.tensor(row).double().softmax(0).tolist()
    want, mass, close = [], 0.0, False
    for i in ranking(row):
        want.append(i)
        mass += probs[i]
        close = close or abs(mass - p) < 1e-5   # float32 may differ there
        if mass >= p:
            break
    out = apply_top_p(torch.tensor(row), p)
    if not close and p < 1:
        assert kept(out) == sorted(want)
    assert len(kept(out)) >= 1


def test_top_p_on_exact_sums():
    # 1/2, 1/4, 1/8, 1/8: every sum is exact in binary
    row = torch.tensor([0.125, 0.5, 0.125, 0.25]).log2() * math.log(2)
    assert kept(apply_top_p(row, 0.5)) == [1]           # reached exactly
    assert kept(apply_top_p(row, 0.51)) == [1, 3]       # boundary included
    assert kept(apply_top_p(row, 0.76)) == [0, 1, 3]    # tie: lower id
    assert kept(apply_top_p(row, 0.88)) == [0, 1, 2, 3]
    assert kept(apply_top_p(row, 1e-9)) == [1]


def test_top_p_of_one_keeps_what_underflows():
    row = torch.tensor([0.0, -200.0, -300.0])   # probabilities 1, 0, 0
    assert torch.equal(apply_top_p(row, 1.0), row)


@given(tied_rows)
def test_top_p_limits_are_greedy_and_all(row):
    x = torch.tensor(row)
    assert kept(apply_top_p(x, 1e-6)) == kept(greedy(x))
    assert torch.equal(apply_top_p(x, 1.0), x)
    assert kept(apply_top_k(x, 1)) == kept(greedy(x))


def test_bfloat16_logits_keep_the_right_mass():
    x = torch.zeros(50_000, dtype=torch.bfloat16)
    n = len(kept(apply_top_p(x, 0.9)))
    assert abs(n - 45_000) <= 50    # float32 sums; bfloat16 ones would stall
    assert apply_top_p(x, 0.9).dtype == torch.bfloat16


@given(logit_rows, st.floats(0.05, 5))
def test_temperature_divides(row, temperature):
    x = torch.tensor(row, dtype=torch.float64)
    torch.testing.assert_close(
        apply_temperature(x, temperature).softmax(0),
        (x / temperature).softmax(0))


@pytest.mark.parametrize("temperature", [0.0, 1e-300, 1e-45, 1e-38, 1e-6])
def test_temperature_limit_is_greedy_without_nan(temperature):
    x = torch.tensor([[1e4, 3.0, -1e4], [0.0, 1.0, -torch.inf]])
    probs = apply_temperature(x, temperature).softmax(-1)
    assert torch.equal(probs, greedy(x).softmax(-1))


def test_temperature_near_zero_shares_ties_and_zero_does_not():
    x = torch.tensor([2.0, 2.0, 1.0])
    assert apply_temperature(x, 1e-9).softmax(0).tolist() == [0.5, 0.5, 0]
    assert apply_temperature(x, 0).softmax(0).tolist() == [1, 0, 0]


@given(st.one_of(logit_rows, tied_rows), st.integers(1, 9),
       st.floats(0.05, 1))
def test_probabilities_renormalise(row, k, p):
    x = apply_top_p(apply_top_k(torch.tensor(row), k), p)
    probs = x.double().softmax(0)
    assert abs(float(probs.sum()) - 1) < 1e-9
    gone = [i for i in range(len(row)) if i not in kept(x)]
    assert all(probs[i] == 0 for i in gone)


@given(logit_rows.filter(lambda r: len(r) > 3), st.floats(0.5, 3),
       st.lists(st.integers(0, 3), min_size=1, max_size=6))
def test_repetition_penalty_equals_naive(row, penalty, tokens):
    x = torch.tensor(row)
    want = x.clone()
    for i in set(tokens):
        want[i] = x[i] / penalty if x[i] > 0 else x[i] * penalty
    out = apply_repetition_penalty(x, torch.tensor(tokens), penalty)
    torch.testing.assert_close(out, want)
    if penalty >= 1:
        assert (out <= x).all()


def test_rules_do_not_touch_their_input_and_take_batches():
    x = torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(1))
    before = x.clone()
    tokens = torch.randint(9, (2, 3, 4))
    for out in (greedy(x), apply_temperature(x, 0.5), apply_top_k(x, 3),
                apply_top_p(x, 0.5), apply_top_p(x, 1.0),
                apply_repetition_penalty(x, tokens, 1.3)):
        assert out.shape == x.shape and out.data_ptr() != x.data_ptr()
    assert torch.equal(x, before)
    rows = torch.stack([apply_top_p(r, 0.5) for r in x.view(6, 9)])
    assert torch.equal(apply_top_p(x, 0.5).view(6, 9), rows)


@pytest.mark.parametrize("bad, remedy", [
    (dict(temperature=-0.1), ">= 0"), (dict(temperature=math.nan), ">= 0"),
    (dict(temperature=math.inf), "finite"), (dict(top_k=0), ">= 1"),
    (dict(top_k=-3), "None"), (dict(top_k=2.5), "whole"),
    (dict(top_k="5"), "whole"), (dict(top_k=[3]), "whole"),
    (dict(temperature=None), ">= 0"), (dict(temperature="1"), ">= 0"),
    (dict(top_p="0.9"), "None"), (dict(repetition_penalty=None), "1 is off"),
    (dict(top_p=0.0), r"\(0, 1\]"), (dict(top_p=1.1), r"\(0, 1\]"),
    (dict(top_p=math.nan), r"\(0, 1\]"),
    (dict(repetition_penalty=0.0), "> 0")])
def test_bad_settings_name_value_and_remedy(bad, remedy):
    (value,) = bad.values()
    for call in (lambda: check_sampling(**bad),
                 lambda: generate(Causal(), torch.tensor([[1]]), 0, **bad),
                 lambda: stream_text(Causal(), Bytes(), "a", **bad)):
        with pytest.raises(ValueError, match=remedy) as e:
            call()
        assert str(value) in str(e.value)


@pytest.mark.parametrize("stop", [-1, 7, 1.0, "2"])
def test_a_stop_token_must_be_an_id(stop):
    logits, tokens = torch.zeros(1, 7), torch.tensor([[1]])
    model = GPT(GPTConfig(7, 8, 8, 1, 1), seed=0)
    for call in (lambda: choose_tokens(logits, tokens, stop_token=stop),
                 lambda: next_tokens(model, tokens, stop_token=stop),
                 lambda: generate(model, tokens, 3, stop_token=stop)):
        with pytest.raises(ValueError, match=r"0\.\.6, .*end_of_text") as e:
            call()
        assert repr(stop) in str(e.value)


# ---- drawing

def chi_square_p_value(counts, probs):
    """P(a chi-square variable exceeds the statistic), small bins merged."""
    expected = probs.double() * counts.sum()
    order = expected.argsort()
    expected, counts = expected[order], counts[order].double()
    small = int((expected.cumsum(0) < 5).sum()) + 1   # merged bin reaches 5
    e = torch.cat([expected[:small].sum()[None], expected[small:]])
    c = torch.cat([counts[:small].sum()[None], counts[small:]])
    x = ((c - e) ** 2 / e).sum()
    return float(torch.special.gammaincc((len(e) - 1) / 2 * torch.ones(
        (), dtype=torch.float64), x / 2))


def test_chi_square_p_value_is_honest():
    g = torch.Generator().manual_seed(0)
    probs = torch.tensor([0.5, 0.3, 0.15, 0.049, 0.001])
    p_values = []
    for _ in range(400):
        drawn = torch.multinomial(probs, 500, True, generator=g)
        p_values.append(chi_square_p_value(drawn.bincount(minlength=5), probs))
    share = sum(p < 0.1 for p in p_values) / 400
    assert 0.05 < share < 0.16      # a tenth, within 3 standard errors


@pytest.mark.parametrize("rule", [
    dict(), dict(temperature=0.5), dict(temperature=2.0), dict(top_k=3),
    dict(top_p=0.7), dict(temperature=1.5, top_k=6, top_p=0.9),
    dict(repetition_penalty=1.5)])
def test_draws_follow_the_exact_probabilities(rule):
    model, prompt = Causal(), torch.tensor([[3, 1, 4]])
    n = 20_000
    with torch.no_grad():
        logits = model.eval()(prompt)[0, -1].double()
    logits = apply_repetition_penalty(
        logits, prompt[0], rule.get("repetition_penalty", 1.0))
    logits = apply_temperature(logits, rule.get("temperature", 1.0))
    logits = apply_top_k(logits, rule.get("top_k", 99))
    probs = apply_top_p(logits, rule.get("top_p", 1.0)).softmax(0)
    out = generate(model, prompt.expand(n, -1), 1, **rule,
                   generator=torch.Generator().manual_seed(5))
    counts = out[:, -1].bincount(minlength=11)
    assert (counts[probs == 0] == 0).all()
    possible = probs > 0
    assert chi_square_p_value(counts[possible], probs[possible]) > 1e-4
    wrong = torch.ones_like(probs[possible]) / possible.sum()
    assert chi_square_p_value(counts[possible], wrong) < 1e-4   # can fail


def test_impossible_tokens_are_never_drawn():
    logits = torch.full((20_000, 50), -torch.inf)
    logits[:, 7] = -1e4
    assert (sample_tokens(logits) == 7).all()


# ---- generate

def test_same_seed_same_text_and_other_seed_other_text():
    model, prompt = Causal(), torch.tensor([[1, 2], [3, 4]])

    def run(seed):
        return generate(model, prompt, 20,
                        generator=torch.Generator().manual_seed(seed))

    assert torch.equal(run(3), run(3))
    assert not torch.equal(run(3), run(4))


def test_global_random_state_is_left_alone_with_a_generator():
    torch.manual_seed(9)
    before = torch.get_rng_state()
    generate(Causal().eval(), torch.tensor([[1]]), 5,
             generator=torch.Generator().manual_seed(0))
    torch.manual_seed(9)
    assert torch.equal(before, torch.get_rng_state())


def test_greedy_equals_a_plain_loop_and_the_window_slides():
    model = Causal(context_length=6)
    ids = [1, 2, 3]
    with torch.no_grad():
        model.eval()
        for _ in range(12):
            logits = model(torch.tensor([ids[-6:]]))
            ids.append(int(logits[0, -1].argmax()))
    model.seen.clear()
    out = generate(model.train(), torch.tensor([[1, 2, 3]]), 12, temperature=0)
    assert out[0].tolist() == ids
    assert [t.shape[1] for t in model.seen] == [3, 4, 5] + [6] * 9
    assert model.seen[-1][0].tolist() == ids[-7:-1]


class Uncached(nn.Module):
    """A GPT without its cache."""

    def __init__(self, model):
        super().__init__()
        self.model, self.cfg = model, model.cfg

    def forward(self, tokens):
        return self.model(tokens)


@pytest.mark.parametrize("fields", [
    {}, {"positions": "rope", "n_kv_heads": 2, "sliding_window": 5},
    {"positions": "alibi"}])
@pytest.mark.parametrize("stop", [None, 3])
@settings(max_examples=10)
@given(st.integers(0, 1000), st.integers(1, 25))
def test_the_cache_changes_nothing(fields, stop, seed, n_prompt):
    """Rows that stop at different times, and texts that outgrow it."""
    model = GPT(GPTConfig(11, 20, 16, 2, 4, **fields), seed=seed)
    prompt = torch.randint(11, (5, n_prompt))

    def run(m, **rule):
        return generate(m, prompt, 30, stop_token=stop, **rule,
                        generator=torch.Generator().manual_seed(seed))

    for rule in ({}, {"temperature": 0, "repetition_penalty": 1.3}):
        assert torch.equal(run(model, **rule), run(Uncached(model), **rule))
    big = GPT(GPTConfig(257, 20, 16, 2, 4), seed=seed)
    pieces = [list(stream_text(m, Bytes(), "ab", 30, generator=torch
                               .Generator().manual_seed(seed)))
              for m in (big, Uncached(big))]
    assert pieces[0] == pieces[1]


def test_a_number_of_tokens_is_whole():
    for n in (2.5, -1, "3", True):
        with pytest.raises(ValueError, match="max_new_tokens"):
            generate(Causal(), torch.tensor([[1]]), n)


def test_a_large_head_is_turned_and_gives_the_same():
    model = GPT(GPTConfig(2**16, 50, 256, 1, 2), seed=0)
    prompt = torch.randint(2**16, (1, 5))
    next_logits = NextLogits(model, 50)
    with torch.no_grad():
        for n in (3, 4, 5):
            found = next_logits(prompt[:, :n])
            assert next_logits.head.shape == (256, 2**16)
            want = model(prompt[:, :n])[:, -1]
            torch.testing.assert_close(found, want, atol=1e-4, rtol=1e-4)
        few = NextLogits(model, 20)
        few(prompt)
        assert few.head is None  # the copy would not pay
        several = NextLogits(model, 50)
        rows = prompt.expand(2, -1)
        torch.testing.assert_close(several(rows), model(rows)[:, -1])
        assert several.head is None


def test_a_cached_step_sees_one_token():
    model, seen = GPT(GPTConfig(11, 20, 16, 1, 2), seed=0), []
    model.tok_emb.register_forward_hook(
        lambda module, inputs, out: seen.append(inputs[0].shape[1]))
    generate(model, torch.ones(1, 4, dtype=torch.long), 18, temperature=0)
    assert seen == [4] + [1] * 16 + [20]  # the 18th token: the window slides


def test_greedy_refuses_nan():
    model = GPT(GPTConfig(11, 20, 16, 1, 2), seed=0)
    with torch.no_grad():
        model.norm.weight[0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        generate(model, torch.tensor([[1]]), 2, temperature=0)


def test_a_prompt_longer_than_the_context_is_kept_whole():
    prompt = torch.arange(10)[None]
    out = generate(Causal(context_length=6), prompt, 2, temperature=0)
    assert out.shape == (1, 12) and torch.equal(out[:, :10], prompt)


def test_modes_are_restored_also_after_an_error():
    model = Causal().train()
    model.emb.eval()     # a frozen part
    generate(model, torch.tensor([[1]]), 2)
    assert model.training and model.drop.training and not model.emb.training
    with pytest.raises(IndexError):
        generate(model, torch.tensor([[999]]), 2)
    assert model.training and not model.emb.training
    assert torch.is_grad_enabled()


def test_output_carries_no_gradient_and_zero_tokens_is_the_prompt():
    prompt = torch.tensor([[1, 2]])
    assert torch.equal(generate(Causal(), prompt, 0), prompt)
    assert not generate(Causal(), prompt, 1).requires_grad


def test_rows_stop_on_their_own():
    class Countdown(nn.Module):
        cfg = SimpleNamespace(context_length=4)

        def forward(self, tokens):   # next id is the last one minus 1
            x = torch.full((*tokens.shape, 9), -50.0)
            return x.scatter(-1, (tokens - 1).clamp(min=0)[..., None], 50.0)

    prompt = torch.tensor([[0, 3], [0, 1], [0, 5]])
    out = generate(Countdown(), prompt, 10, stop_token=0)
    assert out.tolist() == [[0, 3, 2, 1, 0, 0, 0], [0, 1, 0, 0, 0, 0, 0],
                            [0, 5, 4, 3, 2, 1, 0]]
    assert generate(Countdown(), prompt, 2, stop_token=0).shape == (3, 4)


def test_the_penalty_spares_the_stop_token():
    class Flat(nn.Module):
        cfg = SimpleNamespace(context_length=4)

        def forward(self, tokens):
            return torch.tensor([2.0, 1.9, 0.0]).expand(*tokens.shape, 3)

    prompt = torch.tensor([[0, 1]])
    pick = dict(temperature=0, repetition_penalty=2.0)
    assert int(next_tokens(Flat(), prompt, stop_token=0, **pick)) == 0
    assert int(next_tokens(Flat(), torch.tensor([[0]]), **pick)) == 1


@pytest.mark.parametrize("tokens", [torch.zeros(1, 0, dtype=torch.long),
                                    torch.tensor([1, 2])])
def test_empty_or_flat_prompts_raise(tokens):
    with pytest.raises(ValueError, match="T >= 1"):
        generate(Causal(), tokens, 3)
    with pytest.raises(ValueError, match="max_new_tokens"):
        generate(Causal(), torch.tensor([[1]]), -1)


# ---- streaming

TEXTS = [
    "plain",
    "na\u00efve caf\u00e9",
    "日本語のテキスト",
    "\U0001f469\u200d\U0001f680\U0001f1e8\U0001f1ed\U0001f44d\U0001f3fd",
    # above: a joined emoji, a flag, a skin tone; below: a combining accent
    "a\u0301 e\U0001f600z",
    "\ud7ff\ue000\uffff\U00010000\U0010ffff",
]


@pytest.mark.parametrize("text", TEXTS)
def test_no_split_breaks_a_character(text):
    data = text.encode("utf-8")
    for i in range(len(data) + 1):
        for j in range(i, len(data) + 1):
            pieces = list(decode_pieces([data[:i], data[i:j], data[j:]]))
            assert "".join(pieces) == text
            assert all(pieces) and "\ufffd" not in "".join(pieces)
    assert list(decode_pieces(bytes([b]) for b in data)) == list(text)


@settings(max_examples=300)
@given(st.binary(max_size=30), st.lists(st.integers(0, 30), max_size=6))
def test_stream_equals_decoding_at_once_on_any_bytes(data, cuts):
    cuts = [0, *sorted(min(c, len(data)) for c in cuts), len(data)]
    pieces = [data[a:b] for a, b in zip(cuts, cuts[1:])]
    assert "".join(decode_pieces(pieces)) == data.decode("utf-8", "replace")


def test_characters_come_as_soon_as_they_are_complete():
    fed = []

    def source():
        for byte in "é日!".encode():
            fed.append(byte)
            yield bytes([byte])

    sizes = [(piece, len(fed)) for piece in decode_pieces(source())]
    assert sizes == [("é", 2), ("日", 5), ("!", 6)]


def test_stream_text_yields_whole_characters_and_stops():
    script = [*"日🙂".encode(), END, *b"never"]
    assert list(stream_text(Script(script), Bytes(), "")) == ["日", "🙂"]


def test_stream_text_cut_inside_a_character_says_so():
    pieces = list(stream_text(Script(list("日🙂".encode())), Bytes(), "", 5))
    assert pieces == ["日", "\ufffd"]


def test_stream_equals_generate():
    model, tok = Causal(257, 32), Bytes()
    settings = dict(top_k=80, repetition_penalty=1.2)
    text = "".join(stream_text(
        model, tok, "ab", 40, **settings,
        generator=torch.Generator().manual_seed(2)))
    out = generate(model, torch.tensor([[END, *b"ab"]]), 40, stop_token=END,
                   generator=torch.Generator().manual_seed(2), **settings)
    assert text == tok.decode_bytes(out[0, 3:].tolist()).decode(
        "utf-8", "replace")


def test_stream_text_without_end_of_text_needs_a_prompt():
    tok = Bytes()
    tok.end_of_text = None
    with pytest.raises(ValueError, match="give a prompt"):
        stream_text(Script([65] * 9), tok, "")
    assert list(stream_text(Script([65] * 9), tok, "x", 3)) == ["A"] * 3


def test_dropping_the_stream_leaves_the_model_in_its_mode():
    model = Causal(257, 32).train()
    stream = stream_text(model, Bytes(), "ab", 40)
    next(stream)
    assert model.training
    del stream
    assert model.training
