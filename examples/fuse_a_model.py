"""One line fuses a network that is already there: here one written by hand, with the original code's unit."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import shufflenet_ext as se


class Unit(nn.Module):
    """A user's own ShuffleNet unit; what fuse goes by are the names of its parts."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        mid = channels // 4
        self.stride, self.groups = 1, groups
        self.conv1 = nn.Conv2d(channels, mid, 1, groups=groups, bias=False)
        self.bn1 = nn.BatchNorm2d(mid)
        self.conv2 = nn.Conv2d(mid, mid, 3, padding=1, groups=mid, bias=False)
        self.bn2 = nn.BatchNorm2d(mid)
        self.conv3 = nn.Conv2d(mid, channels, 1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        n, c, h, w = y.shape
        y = y.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(n, c, h, w)
        y = self.bn3(self.conv3(self.bn2(self.conv2(y))))
        return F.relu(y + x)


torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 240, 1), Unit(240, 3), Unit(240, 3)).eval()
images = torch.randn(1, 3, 28, 28)

with torch.no_grad():
    before = model(images)
    model = se.fuse(model)  # the one line; each swap is proved on numbers first
    after = model(images)

print(model)
print(f"largest difference: {(before - after).abs().max():.1e}, largest output: {before.abs().max():.1f}")
torch.testing.assert_close(after, before)
