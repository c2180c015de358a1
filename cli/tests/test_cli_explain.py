"""`omni explain` on pages as a proxy serves them."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from typer.testing import CliRunner

from omni_cli.main import app

DECISION = {
    "policy": "cost", "prefill": "p1", "decode": "d0", "reason": "disaggregated", "uncached_tokens": 512,
    "predicted": {
        "ttft_ms": 43.25, "queue_ms": 3.0, "prefill_ms": 40.25, "transfer_ms": 2.5, "step_ms": 15.0, "confidence": 0.9,
    },
    "candidates": {
        "prefill": [
            {"worker": "p1", "cost": 43.25, "queue_ms": 3.0, "prefill_ms": 40.25},
            {"worker": "p0", "cost": 99.5, "queue_ms": 59.25, "prefill_ms": 40.25},
        ],
        "alone": [{"worker": "d0", "cost": None, "stall_ms": 300.0}, {"worker": "d1", "cost": 1000000017.0}],
    },
}  # fmt: skip
CONTINUED = DECISION | {"prefill": None, "decode": "d1", "reason": "continued", "candidates": {}}
HEAD = {
    "request_id": "r/1 ?", "arrived": "2026-01-02T03:04:05.678+00:00", "tenant": "team", "priority": 1, "status": 200,
    "error": None,
}  # fmt: skip
ONE = HEAD | {
    "seen": {"ttft_ms": 47.5, "e2e_ms": 1250.0},
    "sequences": [
        {
            "decisions": [DECISION, CONTINUED],
            "seen": {
                "held_ms": 0.25,
                "queue_ms": 1.5,
                "prefill_ms": 44.5,
                "ttft_ms": 47.25,
                "first_token_ms": 47.5,
                "retries": 1,
                "resumes": 2,
            },
        }
    ],
}
LATEST = {
    "decisions": [
        HEAD | {"num_sequences": 1, "num_decisions": 2, "decision": DECISION, "seen": {"ttft_ms": 47.5}},
        HEAD | {"request_id": "r2", "status": None, "decision": None, "seen": {}},
        HEAD | {"request_id": "r3", "status": 503, "error": "UNAVAILABLE", "decision": None, "seen": {}},
        HEAD
        | {"request_id": "r4", "status": 429, "error": "RESOURCE_EXHAUSTED", "reason": "queue_ttl"}
        | {"decision": None, "seen": {}},
    ]
}


@pytest.fixture
def proxy() -> Iterator[Any]:
    asked: list[str] = []

    class Pages(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            if self.path.startswith("/decisions?"):
                self._answer(200, LATEST)
            elif self.path.startswith("/decisions/r%2F1%20%3F?"):
                self._answer(200, ONE)
            else:
                self._answer(404, {"error": {"message": "no decision is known of the request 'old'"}})

        def _answer(self, status: int, content: object) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    server.asked = asked  # type: ignore[attr-defined]
    yield server
    server.shutdown()
    server.server_close()


def _explain(proxy: Any, *arguments: str) -> Any:
    url = f"http://127.0.0.1:{proxy.server_address[1]}"
    return CliRunner().invoke(app, ["explain", *arguments, "--url", url])


def _rows(output: str) -> list[list[str]]:
    return [line.split() for line in output.splitlines()]


def test_a_request_shows_choice_candidates_and_predictions(proxy: Any) -> None:
    result = _explain(proxy, "r/1 ?", "--limit", "5")
    assert result.exit_code == 0, result.output
    rows = _rows(result.output)
    assert "r/1 ? 200 after 1250 ms, arrived 03:04:05.678, tenant team, priority 1" in result.output
    assert "1. prefill on p1, decode on d0: disaggregated (cost, 512 uncached tokens)" in result.output
    assert "2. d1 alone: continued" in result.output
    assert ["*", "p1", "43.2", "3", "40.2"] in rows and ["p0", "99.5", "59.2", "40.2"] in rows
    assert ["d0", "-", "300"] in rows and ["d1", "1e+09", "-"] in rows
    assert (
        ["queue", "3", "1.5"] in rows
        and ["to", "first", "token", "43.2", "47.2"] in rows
        and ["since", "arrival", "-", "47.5"] in rows
    )
    assert ["hold", "-", "0.2"] in rows and ["step", "15", "-"] in rows
    assert "confidence 90%" in result.output and "retries 1, resumes 2" in result.output
    assert proxy.asked == ["/decisions/r%2F1%20%3F?limit=5"]


def test_of_a_hedged_request_the_prediction_is_that_of_the_worker_that_answered(
    proxy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    hedge = DECISION | {"prefill": "p0", "predicted": DECISION["predicted"] | {"queue_ms": 777.0}}
    seen = {"queue_ms": 1.5, "prefill_worker": "p1", "hedged": True, "retries": 0, "first_token_source": "prefill"}
    monkeypatch.setitem(ONE, "sequences", [{"decisions": [DECISION, hedge, CONTINUED], "seen": seen}])
    output = _explain(proxy, "r/1 ?").output
    assert ["queue", "3", "1.5"] in _rows(output)
    assert "retries 0, hedged, p1 answered first, first token: prefill" in output


def test_without_a_request_the_latest_are_listed(proxy: Any) -> None:
    rows = _rows(_explain(proxy).output)
    assert rows[1] == ["r/1", "?", "03:04:05.678", "200", "p1", "d0", "disaggregated", "43.2", "47.5"]
    assert rows[2][:3] == ["r2", "03:04:05.678", "running"]
    assert rows[3][2:4] == ["503", "UNAVAILABLE"] and rows[4][2:4] == ["429", "queue_ttl"]
    assert proxy.asked == ["/decisions?limit=10"]


def test_the_list_names_adapters_where_some_request_does(proxy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first, *rest = LATEST["decisions"]
    monkeypatch.setitem(LATEST, "decisions", [first | {"adapter": "poet"}, *rest])
    rows = _rows(_explain(proxy).output)
    assert rows[0][3] == "adapter"
    assert rows[1][3:7] == ["200", "poet", "p1", "d0"] and rows[2][4] == "-"


@pytest.mark.parametrize(("arguments", "page"), [(("r/1 ?",), ONE), ((), LATEST)])
def test_json_is_the_page(proxy: Any, arguments: tuple[str, ...], page: object) -> None:
    assert json.loads(_explain(proxy, *arguments, "--json").output) == page


def test_an_unknown_request_is_one_line(proxy: Any) -> None:
    result = _explain(proxy, "old")
    assert result.exit_code != 0 and "no decision is known" in str(result.exception)
