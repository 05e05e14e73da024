"""The manifests for Kubernetes are valid, and fit together."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from shared import ROOT, program, run

from eadaprune_vllm.core.server_options import ServerOptions

K8S = ROOT / "deploy/k8s"
OVERLAYS = [K8S / "base", *sorted(folder for folder in (K8S / "overlays").iterdir())]
KUBERNETES = ("1.31", kubernetes_validate.latest_version())
# Kinds that come with operators, and what of them is Kubernetes' own.
CUSTOM = {"PodMonitor", "PrometheusRule", "ScaledObject", "LeaderWorkerSet"}


def objects(folder: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(run(program("kubectl"), "kustomize", folder)))


def pods(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The pod templates of a manifest."""
    spec = manifest.get("spec", {})
    of_group = spec.get("leaderWorkerTemplate", {})
    return [
        pod for pod in (spec.get("template"), of_group.get("leaderTemplate"), of_group.get("workerTemplate")) if pod
    ]


@pytest.mark.parametrize("folder", OVERLAYS, ids=lambda folder: folder.name)
@pytest.mark.parametrize("version", KUBERNETES)
def test_manifests_are_valid(folder: Path, version: str) -> None:
    for manifest in objects(folder):
        if manifest["kind"] not in CUSTOM:
            kubernetes_validate.validate(manifest, version, strict=True)
        for template in pods(manifest):
            pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": template}
            kubernetes_validate.validate(pod, version, strict=True)


@pytest.mark.parametrize("folder", OVERLAYS, ids=lambda folder: folder.name)
def test_pods_run_the_plugin_without_privileges(folder: Path) -> None:
    templates = [template for manifest in objects(folder) for template in pods(manifest)]
    assert templates
    for template in templates:
        assert template["metadata"]["labels"]["app.kubernetes.io/name"] == "eadaprune-vllm"
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"]
        (container,) = spec["containers"]
        assert "--plugin=eadaprune" in container["args"]
        assert container["image"] == "eadaprune-vllm:cuda"
        for each in (container, *spec.get("initContainers", ())):
            assert each["securityContext"]["readOnlyRootFilesystem"]
            assert not each["securityContext"]["allowPrivilegeEscalation"]
        assert (
            container["resources"]["requests"]["nvidia.com/gpu"] == container["resources"]["limits"]["nvidia.com/gpu"]
        )
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in spec["volumes"]}
        flags = {arg.split("=")[0].removeprefix("--eadaprune-") for arg in container["args"] if "--eadaprune-" in arg}
        assert {flag.replace("-", "_") for flag in flags} <= ServerOptions.model_fields.keys()


def drain_seconds(container: dict[str, Any]) -> tuple[int, int]:
    """How long a pod goes on as before when it is stopped, and how long vLLM then finishes answers."""
    timeout = [int(arg.partition("=")[2]) for arg in container["args"] if arg.startswith("--shutdown-timeout=")]
    return container["lifecycle"]["preStop"]["sleep"]["seconds"], sum(timeout)


@pytest.mark.parametrize("folder", OVERLAYS, ids=lambda folder: folder.name)
def test_answers_are_finished_before_a_pod_stops(folder: Path) -> None:
    for template in (template for manifest in objects(folder) for template in pods(manifest)):
        (container,) = template["spec"]["containers"]
        before, during = drain_seconds(container)
        assert before + during + 15 <= template["spec"]["terminationGracePeriodSeconds"]
        assert before + during >= 135
        # vLLM finishes answers with one front end only (tests/server/test_stopping.py), and without one not at all.
        has_one = not any(arg.startswith("--api-server-count=") or arg == "--headless" for arg in container["args"])
        assert (during > 0) == has_one


def test_ranks_without_a_front_end_outlive_the_leader() -> None:
    (group,) = (each for each in objects(K8S / "overlays/multi-node") if each["kind"] == "LeaderWorkerSet")
    (leader,), (worker,) = (template["spec"]["containers"] for template in pods(group))
    assert drain_seconds(worker)[0] > sum(drain_seconds(leader))
    assert leader["livenessProbe"]["httpGet"]["path"] == "/health"


@pytest.mark.parametrize("folder", OVERLAYS, ids=lambda folder: folder.name)
def test_each_pod_has_one_disruption_budget(folder: Path) -> None:
    """Kubernetes evicts no pod that has several."""
    manifests = objects(folder)
    selectors = [
        each["spec"]["selector"]["matchLabels"].items() for each in manifests if each["kind"] == "PodDisruptionBudget"
    ]
    for labels in (template["metadata"]["labels"].items() for manifest in manifests for template in pods(manifest)):
        assert len([selector for selector in selectors if selector <= labels]) == 1


@pytest.mark.parametrize("overlay", ["tensor-parallel", "multi-node", "prefill-decode"])
def test_pods_can_be_bound_to_a_pool(overlay: str, tmp_path: Path) -> None:
    shutil.copytree(K8S, tmp_path / "k8s")
    kustomization = {"resources": [f"../k8s/overlays/{overlay}"], "components": ["../k8s/gpu-pool"]}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    templates = [template for manifest in objects(tmp_path / "mine") for template in pods(manifest)]
    assert templates
    for spec in (template["spec"] for template in templates):
        assert spec["nodeSelector"].keys() == {"nvidia.com/gpu.product"}
        assert [toleration["key"] for toleration in spec["tolerations"]] == ["nvidia.com/gpu", "pool"]


def test_replicas_follow_the_pods_of_their_deployment(tmp_path: Path) -> None:
    """The query is evaluated by Prometheus, over the pods of several deployments and namespaces."""
    manifests = objects(K8S / "overlays/monitored")
    (scaled,) = (each for each in manifests if each["kind"] == "ScaledObject")
    (deployment,) = (each for each in manifests if each["kind"] == "Deployment")
    assert scaled["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    namespace = deployment["metadata"]["namespace"]
    own = [(namespace, "eadaprune-vllm-7d9f8b6c5d-abc12"), (namespace, "eadaprune-vllm-7d9f8b6c5-x7k2p")]
    others = [
        ("other", "eadaprune-vllm-7d9f8b6c5d-abc12"),
        (namespace, "eadaprune-vllm-decode-7d9f8b6c5d-abc12"),
        (namespace, "my-eadaprune-vllm-7d9f8b6c5d-abc12"),
    ]
    series = [
        {"series": f'vllm:num_requests_waiting{{namespace="{space}", pod="{pod}"}}', "values": value}
        for pods_of, value in ((own, "3"), (others, "100"))
        for space, pod in pods_of
    ]
    (trigger,) = scaled["spec"]["triggers"]
    case = {"expr": trigger["metadata"]["query"], "eval_time": "0m", "exp_samples": [{"labels": "{}", "value": 6}]}
    tests = {"tests": [{"input_series": series, "promql_expr_test": [case]}]}
    (tmp_path / "test.yml").write_text(yaml.safe_dump(tests))
    run(program("promtool"), "test", "rules", tmp_path / "test.yml")


def test_replicas_share_a_volume_that_several_nodes_may_mount() -> None:
    (claim,) = (each for each in objects(K8S / "overlays/monitored") if each["kind"] == "PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


def test_prefill_and_decode_are_apart() -> None:
    deployments = [
        manifest for manifest in objects(K8S / "overlays/prefill-decode") if manifest["kind"] == "Deployment"
    ]
    assert len(deployments) == 2
    for deployment in deployments:
        role = deployment["metadata"]["name"].rpartition("-")[2]
        for labels in (
            deployment["spec"]["selector"]["matchLabels"],
            deployment["spec"]["template"]["metadata"]["labels"],
        ):
            assert labels["llm-d.ai/role"] == role
        pod = deployment["spec"]["template"]["spec"]
        (vllm,) = pod["containers"]
        served = [port for each in (vllm, *pod.get("initContainers", ())) for port in each["ports"]]
        assert {port["name"]: port["containerPort"] for port in served}["http"] == 8000  # where llm-d's router looks
        probed = {vllm[probe]["httpGet"]["port"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")}
        assert probed < {port["name"] for port in vllm["ports"]}
        transfer = [arg.partition("=")[2] for arg in vllm["args"] if arg.startswith("--kv-transfer-config=")]
        assert [json.loads(config)["kv_connector"] for config in transfer] == ["NixlConnector"]


@pytest.mark.server
def test_flags_of_the_manifests_are_vllms_and_ours() -> None:
    known = run(Path(sys.executable).with_name("vllm"), "serve", "--help=all")
    args = {
        arg.split("=")[0]
        for folder in OVERLAYS
        for manifest in objects(folder)
        for template in pods(manifest)
        for arg in template["spec"]["containers"][0]["args"]
    }
    values = yaml.safe_load((K8S / "production-stack/values.yaml").read_text())
    for model in values["servingEngineSpec"]["modelSpec"]:
        args |= set(model["vllmConfig"]["extraArgs"])
    assert {arg for arg in args if arg.startswith("--") and arg not in known} == set()


def test_worker_methods_do_not_collide() -> None:
    """LeaderWorkerSet makes a headless service of its own name, by which the nodes find each other."""
    for folder in OVERLAYS:
        manifests = objects(folder)
        services = {manifest["metadata"]["name"] for manifest in manifests if manifest["kind"] == "Service"}
        groups = {manifest["metadata"]["name"] for manifest in manifests if manifest["kind"] == "LeaderWorkerSet"}
        assert not services & groups


@pytest.mark.slow
def test_objects_of_operators_are_valid(tmp_path: Path) -> None:
    """With the schemas of npm's packages. LeaderWorkerSet has none; its pods are validated above."""
    shutil.copy(ROOT / "tests/custom_resources.mjs", tmp_path)
    packages = ["@kubernetes-models/prometheus-operator@6", "@kubernetes-models/keda@2"]
    run(program("npm"), "install", "--silent", "--no-audit", "--no-fund", *packages, cwd=tmp_path)
    manifests = [each for each in objects(K8S / "overlays/monitored") if each["kind"] in CUSTOM]

    def validate(manifests: list[dict[str, Any]]) -> subprocess.CompletedProcess[str]:
        command = [program("node"), "custom_resources.mjs"]
        return subprocess.run(command, cwd=tmp_path, input=json.dumps(manifests), capture_output=True, text=True)

    done = validate(manifests)
    assert sorted(done.stdout.split()) == ["PodMonitor", "PrometheusRule", "ScaledObject"], done.stderr
    (scaled,) = (each for each in manifests if each["kind"] == "ScaledObject")
    scaled["spec"]["minReplicaCount"] = "one"
    assert "minReplicaCount must be integer" in validate([scaled]).stderr


def test_the_dashboard_reaches_grafanas_sidecar() -> None:
    (config,) = (manifest for manifest in objects(K8S / "overlays/monitored") if manifest["kind"] == "ConfigMap")
    assert config["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(config["data"]["eadaprune.json"])["uid"] == "vllm-eadaprune"
