"""What the demo runs: a validated description, written into its JSON so that a result can be repeated."""

from dataclasses import dataclass

from moeca_fx.errors import ConfigError


@dataclass(frozen=True)
class DemoSettings:
    """Settings of one demo run.

    Attributes:
        steps: denoising steps of a trajectory.
        batch: images sampled together.
        repeats: trajectories of each variant; times are medians over them.
        seed: seed of the noise and the labels. The default was used for nothing else: no training, no tuning.
        interval: MoECa's cycle length; every `interval`-th step is full.
        threads: CPU threads torch uses; None takes what is fastest for the original, up to
            `moeca_fx.timing.most_threads`.
        compile: run the vectorised and the cached model through torch.compile.

    Raises:
        ConfigError: a field is out of range.
    """

    steps: int = 250
    batch: int = 32
    repeats: int = 3
    seed: int = 71_421
    interval: int = 4
    threads: int | None = None
    compile: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "repeats", "interval", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"demo: {name} must be at least 1, found {value}")
        if self.seed < 0:
            raise ConfigError(f"demo: seed must not be negative, found {self.seed}")
