"""The MoE layer of a structure as Python source, and its class.

    print(layer_source(structure))     what a user would have written
    layer_class(structure)(width)      ([B, T, H]) -> [B, T, H], or a pair with auxiliary losses

Source, because real layers differ in where things are written: a router and its loop in one forward, in two methods, in
two modules, around other containers. One class with flags would have one shape of code.
"""

import linecache
from functools import cache

import torch
from torch import nn
from torch.nn import functional

from tests.structures import containers, dispatches, experts, routers
from tests.structures.structure import Structure

_SHARED = 16


@cache
def layer_class(structure: Structure) -> type[nn.Module]:
    """The class that the source defines; `inspect.getsource` and tracebacks show its lines."""
    source = layer_source(structure)
    file = f"<structure: {structure}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    names = {"torch": torch, "nn": nn, "F": functional, "__name__": __name__}
    names |= {kind.__name__: kind for kind in (*experts.EXPERTS.values(), experts.Copy, experts.Zero)}
    exec(compile(source, file, "exec"), names)
    made = names["Layer"]
    assert isinstance(made, type) and issubclass(made, nn.Module)
    return made


def layer_source(structure: Structure) -> str:
    """The layer's classes."""
    init = ["super().__init__()", *routers.init_lines(structure)]
    given = ", ".join(dispatches.operands(structure))
    forward = _before(structure) + routers.lines(structure)
    dispatch = dispatches.lines(structure)
    result = (
        ["load = (out != 0).float().mean()", "return out, load"]
        if structure.returns == "pair_inside"
        else ["return out"]
    )
    out = "out, load" if structure.returns == "pair_inside" else "out"
    classes: list[str] = []
    methods: list[str] = []
    if structure.split == "inline":
        init += containers.init_lines(structure)
        forward += dispatch
    elif structure.split == "method":
        init += containers.init_lines(structure)
        methods = _function("run_experts", f"self, {given}", dispatch + result)
        forward.append(f"{out} = self.run_experts({given})")
    else:
        inner = _function("__init__", "self, width", ["super().__init__()", *containers.init_lines(structure)])
        classes = [
            "class Experts(nn.Module):",
            *inner,
            "",
            *_function("forward", f"self, {given}", dispatch + result),
            "",
            "",
        ]
        init.append("self.routed = Experts(width)")
        forward.append(f"{out} = self.routed({given})")
    init += _shared_init(structure)
    if structure.place == "sub_block":
        init.append("self.norm = nn.LayerNorm(width)")
    forward += _after(structure)
    layer = ["class Layer(nn.Module):", *_function("__init__", "self, width", init), ""]
    layer += [*methods, ""] if methods else []
    return "\n".join([*classes, *layer, *_function("forward", "self, x", forward)]) + "\n"


def _function(name: str, parameters: str, body: list[str]) -> list[str]:
    return [f"    def {name}({parameters}):", *(f"        {line}" for line in body)]


def _before(structure: Structure) -> list[str]:
    lines = ["residual, x = x, self.norm(x)"] if structure.place == "sub_block" else []
    lines.append("batch, tokens, width = x.shape")
    return [*lines, "h = x.reshape(-1, width)" if structure.rows == "flat" else "h = x"]


def _shared_init(structure: Structure) -> list[str]:
    one = f"SwiGLU(width, {_SHARED})"
    return {
        "none": [],
        "one": [f"self.shared = {one}"],
        "two": [f"self.shared = nn.ModuleList([{one} for _ in range(2)])"],
        "gated": [f"self.shared = {one}", "self.shared_gate = nn.Linear(width, 1, bias=False)"],
    }[structure.shared]


def _after(structure: Structure) -> list[str]:
    lines = ["out = out.view(batch, tokens, width)"] if structure.rows == "flat" else []
    lines += {
        "none": [],
        "one": ["out = out + self.shared(x)"],
        "two": ["for expert in self.shared:", "    out = out + expert(x)"],
        "gated": ["out = out + torch.sigmoid(self.shared_gate(x)) * self.shared(x)"],
    }[structure.shared]
    if structure.place == "sub_block":
        lines.append("out = residual + out")
    if structure.returns == "tensor":
        return [*lines, "return out"]
    lines.append("z_loss = logits.logsumexp(dim=-1).square().mean()")
    return [
        *lines,
        "return out, z_loss" if structure.returns == "pair" else 'return out, {"z_loss": z_loss, "load": load}',
    ]
