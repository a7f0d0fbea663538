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
    for name in ("quickstart", "train", "sample", "eval", "bench", "info"):
        assert f"\n  {name} " in out


def test_version_is_the_package_version(shell):
    import minillm

    assert shell.works("--version") == f"minillm {minillm.__version__}\n"


@pytest.mark.parametrize(
    "name, option",
    [("quickstart", "--minutes"), ("train", "--resume"),
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

    from minillm.train import TrainConfig
    from minillm.transformer import GPTConfig

    out = shell.works("train", "--help")
    for f in (*fields(GPTConfig), *fields(TrainConfig)):
        assert f"--{f.name.replace('_', '-')}" in out


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from minillm.cli import main; main(['--help']);"
        "main(['sample', '--help']);"
        "heavy = {'torch', 'numpy', 'tiktoken', 'datasets', 'matplotlib'};"
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
        ("train --data t --out o --seed -1", ("--seed is -1",)),
        ("train --data t --out o --preset tiny", ("'tiny' is unknown",)),
        ("train --data t", ("missing: --out",)),
        ("train --out o", ("missing: --data",)),
        ("train --data tales t --out o", ("either tales or files",)),
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


def test_a_directory_is_no_text(shell, tmp_path):
    shell.refuses("train", "--data", tmp_path, "--out", tmp_path / "run",
                  says=("is a directory",))


def test_bpe_needs_room_for_the_bytes(shell, text_file, tmp_path):
    shell.refuses("train", "--data", text_file, "--out", tmp_path / "run",
                  "--vocab-size", 100, says=("vocab_size=100", "257"))


def test_byte_order_mark_is_dropped(tmp_path):
    path = tmp_path / "bom.txt"
    path.write_bytes(b"\xef\xbb\xbfabc\r\n")
    assert cli.read_text(path) == "abc\r\n"


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
    corpus = cli.load_corpus({"files": [str(text_file)]})
    assert corpus.train[0] + corpus.held_out[0] == TEXT
    assert len(corpus.held_out[0]) == pytest.approx(len(TEXT) / 10, abs=1)
    assert corpus.source == {"files": [str(text_file.resolve())]}


def test_several_files_keep_their_own_tails(tmp_path):
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.write_text(path.name * 20, encoding="utf-8")
    corpus = cli.load_corpus({"files": paths})
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
    shell.refuses("sample", single, says=("is a pickle",))
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    "name, says",
    [
        ("run.json", ("no run.json",)),
        ("tokenizer.json", ("0 tokens in its tokenizer.json",)),
        ("checkpoints", ("no checkpoint yet",)),
        ("checkpoints/step-*/model.safetensors", ("no file",)),
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
        for row in ("token frequencies", "gzip -9", "this model",
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
                  "gzip -9", "token frequencies", "times the floor", "\n1. ",
                  "\n3. ", f"minillm sample {run}", f"minillm eval {run}"):
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

    from safetensors import SafetensorError

    from minillm import train

    def write_json(path, obj):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    def save_file(tensors, path):
        raise SafetensorError("Error while serializing: I/O error: No space "
                              "left on device (os error 28)")

    monkeypatch.setattr(train, *(("write_json", write_json) if where == "json"
                                 else ("save_file", save_file)))
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
    assert ran.stderr.startswith("minillm: ") and "large" in ran.stderr
    assert ran.stderr.count("\n") == 1


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
    ],
)
def test_one_line(error, says):
    line = cli.one_line(error)
    assert says in line and "\n" not in line


def test_one_line_leaves_bugs_alone():
    for error in (RuntimeError("a shape"), KeyError(1), TypeError("x")):
        assert cli.one_line(error) is None
