"""Source of a dispatch: rows `h` ([N, H] or [B, T, H]) and the routing in, combined rows `out` of the same shape out.

One function a way that public code does it; `lines` picks by routing.
"""

from tests.structures.containers import all_lines, call_lines, every_lines, gathered_lines
from tests.structures.structure import Structure


def operands(structure: Structure) -> tuple[str, ...]:
    """Names of what the dispatch reads."""
    if structure.routing == "threshold":
        return ("h", "gate")
    if structure.routing == "expert_choice":
        return ("h", "chosen", "weights")
    if structure.routing == "capacity" and structure.dispatch in ("onehot", "bmm"):
        return ("h", "ids", "weights", "place", "capacity")
    return ("h", "ids", "weights")


def lines(structure: Structure) -> list[str]:
    """Statements of the dispatch."""
    if structure.routing == "threshold":
        return _by_gate(structure)
    if structure.routing == "expert_choice":
        return _expert_choice(structure)
    if "place" in operands(structure):
        return _buffers(structure)
    made = {
        "where_loop": _where_loop,
        "hit_loop": _hit_loop,
        "masks": _masks,
        "sorted_slices": _sorted_slices,
        "onehot": _onehot,
        "dense": _dense,
        "bmm": _dense,
        "gathered": _gathered,
    }[structure.dispatch](structure)
    return made + _copied(structure)


def _indented(statements: list[str], depth: int = 1) -> list[str]:
    return ["    " * depth + statement for statement in statements]


def _copied(structure: Structure) -> list[str]:
    """What identity experts add that are arithmetic: ids from E on; the one after the last is a dropped branch."""
    if structure.special != "identity" or structure.as_modules == structure.choices:
        return []
    copied = f"(ids >= {structure.num_experts}) & (ids < {structure.choices})"
    return [f"out = out + (weights * ({copied})).sum(dim=-1, keepdim=True) * h"]


def _where_loop(structure: Structure) -> list[str]:
    if structure.rows == "flat":
        return [
            "out = torch.zeros_like(h)",
            f"for e in range({structure.as_modules}):",
            "    token, slot = torch.where(ids == e)",
            "    if token.numel() == 0:",
            "        continue",
            *_indented(call_lines(structure, "e", "h[token]")),
            "    out.index_add_(0, token, y * weights[token, slot, None])",
        ]
    return [
        "out = torch.zeros_like(h)",
        f"for e in range({structure.as_modules}):",
        "    sample, token, slot = torch.where(ids == e)",
        *_indented(call_lines(structure, "e", "h[sample, token]")),
        "    out[sample, token] += weights[sample, token, slot].unsqueeze(-1) * y",
    ]


def _flat(structure: Structure, statements: list[str]) -> list[str]:
    """Statements written for [N, H] rows, for rows of either layout."""
    if structure.rows == "flat":
        return statements
    last = [
        "out = out.view(shape)",
        "h = h.view(shape)",
        "ids, weights = (v.view(*shape[:-1], -1) for v in (ids, weights))",
    ]
    return [
        "shape = h.shape",
        "h, ids, weights = h.reshape(-1, shape[-1]), ids.flatten(0, 1), weights.flatten(0, 1)",
        *statements,
        *last,
    ]


def _hit_loop(structure: Structure) -> list[str]:
    return _flat(
        structure,
        [
            "out = torch.zeros_like(h)",
            f"mask = F.one_hot(ids, num_classes={structure.choices}).permute(2, 1, 0)",
            f"hit = (mask[:{structure.as_modules}].sum(dim=(-1, -2)) > 0).nonzero()",
            "for e in hit.flatten().tolist():",
            "    slot, token = torch.where(mask[e])",
            "    current = h[None, token].reshape(-1, h.shape[-1])",
            *_indented(call_lines(structure, "e", "current")),
            "    out.index_add_(0, token, (y * weights[token, slot, None]).to(h.dtype))",
        ],
    )


def _masks(structure: Structure) -> list[str]:
    if structure.rows == "flat":
        return [
            f"wanted, repeated = ids.reshape(-1), h.repeat_interleave({structure.top_k}, dim=0)",
            "y_all = torch.zeros_like(repeated)",
            f"for e in range({structure.as_modules}):",
            *_indented(call_lines(structure, "e", "repeated[wanted == e]")),
            "    y_all[wanted == e] = y",
            "out = (y_all.view(*weights.shape, -1) * weights.unsqueeze(-1)).sum(dim=1)",
        ]
    return [
        "out = torch.zeros_like(h)",
        f"for e in range({structure.as_modules}):",
        "    mask = (ids == e).any(dim=-1)",
        "    share = (weights * (ids == e)).sum(dim=-1)",
        *_indented(call_lines(structure, "e", "h[mask]")),
        "    out[mask] += share[mask].unsqueeze(-1) * y",
    ]


def _sorted_slices(structure: Structure) -> list[str]:
    return _flat(
        structure,
        [
            "out = torch.zeros_like(h)",
            "order = ids.reshape(-1).argsort()",
            "ends = ids.reshape(-1).bincount().cpu().numpy().cumsum(0)",
            f"rows = order // {structure.top_k}",
            "for e, end in enumerate(ends):",
            "    start = 0 if e == 0 else ends[e - 1]",
            f"    if start == end or e >= {structure.as_modules}:",
            "        continue",
            "    picked = rows[start:end]",
            *_indented(call_lines(structure, "e", "h[picked]")),
            "    y = y * weights.reshape(-1, 1)[order[start:end]]",
            "    out.scatter_add_(0, picked.view(-1, 1).repeat(1, h.shape[-1]), y)",
        ],
    )


def _gate(structure: Structure) -> list[str]:
    """Weights as a dense [*, E], without what is arithmetic."""
    count, kept = structure.choices, structure.as_modules
    short = f"[..., :{kept}]" if kept < count else ""
    if structure.dispatch == "onehot":
        return [
            f"onehot = F.one_hot(ids, {count}).to(h.dtype)",
            f'gate = torch.einsum("...k,...ke->...e", weights, onehot){short}',
        ]
    return [f"gate = h.new_zeros(*ids.shape[:-1], {count}).scatter_(-1, ids, weights){short}"]


def _onehot(structure: Structure) -> list[str]:
    return [
        *_gate(structure),
        *every_lines(structure, "h"),
        'out = torch.einsum("...e,...eh->...h", gate, outs)',
    ]


def _dense(structure: Structure) -> list[str]:
    return _gate(structure) + _run_gate(structure)


def _run_gate(structure: Structure) -> list[str]:
    """Every expert on every row, weighted by `gate`."""
    if structure.dispatch == "bmm":
        kept = structure.as_modules
        return [
            f"copies = h.reshape(1, -1, h.shape[-1]).expand({kept}, -1, -1)",
            *all_lines(structure, "copies"),
            f"out = (outs * gate.reshape(-1, {kept}).t().unsqueeze(-1)).sum(dim=0).view_as(h)",
        ]
    if structure.stacked or structure.container == "attributes":
        return [*every_lines(structure, "h"), "out = (outs * gate.unsqueeze(-1)).sum(dim=-2)"]
    return [
        "out = 0",
        f"for e in range({structure.as_modules}):",
        *_indented(call_lines(structure, "e", "h")),
        "    out = out + gate[..., e, None] * y",
    ]


def _gathered(structure: Structure) -> list[str]:
    return _flat(
        structure,
        [*gathered_lines(structure, "h"), 'out = torch.einsum("nk,nkh->nh", weights, outs)'],
    )


def _by_gate(structure: Structure) -> list[str]:
    """Rows of each expert where its gate is open."""
    if structure.dispatch in ("dense", "bmm"):
        return _run_gate(structure)
    if structure.dispatch == "masks" or structure.rows == "batched":
        place, mask = ("mask", "mask = gate[..., e] > 0")
        if structure.dispatch == "where_loop":
            place, mask = "sample, token", "sample, token = torch.where(gate[..., e] > 0)"
        return [
            "out = torch.zeros_like(h)",
            f"for e in range({structure.as_modules}):",
            f"    {mask}",
            *_indented(call_lines(structure, "e", f"h[{place}]")),
            f"    out[{place}] += gate[..., e][{place}].unsqueeze(-1) * y",
        ]
    return [
        "out = torch.zeros_like(h)",
        f"for e in range({structure.as_modules}):",
        "    (token,) = torch.where(gate[:, e] > 0)",
        "    if len(token) > 0:",
        *_indented(call_lines(structure, "e", "h[token]"), 2),
        "        out.index_add_(0, token, y * gate[token, e, None])",
    ]


def _expert_choice(structure: Structure) -> list[str]:
    flat, count = structure.rows == "flat", structure.num_experts
    if structure.dispatch in ("masks", "dense"):
        gate = (
            f"gate = h.new_zeros({count}, h.shape[0]).scatter(1, chosen, weights).t()"
            if flat
            else f"gate = h.new_zeros(h.shape[0], {count}, h.shape[1]).scatter(2, chosen, weights).transpose(1, 2)"
        )
        return [gate, *_by_gate(structure)]
    if structure.dispatch == "where_loop" and flat:
        return [
            "out = torch.zeros_like(h)",
            f"for e in range({count}):",
            *_indented(call_lines(structure, "e", "h[chosen[e]]")),
            "    out.index_add_(0, chosen[e], y * weights[e].unsqueeze(-1))",
        ]
    if structure.dispatch == "where_loop":
        return [
            "out = torch.zeros_like(h)",
            f"for e in range({count}):",
            "    index = chosen[:, e, :, None].expand(-1, -1, h.shape[-1])",
            *_indented(call_lines(structure, "e", "h.gather(1, index)")),
            "    out = out.scatter_add(1, index, y * weights[:, e, :, None])",
        ]
    if flat:  # bmm
        return [
            "picked = h[chosen]  # [E, B*C, H]",
            *all_lines(structure, "picked"),
            "weighted = (outs * weights.unsqueeze(-1)).flatten(0, 1)",
            "out = torch.zeros_like(h).index_add(0, chosen.flatten(), weighted)",
        ]
    if structure.dispatch == "onehot":
        return [
            "pick = F.one_hot(chosen, h.shape[1]).to(h.dtype)  # [B, E, C, T]",
            'picked = torch.einsum("bect,bth->ebch", pick, h)',
            *_over_samples(structure),
            'out = torch.einsum("bect,bec,ebch->bth", pick, weights, outs)',
        ]
    return [
        "sample = torch.arange(h.shape[0], device=h.device).view(-1, 1, 1)",
        "picked = h[sample, chosen].transpose(0, 1)  # [E, B, C, H]",
        *_over_samples(structure),
        "weighted = outs.transpose(0, 1) * weights.unsqueeze(-1)",
        "index = chosen.flatten(1).unsqueeze(-1).expand(-1, -1, h.shape[-1])",
        "out = torch.zeros_like(h).scatter_add(1, index, weighted.flatten(1, 2))",
    ]


def _over_samples(structure: Structure, name: str = "picked") -> list[str]:
    """Experts over `name` [E, B, C, H] -> `outs` alike."""
    return [
        f"buffers = {name}.flatten(1, 2)",
        *all_lines(structure, "buffers"),
        f"outs = outs.unflatten(1, {name}.shape[1:3])",
    ]


def _buffers(structure: Structure) -> list[str]:
    """Buffers [E, B, C, H] of limited length; special experts that are arithmetic act on the last buffers."""
    count, kept = structure.choices, structure.as_modules
    rest = {"identity": f"picked[{kept}:]", "zero": f"torch.zeros_like(picked[{kept}:])"}.get(structure.special)
    short = f"[:{kept}]" if kept < count else ""
    run = [f"computed = picked{short}", *_over_samples(structure, "computed")]
    if kept < count:
        run.append(f"outs = torch.cat([outs, {rest}])")
    three = ["rows = h.view(*place.shape[:2], -1)", "ids, weights = ids.view_as(place), weights.view_as(place)"]
    if structure.dispatch == "onehot":
        return [
            *three,
            f"expert = F.one_hot(ids, {count}).to(h.dtype)",
            "slot = F.one_hot(place.clamp(max=capacity), capacity + 1)[..., :capacity].to(h.dtype)",
            'combine = torch.einsum("btk,btke,btkc->btec", weights, expert, slot)',
            'picked = torch.einsum("btke,btkc,bth->ebch", expert, slot, rows)',
            *run,
            'out = torch.einsum("btec,ebch->bth", combine, outs).view_as(h)',
        ]
    return [
        *three,
        "place = place.clamp(max=capacity)  # the last slot overflows",
        "sample = torch.arange(len(rows), device=h.device).view(-1, 1, 1)",
        f"buffers = rows.new_zeros({count}, len(rows), capacity + 1, h.shape[-1])",
        f"buffers[ids, sample, place] = rows.unsqueeze(2).expand(-1, -1, {structure.top_k}, -1)",
        "picked = buffers[:, :, :capacity]",
        *run,
        "outs = F.pad(outs, (0, 0, 0, 1))",
        "out = (outs[ids, sample, place] * weights.unsqueeze(-1)).sum(dim=2).view_as(h)",
    ]
