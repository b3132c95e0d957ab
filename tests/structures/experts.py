"""Routed experts as modules, in the forms that public code has them, and the special ones without parameters."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SwiGLU(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class GEGLU(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, inner * 2)
        self.out = nn.Linear(inner, width)

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states, gate = self.proj(hidden_states).chunk(2, dim=-1)
        return self.out(hidden_states * F.gelu(gate))


class GELUBias(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, inner), nn.GELU(approximate="tanh"), nn.Linear(inner, width))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.net(hidden_states)


class Fused(nn.Module):
    """Gate and up projection in one parameter, multiplied from the right."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.randn(width, 2 * inner) / width**0.5)
        self.down = nn.Parameter(torch.randn(inner, width) / inner**0.5)

    def forward(self, hidden_states: Tensor) -> Tensor:
        gate, up = torch.split(hidden_states @ self.gate_up, self.down.shape[0], dim=-1)
        return (F.silu(gate) * up) @ self.down


class NormInside(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, inner)
        self.act = nn.SiLU()
        self.mid_norm = nn.LayerNorm(inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(self.mid_norm(self.act(self.fc1(self.norm(hidden_states)))))


class TwoSlices(nn.Module):
    """Every matrix multiplied in two slices, as if two devices held one each."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.pretraining_tp = 2
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        each = self.gate_proj.weight.shape[0] // self.pretraining_tp
        gate = torch.cat([F.linear(hidden_states, part) for part in self.gate_proj.weight.split(each, dim=0)], dim=-1)
        up = torch.cat([F.linear(hidden_states, part) for part in self.up_proj.weight.split(each, dim=0)], dim=-1)
        middle = (F.silu(gate) * up).split(each, dim=-1)
        slices = self.down_proj.weight.split(each, dim=1)
        return sum(F.linear(middle[i], slices[i]) for i in range(self.pretraining_tp))


class Copy(nn.Module):
    """An expert that returns its input."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states


class Zero(nn.Module):
    """An expert that computes nothing."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return torch.zeros_like(hidden_states)


EXPERTS: dict[str, type[nn.Module]] = {
    "swiglu": SwiGLU,
    "geglu": GEGLU,
    "gelu_bias": GELUBias,
    "fused": Fused,
    "layernorm": NormInside,
    "two_slices": TwoSlices,
}
