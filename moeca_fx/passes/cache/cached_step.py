"""A cached step: every site decides what to recompute, computes only that, and writes it into its cache.

attn  = proj(sdpa(q, k, v))                     expert', w' = router(x + gate * cache_attn)      provisional
x1    = x + gate * attn                         refresh     = any branch unmatched or over its threshold
y     = experts(x1)                      -->    attn        = write_rows(cache_attn, row, attention of the rows)
x2    = x1 + gate * (y + shared(x1))            expert, w   = router(x + gate * attn)            final
                                                feature     = write_rows(cache_feature, branch, experts(picked))
                                                y           = combine_branches(feature, w)
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from moeca_fx.graph.layout import TokenAxes
from moeca_fx.graph.rewrite import call, clone_nodes
from moeca_fx.graph.row_program import RowProgram, build_row_program
from moeca_fx.graph.sites import AttentionSite, DenseFFNSite, MoESite
from moeca_fx.graph.slicing import between
from moeca_fx.graph.state import Counter
from moeca_fx.ops import dispatch, rows
from moeca_fx.ops.attention_rows import attention_rows
from moeca_fx.passes.cache.full_step import HEADS, count, slots
from moeca_fx.passes.cache.plan import STREAM, SitePlan, shared_axes
from moeca_fx.policies import MoECa, branch

REUSED = 0
UNMATCHED = 2
# Key in a node's metadata: the `Counter` that its FLOPs are proportional to.
SCALES_WITH = "moeca_scales_with"


def recomputed(code: Tensor) -> Tensor:
    """[B, T, k] bool: branches that are recomputed."""
    return code > REUSED


def tokens_recomputed(code: Tensor) -> Tensor:
    """[B, T] bool: tokens with at least one recomputed branch."""
    return (code > REUSED).any(-1)


def count_matched(code: Tensor) -> Tensor:
    """How many branches matched, [] int64."""
    return (code < UNMATCHED).sum(dtype=torch.int64)


def count_padded(mask: Tensor) -> Tensor:
    """Query rows that padded row attention executes for a refresh mask [B, T], [] int64."""
    return mask.sum(1).amax() * mask.shape[0]


def refreshed_weight(code: Tensor, now: Tensor, then: Tensor) -> Tensor:
    """Slot weights after the step: `now` where the slot is recomputed, else `then`."""
    return torch.where(code > REUSED, now, then)


@dataclass
class CachedStep:
    """Edits a vectorised graph into a cached step; `run` once.

    Attributes:
        module: edited in place.
        policy: the policy.
        cache: graph input of every state, by state name.
        updated: node that holds every state after the step, by state name.
        counters: what is counted, with the node that counts it.
    """

    module: fx.GraphModule
    policy: MoECa
    cache: dict[str, fx.Node]
    updated: dict[str, fx.Node] = field(default_factory=dict)
    counters: list[tuple[Counter, fx.Node]] = field(default_factory=list)
    mask: fx.Node | None = None

    def run(self, plans: Sequence[SitePlan]) -> None:
        """Rewrite every site, in network order."""
        self.graph = self.module.graph
        self.nodes = {node.name: node for node in self.graph.nodes}
        attention = {plan.site.path: plan for plan in plans if isinstance(plan.site, AttentionSite)}
        with self.graph.inserting_before(self.graph.output_node()):
            for plan in plans:
                site = plan.site
                if isinstance(site, AttentionSite):
                    if plan.action != "synchronized":  # its MoE site does that
                        self._attention(site, plan)
                elif isinstance(site, MoESite):
                    self._moe(site, plan, attention.get(site.attention or ""))
                else:
                    self._dense_ffn(site, plan)

    def _emit(self, target: Any, *args: Any, name: str) -> fx.Node:
        return call(self.graph, target, *args, name=name)

    def _emit_program(
        self,
        program: RowProgram,
        row: fx.Node,
        name: str,
        counter: Counter,
        given: dict[fx.Node, fx.Node] | None = None,
    ) -> list[fx.Node]:
        """Call a row program, whose work grows with `counter`; one [M, rest] node per output."""
        values = given or {}
        self.module.add_submodule(name, program.module)
        inputs = [values.get(node, node) for node in program.inputs]
        result = self.graph.create_node("call_module", name, (row, *inputs), name=f"{name}_result")
        result.meta[SCALES_WITH] = counter
        return [
            self._emit(operator.getitem, result, index, name=f"{name}_{index}") for index in range(len(program.axes))
        ]

    def _count(self, site: str, kind: str, target: Any, value: fx.Node) -> None:
        name = f"count_{site.replace('.', '_')}_{kind}"
        self.counters.append((Counter(site, kind), self._emit(target, value, name=name)))

    def _replace(self, old: fx.Node, new: fx.Node, keep: Sequence[fx.Node] = ()) -> None:
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new and user not in keep)

    # -- attention ----------------------------------------------------------------------------------------------

    def _attention(self, site: AttentionSite, plan: SitePlan) -> None:
        if plan.action == "full":
            return
        state = f"{site.path}.attn"
        if plan.action == "reuse":
            self.updated[state] = self.cache[state]
        else:
            assert self.mask is not None, f"{site.path}: rows without an earlier MoE site"
            self._refresh_attention(site, self.mask)
        self._replace(self.nodes[site.output], self.updated[state])

    def _refresh_attention(self, site: AttentionSite, mask: fx.Node) -> None:
        """Recompute the attention rows of the tokens in `mask` (method section 4, point c)."""
        base = site.path.replace(".", "_")
        stream = self.nodes[site.residual_in]
        query, key, value = (self.nodes[name] for name in (site.query, site.key, site.value))
        core, output = self.nodes[site.core], self.nodes[site.output]
        project = build_row_program(self.module, stream, STREAM, [query, key, value], site.tokens)
        finish = build_row_program(self.module, stream, STREAM, [output], site.tokens, given={core: HEADS})
        row = self._emit(rows.select_rows, mask, name=f"{base}_row")
        by_row = Counter(site.path, "attention_rows")
        new_query, new_key, new_value = self._emit_program(project, row, f"{base}_project_rows", by_row)
        for kind, fresh in (("key", new_key), ("value", new_value)):
            self._write(f"{site.path}.{kind}", row, fresh)
        attended = self._emit(
            attention_rows._opoverload,
            new_query,
            self.updated[f"{site.path}.key"],
            self.updated[f"{site.path}.value"],
            row,
            _softmax_scale(core),
            name=f"{base}_attended",
        )
        attended.meta[SCALES_WITH] = Counter(site.path, "attention_padded")
        (fresh_output,) = self._emit_program(finish, row, f"{base}_output_rows", by_row, {core: attended})
        self._write(f"{site.path}.attn", row, fresh_output)
        self._count(site.path, "attention_rows", count, mask)
        self._count(site.path, "attention_padded", count_padded, mask)

    def _write(self, state: str, row: fx.Node, values: fx.Node) -> None:
        name = "new_" + state.replace(".", "_")
        self.updated[state] = self._emit(rows.write_rows, self.cache[state], row, values, name=name)

    # -- MoE ----------------------------------------------------------------------------------------------------

    def _moe(self, site: MoESite, plan: SitePlan, attention: SitePlan | None) -> None:
        base = site.path.replace(".", "_")
        synchronized = attention is not None and attention.action == "synchronized"
        shared_program = self._shared_program(site, plan)
        expert, weight = self._slots(site, self.nodes[site.expert]), self._slots(site, self.nodes[site.weight])
        if synchronized:
            assert attention is not None and isinstance(attention.site, AttentionSite)
            provisional = self._provisional_routing(site, attention.site)
        else:
            provisional = (expert, weight)
        threshold = self._threshold(site, provisional[0])
        if synchronized:
            assert attention is not None and isinstance(attention.site, AttentionSite)
            *_, first_code = self._decide(site, *provisional, threshold, f"{base}_provisional")
            self.mask = self._emit(tokens_recomputed, first_code, name=f"{base}_refresh")
            self._refresh_attention(attention.site, self.mask)
            output = self.nodes[attention.site.output]
            self._replace(output, self.updated[f"{attention.site.path}.attn"])
        slot, slot_expert, slot_weight, code = self._decide(site, expert, weight, threshold, base)
        if not synchronized:
            self.mask = self._emit(tokens_recomputed, code, name=f"{base}_refresh")
        self._experts(site, slot, slot_expert, code, weight)
        self._shared(site, plan, code, shared_program)
        self._store_routing(site, expert, slot_expert, slot_weight, code)
        self._count(site.path, "matched", count_matched, code)
        picked = self._emit(recomputed, code, name=f"{base}_recomputed")
        self._count(site.path, "recomputed", count, picked)

    def _slots(self, site: MoESite, node: fx.Node) -> fx.Node:
        return self._emit(slots, node, site.tokens, site.top_k, name=f"{node.name}_slots")

    def _provisional_routing(self, site: MoESite, attention: AttentionSite) -> tuple[fx.Node, fx.Node]:
        """Router on the token state that the cached attention gives (point a): a copy of the nodes in between."""
        output, expert, weight = (self.nodes[name] for name in (attention.output, site.expert, site.weight))
        path = between([output], [expert, weight])
        copies = clone_nodes(self.graph, path, {output: self.cache[f"{attention.path}.attn"]}, "provisional")
        return self._slots(site, copies[expert]), self._slots(site, copies[weight])

    def _threshold(self, site: MoESite, expert: fx.Node) -> fx.Node:
        base, policy = site.path.replace(".", "_"), self.policy
        activation = self._emit(
            branch.update_activation,
            self.cache[f"{site.path}.activation"],
            expert,
            policy.beta,
            name=f"{base}_activation",
        )
        return self._emit(
            branch.expert_threshold,
            activation,
            policy.tau0,
            policy.alpha,
            policy.entropy_norm,
            name=f"{base}_threshold",
        )

    def _decide(
        self, site: MoESite, expert: fx.Node, weight: fx.Node, threshold: fx.Node, name: str
    ) -> tuple[fx.Node, ...]:
        held = [self.cache[f"{site.path}.{kind}"] for kind in ("expert", "weight", "norm")]
        policy = self.policy
        options = (policy.lambda1, policy.lambda2, policy.score_weight)
        decision = self._emit(branch.decide, expert, weight, *held, threshold, *options, name=f"{name}_decision")
        parts = ("slot", "slot_expert", "slot_weight", "code")
        return tuple(
            self._emit(operator.getitem, decision, index, name=f"{name}_{part}") for index, part in enumerate(parts)
        )

    def _experts(self, site: MoESite, slot: fx.Node, slot_expert: fx.Node, code: fx.Node, weight: fx.Node) -> None:
        """Run the picked branches only; reused features stay where they are (points 4 and 5)."""
        base = site.path.replace(".", "_")
        x, combined = self.nodes[site.x], self.nodes[site.experts]
        plan = self._emit(dispatch.plan_recomputed, code, slot_expert, site.num_experts, name=f"{base}_plan")
        picked, row_expert, offsets = (
            self._emit(operator.getitem, plan, index, name=f"{base}_{part}")
            for index, part in enumerate(("branch", "row_expert", "offsets"))
        )
        inputs = self._emit(dispatch.gather_branches, x, picked, site.top_k, name=f"{base}_rows")
        hidden = self.graph.create_node(
            "call_module", f"{base}_experts", (inputs, row_expert, offsets), name=f"{base}_hidden"
        )
        hidden.meta[SCALES_WITH] = Counter(site.path, "recomputed")
        self._write(f"{site.path}.feature", picked, hidden)
        norm = self._emit(dispatch.feature_norm, hidden, name=f"{base}_hidden_norm")
        self._write(f"{site.path}.norm", picked, norm)
        aligned = self._emit(branch.to_slots, weight, slot, name=f"{base}_weight_by_slot")
        feature = self.updated[f"{site.path}.feature"]
        result = self._emit(dispatch.combine_branches, feature, aligned, x, name=f"{base}_combined")
        self._replace(combined, result)

    def _store_routing(
        self, site: MoESite, expert: fx.Node, slot_expert: fx.Node, slot_weight: fx.Node, code: fx.Node
    ) -> None:
        base, path = site.path.replace(".", "_"), site.path
        self.updated[f"{path}.expert"] = slot_expert
        held = self.cache[f"{path}.weight"]
        self.updated[f"{path}.weight"] = self._emit(
            refreshed_weight, code, slot_weight, held, name=f"new_{base}_weight"
        )
        before = self.cache[f"{path}.activation"]
        self.updated[f"{path}.activation"] = self._emit(
            branch.update_activation, before, expert, self.policy.beta, name=f"new_{base}_activation"
        )

    def _shared_program(self, site: MoESite, plan: SitePlan) -> tuple[RowProgram, TokenAxes] | None:
        """Built before any edit, while the graph between root and shared output is still the model's."""
        if not any(state.kind == "shared" for state in plan.states):
            return None
        root_axes, axes = shared_axes(site, self.nodes)
        root, shared = self.nodes[site.shared_root or ""], self.nodes[site.shared or ""]
        return build_row_program(self.module, root, root_axes, [shared], site.tokens), axes

    def _shared(self, site: MoESite, plan: SitePlan, code: fx.Node, built: tuple[RowProgram, TokenAxes] | None) -> None:
        if built is None:
            return
        program, axes = built
        base, state = site.path.replace(".", "_"), f"{site.path}.shared"
        if self.policy.shared_expert == "reuse":
            self.updated[state] = self.cache[state]
        else:
            mask = self._emit(tokens_recomputed, code, name=f"{base}_shared_mask")
            row = self._emit(rows.select_rows, mask, name=f"{base}_shared_row")
            (fresh,) = self._emit_program(program, row, f"{base}_shared_rows", Counter(site.path, "shared_rows"))
            self._write(state, row, fresh)
            self._count(site.path, "shared_rows", count, mask)
        dense = self._emit(rows.tokens_back, self.updated[state], axes.batch, axes.token, name=f"{base}_shared")
        self._replace(self.nodes[site.shared or ""], dense)

    # -- dense feed-forward -------------------------------------------------------------------------------------

    def _dense_ffn(self, site: DenseFFNSite, plan: SitePlan) -> None:
        if plan.action == "full":
            return
        base, state = site.path.replace(".", "_"), f"{site.path}.ffn"
        stream, output = self.nodes[site.residual_in], self.nodes[site.output]
        if plan.action == "reuse":
            self.updated[state] = self.cache[state]
        else:
            assert self.mask is not None, f"{site.path}: rows without an earlier MoE site"
            program = build_row_program(self.module, stream, STREAM, [output], site.tokens)
            row = self._emit(rows.select_rows, self.mask, name=f"{base}_row")
            (fresh,) = self._emit_program(program, row, f"{base}_output_rows", Counter(site.path, "ffn_rows"))
            self._write(state, row, fresh)
            self._count(site.path, "ffn_rows", count, self.mask)
        self._replace(output, self.updated[state])


def _softmax_scale(core: fx.Node) -> float | None:
    scale = core.kwargs.get("scale")
    assert scale is None or isinstance(scale, float), f"{core.name}: a softmax scale is a number"
    return scale
