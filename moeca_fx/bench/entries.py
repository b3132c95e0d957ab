"""One line of the bench: what is run, and where it belongs in tables and plots."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["original", "vectorised", "policy", "steps", "solver", "cache-dit"]
Group = Literal["baseline", "peer", "paper", "ours"]


@dataclass(frozen=True)
class Entry:
    """One run.

    Attributes:
        family: what it is a setting of, e.g. ``"taylorseer"``; names its colour and answers to ``--policies``.
        kind: how it is run.
        group: ``baseline``; ``peer``, another method as its authors publish it; ``paper``, MoECa as published;
            ``ours``, what this project recommends.
        fields: its parameters: a policy's fields, ``steps``, ``solver`` and ``order``, or cache-dit's settings.
        label: what tells it from the rest of its family, e.g. ``"N=4 O=1"``.
        policy: name of the policy when it is not `family`.
    """

    family: str
    kind: Kind = "policy"
    group: Group = "peer"
    fields: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""
    policy: str = ""

    @property
    def name(self) -> str:
        """Family and label."""
        return f"{self.family} {self.label}".strip()

    @property
    def method(self) -> str:
        """Name of the policy behind it."""
        return self.policy or self.family

    def key(self) -> dict[str, Any]:
        """What identifies the work it does; its name and group may change without a new run."""
        return {"kind": self.kind, "method": self.method, "fields": dict(self.fields)}
