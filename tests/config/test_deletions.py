"""What every run needs may be taken away only by who puts it back."""

import pytest

from qtrain.config.ranges import check_deletions
from qtrain.utils.errors import ConfigError


@pytest.mark.parametrize("added", ["+lr_schedule={_target_: x}", "+schedule@lr_schedule=constant", "+lr_schedule.a=1"])
def test_a_needed_section_may_be_replaced(added: str) -> None:
    check_deletions(["~lr_schedule", added])


@pytest.mark.parametrize("added", ["lr_schedule.a=1", "+lr_schedules=x", "+schedule@other=constant"])
def test_a_needed_section_may_not_only_be_deleted(added: str) -> None:
    with pytest.raises(ConfigError, match=r"^~lr_schedule: every run needs 'lr_schedule'"):
        check_deletions(["~lr_schedule", added])
