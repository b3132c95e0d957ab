"""Tensor operations of the rewritten graphs: `moeca::` custom ops and plain row functions."""

from moeca_fx.ops.attention_rows import attention_rows
from moeca_fx.ops.branch_plan import branch_plan
from moeca_fx.ops.experts import expert_choice, experts, live_regions
from moeca_fx.ops.grouped_linear import grouped_linear

__all__ = ["attention_rows", "branch_plan", "expert_choice", "experts", "grouped_linear", "live_regions"]
