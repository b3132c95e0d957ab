"""A policy: a schedule and the rules it chooses from; and a method: a named policy with published parameters."""

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from moeca_fx.errors import ConfigError
from moeca_fx.policies.checks import check_types
from moeca_fx.policies.rules import Rule
from moeca_fx.policies.schedule import Schedule


@dataclass(frozen=True)
class Policy:
    """When a step is full, and what the others do.

    Args:
        schedule: chooses a full step or a rule by its position.
        rules: at least one; their names are distinct.
    """

    schedule: Schedule
    rules: tuple[Rule, ...]

    def __post_init__(self) -> None:
        names = [rule.name for rule in self.rules]
        if not names or len(set(names)) != len(names):
            raise ConfigError(f"Policy.rules: expected at least one rule and distinct names, found {names}")

    @property
    def label(self) -> str:
        """The kind of policy, for messages."""
        return "+".join(rule.level for rule in self.rules)

    def as_dict(self) -> dict[str, Any]:
        """Its parts, ready for JSON."""
        rules = [{"level": rule.level, **asdict(rule), "predictor": repr(rule.predictor)} for rule in self.rules]
        return {"schedule": repr(self.schedule), "rules": rules}


@dataclass(frozen=True)
class Method(ABC):
    """Base of the named methods: a frozen config whose fields are the method's published parameters.

    A subclass is one file in `moeca_fx.policies.methods`; it is found there by itself. It sets `method` and builds the
    parts in `policy`.
    """

    method: ClassVar[str]

    def __post_init__(self) -> None:
        check_types(self)
        self._check()
        self.policy()  # the parts check what they are made of

    def _check(self) -> None:  # noqa: B027  # most methods leave it to their parts
        """Raise `ConfigError` for values, of the right types, that do not fit; the parts check theirs."""

    @abstractmethod
    def policy(self) -> Policy:
        """The method as schedule and rules."""

    def check_run(self, steps: int, sampler: str) -> None:
        """Raise when the method was made for trajectories of another length or for another sampler.

        Raises:
            ConfigError: names what it was made for.
        """
        made_for, made_with = getattr(self, "steps", 0), getattr(self, "sampler", "")
        if made_for and made_for != steps:
            raise ConfigError(
                f"policy {self.method!r} was made for {made_for} steps, found {steps}; run {made_for} steps, or tune "
                f"another one for {steps}"
            )
        if made_with and made_with != sampler:
            raise ConfigError(
                f"policy {self.method!r} was made with the {made_with} sampler, found {sampler}; use that one, or tune "
                f"another policy for {sampler}"
            )

    def as_dict(self) -> dict[str, Any]:
        """Field names and values, ready for JSON and YAML."""
        return asdict(self)
