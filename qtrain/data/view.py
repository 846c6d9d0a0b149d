"""Which part of an image is seen, in training and in evaluation.

Large and small images need different crops. A photograph has room for a random resized crop. Of 32 pixels it leaves
too few, and padding and cropping trains better. Mirrored symbols are other symbols. So what is not said follows from
what the images look like.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final, get_args

from qtrain.data.image_set import Looks
from qtrain.models.transforms import Crop

CROPS = get_args(Crop)
LARGE_SIZE = 224
LARGE_CROP_PCT = 0.875
CROP_SCALE = (0.08, 1.0)
"""Smallest and largest share of the area in a random resized crop (Szegedy et al. 2014, arXiv:1409.4842)."""


@final
@dataclass(frozen=True, kw_only=True)
class View:
    """The crop of training images and of others; ``None`` leaves a choice to :meth:`settled`.

    ``image_size`` is the side of what the model sees, in pixels. ``crop`` cuts training images:

    - ``random_resized``: a rectangle of a random share ``crop_scale`` of the area, resized;
    - ``pad``: the shorter side resized to ``image_size``, ``crop_padding`` black pixels added around, and a square cut
      out at random (He et al. 2015, arXiv:1512.03385, section 4.2);
    - ``none``: as for other images.

    Others are resized so that ``image_size`` is ``crop_pct`` of the shorter side, and cut out of the middle. ``flip``
    mirrors training images with probability one half.

    Raises ``ValueError`` for a ``crop_scale`` that is none, and for options of another crop than ``crop``.
    """

    image_size: int | None = None
    crop: Crop | None = None
    crop_scale: Sequence[float] | None = None
    crop_padding: int | None = None
    crop_pct: float | None = None
    flip: bool | None = None

    def __post_init__(self) -> None:
        if self.crop is not None and self.crop not in CROPS:
            raise ValueError(f"crop must be one of {', '.join(CROPS)}, got {self.crop!r}")
        if self.crop_scale is not None and not (
            len(self.crop_scale) == 2 and 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1
        ):
            raise ValueError(
                f"crop_scale must be two shares of the area, 0 < low <= high <= 1, got {[*self.crop_scale]}"
            )
        for option, crop in (("crop_scale", "random_resized"), ("crop_padding", "pad")):
            if getattr(self, option) is not None and (self.crop or crop) != crop:
                raise ValueError(f"{option} belongs to crop={crop}, got crop={self.crop}; leave one of them out")
        if self.crop_scale is not None and self.crop_padding is not None:
            raise ValueError("crop_scale belongs to crop=random_resized and crop_padding to crop=pad; give one of them")

    def settled(self, looks: Looks) -> "SettledView":
        """What is chosen here, and for the rest what suits images of these ``looks``.

        Small squares of one size, of at most 64 pixels: this size, ``pad`` by an eighth of it, and all of the image in
        evaluation. Others: 224 pixels, ``random_resized`` with ImageNet's shares, and 0.875 in evaluation. An option
        that belongs to one crop chooses it. All are mirrored but small images without color, which are mostly symbols.
        """
        small = looks.side is not None
        size = self.image_size or looks.side or LARGE_SIZE
        crop: Crop = "pad" if small else "random_resized"
        if self.crop_scale is not None:
            crop = "random_resized"
        elif self.crop_padding is not None:
            crop = "pad"
        low, high = self.crop_scale or CROP_SCALE
        return SettledView(
            image_size=size,
            crop=self.crop or crop,
            crop_scale=(float(low), float(high)),
            crop_padding=size // 8 if self.crop_padding is None else self.crop_padding,
            crop_pct=self.crop_pct or (1.0 if small else LARGE_CROP_PCT),
            flip=not (small and looks.colorless) if self.flip is None else self.flip,
        )


@final
@dataclass(frozen=True, kw_only=True)
class SettledView:
    """A :class:`View` that leaves nothing open."""

    image_size: int
    crop: Crop
    crop_scale: tuple[float, float]
    crop_padding: int
    crop_pct: float
    flip: bool

    def __str__(self) -> str:
        details = {"random_resized": f" {list(self.crop_scale)}", "pad": f" by {self.crop_padding} pixels", "none": ""}
        return f"{self.image_size}x{self.image_size}, crop={self.crop}{details[self.crop]}, flip={self.flip}".lower()
