"""What a tiny MoE diffusion transformer may look like: one field an axis, and which values go together.

    Structure(container="dict", routing="capacity", dispatch="sorted_slices", ...)
    why_invalid(structure)      None, or the rule that it breaks
    complete({"gate": "conv"})  a random valid structure with this value

Rules read a few axes each, so that `complete` can settle whether a pair of values occurs in any valid structure at all.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

AXES: dict[str, tuple[Any, ...]] = {
    "routing": ("token_choice", "expert_choice", "threshold", "capacity"),
    "container": ("list", "dict", "attributes", "stacked_in_out", "stacked_out_in"),
    "dispatch": ("where_loop", "hit_loop", "masks", "sorted_slices", "onehot", "dense", "bmm", "gathered"),
    "split": ("inline", "method", "module"),
    "gate": ("linear", "parameter", "conv", "mlp", "cosine"),
    "scores": ("softmax", "sigmoid", "both", "softmax_of_chosen"),
    "selection": ("plain", "bias", "groups", "noisy"),
    "top_k": (1, 2, 3, 4, 5, 6, 7, 8),
    "num_experts": (4, 6, 8),
    "weights": ("raw", "renormalised", "scaled", "renormalised_scaled"),
    "shared": ("none", "one", "two", "gated"),
    "expert": ("swiglu", "geglu", "gelu_bias", "fused", "layernorm", "two_slices"),
    "special": ("none", "zero", "identity"),
    "call": ("positional", "keyword"),
    "rows": ("flat", "batched"),
    "returns": ("tensor", "pair", "pair_inside"),
    "place": ("gated", "plain", "sub_block"),
    "attention": ("sdpa", "by_hand", "qk_norm", "rope", "gqa", "sinks", "joint", "cross"),
    "data": ("latents", "tokens"),
    "depth": ("all", "first_dense"),
}


@dataclass(frozen=True)
class Structure:
    """One model.

    Attributes:
        routing: who chooses: a token its experts, an expert its tokens, a threshold, or a token with a limit for each
            expert and sample beyond which branches are dropped.
        container: how the experts are held; ``stacked_in_out`` is [E, H, I], ``stacked_out_in`` [E, I, H].
        dispatch: how rows reach their experts and come back.
        split: dispatch written in the forward of the router, in a method of its own, or in a module of its own.
        gate: what makes the logits.
        scores: what becomes of them; ``both`` selects by softmax and weighs by sigmoid.
        selection: what else decides: a correction bias, a group limit, or noise that is off in eval mode.
        top_k: experts of a token; for expert choice the mean; 1 for a threshold, where it means nothing.
        weights: what becomes of the chosen scores.
        shared: experts of every token; ``gated`` weighs one by a sigmoid of its own.
        expert: form of one expert; ``two_slices`` multiplies its matrices in slices and sums.
        special: experts without parameters among the routed ones (two of the kind).
        call: how an expert module gets its rows.
        rows: whether router and experts see [B*T, H] or [B, T, H].
        returns: what the layer returns; ``pair_inside``: the dispatching method returns a pair too.
        place: ``x + gate * moe(..)``, ``x + moe(..)``, or norm and residual inside the layer.
        attention: of every block.
        data: [B, C, h, w] latents, or tokens given by keyword.
        depth: whether the first of the two blocks has a dense feed-forward.
    """

    routing: Literal["token_choice", "expert_choice", "threshold", "capacity"] = "token_choice"
    container: Literal["list", "dict", "attributes", "stacked_in_out", "stacked_out_in"] = "list"
    dispatch: Literal["where_loop", "hit_loop", "masks", "sorted_slices", "onehot", "dense", "bmm", "gathered"] = (
        "where_loop"
    )
    split: Literal["inline", "method", "module"] = "method"
    gate: Literal["linear", "parameter", "conv", "mlp", "cosine"] = "linear"
    scores: Literal["softmax", "sigmoid", "both", "softmax_of_chosen"] = "softmax"
    selection: Literal["plain", "bias", "groups", "noisy"] = "plain"
    top_k: int = 2
    num_experts: int = 4
    weights: Literal["raw", "renormalised", "scaled", "renormalised_scaled"] = "raw"
    shared: Literal["none", "one", "two", "gated"] = "one"
    expert: Literal["swiglu", "geglu", "gelu_bias", "fused", "layernorm", "two_slices"] = "swiglu"
    special: Literal["none", "zero", "identity"] = "none"
    call: Literal["positional", "keyword"] = "positional"
    rows: Literal["flat", "batched"] = "flat"
    returns: Literal["tensor", "pair", "pair_inside"] = "tensor"
    place: Literal["gated", "plain", "sub_block"] = "gated"
    attention: Literal["sdpa", "by_hand", "qk_norm", "rope", "gqa", "sinks", "joint", "cross"] = "sdpa"
    data: Literal["latents", "tokens"] = "latents"
    depth: Literal["all", "first_dense"] = "all"

    @property
    def stacked(self) -> bool:
        """Whether the experts are rows of parameters, not modules."""
        return self.container.startswith("stacked")

    @property
    def choices(self) -> int:
        """Width of the router's output: routed experts and special ones."""
        return self.num_experts + (0 if self.special == "none" else 2)

    @property
    def as_modules(self) -> int:
        """How many of the choices the container runs; special experts of attributes and stacks are plain arithmetic."""
        return self.choices if self.container in ("list", "dict") else self.num_experts

    def __str__(self) -> str:
        plain = asdict(Structure())
        return ", ".join(f"{axis}={value}" for axis, value in asdict(self).items() if value != plain[axis]) or "plain"


@dataclass(frozen=True)
class Rule:
    """`holds` takes the values of `axes`; `why` is the documentation of what is left out."""

    axes: tuple[str, ...]
    holds: Callable[..., bool]
    why: str


_MODULES = ("list", "dict", "attributes")
_PER_TOKEN = ("token_choice", "capacity")
_DISPATCH = {
    "token_choice": AXES["dispatch"],
    "capacity": AXES["dispatch"],
    "threshold": ("where_loop", "masks", "dense", "bmm"),
    "expert_choice": ("where_loop", "masks", "onehot", "dense", "bmm"),
}
RULES = (
    Rule(("top_k", "num_experts"), lambda k, experts: k <= experts, "a token has at most E experts"),
    Rule(
        ("selection", "top_k", "num_experts"),
        lambda selection, k, experts: selection != "groups" or k <= experts // 2,
        "one of two groups of experts is kept, which holds E/2 of them",
    ),
    Rule(
        ("selection", "routing"),
        lambda selection, routing: (
            selection in ("plain", "noisy") or routing in _PER_TOKEN or (selection, routing) == ("bias", "threshold")
        ),
        "group limits and correction biases decide between the experts of a token",
    ),
    Rule(
        ("selection", "special"),
        lambda selection, special: selection != "groups" or special == "none",
        "groups are of equal experts",
    ),
    Rule(
        ("scores", "routing"),
        lambda scores, routing: {
            "threshold": scores == "sigmoid",
            "expert_choice": scores in ("softmax", "sigmoid"),
        }.get(routing, True),
        "a threshold is on independent scores; an expert that chooses tokens has no 'chosen experts' to normalise over",
    ),
    Rule(
        ("routing", "top_k"),
        lambda routing, k: routing != "threshold" or k == 1,
        "a threshold has no k",
    ),
    Rule(
        ("special", "routing"),
        lambda special, routing: special == "none" or routing in _PER_TOKEN,
        "experts without computation are chosen by tokens that need none",
    ),
    Rule(
        ("call", "container"),
        lambda call, container: call == "positional" or container in _MODULES,
        "a row of a parameter is not called",
    ),
    Rule(
        ("expert", "container"),
        lambda expert, container: expert not in ("layernorm", "two_slices") or container in _MODULES,
        "stacks are of plain matrices and biases",
    ),
    Rule(
        ("dispatch", "routing"),
        lambda dispatch, routing: dispatch in _DISPATCH[routing],
        "sorting and gathering need a fixed number of experts a token",
    ),
    Rule(
        ("dispatch", "container"),
        lambda dispatch, container: dispatch != "gathered" or container not in _MODULES,
        "only stacked weights can be gathered for every branch",
    ),
    Rule(
        ("dispatch", "special"),
        lambda dispatch, special: dispatch != "gathered" or special == "none",
        "an expert without weights has none to gather",
    ),
    Rule(
        ("routing", "dispatch", "rows"),
        lambda routing, dispatch, rows: (routing, dispatch, rows) != ("expert_choice", "onehot", "flat"),
        "a one-hot over the tokens of all samples would grow with the square of the batch",
    ),
    Rule(
        ("returns", "split"),
        lambda returns, split: returns != "pair_inside" or split != "inline",
        "without a method of its own there is nothing inside to return a pair",
    ),
)


def why_invalid(values: Structure | Mapping[str, Any]) -> str | None:
    """The first rule that a structure, or some of its values, breaks; None when it breaks none."""
    given = asdict(values) if isinstance(values, Structure) else values
    for rule in RULES:
        if all(axis in given for axis in rule.axes) and not rule.holds(*(given[axis] for axis in rule.axes)):
            return rule.why
    return None


def is_valid(structure: Structure) -> bool:
    """Whether a structure breaks no rule."""
    return why_invalid(structure) is None


def complete(fixed: Mapping[str, Any], generator: random.Random) -> Structure | None:
    """A random valid structure that has these values; None when there is none."""
    if why_invalid(fixed) is not None:
        return None
    axes = [axis for axis in AXES if axis not in fixed]

    def search(values: dict[str, Any], depth: int) -> dict[str, Any] | None:
        if depth == len(axes):
            return values
        axis = axes[depth]
        for value in generator.sample(AXES[axis], len(AXES[axis])):
            tried = {**values, axis: value}
            if all(_fits(rule, tried, axis) for rule in RULES) and (found := search(tried, depth + 1)):
                return found
        return None

    found = search(dict(fixed), 0)
    return None if found is None else Structure(**found)


def _fits(rule: Rule, values: Mapping[str, Any], axis: str) -> bool:
    if axis not in rule.axes or not all(other in values for other in rule.axes):
        return True
    return rule.holds(*(values[other] for other in rule.axes))
