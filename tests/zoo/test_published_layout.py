"""Published parameter names, shapes and FLOPs of every named size."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moeca_fx.zoo import DiTMoE, DSMoE, example_inputs
from moeca_fx.zoo.catalog import CONFIGS, TRAINED, build
from moeca_fx.zoo.dsmoe_config import DSMoEConfig
from moeca_fx.zoo.flops import forward_flops
from tests.helpers.grids import slow
from tests.zoo import published

LAYOUTS = {
    "dsmoe-s-e16": published.dsmoe(384, 10, 16, 768),
    "dsmoe-s-e48": published.dsmoe(384, 12, 48, 128),
    "dsmoe-b-e16": published.dsmoe(768, 10, 16, 1536),
    "dsmoe-b-e48": published.dsmoe(768, 12, 48, 256),
    "dsmoe-l-e16": published.dsmoe(1024, 20, 16, 2048),
    "dsmoe-l-e48": published.dsmoe(1024, 24, 48, 448),
    "dsmoe-3b-e16": published.dsmoe(1152, 30, 16, 2880),
    "dit-moe-s": published.dit_moe(384, 12, 6, 8, packed=False),
    "dit-moe-b": published.dit_moe(768, 12, 12, 8, packed=False),
    "dit-moe-xl": published.dit_moe(1152, 28, 16, 8, packed=True),
    "dit-moe-g": published.dit_moe(1408, 40, 16, 16, packed=True),
}

GFLOPS = {
    "dsmoe-s-e16": 13.885,
    "dsmoe-s-e48": 11.262,
    "dsmoe-b-e16": 53.477,
    "dsmoe-b-e48": 42.500,
    "dsmoe-l-e16": 188.272,
    "dsmoe-l-e48": 160.892,
    "dsmoe-3b-e16": 402.114,
    "dit-moe-s": 32.062,
    "dit-moe-b": 125.773,
    "dit-moe-xl": 655.933,
    "dit-moe-g": 1396.653,
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_state_dict_has_the_published_names_and_shapes(name):
    config = CONFIGS[name]
    with torch.device("meta"):
        model = DSMoE(config) if isinstance(config, DSMoEConfig) else DiTMoE(config)
    found = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert found == LAYOUTS[name]


@pytest.mark.parametrize("name", GFLOPS)
def test_flops_match_the_published_figure(name):
    assert forward_flops(CONFIGS[name]) / 1e9 == pytest.approx(GFLOPS[name], rel=1e-4)


@pytest.mark.parametrize("name", ["dsmoe-s-e16", slow("dsmoe-s-e48"), "dit-moe-s"])
def test_flops_of_a_real_run_match_the_published_figure(name):
    model = build(name)
    inputs = example_inputs(model, batch=1)
    # The CPU flash kernel has no FLOP formula in torch, the plain one is made of counted products.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(*inputs)
    assert counter.get_total_flops() / 1e9 == pytest.approx(GFLOPS[name], rel=0.01)


def test_every_config_is_covered():
    assert set(LAYOUTS) == set(GFLOPS) == set(CONFIGS) - set(TRAINED)
