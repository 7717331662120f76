"""What ships for Grafana, Prometheus and autoscalers asks for metrics and labels that a server really exports."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from disagg.base.ids import InstanceId
from disagg.base.messages import InstanceLoad, LinkFigure
from disagg.base.request import GenerationRequest, Role
from disagg.base.sampling import FinishReason
from disagg.measure.timeline import RequestTimeline, Stage
from disagg.scheduling.dispatch.actions import RefuseReason
from disagg.scheduling.dispatch.state import InstanceState
from disagg.scheduling.replan.placements import RoleCounts
from disagg.scheduling.router.elastic_view import ElasticView, PlanCounts
from disagg.scheduling.router.outputs import DropReason, HandOverEnded, LinkFound, PlanDecided
from disagg.scheduling.router.scaling import ScalingView
from disagg.serve.api.instance_metrics import BLOCK_STATES
from disagg.serve.api.metrics import ServerMetrics
from disagg.serve.router.interface import InstanceStatus, SequenceStream

FOLDER = Path(__file__).parents[2] / "monitoring"
DASHBOARD = FOLDER / "grafana-dashboard.json"
ALERTS = FOLDER / "prometheus-alerts.yaml"
OVERLAYS = FOLDER.parent / "deploy" / "kubernetes" / "overlays"
AUTOSCALING = (OVERLAYS / "hpa" / "prometheus-adapter-values.yaml", OVERLAYS / "keda" / "autoscaling.yaml")

SELECTOR = re.compile(r"((?:vllm|disagg):\w+)(?:\{([^}]*)\})?")
LABEL = re.compile(r'(\w+)\s*(=~|!=|=)\s*"([^"]*)"')
GROUPING = re.compile(r"\b(?:by|on)\s*\(([^)]*)\)")
SHOWN_LABEL = re.compile(r"\{\{\s*(?:\$labels\.)?(\w+)\s*\}\}")
OF_PROMETHEUS = {"up", "job"}


class OneOfEach:
    """A router with one instance of each role."""

    def instances(self) -> tuple[InstanceStatus, ...]:
        return tuple(
            InstanceStatus(
                instance=InstanceId(f"{role.value}-0"), role=role, state=InstanceState.READY, load=InstanceLoad()
            )
            for role in Role
        )

    def elastic_view(self) -> ElasticView:
        scaled = ScalingView(role="decode", count=2, fewest=1, most=3, attainment=0.95, attainment_with_fewer=0.5)
        one, other = RoleCounts(1, 2), RoleCounts(2, 1)
        plan = PlanDecided(
            why="", present=one, best=other, attainment=0.5, best_attainment=0.9, num_requests=9, num_placements=3,
            pays=True, acts=True,
        )  # fmt: skip
        return ElasticView(scaling=(scaled,), plan=plan, plans=PlanCounts(1, 1, 1))

    def submit(self, request: GenerationRequest) -> SequenceStream:
        raise AssertionError("nothing is submitted")

    def abort(self, request_id: str) -> None:
        raise AssertionError("nothing is submitted")

    def is_ready(self) -> bool:
        return True


@pytest.fixture(scope="module")
def exported() -> dict[str, dict[str, set[str]]]:
    """Each exported sample's labels and their values, of a server that has seen everything once."""
    metrics = ServerMetrics("tiny")
    metrics.watch(OneOfEach())
    metrics.hand_over_ended(
        HandOverEnded(
            source=InstanceId("prefill-0"),
            target=InstanceId("decode-0"),
            num_bytes=1,
            duration_s=0.1,
            failure="",
            link="shm",
        )
    )
    figure = LinkFigure(link="shm", bytes_per_s=1e9, limit_bytes_per_s=2e9)
    metrics.link_found(LinkFound(source=InstanceId("prefill-0"), target=InstanceId("decode-0"), figure=figure))
    for reason in DropReason:
        metrics.message_dropped(InstanceId("decode-0"), reason)
    metrics.instance_lost(InstanceId("decode-0"))
    for refusal in RefuseReason:
        metrics.sequence_refused(refusal, 0, "interactive")
    metrics.sequence_degraded("batch")
    metrics.predictions.held_to_objectives("interactive", has_kept=True)
    metrics.error_shown(503)
    metrics.choice_ended(FinishReason.ERROR)
    metrics.stages_passed(RequestTimeline(arrival_s=0.0))
    found: dict[str, dict[str, set[str]]] = {}
    for family in text_string_to_metric_families(metrics.exposition().decode()):
        for sample in family.samples:
            labels = found.setdefault(sample.name, {})
            for name, value in sample.labels.items():
                labels.setdefault(name, set()).add(value)
    return found


def dashboard() -> dict[str, Any]:
    loaded = json.loads(DASHBOARD.read_text())
    assert isinstance(loaded, dict)
    return loaded


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def expressions() -> Iterator[tuple[str, str]]:
    """Every expression with the name of what asks it."""
    for panel in panels():
        for target in panel["targets"]:
            yield panel["title"], target["expr"]
    for rule in rules():
        yield rule["alert"], rule["expr"]
    for file in AUTOSCALING:
        yield file.parent.name, file.read_text()


def variables() -> dict[str, dict[str, Any]]:
    return {variable["name"]: variable for variable in dashboard()["templating"]["list"]}


def test_every_metric_and_label_asked_for_is_exported(exported):
    for title, expression in expressions():
        selectors = SELECTOR.findall(expression)
        assert selectors or "up{" in expression, title
        for name, matchers in selectors:
            assert name in exported, f"{title}: {name} is not exported"
            for label, operator, value in LABEL.findall(matchers):
                assert label in exported[name], f"{title}: {name} has no label {label}"
                wanted = set(value.split("|")) if operator == "=~" else {value}
                if not value.startswith("$"):
                    assert wanted <= exported[name][label], f"{title}: {name} has no {label} {value}"


def test_what_is_grouped_by_and_shown_is_a_label(exported):
    labels = {label for found in exported.values() for label in found} | OF_PROMETHEUS
    for title, expression in expressions():
        for group in GROUPING.findall(expression):
            assert {name.strip() for name in group.split(",")} <= labels, title
    for panel in panels():
        for target in panel["targets"]:
            asked = {label for name, _ in SELECTOR.findall(target["expr"]) for label in exported[name]}
            assert set(SHOWN_LABEL.findall(target["legendFormat"])) <= asked, panel["title"]


def test_all_of_our_own_metrics_are_looked_at(exported):
    looked_at = {name for _, expression in expressions() for name, _ in SELECTOR.findall(expression)}
    families = {re.sub(r"_(bucket|sum|count|total|created)$", "", name) for name in looked_at}
    ours = {re.sub(r"_(bucket|sum|count|total|created)$", "", name) for name in exported if name.startswith("disagg:")}
    not_shown = {"disagg:instance_losses"}
    assert ours - families <= not_shown, "deaths are shown by disagg:instance_restarts"


def test_parentheses_and_braces_are_closed():
    for title, expression in expressions():
        for opening, closing in ("()", "{}", "[]"):
            assert expression.count(opening) == expression.count(closing), title


# Grafana --------------------------------------------------------------------------------------------------------


def test_the_dashboard_can_be_imported():
    loaded = dashboard()
    assert loaded["title"] == "disagg"
    assert loaded["schemaVersion"] >= 36
    assert "id" not in loaded, "Grafana gives the id"
    assert loaded["uid"]
    ids = [panel["id"] for panel in loaded["panels"]]
    assert len(ids) == len(set(ids))
    for panel in panels():
        assert panel["type"] in {"timeseries", "stat"}
        assert panel["title"]
        assert [target["refId"] for target in panel["targets"]] == sorted(
            {target["refId"] for target in panel["targets"]}
        )


def test_the_source_of_data_is_chosen_by_a_variable():
    assert variables()["datasource"]["type"] == "datasource"
    assert variables()["datasource"]["query"] == "prometheus"
    for panel in panels():
        for asker in (panel, *panel["targets"]):
            assert asker["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


def test_every_variable_is_used_and_every_used_one_is_there():
    used = set(re.findall(r"\$(\w+)", " ".join(expression for _, expression in expressions())))
    assert used - {"__rate_interval"} == variables().keys() - {"datasource"}


def test_panels_fill_the_grid_and_do_not_overlap():
    taken: set[tuple[int, int]] = set()
    for panel in dashboard()["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + column, place["y"] + line) for column in range(place["w"]) for line in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert max(column for column, _ in cells) < 24
        taken |= cells


@pytest.mark.parametrize(
    ("variable", "metric"),
    [
        ("ttft", "vllm:time_to_first_token_seconds_bucket"),
        ("tpot", "vllm:request_time_per_output_token_seconds_bucket"),
    ],
)
def test_the_objectives_to_choose_from_are_bounds_of_buckets(exported, variable, metric):
    choices = variables()[variable]["query"].split(",")
    assert set(choices) <= exported[metric]["le"]
    assert variables()[variable]["current"]["value"] in choices


def test_every_stage_and_block_state_has_its_colour():
    coloured = {
        panel["title"]: {override["matcher"]["options"] for override in panel["fieldConfig"]["overrides"]}
        for panel in panels()
    }
    assert coloured["Where the time goes"] == {stage.value for stage in Stage}
    assert coloured["KV blocks by state"] == set(BLOCK_STATES)


# Prometheus -----------------------------------------------------------------------------------------------------


def test_alert_rules_are_whole():
    names = [rule["alert"] for rule in rules()]
    assert len(names) == len(set(names))
    for rule in rules():
        assert rule.keys() <= {"alert", "expr", "for", "labels", "annotations"}, rule["alert"]
        assert rule["labels"]["severity"] in {"warning", "critical"}
        assert rule["annotations"].keys() == {"summary", "description"}
        assert re.fullmatch(r"\d+[smh]", rule.get("for", "0s")), rule["alert"]
        assert re.search(r"(==|>=?|<=?)\s*[\d.]+\s*$", rule["expr"].strip()), f"{rule['alert']} has no threshold"


def test_alerts_name_labels_that_their_expression_keeps(exported):
    for rule in rules():
        shown = set(SHOWN_LABEL.findall(rule["annotations"]["summary"])) - {"value"}
        aggregated = re.search(r"\b(?:sum|histogram_quantile)\b", rule["expr"])
        kept = (
            {name.strip() for group in GROUPING.findall(rule["expr"]) for name in group.split(",")}
            if aggregated
            else {label for name, _ in SELECTOR.findall(rule["expr"]) for label in exported[name]} | {"instance"}
        )
        assert shown <= kept, rule["alert"]


def test_the_example_configuration_keeps_our_instance_label():
    configuration = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())
    (job,) = configuration["scrape_configs"]
    assert (job["job_name"], job["honor_labels"]) == ("disagg", True)
    assert [(FOLDER / name).is_file() for name in configuration["rule_files"]] == [True]
