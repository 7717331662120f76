"""What ships for Kubernetes is valid for its API, starts commands that exist, and hangs together."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import kubernetes_validate
import pytest
import yaml
from msgspec import structs

from disagg.base.config import CacheSettings, InstanceGroup, Placement
from disagg.base.errors import ConfigurationError
from disagg.base.request import Role
from disagg.cli.serve import serve
from disagg.placement.k8s_overlay import k8s_overlay

FOLDER = Path(__file__).parents[2] / "deploy" / "kubernetes"
FILES = sorted(path for path in FOLDER.rglob("*.yaml") if path.name not in ("kustomization.yaml",))
KUSTOMIZATIONS = sorted(path.parent for path in FOLDER.rglob("kustomization.yaml"))
NAME = "app.kubernetes.io/name"
COMPONENT = "app.kubernetes.io/component"
PLACEMENT = Placement(
    groups=(
        InstanceGroup(role=Role.PREFILL, count=3, num_threads=2, max_batch_tokens=2048),
        InstanceGroup(role=Role.DECODE, count=1, num_threads=4, kv_memory_bytes=8 << 30),
    )
)


def objects(text: str) -> Iterator[dict[str, Any]]:
    """Yield the documents that are for the API: charts' values are none."""
    yield from (one for one in yaml.safe_load_all(text) if "kind" in one)


def base(kind: str) -> dict[str, dict[str, Any]]:
    found = [one for file in FILES if file.parent.name == "base" for one in objects(file.read_text())]
    return {one["metadata"]["name"]: one for one in found if one["kind"] == kind}


def workloads() -> dict[str, dict[str, Any]]:
    return base("Deployment") | base("StatefulSet")


def pod_of(workload: dict[str, Any]) -> dict[str, Any]:
    pod = workload["spec"]["template"]["spec"]
    assert isinstance(pod, dict)
    return pod


def flags_of(workload: dict[str, Any]) -> dict[str, Any]:
    """What ``disagg serve`` makes of a pod's arguments; an unknown flag or a bad value raises."""
    (container,) = pod_of(workload)["containers"]
    command, *arguments = container["args"]
    assert command == "serve"
    return serve.make_context("serve", arguments).params


def is_of_kubernetes(one: dict[str, Any]) -> bool:
    group = one["apiVersion"].rpartition("/")[0]
    return "." not in group or group.endswith(".k8s.io")


def built(folder: Path) -> list[dict[str, Any]]:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(objects(done.stdout))


@pytest.mark.parametrize("file", FILES, ids=lambda path: str(path.relative_to(FOLDER)))
def test_each_object_is_valid(file: Path) -> None:
    for one in objects(file.read_text()):
        if is_of_kubernetes(one):
            kubernetes_validate.validate(one, "1.37", strict=True)


@pytest.mark.parametrize("folder", KUSTOMIZATIONS, ids=lambda path: path.name)
def test_each_kustomization_builds_valid_objects(folder: Path) -> None:
    found = built(folder)
    assert {"Deployment", "StatefulSet", "Service", "PodDisruptionBudget", "NetworkPolicy"} <= {
        one["kind"] for one in found
    }
    for one in found:
        if is_of_kubernetes(one):
            kubernetes_validate.validate(one, "1.37", strict=True)
        if one["kind"] in ("Deployment", "StatefulSet"):
            flags_of(one)


def test_kuberays_pods_are_valid_and_start_what_there_is() -> None:
    """The RayCluster's own schema is KubeRay's; the pods in it are Kubernetes'."""
    cluster, service = objects((FOLDER.parent / "kuberay" / "raycluster.yaml").read_text())
    kubernetes_validate.validate(service, "1.37", strict=True)
    head, workers = cluster["spec"]["headGroupSpec"], cluster["spec"]["workerGroupSpecs"][0]
    for template in (head["template"], workers["template"]):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": template["metadata"], "spec": template["spec"]}
        kubernetes_validate.validate(pod, "1.37", strict=True)
        assert pod["spec"]["securityContext"]["runAsNonRoot"]
    assert service["spec"]["selector"] == head["template"]["metadata"]["labels"]
    command, *arguments = head["template"]["spec"]["containers"][1]["args"]
    flags = serve.make_context(command, arguments).params
    assert flags["cluster"] == "ray"
    assert int(workers["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"]) >= flags["threads"]
    assert head["template"]["spec"]["terminationGracePeriodSeconds"] > flags["drain_s"]


def test_what_is_invalid_is_found() -> None:
    broken = base("Deployment")["disagg-router"] | {"spec": {"replicas": "one"}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, "1.37", strict=True)
    unknown = {"spec": {"template": {"spec": {"containers": [{"args": ["serve", "--no-such-flag"]}]}}}}
    with pytest.raises(click.NoSuchOption):
        flags_of(unknown)


def test_instances_join_the_router_where_it_listens() -> None:
    router, services = flags_of(workloads()["disagg-router"]), base("Service")
    assert (router["prefill"], router["decode"]) == (0, 0), "all of them join"
    port = int(router["listen_instances"].rpartition(":")[2])
    for role in Role:
        flags = flags_of(workloads()[f"disagg-{role.value}"])
        name, _, joined_at = flags["join"].partition(":")
        (said,) = services[name]["spec"]["ports"]
        assert (flags["role"], int(joined_at), said["port"]) == (role.value, port, port)
        assert services[name]["spec"]["publishNotReadyAddresses"], "it is not ready before they have joined"


def test_pods_have_the_time_that_answers_get() -> None:
    for name, workload in workloads().items():
        pod = pod_of(workload)
        pause_s = pod["containers"][0].get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        assert pod["terminationGracePeriodSeconds"] > pause_s + flags_of(workload)["drain_s"], name


def test_pods_are_ready_when_they_take_requests() -> None:
    for name, workload in workloads().items():
        (container,) = pod_of(workload)["containers"]
        probe = container["readinessProbe"]
        if name == "disagg-router":
            assert probe["httpGet"]["path"] == "/ready"
            assert container["livenessProbe"]["httpGet"]["path"] == "/health"
        else:
            assert probe["exec"]["command"] == ["test", "-f", flags_of(workload)["ready_file"]]


def test_pods_may_do_as_little_as_they_need() -> None:
    for name, workload in workloads().items():
        pod = pod_of(workload)
        (container,) = pod["containers"]
        assert pod["securityContext"]["runAsNonRoot"], name
        assert not pod["automountServiceAccountToken"], name
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }, name


def test_threads_are_the_cpus_that_a_pod_has() -> None:
    for role in Role:
        workload = workloads()[f"disagg-{role.value}"]
        resources = pod_of(workload)["containers"][0]["resources"]
        assert resources["requests"] == resources["limits"], "no neighbour takes its time"
        assert int(resources["limits"]["cpu"]) == flags_of(workload)["threads"]


def test_the_secret_of_the_server_is_in_no_instances_pod() -> None:
    for name, workload in workloads().items():
        secrets = {volume["secret"]["secretName"] for volume in pod_of(workload)["volumes"] if "secret" in volume}
        expected = {"disagg-keys", "disagg-api-keys"} if name == "disagg-router" else {"disagg-instance-keys"}
        assert secrets == expected


def test_budgets_policies_and_autoscalers_are_of_what_there_is() -> None:
    components = {one["spec"]["template"]["metadata"]["labels"][COMPONENT]: name for name, one in workloads().items()}
    assert components == {name.removeprefix("disagg-"): name for name in workloads()}
    budgets = {one["spec"]["selector"]["matchLabels"][COMPONENT] for one in base("PodDisruptionBudget").values()}
    assert budgets == set(components)
    instances = base("NetworkPolicy")["disagg-instances"]["spec"]
    (allowed,) = instances["ingress"]
    roles = {role.value for role in Role}
    for selector in (instances["podSelector"], allowed["from"][0]["podSelector"]):
        assert set(selector["matchExpressions"][0]["values"]) == roles
    scaled = [
        one
        for overlay in ("hpa", "keda")
        for one in objects((FOLDER / "overlays" / overlay / "autoscaling.yaml").read_text())
    ]
    assert [one["spec"]["scaleTargetRef"]["name"] for one in scaled] == ["disagg-prefill", "disagg-decode"] * 2


def test_autoscalers_ask_for_metrics_that_the_adapter_serves() -> None:
    overlay = FOLDER / "overlays" / "hpa"
    asked = {
        one["spec"]["metrics"][0]["external"]["metric"]["name"]
        for one in objects((overlay / "autoscaling.yaml").read_text())
    }
    values = yaml.safe_load((overlay / "prometheus-adapter-values.yaml").read_text())
    assert asked == {rule["name"]["as"] for rule in values["rules"]["external"]}


def test_a_plan_is_an_overlay() -> None:
    shipped = FOLDER / "overlays" / "planned" / "kustomization.yaml"
    assert shipped.read_text() == k8s_overlay(PLACEMENT, CacheSettings(kv_memory_bytes=2 << 30))


def test_a_planned_overlay_builds_the_placement() -> None:
    found = {
        one["metadata"]["name"]: one for one in built(FOLDER / "overlays" / "planned") if one["kind"] == "StatefulSet"
    }
    assert {name: one["spec"]["replicas"] for name, one in found.items()} == {
        "disagg-prefill": 3,
        "disagg-decode": 1,
        "disagg-colocated": 0,
    }
    prefill, decode = flags_of(found["disagg-prefill"]), flags_of(found["disagg-decode"])
    assert (prefill["threads"], prefill["max_batch_tokens"], prefill["kv_memory_bytes"]) == (2, 2048, 2 << 30)
    assert (decode["threads"], decode["kv_memory_bytes"]) == (4, 8 << 30)
    resources = pod_of(found["disagg-decode"])["containers"][0]["resources"]
    assert resources["limits"] == resources["requests"]
    assert int(resources["limits"]["memory"]) > decode["kv_memory_bytes"]


def test_a_block_size_of_its_own_is_the_routers_too(tmp_path: Path) -> None:
    overlay = tmp_path / "overlays" / "own"
    shutil.copytree(FOLDER / "base", tmp_path / "base")
    overlay.mkdir(parents=True)
    (overlay / "kustomization.yaml").write_text(k8s_overlay(PLACEMENT, CacheSettings(block_size=32)))
    assert block_sizes(overlay) == dict.fromkeys(("router", "prefill", "decode", "colocated"), 32)
    prefill, decode = PLACEMENT.groups
    sized = Placement(groups=(prefill, structs.replace(decode, block_size=128)))
    (overlay / "kustomization.yaml").write_text(k8s_overlay(sized, CacheSettings(block_size=32)))
    assert block_sizes(overlay) == {"router": 32, "prefill": 32, "decode": 128, "colocated": 32}


def block_sizes(overlay: Path) -> dict[str, int]:
    """Those that router and instances are told."""
    found = [one for one in built(overlay) if one["kind"] in ("Deployment", "StatefulSet")]
    return {one["metadata"]["name"].removeprefix("disagg-"): flags_of(one)["block_size"] for one in found}


def test_pods_of_a_stateful_set_are_equal() -> None:
    unequal = Placement(groups=(*PLACEMENT.groups, InstanceGroup(role=Role.DECODE, count=1, num_threads=1)))
    with pytest.raises(ConfigurationError, match="2 kinds of decode instances"):
        k8s_overlay(unequal, CacheSettings())
