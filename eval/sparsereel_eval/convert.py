"""Published weights (.pt, .pth, .ckpt, TorchScript) to the safetensors files this package reads.

A file of plain tensors is read without running anything. Other pickles and TorchScript archives are programs: reading
them runs what their author put in. That happens only with `trust`, in a child process that has no more than a path.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SECONDS = 600
_CHILD = Path(__file__).with_name("convert_child.py")
#: variables a child needs to find its interpreter's libraries; nothing else of the parent's is handed on
_KEPT = ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT", "TMPDIR", "LANG")


def convert(source: Path, target: Path, *, trust: bool = False, prefix: str = "", seconds: float = SECONDS) -> int:
    """Write the tensors of `source` to the safetensors file `target`; returns how many.

    Args:
        source: The published file. A dictionary inside one (state_dict, model, module, model_state) is looked into.
        target: Ends in .safetensors.
        trust: Run the file if it is a program. Only for files whose origin you trust as you trust code you install.
        prefix: Keep only names that begin so, without it, such as "encoder.".
        seconds: Longest time the child may take.

    Raises:
        ValueError: no such file, a program without `trust`, no tensors in it, or the child failed.
    """
    if not source.is_file():
        raise ValueError(f"{source} does not exist")
    if target.suffix != ".safetensors":
        raise ValueError(f"the result must end in .safetensors, got {target}")
    if source.stat().st_size == 0:
        raise ValueError(f"{source} is empty (0 bytes)")
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the last step is a rename.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".convert-") as folder:
        written = Path(folder) / "tensors.safetensors"
        job = {"source": str(source.resolve()), "target": str(written), "trust": trust, "prefix": prefix}
        answer = _child(job, folder, seconds)
        if "error" in answer:
            raise ValueError(f"{source}: {answer['error']}")
        os.replace(written, target)
    return int(answer["tensors"])


def _child(job: dict[str, Any], folder: str, seconds: float) -> dict[str, Any]:
    variables = {name: os.environ[name] for name in _KEPT if name in os.environ} | {"HOME": folder}
    try:
        done = subprocess.run(
            [sys.executable, "-I", str(_CHILD)],
            input=json.dumps(job),
            capture_output=True,
            text=True,
            env=variables,
            cwd=folder,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"reading it took longer than {seconds:.0f} s"}
    lines = done.stdout.splitlines()
    try:
        answer = json.loads(lines[-1])
    except (IndexError, ValueError):
        said = [line for line in done.stderr.splitlines() if line.strip()]
        return {"error": f"reading it ended with code {done.returncode}: {said[-1] if said else 'no output'}"}
    return answer if isinstance(answer, dict) else {"error": "reading it gave no answer"}
