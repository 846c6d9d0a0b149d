"""Full-precision weights are trained by their own recipe."""

from pathlib import Path
from typing import Any

import pytest

from qtrain.config.compose import compose
from qtrain.pipeline import pretrain
from qtrain.pipeline.fit import accumulated_batches
from qtrain.pipeline.load_data import load_data
from qtrain.settings.run_settings import RunSettings


class BeganError(Exception):
    """The fit was about to begin."""


def test_pretraining_does_not_accumulate_the_gradients_of_the_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[RunSettings] = []

    def begin(settings: RunSettings, **given: Any) -> None:
        seen.append(settings)
        raise BeganError

    monkeypatch.setattr(pretrain, "fit", begin)
    own = [f"full_precision.folder={tmp_path}", "model=cifar_resnet8", "data.max_train=64", "data.max_test=16"]
    settings = compose([*own, "trainer.accumulate_grad_batches=4", "+callback@callbacks.bits=bits"])
    with pytest.raises(BeganError):
        pretrain.full_precision_weights(settings.model, settings, load_data(settings))
    assert accumulated_batches(settings) == 4
    assert [accumulated_batches(one) for one in seen] == [1]
    assert seen[0].callbacks == {}
