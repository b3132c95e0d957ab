"""Which steps are full. `j` counts steps from 0; `s` = T_s - 1 - j counts down to 0, as the papers write it."""


def is_full(j: int, interval: int, warmup: int) -> bool:
    """Fixed cycle: the first `warmup` steps, then every `interval`-th counted from the last of them.

    FORA and output forecasts of order 0 have warmup 1: 0, N, 2N, ... TaylorSeer ("the first 2 steps full, then every
    N-th") has warmup 2, and its published code counts from the last warm-up step: 0, 1, 1 + N, 1 + 2N, ...
    """
    return j < warmup or (j - (warmup - 1)) % interval == 0


def toca_full_steps(steps: int, interval: int) -> list[bool]:
    """ToCa's rule, for every j: the first step, and each at which s mod c == 0 before and after c is re-evaluated.

    c starts as N. The first step and every step with s mod c == 0 set it to 2 if int(.2 T_s) <= s < int(.4 T_s),
    where the model was found most sensitive, else to round(N / (1.4 - 0.8 s / T_s)), ties to even: long cycles early,
    short ones late. In the published code the first block of such a step re-evaluates c and the other blocks follow
    the new one; a step that is no multiple of it is full in the first block alone, here not at all. That makes the 72
    full steps of T_s = 250, N = 4 (without the second condition there would be 74).
    """
    full = []
    cycle = interval
    for s in reversed(range(steps)):
        first = s == steps - 1
        multiple = s % cycle == 0
        if first or multiple:
            sensitive = int(0.2 * steps) <= s < int(0.4 * steps)
            cycle = 2 if sensitive else round(interval / (1.4 - 0.8 * s / steps))
        full.append(first or (multiple and s % cycle == 0))
    return full


def steps_since_full(full: list[bool], j: int) -> int:
    """0 at a full step, then 1, 2, ..."""
    count = 0
    while not full[j - count]:
        count += 1
    return count
