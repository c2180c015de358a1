import os
from pathlib import Path
from typing import ClassVar

import pytest
from pydantic import BaseModel, ConfigDict

from omni_common.command import settings_of
from omni_common.errors import InvalidRequest
from omni_common.settings import ServiceSettings


class Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    size: int = 1


class ProxySettings(ServiceSettings):
    service: ClassVar[str] = "proxy"
    port: int = 8000
    name: str = "x"
    workers: tuple[str, ...] = ()
    part: Part = Part()


def test_environment_wins_over_file_and_shared_fields_reach_every_service(tmp_path: Path) -> None:
    file = tmp_path / "proxy.yaml"
    file.write_text("port: 1\nname: from-file\npart: {size: 3}\n")
    settings = ProxySettings.load(
        {
            "OMNI_PROXY_CONFIG": str(file),
            "OMNI_PROXY_PORT": "2",
            "OMNI_LOG_LEVEL": "debug",
            "OMNI_PROXY_WORKERS": "[a:1, b:2]",
            "OMNI_KVSTORE_PORT": "77",
            "PATH": "/bin",
        }
    )
    assert (settings.port, settings.name, settings.part.size) == (2, "from-file", 3)
    assert (settings.log_level, settings.workers) == ("debug", ("a:1", "b:2"))


def test_numbers_stay_text_where_the_field_takes_text() -> None:
    assert ProxySettings.load({"OMNI_PROXY_NAME": "007"}).name == "007"


@pytest.mark.parametrize(
    ("environ", "names"),
    [
        pytest.param({"OMNI_PROXY_PROT": "1"}, ["OMNI_PROXY_PROT", "did you mean OMNI_PROXY_PORT"], id="misspelt own"),
        pytest.param({"OMNI_LOGLEVEL": "info"}, ["OMNI_LOGLEVEL", "OMNI_LOG_LEVEL"], id="misspelt shared"),
        pytest.param({"OMNI_PORT": "1"}, ["OMNI_PORT"], id="own field without the service's prefix"),
        pytest.param(
            {"OMNI_PROXY_PART__SIZ": "1"}, ["OMNI_PROXY_PART__SIZ;", "mean OMNI_PROXY_PART__SIZE?"], id="misspelt part"
        ),
        pytest.param({"OMNI_PROXY_PORT__X": "1"}, ["has no parts"], id="part of a plain field"),
        pytest.param({"OMNI_PROXY_PORT": "many"}, ["'port' of proxy", "(OMNI_PROXY_PORT)"], id="wrong type"),
        pytest.param({"OMNI_PROXY_PART__SIZE": "x"}, ["'part.size'", "(OMNI_PROXY_PART__SIZE)"], id="wrong part"),
        pytest.param({"OMNI_TLS__CERT_FILE": __file__}, ["(OMNI_PROXY_TLS__*)", "key_file"], id="half a pair"),
        pytest.param({"OMNI_TLS__CA_FILE": "/does/not/exist"}, ["OMNI_PROXY_TLS__CA_FILE"], id="no such file"),
        pytest.param({"OMNI_TLS__CA_FILE": __file__}, ["OMNI_PROXY_TLS__CA_FILE", "no certificates"], id="no PEM"),
        pytest.param(
            {"OMNI_TLS__CERT_FILE": __file__, "OMNI_TLS__KEY_FILE": __file__},
            ["(OMNI_PROXY_TLS__*)", "no certificate and its key"],
            id="no pair",
        ),
        pytest.param({"OMNI_PROXY_CONFIG": "/does/not/exist"}, ["OMNI_PROXY_CONFIG"], id="missing file"),
    ],
)
def test_refuses(environ: dict[str, str], names: list[str]) -> None:
    with pytest.raises(InvalidRequest) as refused:
        ProxySettings.load(environ)
    for name in names:
        assert name in str(refused.value)


def test_refuses_unknown_keys_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "proxy.yaml"
    file.write_text("prot: 1\n")
    with pytest.raises(InvalidRequest, match="unknown setting 'prot' of proxy"):
        ProxySettings.load({"OMNI_PROXY_CONFIG": str(file)})


def test_help_lists_every_setting_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        settings_of(ProxySettings, ["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert ended.value.code == 0
    for line in ("OMNI_PROXY_PORT=8000", "OMNI_PROXY_PART__SIZE=1", "OMNI_LOG_LEVEL=info", "OMNI_TLS__CA_FILE"):
        assert f"  {line}" in lines


def test_wrong_settings_and_arguments_end_a_service_with_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("OMNI_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OMNI_PROXY_PORT", "many")
    for arguments, named in ((["serve"], "'serve'"), ([], "OMNI_PROXY_PORT")):
        with pytest.raises(SystemExit) as ended:
            settings_of(ProxySettings, arguments)
        said = capsys.readouterr().err
        assert ended.value.code == 2 and said.startswith("omni-proxy: ") and named in said and said.count("\n") == 1


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        ProxySettings.load({}).port = 1  # type: ignore[misc]
