"""Size and bit operations of HAWQ-v3's published ResNets by qtrain's cost model: python scripts/hawq_points.py

Yao et al., "HAWQ-V3: Dyadic Neural Network Quantization" (arXiv 2011.10680), give for each model a size in MB and bit
operations in G, and their repository the bits of each layer. A model of theirs is written here as the bits of the
convolutions of each block; a block's shortcut has those of the first, which reads the same input. The first convolution
and the last layer have 8 bits. Prints a line for each and, with --results FILE, appends rows.

Their conventions: a megabyte is 2^20 bytes; codes alone count, of convolutions and the last layer, without scales,
biases and batch norm; a bit operation is one bit of a weight times one bit of an input, for each multiplication; their
ResNet-50 has its stride in the first convolution of a block, as in the paper of 2015.

Weights and multiplications of each layer are those in the notebook of their integer program, to the last one. Uniform
bits so come out as published. The mixed ones differ by 1 to 3 %; what is counted otherwise there is not known.
"""

import argparse
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import nn

from qtrain.costs.geometry import LayerGeometry, layer_geometries
from qtrain.costs.metrics.bit_operations import BitOperations
from qtrain.costs.metrics.size import SizeBytes
from qtrain.costs.tables import codes_alone, cost_table
from qtrain.models.factory import create_model
from qtrain.pipeline.results import append_row, check_results, provenance
from qtrain.spec import LayerBits


class Point(NamedTuple):
    """A model of theirs: its network, what they call it, the bits of each block, their MB and G bit operations."""

    model: str
    name: str
    blocks: str
    mb: float
    gbops: float


DEEP = "848 848 848"
POINTS = (
    Point("resnet18", "full precision", "32", 44.6, 1858),
    Point("resnet18", "W8A8", "88 88 88 88 88 88 88 88", 11.1, 116),
    Point("resnet18", "high size", "88 88 88 88 88 84 88 84", 9.9, 103),
    Point("resnet18", "medium size", "88 88 88 88 88 88 84 44", 7.9, 98),
    Point("resnet18", "low size", "88 88 88 88 88 88 44 44", 7.3, 95),
    Point("resnet18", "high BOPS", "88 88 88 84 88 84 84 84", 8.7, 92),
    Point("resnet18", "medium BOPS", "88 84 88 84 88 44 44 44", 6.7, 72),
    Point("resnet18", "low BOPS", "88 84 84 44 44 44 44 44", 6.1, 54),
    Point("resnet18", "medium latency", "88 88 84 84 88 44 84 44", 7.2, 76),
    Point("resnet18", "W4A4", "44 44 44 44 44 44 44 44", 5.8, 34),
    Point("resnet50", "full precision", "32", 97.8, 3951),
    Point("resnet50", "W8A8", "888 " * 16, 24.5, 247),
    Point("resnet50", "high size", "888 " * 13 + DEEP, 21.3, 226),
    Point("resnet50", "medium BOPS", "888 888 848 848 848 844 848 848 844 844 844 844 848 " + DEEP, 18.7, 154),
    Point("resnet50", "low BOPS", "848 448 844 848 444 444 844 848 444 444 444 444 444 848 844 844", 16.7, 110),
    Point("resnet50", "low latency", "888 848 844 848 444 444 844 448 444 444 444 444 844 848 844 844", 16.5, 114),
    Point("resnet50", "W4A4", "444 " * 16, 13.1, 67),
)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", help="CSV file that gets a row for each point")
    results = parser.parse_args(arguments).results
    if results:
        check_results(results)
    for point, mb, gbops in reproduced():
        errors = [100 * (ours / theirs - 1) for ours, theirs in ((mb, point.mb), (gbops, point.gbops))]
        print(
            f"{point.model} {point.name}: {mb:.2f} MB ({point.mb}, {errors[0]:+.2f} %), "
            f"{gbops:.2f} G ({point.gbops}, {errors[1]:+.2f} %)"
        )
        if results:
            row = {
                "experiment": "hawq_v3", "task": "cost", "dataset": "imagenet", "model": point.model,
                "size_bytes": round(mb * 2**20), "bops": gbops * 1e9, "notes": "codes alone, MB = 2^20",
                "point": point.name, "mb": mb, "published_mb": point.mb, "mb_error_percent": errors[0],
                "gbops": gbops, "published_gbops": point.gbops, "gbops_error_percent": errors[1],
            }  # fmt: skip
            append_row(results, provenance() | row)


def reproduced() -> Iterator[tuple[Point, float, float]]:
    """Each point with our MB and G bit operations."""
    shapes = {name: layer_geometries(network(name), torch.zeros(1, 3, 224, 224)) for name in ("resnet18", "resnet50")}
    for point in POINTS:
        geometries = shapes[point.model]
        bits = allocation(point, geometries)
        options = {name: [pair] for name, pair in bits.items()}
        storage = codes_alone(geometries)
        size, bops = (
            cost_table(one, geometries, options, storage, 0).total(bits) for one in (SizeBytes(), BitOperations())
        )
        yield point, size / 2**20, bops / 1e9


def network(name: str) -> nn.Module:
    """The ResNet as they have it."""
    model = create_model(name=name, num_classes=1000)
    if name == "resnet50":
        for stage in ("layer2", "layer3", "layer4"):
            first = model.get_submodule(f"{stage}.0")
            for conv, stride in (("conv1", (2, 2)), ("conv2", (1, 1))):
                layer = first.get_submodule(conv)
                assert isinstance(layer, nn.Conv2d)
                layer.stride = stride
    return model.eval()


def allocation(point: Point, geometries: Sequence[LayerGeometry]) -> dict[str, LayerBits]:
    """The bits of each layer of the network of ``point``; weights and inputs have the same."""
    blocks = dict.fromkeys(name.rpartition(".conv")[0] for name in (one.name for one in geometries) if ".conv" in name)
    of = dict(zip(blocks, point.blocks.split(), strict=False))
    bits: dict[str, LayerBits] = {}
    for name in (one.name for one in geometries):
        if point.blocks == "32":
            width = 32
        elif name in ("conv1", "fc"):
            width = 8
        elif ".downsample" in name:
            width = int(of[name.partition(".downsample")[0]][0])
        else:
            block, _, conv = name.rpartition(".conv")
            width = int(of[block][int(conv) - 1])
        bits[name] = LayerBits(width, width)
    return bits


if __name__ == "__main__":
    main()
