"""WordPiece, Unigram and fertility: against enumeration, tokenizers, torch."""

import itertools
import json
import math
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.subword import (
    MARKS_PATTERN,
    UNKNOWN,
    WORD_PATTERN,
    Fertility,
    UnigramTokenizer,
    WordPieceTokenizer,
    em_step,
    expected_counts,
    fertility,
    forward_table,
    join_pieces,
    learn_pieces,
    load_subword,
    log_sum,
    merge_pieces,
    normalise,
    piece_score,
    prune,
    sample_segmentation,
    seed_pieces,
    train_unigram,
    train_wordpiece,
    viterbi,
    viterbi_table,
    wordpiece_symbols,
)
from minillm.tales import corpus
from minillm.tokenizer import (
    END_OF_TEXT,
    GPT2_PATTERN,
    BPETokenizer,
    compile_pattern,
    count_chunks,
    split_chunks,
    train_bpe,
)

ODD = ["", " ", "hen", "hen's 12 eggs\r\n\r\n\tgo", "मुर्गी", "ไก่", "鸡🐔",
       "e\u0301", "\x00\x7f", "a" * 300, END_OF_TEXT, "## ### #", "\ud800",
       "\u2028x\u00a0", "-" * 200]  # fmt: skip


@pytest.fixture(scope="module")
def docs():
    return corpus(150_000)


@pytest.fixture(scope="module")
def unigram(docs):
    return train_unigram(docs, 800)


@pytest.fixture(scope="module")
def wordpiece(docs):
    return train_wordpiece(docs, 800)


def all_cuts(data):
    """Every segmentation of a string, which must not be empty."""
    for marks in itertools.product((0, 1), repeat=len(data) - 1):
        at = [0, *(i + 1 for i, m in enumerate(marks) if m), len(data)]
        yield [data[i:j] for i, j in zip(at, at[1:])]


def score(cut, log_probs):
    return sum(log_probs.get(piece, -math.inf) for piece in cut)


PROBS = st.dictionaries(
    st.text("ab", min_size=1, max_size=4), st.floats(-20, 0), min_size=1
)
DATA = st.text("ab", min_size=1, max_size=9)


# ------------------------------------------------------------------ Viterbi
@given(DATA, PROBS)
def test_viterbi_finds_the_best_of_all_segmentations(data, probs):
    best = max(score(cut, probs) for cut in all_cuts(data))
    if best == -math.inf:
        with pytest.raises(ValueError, match="no sequence of pieces"):
            viterbi(data, probs)
        assert viterbi_table(data, probs)[-1][0] == -math.inf
    else:
        pieces, found = viterbi(data, probs)
        assert "".join(pieces) == data
        assert math.isclose(found, best, abs_tol=1e-9)
        assert math.isclose(score(pieces, probs), best, abs_tol=1e-9)


@given(DATA, PROBS)
def test_forward_backward_is_the_sum_over_all_segmentations(data, probs):
    weights = {tuple(c): math.exp(score(c, probs)) for c in all_cuts(data)}
    total = sum(weights.values())
    if total == 0:
        with pytest.raises(ValueError, match="no sequence of pieces"):
            expected_counts(data, probs)
        return
    counts, found = expected_counts(data, probs)
    assert math.isclose(found, math.log(total), abs_tol=1e-9)
    truth = Counter()
    for cut, weight in weights.items():
        for piece in cut:
            truth[piece] += weight / total
    for piece in {*truth, *counts}:
        assert math.isclose(truth[piece], counts[piece], abs_tol=1e-9)
    length = sum(len(piece) * n for piece, n in counts.items())
    assert math.isclose(length, len(data), rel_tol=1e-9)


def test_ties_go_to_the_longer_last_piece():
    probs = {"a": -1.0, "b": -1.0, "c": -1.0, "ab": -2.0, "bc": -2.0}
    assert viterbi("abc", probs)[0] == ["a", "bc"]


def test_long_chunks_neither_underflow_nor_take_quadratic_time():
    probs = {"a": math.log(1e-6), "aa": math.log(1e-7)}
    pieces, log_prob = viterbi("a" * 20_000, probs)
    assert len(pieces) == 10_000 and math.isfinite(log_prob)
    counts, total = expected_counts("a" * 20_000, probs)
    assert math.isfinite(total) and total > log_prob
    assert math.isclose(counts["a"] + 2 * counts["aa"], 20_000, rel_tol=1e-6)


def test_log_sum():
    assert log_sum([]) == log_sum([-math.inf]) == -math.inf
    assert math.isclose(log_sum([math.log(0.25)] * 4), 0, abs_tol=1e-12)
    assert math.isclose(log_sum([-5000.0, -5000.0]), -5000 + math.log(2))


def test_sampling_follows_the_probabilities():
    probs = {p: math.log(q) for p, q in
             {"a": 0.3, "b": 0.2, "ab": 0.1, "bb": 0.05, "abb": 0.02}.items()}
    rng = random.Random(0)
    for alpha in (0.0, 1.0, 2.0):
        weights = {tuple(c): math.exp(alpha * score(c, probs))
                   for c in all_cuts("abb") if score(c, probs) > -math.inf}
        n = 4000
        draws = Counter(
            tuple(sample_segmentation("abb", probs, rng, alpha=alpha))
            for _ in range(n))
        for cut, weight in weights.items():
            p = weight / sum(weights.values())
            assert abs(draws[cut] / n - p) < 5 * math.sqrt(p * (1 - p) / n)
        assert set(draws) <= set(weights)
    with pytest.raises(ValueError, match="no sequence of pieces"):
        sample_segmentation("ax", probs, rng)


# ------------------------------------------------------------------ Unigram
def test_em_never_lowers_the_likelihood(docs):
    chunks = count_chunks(docs[:30])
    log_probs = normalise(seed_pieces(chunks, 800))
    before = -math.inf
    for _ in range(5):
        counts, likelihood = em_step(chunks, log_probs)
        assert likelihood > before
        before = likelihood
        total = math.log(sum(counts.values()))  # the exact M step
        log_probs = {p: math.log(n) - total for p, n in counts.items() if n}


def test_normalise_gives_probabilities_and_keeps_every_byte():
    counts = {bytes([i]): 0 for i in range(256)}
    counts |= {b"a": 9, b"ab": 3, b"xyz": 0.2}
    log_probs = normalise(counts)
    assert math.isclose(sum(map(math.exp, log_probs.values())), 1)
    assert b"xyz" not in log_probs and len(log_probs) == 257


def test_pruning_drops_what_costs_least():
    counts = {bytes([i]): 1 for i in range(256)}
    counts |= {b"th": 100, b"the": 100, b"zq": 1}
    log_probs = normalise(counts)
    before = dict(log_probs)
    kept = prune(counts, log_probs, 2)
    assert set(kept) == {bytes([i]) for i in range(256)} | {b"th", b"the"}
    assert log_probs == before  # what was given is not changed
    assert len(prune(counts, log_probs, 0)) == 256


def test_seeds_are_counted_within_chunks():
    seeds = seed_pieces({b"abab": 2, b"x": 5}, 100, longest=3)
    assert seeds[b"ab"] == 4 and seeds[b"aba"] == 2 and b"abab" not in seeds
    assert seeds[b"x"] == 5 and bytes([0]) in seeds
    assert len(seed_pieces({b"abab": 2}, 1)) == 257


def test_training_gives_the_size_asked_for(docs, unigram):
    assert unigram.vocab_size == 800
    assert unigram.vocab[0] == b"\0" and unigram.vocab[255] == b"\xff"
    values = list(unigram.log_probs.values())[256:]
    assert values == sorted(values, reverse=True)
    assert train_unigram(docs, 257).vocab_size == 257  # bytes only
    for size in (300, 350):
        assert train_unigram(docs[0], size).vocab_size == size
    for text in ("hen hen", ""):  # too small a text
        with pytest.warns(UserWarning, match="not 1000"):
            small = train_unigram(text, 1000)
        assert small.vocab_size < 300
    assert small.encode("hen") == list(b"hen")
    with pytest.warns(UserWarning, match="has 7 entries, not 100"):
        assert train_wordpiece("abc", 100).vocab_size == 7


def test_training_does_not_depend_on_how_the_text_is_given(docs, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(docs[0], encoding="utf-8", newline="")
    trained = [train_unigram(t, 350).log_probs
               for t in (docs[0], [docs[0]], path)]
    assert trained[0] == trained[1] == trained[2]
    pieces = [train_wordpiece(t, 200).pieces
              for t in (docs[0], [docs[0]], path)]
    assert pieces[0] == pieces[1] == pieces[2]


def test_unigram_compresses_at_least_as_well_as_bpe(docs, unigram):
    held_out = corpus(50_000, split="validation")
    n_bytes = sum(len(doc.encode()) for doc in held_out)
    bpe = fertility(train_bpe(docs, 800), held_out).tokens
    ours = fertility(unigram, held_out).tokens
    assert ours < bpe < n_bytes / 2


@pytest.mark.parametrize("text", ODD)
def test_unigram_round_trip(unigram, text):
    valid = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    ids = unigram.encode(text)
    assert unigram.decode(ids) == valid
    assert "".join(unigram.decode_stream(ids)) == valid
    sampled = unigram.encode_sampled(text, random.Random(0))
    assert unigram.decode(sampled) == valid


@given(st.text(max_size=40))
@settings(max_examples=200)
def test_unigram_round_trip_on_any_text(text):
    probs = {bytes([i]): -6.0 for i in range(256)} | {b"\xc3\xa9": -3.0}
    tokenizer = UnigramTokenizer(probs)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_unigram_streams_batches_and_offsets(unigram, docs):
    text = docs[0]
    ids = unigram.encode(text)
    pieces = [text[i : i + 7] for i in range(0, len(text), 7)]
    assert list(unigram.encode_iterable(pieces)) == ids
    assert [a.tolist() for a in unigram.encode_batch([text, ""])] == [ids, []]
    again, spans = unigram.encode_with_offsets(text)
    assert again == ids
    assert "".join(text[a:b] for a, b in spans) == text
    stream = unigram.encode_documents([text, "hen"])
    assert stream.dtype == np.uint16
    assert stream[len(ids)] == stream[-1] == unigram.end_of_text


def test_unigram_special_tokens(unigram):
    text = f"hen{END_OF_TEXT}hen"
    assert unigram.end_of_text not in unigram.encode(text)
    ids = unigram.encode(text, allowed_special="all")
    assert ids.count(unigram.end_of_text) == 1
    assert unigram.decode(ids) == text


def test_unigram_encodes_as_tokenizers_does(unigram):
    tokenizers = pytest.importorskip("tokenizers")
    pieces = [(t.decode("latin-1"), p) for t, p in unigram.log_probs.items()]
    unknown = ("\u0100", 0.0)  # a character that no byte becomes
    model = tokenizers.models.Unigram([unknown, *pieces], 0, False)
    rust = tokenizers.Tokenizer(model)
    rng = random.Random(0)
    chunks = [*count_chunks(corpus(60_000, split="test"))]
    chunks += [bytes(rng.choices(b"then sg\xe9\0", k=rng.randrange(1, 40)))
               for _ in range(500)]
    for chunk in chunks:
        ours = viterbi(chunk, unigram.log_probs)[0]
        theirs = rust.encode(chunk.decode("latin-1")).tokens
        assert [piece.decode("latin-1") for piece in ours] == theirs


def test_bad_unigram_input_is_refused(docs):
    singles = {bytes([i]): -5.0 for i in range(256)}
    with pytest.raises(ValueError, match="lack the byte"):
        UnigramTokenizer({b"a": -1.0})
    with pytest.raises(ValueError, match="non-empty"):
        UnigramTokenizer(singles | {b"": -1.0})
    for wrong in (math.nan, -math.inf):
        with pytest.raises(ValueError, match="finite"):
            UnigramTokenizer(singles | {b"ab": wrong})
    with pytest.raises(ValueError, match="at least 257"):
        train_unigram(docs, 256)
    for wrong in (0, 1, 1.5):
        with pytest.raises(ValueError, match="between 0 and 1"):
            train_unigram(docs, 300, shrink=wrong)
    for wrong in ({"em_steps": 0}, {"seeds_per_piece": 0.5}):
        with pytest.raises(ValueError, match="at least 1"):
            train_unigram(docs, 300, **wrong)
    with pytest.raises(ValueError, match="neither text"):
        train_unigram([1], 300)


# ---------------------------------------------------------------- WordPiece
def learn_slowly(word_counts, n_pieces, weighted):
    """Count everything afresh for every merge."""
    words = {tuple(wordpiece_symbols(w)): n for w, n in word_counts.items()}
    pieces = []
    for _ in range(n_pieces):
        one, two = Counter(), Counter()
        for symbols, n in words.items():
            for symbol in symbols:
                one[symbol] += n
            for pair in zip(symbols, symbols[1:]):
                two[pair] += n
        total = sum(one.values())
        found = {(a, b): piece_score(n, one[a], one[b], total, weighted)
                 for (a, b), n in two.items()
                 if a.startswith("##") or not (a + b[2:]).startswith("##")}
        if not found:
            break
        pair = min(found, key=lambda p: (-found[p], p))
        pieces.append(join_pieces(*pair))
        words = {tuple(merge_pieces(list(s), pair, pieces[-1])): n
                 for s, n in words.items()}
    return pieces


WORDS = st.dictionaries(st.text("abc#", min_size=1, max_size=8),
                        st.integers(1, 5), max_size=12)


@given(WORDS, st.booleans())
def test_fast_wordpiece_training_equals_the_slow_one(words, weighted):
    fast = learn_pieces(words, 30, weighted=weighted)
    assert fast == learn_slowly(words, 30, weighted)
    assert len(set(fast)) == len(fast)  # no piece is made twice


def test_hand_computed_score():
    # 8 symbols: a 4, ##b 3, ##c 1; pairs a##b 3, a##c 1
    words = {"ab": 3, "ac": 1}
    assert piece_score(3, 4, 3, 8) == 3 * math.log(3 / 12 * 8)
    assert piece_score(1, 4, 1, 8, False) == 1 / 4
    assert learn_pieces(words, 1) == ["ab"]
    # the bare ratios tie at 1/4, and the smaller pair wins
    assert learn_pieces(words, 1, weighted=False) == ["ab"]
    assert learn_pieces({"ab": 3, "cb": 1, "zq": 1}, 1, weighted=False) == [
        "zq"]


def test_the_mark_is_never_ambiguous():
    words = {"#####": 3, "##a": 2, "a##": 2}
    tokenizer = train_wordpiece(
        " ".join(w for w, n in words.items() for _ in range(n)), 14,
        keep_space=True)  # fmt: skip
    for text in (*words, " ##", "# # ##", "###"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_greedy_takes_the_longest_piece():
    pieces = [UNKNOWN, "u", "un", "una", "##a", "##ab", "##aff", "##b",
              "##le", "##able", "##f", "##l", "##e", "x"]  # fmt: skip
    tokenizer = WordPieceTokenizer(pieces)
    names = [pieces[i] for i in tokenizer.encode("unaffable un x unaffabx")]
    assert names == ["una", "##f", "##f", "##able", "un", "x", UNKNOWN]
    assert tokenizer.decode(tokenizer.encode("unaffable  un")) == (
        "unaffable un")


def test_wordpiece_words_and_unknowns(wordpiece):
    ids = wordpiece.encode("Hen's\n\n  hens, 鸡!")
    assert wordpiece.decode(ids) == f"Hen ' s hens , {UNKNOWN} !"
    assert "".join(wordpiece.decode_stream(ids)) == wordpiece.decode(ids)
    assert wordpiece.encode(" \n\t") == wordpiece.encode("") == []
    assert wordpiece.decode([]) == ""
    assert wordpiece.encode("a" * 101) == [0] != wordpiece.encode("a" * 100)
    assert wordpiece.vocab_size == 800
    assert wordpiece.end_of_text == 799


def test_wordpiece_that_keeps_space_loses_nothing(docs):
    tokenizer = train_wordpiece(docs, 800, keep_space=True)
    for doc in docs[:20]:
        ids = tokenizer.encode(doc)
        assert tokenizer.decode(ids) == doc
        assert "".join(tokenizer.decode_stream(ids)) == doc
    assert len(tokenizer.encode(docs[0])) < len(docs[0]) / 2


def test_wordpiece_encodes_as_tokenizers_does(wordpiece):
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.WordPiece(
        {p: i for i, p in enumerate(wordpiece.pieces)}, unk_token=UNKNOWN)
    rust = tokenizers.Tokenizer(model)
    rng = random.Random(0)
    text = corpus(60_000, split="test")
    words = [c.decode() for c in count_chunks(text, pattern=WORD_PATTERN)]
    words += ["".join(rng.choices("thenswé鸡", k=rng.randrange(1, 120)))
              for _ in range(500)]
    for word in words:
        if not word.isspace():
            assert wordpiece.encode_word(word) == rust.encode(word).ids


def test_bad_wordpiece_input_is_refused(wordpiece):
    with pytest.raises(ValueError, match="lack"):
        WordPieceTokenizer(["a"])
    with pytest.raises(ValueError, match="repeat 'a'"):
        WordPieceTokenizer([UNKNOWN, "a", "a"])
    with pytest.raises(ValueError, match="non-empty"):
        WordPieceTokenizer([UNKNOWN, ""])
    with pytest.raises(ValueError, match="at least 6"):
        train_wordpiece("abc", 5, special_tokens=(END_OF_TEXT, "<|x|>"))
    assert train_wordpiece("abc", 6, special_tokens=(END_OF_TEXT, "<|x|>"))
    with pytest.raises(ValueError, match="no offsets"):
        wordpiece.encode_with_offsets("hen")
    with pytest.raises(ValueError, match="no offsets"):
        wordpiece.encode_batch(["hen"], offsets=True)
    with pytest.raises(ValueError, match="not an id"):
        wordpiece.decode([5000])


# ------------------------------------------------------------- save and load
def test_save_and_load(unigram, wordpiece, docs, tmp_path):
    path = tmp_path / "tokenizer.json"
    spaced = train_wordpiece(docs[0], 200, keep_space=True,
                             special_tokens=(END_OF_TEXT, "<|x|>"))
    marked = train_unigram(docs[0], 300, pattern=MARKS_PATTERN)
    for tokenizer in (unigram, wordpiece, spaced, marked):
        tokenizer.save(path)
        again = load_subword(path)
        assert type(again) is type(tokenizer)
        assert again.vocab == tokenizer.vocab
        assert again.special_tokens == tokenizer.special_tokens
        assert again.pattern == tokenizer.pattern
        for text in [*ODD, docs[1]]:
            assert again.encode(text) == tokenizer.encode(text)
    assert again.log_probs == marked.log_probs


def test_damaged_files_are_refused(unigram, tmp_path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(FileNotFoundError):
        load_subword(path)
    unigram.save(path)
    good = json.loads(path.read_text(encoding="utf-8"))
    for change, message in (
        ({"kind": "BPETokenizer"}, "load_tokenizer"),
        ({"kind": ["x"]}, "holds no WordPiece"),
        ({"format": "other"}, "not a tokenizer of minillm"),
        ({"version": 99}, "version 99"),
        ({"pieces": [["a", -1.0]]}, "damaged"),
        ({"pieces": [["鸡", -1.0]]}, "damaged"),
        ({"pieces": 7}, "damaged"),
        ({"pattern": "["}, "damaged"),
        ({"pattern": None}, "damaged"),
    ):
        path.write_text(json.dumps(good | change), encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            load_subword(path)
    for text in ("[1, 2]", "{}", "nonsense", '"hen"'):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError):
            load_subword(path)


# ------------------------------------------------------ patterns, fertility
def test_marks_pattern_keeps_words_with_marks_whole():
    marks = compile_pattern(MARKS_PATTERN)
    for word in ("मुर्गी", "ไก่", "cafe\u0301", "தமிழ்", "עִבְרִית"):
        assert split_chunks(word, marks) == [word]
        assert split_chunks(f"a {word}", marks) == ["a", f" {word}"]


@given(st.text(st.characters(blacklist_categories=["Mn", "Mc", "Me", "Cs"]),
               max_size=30))
def test_marks_pattern_is_gpt2s_where_there_are_no_marks(text):
    assert (split_chunks(text, compile_pattern(MARKS_PATTERN))
            == split_chunks(text, compile_pattern(GPT2_PATTERN)))


def test_fertility_by_hand():
    found = fertility(BPETokenizer([]), ["hen 鸡", "", "🐔"])
    assert found == Fertility(tokens=11, characters=6, bytes=11, words=3)
    assert found.per_byte == 1 and found.per_character == 11 / 6
    assert found.per_word == 11 / 3
    assert fertility(BPETokenizer([]), (t for t in ["a b"])).words == 2
    assert fertility(BPETokenizer([]), ["\ud800"]).bytes == 3
    for wrong in ([], ["", " "]):
        with pytest.raises(ValueError, match="empty"):
            fertility(BPETokenizer([]), wrong)
    with pytest.raises(ValueError, match="one string"):
        fertility(BPETokenizer([]), "hen")


def test_forward_table_lists_the_pieces_that_end_at_each_place():
    forward, edges = forward_table("ab", {"a": -1.0, "b": -1.0, "ab": -1.5})
    assert edges == [[], [(0, -1.0)], [(0, -1.5), (1, -1.0)]]
    assert math.isclose(forward[2], math.log(math.exp(-1.5) + math.exp(-2)))
