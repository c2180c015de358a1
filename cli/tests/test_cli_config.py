"""`omni config` on files and on a proxy's page."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from omni_cli import config_commands
from omni_cli.config_commands import InvalidConfig
from omni_cli.main import app

KEY = "sk-of-the-test"
EXAMPLE = Path(__file__).parents[2] / "docs" / "scheduler.example.yaml"


def test_a_valid_file_is_printed_as_it_would_hold(tmp_path: Path):
    file = tmp_path / "s.yaml"
    file.write_text("flow: {ttl_s: 7}")
    result = CliRunner().invoke(app, ["config", "check", str(file)])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["effective"]["flow"]["ttl_s"] == 7
    assert CliRunner().invoke(app, ["config", "check", "-q", str(file)]).stdout == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [("policy: {name: costt}", "did you mean 'cost'"), ("flow: {ttl_s: 0}", "flow.ttl_s"), (None, "No such file")],
)
def test_mistakes_are_named(tmp_path: Path, content: str | None, message: str):
    file = tmp_path / "s.yaml"
    if content is not None:
        file.write_text(content)
    failed = CliRunner().invoke(app, ["config", "check", str(file)]).exception
    assert isinstance(failed, InvalidConfig) and message in str(failed) and "Traceback" not in str(failed)


def test_a_plug_in_that_cannot_be_imported_is_named_with_its_distribution(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    info = tmp_path / "broken-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[omni_proxy.policies]\nbroken = missing_module:POLICY\n")
    file = tmp_path / "s.yaml"
    file.write_text("policy: broken")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    failed = CliRunner().invoke(app, ["config", "check", str(file)]).exception
    assert isinstance(failed, InvalidConfig) and "the distribution broken offers 'broken'" in str(failed)


def test_without_the_proxy_beside_it_no_file_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(config_commands, "CHECKER", "no_such_proxy.schedule_config")
    failed = CliRunner().invoke(app, ["config", "check", str(tmp_path / "s.yaml")]).exception
    assert "not installed beside" in str(failed)


def test_the_example_of_the_docs_is_valid_where_its_key_is_not_set(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("GOLD_API_KEY", raising=False)
    result = CliRunner().invoke(app, ["config", "check", str(EXAMPLE)])
    assert result.exit_code == 0 and json.loads(result.stdout)["effective"]["tenants"][0]["name"] == "gold"
    assert "note: GOLD_API_KEY" in result.stderr
    assert CliRunner().invoke(app, ["config", "check", "-q", str(EXAMPLE)]).output == ""


@pytest.fixture
def proxy() -> Iterator[str]:
    """Shows its configuration to who has the key."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            is_known = self.headers.get("authorization") == f"Bearer {KEY}"
            content = {"digest": "d1"} if is_known else {"error": {"message": "this API key is not known here"}}
            self.send_response(200 if is_known else 401)
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        def log_message(self, *args: object) -> None:
            """Not in the test's output."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_what_is_in_force_is_shown_to_who_has_the_key(proxy: str, monkeypatch: pytest.MonkeyPatch):
    refused = CliRunner().invoke(app, ["config", "show", "--url", proxy])
    assert "not known here" in str(refused.exception)
    monkeypatch.setenv("OMNI_CLI_API_KEY", KEY)
    assert json.loads(CliRunner().invoke(app, ["config", "show", "--url", proxy]).stdout) == {"digest": "d1"}
