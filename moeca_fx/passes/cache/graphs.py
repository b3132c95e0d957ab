"""What `insert_cache` makes: the step graphs of a transformed model, with what each reads and counts."""

from dataclasses import dataclass

from torch import fx

from moeca_fx.graph.state import Counter, StateSpec


@dataclass(frozen=True)
class StepGraph:
    """A full step, or a step of one rule.

    Attributes:
        name: ``"full"`` or the rule's name.
        module: ``(*inputs, *reads, [clock], [prefix]) -> (*outputs, *all states, [counters [C] int64])``.
        reads: states that it takes; a rule's step takes all, a full step those that are carried over.
        clock: whether it takes the step's clock, fp32 [n].
        prefix: whether it continues from the token stream that the probe computed.
        counters: meaning of each counter; a full step has none, but where slots of branches may be empty.
        actions: (site path, what it does in this step), in network order.
    """

    name: str
    module: fx.GraphModule
    reads: tuple[StateSpec, ...]
    clock: bool
    prefix: bool
    counters: tuple[Counter, ...]
    actions: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class ProbeGraph:
    """What runs before the choice of an adaptive schedule.

    Attributes:
        module: ``(*inputs, value before) -> (change [], value, [token stream to continue from])``.
        state: the value that the change is measured against.
        every_step: whether that is the last step's value, or the last full step's.
    """

    module: fx.GraphModule
    state: StateSpec
    every_step: bool


@dataclass(frozen=True)
class CachedGraphs:
    """The step graphs of a transformed model.

    Attributes:
        full_step: the step that computes everything.
        rules: one step a rule of the policy.
        states: cache tensors in the order in which every step returns them.
        probe: None unless the schedule looks at the model.
    """

    full_step: StepGraph
    rules: tuple[StepGraph, ...]
    states: tuple[StateSpec, ...]
    probe: ProbeGraph | None = None

    @property
    def full(self) -> fx.GraphModule:
        """Graph of the full step."""
        return self.full_step.module

    @property
    def cached(self) -> fx.GraphModule:
        """Graph of the first rule."""
        return self.rules[0].module

    @property
    def counters(self) -> tuple[Counter, ...]:
        """Counters of the first rule."""
        return self.rules[0].counters

    @property
    def actions(self) -> tuple[tuple[str, str], ...]:
        """What each site does on steps that are not full: one action, or those of several rules in turn."""
        paths = [path for path, _ in self.rules[0].actions]
        found = [dict.fromkeys(dict(rule.actions)[path] for rule in self.rules) for path in paths]
        return tuple((path, " / ".join(actions)) for path, actions in zip(paths, found, strict=True))

    def modules(self) -> dict[str, fx.GraphModule]:
        """All graphs by name."""
        probe = {"probe": self.probe.module} if self.probe is not None else {}
        return probe | {"full": self.full} | {rule.name: rule.module for rule in self.rules}
