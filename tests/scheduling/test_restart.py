"""When a dead instance is started again."""

from disagg.scheduling.router.restart import RestartPolicy, RestartSettings


def test_the_first_death_restarts_at_once_and_repeated_ones_wait_longer_until_it_is_given_up():
    policy = RestartPolicy(RestartSettings(max_quick_deaths=5, first_delay_s=0.5))
    assert [policy.delay_s(ready_for_s=1.0) for _ in range(5)] == [0.0, 0.5, 1.0, 2.0, None]


def test_waiting_has_an_upper_bound():
    policy = RestartPolicy(RestartSettings(max_quick_deaths=100, max_delay_s=8.0))
    assert max(delay for _ in range(99) if (delay := policy.delay_s(None)) is not None) == 8.0


def test_never_having_been_ready_counts_as_quick():
    policy = RestartPolicy(RestartSettings(max_quick_deaths=2))
    assert policy.delay_s(ready_for_s=None) == 0.0
    assert policy.delay_s(ready_for_s=None) is None


def test_a_long_life_is_forgiven():
    policy = RestartPolicy(RestartSettings(max_quick_deaths=2, quick_death_s=30.0))
    for _ in range(10):
        assert policy.delay_s(ready_for_s=1.0) == 0.0
        assert policy.delay_s(ready_for_s=30.0) == 0.0
