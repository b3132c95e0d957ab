"""Values of a tape and what was matched on it, in words.

v7  ->  "the result of gate"        v0  ->  "input 0"        v12  ->  "aten.topk (of the result of gate)"
"""

from collections.abc import Iterable, Mapping

from moeca_fx.discover.inline.match import Match
from moeca_fx.discover.inline.routings import Routing
from moeca_fx.discover.inline.tape import Entry, Source

_DEEP = 2


def value_in_words(number: int, sources: Mapping[int, Source], entries: Iterable[Entry], depth: int = _DEEP) -> str:
    """Where a value of a tape comes from.

    Args:
        number: of the value.
        sources, entries: of the tape, or of a recipe made from it.
        depth: how many operations are followed back.
    """
    entries = list(entries)
    if number in sources:
        source = sources[number]
        return f"{source.kind} {source.key}" if isinstance(source.key, (int, str)) else source.kind
    maker = next((entry for entry in entries if number in entry.outputs), None)
    if maker is None:
        return "a value in between"
    if maker.is_module:
        return f"the result of {maker.target}"
    name = str(maker.target).rpartition(".")[0] or str(maker.target)
    if not depth or not maker.reads():
        return name
    return f"{name} of {value_in_words(maker.reads()[0], sources, entries, depth - 1)}"


def routing_in_words(routing: Routing) -> str:
    """The form of a routing, e.g. ``top-2 ids and weights of each token``."""
    if routing.kind == "choice":
        return f"each expert takes {routing.slots} tokens"
    if routing.kind == "dense":
        return f"a weight for every token and expert, at most {routing.slots} a token"
    kept = f", kept below place {routing.limit}" if routing.place is not None else ""
    return f"{routing.slots} expert ids and weights a token{kept}"


def match_in_words(match: Match, sources: Mapping[int, Source], entries: Iterable[Entry]) -> str:
    """Rows, routing, weights and what is added."""
    entries = list(entries)
    rows = value_in_words(match.x, sources, entries)
    weights = value_in_words(match.routing.weight, sources, entries)
    rest = f"; added: {value_in_words(match.rest, sources, entries)}" if match.rest is not None else ""
    return f"rows: {rows}; {routing_in_words(match.routing)}; weights: {weights}{rest}"
