"""The scheduler's file: what it may say, how it is refused, how a change comes into force."""

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry

from omni_common.errors import InvalidRequest
from omni_proxy import schedule_config
from omni_proxy.config_watch import ConfigMetrics, ConfigWatcher, Live
from omni_proxy.schedule_config import PolicySettings, ScheduleConfig, SloSettings
from omni_proxy.scheduling.plugins import Parameters, Plugin
from omni_proxy.scheduling.policies.load import RoundRobin

EXAMPLE = Path(__file__).parents[3] / "docs" / "scheduler.example.yaml"


def load(tmp_path: Path, content: Any) -> ScheduleConfig:
    path = tmp_path / "scheduler.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return ScheduleConfig.load(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"policy": {"name": "costt"}}, "policy.name: unknown 'costt'; did you mean 'cost'? known: cost, "),
        ({"policy": {"name": "cost", "parameters": {"x": 1}}}, "policy.parameters: cost has no parameter 'x'; known: "),
        ({"filters": [{"name": "rol"}]}, "filters.0.name: unknown 'rol'; did you mean 'role'? known: "),
        ({"predictor": {"name": "liner"}}, "predictor.name: unknown 'liner'; did you mean 'linear'?"),
        ({"flow": {"order": "edf"}}, "flow.order: unknown 'edf'"),
        ({"flow": {"fairness": "fair"}}, "flow.fairness: unknown 'fair'"),
        ({"flow": {"ttl": 5}}, "flow.ttl: unknown 'ttl'; did you mean 'ttl_s'? known: "),
        ({"flow": {"ttl_s": -5}}, "flow.ttl_s: Input should be greater than 0"),
        ({"flow": {"bands": [{"priority": 0, "name": "a", "hold_back": 1}]}}, "flow.bands.0.hold_back: "),
        ({"flow": {"bands": [{"priority": 0, "name": "a", "ordr": "slo"}]}}, "flow.bands.0.ordr: unknown 'ordr'; did"),
        ({"flow": {"bands": [{"priority": 0, "name": "a"}, {"priority": 0, "name": "b"}]}}, "flow: bands: two"),
        ({"slo": {"ttft": 100}}, "slo.ttft: unknown 'ttft'; did you mean 'ttft_ms'?"),
        ({"tenants": [{"name": "a"}, {"name": "a"}]}, "tenants: two have the same name"),
        ({"tenants": [{"name": "a b"}]}, "tenants.0.name: must be 1 to 64 letters, digits or "),
        ({"tenants": [{"name": "a", "keys": [{"key": "k"}, {"key": "k"}]}]}, "a key is given twice"),
        ({"health": {"ejection": 1}}, "health.ejection: unknown 'ejection'"),
        ({"hedging": {"quantile": 2}}, "hedging.quantile: "),
        ({"policy": "costt"}, "policy.name: unknown 'costt'; did you mean 'cost'?"),
        ({"policy": ["cost"]}, "policy: must be a mapping of name, parameters"),
        ({"filters": "role"}, "filters: must be a list"),
        ({"slo": "fast"}, "slo: must be a mapping of ttft_ms, itl_ms"),
        ({"filters": [{"name": "role", "legs": "all"}]}, "filters.0.legs: Input should be 'both', 'prefill' or"),
        ({"tenants": [{"name": "a", "keys": [{"sha256": "abc"}]}]}, ".0.keys.0.sha256: must be 64 hexadecimal digits"),
        ({"tenants": [{"name": "a", "keys": [{"key_env": "NOT_SET_HERE"}]}]}, "variable NOT_SET_HERE is not set"),
        ({"polcy": {}}, "polcy: unknown 'polcy'; did you mean 'policy'?"),
        ("- a\n- b", "must hold a mapping"),
        ("policy: {", "is not YAML"),
        ("tenants: [{name: a}]\nslo: {}\ntenants: [{name: b}]", "'tenants' is given twice"),
        ("flow: {ttl_s: 1, ttl_s: 2}", "'ttl_s' is given twice"),
        ("tenants: [{name: a, tokens_per_day: .inf}]", "tenants.0.tokens_per_day: Input should be a finite number"),
        ("tenants: [{name: a, weight: .nan}]", "tenants.0.weight: Input should be "),
    ],
)  # fmt: skip
def test_a_wrong_file_says_where_and_why(tmp_path, content, message):
    with pytest.raises(InvalidRequest) as refused:
        load(tmp_path, content)
    assert message in refused.value.message and "scheduler.yaml" in refused.value.message


def test_a_plug_in_without_parameters_may_be_its_name_alone(tmp_path):
    config = load(tmp_path, "policy: round_robin\npredictor: prior\nfilters: [lora]")
    assert isinstance(ScheduleConfig(policy=config.policy).make_policy(), RoundRobin)
    assert config.predictor.name == "prior" and [f.name for f in config.filters] == ["lora"]


def test_a_parameter_that_a_plug_in_has_to_be_given_is_asked_for(tmp_path, monkeypatch):
    class Needs(Parameters):
        endpoint: str

    monkeypatch.setattr(PolicySettings, "known", lambda: {"needs": Plugin(Needs, lambda given: RoundRobin(given))})
    for content in ("policy: needs", {"policy": {"name": "needs"}}):
        with pytest.raises(InvalidRequest, match=r"policy\.parameters: parameter 'endpoint' of needs: Field required"):
            load(tmp_path, content)


def test_a_plug_in_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(PolicySettings, "known", lambda: {"broken": Plugin(Parameters, lambda given: 1 / 0)})
    with pytest.raises(InvalidRequest, match=r"policy\.parameters: broken cannot be made: ZeroDivisionError: "):
        load(tmp_path, "policy: broken")


def test_what_is_merged_into_a_mapping_may_be_said_otherwise_there(tmp_path):
    config = load(tmp_path, "tenants:\n- &one {name: a, weight: 2, max_inflight: 3}\n- {<<: *one, name: b, weight: 4}")
    assert [(t.name, t.weight, t.max_inflight) for t in config.tenants] == [("a", 2, 3), ("b", 4, 3)]


def test_a_digest_may_be_in_capitals(tmp_path):
    one, other = (load(tmp_path, {"tenants": [{"name": "a", "keys": [{"sha256": d * 32}]}]}) for d in ("ab", "AB"))
    assert one.tenants[0].keys[0].digest == other.tenants[0].keys[0].digest


def test_every_mistake_is_told_at_once(tmp_path):
    with pytest.raises(InvalidRequest) as refused:
        load(tmp_path, {"flow": {"ttl_s": 0, "order": "x"}, "slo": {"itl_ms": 0}})
    assert len(refused.value.message.splitlines()) == 3


def test_a_secret_is_in_no_message_and_no_page(tmp_path, monkeypatch):
    monkeypatch.setenv("A_KEY", "env-secret")
    with pytest.raises(InvalidRequest) as refused:
        load(tmp_path, {"tenants": [{"name": "a", "keys": [{"key": "top-secret", "extra": 1}]}]})
    assert "top-secret" not in refused.value.message
    keys = [{"key": "top-secret"}, {"key_env": "A_KEY"}, {"sha256": "ab" * 32}]
    config = load(tmp_path, {"tenants": [{"name": "a", "keys": keys}]})
    shown = json.dumps(config.effective)
    assert config.effective["tenants"][0]["keys"] == [{"key": "..."}, {"key_env": "A_KEY"}, {"sha256": "abababab..."}]
    assert "secret" not in shown and "ab" * 32 not in shown


def test_the_digest_follows_the_values_and_the_keys(tmp_path, monkeypatch):
    def digest(key: str) -> str:
        return load(tmp_path, {"tenants": [{"name": "a", "keys": [{"key": key}]}]}).digest

    assert digest("one") == digest("one") != digest("two")


def test_an_empty_file_is_the_defaults(tmp_path):
    config = load(tmp_path, "")
    assert config == ScheduleConfig() and config.policy.name == "cost"


def test_sections_a_file_does_not_have_are_those_of_the_proxys_settings():
    base = ScheduleConfig(policy=PolicySettings(name="round_robin"), slo=SloSettings(ttft_ms=5))
    config = ScheduleConfig.parse(b"slo: {itl_ms: 7}", base)
    assert config.slo == SloSettings(itl_ms=7)
    assert isinstance(config.make_policy(), RoundRobin)


def test_the_example_says_every_default_and_is_valid(monkeypatch):
    monkeypatch.setenv("GOLD_API_KEY", "k")
    config = ScheduleConfig.load(EXAMPLE)
    defaults = ScheduleConfig()
    assert config.flow == defaults.flow and config.hedging == defaults.hedging
    written = yaml.safe_load(EXAMPLE.read_text())
    assert set(written) == set(ScheduleConfig.model_fields)
    for section in ("flow", "hedging", "slo"):
        assert set(written[section]) == set(type(getattr(config, section)).model_fields)
    assert config.make_policy()


def test_checking_a_file_prints_what_holds(tmp_path, monkeypatch, capsys):
    path = tmp_path / "s.yaml"
    path.write_text("flow: {ttl_s: 7}")
    monkeypatch.setattr("sys.argv", ["check", str(path)])
    schedule_config.main()
    assert json.loads(capsys.readouterr().out)["effective"]["flow"]["ttl_s"] == 7
    path.write_text("flow: {ttl_s: x}")
    with pytest.raises(SystemExit, match=r"flow\.ttl_s"):
        schedule_config.main()


def test_a_variable_that_only_the_proxys_machine_has_is_a_note(tmp_path, monkeypatch, capsys):
    path = tmp_path / "s.yaml"
    path.write_text("tenants: [{name: a, keys: [{key_env: ONE_KEY}]}, {name: b, keys: [{key_env: OTHER_KEY}]}]")
    monkeypatch.setattr("sys.argv", ["check", str(path)])
    monkeypatch.setenv("OTHER_KEY", "k")
    schedule_config.main()
    told = capsys.readouterr()
    assert json.loads(told.out)["digest"] is None
    assert told.err.startswith("note: ONE_KEY ") and "OTHER_KEY" not in told.err
    monkeypatch.delenv("OTHER_KEY")
    schedule_config.main()
    assert capsys.readouterr().err.count("note: ") == 2
    for missing in ("ONE_KEY", "OTHER_KEY"):
        with pytest.raises(InvalidRequest, match=missing):
            ScheduleConfig.load(path)


class Watched:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.write("flow: {ttl_s: 1}")
        self.registry = CollectorRegistry()
        self.live = Live(ScheduleConfig.load(path))
        self.seen: list[float] = []
        self.live.subscribe(lambda config: self.seen.append(config.flow.ttl_s))
        metrics = ConfigMetrics(self.registry)
        self.watcher = ConfigWatcher(path, ScheduleConfig(), self.live, metrics)
        self.stamp = 10**18

    def write(self, text: str) -> None:
        self.path.write_text(text)

    async def check(self, text: str | None = None) -> None:
        if text is not None:
            self.write(text)
            self.stamp += 10**9
            os.utime(self.path, ns=(self.stamp, self.stamp))
            await self.watcher.check()
        await self.watcher.check()

    def reloads(self, result: str) -> float:
        return self.registry.get_sample_value("omni_proxy_config_reloads_total", {"result": result}) or 0.0


@pytest.fixture
def watched(tmp_path: Path) -> Watched:
    return Watched(tmp_path / "s.yaml")


async def test_a_change_comes_into_force_once(watched):
    await watched.check()
    await watched.check("flow: {ttl_s: 2}")
    await watched.check()
    await watched.check("flow: {ttl_s: 2}")
    assert watched.seen == [2] and watched.live.value.flow.ttl_s == 2
    digest = watched.live.value.digest
    assert watched.registry.get_sample_value("omni_proxy_config_info", {"digest": digest}) == 1


async def test_another_predictor_waits_for_a_restart_and_is_not_shown_as_in_force(watched, caplog):
    await watched.check("flow: {ttl_s: 2}\npredictor: prior")
    assert watched.live.value.flow.ttl_s == 2 and watched.live.value.predictor.name == "linear"
    assert any("predictor" in record.message for record in caplog.records)


async def test_an_invalid_file_changes_nothing_until_it_is_right(watched, caplog):
    await watched.check("flow: {ttl_s: no}")
    await watched.check()
    assert watched.seen == [] and watched.reloads("invalid") == 1
    assert any("not valid" in record.message for record in caplog.records)
    await watched.check("flow: {ttl_s: 3}")
    assert watched.seen == [3] and watched.reloads("applied") == 1


async def test_a_value_that_a_subscriber_refuses_is_not_in_force(watched, caplog):
    def refuse(config: ScheduleConfig) -> None:
        raise RuntimeError("a plug-in that cannot be built")

    watched.live.subscribe(refuse)
    await watched.check("flow: {ttl_s: 2}")
    assert watched.live.value.flow.ttl_s == 1 and watched.reloads("failed") == 1


async def test_who_heard_of_a_refused_value_hears_of_the_former_again(watched):
    """Else parts would stay in force of a file that is not, and writing the former one back would not help."""

    def refuse(config: ScheduleConfig) -> None:
        if config.flow.ttl_s == 2:
            raise RuntimeError("a plug-in that cannot be built")

    watched.live.subscribe(refuse)
    watched.live.subscribe(lambda config: watched.seen.append(-config.flow.ttl_s))
    await watched.check("flow: {ttl_s: 2}")
    assert watched.seen == [2, 1]


async def test_a_file_that_is_away_for_a_moment_is_waited_for(watched):
    watched.path.unlink()
    await watched.check()
    await watched.check("flow: {ttl_s: 4}")
    assert watched.seen == [4]


async def test_the_watcher_looks_again_and_again(watched):
    naps = 0

    async def sleep(seconds: float) -> None:
        nonlocal naps
        naps += 1
        if naps % 2:
            watched.write(f"flow: {{ttl_s: {naps + 1}0}}")
        if naps == 5:
            raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await watched.watcher.run(sleep)
    assert watched.seen == [20, 40]


async def test_a_file_that_is_being_written_is_not_in_force_until_it_stays_as_it_is(watched):
    """What has been written of it may do without the tenants and their keys."""
    for part in ("", "flow: {ttl_s: 7}", "flow: {ttl_s: 7}\nslo: {ttft_ms: 5}"):
        watched.write(part)
        await watched.watcher.check()
        assert watched.seen == []
    await watched.watcher.check()
    assert watched.seen == [7] and watched.live.value.slo.ttft_ms == 5


async def test_a_file_that_is_written_again_and_again_alike_is_in_force(watched):
    for stamp in range(3):
        watched.write("flow: {ttl_s: 7}")
        os.utime(watched.path, ns=(stamp, stamp))
        await watched.watcher.check()
    assert watched.seen == [7]
