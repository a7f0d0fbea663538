"""The corpus: the same bytes everywhere, and probabilities that are exact."""
import hashlib
import math
import os
import re
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import pytest

from minillm import tales as m

ROOT = Path(__file__).resolve().parent.parent
FIRST_1000 = "c0d8b78b80155b4aaed15f53f8dfe0271b1156ed6e04d4bf870c605152f9cbc4"


@pytest.fixture(scope="module")
def sample():
    return list(m.tales(10_000, start=50_000))


def test_ten_thousand_scores_equal_or_exceed_the_generator(sample):
    began = time.process_time()
    exceed = 0
    for tale in sample:
        extra = m.tale_log2_prob(tale.text) - tale.log2_prob
        assert extra > -1e-9, tale
        exceed += extra > 1e-9
    print(f"10,000 tales scored in {time.process_time() - began:.1f} s; "
          f"{exceed} have more than one derivation")
    assert 0 < exceed < 1000


def test_same_bytes_everywhere():
    text = "\n".join(t.text for t in m.tales(1000))
    assert hashlib.sha256(text.encode()).hexdigest() == FIRST_1000


@pytest.mark.parametrize("hash_seed", ["0", "1"])
def test_a_fresh_process_writes_the_same_tale_and_facts(hash_seed):
    code = "from minillm.tales import write_tale; print(repr(write_tale(7)))"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True,
        check=True, cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": hash_seed})
    assert out.stdout.strip() == repr(m.write_tale(7))


def test_imports_the_standard_library_only():
    code = ("import sys; sys.modules['torch'] = sys.modules['numpy'] = None;"
            "import minillm.tales as t; t.entropy_floor(5)")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_stories_have_the_promised_shape(sample):
    words, size = set(), 0
    for tale in sample:
        assert tale.text.isascii() and 400 <= len(tale.text) <= 800
        assert "  " not in tale.text and tale.text[-1] in '."'
        assert tale.text.count('"') % 2 == 0
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", tale.text)
        if size < 1e6:
            size += len(tale.text)
            words.update(re.findall(r"[a-z]+(?:-[a-z]+)*",
                                    tale.text.lower()))
    assert len(words) >= 1500


def test_facts_have_four_options_and_an_answer_from_the_text(sample):
    places = [0] * 4
    for tale in sample[:3000]:
        assert len(tale.facts) >= 3
        for fact in tale.facts:
            assert len(set(fact.options)) == 4
            places[fact.options.index(fact.answer)] += 1
            said = fact.answer.removeprefix("the ").lower()
            assert said in tale.text.lower()
            assert fact.question.endswith("?")
    assert max(places) < 1.05 * min(places)


def test_a_keeper_in_the_facts_is_the_keeper_in_the_text():
    seen = 0
    for tale in m.tales(3000):
        for fact in tale.facts:
            if (took := re.search(r"(\w+) took the (.+?) home\.", tale.text)) \
                    and fact.question.startswith("Who has the"):
                assert fact.answer == took[1]
                seen += 1
    assert seen > 10


def test_race_facts_agree_with_the_result():
    seen = 0
    for tale in m.tales(2000):
        facts = {f.question: f.answer for f in tale.facts}
        if "Who won the race?" in facts:
            winner, last = facts["Who won the race?"], facts["Who was last?"]
            seen += 1
            assert winner != last
            assert re.search(rf"{winner} won[., ]", tale.text,
                             re.IGNORECASE), tale.text
    assert seen > 100


def test_splits_share_nothing(sample):
    texts = {s: {t.text for t in m.tales(4000, split=s)}
             for s in ("train", "validation", "test")}
    assert all(len(t) == 4000 for t in texts.values())
    assert not texts["train"] & texts["validation"]
    assert not texts["train"] & texts["test"]
    assert not texts["validation"] & texts["test"]
    assert m.corpus(9000, split="val") == m.corpus(9000, split="validation")
    assert len({t.text for t in sample}) == len(sample)


def test_corpus_fills_but_never_exceeds():
    assert m.corpus(0) == []
    texts = m.corpus(20_000)
    size = sum(map(len, texts))
    following = next(m.tales(1, start=len(texts))).text
    assert size <= 20_000 < size + len(following)
    assert texts == [t.text for t in m.tales(len(texts))]


def test_a_reduced_world_listed_completely():
    structure = {"choose_memo", "choose_plot", "lost_answer", "storm_ending"}

    def keep(scene, step):
        if scene in structure or (scene == "secret_end" and step == 0):
            return 99
        return 2 if step == 0 or scene == "secret_end" else 1

    by_text = defaultdict(list)
    for text, prob in m.derivations(m.meet_hero, keep=keep):
        by_text[text].append(prob)
    total = math.fsum(p for ps in by_text.values() for p in ps)
    assert abs(total - 1) < 1e-9
    assert any(len(ps) > 1 for ps in by_text.values())
    for text, probs in list(by_text.items())[::7]:
        found = m.program_log2_prob(text, m.meet_hero, keep=keep)
        assert abs(found - math.log2(math.fsum(probs))) < 1e-9


def test_impossible_texts(sample):
    for tale in sample[:50]:
        text = tale.text
        for wrong in (text[:-1], text + " ", text + ".", text[1:],
                      text.replace(".", ",", 1), text.lower(), text * 2):
            assert m.tale_log2_prob(wrong) == -math.inf
    assert m.tale_log2_prob("") == -math.inf
    assert m.tale_log2_prob("\u00e9" * 50) == -math.inf


def test_prefixes_lose_mass_only_and_surprisal_sums_to_the_score(sample):
    text = sample[3].text
    bits = m.tale_surprisal(text)
    assert len(bits) == len(text) + 1 and min(bits) >= 0
    assert sum(bits) == pytest.approx(-m.tale_log2_prob(text), abs=1e-6)
    assert m.program_log2_prob("", m.meet_hero, prefix=True) == \
        pytest.approx(0, abs=1e-12)


def test_next_character_probabilities_sum_to_one(sample):
    text = sample[5].text
    for at in (0, 1, 40, 200, len(text) - 3):
        def mass(t):
            return 2 ** m.program_log2_prob(t, m.meet_hero, prefix=True)
        ends = m.tale_log2_prob(text[:at])
        total = sum(mass(text[:at] + chr(i)) for i in [10, *range(32, 127)])
        total += 2 ** ends if ends > -math.inf else 0
        assert total == pytest.approx(mass(text[:at]), rel=1e-9)


def test_entropy_floor_interval():
    small, large = m.entropy_floor(300), m.entropy_floor(1200)
    ratio = (small.high - small.low) / (large.high - large.low)
    assert 1.7 < ratio < 2.4  # four times the tales, half the interval
    assert small.low < large.bits_per_byte < small.high or (
        abs(small.bits_per_byte - large.bits_per_byte) < 0.004)
    assert large.n_tales == 1200
    assert large.bits_per_tale * 1200 == pytest.approx(
        large.bits_per_byte * large.n_bytes)


def test_generation_speed():
    began = time.process_time()
    size = sum(len(t.text) for t in m.tales(3000))
    assert size / (time.process_time() - began) > 1e6


@pytest.mark.parametrize("call, error, says", [
    (lambda: m.write_tale(-1), ValueError, "-1"),
    (lambda: m.write_tale(2**32), ValueError, "4294967296"),
    (lambda: m.write_tale("7"), ValueError, "'7'"),
    (lambda: m.tales(3, split="dev"), ValueError, "'dev'"),
    (lambda: m.tales(-3), ValueError, "-3"),
    (lambda: m.tales(2, start=2**30 - 1), ValueError, "2\\*\\*30"),
    (lambda: m.tale_log2_prob(b"abc"), TypeError, "bytes"),
    (lambda: m.tale_log2_prob(None), TypeError, "NoneType"),
    (lambda: m.entropy_floor(1), ValueError, "2 tales"),
    (lambda: m.tale_surprisal("No tale."), ValueError, "No tale"),
    (lambda: m.Words("a, b, a"), ValueError, "twice"),
])
def test_bad_input(call, error, says):
    with pytest.raises(error, match=says):
        call()
