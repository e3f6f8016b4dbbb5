"""The networks in PyTorch: the same layers, as one writes them there."""

import flax.linen as nn
import torch  # pyright: ignore[reportMissingImports]
from torch import Tensor  # pyright: ignore[reportMissingImports]
from torch import nn as tnn  # pyright: ignore[reportMissingImports]
from torch.nn import functional  # pyright: ignore[reportMissingImports]

from experiments.benchmark.problems import MLP
from experiments.models.networks.resnet import BasicBlock, ResNet
from experiments.models.networks.vit import ViT
from experiments.models.networks.wide_resnet import WideResNet


def port(model: nn.Module, shape: tuple[int, ...]) -> tnn.Module:
    """The same network as a PyTorch module.

    Its parameters stand in the order in which Flax makes those of ``model``, but for
    a transformer: the projections of attention are one layer here, and the positions
    come first.

    Args:
        model: the network in Flax.
        shape: of a mini-batch there: images are [batch, height, width, channels].

    Returns:
        The module; it takes images as [batch, channels, height, width].

    Raises:
        ValueError: for a network that was not ported.
    """
    if isinstance(model, MLP):
        return _mlp(shape[-1], model.width, model.depth, model.num_classes)
    if isinstance(model, WideResNet):
        return _WideResNet(
            model.num_classes, model.depth, model.width, model.stem_stride
        )
    if isinstance(model, ResNet) and model.block is BasicBlock:
        return _ResNet(model.num_classes, model.stages, model.width, model.stem_stride)
    if isinstance(model, ViT):
        tokens = (shape[1] // model.patch) * (shape[2] // model.patch)
        return _ViT(model, tokens)
    raise ValueError(
        'model must be an MLP, a ResNet of basic blocks, a WideResNet or a ViT, got'
        f' {type(model).__name__}.'
    )


def _conv(inputs: int, outputs: int, size: int = 3, stride: int = 1) -> tnn.Conv2d:
    return tnn.Conv2d(
        inputs, outputs, size, stride=stride, padding=size // 2, bias=False
    )


def _mlp(inputs: int, width: int, depth: int, classes: int) -> tnn.Module:
    layers: list[tnn.Module] = []
    for _ in range(depth):
        layers += [tnn.Linear(inputs, width), tnn.ReLU()]
        inputs = width
    return tnn.Sequential(*layers, tnn.Linear(inputs, classes))


class _BasicBlock(tnn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = _conv(inputs, outputs, stride=stride)
        self.norm1 = tnn.BatchNorm2d(outputs)
        self.conv2 = _conv(outputs, outputs)
        self.norm2 = tnn.BatchNorm2d(outputs)
        self.shortcut = tnn.Sequential()
        if inputs != outputs or stride != 1:
            self.shortcut = tnn.Sequential(
                _conv(inputs, outputs, size=1, stride=stride),
                tnn.BatchNorm2d(outputs),
            )

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(self.shortcut(x) + self.norm2(self.conv2(y)))


class _ResNet(tnn.Module):
    def __init__(
        self, classes: int, stages: tuple[int, ...], width: int, stem_stride: int
    ):
        super().__init__()
        self.stem = _conv(3, width, stride=stem_stride)
        self.norm = tnn.BatchNorm2d(width)
        blocks: list[tnn.Module] = []
        features = width
        for stage, count in enumerate(stages):
            for number in range(count):
                outputs = width * 2**stage
                stride = 2 if stage and not number else 1
                blocks.append(_BasicBlock(features, outputs, stride))
                features = outputs
        self.blocks = tnn.Sequential(*blocks)
        self.classifier = tnn.Linear(features, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(functional.relu(self.norm(self.stem(x))))
        return self.classifier(x.mean(dim=(2, 3)))


class _PreActivatedBlock(tnn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.norm1 = tnn.BatchNorm2d(inputs)
        self.conv1 = _conv(inputs, outputs, stride=stride)
        self.norm2 = tnn.BatchNorm2d(outputs)
        self.conv2 = _conv(outputs, outputs)
        self.projects = inputs != outputs or stride != 1
        if self.projects:
            self.shortcut = _conv(inputs, outputs, size=1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        active = functional.relu(self.norm1(x))
        y = self.conv2(functional.relu(self.norm2(self.conv1(active))))
        return y + (self.shortcut(active) if self.projects else x)


class _WideResNet(tnn.Module):
    def __init__(self, classes: int, depth: int, width: int, stem_stride: int):
        super().__init__()
        self.stem = _conv(3, 16, stride=stem_stride)
        blocks: list[tnn.Module] = []
        features = 16
        for stage in range(3):
            for number in range((depth - 4) // 6):
                outputs = 16 * width * 2**stage
                stride = 2 if stage and not number else 1
                blocks.append(_PreActivatedBlock(features, outputs, stride))
                features = outputs
        self.blocks = tnn.Sequential(*blocks)
        self.norm = tnn.BatchNorm2d(features)
        self.classifier = tnn.Linear(features, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norm(self.blocks(self.stem(x))))
        return self.classifier(x.mean(dim=(2, 3)))


class _Attention(tnn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = tnn.Linear(width, 3 * width)
        self.out = tnn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(query, key, value)
        return self.out(y.transpose(1, 2).reshape(batch, tokens, width))


class _TransformerBlock(tnn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = tnn.LayerNorm(width, eps=1e-6)
        self.attention = _Attention(width, heads)
        self.norm2 = tnn.LayerNorm(width, eps=1e-6)
        self.hidden = tnn.Linear(width, 4 * width)
        self.out = tnn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        hidden = functional.gelu(self.hidden(self.norm2(x)), approximate='tanh')
        return x + self.out(hidden)


class _ViT(tnn.Module):
    def __init__(self, model: ViT, tokens: int):
        super().__init__()
        width = model.width
        self.patches = tnn.Conv2d(3, width, model.patch, stride=model.patch)
        self.positions = tnn.Parameter(0.02 * torch.randn(1, tokens, width))
        self.blocks = tnn.Sequential(
            *(_TransformerBlock(width, model.heads) for _ in range(model.depth))
        )
        self.norm = tnn.LayerNorm(width, eps=1e-6)
        self.classifier = tnn.Linear(width, model.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.classifier(self.norm(self.blocks(x)).mean(dim=1))
