"""Limits of open files, in a process of its own."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource
from disagg.base.errors import ConfigurationError
from disagg.serve.launch.descriptors import raise_descriptor_limit, share_descriptors
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
raise_descriptor_limit()
assert resource.getrlimit(resource.RLIMIT_NOFILE) == ({hard}, {hard})
try:
    budget = share_descriptors({num_instances})
    print(budget.max_connections, budget.backlog)
except ConfigurationError as error:
    print(error)
"""


def share(soft: int, hard: int, num_instances: int = 2) -> str:
    program = PROGRAM.format(soft=soft, hard=hard, num_instances=num_instances)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("hard", [600, 1024, 4096])
def test_what_is_left_for_connections_leaves_enough_for_instances(hard: int) -> None:
    max_connections, backlog = map(int, share(256, hard).split())
    assert hard // 2 < max_connections
    assert max_connections + backlog + 2 * 16 + 64 < hard


def test_a_limit_that_is_too_low_is_said_with_the_remedy() -> None:
    assert "at most 100 files can be open, too few for 2 instances" in share(50, 100)
    assert "ulimit -n" in share(50, 100)
