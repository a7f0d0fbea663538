"""Build the book: HTML, PDF, or both.

    python tools/build_book.py html|pdf|all [--workers N]

Notebooks are executed first, several at a time, into the cache that Jupyter
Book reads; HTML and PDF share it, so each notebook runs once per version of
the code. The results are _build/html/index.html and _build/minillm.pdf.
Exit code 2: the PDF's system packages are missing; 1: the build failed.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "_build"
sys.path.insert(0, str(ROOT / "_ext"))
CELL_TIMEOUT = 600  # seconds

# What the PDF needs: Debian's package, and how to see that it is there.
PROGRAMS = {
    "lualatex": "texlive-luatex",
    "latexmk": "latexmk",
    "kpsewhich": "texlive-binaries",
    "fc-list": "fontconfig",
    "make": "make",
}
TEX_FILES = {
    "luaotfload.sty": "texlive-luatex",
    "fontspec.sty": "texlive-latex-recommended",
    "booktabs.sty": "texlive-latex-recommended",
    "titlesec.sty": "texlive-latex-extra",
    "tabulary.sty": "texlive-latex-extra",
    "needspace.sty": "texlive-latex-extra",
    "lmroman10-regular.otf": "fonts-lmodern",
    "unicode-math.sty": "texlive-latex-recommended",
    "texgyrepagella-regular.otf": "fonts-texgyre",
    "texgyrepagella-math.otf": "fonts-texgyre-math",
}
FONTS = {
    "DejaVu Sans Mono": "fonts-dejavu",
    "Noto Sans Mono CJK SC": "fonts-noto-cjk",
    "Noto Sans Devanagari": "fonts-noto-core",
    "Symbola": "fonts-symbola",
}


def output_of(*command: str) -> str:
    """Return what a command prints, or nothing when it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else ""


def missing_packages() -> dict[str, list[str]]:
    """Map each missing Debian package to what was looked for in vain."""
    missing: dict[str, list[str]] = {}
    for program, package in PROGRAMS.items():
        if shutil.which(program) is None:
            missing.setdefault(package, []).append(program)
    has_tex, has_fonts = shutil.which("kpsewhich"), shutil.which("fc-list")
    for name, package in TEX_FILES.items():
        if not has_tex or not output_of("kpsewhich", name).strip():
            missing.setdefault(package, []).append(name)
    installed = output_of("fc-list", ":", "family") if has_fonts else ""
    for family, package in FONTS.items():
        if family not in installed:
            missing.setdefault(package, []).append(family)
    return missing


def documents() -> list[Path]:
    """List the table of contents' notebooks, in order."""
    text = (ROOT / "_toc.yml").read_text(encoding="utf-8")
    names = re.findall(r"^\s*(?:- file|root):\s*(\S+)", text, re.MULTILINE)
    return [ROOT / f"{name}.ipynb" for name in names]


def execute(path: str, threads: int) -> tuple[str, str, float, str]:
    """Run one notebook; return path, executed JSON, seconds, error text."""
    import nbformat
    from minillm_book import prepare
    from nbclient import NotebookClient

    for name in ("OMP", "MKL", "OPENBLAS"):
        os.environ[f"{name}_NUM_THREADS"] = str(threads)
    notebook = prepare(nbformat.read(path, as_version=4))
    client = NotebookClient(
        notebook,
        timeout=CELL_TIMEOUT,
        record_timing=False,  # times in the metadata would change its key
        resources={"metadata": {"path": str(Path(path).parent)}},
    )
    start, error = time.monotonic(), ""
    try:
        client.execute(stderr=subprocess.DEVNULL)  # the kernel's own remarks
    except Exception as problem:  # a failing cell, a timeout, a dead kernel
        lines = (
            re.sub(r"\x1b\[[0-9;]*m", "", str(problem)).strip().splitlines()
        )
        error = "\n".join(["..."] * (len(lines) > 30) + lines[-30:])
    seconds = time.monotonic() - start
    return path, nbformat.writes(notebook), seconds, error


def rounds(paths: list[Path], workers: int) -> list[tuple[int, list[Path]]]:
    """Plan who runs when: how many at a time, and which in which order.

    Whoever asks for the shared model first trains it while others wait for it,
    so its users come last except for one. Notebooks that measure the machine's
    ceiling run alone at the end, with all cores: a timing taken beside other
    work is worth nothing.
    """
    text = {path: path.read_text(encoding="utf-8") for path in paths}
    alone = [p for p in paths if "measure_ceiling(" in text[p]]
    shared = [p for p in paths if p not in alone]
    users = [p for p in shared if "tales_model(" in text[p]]
    others = [p for p in shared if p not in users]
    users.sort(key=lambda p: p.stem != "trainer")
    plan = [(workers, [*users[:1], *others, *users[1:]]), (1, alone)]
    return [(count, group) for count, group in plan if group]


def available_cores() -> int:
    """Count the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def open_cache():
    """Open the cache for the code as it is; drop all but one older one."""
    from jupyter_cache import get_cache
    from minillm_book import cache_path

    folder = cache_path()
    if folder.parent.is_dir():
        old = sorted(folder.parent.iterdir(), key=lambda p: p.stat().st_mtime)
        for path in [p for p in old if p != folder][:-1]:
            shutil.rmtree(path)
    return get_cache(str(folder))


def execute_notebooks(workers: int) -> bool:
    """Fill the cache with what is not in it; return whether all ran."""
    import nbformat
    from jupyter_cache.base import CacheBundleIn
    from minillm_book import prepare

    cache, waiting, prepared = open_cache(), [], {}
    for path in documents():
        if not path.exists():
            print(f"{path.relative_to(ROOT)} is in _toc.yml but not there")
            return False
        try:
            notebook = prepare(nbformat.read(path, as_version=4))
            prepared[str(path)] = notebook
            cache.match_cache_notebook(notebook)
        except KeyError:
            waiting.append(path)
    if not waiting:
        return True
    cores = available_cores()
    workers = max(1, min(workers or min(cores, 4), len(waiting)))
    count = len(waiting)
    print(f"executing {count} notebooks, {workers} at a time", flush=True)
    failed, started = 0, time.monotonic()
    spawn = get_context("spawn")
    for count, group in rounds(waiting, workers):
        threads = max(1, cores // count)
        with ProcessPoolExecutor(count, mp_context=spawn) as pool:
            jobs = [pool.submit(execute, str(p), threads) for p in group]
            for job in as_completed(jobs):
                path, text, seconds, error = job.result()
                name = Path(path).relative_to(ROOT).as_posix()
                if error:
                    failed += 1
                    print(f"{name}: FAILED after {seconds:.0f} s\n{error}")
                    continue
                print(f"{name}: {seconds:.0f} s", flush=True)
                bundle = CacheBundleIn(
                    nbformat.reads(text, as_version=4),
                    path,
                    data={"execution_seconds": seconds},
                )
                cache.cache_notebook_bundle(
                    bundle, check_validity=False, overwrite=True
                )
                cache.match_cache_notebook(prepared[path])  # or a KeyError
    if failed:
        print(f"{failed} of {len(waiting)} notebooks failed")
    else:
        print(f"executed in {time.monotonic() - started:.0f} s")
    return not failed


def jupyter_book(builder: str) -> int:
    """Run Jupyter Book with warnings as errors."""
    command = [
        sys.executable, "-c", "from jupyter_book.cli.main import main; main()",
        "build", str(ROOT), "--builder", builder, "-W", "--keep-going", "-q",
    ]  # fmt: skip
    env = {**os.environ, "LATEXMKOPTS": "-quiet -f-", "PYTHONUTF8": "1"}
    env["NO_COLOR"] = "1"
    env["LATEXOPTS"] = "--interaction=nonstopmode"
    BUILD.mkdir(exist_ok=True)
    log = BUILD / f"{builder}.log"
    with log.open("w", encoding="utf-8") as out:
        done = subprocess.run(
            command, cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT
        )
    if done.returncode:
        text = log.read_text(encoding="utf-8", errors="replace")
        lines = [line for line in text.splitlines() if line.strip()]
        problems = [line for line in lines if re.search("WARNING|ERROR", line)]
        print("\n".join(problems or lines[-40:]))
        print(
            f"the {builder} build failed; all of it: {log.relative_to(ROOT)}"
        )
    return done.returncode


def build_html() -> int:
    """Build the pages, and remove those of chapters that are gone."""
    html = BUILD / "html"
    names = {path.relative_to(ROOT).with_suffix("") for path in documents()}
    for folder in (html, html / "_sources"):
        for path in folder.glob("nbs/**/*"):
            if (
                path.is_file()
                and path.relative_to(folder).with_suffix("") not in names
            ):
                path.unlink()
    if code := jupyter_book("html"):
        return code
    print("pages: _build/html/index.html")
    return 0


def build_pdf() -> int:
    """Build the PDF."""
    pdf = BUILD / "latex" / "minillm.pdf"
    # a build that was killed leaves half a file, at which LaTeX stumbles
    for half in (BUILD / "latex").glob("minillm.*"):
        if half.suffix in (".aux", ".out", ".toc", ".idx", ".ind"):
            half.unlink()
    code = jupyter_book("pdflatex")
    if code or not pdf.exists():
        log = pdf.with_suffix(".log")
        if log.exists():
            text = log.read_text(encoding="utf-8", errors="replace")
            errors = re.findall(r"^!.*(?:\n.*){0,4}", text, re.MULTILINE)
            print("LaTeX says:", *errors[:3], sep="\n")
        return code or 1
    shutil.copyfile(pdf, BUILD / "minillm.pdf")
    print("book: _build/minillm.pdf")
    return 0


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Build the book.")
    parser.add_argument("what", choices=["html", "pdf", "all"])
    parser.add_argument(
        "--workers",
        type=int,
        default=0,
        help="notebooks at a time (default: cores)",
    )
    options = parser.parse_args(argv)
    what = options.what
    if what != "html" and (missing := missing_packages()):
        print(
            "The PDF needs system packages that are missing:", file=sys.stderr
        )
        for package, sought in missing.items():
            print(f"  {package}: no {', '.join(sought)}", file=sys.stderr)
        packages = " ".join(missing)
        print("On Debian or Ubuntu:", file=sys.stderr)
        print(
            f"  sudo apt-get install --no-install-recommends {packages}",
            file=sys.stderr,
        )
        print("The HTML book needs none: make html", file=sys.stderr)
        return 2
    if not execute_notebooks(options.workers):
        return 1
    steps = {
        "html": [build_html],
        "pdf": [build_pdf],
        "all": [build_html, build_pdf],
    }
    for step in steps[what]:
        if code := step():
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
