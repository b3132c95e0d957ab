"""`python -m tests.structures.show 17 18 23`: what structures of the sample look like, and what becomes of them."""

import os
import sys

import torch

from tests.structures.examine import examine
from tests.structures.layer import layer_source
from tests.structures.sampling import sample


def main() -> None:
    os.environ.setdefault("MOECA_FX_COMPILE", "0")
    torch.set_num_threads(1)
    for argument in sys.argv[1:]:
        structure = sample()[int(argument)]
        sys.stdout.write(f"# {argument}: {structure}\n{layer_source(structure)}\n")
        outcome = examine(structure, seed=int(argument))
        sys.stdout.write(f"-> {outcome.verdict} {outcome.reason} {outcome.detail} {outcome.seconds}\n\n")


if __name__ == "__main__":
    main()
