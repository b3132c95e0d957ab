"""How much memory a transformed model may use: how caches are stored, how large they get, how many samples a pass."""

from dataclasses import dataclass

from moeca_fx.errors import ConfigError
from moeca_fx.graph.storage import Storage, find_storage
from moeca_fx.sizes import parse_bytes


@dataclass(frozen=True)
class MemoryOptions:
    """Checked options.

    Attributes:
        storage: how vectors of the cache are stored; None in the model's dtype.
        limit: most bytes of cache a context may hold; None is no limit.
        chunk: most samples that are computed at once; None is no limit.
    """

    storage: Storage | None = None
    limit: int | None = None
    chunk: int | None = None


def memory_options(cache_dtype: object = None, cache_limit: object = None, chunk: object = None) -> MemoryOptions:
    """The options as `moeca_fx.transform` takes them.

    Raises:
        ConfigError: one of them is out of range.
    """
    return MemoryOptions(find_storage(cache_dtype), _limit(cache_limit), _chunk(chunk))


def _limit(value: object) -> int | None:
    if value is None:
        return None
    size = parse_bytes(value) if isinstance(value, str) else value
    if not isinstance(size, int | float) or isinstance(size, bool) or not 1 <= size < float("inf"):
        raise ConfigError(
            f"cache_limit: expected bytes >= 1 or a size such as '500MB', found {value!r}; pass the most that the "
            "cache of one context may take, or None for no limit"
        )
    return int(size)


def _chunk(value: object) -> int | None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise ConfigError(
        f"chunk: expected an integer >= 1, found {value!r}; pass how many samples are computed at once, or None for all"
    )
