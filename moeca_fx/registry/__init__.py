"""Entries: what a layer computes, said by its user where discovery cannot find it out, and proven all the same.

    moeca_fx.register(Entry(name="scaled experts", match=ScaledLayer, route=.., experts=.., finish=..))
    fast = moeca_fx.transform(model, inputs)      a ScaledLayer that is not proven by itself is proven by the entry

An entry is code, not trust: its replay must give what the module gives, on the inputs of both runs, on other data and
on crowded tokens, with every expert's weight to 0.4 %. One that does not is refused as everything else.
"""

from moeca_fx.registry.entry import Entry
from moeca_fx.registry.slices import slices
from moeca_fx.registry.store import load, register, registered, unregister

__all__ = ["Entry", "load", "register", "registered", "slices", "unregister"]
