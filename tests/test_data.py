"""Cleaning: every step against a naive version, bad input, and accounts."""
import json
import random
import time
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minillm.data as data
from minillm.data import (
    C4_RULES,
    GOPHER_RULES,
    Amount,
    Document,
    Drop,
    DropExact,
    DropNear,
    LanguageGuesser,
    MinHasher,
    NearDuplicateIndex,
    Pipeline,
    RepeatedParagraphs,
    Report,
    UnionFind,
    c4_lines,
    candidate_probability,
    clean,
    contamination,
    decode_text,
    default_steps,
    edit,
    find_pii,
    fingerprint,
    first_reason,
    gopher_alphabetic,
    gopher_length,
    gopher_lines,
    gopher_repetition,
    gopher_stop_words,
    gopher_symbols,
    gopher_word_length,
    html_to_text,
    jaccard,
    leakage,
    luhn,
    mojibake,
    near_duplicates,
    ngram_hashes,
    normalize_text,
    python_to_prose,
    reject,
    repetition,
    scrub,
    shingles,
    split_groups,
    words_of,
)
from minillm.files import read_json

ANY_TEXT = st.text(max_size=300)
WORDS = [f"w{i}" for i in range(400)]
LONG_LINE = "spam and eggs " * 75_000  # 1 MB without a line end


def random_text(rng, n_words=200):
    return " ".join(rng.choices(WORDS, k=n_words))


def edited(text, rng, share):
    return " ".join(rng.choice(WORDS) if rng.random() < share else w
                    for w in text.split())


# --- text


def test_decode_takes_marks_and_refuses_bad_bytes():
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):
        assert decode_text("naïve 猫".encode(encoding)) == "naïve 猫"
    assert decode_text(b"") == ""
    assert decode_text(b"caf\xe9", encoding="latin-1") == "café"
    with pytest.raises(ValueError, match=r"byte 3 \(0xe9\).*utf-8.*encoding="):
        decode_text(b"caf\xe9")


@given(st.text(st.characters(), max_size=200))  # with lone surrogates
def test_normalize_is_idempotent_and_composed(text):
    once = normalize_text(text)
    assert normalize_text(once) == once
    assert unicodedata.is_normalized("NFC", once)
    once.encode("utf-8")
    assert not any(unicodedata.category(c) == "Cc" and c not in "\t\n"
                   for c in once)


def test_normalize_keeps_what_has_a_meaning():
    for text in ("x²", "ﬁ", "👩\u200d👧", "a\u00a0b", "a\tb",
                 "نمی\u200cخواهم"):
        assert normalize_text(text) == text
    assert normalize_text("a\r\nb\rc\u2028d") == "a\nb\nc\nd"


# --- extraction


@pytest.mark.parametrize(("html", "text"), [
    ("", ""),
    ("no tags", "no tags"),
    ("<p>a&amp;b<p>c", "a&b\n\nc"),
    ("a<br>b<br/>c", "a\nb\nc"),
    ("<b>bo</b>ld and <i>so</i>  on", "bold and so on"),
    ("a<script>if (1 < 2) x('<p>')</script>b", "ab"),
    ("a<style>p > b {}</style> b", "a b"),
    ("<nav>x<nav>y</nav>z</nav>kept", "kept"),
    ("</nav>kept", "kept"),
    ("<!-- no --><ul><li>1<li>2</ul>", "1\n2"),
    ("<pre>a\n    b</pre>c", "a\n    b\n\nc"),
    ("1 &lt; 2 &#8364; &nosuch;", "1 < 2 € &nosuch;"),
    ("a < b", "a < b"),
    ("a > b &amp; c", "a > b & c"),
    ("<p>text<a href='x", "text"),
    ("<script>never <b>closed</b> x", ""),
])
def test_html(html, text):
    assert html_to_text(html) == text


@given(ANY_TEXT)
def test_html_never_raises_and_leaves_plain_text(text):
    html_to_text(text)
    plain = "".join(c for c in text if c.isalnum())
    assert html_to_text(plain) == plain


def test_python_prose_takes_docstrings_and_comments_only():
    source = (
        '#!/usr/bin/python\n# coding: utf-8\n"""Module."""\nimport os\n'
        'x = "no # no"  # yes\n\n\ndef f():\n    r"""Doc \\d.\n\n'
        '      more\n    """\n    return "no"\n\n\nclass A:\n    \'one\'\n'
        '    b"bytes"\n    # -----\n    f"no {x}"\n    # last'
    )
    assert python_to_prose(source).split("\n") == [
        "Module.", "", "yes", "", "Doc \\d.", "", "more", "", "one", "",
        "last"]
    assert python_to_prose("") == ""
    for bad in ("def f(:\n  '''", "x = (", "  a\n b\n"):
        with pytest.raises(ValueError, match="not Python"):
            python_to_prose(bad)


# --- language


def guesser():
    return LanguageGuesser({
        "en": ["the cat sat on the mat and then it went to the house"],
        "de": ["die katze saß auf der matte und dann ging sie ins haus"],
        "ru": ["кошка сидела на коврике а потом пошла домой"]})


def test_language_guesses_and_admits_ignorance():
    g = guesser()
    assert g.guess("the house and the cat") == "en"
    assert g.guess("das haus und die katze") == "de"
    assert g.guess("кошка дома") == "ru"
    for nothing in ("", "12345 ---", "猫猫猫"):
        assert g.guess(nothing) is None
    probs = g.probabilities("")
    assert probs == pytest.approx(dict.fromkeys(probs, 1 / 3))
    with pytest.raises(ValueError, match="1 language"):
        LanguageGuesser({"en": ["a"]})


@given(ANY_TEXT)
def test_language_probabilities_sum_to_one(text):
    probs = GUESSER.probabilities(text)
    assert sum(probs.values()) == pytest.approx(1)
    # by hand: counts of trigrams, plus alpha for each known and one unknown
    grams = GUESSER.grams(text)
    assert all(len(gram) == 3 for gram in grams)


GUESSER = guesser()


def test_language_scores_by_hand():
    g = LanguageGuesser({"a": ["xy"], "b": ["xz"]}, alpha=1.0)
    # grams " xy", "xy " and " xz", "xz ": four known, one for the unseen
    p = (2 / 7) / (2 / 7 + 1 / 7)
    assert g.probabilities("xy")["a"] == pytest.approx(
        p**2 / (p**2 + (1 - p)**2))


# --- rules


def prose(n=60):
    rng = random.Random(1)
    return f"The end of {random_text(rng, n)} and so on."


def test_rules_on_cases_by_hand():
    assert first_reason(prose(), (*GOPHER_RULES, mojibake)) is None
    assert gopher_length("word " * 49) == "under 50 words"
    assert gopher_length("word " * 50) is None
    assert gopher_length("a " * 100_001) == "over 100,000 words"
    assert gopher_word_length("ab " * 9) and gopher_word_length("abc") is None
    assert gopher_word_length("x" * 11)
    assert gopher_symbols("# a b c d") and gopher_symbols("a b… c")
    assert gopher_symbols("# " + "a " * 9) is None
    assert gopher_lines("- a\n* b\n• c") == "bullet points"
    assert gopher_lines("- a\nb") is None
    assert gopher_lines("a...\nb\nc") == "lines cut short"
    assert gopher_alphabetic("1 2 3 word") and not gopher_alphabetic("猫")
    assert gopher_stop_words("the the") and not gopher_stop_words("to BE")
    assert c4_lines("One two three four five.\nshort line.\nno end here at"
                    " all\nPlease turn JavaScript on right now.") == (
        "One two three four five.")
    assert mojibake("cafÃ© naÃ¯ve dÃ©jÃ\xa0 vu") == "wrongly decoded"
    assert mojibake("Ärger, Ça va, â, São Paulo, Ãlt") is None
    assert mojibake("\ufffd" * 5)


@pytest.mark.parametrize("text", ["", " ", "a", "\n\n", "猫" * 100, "{", "…"])
def test_rules_and_statistics_on_tiny_text(text):
    for rule in (*GOPHER_RULES, *C4_RULES, mojibake):
        assert rule(text) is None or isinstance(rule(text), str)
    assert all(0 <= share <= 1 for share in repetition(text).values())


def naive_repetition(text, n):
    words = text.split()
    runs = [tuple(words[i:i + n]) for i in range(len(words) - n + 1)]
    total = max(1, sum(map(len, words)))
    if n <= 4:
        top = max((runs.count(r) for r in runs), default=0)
        if top < 2:
            return 0
        return max(top * sum(map(len, r)) for r in runs
                   if runs.count(r) == top) / total
    covered = {i + k for i, r in enumerate(runs) if runs.count(r) > 1
               for k in range(n)}
    return sum(len(words[i]) for i in covered) / total


@given(st.lists(st.sampled_from(["a", "bb", "ccc"]), max_size=40))
def test_repetition_equals_counting(words):
    text = " ".join(words)
    shares = repetition(text)
    for n in range(2, 11):
        kind = "most frequent" if n <= 4 else "repeated"
        if len(words) > n:
            assert shares[f"{kind} {n} words"] == pytest.approx(
                naive_repetition(text, n))
    lines = repetition("a\nbb\na\n\na")
    assert lines["repeated lines"] == 0.5
    assert lines["characters in repeated lines"] == pytest.approx(2 / 5)
    assert gopher_repetition("a\nbb\na\n\na") == "repetition: repeated lines"


# --- n-grams and duplicates


@given(st.lists(st.sampled_from(["a", "b", "ab"]), min_size=1, max_size=20),
       st.integers(1, 6))
def test_ngram_hashes_part_as_tuples_do(words, n):
    k = min(n, len(words))
    runs = [tuple(words[i:i + k]) for i in range(len(words) - k + 1)]
    h = ngram_hashes(words, n).tolist()
    assert len(h) == len(runs)
    assert len(set(zip(runs, h))) == len(set(runs)) == len(set(h))


def test_hashes_are_the_same_everywhere():
    assert ngram_hashes(["the", "owl"], 2).tolist() == [HASH_OF_THE_OWL]
    with pytest.raises(ValueError, match="n is 0"):
        ngram_hashes(["a"], 0)


HASH_OF_THE_OWL = 1027546503069383376


def test_words():
    assert words_of("It's 3 pm.") == ["it", "s", "3", "pm"]
    assert words_of("") == [""] and words_of(" !? ") == ["!?"]
    assert words_of("猫が好き ok") == ["猫", "が", "好", "き", "ok"]
    assert words_of("Привет, мир") == ["привет", "мир"]


def test_fingerprint_and_paragraphs():
    assert fingerprint("A  b\r\n") == fingerprint("a B")
    assert fingerprint("straße") == fingerprint("STRASSE")
    assert fingerprint("a b") != fingerprint("ab")
    cut = RepeatedParagraphs(min_words=2)
    assert cut("") == "" and cut("x\n\nx") == "x\n\nx"
    assert cut("one two\n \none  two\n\nend") == "one two\n\nend"
    assert cut("One two") == ""


@given(st.lists(st.integers(0, 2**32 - 1)), st.lists(st.integers(0, 40)))
def test_jaccard_equals_sets(a, b):
    a, b = set(a + b[:3]), set(b)
    got = jaccard(*(np.array(sorted(s), np.uint32) for s in (a, b)))
    assert got == (len(a & b) / len(a | b) if a | b else 1.0)


def test_signatures_equal_the_definition_and_datasketch():
    datasketch = pytest.importorskip("datasketch", "2.0")
    rng, hasher = np.random.default_rng(0), MinHasher(64, seed=3)
    assert (hasher.a % 2 == 1).all()
    for size in (1, 2, 1000, 5000):
        members = np.unique(rng.integers(2**32, size=size, dtype=np.uint32))
        before = members.copy()
        theirs = datasketch.MinHash(64, scheme="affine32", hashfunc=int,
                                    permutations=(hasher.a, hasher.b))
        theirs.update_batch(members.tolist())
        assert (hasher.signature(members) == theirs.hashvalues).all()
        assert (members == before).all()
    assert (hasher.signature(np.zeros(0, np.uint32)) == 2**32 - 1).all()
    with pytest.raises(ValueError, match="n_hashes is 0"):
        MinHasher(0)


def test_estimates_lie_within_their_error():
    """Against the truth, and beside datasketch's own estimates."""
    datasketch = pytest.importorskip("datasketch", "2.0")
    rng, hasher = np.random.default_rng(1), MinHasher(128)
    ours, theirs, truth = [], [], []
    for _ in range(200):
        common, each = rng.integers(10, 300, size=2)
        pool = rng.choice(2**32, size=common + 2 * each, replace=False)
        a = np.sort(pool[:common + each]).astype(np.uint32)
        b = np.sort(np.delete(pool, np.s_[common:common + each]))
        b = b.astype(np.uint32)
        truth.append(jaccard(a, b))
        ours.append((hasher.signature(a) == hasher.signature(b)).mean())
        pair = [datasketch.MinHash(128, hashfunc=int) for _ in "ab"]
        for m, s in zip(pair, (a, b)):
            m.update_batch(s.tolist())
        theirs.append(pair[0].jaccard(pair[1]))
    truth = np.array(truth)
    sigma = np.sqrt(truth * (1 - truth) / 128)
    for estimate in (np.array(ours), np.array(theirs)):
        z = (estimate - truth) / sigma
        assert abs(z.mean()) < 4 / np.sqrt(len(z)) and 0.8 < z.std() < 1.2


def test_s_curve_measured():
    rng, index = np.random.default_rng(2), NearDuplicateIndex(bands=8, rows=4)
    for similarity in (0.3, 0.6, 0.9):
        hits = 0
        for _ in range(300):
            pool = rng.choice(2**32, size=200, replace=False)
            pool = pool.astype(np.uint32)
            k = round(200 * similarity)
            half = (k + 200) // 2
            sig = [index.hasher.signature(s) for s in (
                pool[:half], np.concatenate([pool[:k], pool[half:]]))]
            hits += (np.equal(*sig).reshape(8, 4).all(1)).any()
        p = candidate_probability(similarity, 8, 4)
        assert abs(hits / 300 - p) < 4 * np.sqrt(p * (1 - p) / 300) + 0.01
    assert candidate_probability(0, 5, 5) == 0
    assert candidate_probability(1, 5, 5) == 1


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9))))
def test_union_find_equals_spreading_labels(links):
    groups, labels = UnionFind(), list(range(10))
    assert [groups.add() for _ in range(10)] == labels
    for i, j in links:
        groups.union(i, j)
        low, high = sorted((labels[i], labels[j]))
        labels = [low if x == high else x for x in labels]
    assert [groups.find(i) for i in range(10)] == labels


def test_planted_near_duplicates_are_found_and_nothing_else():
    rng = random.Random(0)
    base = [random_text(rng) for _ in range(150)]
    assert near_duplicates(base).clusters == []
    copies = [edited(t, rng, 0.01) for t in base]
    truth = [jaccard(shingles(a), shingles(b))
             for a, b in zip(base, copies)]
    result = near_duplicates(base + copies)
    hit = [result.labels[i + 150] == i for i in range(150)]
    close = [s >= 0.8 for s in truth]
    assert sum(close) > 60
    assert sum(h for h, c in zip(hit, close) if c) >= 0.98 * sum(close)
    assert not any(h for h, c in zip(hit, close) if not c)
    assert result.first.sum() == 300 - sum(hit)
    assert result.n_candidates < 1500
    for i, j, s in result.pairs:
        texts = base + copies
        assert s == jaccard(shingles(texts[i]), shingles(texts[j])) >= 0.8


def test_near_duplicates_of_odd_collections():
    assert near_duplicates([]).clusters == []
    assert near_duplicates([]).labels.shape == (0,)
    assert near_duplicates(["one"]).labels.tolist() == [0]
    texts = ["", "!", "?", "", "hi", "Hi!", "猫が鍵を石の下に隠した",
             "猫が鍵を石の下に隠した。", LONG_LINE, LONG_LINE + "!"]
    assert near_duplicates(texts).clusters == [[0, 3], [4, 5], [6, 7], [8, 9]]
    for bad in ({"threshold": 0}, {"threshold": 1.5}, {"bands": 0},
                {"rows": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            near_duplicates(["a"], **bad)


def test_many_equal_texts_cost_no_squares():
    start = time.perf_counter()
    result = near_duplicates(["the same text over and over again"] * 3000)
    assert result.n_candidates == 2999 and len(result.clusters) == 1
    assert time.perf_counter() - start < 20


def test_index_finds_adds_and_agrees_with_datasketch():
    datasketch = pytest.importorskip("datasketch", "2.0")
    rng, index = random.Random(4), NearDuplicateIndex(bands=20, rows=6)
    lsh = datasketch.MinHashLSH(num_perm=120, params=(20, 6))
    base = [random_text(rng, 60) for _ in range(80)]
    for text in [*base, *(edited(t, rng, 0.03) for t in base)]:
        signature = index.hasher.signature(shingles(text))
        theirs = datasketch.MinHash(hashvalues=signature, scheme="affine32")
        assert index.candidates(signature) == sorted(lsh.query(theirs))
        lsh.insert(index.add(text), theirs)
    assert index.find(base[5])[0] == (5, 1.0)
    assert index.find("something else entirely, of other words") == []


# --- personal data


@pytest.mark.parametrize(("text", "clean_text"), [
    ("", ""),
    ("mail me@firm.de.", "mail [EMAIL]."),
    ("<a.b+c@x-y.co.uk>", "<[EMAIL]>"),
    ("联系me@firm.cn谢谢", "联系[EMAIL]谢谢"),
    ("me@example.com a@b.example you@x.test", None),
    ("@decorator a@b user@localhost", None),
    ("8.8.4.4:53", "[IP]:53"),
    ("127.0.0.1 10.1.2.3 192.168.0.1 0.0.0.0 300.1.1.1", None),
    ("192.0.2.1 198.51.100.7 203.0.113.9 224.0.0.1", None),
    ("1.2.3 v1.2.3.4 1.2.3.4.5", None),
    ("2001:4860:4860::8844", "[IP]"),
    ("::1 fe80::1 2001:db8::1 12:30:45 a::b std::vector", None),
    ("4111-1111-1111-1111", "[CARD]"),
    ("378282246310005 4111111111111111", "[CARD] [CARD]"),
    ("4111111111111112 1234 5678 9012 3456", None),
    ("+49 30 1234 5678", "[PHONE]"),
    ("+1 (415) 555-2671", "[PHONE]"),
    ("(555) 867-5309 or 555.867.5309", "[PHONE] or [PHONE]"),
    ("555-867.5309 2024-10-11 12-34", None),
    ("token gh" + "p_" + "x" * 36, "token [KEY]"),
    ("AK" + "IA" + "A1" * 8 + " s" + "k-" + "aB3" * 8, "[KEY] [KEY]"),
    ("task-force sk-short", None),
])
def test_pii(text, clean_text):
    assert scrub(text)[0] == (text if clean_text is None else clean_text)


@given(st.text(st.sampled_from("a1.@:- +()4e\n"), max_size=80))
def test_scrub_leaves_nothing_and_reports_spans(text):
    spans = find_pii(text)
    assert all(0 <= s < e <= len(text) for _, s, e in spans)
    assert all(a[2] <= b[1] for a, b in zip(spans, spans[1:]))
    once, counts = scrub(text)
    assert sum(counts.values()) == len(spans)
    outside = len(text) - sum(e - s for _, s, e in spans)
    assert len(once) == outside + sum(len(k) + 2 for k, _, _ in spans)


@given(st.integers(10**12, 10**18), st.integers(0, 9))
def test_luhn_notices_a_wrong_digit(number, digit):
    good = [d for d in "0123456789" if luhn(f"{number}{d}")]
    assert len(good) == 1                       # one check digit fits
    text = f"{number}{good[0]}"
    changed = text[:5] + str(digit) + text[6:]
    assert luhn(changed) == (changed == text)
    assert not luhn("")


def test_long_lines_take_linear_time():
    for text in ("a" * 1_000_000, "1" * 1_000_000, "a." * 500_000,
                 "1:" * 500_000, "1 " * 500_000, "@" * 1_000_000, LONG_LINE):
        start = time.perf_counter()
        assert scrub(text)[0] == text
        assert time.perf_counter() - start < 15
    start = time.perf_counter()
    for rule in (*GOPHER_RULES, *C4_RULES, mojibake):
        rule(LONG_LINE)
    assert html_to_text(LONG_LINE) == LONG_LINE.strip()
    assert html_to_text("<a " * 100_000) == ""
    assert len(shingles(LONG_LINE)) == 3
    assert normalize_text(LONG_LINE) == LONG_LINE
    assert time.perf_counter() - start < 30


# --- splits and leaks


def test_groups_never_straddle_and_order_does_not_matter():
    names = [f"doc{i}" for i in range(300)]
    labels = [i // 3 for i in range(300)]
    side = split_groups(names, labels, val=0.2, test=0.2)
    assert {len(set(side[i:i + 3])) for i in range(0, 300, 3)} == {1}
    assert set(side) == {"train", "val", "test"}
    again = split_groups(names[::-1], labels[::-1], val=0.2, test=0.2)
    assert again[::-1] == side
    alone = split_groups(names, range(300))
    assert alone == [data.split_of(name) for name in names]
    assert split_groups([], []) == []
    with pytest.raises(ValueError, match="2 names and 1 labels"):
        split_groups(["a", "b"], [0])


def test_leakage_finds_planted_passages_exactly():
    rng = random.Random(6)
    train, test = ([random_text(rng) for _ in range(40)] for _ in range(2))
    assert not leakage(train, test).share.any()
    words = test[7].split()
    train[11] += " " + "; ".join(words[30:43]).upper()
    train[12] += " " + " ".join(test[9].split()[30:42])      # 12 words
    train[13] = test[21]
    got = leakage(train, test)
    assert np.flatnonzero(got.share).tolist() == [7, 21]
    assert got.share[7] == pytest.approx(1 / 188) and got.share[21] == 1
    assert got.over(0.5) == [21] and got.over(0) == [7, 21]


def test_leakage_of_odd_collections():
    assert leakage([], []).share.shape == (0,)
    assert leakage(["a"], []).over() == []
    got = leakage(["Hello there"], ["hello, there!", "other", ""])
    assert got.share.tolist() == [1, 0, 0] and got.too_short == [0, 1, 2]
    assert leakage([], ["a b"]).share.tolist() == [0]


def test_contamination_finds_planted_items_exactly():
    rng = random.Random(7)
    train = [random_text(rng) for _ in range(60)]
    items = [random_text(rng, n) for n in (30, 9, 20, 4, 13)]
    assert contamination(train, items).found == {}
    train[5] += "\n" + items[1].upper()
    train[8] = items[2].replace(" ", ", ") + train[8]
    train[9] += " " + items[2]
    train[10] += " " + items[3]                               # too short
    got = contamination(train, items)
    assert got.found == {1: [5], 2: [8, 9]} and got.too_short == [3]
    assert got.share == 2 / 4
    assert contamination([], []).share == 0
    assert contamination(["", "a"], [""]).found == {}
    with pytest.raises(ValueError, match="shortest is 14"):
        contamination(train, items, shortest=14)


# --- pipeline


def collection():
    rng = random.Random(8)
    good = [f"{random_text(rng, 80)} of the end and" for _ in range(20)]
    return good, [*good, good[3], good[4].upper() + "\n", good[5] + " more",
                  "short", "", "猫" * 10, "x\x00y " + good[6] + " me@firm.de"]


def test_clean_accounts_for_all():
    good, texts = collection()
    kept, report = clean(texts)
    assert [d.text for d in kept[:20]] == good
    assert [d.name for d in kept] == [str(i) for i in range(20)]
    reasons = {r: a.documents for step in report.dropped.values()
               for r, a in step.items()}
    assert reasons == {"exact duplicate": 2, "near duplicate": 2,
                       "under 50 words": 2, "nothing left": 1}
    assert report.taken.n_bytes == sum(len(t.encode()) for t in texts)
    assert report.kept.n_bytes == sum(len(d.text.encode()) for d in kept)
    assert report.funnel()[-1] == (
        "personal data", 20, report.kept.n_bytes)
    assert report.examples["exact duplicate"] == [("20", "3"), ("21", "4")]
    report.check()


@given(st.lists(st.text(max_size=60) | st.sampled_from(
    ["the and of " * 20, "mail a@firm.de " * 30, "e\u0301\r\n" * 60]),
    max_size=8))
def test_books_balance_and_runs_repeat(texts):
    kept, report = clean(texts)
    report.check()
    assert clean(texts) == (kept, report)
    assert report.taken.documents == len(texts)


def test_one_and_none():
    kept, report = clean([])
    assert kept == [] and report.taken == Amount()
    assert "kept" in str(report)
    doc = Document(prose(), "only")
    assert clean([doc])[0] == [doc]
    assert clean([doc], {})[0] == [doc]


def test_pipeline_streams():
    seen = []

    def source():
        for i in range(5):
            seen.append(i)
            yield Document(f"text {i}", str(i))

    stream = Pipeline({"all": lambda doc: doc}).run(source())
    assert seen == [] and next(stream).name == "0" and seen == [0]


def test_steps_one_by_one():
    doc = Document("A b", "x")
    assert edit(str.upper)(doc) == Document("A B", "x")
    assert edit(lambda text: " ")(doc) == Drop("nothing left")
    assert edit(python_to_prose)(Document("x = (", "y")).reason == "unreadable"
    assert reject(lambda text: "no")(doc) == Drop("no")
    assert reject()(doc) is doc
    exact, near = DropExact(), DropNear(threshold=0.5)
    assert exact(doc) is doc and exact(doc) == Drop("exact duplicate", "x")
    assert near(doc) is doc
    assert near(Document("a B!", "z")) == Drop("near duplicate", "x (1.00)")
    assert default_steps()["exact"] is not default_steps()["exact"]


def test_report_notices_loss_and_is_saved(tmp_path):
    kept, report = clean(collection()[1])
    report.save(tmp_path / "r.json")
    back = read_json(tmp_path / "r.json")
    assert back["kept"] == {"documents": 20,
                            "n_bytes": report.kept.n_bytes}
    json.dumps(back)
    report.kept.n_bytes -= 1
    with pytest.raises(AssertionError):
        report.check()
    lost = Report(["s"], taken=Amount(2, 2), kept=Amount(1, 2))
    with pytest.raises(AssertionError):
        lost.check()


def test_python_corpus_is_cleaned_in_time():
    docs = list(data.load_corpus("python").documents())[:2000]
    start = time.perf_counter()
    result = near_duplicates(d.text for d in docs)
    assert time.perf_counter() - start < 60         # 3 s on a quiet core
    families = [{docs[i].name for i in c} for c in result.clusters]
    assert any(sum("encodings/cp" in name for name in f) > 1
               for f in families)
    part = [d for d in docs if "/encodings/" in d.name]
    kept, report = clean(part, {"near": DropNear()})
    assert 0 < len(kept) < len(part)
    assert len(part) - len(kept) == (
        report.dropped["near"]["near duplicate"].documents)


def test_facade():
    for name in ("load_corpus", "Corpus", "Document", "split_of",
                 "write_shards", "Shards", "TokenLoader", "Mixture"):
        assert name in data.__all__ and hasattr(data, name)
