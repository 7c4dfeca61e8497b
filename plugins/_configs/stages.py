"""Config of stages that score a few frames of each clip."""

from sandbox.contracts import StageConfig


class SampledFramesConfig(StageConfig):
    """Samples `frames` frames, each in the middle of one of as many equal parts of the clip.

    `frames` is declared by the stage, so that each has its default and order of settings.
    """

    frames: int

    def times(self, seconds: float) -> list[float]:
        return [round((i + 0.5) / self.frames * seconds, 6) for i in range(self.frames)]
