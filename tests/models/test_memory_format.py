"""A network that needs contiguous images is found on an example; all others compute in channels_last."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qtrain.models.cifar_resnet import cifar_resnet8
from qtrain.models.memory_format import format_for, to_channels_last_


class Views(nn.Module):
    """Calls ``view`` on what a convolution gives; or fails, whatever the format."""

    def __init__(self, channels: int = 3, *, fails: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 4, 3, padding=1)
        self.fails = fails

    def forward(self, x: Tensor) -> Tensor:
        if self.fails:
            raise RuntimeError("no image is good enough")
        x = self.conv(x)
        return x.view(len(x), -1)


def layouts(model: nn.Module) -> set[bool]:
    """Whether weights that have only one format have channels_last."""
    single = [p for p in model.parameters() if p.dim() == 4 and p.shape[1] > 1 and p.shape[2] > 1]
    return {p.is_contiguous(memory_format=torch.channels_last) for p in single}


def test_usual_network_becomes_channels_last(caplog: pytest.LogCaptureFixture) -> None:
    model = cifar_resnet8(num_classes=10)
    with caplog.at_level("INFO"):
        assert to_channels_last_(model, torch.zeros(2, 3, 8, 8))
    assert layouts(model) == {True}
    assert not caplog.text


@pytest.mark.parametrize("channels", [1, 3])
def test_network_that_calls_view_stays_contiguous_and_the_log_says_why(
    channels: int, caplog: pytest.LogCaptureFixture
) -> None:
    model = Views(channels)
    with caplog.at_level("INFO", logger="qtrain"):
        assert not to_channels_last_(model, torch.zeros(2, channels, 8, 8))
    assert model.conv.weight.is_contiguous()
    (record,) = caplog.records
    assert "Views: stays contiguous" in record.message and "(view size is not compatible" in record.message


def test_error_of_another_cause_is_raised() -> None:
    with pytest.raises(RuntimeError, match="no image is good enough"):
        to_channels_last_(Views(fails=True), torch.zeros(2, 3, 8, 8))


def test_trial_leaves_modes_statistics_and_random_numbers_alone() -> None:
    model = cifar_resnet8(num_classes=10).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    to_channels_last_(model, torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert all(module.training for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_images_of_several_models_are_channels_last_only_if_all_can_do_it() -> None:
    able, unable = cifar_resnet8(num_classes=10), Views()
    assert format_for([able]) == torch.contiguous_format
    to_channels_last_(able, torch.zeros(2, 3, 8, 8))
    to_channels_last_(unable, torch.zeros(2, 3, 8, 8))
    assert format_for([able]) == torch.channels_last
    assert format_for([able, unable]) == format_for([]) == torch.contiguous_format
