"""Run everything that proves the project: lint, notebooks, tests, offline.

    python tools/run_tests.py [--no-notebooks] [--slow]

1. ruff on notebooks, tests and tools
2. the model that several chapters share, trained once with all cores
3. nbdev_test: every notebook, two side by side, one torch thread each
4. pytest, two test files side by side, one torch thread each

The whole run has a socket guard on its PYTHONPATH: nothing may leave the
machine. Ends with the first step that fails and with that step's exit code.
"""

import os
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sysconfig.get_path("scripts"))
WORKERS = "2"


def environment(**extra: str) -> dict[str, str]:
    """Return the variables that every step runs with."""
    return {
        **os.environ,
        **extra,
        "PYTHONPATH": str(ROOT / "tests" / "guard"),
        "PYTHONUTF8": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "MPLBACKEND": "agg",  # interactive backends have no place in a test
    }


def run(title: str, command: list[str], **extra_env: str) -> None:
    """Run one step; leave with its exit code if it fails."""
    print(f"== {title}", flush=True)
    start = time.perf_counter()
    env = environment(**extra_env)
    code = subprocess.run(command, cwd=ROOT, env=env).returncode
    finish(title, start, code)


def run_test_files(**extra_env: str) -> None:
    """Run pytest on each file of tests/, two at a time."""
    print("== tests", flush=True)
    start = time.perf_counter()
    env, code = environment(**extra_env), 0

    def test(path: Path) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "pytest", "-q", str(path)]
        return subprocess.run(
            command, cwd=ROOT, env=env, text=True, encoding="utf-8",
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    files = (ROOT / "tests").glob("test_*.py")
    files = sorted(files, key=lambda p: p.stat().st_size, reverse=True)
    with ThreadPoolExecutor(int(WORKERS)) as pool:
        jobs = {pool.submit(test, path): path for path in files}
        for job in as_completed(jobs):
            done = job.result()
            lines = done.stdout.strip().splitlines() or [""]
            print(f"{jobs[job].name}: {lines[-1]}", flush=True)
            if done.returncode:
                print(done.stdout, flush=True)
                code = done.returncode
    finish("tests", start, code)


def finish(title: str, start: float, code: int) -> None:
    """Say how long a step took; leave with its exit code if it failed."""
    print(f"== {title}: {time.perf_counter() - start:.0f} s", flush=True)
    if code:
        print(f"== {title} failed with exit code {code}", file=sys.stderr)
        sys.exit(code)


def main() -> None:
    python = sys.executable
    one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    run("lint", [python, "-m", "ruff", "check", "."])
    if "--no-notebooks" not in sys.argv:
        warm = "from minillm.train import tales_model; tales_model()"
        run("shared model", [python, "-c", warm])
        command = [
            str(BIN / "nbdev_test"), "--n_workers", WORKERS,
            "--do_print", "--timing",
        ]  # fmt: skip
        if "--slow" in sys.argv:
            command += ["--flags", "slow"]
        run("notebooks", command, **one_thread)
    run_test_files(**one_thread)
    print("== all passed")


if __name__ == "__main__":
    main()
