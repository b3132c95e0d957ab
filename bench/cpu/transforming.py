"""How long `transform` takes and how much memory, in a process of its own: a peak cannot be reset."""

import json
import resource
import subprocess
import sys
import time
from typing import Any

CODE = "from bench.cpu.transforming import measure; measure({name!r})"


def bench_transform(name: str) -> Any:
    """Seconds and peak memory of one `transform`, tracing and all passes, nothing compiled."""
    done = subprocess.run([sys.executable, "-c", CODE.format(name=name)], check=True, capture_output=True, text=True)
    result: Any = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def measure(name: str) -> None:
    """Print one line of JSON; run in a fresh process."""
    import moeca_fx

    model = moeca_fx.zoo.build(name)
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    inputs = moeca_fx.zoo.example_inputs(name, 2)
    before = _peak()
    start = time.perf_counter()
    moeca_fx.transform(model, inputs, compile=False)
    seconds = time.perf_counter() - start
    found = {
        "model": name,
        "seconds": seconds,
        "weights_mib": weights / 2**20,
        "before_mib": before,
        "peak_mib": _peak(),
    }
    sys.stdout.write(json.dumps(found) + "\n")


def _peak() -> float:
    """Largest resident size so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
