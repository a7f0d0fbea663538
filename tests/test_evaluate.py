"""Evaluation: each score against a naive or exact version of itself."""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stand_ins import END, Bytes
from torch import nn

from minillm.evaluate import (
    Choice,
    bits_per_byte,
    bootstrap_interval,
    evaluating,
    multiple_choice,
    perplexity,
    plan_windows,
    score_documents,
    score_streams,
    score_tokens,
    token_nats,
    unigram_bits_per_byte,
)


class Pairs(Bytes):
    """Two bytes per token where possible: another cut of the same text."""

    vocab_size, end_of_text = 65_536 + 257, END

    def encode(self, text):
        data = text.encode("utf-8")
        return [257 + 256 * data[i] + data[i + 1] if i + 1 < len(data)
                else data[i] for i in range(0, len(data), 2)]


class Causal(nn.Module):
    """A small causal stand-in with positions and dropout."""

    def __init__(self, vocab_size=257, context_length=8, d=8):
        super().__init__()
        torch.manual_seed(0)
        self.cfg = SimpleNamespace(context_length=context_length)
        self.emb, self.pos = nn.Embedding(vocab_size, d), nn.Embedding(64, d)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(d, vocab_size)

    def forward(self, tokens):
        assert tokens.shape[1] <= self.cfg.context_length
        t = torch.arange(tokens.shape[1])
        w = 0.9 ** (t[:, None] - t).clamp(min=0) * (t[:, None] >= t)
        x = w @ self.emb(tokens) + self.pos(t)
        return 2 * self.head(self.drop(x))


class Uniform(nn.Module):
    """Every id equally likely."""

    def __init__(self, vocab_size=257, context_length=16):
        super().__init__()
        self.cfg = SimpleNamespace(context_length=context_length)
        self.vocab_size = vocab_size

    def forward(self, tokens):
        return torch.zeros(*tokens.shape, self.vocab_size)


def naive_nats(model, ids, context_of):
    """One forward pass per target, with exactly the context asked for."""
    out = []
    for t in range(1, len(ids)):
        with evaluating(model):
            row = torch.tensor([ids[context_of(t):t]])
            logits = model(row)[0, -1].double()
        out.append(-float(logits.log_softmax(-1)[ids[t]]))
    return np.array(out)


def random_ids(n, seed=0):
    return np.random.default_rng(seed).integers(0, 257, n).tolist()


@given(st.integers(0, 60), st.integers(1, 12), st.data())
def test_windows_score_each_target_exactly_once(n_ids, context, data):
    stride = data.draw(st.integers(1, context))
    windows = plan_windows(n_ids, context, stride)
    scored = [t for w in windows for t in range(w.first_scored, w.stop + 1)]
    assert scored == list(range(1, n_ids))
    for w in windows:
        assert 0 <= w.start < w.stop <= n_ids - 1
        assert w.stop - w.start == min(context, n_ids - 1)
        seen = w.first_scored - w.start      # context of the first scored
        assert w is windows[0] or seen >= context - stride + 1


@pytest.mark.parametrize("stride", [0, -1, 9])
def test_bad_strides_raise(stride):
    with pytest.raises(ValueError, match=r"1 \.\.\. 8"):
        score_tokens(Causal(), random_ids(20), stride=stride)


@pytest.mark.parametrize("n", [2, 3, 8, 9, 10, 17, 40])
def test_stride_one_equals_one_token_at_a_time(n):
    model, ids = Causal(), random_ids(n)
    want = naive_nats(model, ids, lambda t: max(0, t - 8))
    np.testing.assert_allclose(
        score_tokens(model, ids, stride=1), want, atol=1e-5)


@pytest.mark.parametrize("stride", [1, 3, 5, 8])
@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_any_stride_equals_naive_with_its_own_windows(stride, batch_size):
    model, ids = Causal(), random_ids(30)
    start = {t: w.start for w in plan_windows(30, 8, stride)
             for t in range(w.first_scored, w.stop + 1)}
    want = naive_nats(model, ids, start.get)
    got = score_tokens(model, ids, stride=stride, batch_size=batch_size)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_shorter_context_than_the_models():
    model, ids = Causal(), random_ids(30)
    want = naive_nats(model, ids, lambda t: max(0, t - 5))
    got = score_tokens(model, ids, stride=1, context_length=5)
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert math.isclose(math.exp(want.mean()), perplexity(
        model, ids, stride=1, context_length=5), rel_tol=1e-5)
    for bad in (0, 9):
        with pytest.raises(ValueError, match=r"1 \.\.\. 8"):
            score_tokens(model, ids, context_length=bad)


def test_short_streams():
    assert len(score_tokens(Causal(), [5])) == 0
    assert len(score_tokens(Causal(), [])) == 0
    with pytest.raises(ValueError, match="two or more"):
        perplexity(Causal(), [5])


def test_streams_equal_each_alone_and_ignore_padding():
    model = Causal()
    streams = [random_ids(n, n) for n in (2, 9, 5, 30, 1, 0, 9, 17)]
    for batch_size in (1, 3, 8):
        got = score_streams(model, streams, batch_size=batch_size, stride=4)
        assert [len(g) for g in got] == [1, 8, 4, 29, 0, 0, 8, 16]
        for nats, ids in zip(got, streams):
            np.testing.assert_allclose(
                nats, score_tokens(model, ids, stride=4), atol=1e-5)


def test_nats_survive_extreme_logits():
    class Sharp(Uniform):
        def forward(self, tokens):
            return super().forward(tokens).index_fill(
                -1, torch.tensor([3]), 1e4)

    nats = token_nats(Sharp(), torch.tensor([[1, 1]]), torch.tensor([[3, 4]]))
    assert nats.tolist() == [[0.0, 1e4]]


def test_scoring_restores_modes_and_needs_no_grad():
    model = Causal().train()
    model.emb.eval()
    a, b = (score_tokens(model, random_ids(20)) for _ in range(2))
    assert np.array_equal(a, b)      # dropout was off
    assert model.training and model.drop.training and not model.emb.training
    with pytest.raises(RuntimeError):
        with evaluating(model):
            raise RuntimeError
    assert model.training and torch.is_grad_enabled()


def test_uniform_model_has_known_scores():
    docs = ["abc", "größe 日本", "🙂" * 30]      # the last one needs windows
    s = score_documents(Uniform(), Bytes(), docs)
    sizes = [len(d.encode()) for d in docs]
    assert s.n_bytes.tolist() == sizes
    assert s.n_tokens.tolist() == [n + 1 for n in sizes]    # END scored
    assert math.isclose(s.perplexity, 257, rel_tol=1e-6)
    want = math.log2(257) * (sum(sizes) + 3) / sum(sizes)
    assert math.isclose(s.bits_per_byte, want, rel_tol=1e-6)
    ids = random_ids(50)
    assert math.isclose(perplexity(Uniform(), ids), 257, rel_tol=1e-6)


def test_bytes_are_those_of_the_text_whatever_the_tokenizer():
    docs = ["naïve", "日本語", "odd"]
    a = score_documents(Uniform(), Bytes(), docs)
    b = score_documents(Uniform(65_793), Pairs(), docs)
    assert a.n_bytes.tolist() == b.n_bytes.tolist() == [6, 9, 3]
    assert b.n_tokens.sum() < a.n_tokens.sum()
    assert b.perplexity > 200 * a.perplexity     # not comparable
    assert b.bits_per_byte < 1.3 * a.bits_per_byte    # comparable


def test_first_token_is_predicted_from_end_of_text():
    model = Causal()
    s = score_documents(model, Bytes(), ["ab"])
    np.testing.assert_allclose(
        s.token_nats[0],
        naive_nats(model, [END, 97, 98, END], lambda t: 0), atol=1e-5)


@pytest.mark.parametrize("docs", [[], ["a", ""]])
def test_no_or_empty_documents_raise(docs):
    with pytest.raises(ValueError, match="empty"):
        score_documents(Uniform(), Bytes(), docs)


def test_tokenizer_without_end_raises():
    tok = Bytes()
    tok.end_of_text = None
    with pytest.raises(ValueError, match="END_OF_TEXT"):
        score_documents(Uniform(), tok, ["a"])


def test_conversions():
    assert bits_per_byte(math.log(2), 1) == 1.0
    assert math.isclose(bits_per_byte(10 * math.log(256), 10), 8)
    with pytest.raises(ValueError, match="at least one byte"):
        bits_per_byte(1.0, 0)


# ---- intervals

def test_bootstrap_covers_what_it_claims():
    rng, hits, trials = np.random.default_rng(0), 0, 300
    for i in range(trials):
        sizes = rng.integers(300, 900, 80).astype(float)
        values = 1.5 * sizes + rng.normal(0, 40, 80)
        e = bootstrap_interval(values, sizes, n_resamples=400, seed=i)
        assert e.low <= e.value <= e.high
        hits += e.low <= 1.5 <= e.high
    assert 0.90 < hits / trials < 0.985   # 95 %, 3.5 standard errors


def test_bootstrap_is_of_the_ratio_of_sums():
    e = bootstrap_interval([1, 100], [1, 50])
    assert e.value == 101 / 51
    assert bootstrap_interval([1.0, 3.0]).value == 2
    same = bootstrap_interval([2, 4, 6], [1, 2, 3])
    assert same.low == same.high == 2      # a constant ratio has no spread
    assert str(same) == "2.000 [2.000, 2.000]"


def test_bootstrap_repeats_with_its_seed():
    v = np.arange(20.0)
    assert bootstrap_interval(v, seed=1) == bootstrap_interval(v, seed=1)
    wide = bootstrap_interval(v, confidence=0.99)
    narrow = bootstrap_interval(v, confidence=0.5)
    assert wide.low < narrow.low < narrow.high < wide.high


@pytest.mark.parametrize("values, weights, confidence", [
    ([1.0], None, 0.95), ([1.0, 2.0], [1.0], 0.95), ([1.0, 2.0], None, 1.0),
    ([1.0, 2.0], None, 95)])
def test_bad_bootstrap_input_raises(values, weights, confidence):
    with pytest.raises(ValueError):
        bootstrap_interval(values, weights, confidence=confidence)


# ---- yardsticks

def test_yardsticks_of_the_ngram_chapter_are_here_too():
    import minillm.evaluate
    import minillm.ngram

    for name in ("bits_per_byte", "gzip_bits_per_byte",
                 "unigram_bits_per_byte"):
        assert name in minillm.evaluate.__all__
        assert (getattr(minillm.evaluate, name)
                is getattr(minillm.ngram, name))


def test_unigram_takes_any_tokenizer():
    got = unigram_bits_per_byte(["aab"], ["ab"])
    assert math.isclose(got, unigram_bits_per_byte(["aab"], ["ab"], Bytes()))
    assert math.isfinite(unigram_bits_per_byte(["a"], ["zebra"]))


def test_unigram_approaches_the_entropy():
    rng = np.random.default_rng(0)
    docs = ["".join(rng.choice(list("abcd"), 4000, p=[.5, .25, .125, .125]))
            for _ in range(20)]
    got = unigram_bits_per_byte(docs[:10], docs[10:])
    assert 1.75 < got < 1.80      # 1.75 bits and a little for ends


# ---- multiple choice

class Likes(Uniform):
    """The id of 'b' is e^2 times as likely as any other."""

    def forward(self, tokens):
        return super().forward(tokens).index_fill(
            -1, torch.tensor([ord("b")]), 2.0)


def test_multiple_choice_by_sum_and_per_byte():
    items = [Choice("x ", ("bb.", "aa."), 0), Choice("x ", ("bb.", "aa."), 1),
             Choice("x ", ("a.", "bbbb."), 0)]
    r = multiple_choice(Likes(), Bytes(), items)
    assert r.credit.tolist() == [1, 0, 1]
    assert r.accuracy.value == pytest.approx(2 / 3)
    assert r.accuracy_per_byte.value == pytest.approx(1 / 3)
    assert r.chance == 0.5 and r.n_items == 3
    z = math.log(256 + math.exp(2))
    np.testing.assert_allclose(r.nats[0], [2 * (z - 2) + z, 3 * z], rtol=1e-5)


def test_shared_tokens_cancel():
    # " the " is shared by both options and not scored
    a = multiple_choice(Likes(), Bytes(), [
        Choice("x", (" the b.", " the a."), 0), Choice("x", ("b.", "a."), 0)])
    np.testing.assert_allclose(a.nats[0], a.nats[1], rtol=1e-6)


def test_ties_share_the_credit():
    items = [Choice("", ("a.", "c.", "d."), i) for i in range(3)]
    r = multiple_choice(Uniform(), Bytes(), items)
    assert r.accuracy.value == pytest.approx(1 / 3) == r.chance


def test_tokenization_across_the_seam():
    # with pairs of bytes, context + option is cut elsewhere than option
    r = multiple_choice(Uniform(65_793), Pairs(),
                        [Choice("abc", ("de.", "fg."), 0),
                         Choice("ab", ("de.", "fg."), 0)])
    n = math.log(65_793)
    np.testing.assert_allclose(r.nats[0], [2 * n, 2 * n], rtol=1e-5)


def test_no_items_raise():
    with pytest.raises(ValueError, match="no items"):
        multiple_choice(Uniform(), Bytes(), [])


def test_groups_widen_the_interval():
    def items(grouped):
        return [Choice("", ("b.", "a."), i // 10 % 2,
                       group=i // 10 if grouped else None)
                for i in range(200)]

    def width(result):
        return result.accuracy.high - result.accuracy.low

    one = multiple_choice(Likes(), Bytes(), items(False))
    many = multiple_choice(Likes(), Bytes(), items(True))
    assert one.accuracy.value == many.accuracy.value == 0.5
    assert width(many) > 2 * width(one)


@pytest.mark.parametrize("options", [("a.",), ("a.", "a."), ("a", "ab")])
def test_options_that_cannot_be_told_apart_raise(options):
    with pytest.raises(ValueError, match="told apart"):
        multiple_choice(Uniform(), Bytes(), [Choice("x ", options, 0)])
