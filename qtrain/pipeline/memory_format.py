"""The memory format that all models of a run and their images have in common."""

from torch import nn

from qtrain.data.fit_data import FitData
from qtrain.data.synthetic import SyntheticImages
from qtrain.models.memory_format import to_channels_last_
from qtrain.pipeline.build_model import example_input
from qtrain.settings.run_settings import RunSettings


def settle_memory_format_(settings: RunSettings, model: nn.Module, data: FitData) -> None:
    """Give ``model`` the format channels_last where ``settings.fit.channels_last`` asks for it and the model can do it.

    Otherwise the batches of ``data`` are contiguous from now on, and models that come later stay so too. To be called
    before the first batch goes into the model.
    """
    wanted = settings.fit.channels_last and data.channels_last
    if not (wanted and to_channels_last_(model, example_input(data.info, 2).to(next(model.parameters()).device))):
        data.channels_last = False
        if isinstance(data, SyntheticImages) and data.test is not None:
            data.test.channels_last = False
