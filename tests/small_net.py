"""The network that tests of the distiller and its preflight take apart."""

from __future__ import annotations

from torch import Tensor, nn


class Net(nn.Module):
    """Two stages of `width` channels, at full and at half resolution, and dropout before the head."""

    def __init__(self, width: int, classes: int = 5) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, stride=2, padding=1), nn.ReLU())
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(width, classes)

    def features(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.features(x).mean((2, 3))))


class FeaturesFirst(Net):
    """Returns (features, logits)."""

    def __init__(self, num_classes: int = 5) -> None:
        super().__init__(4, num_classes)
        self.widen = nn.Linear(4, 64)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean = self.features(x).mean((2, 3))
        return self.widen(mean), self.head(mean)
