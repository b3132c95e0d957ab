"""Which axes of a reshape belong together."""

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
