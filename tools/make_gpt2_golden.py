"""Write tests/golden/gpt2.json: what tiktoken makes of nasty strings.

    python tools/make_gpt2_golden.py Blocks.txt

Needs GPT-2's vocabulary (tiktoken fetches it, or finds it in
TIKTOKEN_CACHE_DIR) and https://www.unicode.org/Public/UNIDATA/Blocks.txt.
The file holds the strings, their ids, and the part of the vocabulary that
could take part in them: every token that is a substring of one of them. Less
of the vocabulary cannot change an id, so the tests run where the whole
vocabulary cannot be had.
"""

import itertools
import random
import re
import sys
import unicodedata
from pathlib import Path

import tiktoken

from minillm.files import write_atomic

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "tests" / "golden" / "gpt2.json"

NASTY = [
    "", " ", "  ", "\n", "\r\n", "\t", "a", " a", "a ", "  a  b   c    ",
    "hello world", "Hello, world!", "HELLO WORLD", "hElLo",
    "I'm you're he's we'll they'd I've don't 'tis '90s rock'n'roll",
    "I'M YOU'RE HE'S WE'LL", "\u2019s \u2018quoted\u2019 it\u2019s",
    "double  space, triple   space", "tab\tand\ttabs\t\t\tthree",
    "line\nbreaks\n\n\nthree\r\nwindows\r\r\n", "trailing space ",
    "   leading", "\n leading newline", " \n \n mixed \t \n",
    "0 1 12 123 1234 12345 123456 1234567890", "3.14159 -1e-9 1,000,000",
    "1st 2nd 3rd 4th", "\u00bd \u00b2 \u2167 \u0663\u0664 \u4e09",
    "def f(x):\n    return x ** 2  # square\n\n\nclass A:\n\tpass\n",
    "if (a<=b&&c!=d){e+=f[g]->h;}//i", "https://example.org/a?b=c&d=%20#e",
    "<|endoftext|>", "a<|endoftext|>b", "<|endoftext|><|endoftext|>",
    "<|endof", "text|>", "<|endoftext|", "< |endoftext| >",
    "SolidGoldMagikarp", " SolidGoldMagikarp", " davidjl", "StreamerBot",
    "\u00a0nbsp\u00a0", "\u2003em space", "zero\u200bwidth", "\ufeffbom",
    "soft\u00adhyphen", "\u202eright to left\u202c", "\u3000ideographic",
    "\u0000", "\u0001\u0002\u001f\u007f\u0080\u009f", "\u0085next line",
    "\u2028separator\u2029", "e\u0301 \u00e9 n\u0303", "A\u030a\u0327",
    "\ud7ff\ue000\uf8ff\ufffd\ufffe\uffff", "\U00010000\U0010ffff",
    "Zalgo: h\u0335\u0321\u0322e\u0336\u0328y\u0337\u0323",
    "\U0001f414", "\U0001f414\U0001f414\U0001f414",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466",
    "\U0001f44d\U0001f3fd \u2764\ufe0f \u2764 1\ufe0f\u20e3",
    "\U0001f1e9\U0001f1ea\U0001f1eb\U0001f1f7 \U0001f3f4\U000e0067"
    "\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
    "Die H\u00fchner schlafen, die \u00c4rzte nicht; Stra\u00dfe.",
    "\u041a\u0443\u0440\u0438\u0446\u0430 \u0441\u043f\u0438\u0442.",
    "\u0397 \u03ba\u03cc\u03c4\u03b1 \u03ba\u03bf\u03b9\u03bc\u03ac",
    "\u092e\u0941\u0930\u094d\u0917\u0940 \u0938\u094b\u0924\u0940 \u0939",
    "\u0e44\u0e01\u0e48\u0e19\u0e2d\u0e19\u0e2b\u0e25\u0e31\u0e1a",
    "\u6bcd\u9e21\u7761\u5728\u8c37\u4ed3\u91cc\u3002",
    "\u3081\u3093\u3069\u308a\u306f\u7720\u3063\u3066\u3044\u308b\u3002",
    "\uc554\ud0c9\uc774 \uc794\ub2e4.",
    "\u05d4\u05ea\u05e8\u05e0\u05d2\u05d5\u05dc\u05ea \u05d9\u05e9\u05e0",
    "\u0627\u0644\u062f\u062c\u0627\u062c\u0629 \u062a\u0646\u0627\u0645.",
    "\u0130stanbul I\u0131 i\u0307 \ufb01\ufb02 \u01c4\u01c5\u01c6",
]  # fmt: skip
RUNS = ["a", " ", "\n", "\t", "0", "=", "-", ".", "!", "\u00e9", "\u6bcd",
        "\U0001f414", "ab", " a", "\r\n", "'s", "\u00a0"]  # fmt: skip
INVALID = [
    b"\x80", b"\xff", b"hen\xff", b"\xffhen", b"a\x80b\x81c", b"\xc3",
    b"hen \xe6\xaf", b"\xe6\xaf\x8d\xe9", b"\xf0\x9f\x90", b"\xc0\x80",
    b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"  \xff", b"a  \n\n\xfe",
    b"hello world\xe2\x80", b"two words \xf0\x9f trailing text",
    bytes(range(256)), bytes(range(255, -1, -1)), b"\xe2\x28\xa1 ok",
    b"   \t \n \xc3 x", b"one\xff\xfe\xfdtwo\xff\xfe\xfd", b"\n\xff\n",
]  # fmt: skip


def blocks(path: Path) -> list[tuple[str, int, int]]:
    """Read names and ranges of the Unicode blocks."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if m := re.match(r"([0-9A-F]+)\.\.([0-9A-F]+); (.*)", line):
            found.append((m[3], int(m[1], 16), int(m[2], 16)))
    return found


def sample(first: int, last: int, rng: random.Random) -> str:
    """Write a few words in a block, of characters old enough for everyone.

    Python and tiktoken know different versions of Unicode; characters that
    Python's unicodedata does not know yet are left out.
    """
    known = [
        chr(c) for c in range(first, last + 1)
        if unicodedata.category(chr(c)) not in ("Cn", "Cs")
    ]  # fmt: skip
    if not known:
        return ""
    letters = [rng.choice(known) for _ in range(12)]
    return f"{''.join(letters[:6])} {''.join(letters[6:10])}, {letters[-1]}"


def main() -> None:
    gpt2 = tiktoken.get_encoding("gpt2")
    rng = random.Random(2019)
    ranges = blocks(Path(sys.argv[1]))
    named = {name: sample(first, last, rng) for name, first, last in ranges}
    runs = [unit * n for unit in RUNS for n in (2, 3, 17, 64, 301)]
    ascii_only = "".join(map(chr, range(32, 127)))
    noise = ["".join(rng.choices(ascii_only + "   \n", k=rng.randrange(1, 60)))
             for _ in range(200)]
    texts = NASTY + runs + noise + [s for s in named.values() if s]
    texts = list(dict.fromkeys(texts))
    everything = [t.encode("utf-8") for t in texts] + INVALID
    parts = {
        raw[i:j]
        for raw in everything
        for i, j in itertools.combinations(range(len(raw) + 1), 2)
        if j - i <= 128
    }
    ranks = gpt2._mergeable_ranks
    vocab = {t: i for t, i in ranks.items() if len(t) == 1 or t in parts}
    by_rank = sorted(vocab.items(), key=lambda item: item[1])
    lines = ["{", '"about": "made by tools/make_gpt2_golden.py",']
    lines.append('"vocab": {')
    lines += [f'"{t.hex()}": {i},' for t, i in by_rank]
    lines[-1] = lines[-1][:-1] + "},"
    lines.append('"blocks": [')
    lines += [f'"{name}",' for name, s in named.items() if s]
    lines[-1] = lines[-1][:-1] + "],"
    lines.append('"texts": [')
    for text in texts:
        ids = gpt2.encode_ordinary(text)
        lines.append(f'["{text.encode("utf-8").hex()}", {ids}],')
    lines[-1] = lines[-1][:-1] + "],"
    lines.append('"bytes": [')
    for raw in INVALID:
        lines.append(f'["{raw.hex()}", {gpt2._encode_bytes(raw)}],')
    lines[-1] = lines[-1][:-1] + "]}"
    write_atomic(OUT, "\n".join(lines) + "\n")
    print(f"{OUT.name}: {len(texts)} texts, {len(INVALID)} byte strings, "
          f"{len(vocab)} tokens")


if __name__ == "__main__":
    main()
