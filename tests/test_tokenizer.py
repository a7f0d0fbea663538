"""The tokenizer's promises on arbitrary input, and bugs seen elsewhere."""

import io
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import textwrap
import time
import tracemalloc
import unicodedata
import warnings
from collections import Counter
from functools import cache

import numpy as np
import pytest
import regex
import tiktoken
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minillm import tokenizer as module
from minillm.tokenizer import (
    END_OF_TEXT,
    GPT2_PATTERN,
    GPT4_PATTERN,
    BPETokenizer,
    CharTokenizer,
    apply_merges,
    byte_characters,
    character_spans,
    compile_pattern,
    count_chunks,
    count_corpus,
    count_file,
    decode_pieces,
    learn_merges,
    learn_merges_naive,
    load_tokenizer,
    read_blocks,
    recover_merges,
    split_by_rank,
    split_chunks,
    split_specials,
    split_word,
    stream_chunks,
    train_bpe,
    train_word_bpe,
)

ALL = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
PIECES = [
    "the", " the", "hen", "wren's", "they'll", "  ", "\n\n", "\r\n", "\t",
    "\u00a0", "\u3000", "\u2028", "\u200d", "12", " 345", "...", "!?", "_",
    "👩‍🚀", "🇮🇸", "👍🏽", "é", "e\u0301", "मुर्गी", "鸡", "암탉", "кура", "\x00",
    "<|endoftext|>", "<|endof", "text|>", "<|x|>", "<|x|><|y|>",
]  # fmt: skip
SPECIALS = (END_OF_TEXT, "<|x|>", "<|y|>")


def engine_classes(name):
    """The characters that tiktoken's engine puts into a class."""
    engine = tiktoken.Encoding(
        "classes",
        pat_str=name,
        mergeable_ranks={bytes([i]): i for i in range(256)},
        special_tokens={},
    )
    ids = engine.encode_ordinary("".join(ALL))
    return set(engine.decode_bytes(ids).decode("utf-8"))


def own_classes(name):
    """The characters that the regex module puts into a class."""
    return set(regex.findall(name, "".join(ALL)))


CLASSES = (r"\p{L}", r"\p{N}", r"\s")
DISPUTED = set().union(*(engine_classes(c) ^ own_classes(c) for c in CLASSES))

# Text of all kinds: any characters that both engines class alike, and pieces
# that merge, nest and break in interesting ways.
ANY = st.text(st.characters(exclude_categories=["Cs"]), max_size=30).map(
    lambda text: "".join(c for c in text if c not in DISPUTED)
)
TEXT = st.lists(st.one_of(ANY, st.sampled_from(PIECES)), max_size=12).map(
    "".join
)


def train(text, vocab_size, **kwargs):
    """Train, without the warning about a text that is too small."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return train_bpe(text, vocab_size, **kwargs)


def odd_corpus():
    """Make documents from the pieces and from random characters."""
    rng = random.Random(7)
    common = [c for c in ALL[:0x3000] if c not in DISPUTED]
    for _ in range(1500):
        yield "".join(
            rng.choice(PIECES) if rng.random() < 0.7 else rng.choice(common)
            for _ in range(rng.randrange(25))
        )


@pytest.fixture(scope="module")
def odd():
    return train(odd_corpus(), 1500, special_tokens=SPECIALS)


@pytest.fixture(scope="module")
def odd_engine(odd):
    return odd.to_tiktoken()


# --- training -------------------------------------------------------------


def reference_merges(text, n_merges, pattern=GPT2_PATTERN):
    """The definition of BPE, on the running text, sharing no code."""
    chunks = [
        [bytes([b]) for b in match.group().encode("utf-8")]
        for match in regex.finditer(pattern, text)
    ]
    merges = []
    while len(merges) < n_merges:
        counts = Counter(p for c in chunks for p in zip(c, c[1:]))
        if not counts:
            break
        top = max(counts.values())
        best = max(pair for pair in counts if counts[pair] == top)
        merges.append(best)
        for chunk in chunks:
            i = 0
            while i < len(chunk) - 1:
                if (chunk[i], chunk[i + 1]) == best:
                    chunk[i : i + 2] = [chunk[i] + chunk[i + 1]]
                i += 1
    return merges


SMALL = st.text("ab c\n1é", max_size=80)


@settings(max_examples=400)
@given(SMALL, st.integers(0, 60))
def test_incremental_trainer_equals_the_definition(text, n_merges):
    counts = count_chunks(text)
    merges = learn_merges(counts, n_merges)
    assert merges == reference_merges(text, n_merges)
    words = {tuple(bytes([b]) for b in c): n for c, n in counts.items()}
    assert merges == learn_merges_naive(words, n_merges)


@settings(max_examples=100)
@given(TEXT)
def test_incremental_trainer_equals_the_definition_on_unicode(text):
    specials = regex.compile("|".join(map(regex.escape, SPECIALS)))
    plain = specials.sub("", text)
    merges = learn_merges(count_chunks(plain), 40)
    assert merges == reference_merges(plain, 40)


@settings(max_examples=200)
@given(st.dictionaries(st.binary(min_size=1, max_size=12),
                       st.integers(1, 9), max_size=12))
def test_counts_stay_true_and_every_token_is_new(chunk_counts):
    merges = learn_merges(chunk_counts, 50)
    assert len({a + b for a, b in merges}) == len(merges)
    words = {
        tuple(bytes([b]) for b in c): n for c, n in chunk_counts.items()
    }
    assert merges == learn_merges_naive(words, 50)


@settings(max_examples=200)
@given(SMALL, SMALL, st.integers(0, 60))
def test_merging_by_rank_equals_replaying_all_merges(text, other, n):
    tokenizer = train(text, 257 + n)
    for chunk in count_chunks(other + text):
        symbols = [bytes([b]) for b in chunk]
        for pair in tokenizer.merges:
            i = 0
            while i < len(symbols) - 1:
                if (symbols[i], symbols[i + 1]) == pair:
                    symbols[i : i + 2] = [pair[0] + pair[1]]
                i += 1
        ids = tokenizer.encode(chunk.decode("utf-8"))
        assert [tokenizer.vocab[i] for i in ids] == symbols


def test_ties_take_the_greater_pair():
    # all pairs occur once; b"yz" is the greatest; prefixes sort before
    assert learn_merges({b"ab": 1, b"yz": 1, b"ya": 1}, 1) == [(b"y", b"z")]
    counts = {b"ab": 5, b"abc": 1, b"ac": 1}
    assert learn_merges(counts, 2)[1] == (b"ab", b"c")  # b"ab" > b"a"


def test_trained_vocabularies_are_nested():
    text = " ".join(odd_corpus())
    large = train(text, 600)
    assert train(text, 400).merges == large.merges[: 400 - 257]
    assert large.vocab_size == 600 and large.end_of_text == 599


def test_ids_are_bytes_then_merges_then_specials():
    tokenizer = train("hen hen hen", 259, special_tokens=["<|a|>", "<|b|>"])
    assert [tokenizer.vocab[i] for i in range(256)] == [
        bytes([i]) for i in range(256)
    ]
    tokenizer = train("hen hen hen", 260, special_tokens=["<|a|>", "<|b|>"])
    assert tokenizer.vocab[256] == b"en" or tokenizer.vocab[256] == b"he"
    assert tokenizer.special_tokens == {"<|a|>": 258, "<|b|>": 259}
    assert tokenizer.end_of_text is None


def test_no_merge_crosses_a_special_token_or_a_document():
    tokenizer = train(f"ab{END_OF_TEXT}" * 50, 300)
    assert tokenizer.merges == [(b"a", b"b")]
    tokenizer = train(["xa", "ba"] * 50, 300)
    assert (b"a", b"b") not in tokenizer.merges


def test_documents_equal_their_chunks_one_by_one():
    docs = list(odd_corpus())[:200]
    together = sum((count_chunks(doc) for doc in docs), Counter())
    assert count_chunks(iter(docs)) == together


def test_too_small_a_text_warns_and_too_small_a_size_raises():
    with pytest.warns(UserWarning, match="258 entries, not 1000"):
        tokenizer = train_bpe("ab", 1000)
    assert tokenizer.vocab_size == 258
    with pytest.warns(UserWarning):
        assert train_bpe("", 300).encode("hen") == [104, 101, 110]
    with pytest.raises(ValueError, match="at least 257"):
        train_bpe("ab", 256)
    with pytest.raises(ValueError, match="one string"):
        train_bpe("ab", 300, special_tokens=END_OF_TEXT)
    with pytest.raises(ValueError, match="repeat"):
        train_bpe("ab", 300, special_tokens=["<|a|>", "<|a|>"])
    with pytest.raises(ValueError, match="non-empty"):
        train_bpe("ab", 300, special_tokens=[""])


def test_one_chunk_without_spaces_takes_no_quadratic_time():
    # quadratic work would take hours
    rng = random.Random(0)
    dna = "".join(rng.choices("ACGT", k=100_000))
    tokenizer = train_bpe(dna, 257 + 100)
    ids = tokenizer.encode(dna)
    assert tokenizer.decode(ids) == dna
    assert tokenizer.encode_documents([dna]).tolist() == [*ids, 356]
    run = "A" * 300_000
    assert tokenizer.decode(tokenizer.encode(run)) == run


def test_word_bpe_by_hand():
    text = "ten hens went when the wren went then"
    assert train_word_bpe(text, 3) == [
        ("e", "n"),
        ("en", "</w>"),
        ("w", "en"),
    ]
    assert split_word("hen", train_word_bpe(text, 3)) == ("h", "en</w>")
    assert train_word_bpe("", 5) == []
    assert len(train_word_bpe("ab", 50)) == 2


# --- encoding and decoding ------------------------------------------------


@settings(max_examples=400)
@given(TEXT)
def test_round_trip_and_equality_with_tiktoken(odd, odd_engine, text):
    ids = odd.encode(text)
    assert odd.decode(ids) == text
    assert odd.decode_bytes(ids) == text.encode("utf-8")
    assert ids == odd_engine.encode_ordinary(text)
    ids = odd.encode(text, allowed_special="all")
    assert odd.decode(ids) == text
    assert ids == odd_engine.encode(text, allowed_special="all")
    some = {"<|x|>"}
    assert odd.encode(text, allowed_special=some) == odd_engine.encode(
        text, allowed_special=some, disallowed_special=()
    )


@settings(max_examples=200)
@given(st.text(" \t\n\r\u00a0\u2003\u3000\x1c\x85a1.'s", max_size=60))
def test_white_space_runs_equal_tiktoken(odd, odd_engine, text):
    assert odd.encode(text) == odd_engine.encode_ordinary(text)
    assert odd.decode(odd.encode(text)) == text


def test_every_character_equals_tiktoken(odd, odd_engine):
    # each assigned one beside a letter, a space and a digit
    assigned = [c for c in ALL if unicodedata.category(c) not in ("Cn", "Co")]
    assert len(assigned) > 140_000
    for start in range(0, len(assigned), 4096):
        batch = assigned[start : start + 4096]
        text = "".join(f"e{c} {c}1" for c in batch if c not in DISPUTED)
        ids = odd.encode(text)
        assert ids == odd_engine.encode_ordinary(text)
        assert odd.decode(ids) == text


def test_only_recent_characters_are_disputed():
    # the engines carry Unicode tables of different years
    old = unicodedata.ucd_3_2_0
    assert all(old.category(c) == "Cn" for c in DISPUTED)


@given(TEXT)
def test_round_trip_of_disputed_characters(odd, text):
    for c in sorted(DISPUTED)[:5]:
        assert odd.decode(odd.encode(text + c)) == text + c


@given(st.text(st.characters(), max_size=30))
def test_lone_surrogates_become_replacement_characters(odd, odd_engine, text):
    text = "".join(c for c in text if c not in DISPUTED) + "\ud800x\udc00"
    ids = odd.encode(text)
    assert ids == odd_engine.encode_ordinary(text)
    assert odd.decode(ids).endswith("\ufffdx\ufffd")
    assert odd.decode(odd.encode("\ud83d\udc14")) == "🐔"
    assert train("a\ud800 b", 300).vocab_size > 257


@given(TEXT, st.data())
def test_any_cut_of_the_ids_decodes(odd, text, data):
    ids = odd.encode(text)
    cut = data.draw(st.integers(0, len(ids)))
    raw = odd.decode_bytes(ids[:cut])
    assert raw == text.encode("utf-8")[: len(raw)]
    assert odd.decode(ids[:cut]) == raw.decode("utf-8", "replace")
    assert odd.decode_bytes(ids[:cut]) + odd.decode_bytes(
        ids[cut:]
    ) == text.encode("utf-8")


def test_truncated_utf8():
    plain = BPETokenizer([])
    ids = plain.encode("a🐔")
    assert plain.decode(ids[:-1]) == "a\ufffd"
    assert plain.decode(ids[:-1], errors="ignore") == "a"
    with pytest.raises(UnicodeDecodeError):
        plain.decode(ids[:-1], errors="strict")


def test_decode_takes_arrays_and_refuses_what_is_no_id(odd):
    ids = odd.encode("then hens")
    for form in (tuple(ids), iter(ids), np.array(ids, np.uint16),
                 torch.tensor(ids)):
        assert odd.decode(form) == "then hens"
    assert odd.decode([]) == ""
    for wrong in ([odd.vocab_size], [-1], [[1, 2]], [None], ["1"]):
        with pytest.raises(ValueError, match="not an id"):
            odd.decode(wrong)


def test_double_spaces_and_line_breaks_are_kept(odd, odd_engine):
    for text in ("a  b", "a   b", "a \n b", "\n\na", "a\r\nb", " a ", "  "):
        assert odd.decode(odd.encode(text)) == text
        assert odd.encode(text) == odd_engine.encode_ordinary(text)


# --- special tokens -------------------------------------------------------


def test_special_tokens_need_permission(odd):
    text = f"hen{END_OF_TEXT}<|x|>wren"
    end, x = odd.end_of_text, odd.special_tokens["<|x|>"]
    assert not {end, x} & set(odd.encode(text))
    only_x = odd.encode(text, allowed_special={"<|x|>"})
    assert x in only_x and end not in only_x
    both = odd.encode(text, allowed_special="all")
    assert both.count(end) == both.count(x) == 1
    for ids in (only_x, both, odd.encode(text)):
        assert odd.decode(ids) == text


def test_wrong_permission_is_refused(odd):
    with pytest.raises(ValueError, match="no special token"):
        odd.encode("hen", allowed_special={"<|nope|>"})
    with pytest.raises(ValueError, match="collection"):
        odd.encode("hen", allowed_special=END_OF_TEXT)


def test_overlapping_special_tokens_longest_wins():
    names = ["<|a|>", "<|a|><|b|>", "<|b|>", "<|a", "x.y", "x"]
    tokenizer = BPETokenizer([], special_tokens=names)
    known = tokenizer.special_tokens

    def find(text):
        ids = tokenizer.encode(text, allowed_special="all")
        assert tokenizer.decode(ids) == text
        return [i for i in ids if i > 255]

    assert find("<|a|><|b|>") == [known["<|a|><|b|>"]]
    assert find("<|a|> <|b|>") == [known["<|a|>"], known["<|b|>"]]
    assert find("<|a|<|a|>") == [known["<|a"], known["<|a|>"]]
    assert find("x.yxzy") == [known["x.y"], known["x"]]  # the dot is a dot
    shorter = tokenizer.encode("<|a|><|b|>", allowed_special=["<|a|>"])
    assert shorter[0] == known["<|a|>"] and len(shorter) == 6


# --- documents ------------------------------------------------------------


@settings(max_examples=50)
@given(st.lists(TEXT, max_size=6))
def test_documents_equal_encode(odd, docs):
    ids = odd.encode_documents(iter(docs))
    wanted = [i for doc in docs for i in [*odd.encode(doc), odd.end_of_text]]
    assert ids.tolist() == wanted
    assert ids.dtype == np.uint16


def test_documents_over_many_batches(odd):
    docs = ["the hen " * 40_000, "", "wren" * 1000] * 5
    ids = odd.encode_documents(docs)
    ends = np.flatnonzero(ids == odd.end_of_text)
    assert len(ends) == len(docs) and ends[-1] == len(ids) - 1
    assert odd.decode(ids) == "".join(doc + END_OF_TEXT for doc in docs)


def test_wide_vocabularies_get_wide_ids():
    names = [END_OF_TEXT, *(f"<|{i}|>" for i in range(2**16 - 257))]
    narrow = BPETokenizer([], special_tokens=names)
    assert narrow.vocab_size == 2**16
    assert narrow.encode_documents(["a"]).dtype == np.uint16
    wide = BPETokenizer([], special_tokens=["<|more|>", *names[1:], names[0]])
    ids = wide.encode_documents(["a"])
    assert ids.dtype == np.uint32 and ids.tolist() == [97, 2**16]


def test_half_a_million_spaces_do_not_crash(odd):
    # this overflows the stack of tiktoken's engine
    doc = "a" + " " * 1_000_000 + "b"
    ids = odd.encode_documents([doc])
    assert odd.decode(ids) == doc + END_OF_TEXT


def test_documents_refuse_a_string_and_a_missing_end(odd):
    with pytest.raises(ValueError, match="list"):
        odd.encode_documents("hen")
    with pytest.raises(ValueError, match="END_OF_TEXT|endoftext"):
        BPETokenizer([], special_tokens=()).encode_documents(["hen"])


def test_the_cache_stays_bounded():
    tokenizer = BPETokenizer([])
    text = " ".join(str(i) for i in range(70_000))
    assert tokenizer.decode(tokenizer.encode(text)) == text
    tokenizer.encode("a" * 10_000)
    assert len(tokenizer._cache) <= 2**16
    assert max(map(len, tokenizer._cache)) <= 64


def test_returned_ids_are_not_the_cache():
    tokenizer = BPETokenizer([])
    tokenizer.encode("hen").append(0)
    tokenizer.encode("hen").append(0)
    assert tokenizer.decode(tokenizer.encode("hen")) == "hen"


# --- patterns -------------------------------------------------------------

PATTERNS = [
    r"\s*\S+|\s+",
    r"\p{N}| ?\p{L}+",  # skips punctuation: kept, one by one
    r"(a|b)+|(?:c)",  # groups: findall would return the groups
    r"[^\n]+|\n",
    "x",
    "(?i:the)|.",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_own_patterns_lose_nothing_and_survive_saving(pattern, tmp_path):
    docs = list(odd_corpus())[:300]
    tokenizer = train(docs, 400, pattern=pattern)
    tokenizer.save(tmp_path / "t.json")
    loaded = load_tokenizer(tmp_path / "t.json")
    assert loaded.pattern == pattern
    engine = tokenizer.to_tiktoken()
    for doc in docs:
        assert "".join(split_chunks(doc, compile_pattern(pattern))) == doc
        ids = tokenizer.encode(doc)
        assert tokenizer.decode(ids) == doc
        assert loaded.encode(doc) == ids == engine.encode_ordinary(doc)


@pytest.mark.parametrize("pattern", ["(", r"\s*", "a|", "[", "(?P<x"])
def test_bad_patterns_are_refused(pattern):
    with pytest.raises(ValueError, match="pattern"):
        train_bpe("hen", 300, pattern=pattern)


# --- saving and loading ---------------------------------------------------


def test_save_and_load(odd, tmp_path):
    path = tmp_path / "tokenizer.json"
    odd.save(path)
    loaded = load_tokenizer(str(path))
    assert loaded.vocab == odd.vocab
    assert loaded.merges == odd.merges
    assert loaded.special_tokens == odd.special_tokens
    assert list(tmp_path.iterdir()) == [path]
    for doc in list(odd_corpus())[:200]:
        assert loaded.encode(doc) == odd.encode(doc)
    first = path.read_bytes()
    loaded.save(path)
    assert path.read_bytes() == first


def good_file(tmp_path, kind="BPETokenizer"):
    path = tmp_path / "tokenizer.json"
    tokenizer = (
        train("hen hens then", 262)
        if kind == "BPETokenizer"
        else CharTokenizer.train("hen")
    )
    tokenizer.save(path)
    return path, json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "key, value",
    [
        ("format", "other"), ("version", 3), ("kind", "Other"), ("kind", []),
        ("pattern", None), ("pattern", "("), ("pattern", r"\s*"),
        ("merges", None), ("merges", "97 98"), ("merges", ["97"]),
        ("merges", ["97 98 99"]), ("merges", ["97 9999"]),
        ("merges", ["97 -1"]), ("merges", ["a b"]), ("merges", [[97, 98]]),
        ("merges", ["97 98", "97 98"]), ("special_tokens", None),
        ("special_tokens", "<|a|>"), ("special_tokens", ["<|a|>", "<|a|>"]),
        ("special_tokens", [""]), ("special_tokens", [1]),
        ("special_tokens", ["\ud800"]),
    ],
)  # fmt: skip
def test_damaged_files_are_refused(tmp_path, key, value):
    path, data = good_file(tmp_path)
    path.write_text(json.dumps(data | {key: value}), encoding="utf-8")
    with pytest.raises(ValueError, match="tokenizer"):
        load_tokenizer(path)
    del data[key]
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ValueError, match="tokenizer"):
        load_tokenizer(path)


@pytest.mark.parametrize("value", [None, 3, ["a"], "aa", "\ud800"])
def test_damaged_character_files_are_refused(tmp_path, value):
    path, data = good_file(tmp_path, "CharTokenizer")
    data["characters"] = value
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ValueError, match="tokenizer"):
        load_tokenizer(path)


def test_foreign_and_cut_files_are_refused(tmp_path):
    path, _ = good_file(tmp_path)
    whole = path.read_bytes()
    for raw in (whole[: len(whole) // 2], b"", b"\xff\xfe\x00", b"[]", b"3",
                b'{"model": {"type": "BPE"}}', b"null", b'"hen"'):
        path.write_bytes(raw)
        with pytest.raises(ValueError):
            load_tokenizer(path)
    with pytest.raises(FileNotFoundError):
        load_tokenizer(tmp_path / "none.json")


def test_impossible_merges_are_refused():
    with pytest.raises(ValueError, match="earlier merges"):
        BPETokenizer([(b"ab", b"c")])
    with pytest.raises(ValueError, match="again"):
        BPETokenizer([(b"a", b"b"), (b"a", b"b")])
    with pytest.raises(ValueError, match="again"):
        twice = [(b"a", b"b"), (b"b", b"c"), (b"ab", b"c"), (b"a", b"bc")]
        BPETokenizer(twice)


# --- characters -----------------------------------------------------------


@given(TEXT, st.data())
def test_character_tokenizer_round_trip(text, data):
    tokenizer = CharTokenizer.train(text, special_tokens=["<|end|>"])
    ids = tokenizer.encode(text)
    assert len(ids) == len(text) and tokenizer.decode(ids) == text
    assert tokenizer.vocab_size == len(set(text)) + 1


def test_character_tokenizer_names_what_it_lacks(tmp_path):
    tokenizer = CharTokenizer.train(["then", f"{END_OF_TEXT}hens"])
    assert tokenizer.characters == "ehnst" and tokenizer.merges == []
    with pytest.raises(ValueError, match=r"'é' \(U\+00E9, position 3\)"):
        tokenizer.encode("hené")
    text = f"hen{END_OF_TEXT}"
    with pytest.raises(ValueError, match="'<'"):
        tokenizer.encode(text)
    ids = tokenizer.encode(text, allowed_special="all")
    assert ids == tokenizer.encode_documents(["hen"]).tolist()
    assert ids[-1] == tokenizer.end_of_text == 5
    assert tokenizer.decode(ids) == text
    assert tokenizer.to_tiktoken().encode_ordinary("hens") == tokenizer.encode(
        "hens"
    )
    tokenizer.save(tmp_path / "c.json")
    loaded = load_tokenizer(tmp_path / "c.json")
    assert isinstance(loaded, CharTokenizer)
    assert loaded.vocab == tokenizer.vocab


# --- streams --------------------------------------------------------------

LONG = [
    " " * 200, "\n" * 70, "\t \n" * 60, "a" * 150, "7" * 90, "!" * 90,
    "\r\n \r\n", "\n     ", "  \n  x", "'", "'l", "it's", "<|", "<|endoftext",
]  # fmt: skip
STREAM_TEXT = st.lists(
    st.one_of(ANY, st.sampled_from(PIECES + LONG)), max_size=14
).map("".join)
STREAM_PATTERNS = [
    GPT2_PATTERN,
    GPT4_PATTERN,
    r"\s*\S+|\s+",
    r"\w+\b|\W",
    r"(?<=a)b+|(?<!a)[bc]{2}|\d{3}",  # looks behind
    r"(a|b)+(?=\s*\n)|\s+$|^x|\w",
]


def cut(text, data):
    """Cut a text at random places."""
    places = st.lists(st.integers(0, len(text)), max_size=8)
    places = [0, *sorted(data.draw(places)), len(text)]
    return [text[a:b] for a, b in zip(places, places[1:])]


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks so small that every text is streamed."""
    monkeypatch.setattr(module, "BLOCK", 16)


@pytest.mark.parametrize("pattern", STREAM_PATTERNS)
@settings(
    max_examples=80,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(text=STREAM_TEXT, data=st.data())
def test_streams_equal_the_whole(small_blocks, pattern, text, data):
    compiled = compile_pattern(pattern)
    wanted = []
    for i, piece in enumerate(split_specials(text, SPECIALS)):
        wanted += [piece] if i % 2 else split_chunks(piece, compiled)
    found = []
    for chunks, name in stream_chunks(cut(text, data), compiled, SPECIALS):
        found += [*chunks, name] if name else chunks
    assert found == wanted


@settings(
    max_examples=200,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(text=STREAM_TEXT, data=st.data())
def test_encode_iterable_equals_encode(small_blocks, odd, text, data):
    pieces = cut(text, data)
    assert list(odd.encode_iterable(iter(pieces))) == odd.encode(text)
    ids = list(odd.encode_iterable(pieces, allowed_special="all"))
    assert ids == odd.encode(text, allowed_special="all")
    one = list(odd.encode_iterable(pieces, allowed_special=["<|x|>"]))
    assert one == odd.encode(text, allowed_special=["<|x|>"])


def test_streams_release_chunks_before_the_end():
    text = "the hen and the wren \n" * 10_000
    read = []

    def blocks():
        for i in range(0, len(text), 1000):
            read.append(i)
            yield text[i : i + 1000]

    next(stream_chunks(blocks(), compile_pattern(GPT2_PATTERN)))
    assert len(read) < 100


def test_special_tokens_cut_in_two_and_longest_wins(small_blocks):
    names = ["<|a|>", "<|a|><|b|>", "<|b|>", "<|a"]
    tokenizer = BPETokenizer([], special_tokens=names)
    text = ("word " * 30 + "<|a|><|b|><|a|> <|a<|b|>") * 3
    whole = tokenizer.encode(text, allowed_special="all")
    assert tokenizer.special_tokens["<|a|><|b|>"] in whole
    for step in (1, 2, 3, 7):
        pieces = [text[i : i + step] for i in range(0, len(text), step)]
        ids = tokenizer.encode_iterable(pieces, allowed_special="all")
        assert list(ids) == whole


def test_surrogate_pairs_cut_in_two(small_blocks):
    tokenizer = BPETokenizer([])
    pieces = ["a" * 50, "\ud83d", "\udc14", "b" * 90, "\ud83d", "x", "\ud83d"]
    assert list(tokenizer.encode_iterable(pieces)) == tokenizer.encode(
        "".join(pieces)
    )


def test_megabytes_of_one_chunk_stream_in_no_quadratic_time(odd):
    for run in (" ", "\n", "a"):
        text = "x " + run * 1_500_000 + " y"
        blocks = [text[i : i + 9999] for i in range(0, len(text), 9999)]
        for pattern in (GPT2_PATTERN, GPT4_PATTERN):
            compiled = compile_pattern(pattern)
            chunks = sum((c for c, _ in stream_chunks(blocks, compiled)), [])
            assert chunks == split_chunks(text, compiled)


def test_streaming_memory_does_not_grow(monkeypatch, odd, tmp_path):
    monkeypatch.setattr(module, "BLOCK", 2**14)
    path, peaks = tmp_path / "text.txt", []
    for n in (10_000, 50_000):
        path.write_text("the hen and 12 wrens\n" * n, encoding="utf-8")
        sum(map(len, odd.encode_file(path)))  # fills the cache
        tracemalloc.start()
        assert sum(map(len, odd.encode_file(path))) > n
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]


@pytest.mark.parametrize("block", [1, 3, 16, 2**20])
def test_files_equal_their_text(monkeypatch, odd, tmp_path, block):
    monkeypatch.setattr(module, "BLOCK", block)
    path = tmp_path / "text.txt"
    for text in ("", "hen", "a\r\n\r\nb\r\n  c", "🐔é\ufeff鸡" * 40,
                 f"hen{END_OF_TEXT}" * 9):
        path.write_bytes(text.encode("utf-8"))
        assert "".join(read_blocks(path)) == text
        for allowed in ((), "all"):
            parts = list(odd.encode_file(path, allowed_special=allowed))
            ids = [i for part in parts for i in part.tolist()]
            assert ids == odd.encode(text, allowed_special=allowed)
            assert all(part.dtype == np.uint16 for part in parts)


@pytest.mark.parametrize("at", [0, 5, 15, 16, 17, 100])
@pytest.mark.parametrize("bad", [b"\xff", b"\xe9\x28", b"\xed\xa0\x80"])
def test_invalid_utf8_in_a_file_is_named(small_blocks, odd, tmp_path, at, bad):
    path = tmp_path / "latin.txt"
    path.write_bytes("é".encode() * (at // 2) + b"x" * (at % 2) + bad + b"yz")
    message = rf"byte {at} is 0x{bad[0]:02x}.*errors='replace'"
    with pytest.raises(ValueError, match=message):
        list(odd.encode_file(path))
    with pytest.raises(ValueError, match=f"byte {at} "):
        train_bpe(path, 300)


def test_a_file_that_ends_inside_a_character_is_named(odd, tmp_path):
    path = tmp_path / "cut.txt"
    path.write_bytes("ab鸡".encode()[:-1])
    with pytest.raises(ValueError, match="byte 2 "):
        list(odd.encode_file(path))


def test_missing_files_are_named(odd, tmp_path):
    for wrong in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(FileNotFoundError, match="no file"):
            list(odd.encode_file(wrong))
        with pytest.raises(FileNotFoundError, match="no file"):
            train_bpe(wrong, 300)
        with pytest.raises(FileNotFoundError, match="no file"):
            count_file(wrong, n_workers=2)


def test_training_on_text_files_and_documents_is_the_same(tmp_path):
    docs = list(odd_corpus())[:400]
    path = tmp_path / "all.txt"
    path.write_bytes(END_OF_TEXT.join(docs).encode("utf-8"))
    merges = train(docs, 500).merges
    assert train(path, 500).merges == merges
    assert train(END_OF_TEXT.join(docs), 500).merges == merges
    part = tmp_path / "part.txt"
    part.write_bytes(END_OF_TEXT.join(docs[:200]).encode("utf-8"))
    assert train([part, *docs[200:]], 500).merges == merges
    assert train((d for d in [part, *docs[200:]]), 500).merges == merges


def test_training_on_a_large_string_equals_small_blocks(monkeypatch):
    text = "".join(odd_corpus())
    whole = count_chunks(text)
    monkeypatch.setattr(module, "BLOCK", 1000)
    assert count_corpus(text) == whole


def test_what_is_neither_text_nor_file_is_refused():
    for wrong in ([b"hen"], [3], [None]):
        with pytest.raises(ValueError, match="neither text"):
            train_bpe(wrong, 300)
    with pytest.raises(ValueError, match="n_workers=0"):
        train_bpe("hen", 300, n_workers=0)
    with pytest.raises(ValueError, match="itself"):
        train_bpe("hen", 300, special_tokens={END_OF_TEXT: 299})


def test_a_file_name_in_place_of_a_path_is_noticed(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("hen " * 100, encoding="utf-8")
    with pytest.warns(UserWarning, match="pass Path"):
        train_bpe(str(path), 1000)


def test_progress_bars_reach_the_size_of_the_file(tmp_path, monkeypatch):
    path = tmp_path / "text.txt"
    path.write_text("the hen é " * 5000 + END_OF_TEXT, encoding="utf-8")
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stderr", shown)
    tokenizer = train(path, 270, progress=True)
    assert sum(map(len, tokenizer.encode_file(path, progress=True))) > 5000
    size = f"{path.stat().st_size / 1000:.1f}k"
    assert "counting chunks: 100%" in shown.getvalue()
    assert f"{size}/{size}" in shown.getvalue()


PARALLEL = [
    ("words", "the hen's 12 eggs,  \n\n in the barn " * 400, GPT2_PATTERN),
    ("specials", f"hen {END_OF_TEXT}\n鸡 wren" * 900, GPT4_PATTERN),
    ("one chunk", "x " + "a" * 30_000 + " y", GPT2_PATTERN),
    ("no sync", "a" * 30_000, "a{7}"),
    ("white space", "x" + " \n" * 15_000 + "y", GPT4_PATTERN),
    ("behind", "ab bb " * 5000, r"(?<=a)b|b+|\s"),
]


@pytest.mark.parametrize("name, text, pattern", PARALLEL)
def test_parallel_counting_equals_serial(tmp_path, name, text, pattern):
    path = tmp_path / "text.txt"
    path.write_bytes(text.encode("utf-8"))
    whole = count_file(path, pattern=pattern)
    assert whole == Counter(
        c for piece in split_specials(text, [END_OF_TEXT])[::2]
        for c in split_chunks(piece, compile_pattern(pattern))
    )
    parts = count_file(path, pattern=pattern, n_workers=2, range_bytes=5003)
    assert parts == whole


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_ctrl_c_leaves_no_process_behind(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the hen and 12 wrens\n" * 1_500_000, encoding="utf-8")
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(f"""
        import multiprocessing, signal, sys, threading, time
        from pathlib import Path
        from minillm.tokenizer import count_file

        def tell():
            while len(multiprocessing.active_children()) < 2:
                time.sleep(0.05)
            time.sleep(0.5)
            pids = [p.pid for p in multiprocessing.active_children()]
            print(*pids, flush=True)

        if __name__ == "__main__":
            signal.signal(signal.SIGINT, signal.default_int_handler)
            threading.Thread(target=tell, daemon=True).start()
            count_file(Path({str(path)!r}), n_workers=2, range_bytes=2**22)
    """), encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(pids) == 2, process.communicate(timeout=60)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and "KeyboardInterrupt" in errors
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and any(map(alive, pids)):
        time.sleep(0.1)
    assert not any(map(alive, pids))


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


# --- offsets, streams of ids ----------------------------------------------


@settings(max_examples=300)
@given(TEXT)
def test_offsets_cover_the_text(odd, text):
    ids, spans = odd.encode_with_offsets(text, allowed_special="all")
    assert ids == odd.encode(text, allowed_special="all")
    assert len(spans) == len(ids)
    done = 0
    for i, (start, end) in zip(ids, spans):
        assert start <= done <= end and start < end
        raw = text[start:end].encode("utf-8")
        assert odd.vocab[i] in raw
        if len(raw) > len(odd.vocab[i]):  # begins or ends inside a character
            inner = text[start + 1 : end - 1].encode("utf-8")
            assert len(odd.vocab[i]) > len(inner)
        done = max(done, end)
    assert done == len(text)


def test_offsets_by_hand():
    tokenizer = BPETokenizer([(b"h", b"e"), (b"\xf0", b"\x9f")])
    ids, spans = tokenizer.encode_with_offsets("he🐔é")
    assert [tokenizer.vocab[i] for i in ids] == [
        b"he", b"\xf0\x9f", b"\x90", b"\x94", b"\xc3", b"\xa9"
    ]
    assert spans == [(0, 2), (2, 3), (2, 3), (2, 3), (3, 4), (3, 4)]
    assert tokenizer.encode_with_offsets("") == ([], [])
    whole = character_spans("aéb", np.array([2, 2]))  # a token of 1.5
    assert whole.tolist() == [[0, 2], [1, 3]]


def test_offsets_count_surrogates_as_python_does():
    tokenizer = BPETokenizer([])
    text = "a\ud83d\udc14b\ud83dc\udc14\ud83d\ud83d\udc14"
    _, spans = tokenizer.encode_with_offsets(text)
    wanted = [(0, 1), *[(1, 3)] * 4, (3, 4), *[(4, 5)] * 3, (5, 6)]
    wanted += [*[(6, 7)] * 3, *[(7, 8)] * 3, *[(8, 10)] * 4]
    assert spans == wanted


@settings(max_examples=60)
@given(st.lists(st.one_of(TEXT, st.text(max_size=5)), max_size=6))
def test_batches_equal_one_by_one(odd, texts):
    for text in texts:
        if set(text) & DISPUTED:
            return
    for allowed in ((), [END_OF_TEXT], ["<|x|>"], "all"):
        one_by_one = [
            odd.encode_with_offsets(text, allowed_special=allowed)
            for text in texts
        ]
        arrays, spans = odd.encode_batch(
            iter(texts), allowed_special=allowed, offsets=True
        )
        assert [ids.tolist() for ids in arrays] == [x for x, _ in one_by_one]
        assert [list(map(tuple, s.tolist())) for s in spans] == [
            s for _, s in one_by_one
        ]
        assert all(ids.dtype == np.uint16 for ids in arrays)
        only = odd.encode_batch(texts, allowed_special=allowed, n_threads=3)
        assert list(map(list, only)) == list(map(list, arrays))


def test_large_batches_in_threads_equal_one_by_one(odd):
    texts = ["the hen é " * n for n in (50_000, 0, 3, 70_000, 40_000)]
    texts[2] += END_OF_TEXT
    arrays, spans = odd.encode_batch(
        texts, allowed_special="all", offsets=True, n_threads=2
    )
    for text, ids, span in zip(texts, arrays, spans):
        one = odd.encode_with_offsets(text, allowed_special="all")
        assert (ids.tolist(), list(map(tuple, span.tolist()))) == one


def test_documents_that_hold_names_of_special_tokens(odd):
    docs = ["hen", f"a{END_OF_TEXT}b<|x|>", "<|x|>", END_OF_TEXT]
    ids = odd.encode_documents(docs)
    assert (ids == odd.end_of_text).sum() == len(docs)
    assert odd.special_tokens["<|x|>"] not in ids
    ids = odd.encode_documents(docs, allowed_special="all")
    assert (ids == odd.end_of_text).sum() == len(docs) + 2
    assert (ids == odd.special_tokens["<|x|>"]).sum() == 2
    text = "".join(doc + END_OF_TEXT for doc in docs)
    assert odd.decode(ids) == text


def test_bulk_encoding_without_special_tokens_and_with_runs():
    plain = BPETokenizer([(b" ", b" ")], special_tokens=())
    text = "a" + " " * 1_000_000 + f"b{END_OF_TEXT}\0"
    (ids,) = plain.encode_batch([text])
    assert ids.tolist() == plain.encode(text)
    with pytest.raises(ValueError, match="one string"):
        plain.encode_batch("hen")
    with pytest.raises(ValueError, match="not a text"):
        plain.encode_batch(["hen", b"hen"])
    assert plain.encode_batch([]) == []
    assert plain.encode_batch([], offsets=True) == ([], [])


def test_bulk_encoding_on_an_engine_without_arrays(odd, monkeypatch):
    docs = ["the hen", "", f"x {END_OF_TEXT} 鸡"]
    wanted = odd.encode_documents(docs)
    monkeypatch.delattr(tiktoken.Encoding, "encode_to_numpy")
    fresh = pickle.loads(pickle.dumps(odd))
    assert fresh.encode_documents(docs).tolist() == wanted.tolist()


@given(TEXT, st.data())
def test_decode_stream_equals_decode(odd, text, data):
    ids = odd.encode(text, allowed_special="all")
    ids = ids[: data.draw(st.integers(0, len(ids)))]
    for errors in ("replace", "ignore", "backslashreplace"):
        pieces = list(odd.decode_stream(iter(ids), errors))
        assert "".join(pieces) == odd.decode(ids, errors)
        assert all(pieces)


def test_decode_stream_waits_for_whole_characters():
    plain = BPETokenizer([])
    for text in ("hen", "a🐔b", "अंडा", "鸡", ""):
        assert list(plain.decode_stream(plain.encode(text))) == list(text)
    stream = plain.decode_stream(iter([104, 105, 240]))
    assert next(stream) == "h"
    assert list(decode_pieces([b"a\xc3", b"\xa9", b"\xff"])) == [
        "a", "é", "\ufffd"
    ]
    with pytest.raises(UnicodeDecodeError):
        list(plain.decode_stream([240], errors="strict"))
    with pytest.raises(ValueError, match="not an id"):
        list(plain.decode_stream([104, 999]))


# --- disallowed special tokens --------------------------------------------


def test_disallowed_special_tokens_raise(odd, odd_engine):
    text = f"a hen<|x|>{END_OF_TEXT}"
    with pytest.raises(ValueError, match=r"<\|x\|>.* at character 5"):
        odd.encode(text, disallowed_special="all")
    with pytest.raises(ValueError, match="endoftext"):
        odd.encode(text, allowed_special={"<|x|>"}, disallowed_special="all")
    with pytest.raises(ValueError, match="hen"):
        odd.encode_with_offsets(text, disallowed_special=["hen"])
    with pytest.raises(ValueError, match="collection"):
        odd.encode(text, disallowed_special="<|x|>")
    both = odd.encode(text, allowed_special="all", disallowed_special="all")
    assert both == odd_engine.encode(text, allowed_special="all")
    assert odd.encode(text, disallowed_special=["<|y|>"]) == odd.encode(text)


@given(TEXT, st.sets(st.sampled_from(SPECIALS)), st.data())
def test_permissions_equal_tiktoken(odd, odd_engine, text, allowed, data):
    refused = data.draw(st.sampled_from(["all", (), set(SPECIALS[:1])]))
    try:
        wanted = odd_engine.encode(
            text, allowed_special=allowed, disallowed_special=refused
        )
    except ValueError:
        wanted = None
    try:
        ids = odd.encode(
            text, allowed_special=allowed, disallowed_special=refused
        )
    except ValueError:
        ids = None
    assert ids == wanted


# --- vocabularies from elsewhere ------------------------------------------

ORDER = random.Random(3).sample(range(256), 256)


@pytest.fixture(scope="module")
def foreign(odd):
    """A vocabulary with other byte ids and gaps between special tokens."""
    specials = {END_OF_TEXT: 1600, "<|x|>": 1603, "<|y|>": 70_000}
    return BPETokenizer(
        odd.merges, special_tokens=specials, byte_order=ORDER,
        pattern=GPT4_PATTERN,
    )  # fmt: skip


@settings(max_examples=200)
@given(text=TEXT)
def test_other_byte_orders_and_gaps_equal_tiktoken(foreign, text):
    engine = foreign_engine(foreign)
    ids = foreign.encode(text, allowed_special="all")
    assert ids == engine.encode(text, allowed_special="all")
    assert foreign.decode(ids) == text
    (bulk,) = foreign.encode_batch([text], allowed_special="all")
    assert bulk.tolist() == ids and bulk.dtype == np.uint32


def foreign_engine(tokenizer, cache={}):  # noqa: B006
    if "engine" not in cache:
        cache["engine"] = tokenizer.to_tiktoken()
    return cache["engine"]


def test_gaps_between_special_tokens(foreign, tmp_path):
    assert foreign.vocab_size == 70_001
    assert foreign.end_of_text == 1600
    with pytest.raises(ValueError, match="not an id"):
        foreign.decode([1601])
    foreign.save(tmp_path / "t.json")
    loaded = load_tokenizer(tmp_path / "t.json")
    assert loaded.special_tokens == foreign.special_tokens
    assert loaded.byte_order == foreign.byte_order == tuple(ORDER)
    assert loaded.vocab == foreign.vocab
    assert loaded.pattern == GPT4_PATTERN
    text = f"Hen's  12345 {END_OF_TEXT}\n\n é"
    for allowed in ((), "all"):
        assert loaded.encode(text, allowed_special=allowed) == foreign.encode(
            text, allowed_special=allowed
        )


@pytest.mark.parametrize("ids", [
    {"<|a|>": 255}, {"<|a|>": -1}, {"<|a|>": True}, {"<|a|>": 300.0},
    {"<|a|>": 300, "<|b|>": 300}, {"<|a|>": None}, {"": 300}, {3: 300},
])  # fmt: skip
def test_wrong_special_ids_are_refused(ids):
    with pytest.raises(ValueError, match="special token"):
        BPETokenizer([], special_tokens=ids)


@pytest.mark.parametrize("order", [
    [], range(255), [0] * 256, range(1, 257), [*range(255), 255.0],
])  # fmt: skip
def test_wrong_byte_orders_are_refused(order):
    with pytest.raises(ValueError, match="byte_order"):
        BPETokenizer([], byte_order=order)


def test_files_of_version_1_still_load(tmp_path):
    path = tmp_path / "old.json"
    old = {
        "format": "minillm-tokenizer", "version": 1, "kind": "BPETokenizer",
        "special_tokens": [END_OF_TEXT, "<|x|>"], "pattern": GPT2_PATTERN,
        "merges": ["104 101", "256 110"],
    }  # fmt: skip
    path.write_text(json.dumps(old), encoding="utf-8")
    loaded = load_tokenizer(path)
    assert loaded.merges == [(b"h", b"e"), (b"he", b"n")]
    assert loaded.special_tokens == {END_OF_TEXT: 258, "<|x|>": 259}
    assert loaded.encode("hen") == [257]
    old = {
        "format": "minillm-tokenizer", "version": 1, "kind": "CharTokenizer",
        "special_tokens": [END_OF_TEXT], "characters": "ehn",
    }  # fmt: skip
    path.write_text(json.dumps(old), encoding="utf-8")
    assert load_tokenizer(path).encode("hen") == [1, 0, 2]


# Vocabularies that no trainer would make: a pair may be joined in several
# ways, and tokens may stand in any order.
ODD_MERGES = st.lists(
    st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=25
)


@settings(max_examples=300)
@given(ODD_MERGES, st.text("abc ", max_size=40))
def test_untrained_vocabularies_equal_tiktoken(choices, text):
    tokens, merges = [b"a", b"b", b"c"], []
    for i, j in choices:
        left, right = tokens[i % len(tokens)], tokens[j % len(tokens)]
        if left + right not in tokens:
            merges.append((left, right))
            tokens.append(left + right)
    tokenizer = BPETokenizer(merges)
    ids = tokenizer.encode(text + "abcab" * 30)  # a long chunk, too
    assert ids == tokenizer.to_tiktoken().encode_ordinary(
        text + "abcab" * 30
    )


@settings(max_examples=200)
@given(st.binary(max_size=70))
def test_short_and_long_chunks_merge_alike(odd, chunk):
    parts = split_by_rank(chunk, odd.ranks)
    assert apply_merges(chunk, odd._cache.pairs) == [
        odd.ranks[part] for part in parts
    ]


BYTE_PIECES = [
    b"hen", b" ", b"  ", b"\n", b" \t\n", b"\r\n", b"\xa0", b"'s",
    "鸡".encode(), "鸡".encode()[:2], b"\xed\xa0\x80", "\u3000".encode(),
    END_OF_TEXT.encode(),
]  # fmt: skip
BYTES = st.lists(
    st.one_of(st.binary(max_size=4), st.sampled_from(BYTE_PIECES)),
    max_size=10,
).map(b"".join)


@settings(max_examples=600)
@given(data=BYTES)
def test_invalid_utf8_equals_tiktoken(odd, odd_engine, foreign, data):
    theirs = foreign_engine(foreign)
    for ours, engine in ((odd, odd_engine), (foreign, theirs)):
        text = data.decode("utf-8", "ignore")
        if set(text) & DISPUTED:
            return
        ids = ours.encode_bytes(data)
        assert ids == engine._encode_bytes(data)
        assert ours.decode_bytes(ids) == data
        assert ours.encode_bytes(bytearray(data)) == ids


def test_from_tiktoken_finds_the_merges_again(odd, foreign):
    for ours in (odd, foreign):
        again = BPETokenizer.from_tiktoken(ours.to_tiktoken())
        assert again.merges == ours.merges
        assert again.vocab == ours.vocab
        assert again.pattern == ours.pattern
        assert again.special_tokens == ours.special_tokens
        assert again.byte_order == ours.byte_order


def test_from_tiktoken_refuses_what_is_no_bpe():
    ranks = {bytes([i]): i for i in range(256)}
    for more, message in (
        ({b"abc": 256}, "not made of two"),
        ({b"ab": 257}, "no gap"),
    ):
        engine = tiktoken.Encoding(
            "odd", pat_str=GPT2_PATTERN, mergeable_ranks=ranks | more,
            special_tokens={},
        )  # fmt: skip
        with pytest.raises(ValueError, match=message):
            BPETokenizer.from_tiktoken(engine)
    with pytest.raises(ValueError, match="not made of two"):
        recover_merges([*(bytes([i]) for i in range(256)), b"abcd"])


def gpt2_files(tmp_path, tokenizer):
    """Write a vocabulary as GPT-2's was published."""
    chars = byte_characters()
    order = sorted(range(256), key=lambda byte: chars[byte])
    names = ["".join(chars[b] for b in token) for token in
             [bytes([b]) for b in order]
             + [left + right for left, right in tokenizer.merges]]
    ids = {name: i for i, name in enumerate(names)}
    ids[END_OF_TEXT] = len(ids)
    lines = [" ".join("".join(chars[b] for b in part) for part in pair)
             for pair in tokenizer.merges]
    bpe, encoder = tmp_path / "vocab.bpe", tmp_path / "encoder.json"
    text = "\n".join(["#version: 0.2", *lines, ""])
    bpe.write_text(text, encoding="utf-8", newline="\n")
    encoder.write_text(json.dumps(ids), encoding="utf-8")
    return bpe, encoder


def test_gpt2_files_are_read(odd, tmp_path):
    bpe, encoder = gpt2_files(tmp_path, odd)
    read = BPETokenizer.from_gpt2(bpe, encoder)
    assert read.merges == odd.merges
    assert read.end_of_text == read.vocab_size - 1
    text = "the wren's 12 eggs\n\n鸡"
    assert [read.vocab[i] for i in read.encode(text)] == [
        odd.vocab[i] for i in odd.encode(text)
    ]
    table = byte_characters()
    assert len(set(table.values())) == 256 and table[32] == "Ġ"
    assert table[10] == "Ċ" and table[65] == "A"


def test_wrong_gpt2_files_are_refused(odd, tmp_path):
    bpe, encoder = gpt2_files(tmp_path, odd)
    with pytest.raises(FileNotFoundError):
        BPETokenizer.from_gpt2(tmp_path / "none", encoder)
    with pytest.raises(FileNotFoundError):
        BPETokenizer.from_gpt2(bpe, tmp_path / "none")
    whole = json.loads(encoder.read_text(encoding="utf-8"))
    for wrong in ([], {}, {"a": 1}, whole | {"e": 300}):
        encoder.write_text(json.dumps(wrong), encoding="utf-8")
        with pytest.raises(ValueError, match="encoder.json"):
            BPETokenizer.from_gpt2(bpe, encoder)
    encoder.write_text(json.dumps(whole), encoding="utf-8")
    for text in ("a b c", "a", "鸡 b", b"\xff"):
        bpe.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(ValueError, match="vocab.bpe"):
            BPETokenizer.from_gpt2(bpe, encoder)


def huggingface(tokenizer, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer.to_huggingface(tmp_path / "tokenizer.json")
    return tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))


OLD = [c for c in ALL if unicodedata.ucd_3_2_0.category(c) not in (
    "Cn", "Co", "Cs")]


@pytest.mark.parametrize("pattern", [GPT2_PATTERN, GPT4_PATTERN, r"\s*\S+",
                                     r"\d{1,2}+|[a\]b]{2}+| ?\p{L}+"])
def test_huggingface_gives_the_same_ids(odd, tmp_path, pattern):
    names = ["<|a|>", "<|a|><|b|>", "<|b|>", "<|a", END_OF_TEXT]
    tokenizer = BPETokenizer(odd.merges, special_tokens=names, pattern=pattern)
    theirs = huggingface(tokenizer, tmp_path)
    rng = random.Random(5)
    more = ["12345678", "Hen'S", "'LL", "\n  \n x", "  \r\n", "a]bb", *names]
    for _ in range(1500):
        text = "".join(
            rng.choice(PIECES + more) if rng.random() < 0.7
            else rng.choice(OLD) for _ in range(rng.randrange(14))
        )
        ids = tokenizer.encode(text, allowed_special="all")
        assert theirs.encode(text).ids == ids
        assert theirs.decode(ids, skip_special_tokens=False) == text


def test_huggingface_keeps_byte_order_and_gaps(foreign, tmp_path):
    theirs = huggingface(foreign, tmp_path)
    for doc in list(odd_corpus())[:300]:
        ids = foreign.encode(doc, allowed_special="all")
        assert theirs.encode(doc).ids == ids
    assert theirs.token_to_id("<|y|>") == 70_000


def test_huggingface_refuses_a_name_that_is_a_token(tmp_path):
    tokenizer = BPETokenizer([(b"a", b"b")], special_tokens=["ab"])
    with pytest.raises(ValueError, match=r"\['ab'\] are ordinary tokens"):
        tokenizer.to_huggingface(tmp_path / "tokenizer.json")
    assert not list(tmp_path.iterdir())


def test_pickled_tokenizers_encode_alike(odd, foreign):
    for tokenizer in (odd, foreign, CharTokenizer("hen")):
        tokenizer.encode_batch(["hen"])
        again = pickle.loads(pickle.dumps(tokenizer))
        assert again.encode("hen") == tokenizer.encode("hen")
        assert again.encode_batch(["hen"])[0].tolist() == again.encode("hen")
    assert not pickle.loads(pickle.dumps(odd))._cache


# --- GPT-4's pattern ------------------------------------------------------


def test_gpt4_pattern_on_examples():
    gpt4 = compile_pattern(GPT4_PATTERN)
    for text, chunks in (
        ("Hen'S 12345", ["Hen", "'S", " ", "123", "45"]),
        ("(hen) x.y", ["(hen", ")", " x", ".y"]),
        ("a;\n\n  b", ["a", ";\n\n", " ", " b"]),
        ("a \n \n  b", ["a", " \n \n", " ", " b"]),
        ("a \n  ", ["a", " \n  "]),
    ):
        assert split_chunks(text, gpt4) == chunks


@settings(max_examples=300)
@given(TEXT)
def test_gpt4_pattern_equals_tiktoken(foreign, text):
    engine = foreign_engine(foreign)
    assert foreign.encode_ordinary(text) == engine.encode_ordinary(text)


# --- characters, with what all tokenizers share ---------------------------


def test_character_tokenizer_shares_the_streams(tmp_path):
    path = tmp_path / "text.txt"
    text = f"then hens é🐔{END_OF_TEXT}\r\n" * 5
    path.write_bytes(text.encode("utf-8"))
    tokenizer = CharTokenizer.train(path)
    assert tokenizer.characters == CharTokenizer.train(text).characters
    ids = tokenizer.encode(text, allowed_special="all")
    (array,) = tokenizer.encode_file(path, allowed_special="all")
    assert array.tolist() == ids
    assert list(tokenizer.encode_iterable(text, allowed_special="all")) == ids
    _, spans = tokenizer.encode_with_offsets(text, allowed_special="all")
    assert "".join(text[a:b] for a, b in spans) == text
    arrays, more = tokenizer.encode_batch(
        [text, "hen"], allowed_special="all", offsets=True
    )
    assert arrays[0].tolist() == ids and list(map(tuple, more[0])) == spans
    assert "".join(tokenizer.decode_stream(ids)) == text
    with pytest.raises(ValueError, match="'x'"):
        list(tokenizer.encode_iterable(["hen", "x"]))


# --- the real GPT-2 vocabulary, where it is at hand -----------------------


@pytest.mark.skipif(
    not os.environ.get("TIKTOKEN_CACHE_DIR"), reason="no GPT-2 vocabulary"
)
def test_gpt2_merges_give_gpt2_tokens():
    try:
        gpt2 = tiktoken.get_encoding("gpt2")
    except Exception as error:  # the cache lacks it, and there is no network
        pytest.skip(f"no GPT-2 vocabulary: {type(error).__name__}")
    by_rank = sorted(gpt2._mergeable_ranks, key=gpt2._mergeable_ranks.get)
    tokens = [bytes([i]) for i in range(256)]
    tokens += [token for token in by_rank if len(token) > 1]
    pairs, merges = {}, []
    for new in range(256, len(tokens)):
        left, right = apply_merges(tokens[new], pairs)
        pairs[left, right] = new
        merges.append((tokens[left], tokens[right]))
    ours = BPETokenizer(merges)
    assert ours.vocab_size == gpt2.n_vocab == 50257
    for doc in odd_corpus():
        wanted = gpt2.encode_ordinary(doc)
        assert [ours.vocab[i] for i in ours.encode(doc)] == [
            gpt2.decode_single_token_bytes(i) for i in wanted
        ]


def test_offsets_in_bulk_where_halves_of_a_pair_would_meet(odd):
    texts = ["a\ud83d", "\ude00b", "", "\ud83d\ude00"]
    pairs = [odd.encode_with_offsets(text) for text in texts]
    for (ids, spans), found, where in zip(
        pairs, *bulk_with_offsets(odd, texts)
    ):
        assert found == ids and where == spans


def bulk_with_offsets(tokenizer, texts):
    """Give ids and spans of `encode_batch` as lists."""
    ids, spans = tokenizer.encode_batch(texts, offsets=True)
    return ([x.tolist() for x in ids],
            [[tuple(span) for span in x.tolist()] for x in spans])


@pytest.mark.parametrize("names", [
    ["<|endoftext|>", "<|user|>", "<|end|>"],  # none begins another
    ["<|a|>", "<|a|><|a|>", "<|b|>"],  # the longest must win
])
@given(data=st.data())
def test_bulk_with_several_special_tokens(names, data):
    trained = special_trained(tuple(names))
    parts = st.lists(st.sampled_from(
        [*names, "the hen", "<|", "|>", " wren", "\u00e9", "<|en"]))
    texts = data.draw(st.lists(parts.map("".join), max_size=4))
    allowed = data.draw(st.sets(st.sampled_from(names)))
    for some in (allowed, "all"):
        found = trained.encode_batch(texts, allowed_special=some)
        assert [x.tolist() for x in found] == [
            trained.encode(text, allowed_special=some) for text in texts]


@cache
def special_trained(names):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return train_bpe("the hen and the wren " * 9, 300,
                         special_tokens=names)


@pytest.mark.parametrize("pattern", [r"(?<=a)b+|(?<=b)a+|.", r"^.|..",
                                     r"\d{1,3}|\D"])
def test_parallel_counting_where_falling_into_step_is_hard(tmp_path, pattern):
    rng, path = random.Random(1), tmp_path / "text.txt"
    path.write_bytes(("".join(
        rng.choice("ab \n1,23") * rng.choice([1, 1, 2, 5])
        for _ in range(20_000)) + END_OF_TEXT + "".join(
        rng.choice("ab") for _ in range(20_000))).encode())
    assert count_file(path, pattern=pattern) == count_file(
        path, pattern=pattern, n_workers=2, range_bytes=30_001)
