"""The files of the deployment pages are valid, and agree with settings, commands and each other."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from configparser import ConfigParser
from copy import deepcopy
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from compose_spec import PyCompose
from django.conf import settings

from tests.test_docs import README, VARIABLES
from tinkerapi.management.commands.up import WEB_STOP_SECONDS
from tinkerapi.server.worker_part import WORKER_STOP_SECONDS

DOCS = Path(__file__).resolve().parents[2] / "tinkerapi" / "docs"
FILES = DOCS / "deployment"
PAGES = ("deployment.md", "several-hosts.md", "containers.md", "proxy.md")
KUBERNETES_VERSION = "1.31"

STOP_SECONDS = WEB_STOP_SECONDS + WORKER_STOP_SECONDS

KUBERNETES = list(yaml.safe_load_all((FILES / "kubernetes.yaml").read_text()))
COMPOSE = yaml.safe_load((FILES / "compose.yaml").read_text())


def unit(name: str) -> ConfigParser:
    parser = ConfigParser(strict=False)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(FILES / name)
    return parser


def kubernetes(kind: str, name: str) -> dict[str, Any]:
    [found] = [
        item for item in KUBERNETES if (item["kind"], item["metadata"]["name"]) == (kind, name)
    ]
    return found  # type: ignore[no-any-return]


def test_every_file_is_named_by_a_page_and_every_named_file_exists() -> None:
    named = set()
    for page in PAGES:
        named |= set(re.findall(r"\(deployment/([\w.-]+)\)", (DOCS / page).read_text()))
    assert named | {"Dockerfile.dockerignore"} == {path.name for path in FILES.iterdir()}


def test_links_between_the_pages_lead_to_headings() -> None:
    for page in PAGES:
        for name, anchor in re.findall(r"\]\(([\w-]+\.md)?#([\w-]+)\)", (DOCS / page).read_text()):
            text = (DOCS / (name or page)).read_text()
            headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("name", sorted(path.name for path in FILES.iterdir()))
def test_every_setting_in_a_file_exists(name: str) -> None:
    used = set(re.findall(r"\bTINKERAPI_[A-Z_]+", (FILES / name).read_text()))
    assert used <= set(VARIABLES)


@pytest.mark.parametrize("name", ["tinkerapi.service", "tinkerapi-worker.service"])
def test_a_unit_lets_the_server_stop_its_parts_in_order(name: str) -> None:
    service = unit(name)["Service"]
    assert service["KillMode"] == "mixed"
    assert service["OOMPolicy"] == "continue"
    assert float(service["TimeoutStopSec"]) > STOP_SECONDS
    command = service["ExecStart"].split()[1:]
    done = subprocess.run(
        [sys.executable, "-m", "tinkerapi", *command, "--help"], check=False, capture_output=True
    )
    assert done.returncode == 0, done.stderr


def test_a_worker_that_differs_is_not_started_again() -> None:
    assert unit("tinkerapi-worker.service")["Service"]["RestartPreventExitStatus"] == str(
        os.EX_CONFIG
    )


def test_the_dockerfile_has_no_fault_that_its_linter_knows() -> None:
    done = subprocess.run(
        [
            str(Path(sys.executable).with_name("hadolint")),
            *("--ignore", "DL3008"),  # versions of Debian's packages: a release has one each
            str(FILES / "Dockerfile"),
        ],
        check=False,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_the_image_is_made_of_everything_that_the_package_needs_and_nothing_else() -> None:
    copied = set(
        re.findall(r"^COPY (?!--from)(.+) /src/", (FILES / "Dockerfile").read_text(), re.M)
    )
    names = {name for line in copied for name in line.split()}
    allowed = re.findall(r"^!(.+)$", (FILES / "Dockerfile.dockerignore").read_text(), re.MULTILINE)
    assert (
        names
        == set(allowed)
        == {
            *("pyproject.toml", "README.md", "LICENSE"),
            *("tinkerapi", "training", "futures", "templates"),
        }
    )


def test_compose_has_the_specifications_keys_and_no_others() -> None:
    own = deepcopy({key: value for key, value in COMPOSE.items() if not key.startswith("x-")})
    PyCompose.from_json(json.dumps(own)).validate()
    own["services"]["server"]["depnds_on"] = {}
    with pytest.raises(Exception, match="depnds_on"):
        PyCompose.from_json(json.dumps(own))


def test_compose_starts_the_image_of_the_dockerfile() -> None:
    assert COMPOSE["services"]["server"]["image"] == COMPOSE["services"]["worker"]["image"]
    for name in ("server", "worker"):
        service = COMPOSE["services"][name]
        context = (FILES / service["build"]["context"]).resolve()
        assert (context / service["build"]["dockerfile"]).samefile(FILES / "Dockerfile")
        assert service["stop_grace_period"] == "3m"
        [volume] = service["volumes"]
        assert volume.split(":")[0] in COMPOSE["volumes"]
        assert f"VOLUME {volume.split(':')[1]}\n" in (FILES / "Dockerfile").read_text()
    assert STOP_SECONDS < 180


@pytest.mark.parametrize(
    "item", KUBERNETES, ids=lambda item: f"{item['kind']}-{item['metadata']['name']}"
)
def test_a_manifest_has_its_kinds_fields_and_no_others(item: dict[str, Any]) -> None:
    kubernetes_validate.validate(item, KUBERNETES_VERSION, strict=True)


@pytest.mark.parametrize(("kind", "name"), [("Deployment", "server"), ("StatefulSet", "worker")])
def test_the_manifests_fit_together(kind: str, name: str) -> None:
    spec = kubernetes(kind, name)["spec"]
    labels = spec["template"]["metadata"]["labels"]
    assert (
        spec["selector"]["matchLabels"] == labels == kubernetes("Service", name)["spec"]["selector"]
    )
    pod = spec["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] > STOP_SECONDS
    [container] = pod["containers"]
    for source in container["envFrom"]:
        [(reference, named)] = source.items()
        kubernetes({"configMapRef": "ConfigMap", "secretRef": "Secret"}[reference], named["name"])
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod["volumes"]
    }
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert kubernetes("ConfigMap", "tinkerapi")["data"]["TINKERAPI_DATA_DIR"] in mounts
    claims = [volume.get("persistentVolumeClaim") for volume in pod["volumes"]]
    kubernetes("PersistentVolumeClaim", next(claim for claim in claims if claim)["claimName"])
    user = f"useradd --uid {pod['securityContext']['runAsUser']} "
    assert user in (FILES / "Dockerfile").read_text()


def test_the_ingress_leads_to_a_port_that_the_server_opens() -> None:
    [rule] = kubernetes("Ingress", "server")["spec"]["rules"]
    [path] = rule["http"]["paths"]
    backend = path["backend"]["service"]
    [port] = kubernetes("Service", backend["name"])["spec"]["ports"]
    assert port["name"] == backend["port"]["name"]
    [container] = kubernetes("Deployment", "server")["spec"]["template"]["spec"]["containers"]
    [opened] = container["ports"]
    assert opened["name"] == port["targetPort"]
    assert str(opened["containerPort"]) == container["args"][container["args"].index("--port") + 1]


def test_a_proxy_waits_longer_and_takes_more_than_the_server() -> None:
    text = (FILES / "nginx.conf").read_text()
    [seconds] = re.findall(r"proxy_read_timeout (\d+)s;", text)
    [gigabytes] = re.findall(r"client_max_body_size (\d+)g;", text)
    annotations = kubernetes("Ingress", "server")["metadata"]["annotations"]
    of_ingress = {name.rpartition("/")[2]: value for name, value in annotations.items()}
    assert int(seconds) == int(of_ingress["proxy-read-timeout"]) > settings.SYNC_TIMEOUT_SECONDS
    assert int(gigabytes) << 30 >= max(settings.MAX_IMPORT_BYTES, settings.MAX_BODY_BYTES)
    assert of_ingress["proxy-body-size"] == f"{gigabytes}g"


def test_the_page_shows_the_caddyfile_that_is_tried() -> None:
    assert f"```\n{(FILES / 'Caddyfile').read_text()}```" in (DOCS / "proxy.md").read_text()


@pytest.mark.parametrize("name", ["slurm-worker.sh"])
def test_a_script_is_one_that_bash_reads(name: str) -> None:
    done = subprocess.run(
        ["/usr/bin/env", "bash", "-n", str(FILES / name)], check=False, capture_output=True
    )
    assert (done.returncode, done.stderr) == (0, b"")


def test_readme_and_operations_lead_to_the_pages() -> None:
    text = README + (DOCS / "operations.md").read_text() + (DOCS / "deployment.md").read_text()
    assert [page for page in PAGES if page not in text] == []
