"""Images from a generator that is trained against the models and their batch norm statistics."""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from qtrain.functional.losses import hard_loss
from qtrain.functional.random import LEARN, MAKE, START, seed_of
from qtrain.models.identity import weights_digest
from qtrain.models.memory_format import format_for
from qtrain.schedules.base import Schedule
from qtrain.schedules.constant import Constant
from qtrain.spec import DataInfo
from qtrain.synthesis.base import Made, Synthesis, from_pixels, to_pixels
from qtrain.synthesis.conditioning import Conditioning, Mixture, labels_in_turn
from qtrain.synthesis.generator import Generator
from qtrain.synthesis.generator_checkpoint import GeneratorCheckpoint, State
from qtrain.synthesis.statistics import StatisticsMatch, statistics_layers
from qtrain.utils.checks import check_range

log = logging.getLogger(__name__)

BETAS = (0.5, 0.999)
"""Betas of Adam, as in the authors' settings."""
SHOW_EVERY_S = 10.0


@final
class ConditionalGenerator(nn.Module):
    """Embedding and generator as one: a mixture of classes and noise (N, D) to images (N, C, H, W)."""

    def __init__(self, *, conditioning: Conditioning, models: Sequence[nn.Module], info: DataInfo, width: int) -> None:
        super().__init__()
        self.embedding = conditioning.embedding(models, info.num_classes)
        self.generator = Generator(latent=self.embedding.latent, info=info, width=width)

    def forward(self, mixture: Mixture, noise: Tensor) -> Tensor:
        images: Tensor = self.generator(self.embedding(mixture, noise))
        return images


class Losses(NamedTuple):
    """Means over the models, 0-dim: cross-entropy in nats, distance of statistics, and the share of images that a model
    classifies as labeled."""

    classes: Tensor
    statistics: Tensor
    as_labeled: Tensor


@final
class GeneratorSynthesis(Synthesis):
    """A generator learns ``loss = CE(model(G), y) + statistics BNS(model(G))`` (GDFQ, Xu et al. 2020, arXiv
    2003.03603, eq. 4-6), where y are the classes from ``conditioning`` and BNS is the distance of batch norm's
    statistics.

    The generator is trained by Adam at ``lr`` times ``lr_schedule`` for ``steps`` batches; with several models the loss
    is the mean of theirs. The papers train generator and student in turn, so that the student sees images of generators
    of all ages. Here images are made once, for any student: the generator is saved at ``snapshots`` evenly spaced ages,
    the last one at its end, and the batches use them in turn. The training is saved every ``save_every`` steps. A
    stopped training continues from there with the same result, on the CPU bit for bit.

    Metrics of a batch, measured on its bytes: ``statistics``, its BNS; ``noise_statistics``, that of as many images of
    uniform noise; ``as_labeled``, the share of images that the models classify as labeled; ``class_loss`` in nats;
    ``age``, the number of steps after which the generator made it.
    """

    def __init__(
        self,
        *,
        conditioning: Conditioning,
        batch_size: int = 200,
        steps: int = 10_000,
        lr: float = 1e-3,
        lr_schedule: Schedule | None = None,
        statistics: float = 0.1,
        width: int = 64,
        snapshots: int = 8,
        save_every: int = 200,
    ) -> None:
        owner = type(self).__name__
        check_range(owner, "[2, inf)", batch_size=batch_size)
        check_range(owner, "[1, inf)", steps=steps, width=width, snapshots=snapshots, save_every=save_every)
        check_range(owner, "[0, inf)", lr=lr, statistics=statistics)
        if snapshots > steps:
            raise ValueError(f"GeneratorSynthesis: {steps} steps have no {snapshots} ages; set snapshots={steps}")
        self.conditioning = conditioning
        self.batch_size, self.steps, self.lr = batch_size, steps, lr
        self.lr_schedule = lr_schedule or Constant(value=1.0)
        self.statistics, self.width = statistics, width
        self.snapshots, self.save_every = snapshots, save_every
        self._kept: list[State] = []

    @property
    def ages(self) -> list[int]:
        """Numbers of steps after which the generator is saved."""
        return [round(self.steps * (i + 1) / self.snapshots) for i in range(self.snapshots)]

    def check(self, models: Sequence[nn.Module]) -> None:
        for model in models:
            statistics_layers(model)

    def learn(
        self, models: Sequence[nn.Module], info: DataInfo, *, seed: int, folder: Path, device: torch.device
    ) -> None:
        self.check(models)
        if info.num_classes < 2:
            raise ValueError(
                f"GeneratorSynthesis: {info.name} has {info.num_classes} class, and a generator learns from the class "
                "that a model sees in its images; give data with at least two"
            )
        learned = GeneratorCheckpoint(folder=folder / "generator", identity=self._identity(models, info, seed))
        generator = self._new(models, info, seed).to(device)
        optimizer = torch.optim.Adam(generator.parameters(), lr=self.lr, betas=BETAS)
        done = learned.restore(generator, optimizer)
        if done < self.steps:
            with torch.enable_grad():
                self._learn(models, info, seed, learned, generator, optimizer, done)
        self._kept = [learned.kept(age) for age in self.ages]

    @torch.no_grad()
    def make(
        self, models: Sequence[nn.Module], info: DataInfo, *, number: int, seed: int, device: torch.device
    ) -> Made:
        if not self._kept:
            raise ValueError("GeneratorSynthesis: has learned nothing yet; call learn() before make()")
        generator = self._new(models, info, seed).to(device)
        turn = number % len(self._kept)
        generator.load_state_dict(self._kept[turn])
        mixture, noise = self._draw(generator, info, seed=seed, stream=MAKE, number=number)
        pixels = to_pixels(generator(mixture, noise), info)
        target = mixture.probabilities(info.num_classes)
        numbers = torch.Generator().manual_seed(seed_of(seed, MAKE, number, START))
        plain = (torch.rand(pixels.shape, generator=numbers) * 255).round()
        with watching(models) as matches:
            images_format = format_for(models)
            reached = _losses(models, matches, from_pixels(pixels, info, device, images_format), target)
            started = _losses(models, matches, from_pixels(plain, info, device, images_format), target)
        metrics = {
            "statistics": reached.statistics.item(),
            "noise_statistics": started.statistics.item(),
            "as_labeled": reached.as_labeled.item(),
            "class_loss": reached.classes.item(),
            "age": float(self.ages[turn]),
        }
        return Made(pixels, mixture.classes[:, 0].cpu(), metrics)

    def _learn(
        self,
        models: Sequence[nn.Module],
        info: DataInfo,
        seed: int,
        learned: GeneratorCheckpoint,
        generator: ConditionalGenerator,
        optimizer: torch.optim.Optimizer,
        done: int,
    ) -> None:
        ages, progress = set(self.ages), _Progress(done, self.steps)
        images_format = format_for(models)
        with watching(models) as matches:
            for step in range(done, self.steps):
                for group in optimizer.param_groups:
                    group["lr"] = self.lr * self.lr_schedule(step / self.steps)
                mixture, noise = self._draw(generator, info, seed=seed, stream=LEARN, number=step)
                images = generator(mixture, noise).contiguous(memory_format=images_format)
                losses = _losses(models, matches, images, mixture.probabilities(info.num_classes))
                optimizer.zero_grad(set_to_none=True)
                (losses.classes + self.statistics * losses.statistics).backward()
                optimizer.step()
                progress.show(step + 1, losses)
                if step + 1 in ages:
                    learned.keep(step + 1, generator)
                if (step + 1) % self.save_every == 0 or step + 1 == self.steps:
                    _require_finite(generator, step + 1)
                    learned.save(step + 1, generator, optimizer)

    def _draw(
        self, generator: ConditionalGenerator, info: DataInfo, *, seed: int, stream: int, number: int
    ) -> tuple[Mixture, Tensor]:
        """Classes and noise of batch ``number`` of ``stream``, on the device of ``generator``."""
        device = generator.generator.low.device
        labels = labels_in_turn(
            number=number, count=self.batch_size, num_classes=info.num_classes, seed=seed, stream=stream
        )
        numbers = torch.Generator().manual_seed(seed_of(seed, stream, number))  # on the CPU: the same for every device
        mixture = self.conditioning.mix(labels, info.num_classes, numbers)
        noise = torch.randn(self.batch_size, generator.embedding.noise_size, generator=numbers)
        return Mixture(*(part.to(device) for part in mixture)), noise.to(device)

    def _new(self, models: Sequence[nn.Module], info: DataInfo, seed: int) -> ConditionalGenerator:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(seed, START))
            return ConditionalGenerator(conditioning=self.conditioning, models=models, info=info, width=self.width)

    def _identity(self, models: Sequence[nn.Module], info: DataInfo, seed: int) -> dict[str, Any]:
        options = {name: value for name, value in vars(self).items() if name not in ("save_every", "_kept")}
        pixels = (info.num_classes, info.in_channels, info.image_size, info.mean, info.std)
        return {**options, "data": pixels, "seed": seed, "models": [weights_digest(model) for model in models]}


@contextmanager
def watching(models: Sequence[nn.Module]) -> Iterator[list[StatisticsMatch]]:
    """Inside, the result's elements tell the distance of statistics of each of ``models`` after its forward."""
    with ExitStack() as stack:
        yield [stack.enter_context(StatisticsMatch(model)) for model in models]


def _losses(models: Sequence[nn.Module], matches: Sequence[StatisticsMatch], images: Tensor, target: Tensor) -> Losses:
    """The losses of ``images`` (N, C, H, W) with ``target`` (N, K) probabilities."""
    found = []
    for model, match in zip(models, matches, strict=True):
        logits = model(images)
        hits = (logits.argmax(dim=1) == target.argmax(dim=1)).float().mean()
        found.append(Losses(hard_loss(logits, target), match.loss(), hits))
    return Losses(*(torch.stack(parts).mean() for parts in zip(*found, strict=True)))


def _require_finite(generator: nn.Module, step: int) -> None:
    if not all(bool(parameter.isfinite().all()) for parameter in generator.parameters()):
        raise ValueError(
            f"GeneratorSynthesis: the generator is no longer finite after {step} steps; lower synthesis.lr, or "
            "delete its folder if it was saved like that"
        )


class _Progress:
    """Logs a line every ten seconds, and reads losses from the device only then."""

    def __init__(self, done: int, steps: int) -> None:
        self.first, self.steps = done, steps
        self.started = self.shown = time.perf_counter()

    def show(self, done: int, losses: Losses) -> None:
        now = time.perf_counter()
        if now - self.shown < SHOW_EVERY_S and done < self.steps:
            return
        self.shown = now
        per_step = (now - self.started) / (done - self.first)
        log.info(
            "generator: step %d/%d  class loss %.3f  statistics %.3g  as labeled %.1f %%  %.2f s/step  %.1f min left",
            *(done, self.steps, losses.classes.item(), losses.statistics.item(), 100 * losses.as_labeled.item()),
            *(per_step, per_step * (self.steps - done) / 60),
        )
