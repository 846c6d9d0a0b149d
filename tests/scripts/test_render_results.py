"""Tables in README and docs are what results/ says."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from qtrain.pipeline.results import append_row
from tests.helpers.script import load_script

ROOT = Path(__file__).resolve().parent.parent.parent


def _load() -> ModuleType:
    return load_script("render_results")


script = _load()


def row(**changes: Any) -> dict[str, Any]:
    return dict(
        date="2026-11-21T02:34:31Z", config_hash="a", task="train", dataset="cifar10", model="cifar_resnet20",
        quantizer="lsq", w_bits=4, a_bits=4, distill="soft", seed=0, epochs=15, top1=90.5, fp_top1=91.73, ptq_top1=70.0,
        size_bytes=150_000, fp_size_bytes=1_084_000, compression=7.2, effective_bits=4.2, bops=10**9, fp_bops=10**11,
        hardware="laptop", notes="budget=cpu",
    ) | changes  # fmt: skip


@pytest.fixture
def page(tmp_path: Path) -> Path:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- results:some -->\nold\n<!-- /results -->\nafter\n")
    return page


def table(page: Path) -> list[list[str]]:
    lines = page.read_text().splitlines()
    assert (lines[0], lines[-1]) == ("before", "after")
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]


def test_rows_become_a_table(page: Path) -> None:
    append_row(page.parent / "some.csv", row())
    append_row(page.parent / "some.csv", row(config_hash="b", distill="none", top1=89.0))
    assert script.main(["--results", str(page.parent), str(page)]) == 0
    header, rule, *rows = table(page)
    assert header[:4] == ["Model", "Bits", "Training", "Top-1 %"] and header[-1] == "Hardware"
    assert rule[0] == "---" and rule[3] == "---:"
    assert [(r[1], r[2], r[3], r[-2], r[-1]) for r in rows] == [
        ("32", "full precision", "91.73", "", ""),
        ("W4A4", "calibrated only", "70.00", "", ""),
        ("W4A4", "trained", "89.00", "15", "laptop"),
        ("W4A4", "distilled (soft)", "90.50", "15", "laptop"),
    ]


def test_budgets_stand_apart_and_seeds_together(page: Path) -> None:
    csv = page.parent / "some.csv"
    for config, seed, epochs, top1 in (("a", 0, 15, 90.0), ("b", 1, 15, 91.0), ("c", 2, 200, 92.0)):
        append_row(csv, row(config_hash=config, seed=seed, epochs=epochs, top1=top1))
    script.main(["--results", str(page.parent), str(page)])
    trained = [(r[3], r[-2]) for r in table(page) if r[2].startswith("distilled")]
    assert trained == [("90.50 ± 0.71, 2 seeds", "15"), ("92.00", "200")]


def test_the_last_row_of_a_configuration_counts(page: Path) -> None:
    append_row(page.parent / "some.csv", row(top1=10.0))
    append_row(page.parent / "some.csv", row(top1=90.0))
    script.main(["--results", str(page.parent), str(page)])
    assert [r[3] for r in table(page) if r[2].startswith("distilled")] == ["90.00"]


def test_rows_without_training_are_calibrated_or_full_precision(page: Path) -> None:
    csv = page.parent / "some.csv"
    common = {"task": "evaluate", "distill": "none", "epochs": 0, "ptq_top1": None}
    append_row(csv, row(**common, config_hash="a", top1=69.0, notes="calibrated only"))
    append_row(csv, row(**common, config_hash="b", w_bits=32, a_bits=32, top1=91.73, notes="full precision"))
    append_row(csv, row(**common, config_hash="c", top1=90.5, notes="trained student"))
    append_row(csv, row(**common | {"task": "calibrate"}, config_hash="d", w_bits=2, a_bits=2, top1=12.0))
    script.main(["--results", str(page.parent), str(page)])
    assert [(r[2], r[3]) for r in table(page)[2:]] == [
        ("full precision", "91.73"),
        ("calibrated only", "69.00"),
        ("calibrated only", "12.00"),
    ]


def test_check_finds_a_typed_number_and_changes_nothing(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    append_row(page.parent / "some.csv", row())
    arguments = ["--results", str(page.parent), str(page)]
    script.main(arguments)
    assert script.main(["--check", *arguments]) == 0
    page.write_text(page.read_text().replace("90.50", "99.50"))
    assert script.main(["--check", *arguments]) == 1
    assert "99.50" in page.read_text() and "render_results.py" in capsys.readouterr().err


def test_steps_stand_with_the_full_precision_of_their_process_and_the_last_counts(page: Path) -> None:
    csv = page.parent / "some.csv"
    common = {"config_hash": "a", "task": "bench", "notes": "batch=128 rounds=9", "mode": "compiled", "top1": None}
    for date, full_ms, step_ms, ratio in (("2026-11-29", 50.0, 90.0, 1.5), ("2026-11-30", 40.0, 44.16, 1.104)):
        append_row(csv, row(**common, date=date, w_bits=32, a_bits=32, step_ms=full_ms, case="full precision"))
        append_row(csv, row(**common, date=date, step_ms=step_ms, case="student", ratio=ratio, saved_ratio=1.25))
    variant = {"w_bits": None, "a_bits": None, "name": "pact-w4a4", "case": "student"}
    append_row(csv, row(**common, date="2026-11-29", **variant, step_ms=60.0, ratio=1.2))
    page.write_text(page.read_text().replace("results:some", "results:some steps"))
    script.main(["--results", str(page.parent), str(page)])
    assert table(page)[1] == ["---", "---", "---", "---", "---:", "---:", "---:", "---", "---"]
    setting = ["batch=128 size=32", "laptop"]
    assert table(page)[2:] == [
        ["cifar_resnet20", "32", "full precision", "compiled", "50.0", "", "", *setting],
        ["cifar_resnet20", "32", "full precision", "compiled", "40.0", "", "", *setting],
        ["cifar_resnet20", "W4A4", "student", "compiled", "44.2", "1.10", "1.25", *setting],
        ["cifar_resnet20", "", "pact-w4a4", "compiled", "60.0", "1.20", "", *setting],
    ]


def test_peers_stand_by_their_ratio_to_compiled_full_precision(page: Path) -> None:
    page.write_text(page.read_text().replace("results:some", "results:some peers"))
    one = {"experiment": "peers", "task": "bench", "model": "net", "notes": "batch=8", "hardware": "laptop"}
    for name, mode, ms, ratio in (
        ("slow 1.0", "eager", 30.0, 3.0),
        ("", "compiled", 10.0, ""),
        ("qtrain", "compiled", 11.0, 1.1),
        ("slow 1.0", "eager", 25.0, 2.5),
    ):
        row = {**one, "name": name, "case": "student" if name else "full precision", "mode": mode, "step_ms": ms}
        append_row(page.parent / "some.csv", row | {"ratio": ratio, "saved_ratio": "0.5" if name else ""})
    append_row(page.parent / "some.csv", {**one, "experiment": "cifar10", "case": "student", "step_ms": 1.0})
    script.main(["--results", str(page.parent), str(page)])
    _, _, *rows = table(page)
    assert [r[1:6] for r in rows] == [
        ["full precision", "compiled", "10.0", "", ""],
        ["qtrain", "compiled", "11.0", "1.10", "0.50"],
        ["slow 1.0", "eager", "25.0", "2.50", "0.50"],
    ]


def test_phases_are_in_passes_and_the_last_of_each_counts(page: Path) -> None:
    page.write_text(page.read_text().replace("results:some", "results:some phases"))
    one = {"task": "bench_phases", "model": "net", "notes": "batch=8 rounds=3 threads=2", "hardware": "laptop"}
    for date, case, ms, ratio in (
        ("1", "full precision", 5.0, ""),
        ("1", "Fisher scores", 200.0, 40.0),
        ("2", "full precision", 10.0, ""),
        ("2", "Fisher scores", 90.0, 9.0),
    ):
        own = {"date": date, "case": case, "mode": "eager", "step_ms": ms, "ratio": ratio, "w_bits": 4, "a_bits": 3}
        append_row(page.parent / "some.csv", {**one, **own})
    append_row(page.parent / "some.csv", {**one, "task": "bench", "case": "student", "step_ms": 1.0})
    script.main(["--results", str(page.parent), str(page)])
    setting = ["batch=8 size=32 threads=2", "laptop"]
    assert table(page)[2:] == [
        ["net", "W4A3", "full precision", "10.0", "1", *setting],
        ["net", "W4A3", "Fisher scores", "90.0", "9.00", *setting],
    ]


def test_a_kind_that_is_not_there_is_refused_with_those_that_are(page: Path) -> None:
    append_row(page.parent / "some.csv", row())
    with pytest.raises(ValueError, match=r"there is no table 'varients'; there are agreement, allocations, .*variants"):
        script.render("<!-- results:some varients -->\n<!-- /results -->\n", page.parent)


def test_rows_that_are_of_no_student_need_a_kind(page: Path) -> None:
    append_row(page.parent / "some.csv", row(task="bench", case="one rank", mode="eager", step_ms=1.0, top1=None))
    with pytest.raises(ValueError, match=r"some\.csv: none of the rows is of a student"):
        script.main(["--results", str(page.parent), str(page)])


def test_results_that_are_not_there_give_no_table(page: Path) -> None:
    script.main(["--results", str(page.parent), str(page)])
    assert page.read_text() == "before\n<!-- results:some -->\n<!-- /results -->\nafter\n"


def test_a_table_that_is_not_closed_is_refused(page: Path) -> None:
    with pytest.raises(ValueError, match="1 tables are opened and 0 are whole"):
        script.render("<!-- results:some -->\n", page.parent)


def test_the_tables_of_this_repository_are_up_to_date() -> None:
    assert script.main(["--check"]) == 0


def test_variants_have_a_row_each_and_their_seeds_share_it(page: Path) -> None:
    csv = page.parent / "some.csv"
    page.write_text(page.read_text().replace("results:some", "results:some variants"))
    common = {"distill": "none", "experiment": "cifar10/shootout", "notes": "budget=probe, lr=0.003"}
    append_row(csv, row(**common, name="float", w_bits=32, a_bits=32, top1=92.0, ptq_top1=None))
    for name, seed, top1 in (("lsq-w4a4", 0, 90.0), ("lsq-w4a4-seed1", 1, 91.0), ("twn-w2a32", 0, 88.0)):
        append_row(csv, row(**common, name=name, seed=seed, top1=top1, config_hash=name))
    append_row(csv, row(**common, name="twn-w2a32", top1=89.0, config_hash="twn", w_bits=2, a_bits=32))
    append_row(csv, row(name="lsq-w4a4", task="bench", ratio=1.25, step_ms=500.0, top1=None))
    script.main(["--results", str(page.parent), str(page)])
    header, _, *rows = table(page)
    assert header[:4] == ["Quantizer", "Bits", "Trained %", "Calibrated only %"]
    assert [r[:4] + r[-2:] for r in rows] == [
        ["float", "32", "92.00", "", "1.00", "0.003"],
        ["twn", "W2A32", "89.00", "70.00", "", "0.003"],
        ["lsq", "W4A4", "90.50 ± 0.71, 2 seeds", "70.00", "1.25", "0.003"],
    ]
    assert rows[2][4:7] == ["150.0", "4.20", "1"]


def test_recipes_are_held_against_none_at_the_same_bits(page: Path) -> None:
    csv = page.parent / "some.csv"
    page.write_text(page.read_text().replace("results:some", "results:some recipes"))
    for name, seed, top1, distill in (
        ("none", 0, 86.0, "none"), ("none-seed1", 1, 86.5, "none"), ("soft", 0, 87.0, "soft"), ("qkd", 0, 85.0, "soft"),
    ):  # fmt: skip
        metrics = {"top1": top1, "w_bits": 2, "a_bits": 2, "epochs": 2, "test_images": 10_000}
        append_row(csv, row(name=name, seed=seed, distill=distill, config_hash=name, **metrics))
    script.main(["--results", str(page.parent), str(page)])
    assert [r[:6] for r in table(page)[2:]] == [
        ["soft", "W2A2", "soft", "87.00", "+0.75 (0.65) ~", "2"],
        ["none", "W2A2", "none", "86.25 ± 0.35, 2 seeds", "", "2"],
        ["qkd", "W2A2", "soft", "85.00", "-1.25 (0.66) ~", "2"],
    ]


def test_probes_have_a_row_for_each_run_of_a_recipe_beside_its_calibration(page: Path) -> None:
    csv = page.parent / "some.csv"
    page.write_text(page.read_text().replace("results:some", "results:some probes"))
    for experiment, name, top1 in (("cifar10/qkd", "", 60.0), ("cifar10/qkd", "", 61.5), ("cifar10/inq", "a", 90.0)):
        metrics = {"top1": top1, "wall_s": 90.0, "test_images": 4000, "config_hash": experiment}
        append_row(csv, row(experiment=experiment, name=name, **metrics))
    script.main(["--results", str(page.parent), str(page)])
    assert table(page)[2:] == [
        ["cifar10/inq a", "W4A4", "soft", "70.00", "90.00", "91.73", "1.5", "laptop"],
        ["cifar10/qkd", "W4A4", "soft", "70.00", "61.50", "91.73", "1.5", "laptop"],
    ]
    assert "4000 test images" in page.read_text()


def test_drops_are_held_against_full_precision(page: Path) -> None:
    csv = page.parent / "some.csv"
    page.write_text(page.read_text().replace("results:some", "results:some drops"))
    common = {"ptq_top1": None, "fp_top1": 91.73, "wall_s": 90.0, "distill": "none"}
    append_row(
        csv, row(name="dfq", task="calibrate", epochs=0, top1=91.5, w_bits=8, a_bits=8, config_hash="d", **common)
    )
    for seed, top1 in ((0, 90.0), (1, 91.0)):
        name = "w4a4-seed1" if seed else "w4a4"
        metrics = {"top1": top1, "epochs": 150, "test_images": 10_000}
        append_row(csv, row(name=name, seed=seed, config_hash=name, **metrics, **common))
    append_row(csv, row(name="", task="synthesize", top1=None, w_bits=None, a_bits=None))
    script.main(["--results", str(page.parent), str(page)])
    assert table(page)[2:] == [
        ["dfq", "W8A8", "calibrated", "91.50", "-0.23 (?)", "150.0", "1.5", "laptop"],
        ["w4a4", "W4A4", "trained, 150 epochs", "90.50 ± 0.71, 2 seeds", "-1.23 (0.64) ~", "150.0", "1.5", "laptop"],
    ]


def test_synthetic_images_have_a_row_for_each_set(page: Path) -> None:
    csv = page.parent / "some.csv"
    page.write_text(page.read_text().replace("results:some", "results:some synthetic"))
    metrics = {"images": 1024, "statistics": 1.926, "noise_statistics": 816.3, "as_labeled": 0.996}
    for seconds in (300.0, 180.4, ""):  # measured twice, then found
        made = row(task="synthesize", notes="IntraQ, 1024 images made", s_per_1000_images=seconds, **metrics)
        append_row(csv, made)
    append_row(csv, row(name="w4a4"))
    script.main(["--results", str(page.parent), str(page)])
    assert table(page)[2:] == [["IntraQ", "1024", "1.93", "816", "100", "180", "laptop"]]


def test_of_what_a_sweep_started_with_the_table_says_what_is_better(page: Path) -> None:
    csv = page.parent / "some.csv"
    page.write_text(page.read_text().replace("results:some", "results:some front"))
    told = {"task": "sweep", "sweep": "tpe", "bits": "W4A4", "val_top1": 95.0, "knobs": "widths=4"}
    small = {"size_bytes": 140_000, "bops": 9e8}
    for name, changes in {
        "a": {"top1": 90.0, "start": True},
        "b": {"top1": 90.0, "start": False, "point": 2, **small},
        "c": {"top1": 89.0, "start": True, "point": 1, **small},
        "d": {"top1": 91.0, "start": False, "point": 3, "bops": 2e9},
    }.items():
        append_row(csv, row(name=name, config_hash=name, **told, **changes))
    append_row(csv, row(name="a", config_hash="a", **told | {"sweep": "evolved"}, top1=90.0, start=True))
    append_row(csv, row(name="sweep", config_hash="s", task="sweep", size_bytes=None, top1=None))
    script.main(["--results", str(page.parent), str(page)])
    assert [(cells[0], cells[5], cells[6]) for cells in table(page)[2:]] == [
        ("tpe 1", "89.00", "tpe 2"), ("tpe 2", "90.00", ""), ("start", "90.00", "tpe 2"), ("tpe 3", "91.00", ""),
    ]  # fmt: skip


def test_layers_in_integers_have_a_row_for_each_model_and_a_failure_its_reason(page: Path) -> None:
    csv = page.parent / "some.csv"
    page.write_text(page.read_text().replace("results:some", "results:some integers"))
    counted = {"layers": 31, "integer_layers": 30, "integer_macs": 0.995, "in_float": "1 Conv",
               "int8_layers": 32, "int8_integer_layers": 32, "int8_integer_macs": 1.0, "int8_in_float": ""}  # fmt: skip
    for layers in (29, 30):  # measured twice
        append_row(csv, row(task="export_timm", model="resnet18", reason="", **(counted | {"integer_layers": layers})))
    append_row(csv, row(task="export_timm", model="odd", reason="ValueError: no form"))
    script.main(["--results", str(page.parent), str(page)])
    assert table(page)[2:] == [
        ["resnet18", "30 of 31", "99.5", "1 Conv", "32 of 32", "100.0", ""],
        ["odd", "ValueError: no form", "", "", "ValueError: no form", "", ""],
    ]


def test_times_of_exports_have_a_row_for_each_number_of_images_and_ratios_with_quartiles(page: Path) -> None:
    csv = page.parent / "some.csv"
    page.write_text(page.read_text().replace("results:some", "results:some speed"))
    times = {"ms": 10.0, "fp_ms": 40.0, "int8_ms": 10.5, "of_fp": 0.25, "of_fp_low": 0.24, "of_fp_high": 0.26,
             "of_int8": 0.95, "of_int8_low": 0.9, "of_int8_high": 1.0, "rounds": 30, "threads": 1}  # fmt: skip
    for batch in (1, 32):
        append_row(csv, row(task="benchmark", model="resnet18", w_bits=8, a_bits=8, batch=batch, **times))
    script.main(["--results", str(page.parent), str(page)])
    cells = ["10.00", "40.00", "10.50", "0.25 (0.24 to 0.26)", "0.95 (0.90 to 1.00)", "30", "laptop"]
    assert table(page)[2:] == [["resnet18", "W8A8", batch, *cells] for batch in ("1", "32")]


def test_allocators_are_held_against_the_best_uniform_bits_of_their_budget(page: Path) -> None:
    csv = page.parent / "some.csv"
    page.write_text(page.read_text().replace("results:some", "results:some allocations"))
    common = {"task": "calibrate", "way": "calibrated", "test_images": 10000, "epochs": 0}
    made = [("uniform", 0, 80.0), ("uniform-inputs", 0, 70.0), ("program", 0, 80.1), ("program", 1, 90.1),
            ("uniform-no-ends", 0, 10.0)]  # fmt: skip
    for name, seed, top1 in made:
        append_row(csv, row(**common, budget="w3", allocator=name, seed=seed, top1=top1, config_hash=f"{name}{seed}"))
    append_row(csv, row(**common, budget="half", allocator="program", top1=50.0, config_hash="other"))
    script.main(["--results", str(page.parent), str(page)])
    assert [line[:5] for line in table(page)[2:]] == [
        ["half", "program", "calibrated", "50.00", ""],
        ["w3", "program", "calibrated", "85.10 ± 7.07, 2 seeds", "+5.10 (8.68) ~"],
        ["w3", "uniform", "calibrated", "80.00", ""],
        ["w3", "uniform-inputs", "calibrated", "70.00", ""],
        ["w3", "uniform-no-ends", "calibrated", "10.00", ""],
    ]


def test_allocations_of_a_network_without_test_accuracy_are_held_against_full_precision(page: Path) -> None:
    csv = page.parent / "some.csv"
    page.write_text(page.read_text().replace("results:some", "results:some agreement"))
    common = {"bias": "corrected", "judged_images": 100, "size_bytes": 2480800, "effective_bits": 4.15}
    for name, agreement in (("uniform", 5.0), ("program", 60.0), ("program", 90.0)):
        append_row(csv, row(**common, allocator=name, agreement=agreement, divergence=1.229))
    script.main(["--results", str(page.parent), str(page)])
    common_cells = ["1.23", "100", "2480.8", "4.15"]
    assert [line[:7] for line in table(page)[2:]] == [
        ["program", "corrected", "90.0 (3.0)", *common_cells],  # sqrt(0.9 * 0.1 / 100)
        ["uniform", "corrected", "5.0 (2.2)", *common_cells],
    ]


def test_orders_of_allocations_have_a_row_for_each_score_and_stand_beside_uniform(page: Path) -> None:
    csv = page.parent / "some.csv"
    page.write_text(page.read_text().replace("results:some", "results:some orders"))
    common = {
        "task": "score", "budget": "w3", "way": "calibrated", "weight_error": 1, "allocations": 21,
        "measured_images": 512, "uniform_kl": 0.9, "uniform_errors": 0.25,
    }  # fmt: skip
    for score, kl in (("fisher", 0.1), ("one_layer", 0.256), ("fisher", 0.5)):
        more = {"spearman_kl": kl, "spearman_errors": 0.75, "best_kl": 0.5, "best_errors": 0.125}
        append_row(csv, {**common, **more, "score": score})
    script.main(["--results", str(page.parent), str(page)])
    assert table(page)[2:] == [
        ["w3", "calibrated", "fisher", "1", "0.50", "0.75", "0.50, 12.5", "0.90, 25.0"],
        ["w3", "calibrated", "one_layer", "1", "0.26", "0.75", "0.50, 12.5", "0.90, 25.0"],
    ]


def test_one_model_of_many_bits_is_held_against_students_of_one_width(page: Path) -> None:
    csv = page.parent / "some.csv"
    page.write_text(page.read_text().replace("results:some", "results:some widths"))
    common = {"task": "train", "epochs": 15, "test_images": 10000}
    for bits, many, alone in ((8, 91.0, 90.5), (2, 80.0, 88.0)):
        own = {"w_bits": bits, "a_bits": bits, **common}
        append_row(csv, row(config_hash="many", name="many", widths="w8 w2", top1=many, **own))
        append_row(csv, row(config_hash=f"w{bits}", name=f"w{bits}a{bits}", top1=alone, **own))
    append_row(csv, row(config_hash="w4", name="w4a4", top1=90.0, **common | {"w_bits": 4, "a_bits": 4}))
    script.main(["--results", str(page.parent), str(page)])
    found = [(cells[2], cells[3], cells[4], cells[5]) for cells in table(page)[2:]]
    assert found == [("W8A8", "91.00", "90.50", "+0.50 (0.41) ~"), ("W2A2", "80.00", "88.00", "-8.00 (0.52)")]


def test_each_width_of_a_student_of_many_bits_has_a_row(page: Path) -> None:
    for bits, top1 in ((8, 91.5), (4, 90.5)):
        append_row(page.parent / "some.csv", row(w_bits=bits, a_bits=bits, top1=top1, ptq_top1=None, widths="w8 w4"))
    script.main(["--results", str(page.parent), str(page)])
    assert [(cells[1], cells[3]) for cells in table(page)[3:]] == [("W8A8", "91.50"), ("W4A4", "90.50")]


def test_times_of_searches_are_seconds_and_those_of_a_question_microseconds(page: Path) -> None:
    page.write_text(page.read_text().replace("results:some", "results:some solving"))
    one = {"task": "bench_allocation", "model": "net", "layers": 20, "hardware": "laptop"}
    rows = [
        {**one, "case": "integer program", "processor_s": 9.0, "score_ratio": 0.5},
        {**one, "case": "integer program", "processor_s": 0.123, "score_ratio": 0.456},
        {**one, "case": "size of an allocation", "processor_s": 1.73e-6},
    ]
    for row in rows:
        append_row(page.parent / "some.csv", row)
    script.main(["--results", str(page.parent), str(page)])
    assert "| net | 20 | integer program | 0.12 s | 0.46 | laptop |" in page.read_text()
    assert "| net | 20 | size of an allocation | 1.7 us |  | laptop |" in page.read_text()
    assert "9.00 s" not in page.read_text()
