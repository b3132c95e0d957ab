"""Lists that might be experts if they were alike; for the message that no mixture of experts was found.

experts = ModuleList([SwiGLU, GEGLU, SwiGLU])      "blocks.0.mlp.experts: 2 kinds of modules among 3 ..."
"""

from torch import nn


def unlike_experts(model: nn.Module) -> list[str]:
    """A line for every innermost list of modules with matrices that differ in type or shapes."""
    lines = []
    for path, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.ModuleDict)) or _holds_a_list(module):
            continue
        full = [child for child in module.children() if sum(weight.dim() == 2 for weight in child.parameters()) >= 2]
        kinds = len({(type(child), *(tuple(weight.shape) for weight in child.parameters())) for child in full})
        if kinds >= 2:
            lines.append(
                f"{path}: {kinds} kinds of modules among {len(full)}; experts of one list may differ in the values of "
                "their parameters only, not in class or sizes"
            )
    return lines


def _holds_a_list(module: nn.Module) -> bool:
    return any(isinstance(other, (nn.ModuleList, nn.ModuleDict)) for other in module.modules() if other is not module)
