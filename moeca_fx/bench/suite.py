"""The list of runs: the baselines, the peers at the settings their authors publish, MoECa as published, and ours.

Settings of a peer span speed-ups from 1.5 to 8, so that none is judged by an unlucky point.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moeca_fx import policies
from moeca_fx.bench.entries import Entry, Group
from moeca_fx.bench.fitted import FITTED
from moeca_fx.errors import ConfigError

SPEEDUPS = (1.5, 2, 3, 4, 5, 6, 8)
INTERVALS = (2, 3, 4, 5, 6, 8)
TEACACHE = (0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.2)
FIRST_BLOCK = (0.02, 0.04, 0.08, 0.15, 0.25, 0.4)
LONG_RUN = 50
"""Steps from which cache-dit's default warm-up of 8 steps is kept; with fewer it would be most of the run."""

BASELINES = (Entry("original", "original", "baseline"), Entry("vectorised", "vectorised", "baseline"))

# Short names of fields in labels; the rest keeps its own.
SYMBOLS = {"interval": "N", "order": "O", "threshold": "δ", "first": "F", "last": "B", "warmup": "W"}


def suite(steps: int, stochastic: bool, ours: Iterable[Entry] = ()) -> tuple[Entry, ...]:
    """All runs for a reference of `steps` steps.

    Args:
        ours: what the project recommends for this model, see `from_file`.
    """
    whole = {"steps": steps}
    warmup = {"warmup": 8 if steps >= LONG_RUN else 2}
    return (
        *BASELINES,
        *_fewer_steps(steps, stochastic),
        *_policies("forecast", [{"interval": n, "order": o} for o in (0, 1, 2, 3) for n in (2, 3, 4, 6, 8)]),
        *_policies("fora", [{"interval": n} for n in INTERVALS]),
        *_policies("toca", [{"interval": n} for n in INTERVALS], whole),
        *_policies("duca", [{"interval": n} for n in INTERVALS], whole),
        *_policies("teacache", [{"threshold": value} for value in TEACACHE], {"coefficients": FITTED, **whole}),
        *_policies("teacache-identity", [{"threshold": value} for value in TEACACHE], whole, policy="teacache"),
        *_policies("taylorseer", [{"interval": n, "order": o} for o in (1, 2) for n in INTERVALS]),
        *_policies("taylorseer", [{"interval": n, "order": o} for o in (3, 4) for n in (4, 6)]),
        *_policies("dbcache", [{"threshold": value, "order": o} for o in (0, 1) for value in FIRST_BLOCK], warmup),
        *_cache_dit(warmup),
        *_policies("moeca", [{"interval": n} for n in INTERVALS], group="paper"),
        *ours,
    )


def peers() -> tuple[str, ...]:
    """Families of peers for any sampler, in one order, so that each keeps its colour in all figures."""
    entries = (*suite(LONG_RUN, stochastic=False), *suite(LONG_RUN, stochastic=True))
    return tuple(dict.fromkeys(entry.family for entry in entries if entry.group == "peer"))


def from_file(path: Path, steps: int, sampler: str) -> Entry:
    """A policy file as an entry of ours: ``branch-3x.yaml`` is ``3x`` of the family ``ours branch``.

    Args:
        steps, sampler: of the run.

    Raises:
        ConfigError: it is no policy file, or was made for other steps or another sampler.
    """
    method = policies.load(path)
    method.check_run(steps, sampler)
    family, dash, setting = path.stem.rpartition("-")
    family, setting = (family, setting) if dash else (path.stem, "")
    return Entry(f"ours {family}", "policy", "ours", method.as_dict(), setting, policy=method.method)


def from_files(paths: Sequence[Path], steps: int, sampler: str) -> list[Entry]:
    """`from_file` of each.

    Raises:
        ConfigError: as there, or two files have one name.
    """
    entries = [from_file(path, steps, sampler) for path in paths]
    for position, entry in enumerate(entries):
        if any(entry.name == other.name for other in entries[:position]):
            raise ConfigError(
                f"--policy-file: two files are called {paths[position].name}, and the table names policies by their "
                "files; rename one"
            )
    return entries


def label(fields: dict[str, Any]) -> str:
    """The fields as a short text, e.g. ``"N=4 O=1"``."""
    return " ".join(f"{SYMBOLS.get(name, name)}={value}" for name, value in fields.items())


def choose(entries: Iterable[Entry], wanted: Sequence[str] | None) -> tuple[Entry, ...]:
    """The baselines, ours, and the entries whose names begin with these words (a family, or one setting); else all.

    ``"taylorseer"`` is the family, ``"taylorseer N=4"`` its settings with this interval.

    Raises:
        ConfigError: words with which no entry begins.
    """
    entries = tuple(entries)
    if wanted is None:
        return entries
    compared = [entry for entry in entries if entry.group != "baseline"]
    strangers = [words for words in wanted if not any(_begins(entry, words) for entry in compared)]
    if strangers or not wanted:
        known = ", ".join(dict.fromkeys(entry.family for entry in compared))
        raise ConfigError(
            f"--policies: expected families ({known}) or settings of them as the table names them, "
            f"found {', '.join(strangers) or 'none'}"
        )
    always = ("baseline", "ours")  # a policy file is given to be run
    return tuple(entry for entry in entries if entry.group in always or any(_begins(entry, words) for words in wanted))


def _begins(entry: Entry, words: str) -> bool:
    return f"{entry.name} ".startswith(f"{words} ")


def _policies(
    family: str,
    settings: Iterable[dict[str, Any]],
    common: Mapping[str, Any] | None = None,
    group: Group = "peer",
    policy: str = "",
) -> list[Entry]:
    """One entry a setting; `common` fields are left out of labels."""
    return [Entry(family, "policy", group, {**fields, **(common or {})}, label(fields), policy) for fields in settings]


def _fewer_steps(steps: int, stochastic: bool) -> list[Entry]:
    counts = dict.fromkeys(max(1, round(steps / speedup)) for speedup in SPEEDUPS)
    solvers = [("sde-dpmsolver++", 2)] if stochastic else [("dpmsolver++", 2), ("dpmsolver++", 3), ("unipc", 2)]
    entries = [Entry("fewer steps", "steps", fields={"steps": count}, label=f"{count}") for count in counts]
    for solver, order in solvers:
        for count in counts:
            fields = {"steps": count, "solver": solver, "order": order}
            entries.append(Entry(f"{solver} {order}", "solver", fields=fields, label=f"{count}"))
    return entries


def _cache_dit(common: Mapping[str, Any]) -> list[Entry]:
    settings: list[dict[str, Any]] = [{"threshold": value} for value in FIRST_BLOCK]
    settings += [{"threshold": value, "order": 1} for value in FIRST_BLOCK]
    return [
        Entry("cache-dit", "cache-dit", fields={"first": 1, **fields, **common}, label=label(fields))
        for fields in settings
    ]
