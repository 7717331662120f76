"""What a server needs before it listens for instances on other hosts, and what it refuses."""

from pathlib import Path

import pytest

from disagg.base.config import InstanceGroup, Placement
from disagg.base.errors import ConfigurationError
from disagg.base.request import Role
from disagg.base.transfer_settings import KvLinkChoice, TransferSettings
from disagg.serve.launch.deployment import Deployment, RemoteSettings
from disagg.serve.launch.outside_door import kv_host_of, open_door

PREFILL = Placement(groups=(InstanceGroup(role=Role.PREFILL, count=1),), others_join=True)


def kv_host(placement: Placement, **remote: str) -> str | None:
    return kv_host_of(Deployment(placement=placement, remote=RemoteSettings(**remote)))


def test_no_other_host_reads_blocks_unless_it_may_join() -> None:
    assert kv_host(PREFILL) is None
    assert open_door(Deployment(placement=PREFILL)) is None


def test_blocks_are_read_where_instances_join_unless_said_otherwise() -> None:
    assert kv_host(PREFILL, listen_instances="10.0.0.1:7000") == "10.0.0.1"
    assert kv_host(PREFILL, listen_instances="0.0.0.0:7000", kv_host="10.0.0.1") == "10.0.0.1"


@pytest.mark.parametrize("everywhere", ["0.0.0.0:7000", "[::]:7000", "*:7000"])
def test_every_address_is_none_that_can_be_told_to_others(everywhere: str) -> None:
    with pytest.raises(ConfigurationError, match="--kv-host"):
        kv_host(PREFILL, listen_instances=everywhere)
    alone = Placement(groups=(), others_join=True)
    assert kv_host(alone, listen_instances=everywhere) is None, "it has no blocks of its own"


def test_shared_memory_alone_reaches_no_other_host(tmp_path: Path) -> None:
    deployment = Deployment(
        placement=PREFILL,
        transfer=TransferSettings(kv_link=KvLinkChoice.SHM),
        remote=RemoteSettings(listen_instances="10.0.0.1:7000", keys=str(tmp_path)),
    )
    with pytest.raises(ConfigurationError, match="--kv-link shm"):
        open_door(deployment)


def test_a_placement_that_serves_nothing_alone_needs_others_to_join() -> None:
    with pytest.raises(ConfigurationError, match="serves nothing"):
        Placement(groups=PREFILL.groups)
    assert Placement(groups=(), others_join=True).groups == (), "all of its instances join"
