"""Which networks give features, and what their Configs check."""

from collections.abc import Iterator

from sandbox.contracts import is_path, one_of

RANDOM = "random"
# name -> whether it looks at whole clips (else at single pictures)
NETWORKS = {
    "random2d": False,  # seeded filters that learned nothing: for tests
    "random3d": True,
    "inception_v3": False,  # torchvision's, 2048 features
    "clip": False,  # OpenCLIP ViT-B-32, 512
    "script2d": False,  # a TorchScript file: (N, 3, H, W) in [-1, 1] -> (N, D)
    "r3d_18": True,  # torchvision's, 512
    "i3d": True,  # the TorchScript file of I3D that FVD is measured with, 400
    "script3d": True,  # a TorchScript file: (N, 3, T, H, W) in [-1, 1] -> (N, D)
}
CLIP_ON_HUB = "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"
IN_FILES = ("script2d", "i3d", "script3d")


def weights_problems(network: str, weights: str) -> Iterator[str]:
    """Problems with the network and its weights, one line each."""
    yield from one_of("network", network, NETWORKS)
    if network.startswith("random") and weights != RANDOM:
        yield f"weights={weights!r}: network={network} has none; want random"
    if network == "clip" and weights == "hub":
        yield f"weights='hub': of network=clip; want {CLIP_ON_HUB}, a file, or random"
    if network in IN_FILES and weights in (RANDOM, "hub"):
        yield f"weights={weights!r}: network={network} is a TorchScript file; want its name"


def weights_file(network: str, weights: str) -> dict[str, str | None]:
    """`PluginConfig.files` of these settings; for clip a name may be one on the hub."""
    is_here = is_path(weights) if network == "clip" else weights != "hub"
    return {"weights": weights} if is_here and weights != RANDOM else {}
