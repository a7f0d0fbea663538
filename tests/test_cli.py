"""The command line: what works, and every mistake that costs one line."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minillm import cli
from minillm.cli import main

ROOT = Path(__file__).resolve().parent.parent
TEXT = "".join(
    f"{who} has {n} {what}s and gives one to {whom}.\n"
    for n in range(2, 12)
    for who in ("Ann", "Bob", "Zoë")
    for what in ("apple", "kite", "pear")
    for whom in ("a fox", "the cat")
)
TINY = (
    "--context-length 16 --d-model 16 --n-layers 1 --n-heads 2 "
    "--batch-size 4 --max-steps 8 --eval-every 4 --warmup-steps 2 "
    "--checkpoint-every 4 --eval-tokens 500 --device cpu"
).split()


@dataclass
class Shell:
    """Run commands in this process; keep what they printed."""

    capsys: pytest.CaptureFixture

    def __call__(self, *words: object) -> tuple[int, str, str]:
        self.capsys.readouterr()
        code = main([str(w) for w in words])
        out, err = self.capsys.readouterr()
        assert "Traceback" not in out + err
        return code, out, err

    def works(self, *words: object) -> str:
        """Run a command that must succeed; return what it printed."""
        code, out, err = self(*words)
        assert code == 0, err
        return out

    def refuses(self, *words: object, says: tuple[str, ...]) -> str:
        """Run a command that must fail with one line that says all this."""
        code, out, err = self(*words)
        assert code == 2
        assert err.startswith("minillm: ") and err.count("\n") == 1, err
        for piece in says:
            assert piece in err
        return out


@pytest.fixture
def shell(capsys):
    return Shell(capsys)


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Train two tiny runs once, on characters and on BPE."""
    folder = tmp_path_factory.mktemp("runs")
    text = folder / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    data = ["train", "--data", str(text), *TINY]
    assert main([*data, "--out", str(folder / "char"),
                 "--tokenizer", "char"]) == 0
    assert main([*data, "--out", str(folder / "bpe"),
                 "--vocab-size", "300"]) == 0
    return folder


@pytest.fixture
def run_dir(runs, tmp_path):
    """Copy the run on characters, to damage it."""
    return Path(shutil.copytree(runs / "char", tmp_path / "run"))


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes()
            for p in folder.rglob("*") if p.is_file()}


def weights_of(run_dir: Path) -> list[Path]:
    found = sorted(run_dir.glob("checkpoints/step-*/model.safetensors"))
    assert found
    return found


def start(*words: object, **options) -> subprocess.Popen:
    """Start `python -m minillm` as its own process."""
    env = {**os.environ, "PYTHONUTF8": "1", **options.pop("env", {})}
    return subprocess.Popen(
        [sys.executable, "-m", "minillm", *map(str, words)],
        cwd=ROOT, env=env, encoding="utf-8",
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
    )


# -- help, names, start-up


def test_overview_lists_every_command(shell):
    out = shell.works()
    assert out == shell.works("--help")
    for name in ("quickstart", "download", "prepare", "train", "doctor",
                 "speedrun", "recipe", "sample", "eval", "bench", "info"):
        assert f"\n  {name} " in out


def test_version_is_the_package_version(shell):
    import minillm

    assert shell.works("--version") == f"minillm {minillm.__version__}\n"


@pytest.mark.parametrize(
    "name, option",
    [("quickstart", "--minutes"), ("train", "--resume"),
     ("download", "--max-bytes"), ("prepare", "--workers"),
     ("train", "--text-field"), ("doctor", "--try-out"),
     ("speedrun", "--recipe"), ("recipe", "--dry-run"),
     ("sample", "--repetition-penalty"), ("eval", "--max-bytes"),
     ("bench", "--preset"), ("info", "directory of a run")],
)
def test_help_of_each_command(shell, name, option):
    out = shell.works(name, "--help")
    assert option in out and f"minillm {name}" in out
    assert out.isascii() and "\x1b" not in out
    assert max(map(len, out.splitlines())) <= 80


def test_help_of_train_has_the_fields_of_both_configs(shell):
    from dataclasses import fields

    from minillm.pretrain import TrainConfig
    from minillm.transformer import GPTConfig

    out = shell.works("train", "--help")
    for f in (*fields(GPTConfig), *fields(TrainConfig)):
        assert f"--{f.name.replace('_', '-')}" in out


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from minillm.cli import main; main(['--help']);"
        "main(['sample', '--help']); main(['prepare', '--help']);"
        "heavy = {'torch', 'pyarrow', 'numpy', 'tiktoken', 'datasets', "
        "'matplotlib'};"
        "sys.exit(repr(heavy & set(sys.modules)) if heavy & set(sys.modules) "
        "else 0)"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT,
                         capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_python_m_minillm_passes_the_exit_code_on():
    process = start("trian")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2 and out == ""
    assert "did you mean train?" in err and err.count("\n") == 1


def test_settings_name_the_entry_point():
    settings = (ROOT / "settings.ini").read_text(encoding="utf-8")
    assert "minillm=minillm.cli:main" in settings.replace(" ", "")


# -- words that are no command or option


@pytest.mark.parametrize(
    "words, says",
    [
        ("trian", ("unknown command 'trian'", "did you mean train?")),
        ("--halp", ("unknown command", "quickstart")),
        ("sample x --temprature 1", ("--temprature", "--temperature?")),
        ("train --n-heds 2", ("--n-heds", "did you mean --n-heads?")),
        ("train --n_heds=2", ("--n-heds", "did you mean --n-heads?")),
        ("quickstart --sede 3", ("--sede", "did you mean --seed?")),
        ("sample", ("missing", "directory of a run")),
        ("info a b", ("unexpected argument: b",)),
        ("sample x --n", ("--n needs a value",)),
        ("sample x --n two", ("--n takes a whole number, not 'two'",)),
        ("sample x --n 0", ("--n is 0",)),
        ("sample x --seed -1", ("--seed is -1",)),
        ("sample x --max-new-tokens -1", ("--max-new-tokens is -1",)),
        ("sample x --top-k some", ("--top-k takes", "not 'some'")),
        ("sample x --temperature hot", ("--temperature takes a number",)),
        ("eval x --max-bytes 1", ("--max-bytes is 1",)),
        ("bench --dtype float8", ("--dtype is 'float8'", "bfloat16")),
        ("bench --batch-size 0", ("--batch-size is 0",)),
        ("bench --preset tiny", ("preset 'tiny' is unknown", "tales-1m")),
        ("bench --device tpu", ("device 'tpu' is not available",)),
        ("quickstart --steps 0", ("--steps is 0",)),
        ("quickstart --minutes nan", ("--minutes is nan",)),
        ("quickstart --minutes 1 --steps 2", ("give one of them",)),
        ("train --data t --out o --n-heads 3", ("n_heads=3", "try n_heads=")),
        ("train --data t --out o --dropout 1", ("dropout=1.0", "[0, 1)")),
        ("train --data t --out o --lr nan", ("lr is nan",)),
        ("train --data t --out o --lr -1", ("lr is -1",)),
        ("train --data t --out o --max-steps 0", ("max_steps is 0",)),
        ("train --data t --out o --betas 0.9 2", ("betas",)),
        ("train --data t --out o --seed -1", ("seed is -1",)),
        ("train --data t --out o --preset tiny", ("'tiny' is unknown",)),
        ("train --data t", ("missing: --out",)),
        ("train --out o", ("missing: --data",)),
        ("train --data tales t --out o", ("either tales or files",)),
        ("train --data python t --out o", ("either python or files",)),
        ("train --data shakespear --out o",
         ("known are tales, python", "did you mean 'shakespeare'")),
        ("train --data t --max-bytes 5000 --out o", ("a shorter file",)),
        ("train --data python --max-bytes 5 --out o",
         ("--max-bytes is 5",)),
        ("train --data t --out o --optimizer moun", ("'adamw', 'muon'",)),
        ("train --data t --out o --schedule wds", ("cosine", "wsd")),
        ("train --data t --out o --on-nonfinite go", ("stop", "skip")),
        ("train --data t --out o --log-to disk", ("tensorboard", "wandb")),
        ("doctor", ("missing", "directory of a run")),
        ("doctor none", ("no metrics.jsonl", "none")),
        ("doctor t", ("no metrics.jsonl", "run's directory")),
        ("speedrun --recipe bset", ("did you mean best?",)),
        ("speedrun --recipe x", ("choose one of baseline",)),
        ("speedrun --seed -1", ("--seed is -1",)),
        ("speedrun --steps 0", ("--steps is 0",)),
        ("speedrun --data none.txt", ("no file", "none.txt")),
        ("recipe", ("missing",)),
        ("recipe gpt2-124m", ("did you mean gpt2?",)),
        ("recipe gpt2 --dry-run --steps 1", ("--steps is 1",)),
        ("recipe gpt2 --dry-run --context-length 2000", ("at most 1024",)),
        ("bench train --loop-steps 2", ("--loop-steps is 2",)),
        ("bench train --sizes 11M", ("11M", "0.8M")),
        ("download", ("missing",)),
        ("download tales", ("there already",)),
        ("download tinystory", ("did you mean 'tinystories'",)),
        ("prepare --out o", ("missing: --data",)),
        ("prepare --data t", ("missing: --out",)),
        ("prepare --data t --out o --workers 0", ("--workers is 0",)),
        ("prepare --data none.txt --out o", ("none.txt",)),
    ],
)
def test_bad_words_cost_one_line(shell, words, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("t").write_text(TEXT, encoding="utf-8")
    shell.refuses(*words.split(), says=says)
    assert not Path("o").exists() and not Path("runs").exists()


def test_explain_reads_boxes_with_and_without_edges():
    message = "Error parsing --n: invalid literal for int() with base 10: 'q'"
    plain = f" Value error \n ---------\n  {message} \n  --------\n  For help"
    boxed = f"╭─ Value error ──╮\n│ {message} │\n│ ───────── │\n╰───────────╯"
    for text in (plain, boxed):
        got = cli.explain(text, ["--n", "q"], ["--n"])
        assert got == "--n takes a whole number, not 'q'"
    assert cli.explain("", [], []) == "cannot read the options"


# -- text that is no text


@pytest.mark.parametrize(
    "content, says",
    [
        (None, ("no file",)),
        (b"", ("is empty",)),
        (b" \n\t\n", ("is empty",)),
        (b"abc\xff\xfeabc", ("not UTF-8", "byte 3 ", "0xff")),
        ("café".encode("utf-16"), ("not UTF-8", "byte 0 ")),
        (b"too short", ("too short", "context of 16 needs 17",
                        "--context-length")),
    ],
)
def test_bad_text_costs_one_line(shell, tmp_path, content, says):
    path, out = tmp_path / "text.txt", tmp_path / "run"
    if content is not None:
        path.write_bytes(content)
    shell.refuses("train", "--data", path, "--out", out, "--tokenizer",
                  "char", *TINY, says=(*says, "text.txt"))
    assert not out.exists()


def test_an_empty_directory_has_no_text(shell, tmp_path):
    (tmp_path / "texts").mkdir()
    shell.refuses("train", "--data", tmp_path / "texts", "--out",
                  tmp_path / "run", says=("has no text",))


def test_bpe_needs_room_for_the_bytes(shell, text_file, tmp_path):
    shell.refuses("train", "--data", text_file, "--out", tmp_path / "run",
                  "--vocab-size", 100, says=("vocab_size=100", "257"))


def test_damaged_rows_cost_one_line(shell, tmp_path):
    path = tmp_path / "a.jsonl"
    for data, says in ((b"{oops", ("line 1 is not JSON",)),
                       (b'{"body": "x"}', ("no field 'text'; there is body",)),
                       (b'{"text": "\xff"}', ("byte 10 is 0xff",))):
        path.write_bytes(data)
        shell.refuses("train", "--data", path, "--out", tmp_path / "run",
                      says=("a.jsonl", *says))
    shell.refuses("train", "--data", path.with_suffix(".parquet"), "--out",
                  tmp_path / "run", says=("no file",))


# -- training


def test_train_leaves_a_complete_run(runs, text_file):
    for name in ("char", "bpe"):
        found = files_of(runs / name)
        assert {"run.json", "data.json", "tokenizer.json", "metrics.jsonl",
                "loss.png", "loss.svg"} <= set(found)
        assert not any("PK" == f[:2] for f in found.values())  # no pickles
        head = json.loads(found["run.json"])
        assert head["model"]["d_model"] == 16
        assert head["training"]["max_steps"] == 8
        losses = [json.loads(line).get("val_loss")
                  for line in found["metrics.jsonl"].splitlines()]
        losses = [x for x in losses if x is not None]
        assert losses[-1] < losses[0]


def test_the_last_tenth_is_held_out(text_file):
    corpus = cli.TrainingText.load(cli.data_source([str(text_file)]))
    assert corpus.train[0] + corpus.held_out[0] == TEXT
    assert len(corpus.held_out[0]) == pytest.approx(len(TEXT) / 10, abs=1)
    assert corpus.source == {"files": [str(text_file.resolve())]}


def test_several_files_keep_their_own_tails(tmp_path):
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.write_text(path.name * 20, encoding="utf-8")
    corpus = cli.TrainingText.load({"files": paths})
    assert corpus.train == ["a" * 18, "b" * 18]
    assert corpus.held_out == ["aa", "bb"] and corpus.name == "a, b"


def test_train_says_what_it_will_do_and_what_it_did(shell, text_file,
                                                    tmp_path):
    out_dir = tmp_path / "a run"
    out = shell.works("train", "--data", text_file, "--out", out_dir,
                      "--tokenizer", "char", *TINY, "--seed", 3)
    for piece in ("text.txt", "tokens to train on", "held out", "parameters",
                  "8 steps", "cpu", "about", "step 0 of 8", "step 8 of 8",
                  "bits per byte", "loss.png",
                  f"minillm sample '{out_dir}'"):
        assert piece in out, piece
    assert "\r" not in out and "%|" not in out  # lines, not a bar


def test_preset_gives_defaults_that_options_change(shell, text_file,
                                                   tmp_path):
    out = tmp_path / "run"
    shell.works("train", "--data", text_file, "--out", out, "--preset",
                "tales-1m", "--vocab-size", 260, *TINY, "--max-steps", 1)
    model = json.loads((out / "run.json").read_text("utf-8"))["model"]
    assert model["d_model"] == 16 and model["d_ff"] == 64  # follows d_model
    assert model["vocab_size"] == 260 and model["bias"] is True


def test_a_field_that_is_a_dict_is_given_as_json(shell, text_file, tmp_path):
    options = ["--data", text_file, "--preset", "llama-tiny", "--vocab-size",
               260, *TINY, "--n-kv-heads", 1, "--max-steps", 1]
    scaling = '{"rope_type": "linear", "factor": 2.0}'
    out = tmp_path / "run"
    shell.works("train", *options, "--out", out, "--rope-scaling", scaling)
    model = json.loads((out / "run.json").read_text("utf-8"))["model"]
    assert model["rope_scaling"] == json.loads(scaling)
    assert model["norm"] == "rms" and model["n_kv_heads"] == 1
    shell.works("train", "--data", text_file, "--out", out, "--resume",
                "--max-steps", 2)
    for wrong in ("linear", "[1]", "{"):
        shell.refuses("train", *options, "--out", tmp_path / "no",
                      "--rope-scaling", wrong,
                      says=("--rope-scaling takes", "rope_type", wrong))
    shell.refuses("train", *options, "--out", tmp_path / "no",
                  "--rope-scaling", '{"rope_type": "yarn"}', says=("yarn",))


def test_existing_directory_is_never_touched(shell, run_dir, text_file,
                                             tmp_path):
    before = files_of(run_dir)
    shell.refuses("train", "--data", text_file, "--out", run_dir, *TINY,
                  says=("already holds a run", "--resume"))
    shell.refuses("quickstart", "--out", run_dir, says=("already holds",))
    assert files_of(run_dir) == before
    shell.refuses("train", "--data", text_file, "--out", tmp_path,
                  says=("already holds files", "another --out"))
    shell.refuses("train", "--data", text_file, "--out", text_file,
                  says=("is a file",))


def test_next_free_counts_up(tmp_path):
    path = tmp_path / "quickstart"
    assert cli.next_free(path) == path
    path.mkdir()
    (tmp_path / "quickstart-2").mkdir()
    assert cli.next_free(path) == tmp_path / "quickstart-3"


# -- corpora by name, directories, rows


@pytest.fixture
def documents(tmp_path):
    """Write two hundred short documents as JSON lines."""
    folder = tmp_path / "texts"
    folder.mkdir()
    with open(folder / "a.jsonl", "w", encoding="utf-8") as f:
        for i in range(200):
            f.write(json.dumps({"text": f"Zoë has {i} kites."}) + "\n")
    return folder


def test_documents_are_held_out_whole(documents):
    from minillm.corpora import load_corpus

    corpus = cli.TrainingText.load(cli.data_source([str(documents)]))
    assert corpus.train == list(load_corpus(documents, split="train"))
    assert corpus.held_out == list(load_corpus(documents, split="val"))
    assert 10 < len(corpus.held_out) < 35 and corpus.name == "texts"
    parts = cli.open_splits(corpus.source)
    everything = sum(map(list, parts.values()), [])
    assert len(set(everything)) == len(everything) == 200


def test_train_on_a_directory_resumes_and_is_measured_on_the_test_split(
        shell, documents, tmp_path):
    from minillm.corpora import load_corpus

    out = tmp_path / "run"
    assert "texts: " in shell.works(
        "train", "--data", documents, "--out", out, "--vocab-size", 270,
        *TINY)
    shell.works("train", "--out", out, "--resume", "--max-steps", 10)
    test = list(load_corpus(documents, split="test"))
    size = sum(len(doc.encode("utf-8")) for doc in test)
    assert f"{size:,} bytes" in shell.works("eval", out)
    again = shell.works("eval", out, "--data", documents / "a.jsonl")
    size = sum(len(f"Zoë has {i} kites.".encode()) for i in range(200))
    assert f"{size:,} bytes" in again


def test_another_field_and_parquet(shell, tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table(
        {"body": [f"Zoë has {i} kites." for i in range(200)]}), path)
    words = ["train", "--data", path, "--out", tmp_path / "run",
             "--vocab-size", 270, *TINY]
    shell.refuses(*words, says=("no field 'text'; there is body",))
    shell.works(*words, "--text-field", "body")


def test_train_on_the_standard_library(shell, tmp_path):
    out = tmp_path / "run"
    words = ["train", "--data", "python", "--max-bytes", 100_000, "--out",
             out, "--vocab-size", 300, *TINY]
    assert "python: " in shell.works(*words)
    source = json.loads((out / "data.json").read_text("utf-8"))
    assert source == {"corpus": "python", "max_bytes": 100_000}
    assert "this model" in shell.works("eval", out, "--max-bytes", 5000)


def test_hub_corpora_are_not_read_whole_unless_asked_for():
    assert cli.data_source(["tinystories"])["max_bytes"] == 100_000_000
    assert cli.data_source(["shakespeare"])["max_bytes"] is None


def test_eval_reads_only_what_it_measures(shell, tiny_recipe, tmp_path,
                                          monkeypatch):
    from minillm import tales

    out = tmp_path / "run"
    shell.works("train", "--data", "tales", "--out", out, "--max-steps", 2)

    def unused():
        raise AssertionError("the floor of another text was computed")

    monkeypatch.setattr(tales, "entropy_floor", unused)
    source = json.loads((out / "data.json").read_text("utf-8"))
    source["train_bytes"] = 10**12  # writing these would take days
    (out / "data.json").write_text(json.dumps(source), encoding="utf-8")
    assert "times the floor" in shell.works("eval", out)


def test_one_recipe_has_one_tokenizer(monkeypatch):
    from dataclasses import replace

    from minillm import tales
    from minillm.loading import tokenizer_hash
    from minillm.train import quickstart_recipe

    recipe = quickstart_recipe()
    recipe = replace(
        recipe, model=replace(recipe.model, vocab_size=300),
        corpus_bytes=30_000, val_bytes=3000, tokenizer_bytes=10_000)
    ours = cli.make_tokenizer(tales.corpus(30_000), "bpe", 300,
                              n_bytes=10_000)
    theirs = recipe.tokenizer_and_tokens()[0]
    assert tokenizer_hash(ours) == tokenizer_hash(theirs)


@pytest.mark.parametrize("content", ["[]", "{}", '{"x": 1}', "{"])
def test_a_damaged_note_of_the_data(shell, run_dir, content):
    (run_dir / "data.json").write_text(content, encoding="utf-8")
    shell.refuses("eval", run_dir, says=("data.json",))


@given(st.lists(st.text(max_size=9), max_size=9), st.integers(0, 40))
def test_beginning_takes_so_many_bytes(docs, n):
    got = list(cli.beginning(docs, n))
    whole, text = "".join(docs), "".join(got)
    assert whole.startswith(text)
    size, full = len(text.encode()), len(whole.encode())
    assert min(n, full) - 3 <= size <= n or size == full
    uncut = list(cli.beginning(docs, n, cut=False))
    if all(len(doc.encode()) <= n for doc in docs):
        assert uncut == docs[: len(uncut)]


# -- download and prepare


@pytest.fixture
def plays(tmp_path, monkeypatch):
    """Put a small text where Shakespeare would be, offline."""
    import hashlib

    from minillm import corpora

    data = TEXT.encode("utf-8")
    monkeypatch.setenv("MINILLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(corpora.REMOTES, "shakespeare", corpora.Remote(
        "plays", {"train": "", "val": ""}, url="http://127.0.0.1:9/x.txt",
        sha256=hashlib.sha256(data).hexdigest(), size=len(data)))
    return data


def test_without_a_network_the_commands_say_what_to_do(shell, plays,
                                                       tmp_path):
    says = ("127.0.0.1:9", "minillm download shakespeare",
            str(tmp_path / "cache" / "corpora" / "shakespeare.txt"))
    shell.refuses("download", "shakespeare", says=says)
    shell.refuses("train", "--data", "shakespeare", "--out",
                  tmp_path / "run", says=says)
    assert not (tmp_path / "run").exists()


def test_shakespeare_from_the_cache(shell, plays, tmp_path):
    path = tmp_path / "cache" / "corpora" / "shakespeare.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(plays)
    assert str(path) in shell.works("download", "shakespeare")
    out = tmp_path / "run"
    shell.works("train", "--data", "shakespeare", "--out", out,
                "--tokenizer", "char", *TINY)
    held_out = TEXT[int(0.9 * len(TEXT)):]
    assert f"{len(held_out.encode('utf-8')):,} bytes" in shell.works(
        "eval", out)


def test_prepare_writes_shards_of_every_split(shell, documents, tmp_path):
    from minillm.corpora import load_corpus
    from minillm.loading import Shards
    from minillm.tokenizer import load_tokenizer

    out = tmp_path / "shards"
    words = ["prepare", "--data", documents, "--out", out, "--vocab-size",
             270, "--shard-tokens", 500]
    printed = shell.works(*words)
    tokenizer = load_tokenizer(out / "tokenizer.json")
    for split in ("train", "val", "test"):
        assert f"\n{split}" in "\n" + printed
        docs = list(load_corpus(documents, split=split))
        ids = Shards(out / split)[:]
        assert ids.tolist() == tokenizer.encode_documents(docs).tolist()
    before = files_of(out)
    assert len([f for f in before if f.endswith(".bin")]) > 3
    assert f"minillm train --data {out}" in printed
    assert shell.works(*words) == printed  # nothing is left to do
    assert files_of(out) == before


def test_prepare_goes_on_after_a_stop(shell, documents, tmp_path,
                                      monkeypatch):
    from minillm import loading

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    words = ["prepare", "--data", documents, "--vocab-size", 270,
             "--shard-tokens", 300, "--out"]
    shell.works(*words, whole)
    write_shard, n = loading.write_shard, []

    def stop(*args, **options):
        n.append(1)
        if len(n) == 3:
            raise KeyboardInterrupt
        return write_shard(*args, **options)

    monkeypatch.setattr(loading, "write_shard", stop)
    code, out, err = shell(*words, broken)
    assert code == 130 and "the same command goes on" in out and not err
    monkeypatch.undo()
    assert files_of(broken) != files_of(whole)
    shell.works(*words, broken)
    kept = {n: f for n, f in files_of(broken).items() if ".lock" not in n}
    assert kept == {n: f for n, f in files_of(whole).items()
                    if ".lock" not in n}


def test_prepare_with_workers_and_a_tokenizer_of_ones_own(
        shell, runs, text_file, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    words = ["prepare", "--data", text_file, "--tokenizer",
             runs / "char" / "tokenizer.json", "--out"]
    shell.works(*words, one)
    shell.works(*words, two, "--workers", 2)
    assert {n: f for n, f in files_of(one).items() if ".lock" not in n} == {
        n: f for n, f in files_of(two).items() if ".lock" not in n}
    assert sorted(p.name for p in one.iterdir() if p.is_dir()) == [
        "train", "val"]


def test_train_on_shards_is_the_training_on_their_texts(
        shell, documents, tmp_path):
    shards, one, two = (tmp_path / n for n in ("shards", "one", "two"))
    shell.works("prepare", "--data", documents, "--out", shards,
                "--vocab-size", 270)
    shell.works("train", "--data", shards, "--out", one, *TINY)
    shell.works("train", "--data", documents, "--out", two, "--vocab-size",
                270, *TINY)
    losses = [[json.loads(line).get("val_loss") for line in
               (run / "metrics.jsonl").read_text("utf-8").splitlines()]
              for run in (one, two)]
    assert losses[0] == losses[1]
    shell.works("train", "--out", one, "--resume", "--max-steps", 10)
    shutil.rmtree(documents)  # the shards have the text
    out = shell.works("eval", one)
    assert "5-gram" in out and "token frequencies" in out


def test_shards_that_do_not_fit(shell, runs, documents, tmp_path):
    shards = tmp_path / "shards"
    shell.works("prepare", "--data", documents, "--out", shards,
                "--vocab-size", 270)
    words = ["train", "--out", tmp_path / "run", *TINY, "--data", shards]
    shell.refuses(*words, "--tokenizer", "char", says=("--tokenizer bpe",))
    shell.refuses(*words, documents, says=("holds shards",))
    shell.refuses(*words, "--max-bytes", 5000, says=("holds shards",))
    manifest = shards / "train" / "manifest.json"
    content = json.loads(manifest.read_text("utf-8"))
    manifest.write_text(json.dumps(content | {"complete": False}), "utf-8")
    shell.refuses(*words, says=("not finished",))
    shutil.rmtree(shards / "val")
    manifest.write_text(json.dumps(content), "utf-8")
    shell.refuses(*words, says=("no shards in val",))
    assert not (tmp_path / "run").exists()


def test_eval_on_shards(shell, documents, tmp_path):
    shards, run = tmp_path / "shards", tmp_path / "run"
    shell.works("prepare", "--data", documents, "--out", shards,
                "--vocab-size", 300)
    shell.works("train", "--data", shards, "--out", run, *TINY)
    assert "this model" in shell.works("eval", run, "--data", shards)


def test_data_that_minillm_wrote_is_not_text(shell, runs, documents,
                                             text_file, tmp_path):
    shards, out = tmp_path / "shards", ["--out", tmp_path / "run", *TINY]
    shell.works("prepare", "--data", documents, "--out", shards,
                "--vocab-size", 300)
    shell.refuses("train", *out, "--data", shards / "train",
                  says=("one split of shards", str(shards)))
    shell.refuses("train", *out, "--data", runs / "char", says=("is a run",))
    shutil.rmtree(shards / "train")
    shutil.rmtree(shards / "val")
    shell.refuses("train", *out, "--data", shards,
                  says=("not finished", "minillm prepare"))
    shell.refuses("eval", runs / "char", "--data", runs / "bpe",
                  says=("is a run",))


def test_plain_text_beside_rows_is_refused(shell, text_file, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"A hen, {i}."}) + "\n"
                            for i in range(50)), encoding="utf-8")
    shell.refuses("train", "--data", text_file, rows, "--out",
                  tmp_path / "run", *TINY, says=("text.txt",))
    assert not (tmp_path / "run").exists()


def test_prepare_refuses_a_small_vocabulary_before_it_starts(
        shell, documents, tmp_path):
    shell.refuses("prepare", "--data", documents, "--out", tmp_path / "s",
                  "--vocab-size", 100, says=("--vocab-size", "257"))
    assert not (tmp_path / "s").exists()


def test_help_of_a_command(shell):
    assert shell.works("help", "train") == shell.works("train", "--help")


def test_shards_of_stories_keep_their_floor(shell, tiny_recipe, tmp_path):
    shards, out = tmp_path / "shards", tmp_path / "run"
    shell.works("prepare", "--data", "tales", "--out", shards,
                "--vocab-size", 300)
    shell.works("train", "--data", shards, "--out", out, *TINY)
    assert json.loads((out / "run.json").read_text("utf-8"))["floor"]
    assert "times the floor" in shell.works("eval", out)


def test_prepare_with_few_documents(shell, tmp_path):
    from minillm.corpora import split_of

    names = {split: [f"{i}.txt" for i in range(99)
                     if split_of(f"{i}.txt") == split]
             for split in ("train", "val", "test")}

    def prepare(**counts):
        folder = tmp_path / "-".join(f"{k}{n}" for k, n in counts.items())
        folder.mkdir()
        for split, n in counts.items():
            for name in names[split][:n]:
                (folder / name).write_text("some words", encoding="utf-8")
        return ["prepare", "--data", folder, "--vocab-size", 260, "--out",
                tmp_path / f"of-{folder.name}"]

    assert "test" not in shell.works(*prepare(train=3, val=1)).split()
    words = prepare(train=3)
    shell.refuses(*words, says=("no text in split 'val'",))
    assert not Path(words[-1]).exists()
    shell.refuses(*prepare(val=1), says=("no text in split 'train'",))


def test_prepare_refuses_what_does_not_fit(shell, runs, documents, text_file,
                                           tmp_path):
    out = tmp_path / "shards"
    words = ["prepare", "--out", out, "--vocab-size", 270, "--data"]
    shell.works(*words, documents)
    shell.refuses(*words, text_file, says=("another text", "another --out"))
    shell.refuses(*words, documents, "--vocab-size", 260,
                  says=("--vocab-size is 260", "another --out"))
    shell.refuses(*words, documents, "--tokenizer",
                  runs / "bpe" / "tokenizer.json",
                  says=("another tokenizer", "another --out"))
    shell.refuses(*words, documents, "--tokenizer", tmp_path / "none.json",
                  says=("no file", "none.json"))
    shell.refuses("prepare", "--data", documents, "--out", runs / "bpe",
                  says=("already holds a run",))
    shell.refuses("prepare", "--data", documents, "--out", tmp_path,
                  says=("already holds files",))


# -- resuming


def test_resume_goes_on_with_everything_from_the_run(shell, run_dir):
    out = shell.works("train", "--out", run_dir, "--resume",
                      "--max-steps", 12)
    assert "12 steps" in out and "step 0 of" not in out
    assert "for 4 steps of" in out  # the time is that of what is left
    assert json.loads((run_dir / "data.json").read_text("utf-8"))["files"]
    steps = [json.loads(line)["step"] for line in
             (run_dir / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert steps == sorted(steps) and steps[0] == 0 and steps[-1] == 12


def test_resume_refuses_what_does_not_fit(shell, run_dir, tmp_path):
    again = ["train", "--out", run_dir, "--resume"]
    shell.refuses(*again, says=("done all its 8 steps", "--max-steps"))
    more = [*again, "--max-steps", 12]
    shell.refuses(*more, "--d-model", 32, says=("d_model = 16", "32"))
    shell.refuses(*more, "--tokenizer", "bpe", says=("--tokenizer char",))
    other = tmp_path / "other.txt"
    other.write_text(TEXT[::-1], encoding="utf-8")
    shell.refuses(*more, "--data", other, says=("another text",))
    shell.refuses("train", "--resume", "--out", tmp_path / "none",
                  says=("no run in", "to resume"))
    (run_dir / "data.json").unlink()
    shell.refuses(*more, says=("give --data",))


@pytest.mark.skipif(os.name == "nt", reason="signals to one process: POSIX")
def test_ctrl_c_saves_and_says_how_to_go_on(shell, text_file, tmp_path):
    out = tmp_path / "run"
    words = ["train", "--data", text_file, "--out", out, "--tokenizer",
             "char", *TINY, "--max-steps", 1_000_000, "--eval-every", 50]
    process = start(*words)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("step 0 of"):
            break
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err == "" and "stopped and saved at step" in rest
    command = rest.strip().splitlines()[-1].split()
    assert command == ["minillm", "train", "--out", str(out), "--resume"]
    step = cli.steps_done(out)
    assert 0 < step < 1_000_000 and f"at step {step:,};" in rest
    shell.works(*command[1:], "--max-steps", step + 2)
    assert cli.steps_done(out) == step + 2


def test_ctrl_c_elsewhere_is_quiet(shell, monkeypatch):
    def interrupted(run_dir):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "open_run", interrupted)
    assert shell("info", "x") == (130, "", "")


# -- what a run may look like


def test_no_run(shell, tmp_path):
    for command in ("sample", "eval", "info"):
        shell.refuses(command, tmp_path / "x", says=("no run in",))
        shell.refuses(command, tmp_path, says=("not a minillm run",))


def test_truncated_weights(shell, run_dir):
    for path in weights_of(run_dir):
        path.write_bytes(path.read_bytes()[:-100])
    for command in ("sample", "eval", "info"):
        shell.refuses(command, run_dir, says=("model.safetensors", "damaged"))
    shell.refuses("train", "--out", run_dir, "--resume", "--max-steps", 12,
                  says=("damaged",))


def test_one_damaged_checkpoint_is_skipped_with_one_line(shell, run_dir):
    newest = weights_of(run_dir)[-1]
    newest.write_bytes(newest.read_bytes()[:-100])
    code, out, err = shell("info", run_dir)
    assert code == 0 and "step 4 of 8" in out
    assert err.startswith("minillm: note: ") and err.count("\n") == 1


def test_a_pickle_is_never_loaded(shell, run_dir, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    import pickle

    import torch

    bomb = pickle.dumps(Bomb())
    for path in weights_of(run_dir):
        path.write_bytes(bomb)
    shell.refuses("sample", run_dir, says=("is a pickle",))
    single = tmp_path / "model.pt"
    torch.save({"x": torch.zeros(1)}, single)
    shell.refuses("sample", single, says=("is a zip", "a pickle runs"))
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    "name, says",
    [
        ("run.json", ("no run.json",)),
        ("tokenizer.json", ("0 tokens in its tokenizer.json",)),
        ("checkpoints", ("no checkpoint yet",)),
        ("checkpoints/step-*/model.safetensors", ("is missing",)),
        ("checkpoints/step-*/checkpoint.json", ("no checkpoint.json",)),
    ],
)
def test_missing_parts_of_a_run(shell, run_dir, name, says):
    for path in run_dir.glob(name):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shell.refuses("sample", run_dir, says=says)


@pytest.mark.parametrize("content", ["{", "[]", '{"format": "x"}', "\xff"])
@pytest.mark.parametrize("name", ["run.json", "tokenizer.json"])
def test_foreign_files_in_a_run(shell, run_dir, name, content):
    (run_dir / name).write_text(content, encoding="latin-1")
    shell.refuses("sample", run_dir, says=(name,))
    shell.refuses("train", "--out", run_dir, "--resume", says=(name,))


def test_tokenizer_of_another_run(shell, runs, run_dir):
    shutil.copy(runs / "bpe" / "tokenizer.json", run_dir / "tokenizer.json")
    shell.refuses("sample", run_dir, says=("300 tokens", "tokenizer.json"))


# -- sampling


def test_sample_starts_with_the_prompt_and_repeats_by_seed(shell, runs):
    words = ["sample", runs / "bpe", "--prompt", "Ann has",
             "--max-new-tokens", 20]
    first = shell.works(*words)
    assert first.startswith("Ann has") and len(first) > len("Ann has\n")
    assert first == shell.works(*words)
    assert first != shell.works(*words, "--seed", 1)
    greedy = [*words, "--temperature", 0]
    assert shell.works(*greedy) == shell.works(*greedy, "--seed", 1)
    three = shell.works(*words, "--n", 3)
    assert three.startswith(first) and three.count("Ann has") >= 3


def test_sample_prints_the_prompt_alone_for_no_tokens(shell, runs):
    got = shell.works("sample", runs / "char", "--prompt", "Zoë",
                      "--max-new-tokens", 0)
    assert got == "Zoë\n"


def test_prompt_with_an_unknown_character(shell, runs):
    out = shell.refuses("sample", runs / "char", "--prompt", "Ann €",
                        says=("'€'", "U+20AC", "position 4"))
    assert out == ""
    shell.works("sample", runs / "bpe", "--prompt", "Ann €",
                "--max-new-tokens", 1)


@pytest.mark.parametrize(
    "option, value",
    [("--temperature", -1), ("--temperature", "nan"), ("--top-k", 0),
     ("--top-p", 0), ("--top-p", 1.5), ("--repetition-penalty", 0)],
)
def test_sampling_settings_out_of_range(shell, runs, option, value):
    name = option[2:].replace("-", "_")
    out = shell.refuses("sample", runs / "char", option, value, says=(name,))
    assert out == ""


# -- eval, info, bench


def test_eval_measures_the_held_out_tenth(shell, runs):
    for name in ("char", "bpe"):
        out = shell.works("eval", runs / name)
        size = len(TEXT[int(0.9 * len(TEXT)):].encode("utf-8"))
        assert f"{size:,} bytes" in out
        for row in ("token frequencies", "gzip -9", "5-gram", "this model",
                    "perplexity"):
            assert row in out
        assert "entropy floor" not in out


def test_eval_agrees_with_the_evaluation_chapter(shell, runs, text_file):
    from minillm.evaluate import bits_per_byte, score_tokens
    from minillm.train import load_run

    run = load_run(runs / "bpe")
    ids = run.tokenizer.encode(TEXT)
    nats = score_tokens(run.model, [run.tokenizer.end_of_text, *ids])
    bits = bits_per_byte(float(nats.sum()), len(TEXT.encode("utf-8")))
    out = shell.works("eval", runs / "bpe", "--data", text_file)
    assert f"this model          {bits:.3f} [" in out


def test_eval_on_stories_shows_the_floor(shell, runs):
    out = shell.works("eval", runs / "bpe", "--data", "tales",
                      "--max-bytes", 12_000)
    assert "entropy floor" in out and "times the floor" in out


def test_eval_without_known_data(shell, run_dir):
    (run_dir / "data.json").unlink()
    shell.refuses("eval", run_dir, says=("give --data",))


def test_eval_when_the_text_is_gone(shell, run_dir, tmp_path):
    gone = {"files": [str(tmp_path / "gone.txt")]}
    (run_dir / "data.json").write_text(json.dumps(gone), encoding="utf-8")
    shell.refuses("eval", run_dir, says=("no file", "gone.txt"))


def test_info_shows_configs_losses_and_hashes(shell, runs):
    import hashlib

    out = shell.works("info", runs / "char")
    weights = weights_of(runs / "char")[-1]
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()[:12]
    for piece in ("step 8 of 8", "char tokenizer", "parameters", "d_model",
                  "max_steps", digest, "metrics.jsonl", "bits/byte"):
        assert piece in out, piece


def test_bench_prints_the_table_and_names_the_bottleneck(shell):
    out = shell.works("bench", "--batch-size", 1, "--context-length", 8,
                      "--repeats", 1, "--device", "cpu")
    for piece in ("memory of a step", "tokens/s", "MFU", "bound"):
        assert piece in out, piece


def test_bench_tokenizer_prints_a_row_per_rival(shell, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The hen slept. Then the wren sang, twice.\n" * 200,
                    encoding="utf-8")
    out = tmp_path / "rows.json"
    options = ["--data", text, "--megabytes", 0.2, "--repeats", 1]
    shown = shell.works("bench", "tokenizer", *options, "--out", out)
    result = json.loads(out.read_text(encoding="utf-8"))
    for row in result["rows"]:
        assert row["task"] in shown and row["seconds"] > 0
    assert {row["who"] for row in result["rows"]} == {
        "minillm", "tokenizers", "tiktoken"}
    large = [row for row in result["rows"] if "MB file" in row["task"]]
    assert [row["task"].split()[0] for row in large] == ["train", "encode"]
    shell.refuses("bench", "tokenizer", *options, "--out", out,
                  says=("exists", "rows.json"))


def test_a_text_file_with_a_separator_is_many_documents(shell, tmp_path):
    path = tmp_path / "all.txt"
    path.write_text("<|endoftext|>\n".join(
        f"The hen number {i} slept.\n" for i in range(200)),
        encoding="utf-8")
    shell.refuses("prepare", "--data", path, "--max-bytes", 2000, "--out",
                  tmp_path / "no", says=("--separator",))
    out = shell.works("prepare", "--data", path, "--out", tmp_path / "shards",
                      "--separator", "<|endoftext|>", "--vocab-size", 300)
    n_docs = [int(line.split()[1]) for line in out.splitlines()
              if "documents" in line]
    assert len(n_docs) == 3 and sum(n_docs) == 200


def test_bench_model_prints_a_row_beside_its_peer(shell, tmp_path):
    pytest.importorskip("transformers")
    out = tmp_path / "rows.json"
    options = ["--sizes", "0.8M", "--repeats", 1, "--new-tokens", 4]
    shown = shell.works("bench", "model", *options, "--out", out)
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert [row["task"].split()[0] for row in rows] == [
        "step", "step", "generate", "generate"] * 2
    for ours, theirs in zip(rows[::2], rows[1::2]):
        assert (ours["who"], theirs["who"]) == ("minillm", "transformers")
        assert ours["ratio"] == pytest.approx(
            ours["tokens_per_s"] / theirs["tokens_per_s"])
        assert ours["task"] == theirs["task"] and ours["task"] in shown
    assert "GFLOP/s" in shown and "GB/s" in shown
    shell.refuses("bench", "model", *options, "--out", out, says=("exists",))
    shell.refuses("bench", "model", "--new-tokens", 300, says=("224",))
    shell.refuses("bench", "model", "--sizes", "11M", says=("11M",))


def test_bench_train_prints_the_loop_beside_its_peer(shell, tmp_path):
    pytest.importorskip("transformers")
    out = tmp_path / "rows.json"
    options = ["--sizes", "0.8M", "--dtypes", "bfloat16", "--repeats", 1,
               "--loop-steps", 3, "--out", out]
    shown = shell.works("bench", "train", *options)
    result = json.loads(out.read_text(encoding="utf-8"))
    ours, theirs = result["rows"]
    assert (ours["who"], theirs["who"]) == ("minillm", "transformers")
    assert ours["task"] == theirs["task"] == "train 0.8M bfloat16"
    assert ours["ratio"] == pytest.approx(
        ours["tokens_per_s"] / theirs["tokens_per_s"])
    assert ours["share"] == pytest.approx(
        ours["rate"] / result["ceiling"]["bfloat16"])
    parts = result["parts"]["0.8M bfloat16"]
    spent = parts["data"] + parts["clip"] + parts["rest"]
    assert ours["overhead"] == pytest.approx(spent / sum(parts.values()))
    assert theirs["overhead"] is None and result["threads"] >= 1
    for piece in ("MFU", "times", "loop", "backward", "GFLOP/s"):
        assert piece in shown, piece
    assert max(map(len, shown.splitlines())) < 140
    shell.refuses("bench", "train", *options, says=("exists",))


def test_models_that_do_other_steps_are_not_compared():
    from minillm.bench import check_losses

    check_losses("x", [[1.0, 2.0], [1.0, 2.00001]], "float32")
    check_losses("x", [[1.0]], "float32")
    for bad in (1.001, float("nan")):
        with pytest.raises(AssertionError, match="x: losses differ"):
            check_losses("x", [[1.0, 2.0], [1.0, 1.0 + bad]], "float32")


def test_bench_of_something_else(shell):
    shell.refuses("bench", "tokeniser", says=("model", "tokenizer"))
    assert "--preset" in shell.works("bench", "step", "--help")
    assert "--sizes" in shell.works("bench", "model", "--help")
    assert "--loop-steps" in shell.works("bench", "train", "--help")
    assert "--megabytes" in shell.works("bench", "tokenizer", "--help")


# -- the trainer's options and failures


def test_the_new_options_reach_the_run(shell, text_file, tmp_path,
                                       monkeypatch):
    from minillm import train

    seen = []
    monkeypatch.setattr(train, "compiled", lambda m: seen.append(m) or m)
    out = tmp_path / "run"
    shell.works(
        "train", "--data", text_file, "--out", out, "--tokenizer", "char",
        *TINY, "--optimizer", "muon", "--muon-lr", 0.01, "--schedule", "wsd",
        "--decay-fraction", 0.5, "--on-nonfinite", "skip", "--max-skipped", 3,
        "--checkpoint-blocks", "--compile", "--stats-every", 4,
        "--sample-every", 8, "--keep-checkpoints", 1, "--no-keep-best")
    training = json.loads((out / "run.json").read_text("utf-8"))["training"]
    want = {"optimizer": "muon", "muon_lr": 0.01, "schedule": "wsd",
            "decay_fraction": 0.5, "on_nonfinite": "skip", "max_skipped": 3,
            "checkpoint_blocks": True, "compile": True, "stats_every": 4,
            "sample_every": 8, "keep_checkpoints": 1, "keep_best": False}
    assert want.items() <= training.items()
    assert len(seen) == 1  # and not a second time to measure the time
    lines = (out / "metrics.jsonl").read_text("utf-8")
    assert '"stats"' in lines and '"sample"' in lines
    shell.works("train", "--out", out, "--resume", "--max-steps", 10,
                "--no-compile")
    shell.refuses("train", "--out", out, "--resume", "--max-steps", 12,
                  "--optimizer", "adamw", says=("optimizer", "muon"))


def test_the_device_is_explained_in_the_words_of_precision(shell, text_file,
                                                           tmp_path):
    from minillm.precision import explain_choice, pick_dtype
    from minillm.pretrain import TrainConfig

    cfg = TrainConfig(device="cpu", dtype="bfloat16")
    import torch

    why = explain_choice("cpu", pick_dtype("bfloat16", torch.device("cpu")))
    assert cli.device_and_reason(cfg).startswith(why + "; ")
    out = shell.works("train", "--data", text_file, "--out", tmp_path / "run",
                      "--tokenizer", "char", *TINY, "--dtype", "bfloat16")
    plan = out[out.index("device "):out.index("time ")]
    assert " ".join(plan.split()) == f"device {cli.device_and_reason(cfg)}"
    assert max(map(len, plan.splitlines())) < 80


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_missing_logger_is_found_before_the_work(
        shell, text_file, tmp_path, monkeypatch, package):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec",
        lambda name, *rest: None if name == package else find(name, *rest))
    shell.refuses("train", "--data", text_file, "--out", tmp_path / "run",
                  *TINY, "--log-to", package,
                  says=(f"pip install {package}", "metrics.jsonl"))
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_leads_to_the_doctor(shell, text_file,
                                                       tmp_path):
    out = tmp_path / "run"
    shell.refuses("train", "--data", text_file, "--out", out, "--tokenizer",
                  "char", *TINY, "--warmup-steps", 0, "--lr", 1e30,
                  "--grad-clip", "inf", "--log-every", 1,
                  says=("the loss is", "lower lr", "bad_batches",
                        f"minillm doctor {out}"))
    assert list((out / "bad_batches").glob("*.safetensors"))
    code, shown, _ = shell("doctor", out)
    assert code == 1 and "\n1. " in shown


def test_out_of_memory_says_what_needs_less(shell, text_file, tmp_path,
                                            monkeypatch):
    import torch

    from minillm.train import Trainer

    def gradients(self, batches, n_targets):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB")

    monkeypatch.setattr(Trainer, "gradients", gradients)
    code, _, err = shell("train", "--data", text_file, "--out",
                         tmp_path / "run", "--tokenizer", "char", *TINY)
    assert code == 2 and err.startswith("minillm: out of memory: ")
    for piece in ("at its peak", "batch_size=2", "grad_accum_steps=2",
                  "checkpoint_blocks=True"):
        assert piece in err, piece
    assert max(map(len, err.splitlines())) < 90


# -- the doctor


@pytest.mark.parametrize("case, fault", [
    ("plain", None), ("dead rate", "dead rate"),
    ("no zero_grad", "no zero_grad")])
def test_doctor_names_the_fault_by_text_and_exit_code(shell, tmp_path, case,
                                                      fault):
    from minillm.doctor import clinic_run

    run_dir = clinic_run(case).save(tmp_path / "run")
    before = files_of(run_dir)
    code, out, err = shell("doctor", run_dir)
    assert code == (0 if fault is None else 1) and err == ""
    assert "20 records" in out and "with statistics" in out
    assert "step 100" in out and "--try-out" in out
    if fault is None:
        assert "No fault found" in out
    else:
        assert f"\n1. {fault}\n" in out and "cure" in out
    assert max(map(len, out.splitlines())) < 80
    assert files_of(run_dir) == before


def test_doctor_tries_the_model_and_its_texts(shell, run_dir, tmp_path):
    from minillm.tokenizer import load_tokenizer

    code, out, _ = shell("doctor", run_dir, "--try-out")
    assert code in (0, 1) and "the model and its texts" in out
    # two halves that are the same text: the last tenth has been read
    path = tmp_path / "twice.txt"
    path.write_text(TEXT[:1000] * 11, encoding="utf-8")
    tokenizer = load_tokenizer(run_dir / "tokenizer.json")
    assert tokenizer.encode(TEXT[:1000])
    (run_dir / "data.json").write_text(
        json.dumps({"files": [str(path)]}), encoding="utf-8")
    code, out, _ = shell("doctor", run_dir, "--try-out")
    assert code == 1 and "validation is training text" in out
    (run_dir / "data.json").unlink()
    shell.refuses("doctor", run_dir, "--try-out", says=("--try-out out",))
    code, out, _ = shell("doctor", run_dir)
    assert code in (0, 1) and "step 8" in out


def test_doctor_needs_records(shell, run_dir):
    (run_dir / "metrics.jsonl").write_text("", encoding="utf-8")
    shell.refuses("doctor", run_dir, says=("no records", "train for a while"))


# -- speed-run and recipes


def test_speedrun_prints_what_it_does_and_reaches(shell, text_file, tmp_path):
    from minillm.speedrun import recipes

    out = shell.works("speedrun", "--data", text_file, "--steps", 2,
                      "--seed", 1)
    again = shell.works("speedrun", "--data", text_file, "--steps", 2,
                        "--seed", 1)

    def loss(text):
        return float(text.split("loss ")[1].split()[0])

    for piece in (str(text_file), f"best: {recipes()['best'].change}",
                  "2 steps", "seed 1", "nats per character", "parameters"):
        assert piece in out, piece
    assert loss(out) == loss(again) and 1 < loss(out) < 6
    assert "target" not in out  # it is Tiny Shakespeare's
    short = tmp_path / "short.txt"
    short.write_text("too short", encoding="utf-8")
    shell.refuses("speedrun", "--data", short, says=("longer text",))


def test_speedrun_says_how_to_fetch_the_text(shell, tmp_path, monkeypatch):
    monkeypatch.setenv("MINILLM_CACHE", str(tmp_path))
    shell.refuses("speedrun", says=("minillm download shakespeare",))


@pytest.mark.parametrize("name", ["gpt2", "shakespeare-10m"])
def test_recipe_prints_commands_that_train_it(shell, name):
    import shlex

    from minillm import speedrun

    recipe = (speedrun.gpt2_recipe() if name == "gpt2"
              else speedrun.shakespeare_10m_recipe())
    out = shell.works("recipe", name)
    assert max(map(len, out.splitlines())) < 80
    assert f"{recipe.training.max_steps:,} steps" in out and "H100" in out
    lines = out.replace("\\\n", " ").splitlines()
    commands = [shlex.split(x) for x in lines if x.startswith("minillm ")]
    assert len(commands) == len(recipe.before) + 1
    argv = commands[-1][2:]
    kind, default = cli.train_command(argv)
    options = cli.parse(kind, argv, name="train", default=default)
    assert options.model.d_model == recipe.model.d_model
    assert options.model.n_layers == recipe.model.n_layers
    assert options.training == recipe.training
    for words in commands[:-1]:
        assert words[1] == "prepare"
        cli.parse(cli.Prepare, words[2:], name="prepare")


@given(st.lists(st.text("abc123", min_size=1, max_size=30), max_size=9))
def test_a_folded_command_is_the_same_to_a_shell(words):
    import shlex

    line = "minillm train" + "".join(f" --{word} 1" for word in words)
    folded = cli.folded(line, width=60)
    assert shlex.split(folded.replace("\\\n", " ")) == shlex.split(line)
    assert max(map(len, folded.splitlines())) <= 60


def test_recipe_tries_its_path(shell, monkeypatch):
    from dataclasses import replace

    from minillm import speedrun

    recipe = speedrun.gpt2_recipe()
    small = replace(recipe, model=replace(
        recipe.model, vocab_size=512, d_model=16, d_ff=32, n_layers=1,
        n_heads=2, n_kv_heads=2))
    monkeypatch.setattr(speedrun, "gpt2_recipe", lambda: small)
    out = shell.works("recipe", "gpt2", "--dry-run", "--context-length", 16)
    for piece in ("parameters", "2 steps", "checkpoint", "resumed", "nats"):
        assert piece in out, piece
    assert "NOT" not in out


# -- quickstart and TinyTales


@pytest.fixture
def tiny_recipe(monkeypatch):
    """Shrink the quickstart from minutes to a second."""
    from minillm import tales, train
    from minillm.transformer import GPTConfig

    recipe = train.Recipe(
        GPTConfig(vocab_size=300, context_length=32, d_model=16, n_layers=1,
                  n_heads=2),
        train.TrainConfig(max_steps=4, batch_size=4, eval_every=2,
                          eval_tokens=500, align="documents", device="cpu"),
        corpus_bytes=30_000, val_bytes=3000,
    )
    floor, stories = tales.entropy_floor, cli.test_stories
    monkeypatch.setattr(train, "quickstart_recipe", lambda: recipe)
    monkeypatch.setattr(tales, "entropy_floor", lambda: floor(20))
    monkeypatch.setattr(cli, "test_stories", lambda n: stories(12_000))


def test_quickstart(shell, tiny_recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs/quickstart").mkdir(parents=True)
    out = shell.works("quickstart", "--steps", 3)
    run = str(Path("runs/quickstart-2"))
    for piece in ("parameters", "3 steps", "cpu", "about", "entropy floor",
                  "gzip -9", "5-gram", "token frequencies",
                  "times the floor", "\n1. ", "\n3. ",
                  f"minillm sample {run}", f"minillm eval {run}"):
        assert piece in out, piece
    head = json.loads(Path(run, "run.json").read_text("utf-8"))
    assert head["floor"] and head["training"]["max_steps"] == 3


def test_quickstart_for_a_given_time(shell, tiny_recipe, tmp_path):
    out = tmp_path / "run"
    shell.works("quickstart", "--minutes", 0.01, "--out", out, "--seed", 5)
    training = json.loads((out / "run.json").read_text("utf-8"))["training"]
    assert training["max_steps"] != 4 and training["seed"] == 5


def test_train_on_tales_uses_the_quickstart_and_resumes(shell, tiny_recipe,
                                                        tmp_path):
    out = tmp_path / "run"
    shell.works("train", "--data", "tales", "--out", out, "--max-steps", 2)
    before = json.loads((out / "run.json").read_text("utf-8"))
    assert before["training"]["align"] == "documents" and before["floor"]
    shell.works("train", "--out", out, "--resume", "--max-steps", 3)
    after = json.loads((out / "run.json").read_text("utf-8"))
    assert after["floor"] == before["floor"]
    assert "entropy floor" in shell.works("eval", out)


# -- consoles, pipes, disks, bugs


@pytest.mark.skipif(os.name == "nt", reason="POSIX pipes")
def test_a_closed_pipe_is_quiet(runs):
    process = start("info", runs / "char")
    process.stdout.close()  # the reader goes away before the first line
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == 141


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_behind_stdout(tmp_path):
    with open("/dev/full", "w") as full:
        process = start("--help", stdout=full)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err.startswith("minillm: no space left on device")
    assert err.count("\n") == 1


@pytest.mark.parametrize("where", ["json", "weights"])
def test_a_full_disk_in_training(shell, text_file, tmp_path, monkeypatch,
                                 where):
    import errno

    from minillm import checkpoint

    def no_room(path, content):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    broken = "write_sealed" if where == "json" else "write_tensors"
    monkeypatch.setattr(checkpoint, broken, no_room)
    code, _, err = shell("train", "--data", text_file, "--out",
                         tmp_path / "run", *TINY, "--vocab-size", 260)
    *notes, last = err.splitlines()
    assert code == 2 and last.startswith("minillm: step 8 could not be saved")
    assert "No space left on device" in last and "resume" in last
    assert "Errno" not in err
    for note in notes:  # training went on to the end, and said so
        assert note.startswith("minillm: note: ") and "goes on" in note


def test_a_full_disk_before_training(shell, text_file, tmp_path, monkeypatch):
    import errno

    from minillm import train

    def write_json(path, obj):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(train, "write_json", write_json)
    shell.refuses("train", "--data", text_file, "--out", tmp_path / "run",
                  *TINY, "--vocab-size", 260,
                  says=("no space left on device", "--resume"))


@pytest.mark.skipif(os.name == "nt", reason="file size limits are POSIX")
def test_a_write_that_fails_for_real(text_file, tmp_path):
    code = (
        "import resource, sys; from minillm.cli import main; import torch;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000));"
        "sys.exit(main(sys.argv[1:]))"
    )
    words = ["train", "--data", text_file, "--out", tmp_path / "run",
             "--tokenizer", "char", *TINY]
    ran = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)], cwd=ROOT,
        capture_output=True, encoding="utf-8",
        env={**os.environ, "PYTHONUTF8": "1"},
    )
    assert ran.returncode == 2
    lines = ran.stderr.splitlines()
    assert all(line.startswith("minillm: ") for line in lines), lines
    assert all("note:" in line for line in lines[:-1])
    assert "large" in lines[-1] and "note:" not in lines[-1]


def test_a_console_without_the_characters(runs):
    process = start(
        "sample", runs / "char", "--prompt", "Zoë", "--max-new-tokens", 0,
        env={"PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"},
    )
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "Zo?\n", "")


@pytest.mark.skipif(os.name == "nt", reason="pseudo-terminals are POSIX")
def test_a_terminal_gets_a_bar_and_no_colour(text_file, tmp_path):
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    size = struct.pack("HHHH", 24, 80, 0, 0)
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, size)
    process = start("train", "--data", text_file, "--out", tmp_path / "run",
                    "--tokenizer", "char", *TINY, stderr=theirs,
                    env={"NO_COLOR": "1", "TERM": "xterm"})
    os.close(theirs)
    seen = b""
    while True:
        try:
            piece = os.read(ours, 4096)
        except OSError:  # Linux: the other side is closed
            break
        if not piece:
            break
        seen += piece
    out = process.stdout.read()
    assert process.wait(timeout=60) == 0
    assert b"8/8" in seen and b"\r" in seen and b"\x1b" not in seen
    assert "step 0 of 8" not in out and "done" in out


def test_streams_that_are_no_files(monkeypatch):
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    assert main(["--version"]) == 0 and "minillm" in out.getvalue()
    assert main(["trian"]) == 2 and "train?" in err.getvalue()


def test_bugs_keep_their_traceback(monkeypatch):
    def broken(run_dir):
        raise KeyError("a bug")

    monkeypatch.setattr(cli, "open_run", broken)
    with pytest.raises(KeyError):
        main(["info", "x"])


def test_traceback_on_request(monkeypatch, tmp_path):
    monkeypatch.setenv("MINILLM_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError):
        main(["info", str(tmp_path / "x")])


@pytest.mark.parametrize(
    "error, says",
    [
        (MemoryError(), "--batch-size"),
        (RuntimeError("CUDA out of memory. Tried"), "--batch-size"),
        (FloatingPointError("step 3: the loss is nan"), "loss is nan"),
        (PermissionError(13, "Permission denied", "x"), "denied: x"),
        (ValueError("two\n lines"), "two lines"),
        (OSError(27, "File too large", "/Some/Path"), "file too large: /Some"),
    ],
)
def test_a_foreseen_failure_is_one_line(error, says):
    line = cli.failure_text(error)
    assert says in line and "\n" not in line


def test_bugs_are_not_foreseen():
    for error in (RuntimeError("a shape"), KeyError(1), TypeError("x")):
        assert cli.failure_text(error) is None
