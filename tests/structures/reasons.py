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
        meaning: what is refused.
    """

    code: str
    error: type[MoecaError]
    pattern: str
    meaning: str


def _unproven(code: str, pattern: str, meaning: str) -> Reason:
    return Reason(code, UnprovenRegionError, pattern, meaning)


def _unsupported(code: str, pattern: str, meaning: str) -> Reason:
    return Reason(code, UnsupportedModelError, pattern, meaning)


REASONS = (
    # Discovery: a region that could not be proven.
    _unproven("experts-did-not-run", r"only \d+ of \d+ experts ran", "example inputs that reach too few experts"),
    _unproven("called-again", r"called \d+ times in one forward", "a layer that runs more than once in a forward"),
    _unproven("not-finite", r"returned NaN or infinity", "weights or inputs that give NaN or infinity"),
    _unproven("weights-off", r"times its routing weight", "an expert enters with another weight than the router's"),
    _unproven("replay-differs", r"its replay (differs|gives)", "a layer that computes something else on other data"),
    _unproven(
        "not-a-weighted-sum", r"differs from its output by", "a dispatch that is not the weighted sum of experts"
    ),
    _unproven("not-by-rows", r"an expert could not be run on token rows", "experts that need more than token rows"),
    _unproven("free-experts-choose", r"some of them have no parameters$", "expert choice with parameterless experts"),
    _unproven("stacked-form", r"no known form of an expert", "stacked parameters whose formula is not known"),
    _unproven(
        "depends-on-data",
        r"makes sizes from data|depends on data|made outside of torch from data",
        "Python around the experts that reads data",
    ),
    _unproven(
        "depends-on-the-batch",
        r"depends on the batch size|in a run with another batch size|none of its tensor arguments has a batch",
        "code around the experts that depends on the batch size",
    ),
    _unproven("one-batch-size", r"does not run on twice the samples", "a model that takes one batch size only"),
    _unproven("writes", r"writes in(to)? ", "writes into arguments, weights or views around the experts"),
    _unproven("operands", r"an operation takes a|the submodule \S+ returns a", "operands that no graph can hold"),
    _unproven("result", r"returns \w+; expected one tensor", "a dispatching method that returns no single tensor"),
    _unproven("roles-unknown", r"no arguments have the shapes of", "a dispatching method with unknown arguments"),
    _unproven("routing-unknown", r"no values of its run are token rows", "a routing of no known form"),
    _unproven("no-dispatch", r"no method of the model is common|no module around the experts", "experts called apart"),
    # No region at all.
    Reason("no-experts", NoMoEFoundError, r"found no mixture-of-experts layer", "no experts under a router"),
    # What no cache can serve.
    _unsupported("mixes-samples", r"per-sample independence is lost", "a router that sees the other samples"),
    _unsupported("random", r"draws random numbers", "dropout left on, or noise in eval mode"),
    _unsupported("state", r"written by forward", "state that forward writes"),
    _unsupported("language-model", r"a causal language model", "token ids in, no position sees later ones"),
    # Graph passes.
    _unsupported("no-residual", r"expected a residual addition over a token stream", "a layer without a residual"),
    _unsupported("mixes-tokens", r"input mixes tokens|rows are not ordered", "experts that read other than token rows"),
    _unsupported("experts-differ", r"from its vectorised form|no common storage", "experts that differ in constants"),
    _unsupported("expert-mixes-rows", r"an expert mixes rows", "experts that look at several rows at once"),
    _unsupported("expert-operation", r"cannot be vectorised", "a parameter used in a way that has no grouped form"),
    Reason("not-traceable", CaptureError, r"torch.export could not trace", "Python that torch.export cannot follow"),
    Reason("fixed-batch", CaptureError, r"its own code fixes the batch size", "a loop over the batch"),
    Reason("trace-differs", CaptureError, r"captured graph differs from", "a trace that does not reproduce the model"),
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
