"""Build the CPU kernels with the machine's own C++ compiler, once, and load them.

The library lies in a cache folder under a name made of everything that decides its contents (sources, torch, compiler,
processor), so that a second process only loads it. Without a compiler the reference operations run instead.
"""

import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils import cpp_extension

log = logging.getLogger(__name__)
SOURCES = Path(__file__).with_name("src")
_FLAGS = ("-O3", "-march=native", "-std=c++20", "-fPIC", "-fopenmp", "-fno-math-errno", "-w")
OFF = "MOECA_FX_CPU_KERNELS"
"""Environment variable: 0 runs the reference operations."""


@functools.cache
def load() -> bool:
    """Load `torch.ops.moeca_cpu`, building it first when this machine has not yet; says once why it cannot."""
    if os.environ.get(OFF) == "0":
        log.info("CPU kernels are switched off by %s=0; reference operations run instead", OFF)
        return False
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None or sys.platform != "linux":
        reason = "there is no C++ compiler (g++ or clang++; set CXX)" if compiler is None else f"on {sys.platform}"
        log.warning("CPU kernels are not built: %s; slower reference operations run instead", reason)
        return False
    try:
        library = _build(compiler)
        torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]  # untyped in torch
    except (subprocess.CalledProcessError, OSError) as error:
        detail = error.stderr[-2000:] if isinstance(error, subprocess.CalledProcessError) else str(error)
        log.warning("CPU kernels could not be built, slower reference operations run instead: %s", detail)
        return False
    return True


def cache_folder() -> Path:
    """Where built libraries lie: `MOECA_FX_CACHE`, else the user's cache folder."""
    own = os.environ.get("MOECA_FX_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(own) if own else base / "moeca_fx"


def _build(compiler: str) -> Path:
    target = cache_folder() / f"moeca_cpu-{_key(compiler)}.so"
    if not target.exists():
        log.info("building the CPU kernels, once for this machine: about half a minute")
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            _compile(compiler, Path(folder), Path(folder) / target.name)
            os.replace(Path(folder) / target.name, target)  # whole or not at all, also beside other processes
    return target


def _compile(compiler: str, folder: Path, library: Path) -> None:
    common = [*_FLAGS, *_vector_flags(), f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    includes = [part for path in cpp_extension.include_paths() for part in ("-isystem", path)]

    def compile_one(source: Path) -> Path:
        made = folder / f"{source.stem}.o"
        _run([compiler, *common, *includes, "-c", str(source), "-o", str(made)])
        return made

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sorted(SOURCES.glob("*.cpp"))))
    search = [part for path in cpp_extension.library_paths() for part in (f"-L{path}", f"-Wl,-rpath,{path}")]
    linked = ["-ltorch_cpu", "-ltorch", "-lc10"]
    _run([compiler, "-shared", "-fopenmp", *map(str, objects), *search, *linked, "-o", str(library)])


def _vector_flags() -> list[str]:
    """torch's vector classes, as wide as torch itself uses on this processor."""
    capability = torch.backends.cpu.get_cpu_capability()
    if capability in ("AVX2", "AVX512"):
        return [f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}"]
    return ["-DCPU_CAPABILITY=DEFAULT", "-DCPU_CAPABILITY_DEFAULT"]


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def _key(compiler: str) -> str:
    parts = [torch.__version__, torch.backends.cpu.get_cpu_capability(), platform.machine(), _processor(), *_FLAGS]
    parts.append(subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True).stdout)
    parts += [path.read_text() for path in sorted(SOURCES.iterdir())]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    """What `-march=native` depends on: a home folder may be shared by unlike machines."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    lines = info.read_text().splitlines()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
