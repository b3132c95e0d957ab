"""Source of what holds the experts, and of one expert's call in it.

list         self.experts = nn.ModuleList(...)      y = self.experts[e](rows)
dict         self.experts = nn.ModuleDict(...)      y = self.experts[f"e{e}"](rows)
attributes   self.expert_0 = ...                    y = getattr(self, f"expert_{e}")(rows)
stacked      self.w1 = nn.Parameter([E, H, I])      y = (F.silu(rows @ self.w1[e]) * ...) @ self.w2[e]
"""

from tests.structures.experts import EXPERTS
from tests.structures.structure import Structure

INNER = 16
_SPECIAL = {"zero": "Zero", "identity": "Copy"}
_ACTIVATION = {"swiglu": "F.silu", "geglu": "F.gelu", "gelu_bias": "F.gelu", "fused": "F.silu"}


def init_lines(structure: Structure) -> list[str]:
    """Statements of `__init__`; `width` is the width of the tokens."""
    if structure.stacked:
        return _stacked_parameters(structure)
    one, count = f"{EXPERTS[structure.expert].__name__}(width, {INNER})", structure.num_experts
    extra = [f"{_SPECIAL[structure.special]}()" for _ in range(structure.as_modules - count)]
    if structure.container == "attributes":
        return [f"for e in range({count}):", f'    setattr(self, f"expert_{{e}}", {one})']
    more = f" + [{', '.join(extra)}]" if extra else ""
    if structure.container == "list":
        return [f"self.experts = nn.ModuleList([{one} for _ in range({count})]{more})"]
    return [
        f'self.experts = nn.ModuleDict({{f"e{{i}}": e for i, e in enumerate([{one} for _ in range({count})]{more})}})'
    ]


def call_lines(structure: Structure, e: str, rows: str, out: str = "y") -> list[str]:
    """Statements that run expert `e` (an expression) on `rows`."""
    if not structure.stacked:
        return [f"{out} = {_callee(structure, e)}({_keyword(structure)}{rows})"]
    return _formula(
        structure, lambda operand, name: _row_product(structure, operand, f"self.{name}[{e}]"), f"[{e}]", rows, out
    )


def all_lines(structure: Structure, rows: str, out: str = "outs") -> list[str]:
    """Statements that run every expert on its own rows: `rows` [E, M, H] -> [E, M, H] (E: those that compute)."""
    if structure.stacked:
        turned = "" if structure.container == "stacked_in_out" else ".transpose(1, 2)"
        return _formula(
            structure, lambda operand, name: f"torch.bmm({operand}, self.{name}{turned})", ".unsqueeze(1)", rows, out
        )
    keyword, count = _keyword(structure), structure.as_modules
    if structure.container == "attributes":
        return [f'{out} = torch.stack([getattr(self, f"expert_{{e}}")({keyword}{rows}[e]) for e in range({count})])']
    experts = "self.experts" if structure.container == "list" else "self.experts.values()"
    return [f"{out} = torch.stack([expert({keyword}part) for expert, part in zip({experts}, {rows})])"]


def every_lines(structure: Structure, rows: str, out: str = "outs") -> list[str]:
    """Statements that run every expert on the same rows: `rows` [..., H] -> [..., E, H]."""
    if structure.stacked:
        small = "hi" if structure.container == "stacked_in_out" else "ih"

        def product(operand: str, name: str) -> str:
            given = "...h" if name in ("w1", "w3", "gate_up") else "...ei"
            letters = small if given == "...h" else small[::-1]
            made = "...ei" if given == "...h" else "...eh"
            return f'torch.einsum("{given},e{letters}->{made}", {operand}, self.{name})'

        return _formula(structure, product, "", rows, out)
    keyword, count = _keyword(structure), structure.as_modules
    if structure.container == "attributes":
        return [
            f'{out} = torch.stack([getattr(self, f"expert_{{e}}")({keyword}{rows}) for e in range({count})], dim=-2)'
        ]
    experts = "self.experts" if structure.container == "list" else "self.experts.values()"
    return [f"{out} = torch.stack([expert({keyword}{rows}) for expert in {experts}], dim=-2)"]


def gathered_lines(structure: Structure, rows: str, out: str = "outs") -> list[str]:
    """Statements that gather the weights of every branch: `rows` [N, H], `ids` [N, k] -> [N, k, H]."""
    small = "hi" if structure.container == "stacked_in_out" else "ih"

    def product(operand: str, name: str) -> str:
        first = name in ("w1", "w3", "gate_up")
        letters = small if first else small[::-1]
        given, made = ("nh", "nki") if first else ("nki", "nkh")
        return f'torch.einsum("{given},nk{letters}->{made}", {operand}, self.{name}[ids])'

    return _formula(structure, product, "[ids]", rows, out)


def _callee(structure: Structure, e: str) -> str:
    return {
        "list": f"self.experts[{e}]",
        "dict": f'self.experts[f"e{{{e}}}"]',
        "attributes": f'getattr(self, f"expert_{{{e}}}")',
    }[structure.container]


def _keyword(structure: Structure) -> str:
    return "hidden_states=" if structure.call == "keyword" else ""


def _row_product(structure: Structure, operand: str, weight: str) -> str:
    return f"({operand} @ {weight})" if structure.container == "stacked_in_out" else f"F.linear({operand}, {weight})"


def _formula(structure: Structure, product, pick: str, rows: str, out: str) -> list[str]:  # type: ignore[no-untyped-def]
    """One expert's formula; `product(operand, name)` multiplies, `pick` selects the bias rows."""
    act = _ACTIVATION[structure.expert]
    if structure.expert == "fused":
        return [
            f"left, right = {product(rows, 'gate_up')}.chunk(2, dim=-1)",
            f"{out} = {product(f'({act}(left) * right)', 'w2')}",
        ]
    if structure.expert == "gelu_bias":
        return [
            f"middle = {act}({product(rows, 'w1')} + self.b1{pick})",
            f"{out} = {product('middle', 'w2')} + self.b2{pick}",
        ]
    return [
        f"middle = {act}({product(rows, 'w1')}) * {product(rows, 'w3')}",
        f"{out} = {product('middle', 'w2')}",
    ]


def _stacked_parameters(structure: Structure) -> list[str]:
    names = {"fused": ("gate_up", "w2"), "gelu_bias": ("w1", "w2")}.get(structure.expert, ("w1", "w3", "w2"))
    lines = []
    for name in names:
        before, after = ("width", 2 * INNER if name == "gate_up" else INNER) if name != "w2" else (INNER, "width")
        sizes = (before, after) if structure.container == "stacked_in_out" else (after, before)
        shape = f"{structure.num_experts}, {sizes[0]}, {sizes[1]}"
        lines.append(f"self.{name} = nn.Parameter(torch.randn({shape}) / {before}**0.5)")
    if structure.expert == "gelu_bias":
        for name, size in (("b1", INNER), ("b2", "width")):
            lines.append(f"self.{name} = nn.Parameter(torch.randn({structure.num_experts}, {size}))")
    return lines
