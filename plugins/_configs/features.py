"""Feature networks of the metrics, and the checks of their settings."""

from collections.abc import Iterator
from dataclasses import dataclass

from sandbox.contracts import MetricConfig, in_range, is_path, one_of

RANDOM = "random"
# name -> whether it takes clips (else single frames)
NETWORKS = {
    "random2d": False,  # untrained filters from a fixed seed: for tests
    "random3d": True,  # the same
    "inception_v3": False,  # torchvision's, 2048 features
    "clip": False,  # OpenCLIP ViT-B-32, 512
    "script2d": False,  # a TorchScript file: (N, 3, H, W) in [-1, 1] -> (N, D)
    "r3d_18": True,  # torchvision's, 512
    "i3d": True,  # the TorchScript file of I3D that FVD uses, 400
    "script3d": True,  # a TorchScript file: (N, 3, T, H, W) in [-1, 1] -> (N, D)
}
CLIP_ON_HUB = "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"
TORCHSCRIPT = ("script2d", "i3d", "script3d")


def weights_problems(network: str, weights: str) -> Iterator[str]:
    """Problems with `network` and `weights`, one line each."""
    yield from one_of("network", network, NETWORKS)
    if network.startswith("random") and weights != RANDOM:
        yield f"weights={weights!r}: network={network} has none; want random"
    if network == "clip" and weights == "hub":
        yield f"weights='hub': for network=clip want {CLIP_ON_HUB}, a file, or random"
    if network in TORCHSCRIPT and weights in (RANDOM, "hub"):
        yield f"weights={weights!r}: network={network} is a TorchScript file; want its path"


def weights_file(network: str, weights: str) -> dict[str, str | None]:
    """`PluginConfig.files` for these settings; clip also takes a name on the hub."""
    is_local = is_path(weights) if network == "clip" else weights != "hub"
    return {"weights": weights} if is_local and weights != RANDOM else {}


def score_note(weights: str) -> str:
    """A note for the meaning of a score: with random weights it measures nothing."""
    return " (random weights: not meaningful)" if weights == RANDOM else ""


@dataclass
class DistributionConfig(MetricConfig):
    """Base Config of distances between the features of generated and of real clips.

    network: a name in plugins/_configs/features.py. weights: "hub", a file, or "random" (for
    tests). reference: number of real training clips. frames: number of evenly spaced frames of
    each clip for an image network; null uses all.
    """

    network: str = "random3d"
    weights: str = "random"
    reference: int = 2048
    frames: int | None = 4

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        yield from weights_problems(self.network, self.weights)
        yield from in_range("frames", self.frames, 1)
        yield from in_range("reference", self.reference, 2)

    def files(self) -> dict[str, str | None]:
        return weights_file(self.network, self.weights)

    def needs(self) -> frozenset[str]:
        return frozenset({"video"})

    def fit_clips(self) -> int:
        return self.reference

    def described(self) -> str:
        """The features, for the meaning of a score."""
        return f"features of {self.network}{score_note(self.weights)}"
