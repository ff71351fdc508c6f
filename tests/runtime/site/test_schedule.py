"""R moves at one of `update_every` steps, at more of the first ones, and never in step with a cycle of the loop."""

from itertools import pairwise

import pytest

from decorr_fx.ops.sample import GOLDEN
from decorr_fx.runtime.site.schedule import Schedule, moves_at


def moves(update_every: int, steps: int) -> list[int]:
    """Return the steps at which R moves, as a schedule counts them."""
    schedule, found = Schedule(update_every), []
    for step in range(steps):
        if schedule.due:
            found.append(step)
        schedule.count()
    return found


def test_at_each_of_the_first_steps_and_then_at_one_of_three() -> None:
    found = moves(3, 30)
    assert found == [step for step in range(30) if step * GOLDEN % 1 < 1 / min(3, 1 + step // 3)]
    assert found[:3] == [0, 1, 2] and len([step for step in found if step >= 6]) == 8


@pytest.mark.parametrize("update_every", [1, 2, 8, 16])
@pytest.mark.parametrize("cycle", [1, 2, 3, 8])
def test_a_layer_that_is_used_at_one_step_of_a_cycle_moves_as_often(update_every: int, cycle: int) -> None:
    late = range(update_every**2, update_every**2 + 400 * cycle, cycle)
    assert sum(moves_at(step, update_every) for step in late) == pytest.approx(400 / update_every, rel=0.15)


def test_no_gap_is_much_longer_than_the_period() -> None:
    late = [step for step in moves(16, 4000) if step > 256]
    assert max(after - before for before, after in pairwise(late)) <= 2 * 16


def test_count_tells_where_rows_are_to_be_dropped_or_recorded() -> None:
    schedule = Schedule(4)
    for _ in range(50):
        before = schedule.due
        assert schedule.count() == (before or schedule.due)
    assert schedule.attempts == 50


def test_a_restart_goes_on_where_a_checkpoint_was_made() -> None:
    schedule, again = Schedule(16), Schedule(16)
    for _ in range(300):
        schedule.count()
    schedule.unowned = 5
    again.restart(300)
    assert (again.due, again.attempts, again.unowned) == (schedule.due, 300, 0)
