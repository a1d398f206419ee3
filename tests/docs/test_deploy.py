"""What docs/deploy has for Docker and Kubernetes: what is shared, valid manifests."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

DEPLOY = Path(__file__).resolve().parents[2] / "docs" / "deploy"
KUSTOMIZATIONS = [DEPLOY / "kubernetes", DEPLOY / "kubernetes" / "restricted"]


def documents(path: Path) -> list[dict[str, Any]]:
    """The documents of a file, or of all resources of a kustomization."""
    if path.is_dir():
        names = yaml.safe_load((path / "kustomization.yaml").read_text())["resources"]
        return [document for name in names for document in documents(path / name)]
    return list(yaml.safe_load_all(path.read_text()))


def pods(path: Path) -> list[dict[str, Any]]:
    """The specs of all pods."""
    return [x["spec"].get("template", x)["spec"] for x in documents(path) if x["kind"] != "PersistentVolumeClaim"]


@pytest.mark.parametrize("path", [DEPLOY / "docker-compose.yml", *KUSTOMIZATIONS], ids=lambda path: path.name)
class TestSharing:
    """Containers share the runtime directory and nothing else."""

    def containers(self, path: Path) -> list[dict[str, Any]]:
        if path.is_dir():
            return [container for pod in pods(path) for container in pod["containers"]]
        return [container for x in documents(path) for container in x["services"].values()]

    def test_runtime_directory(self, path: Path) -> None:
        """All containers mount it, and name it in the same way."""
        assert len(self.containers(path)) >= 2
        for container in self.containers(path):
            environment = container.get("environment") or {e["name"]: e["value"] for e in container["env"]}
            assert environment["COMPANION_RUNTIME_DIR"] == "/run/vllm-companion/r"
            assert "/run/vllm-companion" in str(container.get("volumes") or container["volumeMounts"])

    def test_nothing_else(self, path: Path) -> None:
        """No namespace and no privilege."""
        for container in self.containers(path):
            assert container.get("ipc", "private") == "private"
            assert "pid" not in container
            assert not container.get("privileged")
            drop = container.get("cap_drop") or container["securityContext"]["capabilities"]["drop"]
            assert drop == ["ALL"]
        if path.is_dir():
            assert not any(pod.get("hostIPC") or pod.get("hostPID") for pod in pods(path))


@pytest.mark.parametrize("path", KUSTOMIZATIONS, ids=lambda path: path.name)
class TestKubernetes:
    """Manifests."""

    def test_pods(self, path: Path) -> None:
        """Variables of services are off, containers have probes and resources, a cache is filled before it is read."""
        for pod in pods(path):
            assert pod["enableServiceLinks"] is False
            for container in pod["containers"]:
                assert "readinessProbe" in container
                assert container["resources"]["requests"]
                assert container["resources"]["limits"]["memory"]
            offline = "HF_HUB_OFFLINE" in str(pod["containers"])
            assert offline == any(c["name"] == "fill-cache" for c in pod.get("initContainers", []))

    def test_probes_of_companions(self, path: Path) -> None:
        """Who runs `serve` is asked by `status`, which tells "none runs" from "one does not answer"."""
        for container in (container for pod in pods(path) for container in pod["containers"]):
            if "serve" in container.get("command", ()):
                for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
                    assert container[kind]["exec"]["command"] == ["vllm-companion", "status"]

    def test_one_node(self, path: Path) -> None:
        """Replicas must be on one node; that is no preference."""
        for x in documents(path):
            if x["kind"] == "Deployment":
                affinity = x["spec"]["template"]["spec"]["affinity"]["podAffinity"]
                (term,) = affinity["requiredDuringSchedulingIgnoredDuringExecution"]
                assert term["labelSelector"]["matchLabels"] == x["spec"]["selector"]["matchLabels"]

    def test_schema(self, path: Path) -> None:
        """What kubectl builds, or else what the files say, is valid for Kubernetes, unknown fields included."""
        validate = pytest.importorskip("kubernetes_validate")
        built = documents(path)
        if shutil.which("kubectl"):
            text = subprocess.run(
                ["kubectl", "kustomize", str(path)], check=True, capture_output=True, text=True
            ).stdout
            built = list(yaml.safe_load_all(text))
        assert len(built) == 2
        for x in built:
            validate.validate(x, "1.30", strict=True)


def test_restricted_pods_are_admitted() -> None:
    """By the profile "restricted" of the Pod Security Standards, init containers included."""
    for pod in pods(DEPLOY / "kubernetes" / "restricted"):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in (*pod["initContainers"], *pod["containers"]):
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        kinds = {kind for volume in pod["volumes"] for kind in volume if kind != "name"}
        assert kinds <= {"emptyDir", "persistentVolumeClaim", "configMap", "secret", "projected", "downwardAPI", "csi"}


def test_compose_and_the_image_agree() -> None:
    """Compose builds the Dockerfile that is here, from the root of the repository, which the Dockerfile copies."""
    (compose,) = documents(DEPLOY / "docker-compose.yml")
    for service in compose["services"].values():
        assert (DEPLOY / service["build"]["context"]).resolve() == DEPLOY.parents[1]
        assert (DEPLOY.parents[1] / service["build"]["dockerfile"]).samefile(DEPLOY / "Dockerfile")
