"""The Compose files and Dockerfiles, read without a container engine."""

import importlib
import itertools
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
OURS = ("proxy", "prefill", "decode", "kvstore", "placement")
OVERRIDES = ("docker-compose.local.yml", "docker-compose.ascend.yml", "docker-compose.nvidia.yml")
PROFILES = {
    "sim": {"prefill-sim", "decode-sim"},
    "observability": {"otel-collector", "jaeger", "prometheus", "grafana"},
}


def substituted(text: str) -> str:
    """`${NAME:-default}` as its default, `${NAME:?message}` as its name; what Compose does with nothing set."""
    text = re.sub(r"\$\{(\w+):\?[^}]*\}", r"\1", text)
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


def read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(substituted((ROOT / name).read_text()))
    return content


BASE = read("docker-compose.yml")
SERVICES: dict[str, dict[str, Any]] = BASE["services"]


def environment_of(files: tuple[str, ...], service: str) -> dict[str, str]:
    merged: dict[str, str] = {}
    for content in map(read, files):
        merged |= content["services"].get(service, {}).get("environment", {})
    return {name: str(value) for name, value in merged.items()}


def image_environment(service: str) -> dict[str, str]:
    """What the Dockerfile's last stage sets."""
    last = (ROOT / "services" / service / "Dockerfile").read_text().rsplit("\nFROM ", 1)[1]
    return dict(re.findall(r"(OMNI_\w+)=(\S+)", last))


def ours(service: str) -> str:
    return service.removesuffix("-sim")


@pytest.mark.parametrize("name", ("docker-compose.yml", *OVERRIDES))
def test_files_are_readable_to_both_generations_of_compose(name: str) -> None:
    """1.29 knows no top-level name, nested defaults or merge tags; without `version` it reads the same format as v2."""
    text = (ROOT / name).read_text()
    assert not re.search(r"^(name|version|include|configs):", text, re.MULTILINE)
    assert "!reset" not in text and "!override" not in text
    assert not re.search(r"\$\{[^}]*\$\{", text)
    assert set(read(name)["services"]) <= set(SERVICES)


@pytest.mark.parametrize("service", SERVICES)
def test_service_is_confined_and_watched(service: str) -> None:
    described = SERVICES[service]
    assert described["healthcheck"]["test"]
    assert described["cap_drop"] == ["ALL"]
    assert described["read_only"] is True
    assert described["init"] is True
    assert "no-new-privileges:true" in described["security_opt"]
    assert not any(key in described for key in ("privileged", "pid", "ipc", "network_mode", "cap_add"))
    if "build" not in described:
        assert described["user"].split(":")[0] not in ("0", "root")


@pytest.mark.parametrize("name", OVERRIDES)
def test_overrides_grant_no_privileges(name: str) -> None:
    for described in read(name)["services"].values():
        assert not any(key in described for key in ("privileged", "cap_add", "network_mode", "pid", "user"))


@pytest.mark.parametrize("profile", PROFILES)
def test_profile_has_its_services(profile: str) -> None:
    assert {name for name, s in SERVICES.items() if profile in s.get("profiles", ())} == PROFILES[profile]


def test_default_start_is_the_five_services_and_redis() -> None:
    assert {name for name, s in SERVICES.items() if "profiles" not in s} == {"redis", *OURS}


def test_start_order_waits_for_health() -> None:
    for service in ("kvstore", "prefill", "decode", "proxy"):
        conditions = SERVICES[service]["depends_on"].values()
        assert all(c["condition"] == "service_healthy" for c in conditions), service


def test_only_the_proxy_and_local_tools_are_published() -> None:
    published = {name: s["ports"] for name, s in SERVICES.items() if "ports" in s}
    assert published.pop("proxy") == ["8000:8000"]
    assert all(port.startswith("127.0.0.1:") for ports in published.values() for port in ports)


@pytest.mark.parametrize(
    ("service", "files"),
    [
        *(((s), ("docker-compose.yml",)) for s in (*OURS, *sorted(PROFILES["sim"]))),
        *((s, ("docker-compose.yml", f)) for s, f in itertools.product(("prefill", "decode"), OVERRIDES[1:])),
    ],
    ids=lambda value: value if isinstance(value, str) else value[-1],
)
def test_settings_accept_the_environment(service: str, files: tuple[str, ...]) -> None:
    """Unknown OMNI_* names are refused by the services, so a misspelt one would keep a container from starting."""
    environ = image_environment(ours(service)) | environment_of(files, service)
    settings = importlib.import_module(f"omni_{ours(service)}.settings").Settings.load(environ)
    assert settings.host == "0.0.0.0"
    assert settings.metrics_port == 9090
    assert settings.port == (8000 if service == "proxy" else 50051)


@pytest.mark.parametrize("service", OURS)
def test_dockerfile(service: str) -> None:
    text = (ROOT / "services" / service / "Dockerfile").read_text()
    last = text.rsplit("\nFROM ", 1)[1]
    assert text.count("FROM ${BASE_IMAGE}") >= 2
    assert "ARG BASE_IMAGE=python:3.11-slim" in text
    assert "\nUSER omni\n" in last
    assert f'ENTRYPOINT ["python", "-m", "omni_{service}"]' in last
    assert f'"/app/health.py", "{service}"]' in last
    assert "-c constraints.txt" in text


@pytest.mark.parametrize("path", [*ROOT.glob("services/*/Dockerfile"), *ROOT.glob("deploy/*"), ROOT / ".dockerignore"])
def test_no_index_addresses_in_files(path: Path) -> None:
    if path.is_file():
        assert not re.search(r"https?://(?!127\.0\.0\.1)", path.read_text())


def test_prefill_and_decode_share_their_layers() -> None:
    prefill, decode = ((ROOT / "services" / s / "Dockerfile").read_text() for s in ("prefill", "decode"))
    assert (
        prefill.split("FROM engine AS packages")[0].splitlines()[1:]
        == (decode.split("FROM engine AS packages")[0].splitlines()[1:])
    )
    assert prefill.replace("prefill", "decode").replace("PREFILL", "DECODE").splitlines()[2:] == decode.splitlines()[2:]


def test_build_context_holds_what_dockerfiles_copy() -> None:
    """Everything is ignored but what .dockerignore lets in again; a COPY of something else would fail the build."""
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for dockerfile in ROOT.glob("services/*/Dockerfile"):
        for sources in re.findall(r"^COPY (?!--from)(.+) \S+$", dockerfile.read_text(), re.MULTILINE):
            for source in sources.split():
                assert any(Path(source.replace("wheel[s]", "wheels")).match(p) for p in let_in) or (
                    source.split("/")[0] in let_in
                ), f"{dockerfile}: {source}"
                assert source == "wheel[s]" or (ROOT / source).exists(), f"{dockerfile}: {source}"


def test_engine_images_install_what_our_packages_declare() -> None:
    """Whatever the engine: a base image may bring versions that our packages refuse. The services add nothing to what
    the libraries declare, so that their images share the layer."""
    kinds = dict(
        re.findall(r"^(\w+)\)\n(.*?);;", (ROOT / "deploy/install_engine.sh").read_text(), re.MULTILINE | re.DOTALL)
    )
    assert {kind for kind, steps in kinds.items() if "-r ours.txt" in steps} == {"cpu", "cuda", "provided", "sim"}
    listing = [sys.executable, "deploy/dependencies.py", "services/prefill", "services/decode"]
    assert subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip() == ""


def test_mounted_files_exist() -> None:
    for service, described in SERVICES.items():
        for volume in described.get("volumes", ()):
            source = volume["source"] if isinstance(volume, dict) else volume.split(":")[0]
            if source.startswith("./"):
                assert (ROOT / source).exists(), f"{service}: {source}"
