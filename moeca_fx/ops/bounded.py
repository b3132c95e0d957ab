"""Selected rows and padded experts whose lengths depend on data, in forms that ONNX and TensorRT can hold.

No NonZero (for onnxruntime there is `export.onnx.exact_lists`), no sort, no scatter that adds: a length is
``arange(n)`` with n clamped to [2, all], and a list of selected entries is one scatter of a permutation. Where fewer
than two entries are selected, unselected ones fill up: they are computed and thrown away. So every list comes with
`valid`, which of its entries were selected.

    row   = select_rows(mask)             row, valid = select_rows(mask)
    cache = write_rows(cache, row, v)     cache = write_rows(cache, row, where(valid, v, what is there))
    grouped_linear(sorted rows, W)        one batched product [E, C, K] @ [E, K, N], C = the largest group or all rows
"""

import math

import torch
from torch import Tensor

from moeca_fx.ops import forecast
from moeca_fx.ops.slots import REUSED, UNMATCHED

_FEWEST = 2  # a length of 0 or 1 would be specialised by compilers, and onnxruntime refuses products of no rows


def counted(count: Tensor, most: int) -> Tensor:
    """``0 .. n - 1`` with n = `count` [] int64 clamped to [2, most], int64."""
    length = torch.clamp(count, min=_FEWEST, max=most).item()
    torch._check(length >= _FEWEST)  # type: ignore[no-untyped-call]  # untyped in torch
    torch._check(length <= most)  # type: ignore[no-untyped-call]  # untyped in torch
    return torch.arange(length, device=count.device)


def select_rows(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Flat indices of the set entries, ascending, of at least two: [B, T] bool -> row [M] int64, valid [M]."""
    flat = mask.flatten()
    chosen, number = flat.to(torch.int64), torch.arange(flat.shape[0], device=mask.device)
    selected = chosen.cumsum(0)
    count = chosen.sum()
    # The set entries in order, then the others: number - selected of them come before each of those.
    place = torch.where(flat, selected - 1, count + number - selected)
    order = torch.zeros_like(place).scatter(0, place, number)
    index = counted(count, flat.shape[0])
    return order.index_select(0, index), index < count


def valid_code(code: Tensor, valid: Tensor) -> Tensor:
    """A decision of rows, nothing recomputed in those that only fill up: code [M, 1, k], valid [M]."""
    return torch.where(valid[:, None, None], code, REUSED).to(code.dtype)


def write_rows(cache: Tensor, row: Tensor, values: Tensor, valid: Tensor) -> Tensor:
    """Cache [B, T, rest] with the given distinct flat rows replaced by `values` [M, rest] where they are valid."""
    place = _places(cache, row)
    apply = valid.reshape(-1, *(1,) * (values.dim() - 1))
    return cache.index_put(place, torch.where(apply, values.to(cache.dtype), cache[place]))


def add_rows(cache: Tensor, row: Tensor, change: Tensor, valid: Tensor) -> Tensor:
    """Cache [B, T, rest] with `change` [M, rest] added to the given distinct flat rows where they are valid."""
    return write_rows(cache, row, cache[_places(cache, row)] + change.to(cache.dtype), valid)


def _places(cache: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
    """Sample and token of flat rows. Indexing by both spares two reshapes, which copy a cache at a graph's border."""
    tokens = cache.shape[1]
    return row // tokens, row % tokens


def count_valid(valid: Tensor) -> Tensor:
    """How many rows were selected, [] int64."""
    return valid.sum()


def count_valid_branches(valid: Tensor, top_k: int) -> Tensor:
    """How many branches the selected rows have, [] int64."""
    return valid.sum() * top_k


# -- attention ----------------------------------------------------------------------------------------------------


def attention_rows(query: Tensor, key: Tensor, value: Tensor, row: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    """Attention of selected tokens, padded to the fullest sample.

    Args:
        query: [M, h, d] queries of the tokens `row` [M].
        key, value: [B, T, h_kv, d] all keys and values.
        mask: [B, T] the tokens that `row` lists.
        scale: softmax scale; None is ``1 / sqrt(d)``.

    Returns:
        [M, h, d_v].
    """
    tokens, heads, last = mask.shape[1], query.shape[1], row.shape[0] - 1
    count = mask.to(torch.int64).sum(1)
    first = count.cumsum(0) - count  # rows are ascending, so those of a sample follow each other
    index = counted(count.amax(0), tokens)
    local = (first.unsqueeze(1) + index).clamp(max=last)  # [B, S]
    padded = query.index_select(0, local.flatten()).view(*local.shape, *query.shape[1:])  # [B, S, h, d]
    key, value = (_for_every_head(part, heads) for part in (key, value))
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = (padded.transpose(1, 2) * factor) @ key.permute(0, 2, 3, 1)  # [B, h, S, T]
    out = (torch.softmax(scores, -1) @ value.transpose(1, 2)).transpose(1, 2)  # [B, S, h, d_v]
    sample, width = row // tokens, index.shape[0]
    column = torch.arange(row.shape[0], device=row.device) - first.index_select(0, sample)
    return out.flatten(0, 1).index_select(0, sample * width + column.clamp(min=0, max=width - 1))


def _for_every_head(x: Tensor, heads: int) -> Tensor:
    """[B, T, h_kv, d] -> [B, T, h, d]: grouped queries share keys and values."""
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], dim=2)


# -- experts ------------------------------------------------------------------------------------------------------


def plan_padded(code: Tensor, slot_expert: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Recomputed branches as one padded row of a table for every expert.

    Args:
        code, slot_expert: [.., k] of R branches in all; a code above 0 is recomputed.

    Returns:
        local [E * C] leading entry of `code` of each table entry, expert [E * C], and place [R]: the table entry of
        each recomputed branch.
    """
    top_k = code.shape[-1]
    picked, ids = code.flatten() > REUSED, slot_expert.flatten()
    experts = torch.arange(num_experts, device=code.device)
    mine = ((ids.unsqueeze(1) == experts) & picked.unsqueeze(1)).to(torch.int64)  # [R, E]
    before = mine.cumsum(0)
    position = before.gather(1, ids.unsqueeze(1)).squeeze(1) - 1  # [R], in its expert's row
    branches = code.numel()
    column = counted(mine.sum(0).amax(0), branches)
    width = column.shape[0]
    place = (ids * width + position).clamp(min=0, max=num_experts * width - 1)
    # What is not recomputed goes to one entry behind the table.
    target = torch.where(picked, ids * width + position, num_experts * width)
    table = torch.zeros(num_experts * width + 1, dtype=torch.int64, device=code.device)
    table = table.scatter(0, target, torch.arange(branches, device=code.device))[:-1]
    return table // top_k, experts.unsqueeze(1).expand(-1, width).flatten(), place


def plan_dense(code: Tensor, slot_expert: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """`plan_padded` where every expert computes all R leading entries of `code`, whatever it says: C = R."""
    leading = code.numel() // code.shape[-1]
    entry = torch.arange(leading, device=code.device)
    experts = torch.arange(num_experts, device=code.device)
    place = slot_expert.reshape(leading, -1) * leading + entry.unsqueeze(1)
    owner = experts.unsqueeze(1).expand(-1, leading).flatten()
    return entry.repeat(num_experts), owner, place.flatten()


def plan_grouped(code: Tensor, slot_expert: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`plan_padded` without padding: rows of each expert follow each other, one row at least.

    Returns:
        local [M], expert [M], place [R] as there, and offsets [E], the end row of each expert.
    """
    top_k, branches = code.shape[-1], code.numel()
    picked, ids = code.flatten() > REUSED, slot_expert.flatten()
    experts = torch.arange(num_experts, device=code.device)
    mine = ((ids.unsqueeze(1) == experts) & picked.unsqueeze(1)).to(torch.int64)  # [R, E]
    before = mine.cumsum(0)
    position = before.gather(1, ids.unsqueeze(1)).squeeze(1) - 1
    count = mine.sum(0)
    nothing = (count.sum() == 0).to(torch.int64)  # then the last expert computes branch 0 for nobody
    count = count + nothing * (experts == num_experts - 1)
    offsets = count.cumsum(0)
    rows = int(offsets[-1])
    entry = (offsets - count).index_select(0, ids) + position
    target = torch.where(picked, entry, rows)
    table = torch.zeros(rows + 1, dtype=torch.int64, device=code.device)
    table = table.scatter(0, target, torch.arange(branches, device=code.device))[:-1]
    return table // top_k, ids.index_select(0, table), entry.clamp(min=0, max=rows - 1), offsets


def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """One linear an expert over a padded table: x [E * C, K], weight [E, N, K], bias [E, N] -> [E * C, N]."""
    grouped = x.view(weight.shape[0], -1, x.shape[-1])
    out = torch.bmm(grouped, weight.transpose(1, 2))
    return (out if bias is None else out + bias.unsqueeze(1)).flatten(0, 1)


def take_branches(values: Tensor, code: Tensor, place: Tensor) -> Tensor:
    """Results by table entry [E * C, rest] in the order of `code` [.., k]: [R, k, rest]; any where it is 0."""
    return values.index_select(0, place).reshape(-1, code.shape[-1], *values.shape[1:])


def write_branches(cache: Tensor, fresh: Tensor, code: Tensor, row: Tensor | None) -> Tensor:
    """Cache [B, T, k, rest] with the recomputed branches replaced.

    Args:
        fresh: [R, k, rest] from `take_branches`.
        code: [.., k] of R leading entries.
        row: [R] distinct flat tokens that the leading entries stand for; None when they are all in order.
    """
    top_k, rest = code.shape[-1], fresh.shape[2:]
    picked = (code.reshape(-1, top_k) > REUSED).reshape(-1, top_k, *(1,) * len(rest))
    fresh = fresh.to(cache.dtype)
    if row is None:
        return torch.where(picked.view(*cache.shape[:3], *(1,) * len(rest)), fresh.view(cache.shape), cache)
    where = _places(cache, row)
    return cache.index_put(where, torch.where(picked, fresh, cache[where]))


def write_computed(cache: Tensor, values: Tensor, place: Tensor, code: Tensor, row: Tensor | None) -> Tensor:
    """`write_branches` of results by table entry, `values` and `place` as for `take_branches`."""
    return write_branches(cache, take_branches(values, code, place), code, row)


def _of_rows(cache: Tensor, row: Tensor | None) -> Tensor:
    """The tokens [R, ..] of a cache [B, T, ..] that leading entries of a code stand for."""
    return cache.flatten(0, 1) if row is None else cache[_places(cache, row)]


def forecast_branches(clock: Tensor, row: Tensor | None, *caches: Tensor) -> Tensor:
    """`ops.forecast.forecast_rows` of all branches of tokens: caches [B, T, k, H] -> [R, k, H]."""
    return forecast.forecast(clock, *(_of_rows(cache, row) for cache in caches))


def restart_branches(cache: Tensor, change: Tensor, fresh: Tensor, code: Tensor, row: Tensor | None) -> Tensor:
    """`ops.forecast.restart_rows` of recomputed branches.

    Args:
        cache: [B, T, k, H]; change, fresh: [R, k, H] what the forecast missed, and the features computed.
        code: [.., k]; new branches have no history and take `fresh`.
    """
    new = (code == UNMATCHED).reshape(-1, code.shape[-1])
    corrected = _of_rows(cache, row) + change.to(cache.dtype)
    return write_branches(cache, torch.where(new.unsqueeze(-1), fresh.to(cache.dtype), corrected), code, row)


def update_activation(activation: Tensor, expert: Tensor, beta: float) -> Tensor:
    """`policies.branch.update_activation` for distinct experts of a token: activation [B, E, T], expert [B, T, k]."""
    experts = torch.arange(activation.shape[1], device=expert.device)
    chosen = (expert.unsqueeze(-1) == experts).any(2)  # [B, T, E]
    return beta * activation + (1.0 - beta) * chosen.transpose(1, 2).to(activation.dtype)
