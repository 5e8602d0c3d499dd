"""Training steps of the same networks in PyTorch, written from the papers.

    python experiments/studies/bench/torch_peer.py wrn-28-2 --batch-size 64 --mode channels_last

Prints milliseconds of each step as a JSON list. Needs PyTorch, which the package does not.
"""

# pyright: reportMissingImports=false
import argparse
import json
import math
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class Soft(nn.Module):
    """A 3x3 convolution whose kernel is a mixture of a bank's templates."""

    def __init__(self, templates: nn.Parameter):
        super().__init__()
        self.templates = templates  # (k, P): PyTorch's channels_last takes no other rank than 4
        self.coefficients = nn.Parameter(torch.randn(len(templates)) / math.sqrt(len(templates)))

    def forward(self, x):
        kernel = self.coefficients @ self.templates
        return F.conv2d(x, kernel.reshape(x.shape[1], x.shape[1], 3, 3), padding=1)


class FromRing(nn.Module):
    """A convolution whose kernel is gathered from a ring, with signs."""

    def __init__(self, ring: nn.Parameter, shape: tuple[int, ...], stride: int, first: int):
        super().__init__()
        self.ring, self.stride, size = ring, stride, math.prod(shape)
        slots = (first + torch.arange(size)) % len(ring)
        self.register_buffer("slots", slots[torch.randperm(size)].reshape(shape))
        self.register_buffer("signs", torch.randint(0, 2, shape).float() * 2 - 1)

    def forward(self, x):
        padding = self.slots.shape[-1] // 2
        return F.conv2d(x, self.ring[self.slots] * self.signs, None, self.stride, padding)


def conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Module:
    """A convolution with symmetric padding, without bias."""
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)


class Wide(nn.Module):
    """BN, ReLU, 3x3, BN, ReLU, 3x3, plus the shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, make: Any):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.conv1, self.conv2 = make(inputs, outputs, stride), make(outputs, outputs, 1)
        self.shortcut = conv(inputs, outputs, 1, stride) if inputs != outputs else None

    def forward(self, x):
        h = F.relu(self.bn1(x))
        r = x if self.shortcut is None else self.shortcut(h)
        return r + self.conv2(F.relu(self.bn2(self.conv1(h))))


def wide_resnet(depth: int, width: int, templates: int = 0) -> nn.Module:
    """With `templates`, blocks 2.. of a stage share a bank (Savarese & Maire 2019)."""
    blocks, inputs = (depth - 4) // 6, 16
    layers = [conv(3, 16, 3)]
    for stage in range(3):
        outputs = 16 * width * 2**stage
        bank = nn.Parameter(torch.randn(max(templates, 1), outputs**2 * 9) / outputs)
        for i in range(blocks):

            def make(inputs, outputs, stride, i=i, bank=bank):
                return Soft(bank) if templates and i else conv(inputs, outputs, 3, stride)

            layers.append(Wide(inputs, outputs, 2 if i == 0 and stage else 1, make))
            inputs = outputs
    tail = nn.BatchNorm2d(inputs), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*layers, *tail, nn.Linear(inputs, 10))


class Basic(nn.Module):
    """3x3, BN, ReLU, 3x3, BN, plus the shortcut, ReLU. With a rank, 3x3s are basis, BN, 1x1."""

    def __init__(self, inputs: int, outputs: int, stride: int, make: Any, basis: Any = None):
        super().__init__()

        def three(inputs: int, stride: int) -> nn.Module:
            if basis is None:
                return make(inputs, outputs, 3, stride)
            rank = basis.rank
            return nn.Sequential(basis.layer(), nn.BatchNorm2d(rank), conv(rank, outputs, 1))

        self.first, self.second = three(inputs, stride), three(outputs, 1)
        self.bn1, self.bn2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.shortcut = None
        if inputs != outputs:
            self.shortcut = nn.Sequential(make(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x):
        r = x if self.shortcut is None else self.shortcut(x)
        return F.relu(r + self.bn2(self.second(F.relu(self.bn1(self.first(x))))))


class Basis:
    """The shared filters of a stage, and layers with one filter of their own each."""

    def __init__(self, channels: int, shared: int, unique: int):
        self.rank, self.unique, self.channels = shared + unique, unique, channels
        self.shared = nn.Parameter(torch.randn(shared, channels, 3, 3) / math.sqrt(9 * channels))

    def layer(self) -> nn.Module:
        return BasisLayer(self)


class BasisLayer(nn.Module):
    """A layer's own filters, then the shared ones (Kang & Kim 2021)."""

    def __init__(self, basis: Basis):
        super().__init__()
        self.shared = basis.shared
        self.own = nn.Parameter(
            torch.randn(basis.unique, basis.channels, 3, 3) / math.sqrt(9 * basis.channels)
        )

    def forward(self, x):
        return F.conv2d(x, torch.cat([self.own, self.shared]), padding=1)


def resnet(blocks: tuple[int, ...], ring: int = 0, shared: int = 0) -> nn.Module:
    """For images of 32 x 32: a 3x3 stem and no pooling.

    With `ring`, kernels but the stem's are gathered from that many parameters (Wang et al. 2021).
    """
    weights = nn.Parameter(torch.randn(ring) * math.sqrt(2 / 4608)) if ring else None
    used = 0

    def make(inputs, outputs, size, stride=1):
        nonlocal used
        if weights is None:
            return conv(inputs, outputs, size, stride)
        shape = (outputs, inputs, size, size)
        used += math.prod(shape)
        return FromRing(weights, shape, stride, used - math.prod(shape))

    layers, inputs = [conv(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU()], 64
    for stage, count in enumerate(blocks):
        outputs = 64 * 2**stage
        basis = Basis(outputs, shared * 2**stage, 2**stage) if shared else None
        for i in range(count):
            stride = 2 if i == 0 and stage else 1
            layers.append(Basic(inputs, outputs, stride, make, basis if i else None))
            inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 100))


NETWORKS = {
    "wrn-28-2": lambda: wide_resnet(28, 2),
    "swrn-28-2-2": lambda: wide_resnet(28, 2, 2),
    "resnet34": lambda: resnet((3, 4, 6, 3)),
    "resnet34-s32u1": lambda: resnet((3, 4, 6, 3), shared=32),
    "resnet18": lambda: resnet((2, 2, 2, 2)),
    "resnet18-rpg": lambda: resnet((2, 2, 2, 2), ring=2_359_296),
}
MODES = ("eager", "channels_last", "compiled")


def main() -> None:
    """Times one network in one mode."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=NETWORKS)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--mode", choices=MODES, default="eager")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--count", action="store_true", help="print the number of parameters")
    args = parser.parse_args()
    torch.manual_seed(0)
    model: Any = NETWORKS[args.name]()
    if args.count:
        return print(sum(p.numel() for p in model.parameters()))
    images = torch.randn(args.batch_size, 3, 32, 32)
    labels = torch.randint(0, 10, (args.batch_size,))
    if args.mode != "eager":
        model = model.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
    rule = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=5e-4, nesterov=True)
    if args.mode == "compiled":
        model = torch.compile(model)
    milliseconds = []
    for step in range(args.steps + 2):
        begin = time.perf_counter()
        rule.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        rule.step()
        if step >= 2:  # the first steps allocate and compile
            milliseconds.append(round(1000 * (time.perf_counter() - begin), 2))
    print(json.dumps(milliseconds))


if __name__ == "__main__":
    main()
