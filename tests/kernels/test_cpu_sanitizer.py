"""The C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer: every instruction set, both directions."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sparsereel_kernels import cpu

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(cpu.build_status().reason), reason=cpu.build_status().reason),
]

HERE = Path(__file__).parent
CHECKED = "address,bounds,null,object-size,pointer-overflow,shift,signed-integer-overflow,vla-bound"
# The tests run in a process whose first library is the sanitizer's; the kernels are built for it, into another cache.
SCRIPT = f"""
import os
import sys
import pytest
from sparsereel_kernels.cpu import builder
del os.environ["LD_PRELOAD"]  # not for the compiler
builder.COMMON_FLAGS += ("-O1", "-fsanitize={CHECKED}", "-fno-sanitize-recover=all", "-g1")
sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-o", "timeout=0", *sys.argv[1:]]))
"""


def runtime() -> str | None:
    """The libraries to load first: the sanitizers', and that of C++, whose exceptions they have to find."""
    compiler = shutil.which("g++")
    if compiler is None:
        return None
    paths = []
    for name in ("libasan.so", "libubsan.so", "libstdc++.so"):
        found = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        paths.append(Path(found.stdout.strip()))
    return " ".join(str(path.resolve()) for path in paths) if all(path.is_absolute() for path in paths) else None


@pytest.mark.timeout(3000)
def test_no_test_of_the_kernels_makes_a_sanitizer_speak(tmp_path):
    library = runtime()
    if library is None:
        pytest.skip("g++ comes without AddressSanitizer here")
    environment = os.environ | {
        "LD_PRELOAD": library,
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1:allocator_may_return_null=1",
        "CXX": "g++",
        "XDG_CACHE_HOME": str(tmp_path),
        "OMP_NUM_THREADS": "2",
    }
    files = [str(HERE / name) for name in ("test_cpu_instruction_sets.py", "test_cpu_amx.py")]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *files, "-m", "not gpu"],
        cwd=HERE.parents[1],
        env=environment,
        capture_output=True,
        text=True,
        timeout=2900,
        check=False,
    )
    said = done.stdout[-3000:] + done.stderr[-5000:]
    assert "Sanitizer" not in said, said
    assert "runtime error" not in said, said
    assert done.returncode == 0, said
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 20
