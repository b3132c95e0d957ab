"""The documented reasons for which a model may be refused, and which of them an error gives.

`reason_of(error)` reads the error's own `code` where it has one, else the text of its message; an error that is none of
these, a `PassError` ("please report this model") above all, is a defect and no refusal.
"""

import re
from dataclasses import dataclass

from moeca_fx.errors import CaptureError, MoecaError, NoMoEFoundError, UnprovenRegionError, UnsupportedModelError


@dataclass(frozen=True)
class Reason:
    """One documented reason.

    Attributes:
        code: its identifier.
        error: class of the error.
        pattern: what its message says.
    """

    code: str
    error: type[MoecaError]
    pattern: str


REASONS = (
    Reason("inline-routing", UnprovenRegionError, r"router runs inside the dispatching method"),
    Reason("stacked-experts", UnprovenRegionError, r"three-dimensional parameters are not supported"),
    Reason("region-output", UnprovenRegionError, r"returns \w+; expected one tensor"),
    Reason("roles-unknown", UnprovenRegionError, r"no arguments have the shapes of token rows"),
    Reason("not-a-weighted-sum", UnprovenRegionError, r"differs from its output by"),
    Reason("experts-did-not-run", UnprovenRegionError, r"only \d+ of \d+ experts ran"),
    Reason("region-called-again", UnprovenRegionError, r"called \d+ times in one forward"),
    Reason("no-dispatching-method", UnprovenRegionError, r"no method of the model is common"),
    Reason("expert-not-by-rows", UnprovenRegionError, r"an expert could not be run on token rows"),
    Reason("not-finite", UnprovenRegionError, r"returned NaN or infinity"),
    Reason("no-router", NoMoEFoundError, r"no router"),
    Reason("no-experts", NoMoEFoundError, r"found no mixture-of-experts layer"),
    Reason("no-residual", UnsupportedModelError, r"expected a residual addition over a token stream"),
    Reason("rows-mix-tokens", UnsupportedModelError, r"experts' input mixes tokens|rows are not ordered"),
    Reason("experts-differ", UnsupportedModelError, r"differs from its vectorised form|has no common storage"),
    Reason("expert-mixes-rows", UnsupportedModelError, r"an expert mixes rows"),
    Reason("expert-operation", UnsupportedModelError, r"uses an expert's parameter in a way that cannot be vectorised"),
    Reason("not-traceable", CaptureError, r"torch.export could not trace"),
    Reason("fixed-batch", CaptureError, r"its own code fixes the batch size"),
    Reason("trace-differs", CaptureError, r"captured graph differs from"),
)


def reason_of(error: MoecaError) -> str | None:
    """The code of the documented reason; None when it is none of them."""
    code = vars(error).get("code")
    if isinstance(code, str):
        return code
    for reason in REASONS:
        if isinstance(error, reason.error) and re.search(reason.pattern, str(error)):
            return reason.code
    return None
