"""What a layer was called with is found by place and by name."""

import torch
from torch import Tensor, nn

from qtrain.utils.calls import by_place, first_argument, see_input


def test_first_argument_is_found_by_place_and_by_name() -> None:
    assert first_argument((1, 2), {"input": 3}) == 1
    assert first_argument((), {"output_size": 4, "input": 3}) == 3
    assert first_argument((), {"left": 5, "right": 6}) == 5
    assert first_argument((), {}) is None


def test_input_of_a_layer_is_seen_by_place_and_by_name() -> None:
    layer, seen = nn.ConvTranspose2d(1, 1, 2, stride=2), []
    x = torch.rand(1, 1, 2, 2)
    handle = see_input(layer, seen.append)
    layer(x), layer(input=x), layer(output_size=[5, 5], input=x)
    handle.remove()
    layer(x)
    assert [each is x for each in seen] == [True, True, True]


class Two(nn.Module):
    def forward(self, first: Tensor, second: int = 0) -> Tensor:
        return first + second


def test_call_by_name_becomes_a_call_by_place() -> None:
    x = torch.rand(2)
    assert by_place(Two(), (), {"second": 2, "first": x}) == ((x,), {"second": 2})
    assert by_place(Two(), (x, 2), {}) == ((x, 2), {})
    assert by_place(Two(), (), {"second": 2}) == ((), {"second": 2})
