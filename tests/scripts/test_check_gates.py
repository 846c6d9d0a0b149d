"""What a recipe reached may not fall: floors come from rows, and a recipe below its own is said with exit code 1."""

from pathlib import Path
from types import ModuleType

import pytest
import yaml

from qtrain.config.compose import compose
from qtrain.pipeline.results import read_results
from tests.helpers.script import load_script

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def gates() -> ModuleType:
    return load_script("check_gates")


def test_the_floor_is_two_deviations_of_three_seeds_or_of_the_images_of_one(gates: ModuleType) -> None:
    assert gates.figure_and_floor({"0": [90.0], "1": [91.0], "2": [92.0]}, 100) == (91.0, 89.0)
    assert gates.figure_and_floor({"0": [80.0, 80.0], "1": [80.0]}, 400) == (80.0, 76.0), "sqrt(.8 * .2 / 400) = .02"


def test_every_floor_is_what_the_rows_give(gates: ModuleType) -> None:
    listed = gates.read_gates(ROOT / "results" / "gates.yaml")
    assert len({gate.recipe for gate in listed}) == len(listed) > 10
    for gate in listed:
        found = gates.reached(gate, read_results(ROOT / "results" / gate.file))
        assert gates.figure_and_floor(found, gate.images) == (gate.figure, gate.floor), gate.recipe


def test_every_command_is_one(gates: ModuleType) -> None:
    variants: dict[str, set[str]] = {}
    for gate in gates.read_gates(ROOT / "results" / "gates.yaml"):
        *words, last = gate.command.split()
        selected = last.removeprefix("select=[").removesuffix("]") if last.startswith("select=") else None
        command = " ".join(words if selected else [*words, last])
        if command not in variants:
            variants[command] = set(compose(command.split()).variants)
        assert selected is None or selected in variants[command], gate.recipe


@pytest.fixture
def listed(gates: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One gate: the smallest network, calibrated on digits, and the row of an earlier run."""
    path = tmp_path / "gates.yaml"
    command = (
        "data=digits model=cifar_resnet8 model.width=0.25 data.max_train=32 data.max_test=40 data.batch_size=16 "
        "full_precision.epochs=1 fit.epochs=1 quantize.calibration_batches=1 trainer=cpu "
        "variants={tiny:[],other:[]} select=[tiny]"
    )
    monkeypatch.setenv("QTRAIN_CACHE", str(tmp_path / "cache"))
    entry = {"recipe": "tiny", "command": command, "file": "rows.csv", "rows": {"name": "tiny"}, "minutes": 0.1}
    path.write_text("# Read this first.\n" + yaml.safe_dump([entry | {"images": 40}]))
    return path


def test_a_recipe_that_falls_below_its_floor_is_said(
    gates: ModuleType, listed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (gate,) = gates.read_gates(listed)
    reached = gates.run_gate(gate, listed.parent / "out")
    (entry,) = yaml.safe_load(listed.read_text())
    for floor, code, verdict in ((reached, 0, "reaches"), (reached + 0.01, 1, "FALLS BELOW")):
        listed.write_text(yaml.safe_dump([entry | {"figure": reached, "floor": floor}]))
        assert gates.main(["--gates", str(listed)]) == code
        assert f"tiny: {reached:.2f} % {verdict}" in capsys.readouterr().out
    assert gates.main(["--gates", str(listed), "--minutes", "0.01"]) == 0
    assert "0 recipes run, 0 below their floor; 1 longer ones left out" in capsys.readouterr().out


def test_floors_are_written_beside_the_comment_and_rows_that_are_not_there_are_said(
    gates: ModuleType, listed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    header = (ROOT / "results" / "calibrated.csv").read_text().splitlines()[0]
    columns = header.split(",")
    row = {"name": "tiny", "top1": "50", "seed": "0"}
    (listed.parent / "rows.csv").write_text(f"{header}\n{','.join(row.get(name, '') for name in columns)}\n")
    assert gates.main(["--gates", str(listed), "--write"]) == 0
    (gate,) = gates.read_gates(listed)
    assert listed.read_text().startswith("# Read this first.\n")
    assert (gate.figure, gate.floor) == (50.0, 34.19), "50 - 200 sqrt(.25 / 40)"
    listed.write_text(listed.read_text().replace("name: tiny", "name: huge"))
    assert gates.main(["--gates", str(listed), "--write"]) == 2
    assert "no row of tiny has {'name': 'huge'}" in capsys.readouterr().err
