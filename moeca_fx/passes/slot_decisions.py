"""slot_decisions: decisions by score as `ops.slot_decisions` has them, for graphs that are exported.

    slot, slot_expert, _, code = decide(expert, weight, held, then, norm, ..)       all tokens, provisionally
    mask     = token_mask(forced_code(code, force))
    experts  = write_rows(slot_expert, row, ..)                                     row = select_rows(mask)
    by_slot  = write_rows(to_slots(weight, slot), row, ..)
-->
    part     = part_of_norms(norm)
    mask, weights = refreshed_tokens(expert, weight, held, then, part, ..)          mask = forced_tokens(mask, force)
    experts  = write_rows(held, row, ..)
    by_slot  = write_rows(weights, row, ..)

What is not refreshed has matched and keeps its slots; what is refreshed is written over. Other decisions become
`decide_slots`. Rows of norms are gathered after their share was computed, so once for both decisions.
"""

import operator
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from moeca_fx.graph.rewrite import call
from moeca_fx.ops import dispatch, rows, slot_decisions, slots
from moeca_fx.policies import branch

_SLOT, _SLOT_EXPERT, _SLOT_WEIGHT, _CODE = range(4)


def rewrite_decisions(module: fx.GraphModule) -> int:
    """Rewrite in place before lists are lowered; how many decisions were rewritten. The caller cleans up."""
    rewriting = _Rewriting(module.graph)
    decisions = module.graph.find_nodes(op="call_function", target=branch.decide)
    return sum([rewriting.rewrite(node) for node in decisions])


@dataclass
class _Rewriting:
    graph: fx.Graph
    parts: dict[tuple[fx.Node, Any], fx.Node] = field(default_factory=dict)  # norms and lambda2 -> part of the score

    def rewrite(self, node: fx.Node) -> bool:
        results = {user.args[1]: user for user in node.users if user.target is operator.getitem}
        slot, weight = results.get(_SLOT), node.args[1]
        readers = list(slot.users) if slot is not None else []
        if len(results) != len(node.users) or any(_reordered(reader) is not weight for reader in readers):
            return False
        with self.graph.inserting_before(node):
            part = self._part(node.args[4], node.args[7])
        expert, weight, held, then, _, threshold, lambda1, _, kind = node.args
        operands = (expert, weight, held, then, part, threshold, lambda1, kind)
        if not self._rewrite_provisional(node, results, readers, operands):
            node.target, node.args, node.kwargs = slot_decisions.decide_slots, operands, {}
            _replace(readers, slot)
        return True

    def _rewrite_provisional(
        self, node: fx.Node, results: dict[Any, fx.Node], by_slot: list[fx.Node], operands: tuple[Any, ...]
    ) -> bool:
        """Where nothing but the mask is read of tokens that are not refreshed."""
        code, slot_expert = results.get(_CODE), results.get(_SLOT_EXPERT)
        masking = None if code is None or _SLOT_WEIGHT in results else _masking(code)
        if masking is None or slot_expert is None:
            return False
        mask, force = masking
        if not all(_is_written_over(value, mask) for value in (slot_expert, *by_slot)):
            return False
        node.target, node.args, node.kwargs = slot_decisions.refreshed_tokens, operands, {}
        with self.graph.inserting_before(mask):
            refreshed = call(self.graph, operator.getitem, node, 0, name=f"{mask.name}_unforced")
            weights = call(self.graph, operator.getitem, node, 1, name=f"{node.name}_weight")
        if force is None:
            _replace([mask], refreshed)
        else:
            mask.target, mask.args = slot_decisions.forced_tokens, (refreshed, force)
        _replace([slot_expert], operands[2])
        _replace(by_slot, weights)
        for result in results.values():
            self._erase(result)
        return True

    def _erase(self, node: fx.Node) -> None:
        """Erase a node and its readers, of which no output needs any."""
        for reader in list(node.users):
            self._erase(reader)
        self.graph.erase_node(node)

    def _part(self, norm: Any, lambda2: Any) -> fx.Node:
        """The part of the score that norms are, computed before rows of them are gathered."""
        if norm.target is slots.slots or norm.target is dispatch.take_rows:
            source, *rest = norm.args
            return call(self.graph, norm.target, self._part(source, lambda2), *rest, name=norm.name)
        key = (norm, lambda2)
        if key not in self.parts:
            with self.graph.inserting_after(norm):
                name = f"{norm.name}_part"
                self.parts[key] = call(self.graph, slot_decisions.part_of_norms, norm, lambda2, name=name)
        return self.parts[key]


def _reordered(reader: fx.Node) -> Any:
    """What a node brings into slot order."""
    return reader.args[0] if reader.target is branch.to_slots else None


def _masking(code: fx.Node) -> tuple[fx.Node, fx.Node | None] | None:
    """The mask that is all that is read of a decision, and what forces it."""
    force = None
    if len(code.users) == 1 and next(iter(code.users)).target is slots.forced_code:
        code = next(iter(code.users))
        force = code.args[1]
    mask = next(iter(code.users)) if len(code.users) == 1 else None
    return (mask, force) if mask is not None and mask.target is slots.token_mask else None  # type: ignore[return-value]  # a node


def _is_written_over(value: fx.Node, mask: fx.Node) -> bool:
    """Whether all readers replace the tokens of a mask."""
    return all(
        user.target is rows.write_rows
        and user.args[0] is value
        and value not in user.args[1:]
        and getattr(user.args[1], "target", None) is rows.select_rows
        and user.args[1].args[0] is mask  # type: ignore[union-attr]  # a node, as above
        for user in value.users
    )


def _replace(old: Iterable[fx.Node], new: Any) -> None:
    for node in old:
        node.replace_all_uses_with(new)
