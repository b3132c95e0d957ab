"""Up to how many tokens the own kernel computes attention faster than torch on this CPU; measured once a process.

torch's kernel works through blocks of queries and keys and packs each; for few tokens that costs more than it saves.
"""

import functools
import logging

import torch
from torch.nn import functional

from moeca_fx.kernels.cpu import ops as kernels
from moeca_fx.ops.measured import last_faster, share_of_time

log = logging.getLogger(__name__)
_TOKEN_COUNTS = (64, 256, 1024)
_HEADS, _WIDTH = 4, 64
_ROWS = 1024  # tokens of all samples together
_MARGIN = 0.9  # of the default's time: one call replaces another, so that only noise need be left out


@functools.cache
def own_attention_up_to() -> int:
    """Largest number of tokens at which the own kernel is faster; 0 when it never is. Takes some tenths of a second."""
    if not kernels.available():
        return 0
    with torch.inference_mode():
        return last_faster(_TOKEN_COUNTS, _share, _MARGIN) or 0


def _share(tokens: int) -> float:
    query, key, value = torch.randn(3, _ROWS // tokens, tokens, _HEADS, _WIDTH).transpose(2, 3)
    share = share_of_time(
        lambda: torch.ops.moeca_cpu.attention(query, key, value, None),
        lambda: functional.scaled_dot_product_attention(query, key, value),
    )
    log.debug("attention of %d tokens: the own kernel takes %.2f of torch's time", tokens, share)
    return share
