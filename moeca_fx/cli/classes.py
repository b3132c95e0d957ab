"""Class lists on the command line: ``"0-9"``, ``"3,3,3"``, ``"1,4,7-9"``."""

from moeca_fx.errors import InputError


def parse_classes(text: str, num_classes: int) -> list[int]:
    """Class labels in the order given, repeats kept.

    Args:
        text: numbers and inclusive ranges, separated by commas.
        num_classes: the model's classes; labels are 0 to one less.

    Raises:
        InputError: not of that form, or a label outside the model's classes.
    """
    labels: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not _is_label(first) or (dash and not _is_label(last)):
            raise InputError(f"--classes: expected numbers and ranges such as 0-9 or 1,4,7-9, found {part.strip()!r}")
        start, end = int(first), int(last) if dash else int(first)
        if end < start:
            raise InputError(f"--classes: the range {part.strip()!r} runs backwards; write {end}-{start}")
        if end >= num_classes:
            raise InputError(f"--classes: the model has classes 0 to {num_classes - 1}, found {end}")
        labels.extend(range(start, end + 1))
    return labels


def _is_label(text: str) -> bool:
    return text.isascii() and text.isdigit()
