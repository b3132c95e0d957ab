"""Figures are drawn from numbers made up here, and hold what they should in the colours they should."""

import pytest
import torch
from PIL import Image, ImageColor

from moeca_fx.bench.entries import Entry
from moeca_fx.bench.latency import Latency
from moeca_fx.bench.plots.activation import plot_activation
from moeca_fx.bench.plots.drift import plot_drift
from moeca_fx.bench.plots.hyperparameters import plot_hyperparameters
from moeca_fx.bench.plots.lambdas import plot_lambdas
from moeca_fx.bench.plots.reuse import plot_reuse
from moeca_fx.bench.plots.score import plot_score
from moeca_fx.bench.plots.style import HUES, INK, OURS, PAPER, looks
from moeca_fx.bench.plots.tradeoff import plot_flops, plot_latency
from moeca_fx.bench.quality import Quality
from moeca_fx.bench.run import Row
from moeca_fx.bench.studies import COMBINATIONS, ScoreResult, hyperparameter_entries, lambda_entries
from moeca_fx.bench.suite import peers
from moeca_fx.bench.traces import DriftTrace, ReuseTrace, RoutingTrace
from moeca_fx.errors import InputError


def quality(speedup=2.0, psnr=40.0):
    return Quality(1, speedup, 1, 0, psnr, psnr, psnr, 1.0, None, None, None, 0.9, 0.9, 0)


def row(family, group, speedup, psnr, timed=None, kind="policy"):
    latency = None if timed is None else Latency((1.0,), timed, timed)
    return Row(Entry(family, kind, group, {}, f"{speedup}"), quality(speedup, psnr), latency)


def pixels(path, colour):
    """How many pixels are close to a colour; a mark's inside is exactly it, blended a little with the grid."""
    with Image.open(path) as picture:
        found = torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8).view(-1, 3)
    distance = (found.short() - torch.tensor(ImageColor.getrgb(colour))).abs().amax(dim=1)
    return int((distance < 30).sum())


ROWS = [
    row("original", "baseline", 1.0, None, timed=1.0, kind="original"),
    row("vectorised", "baseline", 1.0, 130.0, timed=1.3, kind="vectorised"),
    row("fora", "peer", 2.0, 40.0, timed=1.8),
    row("fora", "peer", 4.0, 30.0, timed=3.0),
    row("moeca", "paper", 3.0, 35.0, timed=2.2),
    row("ours", "ours", 3.5, 50.0, timed=2.9),
    Row(Entry("duca", "policy", "peer"), refused="does not fit"),
]


def test_quality_against_flops_and_time(tmp_path):
    flops = plot_flops(ROWS, "made up", tmp_path / "flops.png")
    time = plot_latency(ROWS, "made up", tmp_path / "time.png")
    fora = HUES[peers().index("fora")]
    for path in (flops, time):
        for colour in (OURS, PAPER, fora):
            assert pixels(path, colour) > 50, (path, colour)
    without = plot_flops([r for r in ROWS if r.entry.group != "ours"], "made up", tmp_path / "without.png")
    assert pixels(without, OURS) == 0 and pixels(without, fora) > 50, "a family keeps its colour without the others"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["flops.png", "time.png", "without.png"]


def test_without_times_there_is_no_figure_of_them(tmp_path):
    untimed = [Row(r.entry, r.quality) for r in ROWS]
    assert plot_latency(untimed, "made up", tmp_path / "time.png") is None
    assert not list(tmp_path.iterdir())


def test_colours_follow_the_group_and_the_peers_differ():
    families = [("original", "baseline"), ("fora", "peer"), ("toca", "peer"), ("moeca", "paper"), ("ours", "ours")]
    look = looks(families)
    assert look["moeca"][0] == PAPER and look["ours"] == (OURS, "*") and look["original"][0] == INK
    assert look["fora"] != look["toca"]


def test_reuse_over_match(tmp_path):
    trace = ReuseTrace((1, 2, 3), (0.9, 0.8, 0.9), (0.95, 0.9, 0.85), {"blocks.1.mlp": (0.9, 0.9, 0.8)})
    path = plot_reuse({"tau0=0.8": trace, "tau0=0.4": trace}, "made up", tmp_path / "reuse.png")
    assert pixels(path, HUES[0]) > 100  # drawn over the first, which it equals


def test_drift_is_brighter_where_more_changes(tmp_path):
    still, moving = torch.full((2, 4), 0.01), torch.tensor([[0.01] * 4, [1.0] * 4])
    sites = (("blocks.0.attn", "attention"), ("blocks.0.mlp", "moe"))
    bright = [
        pixels(plot_drift(DriftTrace(sites, drift), "made up", tmp_path / f"{n}.png"), "#fcfdbf")
        for n, drift in enumerate((still, moving))
    ]
    assert bright[1] > 20 * max(bright[0], 1000)


def test_expert_maps(tmp_path):
    counts = torch.zeros(2, 12, 16)
    counts[:, :, 5] = 3.0
    path = plot_activation(RoutingTrace("blocks.1.mlp", counts, ((0, 4), (5, 9))), "made up", tmp_path / "maps.png")
    assert pixels(path, "#fde725") > 100 and pixels(path, "#440154") > 1000
    with pytest.raises(InputError, match="tokens on a square grid, found 15"):
        plot_activation(RoutingTrace("x", counts[..., :15], ((0, 4), (5, 9))), "made up", tmp_path / "no.png")


def test_studies(tmp_path):
    hyper = [Row(entry, quality(psnr=30 + n % 7)) for n, entry in enumerate(hyperparameter_entries())]
    assert pixels(plot_hyperparameters(hyper, "made up", tmp_path / "hyper.png"), PAPER) > 500
    grid = [Row(entry, quality(psnr=30 + n)) for n, entry in enumerate(lambda_entries(0.4))]
    assert pixels(plot_lambdas(grid, "made up", tmp_path / "lambdas.png"), "#fde725") > 1000
    results = [
        ScoreResult("+".join(terms), at, same, Row(Entry("moeca"), quality(psnr=30 + len(terms))))
        for at, same in ((0.8, False), (0.4, False), (0.4, True))
        for terms in COMBINATIONS
    ]
    path = plot_score(results, "made up", tmp_path / "score.png")
    assert pixels(path, OURS) > 100 and pixels(path, PAPER) > 300
