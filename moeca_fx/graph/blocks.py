"""Blocks: consecutive sites of one repeated module, e.g. the attention and the feed-forward of ``blocks.3``."""

from dataclasses import dataclass
from itertools import groupby, pairwise

from moeca_fx.errors import UnsupportedModelError
from moeca_fx.graph.sites import AttentionSite, Site, Sites
from moeca_fx.reasons import Reason


@dataclass(frozen=True)
class Block:
    """Sites of one block in network order; `path` is the module path they share, e.g. ``blocks.3``."""

    path: str
    sites: tuple[Site, ...]

    def attention_before(self, site: Site) -> AttentionSite | None:
        """The block's attention whose map ranks the tokens that `site` reads: on its stream, else over as many."""
        found = [other for other in self.sites if isinstance(other, AttentionSite) and other.tokens == site.tokens]
        found = [other for other in found if not other.joint or other.first_token is not None]
        return next((other for other in found if other.residual_out == site.residual_in), next(iter(found), None))


def blocks_of(sites: Sites) -> tuple[Block, ...]:
    """Group sites by the numbered module that holds them; a site outside any is a block of its own."""
    grouped = groupby(sites.ordered, key=lambda site: _numbered_prefix(site.path))
    return tuple(Block(path, tuple(members)) for path, members in grouped)


def check_one_stream(sites: Sites, purpose: str) -> None:
    """Raise unless every site continues where the one before it ended.

    Args:
        purpose: what needs that, for the message.

    Raises:
        UnsupportedModelError: there are several token streams, or something between two sites changes the stream.
    """
    for before, after in pairwise(sites.ordered):
        if after.residual_in != before.residual_out:
            raise UnsupportedModelError(
                f"{after.path}: expected the token stream that {before.path} leaves, found another one; {purpose} "
                "needs one stream through all blocks: choose a policy at the output, sublayer or branch level",
                code=Reason.POLICY,
            )


def _numbered_prefix(path: str) -> str:
    parts = path.split(".")
    index = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    return ".".join(parts[: index + 1])
