"""Where the stages of task=prepare sample frames from a clip."""


def evenly_spaced(count: int, seconds: float) -> list[float]:
    """`count` times in seconds, in the middle of equal parts of a clip."""
    return [round((i + 0.5) / count * seconds, 6) for i in range(count)]
