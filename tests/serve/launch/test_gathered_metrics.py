"""One scrape of several routers."""

from prometheus_client.parser import text_string_to_metric_families

from disagg.base.ids import InstanceId, RouterId
from disagg.serve.api.fleet_metrics import FleetMetrics
from disagg.serve.api.metrics import ServerMetrics
from disagg.serve.launch.fleet_messages import MetricsGiven
from disagg.serve.launch.gathered_metrics import merge

OF_INSTANCES = b'# HELP up Instances\n# TYPE up gauge\nup{instance="decode-0"} 1.0\n'


def test_what_routers_count_is_told_apart_and_what_instances_say_comes_once() -> None:
    given = {}
    for number, name in enumerate((RouterId("0.1"), RouterId("1.3")), start=1):
        metrics = ServerMetrics("tiny")
        metrics.tokens.add(number)
        given[name] = MetricsGiven(number=0, text=metrics.of_router(), of_instances=OF_INSTANCES)
    families = {family.name: family for family in text_string_to_metric_families(merge(given).decode())}
    counted = {
        sample.labels["router"]: sample.value
        for sample in families["vllm:generation_tokens"].samples
        if sample.name == "vllm:generation_tokens_total"
    }
    assert counted == {"0.1": 1.0, "1.3": 2.0}
    assert [sample.labels for sample in families["up"].samples] == [{"instance": "decode-0"}]
    assert {sample.labels["router"] for sample in families["process_resident_memory_bytes"].samples} == set(counted)


def test_a_scrape_that_no_router_answers_is_empty() -> None:
    assert merge({}) == b""


def test_a_death_that_every_router_sees_is_counted_where_instances_are_kept() -> None:
    fleet, router = FleetMetrics("tiny"), ServerMetrics("tiny", keeps_fleet=False)
    for sink in (fleet, router):
        sink.instance_lost(InstanceId("decode-0"))
    given = MetricsGiven(number=0, text=router.of_router(), of_instances=router.of_instances())
    text = (merge({RouterId("0.1"): given, RouterId("1.1"): given}) + fleet.exposition()).decode()
    deaths = [
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "disagg:instance_losses_total"
    ]
    assert deaths == [1.0]
