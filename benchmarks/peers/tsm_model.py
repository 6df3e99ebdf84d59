"""TSM-ResNet-50 and TSM-MobileNetV2 in plain PyTorch, as the yardstick for tsm-launch's own trainer.

Two temporal shifts: `cat`, the form that users of MMAction2 run (view, split, concatenate), and `onepass`, an
autograd function that writes each element of the output once and has its own backward.
Layer arithmetic: torchvision's ResNet (stride on the 3x3) and MobileNetV2; shift on the residual branch, 1/8 each way.
"""

import torch
from torch import nn
from torch.nn import functional as F


def shift_cat(x, segments, fold):
    """[n*t, c, h, w] -> the same shape, by slices of a 5-d view and concatenation."""
    nt, c, h, w = x.shape
    v = x.view(nt // segments, segments, c, h * w)
    left, right, rest = v[:, :, :fold], v[:, :, fold : 2 * fold], v[:, :, 2 * fold :]
    blank = torch.zeros_like(left[:, :1])
    left = torch.cat((left[:, 1:], blank), dim=1)
    right = torch.cat((blank, right[:, :-1]), dim=1)
    return torch.cat((left, right, rest), dim=2).view(nt, c, h, w)


def _shift_into(x, segments, fold, step):
    """Channels [0, fold) from segment t + step, [fold, 2 fold) from t - step; every output element is written once."""
    out = torch.empty_like(x)  # keeps the memory format
    n = x.shape[0] // segments
    xv, ov = x.unflatten(0, (n, segments)), out.unflatten(0, (n, segments))
    for lo, hi, d in ((0, fold, step), (fold, 2 * fold, -step)):
        if d > 0:
            ov[:, :-1, lo:hi] = xv[:, 1:, lo:hi]
            ov[:, -1, lo:hi] = 0
        else:
            ov[:, 1:, lo:hi] = xv[:, :-1, lo:hi]
            ov[:, 0, lo:hi] = 0
    ov[:, :, 2 * fold :] = xv[:, :, 2 * fold :]
    return out


class ShiftOnePass(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, segments, fold):
        ctx.args = (segments, fold)
        return _shift_into(x, segments, fold, 1)

    @staticmethod
    def backward(ctx, grad):
        segments, fold = ctx.args
        return _shift_into(grad, segments, fold, -1), None, None


class Shift(nn.Module):
    def __init__(self, segments, how):
        super().__init__()
        self.segments, self.how = segments, how

    def forward(self, x):
        fold = x.shape[1] // 8
        if self.how == "cat":
            return shift_cat(x, self.segments, fold)
        return ShiftOnePass.apply(x, self.segments, fold)


def conv_bn(i, o, k, stride=1, groups=1, relu=None):
    layers = [nn.Conv2d(i, o, k, stride, k // 2, groups=groups, bias=False), nn.BatchNorm2d(o)]
    if relu is not None:
        layers.append(relu)
    return nn.Sequential(*layers)


class Bottleneck(nn.Module):
    def __init__(self, i, mid, stride, segments, how):
        super().__init__()
        self.shift = Shift(segments, how)
        self.a = conv_bn(i, mid, 1, relu=nn.ReLU(inplace=True))
        self.b = conv_bn(mid, mid, 3, stride, relu=nn.ReLU(inplace=True))
        self.c = conv_bn(mid, 4 * mid, 1)
        self.down = conv_bn(i, 4 * mid, 1, stride) if stride != 1 or i != 4 * mid else None

    def forward(self, x):
        y = self.c(self.b(self.a(self.shift(x))))
        y += x if self.down is None else self.down(x)
        return F.relu_(y)


class InvertedResidual(nn.Module):
    def __init__(self, i, o, stride, expand, segments, how):
        super().__init__()
        self.residual = stride == 1 and i == o
        mid = i * expand
        layers = [Shift(segments, how)] if self.residual and expand != 1 else []
        if expand != 1:
            layers.append(conv_bn(i, mid, 1, relu=nn.ReLU6(inplace=True)))
        layers += [conv_bn(mid, mid, 3, stride, mid, relu=nn.ReLU6(inplace=True)), conv_bn(mid, o, 1)]
        self.body = nn.Sequential(*layers)

    def forward(self, x):
        return x + self.body(x) if self.residual else self.body(x)


class TSM(nn.Module):
    """Input [n*t, 3, h, w], output [n, classes]: the mean of the frames' logits."""

    def __init__(self, arch, segments=8, classes=174, how="cat"):
        super().__init__()
        self.segments = segments
        if arch == "resnet50":
            layers = [conv_bn(3, 64, 7, 2, relu=nn.ReLU(inplace=True)), nn.MaxPool2d(3, 2, 1)]
            i = 64
            for blocks, mid, stride in ((3, 64, 1), (4, 128, 2), (6, 256, 2), (3, 512, 2)):
                for b in range(blocks):
                    layers.append(Bottleneck(i, mid, stride if b == 0 else 1, segments, how))
                    i = 4 * mid
        elif arch == "mobilenetv2":
            layers = [conv_bn(3, 32, 3, 2, relu=nn.ReLU6(inplace=True))]
            i = 32
            for expand, o, blocks, stride in (
                (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
            ):
                for b in range(blocks):
                    layers.append(InvertedResidual(i, o, stride if b == 0 else 1, expand, segments, how))
                    i = o
            layers.append(conv_bn(320, 1280, 1, relu=nn.ReLU6(inplace=True)))
            i = 1280
        else:
            raise ValueError(f"unknown model {arch!r}; resnet50 and mobilenetv2 are known")
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(i, classes)

    def forward(self, x):
        y = self.fc(self.features(x).mean((2, 3)))
        return y.view(-1, self.segments, y.shape[1]).float().mean(1)
