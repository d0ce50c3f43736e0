"""What tells a crash from a machine that was taken away."""

from jobs.run_monitor import RestartBudget


def test_the_first_start_is_no_crash_and_each_further_one_is() -> None:
    budget = RestartBudget()
    assert [budget.started({"a", "b"}) for _ in range(4)] == [0, 1, 2, 3]


def test_lost_machines_are_not_counted_however_many() -> None:
    budget = RestartBudget()
    for start in range(50):
        assert budget.started({"head", f"spot-{start}"}) == 0


def test_a_crash_among_lost_machines_is_counted() -> None:
    budget = RestartBudget()
    budget.started({"head", "spot-0"})
    budget.started({"head", "spot-1"})
    assert budget.started({"head", "spot-1"}) == 1
    assert budget.started({"head", "spot-2"}) == 1
    assert budget.started({"head", "spot-2"}) == 2
