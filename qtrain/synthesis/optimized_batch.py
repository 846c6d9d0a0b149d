"""One batch of images, from noise to bytes: what the methods share that optimize pixels against trained models."""

from collections.abc import Callable, Sequence
from typing import final

from torch import Tensor, nn

from qtrain.spec import DataInfo
from qtrain.synthesis.augment import StepAugmentation
from qtrain.synthesis.base import Made, to_pixels
from qtrain.synthesis.init_noise import natural_noise, white_noise
from qtrain.synthesis.model_outputs import FrozenModels, ModelOutput
from qtrain.synthesis.optimize import ImageOptimizer, image_metrics

Objective = Callable[[Tensor, Sequence[ModelOutput]], Tensor]
"""From images (N, C, H, W), normalized, and what each model computes from them, to a loss, 0-dim."""


@final
class OptimizedBatch:
    """Makes a batch that starts from noise and whose augmented pixels lower an objective.

    ``steps`` and ``lr`` are those of :class:`ImageOptimizer`; ``shift``, ``flip``, ``smallest_crop`` and ``crop_steps``
    those of :class:`StepAugmentation`. ``natural_start`` starts from :func:`natural_noise`, otherwise from white noise.
    With ``compile`` the models are compiled, once for all batches.
    """

    def __init__(
        self,
        *,
        steps: int,
        lr: float,
        shift: int,
        flip: bool,
        smallest_crop: float,
        crop_steps: float,
        natural_start: bool,
        compile: bool,
    ) -> None:
        self._optimize = ImageOptimizer(steps=steps, lr=lr)
        self._augmentation = StepAugmentation(
            shift=shift, flip=flip, smallest_crop=smallest_crop, crop_steps=crop_steps
        )
        self._noise = natural_noise if natural_start else white_noise
        self._compile = compile
        self._frozen: FrozenModels | None = None

    def make(
        self,
        models: Sequence[nn.Module],
        info: DataInfo,
        objective: Objective,
        labels: Tensor,
        *,
        number: int,
        seed: int,
    ) -> Made:
        """Batch ``number``: one image for each of ``labels`` (N,) int64, which are on the device of the models."""
        device = labels.device
        frozen = self._frozen = FrozenModels.of(models, self._frozen, info=info, device=device, compile=self._compile)
        start = self._noise(info, batch_size=len(labels), number=number, seed=seed, device=device)
        start = start.contiguous(memory_format=frozen.images_format)

        def loss(images: Tensor) -> Tensor:
            return objective(images, frozen(images))

        images = self._optimize(start, loss, self._augmentation, info, seed=seed, number=number)
        pixels = to_pixels(images, info)
        metrics = image_metrics(
            frozen, info, self._augmentation, pixels=pixels, labels=labels, seed=seed, number=number
        )
        return Made(pixels, labels.cpu(), metrics)
