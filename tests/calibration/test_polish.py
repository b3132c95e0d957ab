"""The local search keeps what improves the images and nothing else."""

from moeca_fx.calibration import Replay, find_law, fit_weights, polish, record, state_metric
from moeca_fx.calibration.polish import image_loss
from tests.calibration.samplers import Counting, bent, euler, noise

STEPS = 20


def test_polish_improves_a_bad_schedule_and_is_repeatable() -> None:
    sampler = euler(noise(6, 0), STEPS)
    recording = record(sampler, bent)
    law = find_law(sampler, recording)

    def fit(full):
        return fit_weights(recording, sampler, bent, full, law=law, metric=state_metric(STEPS))

    bad = fit((0, 1, 2, 3, 4))
    found, again = (polish(bad, fit, recording, sampler, bent, tries=60, seed=3) for _ in range(2))
    assert found == again
    assert len(found.full) == 5
    before, after = (image_loss(sampler(Replay(bent, one)), recording.final) for one in (bad, found))
    assert after < before - 1.0


def test_no_time_means_no_tries() -> None:
    sampler = euler(noise(6, 0), STEPS)
    recording = record(sampler, bent)
    start = fit_weights(recording, sampler, bent, (0, 5), law=find_law(sampler, recording), metric=state_metric(STEPS))
    model = Counting(bent)
    assert polish(start, lambda full: start, recording, sampler, model, seconds=0.0) is start
    assert model.calls == 2  # the start itself was judged
