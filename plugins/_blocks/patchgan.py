"""PatchGAN discriminator (Isola et al. 2017, 1611.07004) as VQGAN uses it, published names."""

from torch import Tensor, nn

from sandbox.contracts import ConfigError


class NLayerDiscriminator(nn.Module):
    """Images (N, 3, H, W) in [-1, 1] -> a logit for each patch (N, 1, h, w).

    Convolutions with kernel 4: `n_layers` of stride 2, one of stride 1, one to the logits.
    """

    def __init__(self, ndf: int = 64, n_layers: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, ndf, 4, 2, 1), nn.LeakyReLU(0.2, True)]
        width = ndf
        for n in range(1, n_layers + 1):
            wider = ndf * min(2**n, 8)
            stride = 2 if n < n_layers else 1
            layers += [
                nn.Conv2d(width, wider, 4, stride, 1, bias=False),  # the norm has a bias
                nn.BatchNorm2d(wider),
                nn.LeakyReLU(0.2, True),
            ]
            width = wider
        layers.append(nn.Conv2d(width, 1, 4, 1, 1))
        self.main = nn.Sequential(*layers)
        self.smallest = 3 * 2**n_layers  # two convolutions shrink each side by 1 after the strides
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:
        if min(x.shape[-2:]) < self.smallest:
            raise ConfigError(
                f"reconstruction.disc_num_layers: so many layers need images of at least "
                f"{self.smallest} pixels, not {x.shape[-2]}x{x.shape[-1]}; use fewer"
            )
        return self.main(x)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
