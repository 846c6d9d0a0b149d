"""`task=profile` writes the times of a network's layers, which cost=latency reads, and holds their sum against it."""

import csv
import json
from pathlib import Path

import pytest

from qtrain.config.compose import compose
from qtrain.costs.latency_table import read_table
from qtrain.costs.metrics.latency import Latency
from qtrain.run_task import run_task
from qtrain.spec import LayerBits
from qtrain.utils.errors import ConfigError

QUICK = ["model=cifar_resnet8", "model.width=0.25", "data.max_train=32", "data.max_test=32", "data.batch_size=16",
         "logger=none", "target=onnxruntime", "profile.rounds=2", "profile.widths=[8]"]  # fmt: skip


def test_a_table_of_all_layers_is_written_and_compared_with_the_network(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "profile.csv"
    found = run_task(compose(["task=profile", f"output={tmp_path}", f"results={results}", *QUICK]))
    assert set(found) == {"w8a8"} and min(found.values()) > 0
    path = tmp_path / "profiles" / "cifar_resnet8-onnxruntime.json"
    assert f"cost=latency reads it: table={path}" in capsys.readouterr().out
    table = read_table(path)
    assert sum(len(names) for names in table.names.values()) == 8
    assert set(table.rest) == {LayerBits(8, 8)}
    assert {"hardware", "flags", "runtime", "version", "threads", "load", "commit"} <= set(table.machine)
    assert json.loads(path.read_text())["unit"] == "us"
    metric = compose(["+cost@allocate.costs.some=latency", f"allocate.costs.some.table={path}"]).allocate.costs["some"]
    assert metric is not None and isinstance(metric.build(), Latency)
    with results.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["w_bits"], row["layers"], row["runtime"]) for row in rows] == [("8", "8", "onnxruntime")]
    for row in rows:
        error = 100 * (float(row["predicted_us"]) / float(row["measured_us"]) - 1)
        assert float(row["error_percent"]) == pytest.approx(error, abs=0.1)
        assert float(row["predicted_us"]) >= float(row["rest_us"]) > 0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("profile.rounds=1", "profile.rounds: must be at least 2, got 1"),
        ("profile.threads=0", "profile.threads: must be at least 1, got 0"),
        ("profile.widths=[9]", "profile.widths: must be 1 to 8 bits, or 32, got 9"),
        ("profile.runtime=tvm", "profile.runtime: .*must be among onnxruntime, openvino, got tvm"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        run_task(compose(["task=profile", f"output={tmp_path}", *QUICK, override]))
