"""What one bench run does: a validated description that goes into every record, so that records of it can be found."""

from dataclasses import asdict, dataclass
from typing import Any

from moeca_fx.errors import ConfigError
from moeca_fx.zoo.sampling import find_sampler


@dataclass(frozen=True)
class BenchSettings:
    """Settings that decide the numbers; what only decides which of them are taken stays outside.

    Attributes:
        steps: denoising steps of the reference.
        sampler: one of `moeca_fx.zoo.sampling.SAMPLERS`.
        batch: images sampled together.
        samples: images of each run, a multiple of `batch`; distances between distributions want many.
        seed: of the noise and of a stochastic sampler's fresh noise. The default was used for nothing else.
        repeats: timed trajectories of each run; times are medians over them.
        threads: CPU threads.

    Raises:
        ConfigError: a field is out of range.
    """

    steps: int = 250
    sampler: str = "euler"
    batch: int = 32
    samples: int = 128
    seed: int = 520_117
    repeats: int = 3
    threads: int = 1

    def __post_init__(self) -> None:
        find_sampler(self.sampler)
        for name in ("steps", "batch", "samples", "repeats", "threads"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"bench: {name} must be at least 1, found {value}")
        if self.samples % self.batch:
            raise ConfigError(f"bench: samples must be a multiple of batch ({self.batch}), found {self.samples}")
        if self.seed < 0:
            raise ConfigError(f"bench: seed must not be negative, found {self.seed}")

    @property
    def stochastic(self) -> bool:
        """Whether the sampler draws fresh noise."""
        return find_sampler(self.sampler).stochastic

    def quality_key(self) -> dict[str, Any]:
        """What the images depend on."""
        chosen = asdict(self)
        return {name: chosen[name] for name in ("steps", "sampler", "batch", "samples", "seed")}

    def latency_key(self) -> dict[str, Any]:
        """What the times depend on."""
        chosen = asdict(self)
        return {name: chosen[name] for name in ("steps", "sampler", "batch", "seed", "repeats", "threads")}
