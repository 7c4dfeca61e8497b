"""Extrapolates the cost of a deep network from shallow ones, whose layers are identical.

Each layer adds the same allocations and frees at one or two positions of the forward and of the
backward pass. Two depths determine them, and a third must match exactly; otherwise there is no
extrapolation, and the full network is measured.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise

from sandbox.plan.measure import Measured

Events = list[tuple[int, int]]  # changes of (temporary bytes, gradient bytes)


def extrapolate(measured: Sequence[Measured], times: int) -> Measured | None:
    """`measured`: at three equally spaced depths; `times`: strides from the first to the target.

    None if the third disagrees with the extrapolation.
    """
    numbers = [
        [m.forward, m.backward, m.repeated, m.held, *_first_backward_event(m)] for m in measured
    ]
    passes = zip(*(_passes(m) for m in measured), strict=True)
    grown = [_repeat_difference(a, b, c, times) for a, b, c in passes]
    if None in grown or any(a + c != 2 * b for a, b, c in zip(*numbers, strict=True)):
        return None
    *sums, other, own = (a + times * (b - a) for a, b in zip(*numbers[:2], strict=True))
    forward, backward = (events or [] for events in grown)
    turns = len(measured[0].moments) > measured[0].turn
    events = forward + [(other, own)] * turns + backward
    moments = list(accumulate(events, lambda a, b: (a[0] + b[0], a[1] + b[1])))
    peak = max([0, *(other for other, _ in moments)])
    return Measured(*sums, peak=peak, moments=moments, turn=len(forward))


def _first_backward_event(found: Measured) -> tuple[int, int]:
    """The first event of the backward pass: autocast's weight copies are freed by then."""
    return (_events(found)[found.turn :] or [(0, 0)])[0]


def _passes(found: Measured) -> tuple[Events, Events]:
    """Events of the forward pass, and of the backward pass without its first."""
    events = _events(found)
    return events[: found.turn], events[found.turn + 1 :]


def _events(found: Measured) -> Events:
    pairs = pairwise([(0, 0), *found.moments])
    return [(b[0] - a[0], b[1] - a[1]) for a, b in pairs]


def _repeat_difference(a: Events, b: Events, c: Events, times: int) -> Events | None:
    """Inserts the difference of `a` and `b` `times` times; None if twice does not give `c`."""
    start = _common(a, b)
    end = min(_common(a[::-1], b[::-1]), len(a) - start)
    head, between, tail = a[:start], a[start : len(a) - end], a[len(a) - end :]
    for own in range(len(b) - len(a), -1, -1):  # events inserted at the first position
        first, rest = b[start : start + own], b[start + own : len(b) - end]
        if rest[: len(between)] == between:
            second = rest[len(between) :]
            if head + 2 * first + between + 2 * second + tail == c:
                return head + times * first + between + times * second + tail
    return None


def _common(a: Events, b: Events) -> int:
    """Length of the common prefix."""
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))
