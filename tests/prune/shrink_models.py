"""Small models that shrink: one for each way in which layers hang together."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """float64, evaluation mode, and no parameter or statistic left at a value that hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for value in model.state_dict().values():  # not the frequencies of rope, which no checkpoint holds
            if value.is_floating_point():
                value.copy_(torch.randn(value.shape, generator=generator, dtype=torch.float64) * 0.3)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_var.abs_().add_(0.5)
    return model


class MLP(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(9, 24), nn.GELU(), nn.Linear(24, 17), nn.Sigmoid(), nn.Linear(17, 5))


class ResidualBlock(nn.Module):
    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(out)
        self.short = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        inner = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(inner + self.short(x))


class ConvNet(nn.Module):
    """Residuals, a dense block's concatenations, a depthwise convolution, norms of each kind, flattening."""

    def __init__(self, norm: str = "batch") -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12) if norm == "batch" else nn.GroupNorm(4, 12)
        self.act = nn.PReLU(12)
        self.block1 = ResidualBlock(12, 12)
        self.block2 = ResidualBlock(12, 16)
        self.dense1 = nn.Conv2d(16, 6, 3, padding=1)
        self.densebn = nn.BatchNorm2d(22)
        self.dense2 = nn.Conv2d(22, 7, 3, padding=1)
        self.depthwise = nn.Conv2d(29, 29, 3, padding=1, groups=29)
        self.up = nn.ConvTranspose2d(29, 10, 2, stride=2)
        self.last = nn.Conv2d(10, 4, 3, stride=4)
        self.head = nn.Linear(4 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block2(self.block1(self.act(self.norm(self.stem(x)))))
        x = torch.cat([x, self.dense1(x)], 1)
        x = torch.cat([x, self.dense2(F.relu(self.densebn(x)))], 1)
        x = F.relu(self.up(self.depthwise(x)))
        return self.head(torch.flatten(F.relu(self.last(x)), 1))
