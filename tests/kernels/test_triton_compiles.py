"""Every kernel and every tile compiles for Hopper GPUs, with its tensor cores, on a machine without one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

SHARED_MEMORY = 227 * 1024  # bytes that one program may take on compute capability 9.0
KERNELS = {"_decide", "_count", "_place", "_up_kernel", "_down_kernel", "_norm_kernel", "_combine", "_attention_kernel"}


@pytest.mark.slow  # half a minute of ptxas
def test_every_kernel_compiles_for_hopper(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    script = Path(__file__).with_name("compile_for_hopper.py")
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    assert {each["kernel"] for each in compiled} >= KERNELS
    assert max(each["shared"] for each in compiled) <= SHARED_MEMORY
    assert sum(each["wgmma"] for each in compiled if each["kernel"] in ("_up_kernel", "_down_kernel")) >= 8
    assert all(each["wgmma"] for each in compiled if each["kernel"] == "_attention_kernel" and not each["exact"])
