"""The documented reasons for which a model may be refused: the list of the package, by the code that an error carries.

An error without a code, a `PassError` ("please report this model") above all, is a defect and no refusal.
"""

from moeca_fx.errors import MoecaError
from moeca_fx.reasons import Reason

REASONS = tuple(Reason)


def reason_of(error: MoecaError) -> str | None:
    """The code of the documented reason; None when it is none of them."""
    return None if error.code is None else str(error.code)
