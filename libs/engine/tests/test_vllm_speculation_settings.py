"""What speculative decoding asks of an engine's start, and what is counted of it. No vLLM is started."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from pydantic import ValidationError

sys.path.insert(0, str(Path(__file__).parent))

from engine_steps import Drafts, Output, Stats, Step

from omni_common.errors import InvalidRequest
from omni_engine import vllm_args
from omni_engine.hosting.metrics import LoadCollector
from omni_engine.ports import SamplingParams
from omni_engine.vllm_args import Role, plan_launch
from omni_engine.vllm_cpu_fixes import FIXES_VARIABLE
from omni_engine.vllm_outputs import RunningSequence, Tracker
from omni_engine.vllm_settings import VllmSettings
from omni_engine.vllm_speculation import check_sampling

LATENT = {"kv_lora_rank": 512, "num_nextn_predict_layers": 1, "n_routed_experts": 16}
DENSE: dict[str, Any] = {"hidden_size": 64}


def model(tmp_path: Path, config: dict[str, Any]) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def drafting(tmp_path: Path, config: dict[str, Any], role: Role, **settings: Any) -> Any:
    plan = plan_launch(VllmSettings(**settings), model(tmp_path, config), "m", role)
    return plan.speculative, plan.arguments.get("speculative_config")


@pytest.mark.parametrize(
    ("config", "asked", "chosen"),
    [
        (LATENT, "mtp:2", "mtp:2"),
        (LATENT, "auto:3", "mtp:3"),
        (DENSE, "auto", "ngram:2"),
        (LATENT, "ngram:4", "ngram:4"),
    ],
)
def test_the_drafter_is_chosen_by_the_model(tmp_path: Path, config: dict[str, Any], asked: str, chosen: str) -> None:
    told, arguments = drafting(tmp_path, config, "decode", speculative=asked)
    assert told == chosen
    assert f"{arguments['method']}:{arguments['num_speculative_tokens']}" == chosen


def test_a_prefill_leg_fills_the_drafters_cache(tmp_path: Path) -> None:
    one = {"method": "mtp", "num_speculative_tokens": 1}
    assert drafting(tmp_path, LATENT, "prefill", speculative="mtp:4")[1] == one
    assert drafting(tmp_path, LATENT, "prefill", speculative="ngram:4")[1] is None
    assert drafting(tmp_path, LATENT, "prefill", speculative="mtp:4", any_role=True)[1] == one | {
        "num_speculative_tokens": 4
    }, "it may become a decode worker"
    assert drafting(tmp_path, LATENT, "decode") == ("", None)


def test_prediction_layers_are_not_made_up(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"no prediction layers.*ngram") as raised:
        drafting(tmp_path, DENSE, "decode", speculative="mtp:2")
    assert raised.value.field == "vllm.speculative"


@pytest.mark.parametrize("value", ["mtp:0", "mtp:17", "eagle:2", "mtp:two", {"method": "mtp", "depth": 2}])
def test_other_settings_are_refused(value: Any) -> None:
    with pytest.raises(ValidationError, match="speculative"):
        VllmSettings(speculative=value)


def test_layouts_and_drafters_exclude_each_other() -> None:
    with pytest.raises(ValidationError, match=r"speculative: expert layouts"):
        VllmSettings(speculative="mtp:2", expert_parallel=True, tensor_parallel_size=2)


@pytest.mark.parametrize("field", [{"min_p": 0.1}, {"logit_bias": {5: 3.0}}])
def test_what_drafts_cannot_obey_is_refused_by_name(field: dict[str, Any]) -> None:
    check_sampling(SamplingParams(max_tokens=4))
    with pytest.raises(InvalidRequest, match="speculative") as raised:
        check_sampling(SamplingParams(max_tokens=4, **field))
    assert raised.value.field == next(iter(field))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """A machine of so many memory nodes and cores."""

    def be(nodes: int, cores: int) -> None:
        monkeypatch.setattr(vllm_args, "has_one_memory_node", lambda: nodes == 1)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))

    return be


@pytest.mark.parametrize(
    ("config", "platform", "nodes", "cores", "fixes"),
    [
        (LATENT, "cpu", 2, 8, "latent_rotary"),
        (LATENT | {"quantization_config": {"format": "int-quantized"}}, "cpu", 2, 8, "latent_rotary,int8_experts"),
        (DENSE, "cpu", 2, 8, None),
        (DENSE, "cpu", 1, 8, "memory_in_place"),
        (DENSE, "cpu", 2, 2, "short_spin"),
        (LATENT, "cuda", 1, 2, None),
    ],
)
def test_cpu_engines_get_the_fixes_their_model_and_machine_need(
    tmp_path: Path,
    machine: Callable[[int, int], None],
    config: dict[str, Any],
    platform: str,
    nodes: int,
    cores: int,
    fixes: str | None,
) -> None:
    machine(nodes, cores)
    plan = plan_launch(VllmSettings(platform=platform), model(tmp_path, config), "m", "decode")  # type: ignore[arg-type]
    assert plan.environment.get(FIXES_VARIABLE) == fixes


def test_drafts_on_cpu_are_sampled_right(tmp_path: Path, machine: Callable[[int, int], None]) -> None:
    machine(2, 8)
    settings = VllmSettings.model_validate({"speculative": "ngram:2"})
    plan = plan_launch(settings, model(tmp_path, DENSE), "m", "decode")
    assert plan.environment[FIXES_VARIABLE] == "draft_sampling"


def drafting_tracker() -> Tracker:
    """Two sequences; the second step took 20 ms and gave them three tokens and one."""
    tracker = Tracker()
    for name in "ab":
        tracker.add(RunningSequence(name, name, 10, 0, 0.0, lambda _: None, expects_pull=False))
    tracker.step(Step(5.0, [Output("a", [1]), Output("b", [1])], Stats(None)))
    tracker.step(Step(5.02, [Output("a", [2, 3, 4]), Output("b", [2])], Stats(Drafts(2, 4, 2, [1, 1]))))
    tracker.step(Step(5.04, [Output("a", [5, 6]), Output("b", [], "abort")], Stats(Drafts(1, 2, 1, [1, 0]))))
    return tracker


def test_a_step_counts_for_the_tokens_it_gives_a_sequence() -> None:
    stats = drafting_tracker().stats(0)
    assert (stats.steps, stats.generated_tokens) == (4, 8)
    assert stats.busy_ms / stats.steps == pytest.approx(10), "a token every ten milliseconds"
    assert (stats.drafts, stats.drafted_tokens, stats.accepted_tokens) == (3, 6, 3)
    assert stats.accepted_by_position == (2, 1)


def test_acceptance_is_on_the_metrics_page() -> None:
    registry = CollectorRegistry()
    tracker = drafting_tracker()
    registry.register(LoadCollector(lambda: tracker.stats(0), lambda: 0))
    page = generate_latest(registry).decode()
    for line in (
        "omni_worker_drafts_total 3.0",
        "omni_worker_drafted_tokens_total 6.0",
        "omni_worker_accepted_tokens_total 3.0",
        'omni_worker_accepted_at_total{position="0"} 2.0',
        'omni_worker_accepted_at_total{position="1"} 1.0',
    ):
        assert line in page
