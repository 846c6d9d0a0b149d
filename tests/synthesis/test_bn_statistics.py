"""Images from batch norm's statistics: they come close to them, carry their labels, and belong to their numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from torch import nn

from qtrain.spec import DataInfo
from qtrain.synthesis.base import Made, from_pixels
from qtrain.synthesis.bn_statistics import BNStatistics
from qtrain.synthesis.priors import total_variation
from qtrain.synthesis.statistics import StatisticsMatch

CPU = torch.device("cpu")
Net = Callable[[], nn.Sequential]


def make(method: BNStatistics, net: nn.Module, info: DataInfo, number: int = 0, seed: int = 0) -> Made:
    return method.make([net], info, number=number, seed=seed, device=CPU)


def equal(one: Made, other: Made) -> bool:
    same = torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)
    return same and one.metrics == other.metrics


def test_statistics_fall_to_a_fortieth_of_those_of_noise(trained_net: Net, digits_info: DataInfo) -> None:
    method = BNStatistics(batch_size=40, steps=50, lr=0.1, label=0.0, shift=0, flip=False)
    net = trained_net()
    made = make(method, net, digits_info)
    assert made.metrics["statistics"] < made.metrics["noise_statistics"] / 40
    with StatisticsMatch(net) as match:  # the metric is that of the bytes that are kept
        net(from_pixels(made.images, digits_info, CPU))
        assert match.loss().item() == pytest.approx(made.metrics["statistics"], rel=1e-4)


def test_labeled_images_approach_the_statistics_and_are_classified_as_labeled(
    trained_net: Net, digits_info: DataInfo
) -> None:
    method = BNStatistics(batch_size=40, steps=50, lr=0.1, shift=1, flip=False)
    made = make(method, trained_net(), digits_info, number=3)
    assert made.metrics["statistics"] < made.metrics["noise_statistics"] / 8
    assert made.metrics["as_labeled"] > 0.85
    answers = trained_net()(from_pixels(made.images, digits_info, CPU)).argmax(dim=1)
    assert (answers == made.labels).float().mean().item() == pytest.approx(made.metrics["as_labeled"])
    assert made.labels.bincount().tolist() == [4] * 10
    assert made.images.shape == (40, 8, 8, 1) and made.images.dtype == torch.uint8


def _in_a_process(worker: int, net: nn.Module, info: DataInfo, folder: Path) -> None:
    torch.set_num_threads(1)
    method = BNStatistics(batch_size=8, steps=4, smallest_crop=0.5)
    for number in (3, 1):
        torch.save(make(method, net, info, number), folder / f"{number}.pt")


def test_batch_is_a_function_of_its_number_in_any_order(
    trained_net: Net, digits_info: DataInfo, tmp_path: Path
) -> None:
    """In order in this process, in another order in another one: the same bytes, labels and metrics."""
    threads, net = torch.get_num_threads(), trained_net()
    torch.set_num_threads(1)  # as all workers do: how a sum is split over threads changes its last bits
    try:
        method = BNStatistics(batch_size=8, steps=4, smallest_crop=0.5)
        ordered = [make(method, net, digits_info, number) for number in range(4)]
    finally:
        torch.set_num_threads(threads)
    assert not torch.equal(ordered[1].images, ordered[3].images)
    assert not torch.equal(make(method, net, digits_info, 1, seed=1).images, ordered[1].images)
    torch.multiprocessing.spawn(_in_a_process, (net, digits_info, tmp_path), nprocs=1)
    for number in (1, 3):
        assert equal(torch.load(tmp_path / f"{number}.pt", weights_only=False), ordered[number])


def test_bn_statistics_leaves_the_models_unchanged(trained_net: Net, digits_info: DataInfo) -> None:
    net, untouched = trained_net(), trained_net()
    make(BNStatistics(batch_size=4, steps=2), net, digits_info)
    assert all(not module._forward_pre_hooks for module in net.modules())
    for name, value in net.state_dict().items():
        assert torch.equal(value, untouched.state_dict()[name])


def test_several_models_are_matched_together(trained_net: Net, digits_info: DataInfo) -> None:
    """Two models with different statistics: images made for both are closer to the second than those for one."""
    net, other = trained_net(), trained_net()
    assert isinstance(other[1], nn.BatchNorm2d) and other[1].running_mean is not None
    other[1].running_mean += 0.3
    method = BNStatistics(batch_size=40, steps=50, lr=0.1, label=0.0, shift=0, flip=False)
    both = method.make([net, other], digits_info, number=0, seed=0, device=CPU)
    alone = make(method, net, digits_info)
    distances = []
    for made in (both, alone):
        with StatisticsMatch(other) as match:
            other(from_pixels(made.images, digits_info, CPU))
            distances.append(match.loss().item())
    assert distances[0] < distances[1] / 2
    with StatisticsMatch(net) as match:
        net(from_pixels(both.images, digits_info, CPU))
        assert both.metrics["statistics"] == pytest.approx((match.loss().item() + distances[0]) / 2, rel=1e-4)


def test_priors_lower_total_variation_and_norm(trained_net: Net, digits_info: DataInfo) -> None:
    def images(**weights: float) -> torch.Tensor:
        made = make(BNStatistics(batch_size=20, steps=20, lr=0.1, shift=0, **weights), trained_net(), digits_info)
        return from_pixels(made.images, digits_info, CPU)

    plain = images()
    assert total_variation(images(total_variation=100.0)) < total_variation(plain) / 3
    assert images(norm=100.0).square().mean() < plain.square().mean() / 3


def test_the_compiled_loop_makes_nearly_the_same_images(trained_net: Net, digits_info: DataInfo) -> None:
    """With the compiler's frontend alone: what it traces, through the hooks, is all of the objective."""
    method = BNStatistics(batch_size=8, steps=3, compile=True)
    with pytest.MonkeyPatch.context() as patch:
        real = torch.compile
        patch.setattr(torch, "compile", lambda f, **options: real(f, backend="eager", **options))
        compiled = make(method, trained_net(), digits_info)
    eager = make(BNStatistics(batch_size=8, steps=3), trained_net(), digits_info)
    assert (compiled.images.int() - eager.images.int()).abs().float().mean() < 0.5


def test_models_with_unusable_statistics_are_refused_before_any_step(trained_net: Net, digits_info: DataInfo) -> None:
    method = BNStatistics(batch_size=4, steps=2)
    method.check([trained_net()])
    with pytest.raises(ValueError, match="has no batch norm layer"):
        method.check([trained_net(), nn.Sequential(nn.Linear(2, 2))])
    untrained = trained_net()
    untrained[4] = nn.BatchNorm2d(32)
    with pytest.raises(ValueError, match="4 of Sequential are 0 and 1, as before any training"):
        method.check([untrained])
    one_class = DataInfo(**{**vars(digits_info), "num_classes": 1})
    with pytest.raises(ValueError, match="digits has 1 class"):
        make(method, trained_net(), one_class)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"norm": -1.0}, "norm must be at least 0, got -1.0"),
        ({"statistics": 0.0, "label": 0.0}, "both 0, and the models say nothing"),
    ],
)
def test_options_out_of_range(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BNStatistics(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"lr": float("inf")}, {"statistics": float("inf")}])
def test_images_that_are_not_finite_are_refused(
    options: dict[str, float], trained_net: Net, digits_info: DataInfo
) -> None:
    """Their bytes would be black images that no figure tells from others."""
    method = BNStatistics(batch_size=8, steps=3, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="synthesis: the images are not finite; lower lr"):
        make(method, trained_net(), digits_info)
