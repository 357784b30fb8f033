"""What deploy/ says about quire is so: options, ports, routes, times and users. That its files are
well formed is for deploy/lint.py.
"""

import asyncio
import dataclasses
import json
import re
import subprocess
import sys
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from quire.engine.config import EngineConfig
from quire.serving.config import ServeConfig
from quire.serving.http_config import HttpConfig
from quire.serving.shim import app
from quire.serving.shim.engine import Engine, EngineAddress
from quire.serving.shim.http import MAX_BODY_BYTES
from quire.serving.supervisor.supervisor import REFUSED
from starlette.routing import Route, Router

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
FILES = sorted(p for p in DEPLOY.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
FIELDS = [f.name for c in (EngineConfig, ServeConfig, HttpConfig) for f in dataclasses.fields(c)]
HTTP, GRPC = HttpConfig().port, ServeConfig().grpc_port
# From the signal to the end, beyond what open requests get: for the fronts and for the core.
ENDING_S = 10


def read(name: str) -> str:
    return (DEPLOY / name).read_text()


def manifest(name: str) -> Any:
    return yaml.safe_load(read(f"kubernetes/{name}.yaml"))


def pod() -> Any:
    return manifest("cpu/deployment")["spec"]["template"]["spec"]


def unit() -> list[tuple[str, str]]:
    """Keys and values of the systemd unit, a key perhaps several times."""
    lines = [line for line in read("quire.service").splitlines() if line and line[0] not in "#["]
    return [(key, value) for key, _, value in (line.partition("=") for line in lines)]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(DEPLOY)))
def test_deploy_uses_options_that_exist(path: Path) -> None:
    text = path.read_text()
    variables = set(re.findall(r"QUIRE_[A-Z_]+", text))
    assert variables <= {f"QUIRE_{name.upper()}" for name in FIELDS}
    flags = {flag for line in re.findall(r"quire serve\b(.*)", text)
             for flag in re.findall(r"--[a-z-]+", line)}  # fmt: skip
    assert flags <= {f"--{name.replace('_', '-')}" for name in FIELDS}


def test_deploy_gives_containers_no_flags() -> None:
    """Variables are checked above; a list of arguments would need a check of its own."""
    (container,) = pod()["containers"]
    assert not {"args", "command"} & set(container)
    for service in yaml.safe_load(read("compose.yaml"))["services"].values():
        assert not {"command", "entrypoint"} & set(service)
    assert dict(unit())["ExecStart"] == "/opt/quire/bin/quire serve"
    assert 'ENTRYPOINT ["quire", "serve"]' in read("Dockerfile")


def test_deploy_uses_the_default_ports() -> None:
    assert f"EXPOSE {HTTP} {GRPC}\n" in read("Dockerfile")
    for service in yaml.safe_load(read("compose.yaml"))["services"].values():
        assert service["ports"] == [f"127.0.0.1:{port}:{port}" for port in (HTTP, GRPC)]
    upstreams = re.findall(r"upstream (\w+) \{\s+server 127\.0\.0\.1:(\d+);", read("nginx.conf"))
    assert upstreams == [("quire_http", str(HTTP)), ("quire_grpc", str(GRPC))]
    (container,) = pod()["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http": HTTP, "grpc": GRPC}
    served = {port["targetPort"]: port["port"] for port in manifest("cpu/service")["spec"]["ports"]}
    assert served == ports


def test_deploy_asks_for_health_at_routes_that_exist() -> None:
    async def routes() -> set[str]:
        engine = Engine(EngineAddress("unix:/nowhere"))
        router = app.make_app(engine, HttpConfig(), has_key=True)
        assert isinstance(router, Router)
        await engine.close()
        return {route.path for route in router.routes if isinstance(route, Route)}

    (container,) = pod()["containers"]
    probes = {name: container[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness")}
    probes["liveness"] = container["livenessProbe"]["httpGet"]
    assert probes == {
        "startup": {"path": "/ready", "port": "http"},
        "readiness": {"path": "/ready", "port": "http"},
        "liveness": {"path": "/health", "port": "http"},
    }
    assert {"/ready", "/health"} <= asyncio.run(routes())


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1)])
def test_image_is_healthy_when_the_server_says_so(status: int, code: int) -> None:
    class Server(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    found = re.search(r"HEALTHCHECK[^\[]*(\[.*?\])\nENTRYPOINT", read("Dockerfile"), re.DOTALL)
    assert found is not None
    python, *arguments = json.loads(found[1].replace("\\\n", ""))
    assert python == "python"
    with HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert arguments[-1].count(str(HTTP)) == 1
        arguments[-1] = arguments[-1].replace(str(HTTP), str(server.server_port))
        done = subprocess.run([sys.executable, *arguments], timeout=60, check=False)
        server.shutdown()
    assert done.returncode == code


def test_deploy_lets_open_requests_end() -> None:
    least_s = ServeConfig().drain_timeout + ENDING_S
    for service in yaml.safe_load(read("compose.yaml"))["services"].values():
        assert float(service["stop_grace_period"].removesuffix("s")) > least_s
    stop_timeout = re.search(r"--stop-timeout (\d+)", read("README.md"))
    assert stop_timeout is not None
    assert float(stop_timeout[1]) > least_s
    (container,) = pod()["containers"]
    _, waits_s = container["lifecycle"]["preStop"]["exec"]["command"]
    assert pod()["terminationGracePeriodSeconds"] > least_s + float(waits_s)
    options = dict(unit())
    assert float(options["TimeoutStopSec"]) > least_s
    # A signal to every process would end the core under the requests that are to end.
    assert (options["KillSignal"], options["KillMode"]) == ("SIGTERM", "mixed")


def test_unit_does_not_repeat_a_refusal() -> None:
    assert dict(unit())["RestartPreventExitStatus"] == str(REFUSED)


def test_unit_has_sections_comments_and_keys_with_values() -> None:
    section = None
    for line in read("quire.service").splitlines():
        if line.startswith("["):
            section = line
        elif line and not line.startswith("#"):
            assert re.fullmatch(r"[A-Z][A-Za-z]+=.*", line)
            assert section in ("[Unit]", "[Service]", "[Install]")
    assert ("MemoryDenyWriteExecute", "yes") not in unit()  # XLA writes machine code


def test_nginx_takes_the_bodies_and_ids_that_the_server_takes() -> None:
    text = read("nginx.conf")
    assert f"client_max_body_size {MAX_BODY_BYTES >> 20}m;" in text
    assert f'"~^{app._REQUEST_ID.pattern}$" $http_x_request_id;' in text
    assert "proxy_buffering off;" in text


def test_kubernetes_sets_no_variable_of_the_service() -> None:
    """A service named quire makes Kubernetes set QUIRE_PORT=tcp://…, and quire would not start."""
    assert manifest("cpu/service")["metadata"]["name"] == "quire"
    assert pod()["enableServiceLinks"] is False


def test_deploy_runs_as_one_user_without_rights() -> None:
    (user,) = re.findall(r"useradd --uid (\d+)", read("Dockerfile"))
    assert f"USER {user}:{user}\n" in read("Dockerfile")
    context = pod()["securityContext"]
    assert context["runAsNonRoot"] is True
    assert {context[name] for name in ("runAsUser", "runAsGroup", "fsGroup")} == {int(user)}
    (container,) = pod()["containers"]
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert "VOLUME /cache\n" in read("Dockerfile")
    assert mounts == {"/cache", "/tmp"}  # the root is read-only


def test_image_is_built_from_every_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = [name.split(".") for name in project["tool"]["setuptools"]["packages"]]
    needed = {parts[1] for parts in packages if len(parts) > 1}
    needed |= {"pyproject.toml", "__init__.py", project["project"]["readme"]}
    needed |= set(project["project"]["license-files"])
    allowed = re.findall(r"^!(.+)$", read("Dockerfile.dockerignore"), re.MULTILINE)
    assert set(allowed) == needed
    extras = set(project["project"]["optional-dependencies"])
    named = set(re.findall(r"\bcuda\d+\b", read("Dockerfile") + read("compose.yaml")))
    assert named == {"cuda12", "cuda13"} <= extras


def test_image_keeps_what_pip_has_fetched_where_pip_looks() -> None:
    text = read("Dockerfile")
    (kept,) = re.findall(r"--mount=type=cache,target=(\S+)", text)
    assert f"ENV PIP_CACHE_DIR={kept}\n" in text
