"""What calibration alone keeps of a trained network, for every quantizer and each documented option of it.

    QTRAIN_CIFAR10=DIR QTRAIN_RESNET20=FILE python scripts/calibrate_quantizers.py
    python scripts/calibrate_quantizers.py --only 'apot*' --images 1000 --results results/quantizer_options.csv

ResNet-20 on CIFAR-10 without training: one batch of 128 training images, at the first of 4, 2, 1, 6 and 8 bits that
the quantizer has (an option may say others), once for weights with inputs in full precision, and once for inputs with
weights in full precision. The first and the last layer have 8 bits for both, or stay in full precision where the
quantizer has no 8 bits.
``top1`` is of the first test images, whose number is in ``test_images``. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from qtrain.config.compose import compose
from qtrain.run_task import run_task
from qtrain.settings.conf_dir import conf_dir
from qtrain.settings.run_settings import RunSettings
from qtrain.spec import QuantSpec
from qtrain.utils.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent

OPTIONS: dict[str, tuple[str, ...]] = {
    "affine": ("symmetric=false", "narrow=true"),
    "apot": ("normalize=false", "normalize=true", "normalize=true rescale=true"),
    "binary_connect": ("stochastic=true", "bound=glorot"),
    "bnn": ("center=false",),
    "dynamic": ("symmetric=false",),
    "kmeans": ("huffman=true",),
    "lsq": ("init=range",),
    "ocp_mx": ("element=e3m2", "element=e5m2", "element=int8"),
    "power_of_two": ("scale=calibrated", "scale=power_of_two"),
    "product": (
        "rounding@quantize.rounding=product_output",
        "quantize.bits.weight=8",
        "quantize.bits.weight=8 rounding@quantize.rounding=product_output",
    ),
    "pruned": ("share=0.9",),
    "qil": ("learn_gamma=false",),
    "twn": ("exact=true",),
    "vsq": ("scale_bits=2",),
    "weighted_entropy": ("update=false",),
}
"""What changes the outcome, beside the defaults of each YAML: options of the quantizer, or whole overrides."""

OF_INPUTS = ("affine", "dynamic", "lsq", "ocp_mx", "power_of_two", "vsq")
"""Those whose options say something of inputs too."""

BITS = (4, 2, 1, 6, 8)
"""Elements of ocp_mx have 6 or 8 bits alone."""


def cases() -> Iterator[tuple[str, str, str]]:
    """(place, quantizer, options separated by spaces) of all that is tried."""
    for path in sorted((conf_dir() / "quantizer").glob("*.yaml")):
        for options in ("", *OPTIONS.get(path.stem, ())):
            yield "weight", path.stem, options
            if not options or path.stem in OF_INPUTS:
                yield "input", path.stem, options


def settings_of(place: str, quantizer: str, options: str, common: list[str]) -> RunSettings | None:
    """The settings at the first bits that the quantizer has; ``None`` where it has none in this place."""
    other = {"weight": "input", "input": "weight"}[place]
    more = [option if "quantize." in option else f"quantize.{place}.{option}" for option in options.split()]
    for bits in BITS:
        widths = [f"quantize.bits.{place}={bits}", f"quantize.bits.{other}=32"]
        chosen = [*common, f"quantizer@quantize.{place}={quantizer}", *widths, *more]
        settings = compose(chosen)
        if not has_bits(settings, place, bits):
            continue
        ends = [f"quantize.bits.{end}.{side}=32" for end in ("first", "last") for side in ("weight", "input")]
        return settings if has_bits(settings, place, 8) else compose([*chosen, *ends])
    return None


def has_bits(settings: RunSettings, place: str, bits: int) -> bool:
    """Whether the chosen quantizer can have ``bits`` in this place."""
    spec = QuantSpec(bits=bits, shape=(16, 16, 3, 3), signed=True) if place == "weight" else QuantSpec(bits=bits)
    try:
        getattr(settings.quantize, place).build()(spec=spec)
    except ValueError:
        return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="*", help="pattern of quantizers")
    parser.add_argument("--images", type=int, default=1000, help="test images")
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "quantizer_options.csv")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for place, quantizer, chosen in cases():
            if not fnmatchcase(quantizer, options.only):
                continue
            name = "-".join([place, quantizer, *(option.split("quantize.")[-1] for option in chosen.split())])
            name = name.replace("=", "-")
            common = [
                "+experiment=cifar10/calibrated", "variants=null", f"name={name}",
                f"data.max_test={options.images}", "data.max_train=1024", "quantize.calibration_batches=1",
                f"output={folder}", f"results={options.results}",
            ]  # fmt: skip
            settings = settings_of(place, quantizer, chosen, common)
            if settings is None:
                continue
            try:
                kept = f"{run_task(settings)['top1']:.2f} %"
            except ConfigError as error:
                kept = str(error)
            print(f"kept: {name}: {kept}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
