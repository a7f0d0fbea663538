"""The tokenizer's promises on arbitrary input, and bugs seen elsewhere."""

import json
import os
import random
import unicodedata
import warnings
from collections import Counter

import numpy as np
import pytest
import regex
import tiktoken
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.tokenizer import (
    END_OF_TEXT,
    GPT2_PATTERN,
    BPETokenizer,
    CharTokenizer,
    apply_merges,
    compile_pattern,
    count_chunks,
    learn_merges,
    learn_merges_naive,
    load_tokenizer,
    split_chunks,
    split_word,
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
        ("format", "other"), ("version", 2), ("kind", "Other"), ("kind", []),
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
