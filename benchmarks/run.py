"""`make bench`: the short set, under ten minutes on two cores. Results go to out/bench, not over the committed ones."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
OUTPUT = Path("out/bench")

SHORT = ("--tokens", "8192", "--density", "0.2", "--repeat", "3")
COMMANDS = (
    ("attention.py", *SHORT, "--backends", "cpu", "torch"),
    ("attention.py", *SHORT, "--backends", "cpu", "--dtype", "float32"),
    ("scaling.py", "--largest", "16384", "--repeat", "1", "--output", str(OUTPUT)),
    ("pipeline.py", "--steps", "2", "--output", str(OUTPUT)),
)


def main() -> int:
    """Run one script after the other; the exit code is the first that is not 0."""
    OUTPUT.mkdir(parents=True, exist_ok=True)
    for number, (script, *arguments) in enumerate(COMMANDS):
        print(f"\n== {script} {' '.join(arguments)}", flush=True)
        if script == "attention.py":
            arguments += ["--json", str(OUTPUT / f"attention-{number}.json")]
        code = subprocess.run([sys.executable, str(HERE / script), *arguments]).returncode
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
