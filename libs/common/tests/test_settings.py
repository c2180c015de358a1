from pathlib import Path
from typing import ClassVar

import pytest
from pydantic import BaseModel, ConfigDict

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
        pytest.param({"OMNI_PROXY_PART__SIZ": "1"}, ["OMNI_PROXY_PART__SIZ"], id="misspelt part"),
        pytest.param({"OMNI_PROXY_PORT__X": "1"}, ["has no parts"], id="part of a plain field"),
        pytest.param({"OMNI_PROXY_PORT": "many"}, ["port"], id="wrong type"),
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
    with pytest.raises(InvalidRequest, match="prot"):
        ProxySettings.load({"OMNI_PROXY_CONFIG": str(file)})


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        ProxySettings.load({}).port = 1  # type: ignore[misc]
