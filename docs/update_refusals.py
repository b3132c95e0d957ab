"""`python docs/update_refusals.py`: write docs/refusals.md from the list of reasons in the package."""

from pathlib import Path

from moeca_fx.reasons import Reason

PAGE = Path(__file__).with_name("refusals.md")
_HEAD = """# Why a model is refused

Written by `python docs/update_refusals.py` from `moeca_fx.reasons`; do not edit. This is a closed list. Each of these
errors carries its reason as `error.code` and leaves the model as it was; the message says which module and what was
found there. `moeca-fx doctor TARGET` shows the evidence ([doctor.md](doctor.md)).

An error without a code is none of these: wrong use (a policy, an option, a file), or, as `PassError`, a defect to
report.

Of several reasons for one layer (a method that was tried, then the modules around it) the code is the first listed one,
and the message has them all.
"""


def page() -> str:
    """The page's text."""
    lines = [_HEAD, "| code | error | what was found | what to do |", "|---|---|---|---|"]
    for reason in Reason:
        lines.append(f"| `{reason}` | `{reason.error}` | {_link(reason.meaning)} | {_link(reason.advice)} |")
    return "\n".join([*lines, ""])


def _link(text: str) -> str:
    return text.replace("docs/registry.md", "[registry.md](registry.md)")


if __name__ == "__main__":
    PAGE.write_text(page())
