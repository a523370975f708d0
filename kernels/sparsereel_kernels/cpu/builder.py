"""Builds the CPU kernels on first use and loads them.

One small shared library with a plain C interface: no torch header, no Python header, so a C++17 compiler (GCC or Clang)
is all it takes, it builds in seconds, and it outlives torch upgrades. Each instruction set is its own translation
unit; which one runs is decided on the machine that runs it. The result is cached in a folder only the user can enter,
under a name made of sources, compiler and flags, beside its own SHA-256, which is checked before it is loaded.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

SOURCES = Path(__file__).parent / "csrc"
COMMON_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=off", "-w")
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl")
_AVX512_BF16 = (*_AVX512, "-mavx512bf16")
X86_UNITS = {
    "avx2": _AVX2,
    "avx512": _AVX512,
    "avx512_bf16": _AVX512_BF16,
    "amx": (*_AVX512_BF16, "-mamx-tile", "-mamx-bf16"),
}

log = logging.getLogger("sparsereel")


class BuildError(RuntimeError):
    """The kernels cannot be built or loaded here; the text says why in one sentence."""


@dataclass(frozen=True)
class BuildStatus:
    """What `build_status` found, without building anything.

    `built`: a library for this machine's compiler and these sources is in the cache. `path`: where it is or would be.
    `compiler`: the C++ compiler that would be used. `reason`: why no library can be had, or "" where one can.
    """

    built: bool
    path: str
    compiler: str
    reason: str


@dataclass(frozen=True)
class _Toolchain:
    compiler: str
    version: str
    units: dict[str, tuple[str, ...]]

    @property
    def key(self) -> str:
        digest = hashlib.sha256(f"{self.version}|{COMMON_FLAGS}|{self.units}".encode())
        for source in sorted(SOURCES.iterdir()):
            digest.update(source.name.encode() + source.read_bytes())
        return digest.hexdigest()[:20]


def _run(command: list[str], **options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, **options)  # type: ignore[call-overload]


@lru_cache(maxsize=4)
def _probe(compiler: str) -> _Toolchain:
    version = _run([compiler, "--version"]).stdout.strip()
    units: dict[str, tuple[str, ...]] = {"portable": ()}
    if platform.machine().lower() in ("x86_64", "amd64"):
        units |= {name: flags for name, flags in X86_UNITS.items() if _knows(compiler, flags)}
    return _Toolchain(compiler, version, units)


def _knows(compiler: str, flags: tuple[str, ...]) -> bool:
    """Whether the compiler is young enough for an instruction set."""
    return _run([compiler, *flags, "-fsyntax-only", "-x", "c++", "-"], input="").returncode == 0


def _toolchain() -> _Toolchain:
    if os.name != "posix":
        raise BuildError(f"the CPU kernels build on Linux and macOS only, not on {platform.system()}")
    wished = os.environ.get("CXX")
    for name in [wished] if wished else ["c++", "g++", "clang++"]:
        if path := shutil.which(name):
            return _probe(path)
    looked = f"CXX={wished}" if wished else "c++, g++ or clang++"
    raise BuildError(f"no C++ compiler found (looked for {looked}); install one, for example: apt install g++")


def cache_folder() -> Path:
    """The folder of built libraries: $XDG_CACHE_HOME/sparsereel/kernels, by default under ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "sparsereel" / "kernels"


def _check_owner(folder: Path) -> None:
    # A library that somebody else may replace must never be loaded.
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise BuildError(f"{folder} must be a folder of your own that only you may enter (chmod 700)")


def _private_folder() -> Path:
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise BuildError(
            f"cannot create {folder} ({error.strerror}); set XDG_CACHE_HOME to a writable folder"
        ) from None
    _check_owner(folder)
    return folder


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    import fcntl  # not on Windows, which _toolchain has turned away by now

    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _is_sound(path: Path) -> bool:
    """True where the library and its recorded hash are there and agree."""
    try:
        recorded = path.with_suffix(".sha256").read_text().strip()
        return hashlib.sha256(path.read_bytes()).hexdigest() == recorded
    except OSError:
        return False


def _compile(tools: _Toolchain, target: Path, verbose: bool) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        flags = [*COMMON_FLAGS, *(f"-DSPARSEREEL_WITH_{name.upper()}" for name in tools.units)]
        jobs: list[tuple[str, str, tuple[str, ...]]] = [("driver", "driver.cpp", ())]
        # The longest jobs first: they decide when the last one ends.
        jobs += [(n, "unit.cpp", (*f, f"-DSPARSEREEL_UNIT={n}")) for n, f in reversed(tools.units.items())]
        commands = [
            [tools.compiler, *flags, *extra, "-c", str(SOURCES / source), "-o", f"{scratch}/{name}.o"]
            for name, source, extra in jobs
        ]
        with ThreadPoolExecutor(min(len(commands), os.cpu_count() or 1)) as pool:
            list(pool.map(lambda command: _call(command, verbose), commands))
        objects = [command[-1] for command in commands]
        library = Path(scratch) / "library.so"
        _call([tools.compiler, "-shared", "-pthread", *objects, "-o", str(library)], verbose)
        digest = Path(scratch) / "digest"
        digest.write_text(hashlib.sha256(library.read_bytes()).hexdigest())
        # The hash first: a library without a fitting hash counts as not built.
        os.replace(digest, target.with_suffix(".sha256"))
        os.replace(library, target)


def _call(command: list[str], verbose: bool) -> None:
    if verbose:
        print(" ".join(command))
    done = _run(command)
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[:300])
        raise BuildError(f"the compiler {command[0]} failed with: {first}")


def build(verbose: bool = False) -> Path:
    """Builds the kernels if the cache does not hold them, and returns the library's path.

    Raises:
        BuildError: no compiler, no private cache folder, or the compiler failed.
    """
    tools = _toolchain()
    folder = _private_folder()
    target = folder / f"{tools.key}.so"
    if _is_sound(target):
        return target
    try:
        with _locked(folder):
            if not _is_sound(target):  # another process may have built it while this one waited
                log.warning("sparsereel: building the CPU kernels once, about ten seconds (%s)", target)
                _compile(tools, target, verbose)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"building in {folder} failed: {error}") from None
    return target


def build_status() -> BuildStatus:
    """Says whether the kernels are built, where, and what stands in the way; builds nothing."""
    try:
        tools = _toolchain()
    except BuildError as error:
        return BuildStatus(False, "", "", str(error))
    path = cache_folder() / f"{tools.key}.so"
    return BuildStatus(_is_sound(path), str(path), tools.compiler, "")


_lock = threading.Lock()
_loaded: ctypes.CDLL | BuildError | None = None


def library() -> ctypes.CDLL:
    """The loaded library, built first where need be; the outcome is remembered for the life of the process.

    Raises:
        BuildError: as `build`, or the system refuses to load the result.
    """
    global _loaded
    with _lock:
        if _loaded is None:
            try:
                path = build()
                _check_owner(path.parent)
                _loaded = ctypes.CDLL(str(path))
            except BuildError as error:
                _loaded = error
            except OSError as error:
                _loaded = BuildError(f"the built library does not load: {error}")
    if isinstance(_loaded, BuildError):
        raise _loaded
    return _loaded
