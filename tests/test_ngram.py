"""N-grams: the vectorised model against the formula in dictionaries."""
import bz2
import gzip
import json
import lzma
import math
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stand_ins import END, Bytes

from minillm.ngram import (
    SMOOTHINGS,
    NGram,
    arithmetic_decode,
    arithmetic_encode,
    baseline,
    baseline_ladder,
    bits_per_byte,
    bits_to_nats,
    count_ngrams,
    cross_entropy,
    document_bits,
    entropy,
    estimate_discounts,
    fit_ngram,
    gzip_bits_per_byte,
    kl_divergence,
    last_bytes,
    nats_to_bits,
    perplexity_from_nats,
    seen_share,
    text_bytes,
    text_ladder,
    token_stream,
    unigram_bits_per_byte,
)
from minillm.tales import corpus, entropy_floor, tales
from minillm.tokenizer import CharTokenizer, train_bpe

# ---- the formula, word for word, in dictionaries (Chen and Goodman 1998)


def split(ids, end):
    """Cut a stream behind every end."""
    docs, doc = [], []
    for i in ids:
        doc.append(i)
        if i == end:
            docs.append(doc)
            doc = []
    return docs + ([doc] if doc else [])


class Slow:
    """Interpolated n-grams, one n-gram at a time."""

    def __init__(self, ids, order, vocab_size, end, smoothing):
        self.order, self.vocab_size = order, vocab_size
        self.end, self.smoothing = end, smoothing
        raw = Counter()
        for doc in split(ids, end):
            row = [end] * (order - 1) + doc
            for t in range(order - 1, len(row)):
                for k in range(1, order + 1):
                    raw[tuple(row[t - k + 1:t + 1])] += 1
        self.counts = dict(raw)
        if smoothing.endswith("kneser-ney"):
            left = defaultdict(set)
            for gram in raw:
                if len(gram) > 1:
                    left[gram[1:]].add(gram[0])
            for gram in raw:
                if len(gram) < order:
                    self.counts[gram] = len(left[gram])
        self.discount = {}
        for k in range(1, order + 1):
            n = Counter(c for g, c in self.counts.items() if len(g) == k)
            d = n[1] / (n[1] + 2 * n[2]) if n[1] else 0.5
            three = [d, d, d]
            if smoothing.startswith("modified") and all(
                    n[r] for r in (1, 2, 3, 4)):
                y = [1 - 2 * d * n[2] / n[1], 2 - 3 * d * n[3] / n[2],
                     3 - 4 * d * n[4] / n[3]]
                three = y if min(y) > 0 else three
            self.discount[k] = three
        self.following = defaultdict(dict)
        for gram, c in self.counts.items():
            self.following[gram[:-1]][gram[-1]] = c

    def prob(self, h, w):
        """Return p(w | h) by the recursion."""
        below = self.prob(h[1:], w) if h else 1 / self.vocab_size
        found = self.following.get(h, {})
        total, top = sum(found.values()), len(h) == self.order - 1
        c = found.get(w, 0)
        if self.smoothing == "none":
            return (c / total if total else 0.0) if top else 0.0
        if self.smoothing == "add-constant":
            return ((c + 1) / (total + self.vocab_size) if top
                    else 1 / self.vocab_size)
        if not total:
            return below
        if self.smoothing == "linear":
            return 0.7 * c / total + 0.3 * below
        d = self.discount[len(h) + 1]
        d_of = lambda c: d[min(c, 3) - 1] if c else 0.0
        mass = sum(map(d_of, found.values())) / total
        return (c - d_of(c)) / total + mass * below

    def log2_probs(self, ids):
        """Score a stream token by token."""
        out = []
        for doc in split(ids, self.end):
            row = [self.end] * (self.order - 1) + doc
            for t in range(self.order - 1, len(row)):
                p = self.prob(tuple(row[t - self.order + 1:t]), row[t])
                out.append(math.log2(p) if p else -math.inf)
        return np.array(out)


streams = st.lists(st.integers(0, 3), min_size=1, max_size=60)


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
@given(train=streams, test=streams, order=st.integers(1, 5),
       extra=st.integers(0, 3))
def test_equal_to_the_formula(smoothing, train, test, order, extra):
    vocab_size = 4 + extra                     # ids that never occur
    fast = NGram(order, vocab_size, end_of_text=3, smoothing=smoothing)
    slow = Slow(train, order, vocab_size, 3, smoothing)
    fast.fit(train)
    test = [*test, vocab_size - 1]
    np.testing.assert_allclose(
        fast.log2_probs(test), slow.log2_probs(test), rtol=1e-9)


@pytest.mark.parametrize("smoothing", SMOOTHINGS[1:])
@given(train=streams, context=st.lists(st.integers(0, 4), max_size=6),
       order=st.integers(1, 5))
def test_sums_to_one_after_any_context(smoothing, train, context, order):
    model = NGram(order, 5, end_of_text=3, smoothing=smoothing).fit(train)
    p = model.next_probs(context)
    assert p.shape == (5,) and p.min() > 0
    assert math.isclose(p.sum(), 1, abs_tol=1e-12)
    # and it is what log2_probs charges
    at = max((t + 1 for t, i in enumerate(context) if i == 3), default=0)
    for i in range(5):
        scored = model.log2_probs([*context[at:], i])[-1]
        assert math.isclose(2**scored, p[i], rel_tol=1e-9)


@given(train=streams, order=st.integers(1, 5), low=st.integers(1, 5))
def test_a_shorter_model_equals_one_fitted_short(train, order, low):
    low = min(low, order)
    for smoothing in SMOOTHINGS:
        a = NGram(order, 4, end_of_text=3, smoothing=smoothing).fit(train)
        b = NGram(low, 4, end_of_text=3, smoothing=smoothing).fit(train)
        np.testing.assert_allclose(a.shorter(low).log2_probs(train),
                                   b.log2_probs(train), rtol=1e-12)


def test_larger_vocabulary_does_not_overflow_or_alias():
    rng = np.random.default_rng(0)
    train, test = rng.integers(50_000, 50_257, (2, 2000)).tolist()
    model = NGram(5, 50_257, end_of_text=50_256, smoothing="kneser-ney")
    slow = Slow(train, 5, 50_257, 50_256, "kneser-ney")
    np.testing.assert_allclose(model.fit(train).log2_probs(test),
                               slow.log2_probs(test), rtol=1e-9)


def test_three_discounts_where_the_counts_allow_them():
    rng = np.random.default_rng(0)
    train, test = np.minimum(rng.zipf(1.4, (2, 1500)), 40).tolist()
    fast = NGram(3, 41, end_of_text=40, smoothing="modified-kneser-ney")
    slow = Slow(train, 3, 41, 40, "modified-kneser-ney")
    assert all(len(set(d)) == 3 for d in slow.discount.values())
    np.testing.assert_allclose(fast.fit(train).log2_probs(test),
                               slow.log2_probs(test), rtol=1e-9)


def test_counts_by_hand():
    # two documents, "a b" and "a c" (a 0, b 1, c 2, end 3)
    one, two = count_ngrams([0, 1, 3, 0, 2, 3], 2, vocab_size=4,
                            end_of_text=3)
    assert one.codes.tolist() == [0, 1, 2, 3]
    assert one.counts.tolist() == [2, 1, 1, 2]
    assert one.left_kinds.tolist() == [1, 1, 1, 2]   # the end follows b, c
    seen = {(c // 4, c % 4): n for c, n in zip(two.codes, two.counts) if n}
    assert seen == {(3, 0): 2, (0, 1): 1, (0, 2): 1, (1, 3): 1, (2, 3): 1}


def test_kneser_ney_by_hand():
    # bigram counts 2, 1, 1, 1, 1: n1 = 4, n2 = 1, D = 4/6
    # continuation counts 1, 1, 1, 2: n1 = 3, n2 = 1, D = 3/5; 5 in all
    model = NGram(2, 4, end_of_text=3).fit([0, 1, 3, 0, 2, 3])
    uni_b = (1 - 3 / 5) / 5 + 4 * (3 / 5) / 5 * 1 / 4
    p_b = (1 - 2 / 3) / 2 + 2 * (2 / 3) / 2 * uni_b
    assert math.isclose(model.next_probs([0])[1], p_b)


def test_unseen_context_backs_off_to_the_shorter_one():
    model = NGram(3, 5, end_of_text=4).fit([0, 1, 2, 4, 2, 1, 0, 4])
    np.testing.assert_allclose(model.next_probs([3, 1]),
                               model.next_probs([0, 3, 1]))
    two = model.next_probs([3, 3])             # nothing known: unigram level
    np.testing.assert_allclose(two, model.next_probs([0, 3]))
    assert two[3] > 0


def test_no_context_crosses_documents():
    model = NGram(5, 5, end_of_text=4).fit([0, 1, 2, 4, 2, 1, 0, 4])
    doc = [1, 2, 0, 4]
    alone = model.log2_probs(doc)
    after = model.log2_probs([2, 2, 0, 1, 4, *doc])[-4:]
    np.testing.assert_array_equal(alone, after)
    np.testing.assert_array_equal(model.next_probs([0, 4]),
                                  model.next_probs([]))


def test_discounts():
    counts = np.repeat([1, 2, 3, 4, 9], [10, 5, 3, 2, 7])
    np.testing.assert_allclose(estimate_discounts(counts), [0, .5, .5, .5])
    np.testing.assert_allclose(
        estimate_discounts(counts, modified=True),
        [0, 1 - 2 * .5 * 5 / 10, 2 - 3 * .5 * 3 / 5, 3 - 4 * .5 * 2 / 3])
    same = estimate_discounts(np.array([1, 1, 2]), modified=True)
    assert same[1] == same[3] == 0.5           # too few for three
    assert estimate_discounts(np.array([7, 0]))[1] == 0.5
    assert estimate_discounts(np.array([1, 1]))[1] == 1.0


def test_edge_streams():
    model = NGram(3, 4, end_of_text=3).fit([3, 3])      # empty documents
    assert model.log2_probs([]).shape == (0,)
    assert math.isclose(model.next_probs([]).sum(), 1)
    assert NGram(3, 1, end_of_text=0).fit([0]).log2_probs([0]) == 0
    assert model.fit(np.array([0, 3], dtype=np.uint16)).order == 3


@pytest.mark.parametrize("call, match", [
    (lambda: NGram(0, 4, end_of_text=3), "order is 0"),
    (lambda: NGram(2, 4, end_of_text=4), "end_of_text is 4"),
    (lambda: NGram(2, 4, end_of_text=3, smoothing="laplace"), "add-constant"),
    (lambda: NGram(2, 4, end_of_text=3, constant=0), "constant"),
    (lambda: NGram(2, 4, end_of_text=3, weight=1), "weight"),
    (lambda: NGram(2, 4, end_of_text=3).fit([]), "at least one"),
    (lambda: NGram(2, 4, end_of_text=3).fit([4]), "0 ... 3"),
    (lambda: NGram(2, 4, end_of_text=3).fit([-1]), "0 ... 3"),
    (lambda: NGram(2, 4, end_of_text=3).fit([0.5]), "integers"),
    (lambda: NGram(2, 4, end_of_text=3).fit([[0]]), "flat"),
    (lambda: NGram(2, 4, end_of_text=3).log2_probs([0]), "fit"),
    (lambda: NGram(2, 4, end_of_text=3).next_probs([0]), "fit"),
    (lambda: NGram(2, 4, end_of_text=3).fit([0]).next_probs([7]), "0 ... 3"),
    (lambda: NGram(2, 4, end_of_text=3).fit([0]).shorter(3), "1 ... 2"),
    (lambda: token_stream("text"), "list of strings"),
    (lambda: seen_share([0], [0], 0), "n is 0"),
    (lambda: perplexity_from_nats(1.0, 0), "n_tokens"),
    (lambda: bits_per_byte(1.0, 0), "n_bytes"),
    (lambda: cross_entropy([0.5, 0.5], [1.0]), "same outcomes"),
    (lambda: entropy([0.5, 0.6]), "sum to one"),
    (lambda: gzip_bits_per_byte([""]), "at least one byte"),
    (lambda: gzip_bits_per_byte(["a"], method="zip"), "xz"),
    (lambda: baseline_ladder(["a"], []), "0 documents"),
    (lambda: baseline_ladder(["a"], ["a", ""]), "1 of them"),
])
def test_bad_input_raises(call, match):
    with pytest.raises(ValueError, match=match) as error:
        call()
    assert "\n" not in str(error.value)


def test_tokenizer_without_an_end_raises():
    class NoEnd(Bytes):
        end_of_text = None

    with pytest.raises(ValueError, match="END_OF_TEXT"):
        fit_ngram(["a"], tokenizer=NoEnd())


# ---- units

def test_conversions():
    assert math.isclose(nats_to_bits(math.log(8)), 3)
    assert math.isclose(bits_to_nats(nats_to_bits(1.7)), 1.7)
    assert math.isclose(perplexity_from_nats(6 * math.log(5), 6), 5)
    assert math.isclose(bits_per_byte(10 * math.log(256), 10), 8)
    np.testing.assert_allclose(nats_to_bits(np.log([2, 4])), [1, 2])


@given(st.lists(st.floats(0.01, 1), min_size=2, max_size=6),
       st.lists(st.floats(0.01, 1), min_size=6, max_size=6))
def test_cross_entropy_is_least_for_the_truth(a, b):
    p, q = np.array(a) / sum(a), np.array(b[:len(a)]) / sum(b[:len(a)])
    assert 0 <= entropy(p) <= math.log2(len(p)) + 1e-9
    assert cross_entropy(p, q) >= entropy(p) - 1e-12
    want = float((p * np.log2(p / q)).sum())
    assert math.isclose(kl_divergence(p, q), want, abs_tol=1e-9)


def test_impossible_outcomes():
    assert entropy([1.0, 0.0]) == 0
    assert cross_entropy([0.5, 0.5], [1.0, 0.0]) == math.inf
    assert cross_entropy([1.0, 0.0], [0.5, 0.5]) == 1


class Lossy(Bytes):
    """Decodes every token on its own: half characters become U+FFFD."""

    def encode(self, text):
        return [b if b < 128 else 200 for b in text.encode("utf-8")]

    def decode(self, ids):
        return "".join(bytes([i]).decode("utf-8", "replace") for i in ids)


def test_bytes_are_those_of_the_text_whatever_the_tokenizer():
    docs, tokenizer = ["naïve 🪁", "日本語"], Lossy()
    decoded = [tokenizer.decode(tokenizer.encode(doc)) for doc in docs]
    assert "\ufffd" in decoded[0]
    assert text_bytes(docs).tolist() == [11, 9] != [
        len(doc.encode("utf-8")) for doc in decoded]
    rows = {r.name: r for r in baseline_ladder(docs, docs, tokenizer)}
    for row in rows.values():
        if row.bits is not None:
            assert math.isclose(row.bits_per_byte, row.bits.sum() / 20)
    bits = document_bits(fit_ngram(docs, order=1, tokenizer=tokenizer),
                         docs, tokenizer)
    assert rows["unigram, tokens"].bits_per_byte == bits.sum() / 20


# ---- texts

def test_token_streams():
    assert token_stream(["ab", "", "é"]).tolist() == [
        97, 98, END, END, 195, 169, END]
    assert token_stream([]).shape == (0,)
    assert token_stream(iter(["a"]), Bytes()).tolist() == [97, END]
    bpe = train_bpe(["the owl", "the key"], 262)
    got = token_stream(["the", "owl"], bpe)
    assert got.tolist() == [*bpe.encode("the"), bpe.end_of_text,
                            *bpe.encode("owl"), bpe.end_of_text]


def test_bits_per_document_add_up_per_byte_character_and_token():
    train, test = corpus(60_000), [t.text for t in tales(5, split="test")]
    char = CharTokenizer.train(train + test)
    for tokenizer in (None, char, train_bpe(train, 400)):
        model = fit_ngram(train, order=3, tokenizer=tokenizer)
        bits = document_bits(model, test, tokenizer)
        alone = [document_bits(model, [d], tokenizer)[0] for d in test]
        np.testing.assert_allclose(bits, alone)
        assert 0.5 < bits.sum() / text_bytes(test).sum() < 4


def test_unigram_is_the_add_one_model():
    # counts + 1: a 3, b 2, end 2, the other 254 bytes 1 each: 261 in all
    got = unigram_bits_per_byte(["aab"], ["ab"])
    want = -sum(math.log2(c / 261) for c in (3, 2, 2)) / 2
    assert math.isclose(got, want)


def test_seen_share():
    assert seen_share([1, 2, 3], [2, 3, 1, 2], 2) == 1
    assert seen_share([1, 2, 3], [3, 2, 1], 2) == 0
    assert math.isnan(seen_share([1], [1, 2], 2))
    # (1, 9) ends a document; (9, 2) would span two and does not count
    assert seen_share([1, 9, 2], [1, 9, 2], 2, end_of_text=9) == 1
    assert seen_share([9, 2], [9, 2], 2, end_of_text=9) != 1
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 4, (2, 300)).tolist()
    for n in (1, 3, 5):
        known = {tuple(b[i:i + n]) for i in range(301 - n)}
        found = [tuple(a[i:i + n]) in known for i in range(301 - n)]
        assert math.isclose(seen_share(a, b, n), np.mean(found))


def test_generation_is_reproducible_and_stops():
    model = fit_ngram(["the owl hid the key."] * 9, order=4)
    ids = model.generate(200, seed=3)
    assert ids == model.generate(200, seed=3) != model.generate(200, seed=4)
    assert END not in ids and len(ids) < 200
    assert len(model.generate(5, prompt=list(b"the"))) <= 5
    lost = NGram(3, 257, end_of_text=END, smoothing="none")
    assert lost.fit([97, END]).generate(5, prompt=[98, 98]) == []


def test_generation_follows_the_probabilities():
    model = NGram(2, 3, end_of_text=2).fit([0, 1, 2, 0, 0, 1, 2, 1, 2])
    first = [(model.generate(1, seed=s) or [2])[0] for s in range(3000)]
    share = np.bincount(first, minlength=3) / 3000
    np.testing.assert_allclose(share, model.next_probs([]), atol=0.03)


# ---- yardsticks

@pytest.mark.parametrize("method, module", [
    ("gzip", gzip), ("bz2", bz2), ("xz", lzma)])
def test_compressors(method, module):
    docs = ["日本" * 50, "abc" * 40]
    data = b"".join(d.encode() + b"\0" for d in docs)
    extra = {"preset": 9} if method == "xz" else {"compresslevel": 9}
    want = 8 * len(module.compress(data, **extra)) / 420
    assert math.isclose(gzip_bits_per_byte(docs, method=method), want)
    rng = np.random.default_rng(0)
    noise = ["".join(map(chr, rng.integers(97, 123, 500))) for _ in range(9)]
    cold = gzip_bits_per_byte(noise, method=method)
    warm = gzip_bits_per_byte(noise, method=method, prefix=noise)
    assert warm < (0.9 if method == "bz2" else 0.3) * cold


def test_last_bytes():
    docs = ["aa", "bb", "cc"]
    assert last_bytes(docs, 4) == ["bb", "cc"]
    assert last_bytes(docs, 1) == ["cc"] and last_bytes([], 5) == []


def test_interval_covers_the_truth():
    pool = list(tales(3000, split="validation", start=90_000))
    bits = np.array([-t.log2_prob for t in pool])
    sizes = text_bytes(t.text for t in pool)
    truth = bits.sum() / sizes.sum()
    rows = [baseline("", bits[i:i + 30], sizes[i:i + 30])
            for i in range(0, 3000, 30)]
    hits = np.mean([r.low <= truth <= r.high for r in rows])
    assert 0.85 < hits < 1
    assert baseline("", bits[:1], sizes[:1]).low is None


def test_interval_agrees_with_the_entropy_floor():
    some = list(tales(50, split="test"))
    row = baseline("source", [-t.log2_prob for t in some],
                   text_bytes(t.text for t in some))
    floor = entropy_floor(50)
    assert math.isclose(row.low, floor.low, rel_tol=1e-3)
    assert math.isclose(row.high, floor.high, rel_tol=1e-3)


def test_ladder_on_tales():
    train, test = corpus(300_000), list(tales(40, split="test"))
    docs = [t.text for t in test]
    bpe = train_bpe(train, 512)
    rows = baseline_ladder(train, docs, bpe,
                           floor_bits=[-t.log2_prob for t in test])
    at = {r.name: r.bits_per_byte for r in rows}
    for unit in ("bytes", "tokens"):
        got = [at[f"{n}, {unit}"] for n in
               ("unigram", "bigram", "trigram", "5-gram")]
        assert got == sorted(got, reverse=True)
    assert min(at, key=at.get) == "the source"
    assert max(at, key=at.get) == "uniform, bytes"
    assert at["xz after training text"] < at["xz"]
    assert all(r.low < r.bits_per_byte < r.high for r in rows
               if r.low is not None)
    one = baseline_ladder(train, docs[:1], order=2)
    assert [r.name for r in one][:3] == [
        "uniform, bytes", "unigram, bytes", "bigram, bytes"]
    assert all(r.low is None and str(r) for r in one)


def test_text_ladder_of_any_text():
    text = "\n\n".join(corpus(60_000)) + " naïve 🪁"
    got = text_ladder(text, train_share=0.8, vocab_size=300, order=3)
    at = {r["name"]: r["bits_per_byte"] for r in got["rows"]}
    assert json.loads(json.dumps(got)) == got
    assert got["n_train"] + got["n_test"] == len(text.encode("utf-8"))
    for unit in ("bytes", "characters", "tokens"):
        assert at[f"unigram, {unit}"] > at[f"trigram, {unit}"]
        assert f"3-gram, {unit}, modified" in at
    with pytest.raises(ValueError, match="train_share is 1.5"):
        text_ladder(text, train_share=1.5)


# ---- prediction is compression

@given(st.lists(st.integers(0, 3), max_size=80), st.integers(1, 4))
def test_arithmetic_coding_round_trip(ids, order):
    model = NGram(order, 5, end_of_text=4).fit([0, 1, 2, 0, 1, 4, 3, 0, 4])
    ids = [*ids, 4]
    data = arithmetic_encode(ids, model.next_probs)
    assert arithmetic_decode(data, model.next_probs, 4) == ids
    assert len(data) <= -model.log2_probs(ids).sum() / 8 + 2


@given(st.integers(0, 2**32 - 1))
def test_arithmetic_coding_of_extreme_probabilities(seed):
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.full(6, 0.05))        # nearly all on one symbol
    ids = [*rng.integers(0, 5, 30).tolist(), 5]
    data = arithmetic_encode(ids, lambda before: p)
    assert arithmetic_decode(data, lambda before: p, 5) == ids


def test_compressed_size_is_the_cross_entropy():
    train, doc = corpus(200_000), next(iter(tales(1, split="test"))).text
    model = fit_ngram(train)
    ids = token_stream([doc]).tolist()
    data = arithmetic_encode(ids, model.next_probs)
    bits = document_bits(model, [doc])[0]
    assert 0 <= len(data) - bits / 8 < 2
    assert bytes(arithmetic_decode(data, model.next_probs, 256)[:-1]) == (
        doc.encode())


def test_damaged_data_is_noticed_or_ends():
    with pytest.raises(ValueError, match="damaged"):
        arithmetic_decode(b"\0" * 9, lambda ids: np.array([.9, .1]), 1,
                          max_tokens=50)


# ---- measured once, committed

def test_shakespeare_ladder_file(root):
    path = root / "nbs" / "results" / "ladder_shakespeare.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    at = {r["name"]: r["bits_per_byte"] for r in data["rows"]}
    for unit in ("bytes", "characters", "tokens"):
        got = [at[f"{n}, {unit}"] for n in ("unigram", "bigram", "trigram")]
        assert got == sorted(got, reverse=True)
    assert at["5-gram, tokens"] < at["xz after training text"] < at["gzip"]
    assert len(data["sha256"]) == 64 and data["n_train"] > 1_000_000
