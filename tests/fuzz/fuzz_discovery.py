"""Coverage-guided fuzzing of discovery: `make fuzz`, or

python -m tests.fuzz.fuzz_discovery -max_total_time=600 out/fuzz     libFuzzer's options and corpus folder
python -m tests.fuzz.fuzz_discovery crash-...                         one input again

It stops at the first input that neither works nor is refused for a documented reason.
"""

import os
import sys

import atheris

os.environ["MOECA_FX_COMPILE"] = "0"  # read when the package is imported

with atheris.instrument_imports(include=["moeca_fx"]):
    import moeca_fx.discover
    import moeca_fx.transform  # noqa: F401

import torch

from tests.fuzz.cases import case_of, check


def one_input(data: bytes) -> None:
    """Check the case that bytes stand for."""
    check(case_of(data))


def main() -> None:
    """Fuzz with the command line's options."""
    torch.set_num_threads(1)
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
