"""What a level must provide for `insert_cache`: its states, how a full step fills them, how a rule's step uses them."""

from abc import ABC, abstractmethod

from torch import fx

from moeca_fx.graph.sites import Sites
from moeca_fx.graph.state import StateSpec
from moeca_fx.passes.cache.builder import StepBuilder


class Level(ABC):
    """One rule on one model, planned on the unedited graph.

    Attributes:
        states: what it keeps between steps.
        terms: how many values of full steps a forecast sums.
        actions: (site path, what the site does on a step of this rule), in network order.
    """

    states: tuple[StateSpec, ...]
    terms: int
    actions: tuple[tuple[str, str], ...]

    @abstractmethod
    def store(self, step: StepBuilder) -> None:
        """On a full step: compute every state."""

    @abstractmethod
    def rewrite(self, step: StepBuilder) -> None:
        """On a step of this rule: rewrite the graph, in network order, and update the states."""

    def follow(self, step: StepBuilder) -> None:
        """On a step of another rule: update states that the step happens to compute; the rest stays as it is."""
        return

    @property
    def store_reads_clock(self) -> bool:
        """Whether a full step needs this rule's clock, to compare a forecast with the truth."""
        return False


def nodes_by_name(module: fx.GraphModule) -> dict[str, fx.Node]:
    """The graph's nodes by name; names are the same in every copy."""
    return {node.name: node for node in module.graph.nodes}


def actions_of(sites: Sites, action: str) -> tuple[tuple[str, str], ...]:
    """The same action for every site."""
    return tuple((site.path, action) for site in sites.ordered)
