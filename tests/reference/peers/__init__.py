"""Slow, obvious references of the peer policies, written apart from the product so that they can judge it.

Each is a class that is called like the model, once for every denoising step of one trajectory, and returns the
prediction. They run the original, untransformed modules piece by piece and import none of the product's policies,
passes, ops or runtime. The rules are those of the papers, as the project's notes on the method restate them; where
those leave room, the docstring of the class says what was decided.
"""

from tests.reference.peers.base import Reference
from tests.reference.peers.dbcache import DBCache, FirstBlockCache
from tests.reference.peers.duca import DuCa
from tests.reference.peers.forecast import Forecast
from tests.reference.peers.sublayers import FORA, TaylorSeer
from tests.reference.peers.teacache import TeaCache
from tests.reference.peers.toca import ToCa

__all__ = ["FORA", "DBCache", "DuCa", "FirstBlockCache", "Forecast", "Reference", "TaylorSeer", "TeaCache", "ToCa"]
