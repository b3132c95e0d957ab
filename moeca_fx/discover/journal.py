"""What discovery tried and what came of it, for `moeca_fx.doctor`; nothing here decides anything.

attempt  method  blocks.1.mlp.experts.carve   differs from its output by 1.0e-02 relative     not-a-weighted-sum
attempt  block   blocks.1.mlp.forward         expert 2 enters the sum with 1.0100 times ..    weights-off
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from moeca_fx.discover.candidates import Candidate
from moeca_fx.discover.inline.nearest import Nearest, NearMiss
from moeca_fx.discover.inline.tape import NotReplayable
from moeca_fx.discover.probe import Probe
from moeca_fx.discover.records import Discovery, MoERegion
from moeca_fx.reasons import Reason

Kind = Literal["method", "block", "entry"]


@dataclass(frozen=True)
class Attempt:
    """One proof that was tried.

    Attributes:
        candidate: path of the experts' container; of the module for an entry.
        kind: of the proof.
        place: ``<module path>.<method>``.
        seconds: it took.
        error: of the proof; None when it failed.
        found: what matched, in words; empty when it failed.
        problem: why it failed; empty when it did not.
        code: the documented reason of that.
        nearest: of a block: the hypothesis that came nearest; None when there was none.
    """

    candidate: str
    kind: Kind
    place: str
    seconds: float
    error: float | None = None
    found: str = ""
    problem: str = ""
    code: Reason | None = None
    nearest: NearMiss | None = None


@dataclass
class Journal:
    """Filled by one discovery.

    Attributes:
        near_misses: whether to look for the nearest hypothesis of every block, which takes longer.
        candidates: in module order.
        run: the probe's.
        seconds: by stage.
        attempts: in order.
        found: what discovery returned; None before.
    """

    near_misses: bool = False
    candidates: list[Candidate] = field(default_factory=list)
    run: Probe | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    attempts: list[Attempt] = field(default_factory=list)
    found: Discovery | None = None

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what runs inside the block."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def attempt(
        self, candidate: str, kind: Kind, place: str, proof: Callable[[Nearest | None], tuple[MoERegion, str]]
    ) -> MoERegion:
        """Run a proof and write down what it gave.

        Args:
            candidate, kind, place: as in `Attempt`.
            proof: gives the region and what matched, in words.

        Raises:
            NotReplayable: as the proof.
        """
        nearest = Nearest() if self.near_misses and kind == "block" else None
        start = time.perf_counter()
        try:
            region, found = proof(nearest)
        except NotReplayable as reason:
            took, miss = time.perf_counter() - start, None if nearest is None else nearest.miss
            self.attempts.append(
                Attempt(candidate, kind, place, took, problem=str(reason), code=reason.code, nearest=miss)
            )
            raise
        took = time.perf_counter() - start
        self.attempts.append(Attempt(candidate, kind, place, took, error=region.error, found=found))
        return region
