"""From a deployment to the settings of each instance."""

import pytest

from disagg.base.config import (
    CacheSettings,
    CurveKeys,
    Device,
    InstanceGroup,
    Placement,
    RouterSettings,
    SchedulerSettings,
    SchedulingMode,
)
from disagg.base.core_settings import LentCores
from disagg.base.disk_settings import DiskSettings
from disagg.base.errors import ConfigurationError
from disagg.base.ids import InstanceId
from disagg.base.joining import ServerTerms
from disagg.base.objectives import Objectives
from disagg.base.request import Role
from disagg.serve.launch.deployment import (
    Deployment,
    HostSettings,
    hash_block_size,
    plan_addition,
    plan_guest,
    plan_instances,
    terms_of,
    under_terms,
)


def group(role: Role, count: int = 1, **fields) -> InstanceGroup:
    return InstanceGroup(role=role, count=count, **fields)


def plan(*groups: InstanceGroup, cores=(0, 1, 2, 3), scheduler=None, **host):
    deployment = Deployment(
        placement=Placement(groups=groups), host=HostSettings(**host), scheduler=scheduler or SchedulerSettings()
    )
    settings = plan_instances(
        deployment, control_endpoint="ipc://here", available_cores=cores, parent_pid=7, core_board="board"
    )
    assert [one.instance for one in settings] == list(deployment.roles())
    return settings


def test_instances_are_named_and_get_cores_and_threads_of_their_own():
    settings = plan(group(Role.DECODE, 2), group(Role.PREFILL, 1))
    assert [(one.instance, one.role, one.cpus, one.num_threads) for one in settings] == [
        ("prefill-0", Role.PREFILL, (0, 1), 2),
        ("decode-0", Role.DECODE, (2,), 1),
        ("decode-1", Role.DECODE, (3,), 1),
    ]
    assert {(one.control_endpoint, one.parent_pid) for one in settings} == {("ipc://here", 7)}


def test_prefixes_are_named_by_the_smallest_blocks_of_any_group():
    unequal = Placement(groups=(group(Role.PREFILL, block_size=128), group(Role.DECODE, block_size=32)))
    assert hash_block_size(Deployment(placement=unequal)) == 32
    assert [one.cache.block_size for one in plan(*unequal.groups)] == [128, 32]
    equal = Placement(groups=(group(Role.COLOCATED),))
    assert hash_block_size(Deployment(placement=equal, cache=CacheSettings(block_size=48))) == 48


def test_block_sizes_that_do_not_divide_are_refused():
    unfit = Placement(groups=(group(Role.PREFILL, block_size=48), group(Role.DECODE, block_size=32)))
    with pytest.raises(ConfigurationError, match="blocks of 32 and of 48 tokens: the larger must be a multiple"):
        hash_block_size(Deployment(placement=unfit))


def test_threads_can_be_given_for_a_group_or_for_all():
    by_group = plan(group(Role.PREFILL, num_threads=3), group(Role.DECODE))
    assert [(one.cpus, one.num_threads) for one in by_group] == [((0, 1, 2), 3), ((3,), 1)]
    for_all = plan(group(Role.PREFILL, num_threads=3), group(Role.DECODE), threads=2)
    assert [(one.cpus, one.num_threads) for one in for_all] == [((0, 1), 2), ((2, 3), 2)]


def test_instances_borrow_the_cores_of_their_neighbours():
    prefill, decode = plan(group(Role.PREFILL), group(Role.DECODE), cores=(4, 5))
    assert prefill.lent_cores == LentCores(board="board", cores=(5,))
    assert decode.lent_cores == LentCores(board="board", cores=(4,))


@pytest.mark.parametrize(
    ("fields", "is_lent"),
    [
        ({}, True),
        ({"threads": 1}, False),
        ({"threads": 1, "lend_cores": True}, True),
        ({"lend_cores": False}, False),
        ({"device": Device.CUDA}, False),
        ({"scheduler": SchedulerSettings(max_steps_in_flight=2)}, False),
        ({"cores": (0,)}, False),
    ],
)
def test_cores_are_lent_unless_threads_are_given(fields, is_lent):
    settings = plan(group(Role.PREFILL), group(Role.DECODE), **fields)
    assert [one.lent_cores is not None for one in settings] == [is_lent, is_lent]


def test_a_placement_may_say_that_cores_are_lent():
    groups = (group(Role.PREFILL, num_threads=1), group(Role.DECODE, num_threads=1))
    deployment = Deployment(placement=Placement(groups=groups, lend_cores=True))
    settings = plan_instances(
        deployment, control_endpoint="ipc:///x", available_cores=(0, 1), parent_pid=0, core_board="board"
    )
    assert [one.lent_cores for one in settings] == [LentCores(board="board", cores=(core,)) for core in (1, 0)]


def test_a_lone_instance_borrows_nothing():
    (alone,) = plan(group(Role.COLOCATED))
    assert alone.lent_cores is None


def test_an_added_instance_lends_cores_unless_it_shares_them():
    deployment = Deployment(placement=Placement(groups=(group(Role.PREFILL), group(Role.DECODE))))
    planned = plan(group(Role.PREFILL, num_threads=1), group(Role.DECODE, num_threads=1), lend_cores=True)
    name = InstanceId("decode-1")
    lends = plan_addition(deployment, planned, planned, name, Role.DECODE, (0, 1, 2))
    assert (lends.cpus, lends.lent_cores) == ((2,), LentCores(board="board", cores=(0,)))
    shares = plan_addition(deployment, planned, planned, name, Role.DECODE, (0, 1))
    assert (shares.cpus, shares.lent_cores) == ((0,), None)


def test_the_cores_can_be_chosen():
    assert [one.cpus for one in plan(group(Role.COLOCATED, 2), cpus=(3, 1))] == [(3,), (1,)]
    with pytest.raises(ConfigurationError, match="core 9, but this process may use 0-3"):
        plan(group(Role.COLOCATED), cpus=(1, 9))


def test_many_absent_cores_are_told_in_short():
    with pytest.raises(ConfigurationError, match=r"--cpus names core 2-99, but this process may use 0,1$"):
        plan(group(Role.COLOCATED), cores=(0, 1), cpus=tuple(range(100)))


def test_each_instance_logs_to_a_file_of_its_own():
    assert [one.event_log for one in plan(group(Role.COLOCATED, 2), event_log="logs")] == [
        "logs/colocated-0.jsonl",
        "logs/colocated-1.jsonl",
    ]


def test_parallelism_that_is_not_there_is_refused():
    with pytest.raises(ConfigurationError, match=r"tensor_parallel 2 .* decode instances: only 1"):
        plan(group(Role.PREFILL), group(Role.DECODE, tensor_parallel=2))


def test_a_group_may_have_settings_of_its_own():
    prefill, decode = plan(
        group(Role.PREFILL, max_batch_tokens=2048, scheduling=SchedulingMode.PREFILL_FIRST),
        group(Role.DECODE, max_batch_size=8, kv_memory_bytes=1 << 28),
    )
    common = SchedulerSettings()
    assert (prefill.scheduler.max_batch_tokens, prefill.scheduler.scheduling) == (2048, SchedulingMode.PREFILL_FIRST)
    assert (prefill.scheduler.max_batch_size, prefill.cache) == (common.max_batch_size, CacheSettings())
    assert (decode.scheduler.max_batch_size, decode.scheduler.max_batch_tokens) == (8, common.max_batch_tokens)
    assert decode.cache.kv_memory_bytes == 1 << 28


def test_one_more_instance_is_as_those_of_its_role_on_cores_that_are_left():
    groups = (group(Role.PREFILL, num_threads=1), group(Role.DECODE, num_threads=1, max_batch_size=7))
    deployment = Deployment(placement=Placement(groups=groups), host=HostSettings(event_log="logs"))
    planned = plan(*groups)
    added = plan_addition(deployment, planned, planned, InstanceId("decode-1"), Role.DECODE, (0, 1, 2, 3))
    assert (added.cpus, added.num_threads, added.scheduler.max_batch_size) == ((2,), 1, 7)
    assert (added.instance, added.control_endpoint, added.event_log) == (
        "decode-1",
        "ipc://here",
        "logs/decode-1.jsonl",
    )


def test_one_more_instance_shares_cores_where_none_are_left():
    groups = (group(Role.PREFILL, 2), group(Role.DECODE))
    deployment = Deployment(placement=Placement(groups=groups))
    planned = plan(*groups, cores=(0, 1, 2))
    added = plan_addition(deployment, planned, planned[1:], InstanceId("colocated-0"), Role.COLOCATED, (0, 1, 2))
    assert added.cpus == (0,), "its owner is gone"
    crowded = plan_addition(deployment, planned, (*planned, added), InstanceId("decode-1"), Role.DECODE, (0, 1, 2))
    assert crowded.cpus == (1,), "which fewest have"


@pytest.mark.parametrize("predicts", [False, True])
def test_one_more_instance_tells_costs_where_the_router_predicts(predicts):
    groups = (group(Role.PREFILL), group(Role.DECODE))
    deployment = Deployment(placement=Placement(groups=groups), router=RouterSettings(strict_roles=not predicts))
    added = plan_addition(deployment, plan(*groups), (), InstanceId("decode-1"), Role.DECODE, (0, 1))
    assert added.scheduler.tells_costs is predicts


def test_a_server_without_an_instance_of_its_own_cannot_add_one():
    deployment = Deployment(placement=Placement(groups=(), others_join=True))
    assert plan_instances(deployment, control_endpoint="ipc://here", available_cores=(0,), parent_pid=7) == ()
    with pytest.raises(ConfigurationError, match="disagg serve --join"):
        plan_addition(deployment, (), (), InstanceId("decode-0"), Role.DECODE, (0,))


def test_an_instance_for_another_hosts_server_has_what_its_host_is_told():
    deployment = Deployment(
        placement=Placement(groups=(group(Role.COLOCATED, 2),)), cache=CacheSettings(kv_disk="/disk,2GiB")
    )
    keys = CurveKeys(server_public="s", public="p", secret="x")
    guest = plan_guest(deployment, group(Role.DECODE, max_batch_size=8), keys, (0, 1, 2), 7)
    assert (guest.role, guest.num_threads, guest.control_curve) == (Role.DECODE, 3, keys)
    assert guest.scheduler.max_batch_size == 8
    assert guest.cpus == (), "it has no core to itself unless told"
    assert guest.kv_disk == DiskSettings(folder="/disk", max_bytes=2 << 30)


def test_the_server_says_what_all_its_instances_tell_and_aim_at():
    objectives = Objectives(ttft_s=0.5)
    deployment = Deployment(
        placement=Placement(groups=(group(Role.COLOCATED),)),
        router=RouterSettings(strict_roles=False),
        scheduler=SchedulerSettings(objectives=objectives),
        host=HostSettings(kv_events="tcp://127.0.0.1:5557"),
    )
    terms = terms_of(deployment)
    assert terms == ServerTerms(tells_costs=True, tells_tokens=True, objectives=objectives)
    (own,) = plan_instances(deployment, control_endpoint="ipc://here", available_cores=(0,), parent_pid=7)
    assert own.scheduler == under_terms(SchedulerSettings(), terms), "here as on other hosts"
    assert own.tells_tokens
