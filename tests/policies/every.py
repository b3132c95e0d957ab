"""Every registered method with settings that fit a short trajectory; a new method appears here by itself."""

from moeca_fx import policies
from moeca_fx.policies import Method

STEPS = 9
# Only what has no default; the rest runs as published.
REQUIRED: dict[str, dict[str, object]] = {
    "toca": {"steps": STEPS, "fresh_ratio": 0.3},
    "duca": {"steps": STEPS, "fresh_ratio": 0.3},
    "teacache": {"steps": STEPS, "threshold": 0.3},
    "dbcache": {"threshold": 0.5},
    "calibrated": {
        "steps": STEPS,
        "full": (0, 1, 4),
        "weights": tuple((step, (1.5, -0.5)) for step in (2, 3, 5, 6, 7, 8)),
    },
}
# One decision for the whole batch, as in the originals.
BATCH_WISE = ("teacache", "dbcache")


def every_method() -> list[Method]:
    """One of each, and the variants of our own."""
    published = [policies.build(name, **REQUIRED.get(name, {})) for name in policies.names()]
    ours = [
        policies.build("branch_forecast", order=2, select="score"),
        policies.build("branch_forecast", select="score_budget", share=0.3),
        policies.build("branch_forecast", select="error_budget", share=0.3, attention="reuse"),
        policies.build("branch_forecast", margin=0.05, attention="full"),
        policies.build("sublayer_forecast", share=0.3),
        policies.build("forecast", order=2, basis="lagrange"),
        policies.build("dbcache", threshold=0.5, order=1),
    ]
    return [*published, *ours]


def label(method: Method) -> str:
    """Name and what differs from the default, for test ids."""
    options = [
        f"{key}={value}" for key, value in method.as_dict().items() if key in ("order", "select", "share", "margin")
    ]
    return "-".join([method.method, *options])
