"""One layer alone as an ONNX file, with the neighbors that a runtime merges with it."""

from typing import final

import torch
from torch import Tensor, nn

from qtrain.costs.latency_table import LayerShape
from qtrain.deployment.onnx.write import export
from qtrain.nn import Operand, QuantConv, QuantConvTranspose, QuantLinear
from qtrain.quantizers.uniform.lsq import LSQ
from qtrain.spec import FULL_PRECISION, LayerBits, Observed, PerChannel, PerTensor, QuantSpec

LAYER, OUTPUT = "layer", "output"
"""What nodes of the file are named after: the layer itself, and the quantizer of what it gives."""


@final
class _Alone(nn.Module):
    """A layer with the ReLU that follows a convolution, and the codes that the next layer reads; a column of them.

    All of them would be written once more as the file's output, which for a large image takes longer than the layer.
    """

    def __init__(self, layer: nn.Module, output: nn.Module, *, relu: bool) -> None:
        super().__init__()
        self.layer, self.output, self.relu = layer, output, relu

    def forward(self, x: Tensor) -> Tensor:
        made = self.layer(x)
        found: Tensor = self.output(made.relu() if self.relu else made)
        return found[..., :1]


def can_stand_alone(shape: LayerShape) -> bool:
    """Whether a layer of ``shape`` can be measured: it is called, and multiplies by a weight."""
    return bool(shape.input_shape) and (shape.kind == "linear" or shape.kind.startswith("conv"))


def layer_file(shape: LayerShape, bits: LayerBits, *, opset: int, packed: bool = False) -> bytes:
    """The ONNX file of one layer of ``shape`` at ``bits``, as the network's own export writes layers; for one image.

    Weights are random. Below full precision, the layer quantizes its input, and what it gives is quantized to as many
    bits for the next layer. Raises ``ValueError`` where the layer cannot be exported.
    """
    torch.manual_seed(0)
    layer = _layer(shape)
    output: nn.Module = nn.Identity()
    if min(bits) < FULL_PRECISION:
        layer = _quantized(layer, bits)
        if bits.input < FULL_PRECISION:
            output = Operand()
            output.input_quantizer = _quantizer(bits.input)
    alone = _Alone(layer, output, relu=shape.kind != "linear").eval()
    return export(alone, shape.input_shape, opset=opset, batch=1, packed=packed).to_bytes()


def empty_file(shape: LayerShape, *, opset: int) -> bytes:
    """A file that takes the same image and gives a column of it: what a call of the runtime costs by itself."""
    return export(_Column(), shape.input_shape, opset=opset, batch=1).to_bytes()


@final
class _Column(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[..., :1]


def _layer(shape: LayerShape) -> nn.Module:
    if shape.kind == "linear":
        return nn.Linear(shape.weight_shape[1], shape.weight_shape[0])
    axes = len(shape.weight_shape) - 2
    transposed = "transpose" in shape.kind
    rows, columns = shape.weight_shape[:2]
    inputs, outputs = (rows, columns * shape.groups) if transposed else (columns * shape.groups, rows)
    kind = getattr(nn, f"Conv{'Transpose' * transposed}{axes}d")
    padding = tuple(after for _, after in shape.padding)  # an odd zero at the end becomes one at both ends
    options = {"stride": shape.stride, "padding": padding, "dilation": shape.dilation, "groups": shape.groups}
    if transposed:
        options["output_padding"] = _output_padding(shape)
    layer: nn.Module = kind(inputs, outputs, shape.weight_shape[2:], bias=True, **options)
    return layer


def _output_padding(shape: LayerShape) -> tuple[int, ...]:
    parts = zip(
        shape.input_shape[1:], shape.output_shape[1:], shape.weight_shape[2:], shape.stride, shape.padding,
        shape.dilation, strict=True,
    )  # fmt: skip
    return tuple(
        new - ((old - 1) * step - sum(zeros) + gap * (size - 1) + 1) for old, new, size, step, zeros, gap in parts
    )


def _quantized(layer: nn.Module, bits: LayerBits) -> nn.Module:
    made: QuantLinear | QuantConv | QuantConvTranspose
    if isinstance(layer, nn.Linear):
        made = QuantLinear(source=layer)
    elif isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        made = QuantConvTranspose(source=layer)
    else:
        assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        made = QuantConv(source=layer)
    if bits.weight < FULL_PRECISION:
        made.weight_quantizer = _quantizer(bits.weight, made.effective_weight())
    if bits.input < FULL_PRECISION:
        made.input_quantizer = _quantizer(bits.input)
    return made


def _quantizer(bits: int, weight: Tensor | None = None) -> LSQ:
    """Of a weight, with a scale for each output; of an activation behind a ReLU, from 0 to 1."""
    shape = () if weight is None else tuple(weight.shape)
    spec = QuantSpec(bits=bits, shape=shape, signed=weight is not None)
    made = LSQ(spec=spec, granularity=PerTensor() if weight is None else PerChannel(0), init="range")
    high = torch.ones(made.state_shape)
    if weight is not None:
        high = high * weight.abs().max()
    made.calibrate_(Observed(low=-high if weight is not None else 0 * high, high=high, mean_abs=high / 2))
    return made
