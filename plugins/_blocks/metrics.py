"""Base classes with what most metrics do not need: fitting, baselines and success rates."""

from torch import Tensor


class PlainMetric:
    """A metric without baselines and success rates that learns nothing from training clips."""

    def fit(self, video: Tensor, captions: list[str]) -> None:
        """Does nothing."""

    def baselines(self, captions: list[str]) -> dict[str, Tensor]:
        return {}

    def rates(self) -> frozenset[str]:
        return frozenset()


class ClipMetric(PlainMetric):
    """A metric whose scores are means of `each` over clips."""

    def each(self, video: Tensor, captions: list[str]) -> dict[str, Tensor]:
        """(N,) per score."""
        raise NotImplementedError

    def score(self, video: Tensor, captions: list[str]) -> dict[str, float]:
        return {name: values.mean().item() for name, values in self.each(video, captions).items()}
