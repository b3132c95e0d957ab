"""Tiny zoo models: every structural feature, small enough for the whole folder to run in seconds."""

from collections.abc import Callable

import pytest

from moeca_fx.zoo import DiTMoE, DiTMoEConfig, DSMoE, DSMoEConfig, randomize_
from moeca_fx.zoo.catalog import TRAINED


@pytest.fixture
def dsmoe_config() -> DSMoEConfig:
    return DSMoEConfig(
        input_size=8,
        hidden_size=32,
        depth=4,
        num_heads=2,
        num_experts=6,
        top_k=3,
        expert_width=16,
        num_classes=10,
    )


@pytest.fixture
def dsmoe(dsmoe_config: DSMoEConfig) -> DSMoE:
    return randomize_(DSMoE(dsmoe_config), seed=1).eval()


@pytest.fixture
def dit_moe_config() -> DiTMoEConfig:
    return DiTMoEConfig(input_size=8, hidden_size=32, depth=2, num_heads=2, num_experts=4, num_classes=10)


@pytest.fixture
def dit_moe(dit_moe_config: DiTMoEConfig) -> DiTMoE:
    return randomize_(DiTMoE(dit_moe_config), seed=1).eval()


@pytest.fixture(scope="session")
def trained() -> Callable[[str], None]:
    """Call it with a trained model's name: skips where a wheel without the repository's weights is tested."""

    def need(name: str) -> None:
        if not TRAINED[name].is_file():
            pytest.skip(f"the weights file {TRAINED[name]} is missing; clone the repository to test it")

    return need
