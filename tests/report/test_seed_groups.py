"""Which runs share a row of a table, and what the row's figures rest on."""

from typing import Any

import numpy as np
import pytest

from qtrain.pipeline.summary import CALIBRATED, DISTILLED, FLOAT, TRAINED, RunSummary
from qtrain.report.difference import UNCERTAIN
from qtrain.report.seed_groups import SeedGroup, seed_groups
from qtrain.report.table import closing_table, table_notes, table_rows
from qtrain.utils.bit_text import to_text


def run(**changes: Any) -> RunSummary:
    fields: dict[str, Any] = dict(
        name="w4a4", dataset="digits", model="resnet8", quantizer="lsq", w_bits=4, a_bits=4, distill="none", seed=0,
        epochs=3, top1=95.0, fp_top1=97.5, ptq_top1=60.0, test_images=360, data_hash="d", recipe_hash="r",
    )  # fmt: skip
    return RunSummary(**(fields | changes))


def of(way: str, groups: list[SeedGroup]) -> list[SeedGroup]:
    return [group for group in groups if group.key.way == way]


def test_calibrated_row_counts_each_seed_once() -> None:
    """Two runs a seed measure the same calibrated student: 50, 60, 70 have the deviation 10, each twice 8.94."""
    runs = [
        run(seed=seed, ptq_top1=50.0 + 10 * seed, distill=distill, recipe_hash=distill)
        for seed in (0, 1, 2)
        for distill in ("none", "soft")
    ]
    (calibrated,) = of(CALIBRATED, seed_groups(runs))
    assert (calibrated.seeds, calibrated.top1) == (3, 60.0)
    assert calibrated.std == pytest.approx(10.0)


def test_full_precision_row_that_is_a_mean_has_its_deviation() -> None:
    groups = seed_groups([run(seed=seed, fp_top1=fp_top1) for seed, fp_top1 in ((0, 90.0), (1, 92.0), (2, 94.0))])
    (full,) = of(FLOAT, groups)
    assert (full.seeds, full.top1, full.std) == (3, 92.0, pytest.approx(2.0))
    assert table_rows([full])[0][3] == "92.00 ± 2.00, 3 seeds"


def test_full_precision_row_of_one_network_is_one_measurement() -> None:
    groups = seed_groups([run(seed=seed) for seed in (0, 1, 2)])
    (full,) = of(FLOAT, groups)
    assert full.seeds == 1
    assert table_rows([full])[0][3] == "97.50"


def test_runs_of_other_settings_are_no_repeats_with_another_seed() -> None:
    trained = of(
        TRAINED, seed_groups([run(name="slow", recipe_hash="a"), run(name="fast", seed=1, top1=85.0, recipe_hash="b")])
    )
    assert [(group.key.name, group.top1, group.seeds) for group in trained] == [("fast", 85.0, 1), ("slow", 95.0, 1)]


def test_runs_of_data_sets_with_one_name_do_not_share_rows() -> None:
    two = [run(name="cats"), run(name="dogs", seed=1, data_hash="e", recipe_hash="s", fp_top1=80.0, ptq_top1=50.0)]
    groups = seed_groups(two)
    assert [(group.key.way, group.key.name, group.top1) for group in groups] == [
        (FLOAT, "cats", 97.5),
        (FLOAT, "dogs", 80.0),
        (CALIBRATED, "cats", 60.0),
        (CALIBRATED, "dogs", 50.0),
        (TRAINED, "cats", 95.0),
        (TRAINED, "dogs", 95.0),
    ]


def test_full_precision_of_two_networks_is_not_averaged() -> None:
    """Of older runs, which do not say what they have in common: one seed has measured two values."""
    old: dict[str, Any] = {"data_hash": None, "recipe_hash": None}
    groups = of(FLOAT, seed_groups([run(**old), run(**old, name="other", quantizer="affine", fp_top1=90.0)]))
    assert [(group.key.name, group.top1) for group in groups] == [("other", 90.0), ("w4a4", 97.5)]


def test_change_has_its_standard_error_and_a_mark_below_two_of_them() -> None:
    """97.5 and 95.1 % of 360 images: sqrt((97.5 x 2.5 + 95.1 x 4.9) / 360) = 1.404 points; with 94.5 % 1.456."""
    groups = seed_groups([run(top1=95.1, ptq_top1=None)])
    assert table_rows(groups)[-1][5] == "-2.40 (1.40) ~"
    assert UNCERTAIN in table_notes(groups)
    assert table_rows(seed_groups([run(top1=94.5, ptq_top1=None)]))[-1][5] == "-3.00 (1.46)"


def test_change_is_paired_with_the_network_that_each_seed_started_from() -> None:
    """Each seed loses 2, 3 and 4 points: a deviation of 1 over 3 seeds, 0.577; the accuracies themselves have 2.65."""
    groups = seed_groups(
        [run(seed=s, fp_top1=fp, top1=fp - 2 - s, test_images=None) for s, fp in enumerate((90.0, 94.0, 96.0))]
    )
    (trained,) = of(TRAINED, groups)
    change = trained.change
    assert (change.points, change.seed_error) == (pytest.approx(-3.0), pytest.approx(0.57735, abs=1e-5))
    assert {seed: found.top1 for seed, found in trained.by_seed.items()} == {0: 88.0, 1: 91.0, 2: 92.0}
    assert table_rows([trained])[0][3:6] == ("90.33 ± 2.08, 3 seeds", "", "-3.00 (?)")


def test_runs_that_kept_which_images_are_right_are_compared_image_by_image() -> None:
    """Of 4 images the student has one wrong that full precision has right: sqrt((1 - 1 / 4) / (4 x 3)) is 25 %."""
    right, all = to_text(np.array([True, True, True, False])), to_text(np.ones(4, dtype=bool))
    (trained,) = of(TRAINED, seed_groups([run(top1=75.0, fp_top1=100.0, right=right, fp_right=all, test_images=4)]))
    assert (trained.change.points, trained.change.error) == (-25.0, pytest.approx(25.0))


def test_table_says_how_many_test_images_and_seeds_it_rests_on() -> None:
    groups = seed_groups([run(), run(distill="soft", recipe_hash="s", test_images=100, data_hash="e")])
    columns, rows = closing_table(groups)
    assert {row[2]: row[columns.index("Images")] for row in rows if row[2].startswith(("trained", "distilled"))} == {
        "trained": "360",
        "distilled (soft)": "100",
    }
    assert table_notes(groups)[0] == "Each row is of one seed."
    assert "Images" not in closing_table(seed_groups([run(test_images=None)]))[0]
    seeds = seed_groups([run(seed=seed, top1=90.0 + seed) for seed in (0, 1)])
    assert table_notes(seeds)[0] == "±: standard deviation over seeds; a row without it is of one seed."


def test_each_width_of_a_student_of_many_bits_is_a_row() -> None:
    """Accuracies of 97 and 99 of the widest student, 80 and 90 of the narrow one, over two seeds."""
    runs = [
        run(name="many", seed=seed, top1=wide, w_bits=8, a_bits=8, size_bytes=80, widths={
            "w8": dict(w_bits=8, a_bits=8, top1=wide, ptq_top1=97.0, size_bytes=80),
            "w2": dict(w_bits=2, a_bits=2, top1=narrow, ptq_top1=20.0, size_bytes=20),
        })
        for seed, wide, narrow in ((0, 97.0, 80.0), (1, 99.0, 90.0))
    ]  # fmt: skip
    groups = seed_groups(runs)
    assert [(group.key.bits, group.key.way, group.top1, group.size_bytes) for group in groups[1:]] == [
        ("W8A8", CALIBRATED, 97.0, 80),
        ("W8A8", TRAINED, 98.0, 80),
        ("W2A2", CALIBRATED, 20.0, 20),
        ("W2A2", TRAINED, 85.0, 20),
    ]
    assert [group.seeds for group in groups[1:]] == [2, 2, 2, 2] and groups[0].key.way == FLOAT
    assert groups[-1].change.points == pytest.approx(-12.5)


def test_distilled_runs_of_several_seeds_share_a_row() -> None:
    groups = seed_groups([run(seed=seed, distill="soft", top1=90.0 + seed) for seed in (0, 1)])
    (distilled,) = of(DISTILLED, groups)
    assert (distilled.seeds, distilled.top1, distilled.images) == (2, 90.5, 360)
