"""Which axes of a reshape belong together, and where the sample and token axes are after one."""

from math import prod


def reshape_groups(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Smallest runs of old and new axes with equal sizes; axes of size 1 belong to no run."""
    left = [axis for axis, size in enumerate(old) if size != 1]
    right = [axis for axis, size in enumerate(new) if size != 1]
    groups = []
    while left and right:
        before, after = [left.pop(0)], [right.pop(0)]
        while prod(old[axis] for axis in before) != prod(new[axis] for axis in after):
            if prod(old[axis] for axis in before) < prod(new[axis] for axis in after):
                before.append(left.pop(0))
            else:
                after.append(right.pop(0))
        groups.append((before, after))
    return groups


def follow_reshape(axes: tuple[int, ...], old: tuple[int, ...], new: tuple[int, ...], samples: int) -> tuple[int, int]:
    """The sample and the token axis after a reshape; they are the same axis where both are merged in one.

    Args:
        axes: the sample and the token axis before, or the one axis that merges them.
        old, new: shapes before and after.
        samples: the batch size.

    Raises:
        ValueError: the token axis cannot be told, or is mixed with others.
    """
    groups = reshape_groups(old, new)
    place = {axis: (before, after) for before, after in groups for axis in before}
    if any(axis not in place for axis in axes[-1:] + (axes[:1] if samples > 1 else ())):
        raise ValueError("reshapes a token axis of size 1, which cannot be told from others")
    before, after = place[axes[-1]]
    if samples == 1:
        if len(before) == len(after) == 1:
            return _beside_one_sample(axes, new, after[0])
    elif len(axes) == 1:
        if len(before) == len(after) == 1:
            return after[0], after[0]
        if len(before) == 1 and len(after) == 2 and new[after[0]] == samples:
            return after[0], after[1]
    elif place[axes[0]][0] is before:
        if before == list(axes) and len(after) == 1:
            return after[0], after[0]
    elif all(len(part) == 1 for part in (*place[axes[0]], before, after)):
        return place[axes[0]][1][0], after[0]
    raise ValueError(f"reshapes {old} to {new}, which mixes the token axis with others")


def _beside_one_sample(axes: tuple[int, ...], new: tuple[int, ...], token: int) -> tuple[int, int]:
    """A sample axis of size 1 stays where it was, else it is any of size 1 before the tokens, else merged with them."""
    ones = [axis for axis in range(token) if new[axis] == 1]
    if len(axes) == 2 and axes[0] > axes[1]:
        ones = [axis for axis in range(token + 1, len(new)) if new[axis] == 1]
    if not ones:
        return token, token
    return (axes[0] if axes[0] in ones else ones[0]), token
