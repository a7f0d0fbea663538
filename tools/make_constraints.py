"""Write constraints.txt: exact versions for every Python and system.

    make constraints

Needs the network; `uv` resolves for all platforms at once.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PINNED = ["torch==2.13.0", "nbdev==2.4.14", "jupyter-book==1.0.4.post1"]
HEAD = """\
# The exact versions that `make` installs, for Python 3.10 to 3.13 on every
# system. The ranges that the package itself asks for stand in settings.ini.
# CUDA's own packages are left out: torch names the ones that belong to it.
# Made by `make constraints`.
"""
LEFT_OUT = re.compile(r"(cuda-|nvidia-|triton)|.*== 'emscripten'")


def main() -> int:
    pip = [sys.executable, "-m", "pip", "install", "-q", "uv"]
    subprocess.run(pip, check=True)
    resolved = subprocess.run(
        [
            # uv would remember what setup.py said before settings.ini changed
            sys.executable, "-m", "uv", "--no-cache",
            "pip", "compile", "--universal",
            "--python-version", "3.10", "--no-header", "--no-annotate",
            "--extra", "dev", "--constraints", "-", "setup.py",
        ],  # fmt: skip
        cwd=ROOT,
        input="\n".join(PINNED),
        capture_output=True,
        text=True,
    )
    if resolved.returncode:
        print(resolved.stderr, file=sys.stderr)
        return resolved.returncode
    kept = [s for s in resolved.stdout.splitlines() if not LEFT_OUT.match(s)]
    text = HEAD + "\n".join(kept) + "\n"
    (ROOT / "constraints.txt").write_text(text, encoding="utf-8")
    print(f"constraints.txt: {len(kept)} lines")
    return 0


if __name__ == "__main__":
    sys.exit(main())
