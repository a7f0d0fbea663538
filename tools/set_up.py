"""Create a virtual environment and install minillm with exact versions.

    python3 tools/set_up.py .venv

Uses the standard library alone. Running it again repairs or updates.
"""

import os
import platform
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CPU_WHEELS = "https://download.pytorch.org/whl/cpu"


def reachable(url: str) -> bool:
    """Say whether a server answers within a few seconds."""
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


def main() -> int:
    if sys.version_info < (3, 10):  # noqa: UP036 - the older one lands here
        version = platform.python_version()
        print(
            f"minillm needs Python 3.10 or newer, and this is {version}; "
            "try: make PYTHON=python3.12",
            file=sys.stderr,
        )
        return 2
    folder = ROOT / (sys.argv[1] if len(sys.argv) > 1 else ".venv")
    bin_dir = folder / ("Scripts" if os.name == "nt" else "bin")
    python = bin_dir / ("python.exe" if os.name == "nt" else "python")
    if not python.exists():
        print(f"creating {folder.name} with {sys.executable}", flush=True)
        made = subprocess.run([sys.executable, "-m", "venv", str(folder)])
        if made.returncode:
            print(
                "python cannot make virtual environments here; on Debian or "
                "Ubuntu: sudo apt-get install python3-venv",
                file=sys.stderr,
            )
            return 2
    install = [
        str(python), "-m", "pip", "install", "--quiet",
        "--disable-pip-version-check", "--progress-bar", "off",
        "-c", str(ROOT / "constraints.txt"), "-e", f"{ROOT}[dev]",
    ]  # fmt: skip
    # On Linux the plain torch wheel brings gigabytes of CUDA along. Without
    # an NVIDIA card the CPU wheel of the same version does the same work.
    if (
        sys.platform == "linux"
        and shutil.which("nvidia-smi") is None
        and reachable(f"{CPU_WHEELS}/torch/")
    ):
        install += ["--extra-index-url", CPU_WHEELS]
    print("installing; about a minute on a fast line", flush=True)
    return subprocess.run(install).returncode


if __name__ == "__main__":
    sys.exit(main())
