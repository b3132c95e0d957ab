"""Shared by every test: the same threads and seeds whatever ran before."""

import gc
import os

import pytest
import torch

# Compiling takes tens of seconds a graph: the tests of compilation switch it on for themselves.
os.environ.setdefault("MOECA_FX_COMPILE", "0")
# Without a GPU, Triton kernels run in Triton's interpreter; the switch is read when they are imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

TEST_THREADS = 1  # tiny models gain nothing from more, and on a busy machine waiting threads cost much

gc.set_threshold(20_000)  # tracing makes many objects that live on; looking at them again and again takes 5 %


@pytest.fixture(autouse=True)
def _steady_torch():
    torch.set_num_threads(TEST_THREADS)
    torch.manual_seed(0)
