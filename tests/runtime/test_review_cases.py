"""Cases that a reviewer found: models and callers that differ from the zoo in one uncommon way."""

from itertools import count

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import moeca_fx
from moeca_fx import MoECa
from moeca_fx.errors import ConfigError, UnprovenRegionError, UnsupportedModelError
from moeca_fx.passes.cache.plan import plan_sites
from moeca_fx.policies.rules import BranchRule
from tests.helpers.grids import slow
from tests.helpers.passes import staged
from tests.helpers.toys import TOKENS, WIDTH, Blend, Mixing, Quarry, Toy, Wedge, toy, toy_inputs
from tests.helpers.transformed import toy_pair
from tests.helpers.zoo_models import relative_error


class _NumberedWedge(Wedge):
    """An expert with a constant of its own that is no parameter."""

    numbers = count(1)

    def __init__(self) -> None:
        super().__init__()
        self.gain = float(next(self.numbers))

    def forward(self, z: Tensor) -> Tensor:
        return super().forward(z) * self.gain


def test_experts_that_differ_in_a_constant_are_refused() -> None:
    model = toy(lambda: Blend(quarry=lambda: Quarry(_NumberedWedge)))
    with pytest.raises(UnsupportedModelError, match="expert 1 differs from its vectorised form"):
        moeca_fx.transform(model, toy_inputs())


class _TwoStreams(nn.Module):
    """An image stream with experts, then a text stream of another length through a dense feed-forward."""

    def __init__(self, text: int) -> None:
        super().__init__()
        self.image = toy()
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.wide, self.back = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.text = text

    def forward(self, grid: Tensor, clock: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        return self.image(grid, clock), words + self.back(functional.silu(self.wide(self.norm(words))))


@pytest.mark.parametrize("text", [4, TOKENS, slow(12)])
def test_a_stream_without_experts_inherits_nothing(text: int) -> None:
    model = _TwoStreams(text).eval().requires_grad_(False)
    inputs = (*toy_inputs(), torch.randn(3, text, WIDTH, generator=torch.Generator().manual_seed(1)))
    stage = staged(model, inputs)
    plans = {plan.site.path: plan for plan in plan_sites(stage.normalized, stage.sites, BranchRule())}
    dense = [plan for path, plan in plans.items() if not path.startswith("image")]
    assert [(plan.action, plan.inherits) for plan in dense] == [("reuse", None)]
    fast = moeca_fx.transform(model, inputs, policy=MoECa(tau0=0.0))
    fast(*inputs)
    grid, clock, words = inputs
    image, held = fast(grid + 0.1, clock + 0.1, words)
    expected = model(grid + 0.1, clock + 0.1, words)
    assert relative_error(image, expected[0]) < 1e-5
    assert relative_error(held, expected[1]) < 1e-5


class _SelfSimilar(Blend):
    """A router that looks at how alike tokens are, through a linear whose weight is the tokens themselves."""

    def choose(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        alike = functional.linear(rows, rows).softmax(-1).amax(-1, keepdim=True)
        share, which = (self.compass(rows) * alike).softmax(-1).topk(self.picks, dim=-1)
        return which, share


def test_tokens_times_tokens_are_not_token_wise() -> None:
    (site,) = staged(toy(_SelfSimilar), toy_inputs()).sites.moe
    assert site.not_synchronized is not None and "linear" in site.not_synchronized


class _Moody(nn.Module):
    """A Python flag that decides by identity."""

    def __init__(self) -> None:
        super().__init__()
        self.toy = toy()

    def forward(self, grid: Tensor, clock: Tensor, mode: object) -> Tensor:
        out: Tensor = self.toy(grid, clock)
        return -out if mode is True else out


def test_python_inputs_of_another_type_are_another_kind_of_call() -> None:
    model = _Moody().eval()
    fast = moeca_fx.transform(model, (*toy_inputs(), True), policy=None)
    with torch.no_grad():
        for mode in (True, 1, 1.0):
            assert relative_error(fast(*toy_inputs(), mode), model(*toy_inputs(), mode)) < 1e-5


def _clocks(fast: nn.Module, clocks: list[float]) -> str:
    kinds, before = "", 0
    for clock in clocks:
        fast(*toy_inputs(clock=clock))
        now = fast.stats().cached_steps
        kinds += "c" if now > before else "f"
        before = now
    return kinds


@pytest.mark.filterwarnings("ignore::moeca_fx.NothingReusedWarning")
@pytest.mark.parametrize("interval", [2, 3, 4])
def test_two_calls_a_timestep_in_one_context_run_in_full(interval: int) -> None:
    _, fast = toy_pair(MoECa(interval=interval))
    assert _clocks(fast, [0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 0.4, 0.4]) == "ffffffff"


@pytest.mark.filterwarnings("ignore::moeca_fx.NothingReusedWarning")
def test_a_warm_up_call_costs_one_full_step_more() -> None:
    _, fast = toy_pair(MoECa(interval=3))
    assert _clocks(fast, [0.1, 0.1, 0.2, 0.3, 0.4, 0.5]) == "fffcfc"


def test_nothing_reused_is_said_after_one_cycle() -> None:
    _, fast = toy_pair(MoECa(interval=2, tau0=0.0))
    fast(*toy_inputs(clock=0.1))
    fast(*toy_inputs(clock=0.2))
    with pytest.warns(moeca_fx.NothingReusedWarning, match="every branch was recomputed"):
        fast(*toy_inputs(clock=0.3))


def test_a_replaced_forward_is_refused() -> None:
    model = toy()
    original = model.forward
    model.forward = lambda *inputs: original(*inputs)  # type: ignore[method-assign]
    with pytest.raises(UnsupportedModelError, match="forward was replaced on the instance"):
        moeca_fx.transform(model, toy_inputs())


def test_assigned_weights_are_used() -> None:
    model, other = toy(), toy(seed=1)
    fast = moeca_fx.transform(model, toy_inputs(), policy=MoECa())
    fast.load_state_dict(other.state_dict(), assign=True)
    with torch.no_grad():
        assert relative_error(fast(*toy_inputs()), other(*toy_inputs())) < 1e-5


class _OneByOne(Mixing):
    """Attention in a Python loop over the samples."""

    def forward(self, z: Tensor) -> Tensor:
        return torch.cat([super(_OneByOne, self).forward(z[i : i + 1]) for i in range(z.shape[0])])


def test_a_batch_fixed_by_the_models_code_is_traced_once_a_size() -> None:
    model = toy(mixing=_OneByOne)
    fast = moeca_fx.transform(model, toy_inputs(), policy=None)
    for batch in (2, 3, 2):
        inputs = toy_inputs(batch)
        with torch.no_grad():
            torch.testing.assert_close(fast(*inputs), model(*inputs), rtol=1e-5, atol=1e-5)
    assert "fixes the batch" in str(moeca_fx.inspect(model, toy_inputs()))


class _WithContext(Toy):
    context = "text"


def test_attributes_that_would_be_hidden_are_refused() -> None:
    model = _WithContext().eval()
    with pytest.raises(UnsupportedModelError, match=r"attributes of its own .*context"):
        moeca_fx.transform(model, toy_inputs())


def test_reports_need_a_policy() -> None:
    for report in (moeca_fx.inspect, moeca_fx.estimate_memory):
        with pytest.raises(ConfigError, match=r"expected moeca_fx.MoECa\(...\) or another method, .*found NoneType"):
            report(toy(), toy_inputs(), policy=None)  # type: ignore[arg-type]


class _TwoInOne(Toy):
    """Both attentions run in the forward of the model itself."""

    def forward(self, grid: Tensor, clock: Tensor) -> Tensor:
        for _ in range(2):
            heads = grid.view(grid.shape[0], TOKENS, 2, WIDTH // 2).transpose(1, 2)
            mixed = functional.scaled_dot_product_attention(heads, heads, heads)
            grid = grid + mixed.transpose(1, 2).reshape(grid.shape)
        return super().forward(grid, clock)


def test_sites_written_in_one_forward_have_paths_of_their_own() -> None:
    model = _TwoInOne().eval().requires_grad_(False)
    report = moeca_fx.inspect(model, toy_inputs())
    paths = [site.path for site in report.sites]
    assert len(paths) == len(set(paths)) == 4
    fast = moeca_fx.transform(model, toy_inputs(), policy=MoECa(interval=1))
    assert relative_error(fast(*toy_inputs()), model(*toy_inputs())) < 1e-5


def test_full_shared_expert_counts_every_row() -> None:
    _, fast = toy_pair(MoECa(interval=2, shared_expert="full"))
    for clock in (0.1, 0.2):
        fast(*toy_inputs(clock=clock))
    (site,) = (site for site in fast.stats().sites if site.kind == "moe")
    assert site.rows_recomputed == site.rows == 3 * TOKENS


def test_nothing_proven_is_changed() -> None:
    class Doubled(Quarry):
        def forward(self, grains: Tensor, which: Tensor, share: Tensor) -> Tensor:
            return self.carve(grains, which, share) + self.carve(grains, which, share)

    with pytest.raises(UnprovenRegionError):
        moeca_fx.transform(toy(lambda: Blend(quarry=Doubled)), toy_inputs())
