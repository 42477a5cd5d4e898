"""Convolutional networks: ResNet-50, MobileNetV2 and a plain chain of convolutions."""

from __future__ import annotations

from functools import partial

import onnx_ir as ir

from models.builders.convolution import ConvSpec, ConvWriter
from models.builders.graph import Dim, GraphWriter
from models.builders.measured import Form, classifier, measured


def resnet50(
    *, seed: int = 0, batch: Dim = "N", image_size: int = 224, classes: int = 1000, folded: bool = False
) -> ir.Model:
    """ResNet-50 (He et al., "Deep Residual Learning for Image Recognition", arXiv:1512.03385), stride in the 3x3.

    Input `image` float32 [batch, 3, image_size, image_size]; output `logits` float32 [batch, classes]. 25.6 M seeded
    weights. BatchNormalization stays a node unless `folded`.
    """
    write = partial(_resnet50, seed=seed, image_size=image_size, classes=classes)
    return measured(write, image_size, seed=seed, batch=batch, folded=folded)


def mobilenet_v2(
    *, seed: int = 0, batch: Dim = "N", image_size: int = 224, classes: int = 1000, folded: bool = False
) -> ir.Model:
    """MobileNetV2 1.0 (Sandler et al., "Inverted Residuals and Linear Bottlenecks", arXiv:1801.04381).

    Input `image` float32 [batch, 3, image_size, image_size]; output `logits` float32 [batch, classes]. 3.5 M seeded
    weights; ReLU6 is Clip(0, 6). BatchNormalization stays a node unless `folded`.
    """
    write = partial(_mobilenet_v2, seed=seed, image_size=image_size, classes=classes)
    return measured(write, image_size, seed=seed, batch=batch, folded=folded)


def conv_chain(
    length: int, *, seed: int = 0, batch: Dim = "N", channels: int = 8, image_size: int = 16, folded: bool = False
) -> ir.Model:
    """A chain of `length` Conv(3x3) + BatchNormalization + Relu, to time rewriting against the number of nodes.

    Input `image` float32 [batch, channels, image_size, image_size]; output `features` of the same shape. A
    chain without residuals amplifies an unusual image, by 100 times and more: time it, but compare no accuracy on it.
    """
    write = partial(_conv_chain, length=length, seed=seed, channels=channels, image_size=image_size)
    return measured(write, image_size, channels=channels, seed=seed, batch=batch, folded=folded)


def _resnet50(form: Form, *, seed: int, image_size: int, classes: int) -> ir.Model:
    g = GraphWriter("resnet50", seed=seed)
    conv = ConvWriter(g, form)
    x = g.input("image", ir.DataType.FLOAT, [form.batch, 3, image_size, image_size])
    x = g.op("Relu", [conv(x, 3, ConvSpec(64, 7, 2), "/stem")], "/stem")
    x = g.op("MaxPool", [x], "/stem", kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[2, 2])
    channels = 64
    for stage, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), start=1):
        for block in range(blocks):
            scope = f"/layer{stage}/{block}"
            stride = 2 if block == 0 and stage > 1 else 1
            y = g.op("Relu", [conv(x, channels, ConvSpec(width, 1), f"{scope}/1")], f"{scope}/1")
            y = g.op("Relu", [conv(y, width, ConvSpec(width, 3, stride), f"{scope}/2")], f"{scope}/2")
            # Trained networks keep the gain of a branch's last normalization well below one: the sum stays bounded.
            y = conv(y, width, ConvSpec(4 * width, 1, gain=0.3, spread=0.4), f"{scope}/3")
            if block == 0:
                x = conv(x, channels, ConvSpec(4 * width, 1, stride), f"{scope}/downsample")
            channels = 4 * width
            x = g.op("Relu", [g.op("Add", [y, x], scope)], scope)
    _pooled_classifier(g, x, (channels, classes), form)
    return g.model()


def _mobilenet_v2(form: Form, *, seed: int, image_size: int, classes: int) -> ir.Model:
    g = GraphWriter("mobilenet_v2", seed=seed)
    conv = ConvWriter(g, form)

    def relu6(x: ir.Value, scope: str) -> ir.Value:
        return g.op("Clip", [x, g.constant(0.0, scope), g.constant(6.0, scope)], scope)

    x = g.input("image", ir.DataType.FLOAT, [form.batch, 3, image_size, image_size])
    x = relu6(conv(x, 3, ConvSpec(32, 3, 2), "/features/0"), "/features/0")
    channels, index = 32, 0
    settings = (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )
    for expansion, width, repeats, first_stride in settings:
        for repeat in range(repeats):
            index += 1
            scope, stride, hidden = f"/features/{index}", first_stride if repeat == 0 else 1, channels * expansion
            y = x
            if expansion != 1:
                y = relu6(conv(y, channels, ConvSpec(hidden, 1), f"{scope}/expand"), f"{scope}/expand")
            depthwise = ConvSpec(hidden, 3, stride, groups=hidden, spread=0.4, weight_spread=0.5)
            y = relu6(conv(y, hidden, depthwise, f"{scope}/depthwise"), f"{scope}/depthwise")
            y = conv(y, hidden, ConvSpec(width, 1, gain=0.5 if repeat else 1.0), f"{scope}/project")
            x = g.op("Add", [x, y], scope) if stride == 1 and channels == width else y
            channels = width
    x = relu6(conv(x, channels, ConvSpec(1280, 1), "/features/18"), "/features/18")
    _pooled_classifier(g, x, (1280, classes), form)
    return g.model()


def _conv_chain(form: Form, *, length: int, seed: int, channels: int, image_size: int) -> ir.Model:
    g = GraphWriter(f"conv_chain_{length}", seed=seed)
    conv = ConvWriter(g, form)
    shape = [form.batch, channels, image_size, image_size]
    x = g.input("image", ir.DataType.FLOAT, shape)
    for index in range(length):
        x = g.op("Relu", [conv(x, channels, ConvSpec(channels, 3), f"/{index}")], f"/{index}")
    g.output(x, "features", ir.DataType.FLOAT, shape)
    return g.model()


def _pooled_classifier(g: GraphWriter, x: ir.Value, sizes: tuple[int, int], form: Form) -> None:
    x = g.op("Flatten", [g.op("GlobalAveragePool", [x], "/pool")], "/pool", axis=1)
    classifier(g, x, sizes, form)
