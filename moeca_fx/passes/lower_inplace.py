"""lower_inplace: let a cached step write its rows into the cache instead of copying the cache.

    new_feature = write_rows(cache_feature, branch, h)   -->   new_feature = write_rows_(cache_feature, branch, h)

Corrections of kept values (`add_rows`, `restart_rows`) and writes of codes (`write_codes`) likewise.

Done last: every pass before it may rely on the graph being functional. A write moves in place only when all that reads
the old value has run before it.
"""

from torch import fx

from moeca_fx.graph.slicing import ancestors
from moeca_fx.ops import forecast, rows, storage

IN_PLACE = {
    rows.write_rows: rows.write_rows_,
    storage.write_codes: storage.write_codes_,
    forecast.add_rows: forecast.add_rows_,
    forecast.restart_rows: forecast.restart_rows_,
}


def lower_inplace(module: fx.GraphModule) -> int:
    """Lower every legal write, in place; returns how many were lowered."""
    lowered = 0
    for write in [node for node in module.graph.nodes if node.target in IN_PLACE]:
        if may_write_in_place(write):
            write.target = IN_PLACE[write.target]
            lowered += 1
    module.graph.lint()
    module.recompile()
    return lowered


def may_write_in_place(write: fx.Node) -> bool:
    """Whether a write's first operand is a cache of which all that reads the old value has run before it."""
    cache = write.args[0]
    if not isinstance(cache, fx.Node) or cache.op != "placeholder":
        return False
    before = ancestors([write])
    readers = [user for user in cache.users if user is not write]
    for reader in readers:  # what reads a view of the cache reads the cache
        if reader.target is rows.tokens_back:
            readers.extend(user for user in reader.users if user not in readers)
    return all(reader in before for reader in readers)
