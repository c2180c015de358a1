"""The plan: ports, cores, memory and settings of every process, from values alone."""

from itertools import count
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omni_cli.errors import InvalidOptions, NotEnoughMemory
from omni_cli.plan import GIB, Machine, Probe, StackOptions, plan_stack, split_cores

EXPERT_RANKS = {"expert_ranks": 2, "spare_experts": 4}
BIG = Machine(tuple(range(8)), 64 * GIB)


def options(**changes: object) -> StackOptions:
    base = {"name": "p8000", "directory": Path("/run/p8000"), "model_dir": Path("/models/tiny-moe")}
    return StackOptions(**(base | changes))  # type: ignore[arg-type]


def plan(machine: Machine = BIG, **changes: object):  # type: ignore[no-untyped-def]
    return plan_stack(options(**changes), machine, iter(count(21_000)))


def variables(name: str, **changes: object) -> dict[str, str]:
    return dict(next(spec for spec in plan(**changes).specs if spec.name == name).environment)


def test_default_stack_is_the_five_services_in_order():
    planned = plan()
    assert [spec.name for spec in planned.specs] == ["kvstore", "placement", "prefill-0", "decode-0", "proxy"]
    assert [spec.module for spec in planned.specs][-1] == "omni_proxy"
    assert planned.url == "http://127.0.0.1:8000"
    assert planned.workers == 2
    assert planned.specs[-1].probe is Probe.HTTP_READY


@pytest.mark.parametrize(
    ("changes", "process", "variable", "value"),
    [
        pytest.param({"port": 8100}, "proxy", "OMNI_PROXY_PORT", "8100", id="port"),
        pytest.param({"host": "0.0.0.0"}, "proxy", "OMNI_PROXY_HOST", "0.0.0.0", id="proxy host"),
        pytest.param({"host": "0.0.0.0"}, "kvstore", "OMNI_KVSTORE_HOST", "127.0.0.1", id="others stay local"),
        pytest.param({"redis_url": "redis://r"}, "kvstore", "OMNI_KVSTORE_REDIS_URL", "redis://r", id="redis"),
        pytest.param({}, "kvstore", "OMNI_KVSTORE_EMBEDDED_REDIS_DIR", "/run/p8000/redis", id="embedded redis"),
        pytest.param({}, "placement", "OMNI_PLACEMENT_STATE_DIR", "/run/p8000/placement", id="layouts"),
        pytest.param({"decode": 3}, "decode-2", "OMNI_DECODE_WORKER_ID", "p8000-decode-2", id="worker id"),
        pytest.param({"engine": "sim"}, "prefill-0", "OMNI_PREFILL_ENGINE", "sim", id="engine"),
        pytest.param({"both": 1}, "both-0", "OMNI_DECODE_ROLE", "both", id="both legs"),
        pytest.param({"both": 2}, "both-1", "OMNI_DECODE_WORKER_ID", "p8000-both-1", id="worker id of both"),
        pytest.param({"kv_cache_gib": 0.5}, "decode-0", "OMNI_DECODE_VLLM__KV_CACHE_GIB", "0.5", id="kv cache"),
        pytest.param({"kernels": "omni"}, "prefill-0", "OMNI_PREFILL_VLLM__KERNELS", "omni", id="kernels"),
        pytest.param({"max_model_len": 512}, "decode-0", "OMNI_DECODE_VLLM__MAX_MODEL_LEN", "512", id="length"),
        pytest.param(
            {"max_model_len": 512, "engine": "sim"},
            "decode-0",
            "OMNI_DECODE_SIM__MAX_MODEL_LEN",
            "512",
            id="sim length",
        ),
        pytest.param(
            {"attention_pattern": Path("/p.json")},
            "prefill-0",
            "OMNI_PREFILL_VLLM__ATTENTION_PATTERN",
            "/p.json",
            id="attention pattern",
        ),
        pytest.param(EXPERT_RANKS, "decode-0", "OMNI_DECODE_VLLM__EXPERT_PARALLEL", "true", id="expert parallelism"),
        pytest.param(EXPERT_RANKS, "decode-0", "OMNI_DECODE_VLLM__TENSOR_PARALLEL_SIZE", "2", id="ranks"),
        pytest.param(EXPERT_RANKS, "prefill-0", "OMNI_PREFILL_VLLM__REDUNDANT_EXPERTS", "4", id="spare slots"),
        pytest.param(EXPERT_RANKS, "decode-0", "OMNI_DECODE_VLLM__CORES", "3|4", id="cores by rank"),
        pytest.param(
            {**EXPERT_RANKS, "engine": "sim"}, "decode-0", "OMNI_DECODE_SIM__EXPERTS__NUM_RANKS", "2", id="sim ranks"
        ),
        pytest.param(
            {**EXPERT_RANKS, "engine": "sim"}, "decode-0", "OMNI_DECODE_SIM__EXPERTS__SPARE_SLOTS", "4", id="sim spare"
        ),
        pytest.param({"speculative": "mtp:2"}, "decode-0", "OMNI_DECODE_VLLM__SPECULATIVE", "mtp:2", id="drafts"),
        pytest.param({"speculative": "auto"}, "prefill-0", "OMNI_PREFILL_VLLM__SPECULATIVE", "auto", id="prefill's"),
        pytest.param(
            {"adapters": {"sql": Path("/a/sql")}},
            "decode-0",
            "OMNI_DECODE_ADAPTERS",
            '{"sql": "/a/sql"}',
            id="adapters",
        ),
        pytest.param({"otlp_endpoint": "http://c:1"}, "proxy", "OMNI_PROXY_OTLP_ENDPOINT", "http://c:1", id="otlp"),
    ],
)
def test_option_becomes_setting(changes, process, variable, value):
    assert variables(process, **changes)[variable] == value


def test_every_worker_and_the_proxy_find_the_same_kvstore():
    planned = plan(prefill=2, decode=2)
    kvstore = planned.specs[0].address
    found = {v for spec in planned.specs for k, v in spec.environment.items() if k.endswith("_KVSTORE")}
    assert found == {kvstore}


def test_workers_find_the_placement_service_where_their_experts_can_move():
    planned = plan(**EXPERT_RANKS)
    placement = next(spec.address for spec in planned.specs if spec.name == "placement")
    found = [v for spec in planned.specs for k, v in spec.environment.items() if k.endswith("_PLACEMENT")]
    assert found == [placement, placement]
    assert not [name for spec in plan().specs for name in spec.environment if name.endswith("_PLACEMENT")]


def test_simulated_engines_get_no_vllm_settings():
    names = [name for spec in plan(engine="sim").specs for name in spec.environment]
    assert not [name for name in names if "VLLM" in name]


@pytest.mark.parametrize(
    ("cores", "engines", "expected"),
    [
        pytest.param((0, 1), 2, ["0", "1"], id="one each"),
        pytest.param((0, 1, 2, 3), 2, ["0-1", "2-3"], id="none left over for others"),
        pytest.param((0, 1, 2, 3, 4), 2, ["1-2", "3-4"], id="one for the other services"),
        pytest.param((0, 1), 3, ["0", "1", "0"], id="shared in turn"),
        pytest.param((4, 6, 7, 9), 1, ["6-7,9"], id="gaps"),
        pytest.param(tuple(range(64)), 1, ["1-16"], id="bounded"),
    ],
)
def test_cores(cores, engines, expected):
    assert split_cores(cores, engines) == expected


def test_ranks_in_step_leave_a_core_to_the_services():
    assert split_cores(range(4), 2) == ["0-1", "2-3"]
    assert split_cores(range(4), 2, in_step=True) == ["1", "2"]
    assert split_cores(range(2), 2, in_step=True) == ["0", "1"]


@given(st.sets(st.integers(0, 255), min_size=1, max_size=64), st.integers(1, 12))
def test_cores_are_allowed_ones_and_disjoint_while_there_are_enough(cores, engines):
    ranges = split_cores(sorted(cores), engines)
    used = [core for text in ranges for core in _parsed(text)]
    assert len(ranges) == engines
    assert set(used) <= cores
    if len(cores) >= engines:
        assert len(used) == len(set(used))


@given(st.integers(0, 6), st.integers(1, 6), st.sampled_from(["vllm", "sim"]))
def test_no_port_is_planned_twice(prefill, decode, engine):
    specs = plan(Machine((0, 1), 1024 * GIB), prefill=prefill, decode=decode, engine=engine).specs
    ports = [spec.port for spec in specs] + [spec.metrics_port for spec in specs if spec.metrics_port]
    ports += [int(v) for spec in specs for k, v in spec.environment.items() if k.endswith("KV_PORT")]
    assert len(ports) == len(set(ports))


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        pytest.param({"decode": 0}, InvalidOptions, "at least one decode", id="no decode"),
        pytest.param({"prefill": -1}, InvalidOptions, "--prefill", id="negative"),
        pytest.param({"engine": "tpu"}, InvalidOptions, "vllm, sim", id="unknown engine"),
        pytest.param({"port": 0}, InvalidOptions, "65535", id="port"),
        pytest.param({"kernels": "omni", "engine": "sim"}, InvalidOptions, "no kernels", id="sim kernels"),
        pytest.param({"kernels": "fast"}, InvalidOptions, "--kernels 'fast'", id="unknown kernels"),
        pytest.param({"kv_cache_gib": 1.0, "engine": "sim"}, InvalidOptions, "counts blocks", id="sim kv cache"),
        pytest.param({"expert_ranks": 1}, InvalidOptions, "2 ranks", id="one expert rank"),
        pytest.param({"spare_experts": 4}, InvalidOptions, "--expert-ranks", id="spare slots without ranks"),
        pytest.param(
            {"attention_pattern": Path("/p.json"), "engine": "sim"}, InvalidOptions, "no attention", id="sim pattern"
        ),
        pytest.param({"speculative": "eagle:2"}, InvalidOptions, "mtp, ngram, auto", id="unknown drafter"),
        pytest.param({"speculative": "mtp:0"}, InvalidOptions, "1 to 16", id="no drafts"),
        pytest.param({"speculative": "mtp", "engine": "sim"}, InvalidOptions, "drafts nothing", id="sim drafts"),
        pytest.param({"speculative": "mtp", "expert_ranks": 2}, InvalidOptions, "choose one", id="drafts and ranks"),
        pytest.param({"expert_ranks": 12}, NotEnoughMemory, "64.0 GiB are free", id="memory of ranks"),
        pytest.param({"decode": 40}, NotEnoughMemory, "64.0 GiB are free", id="memory"),
        pytest.param({"kv_cache_gib": 100.0}, NotEnoughMemory, "--kv-cache-gib", id="kv cache"),
    ],
)
def test_refused(changes, error, says):
    with pytest.raises(error, match=says):
        plan(**changes)


def test_sharing_and_tight_memory_are_said():
    notes = plan(Machine((0,), 10 * GIB)).notes
    assert any("share 1 core" in note for note in notes)
    assert any("9.0 GiB; 10.0 GiB are free" in note for note in notes)


def test_simulated_engines_are_said():
    assert any("made up" in note for note in plan(engine="sim").notes)
    assert not any("made up" in note for note in plan().notes)


def _parsed(text: str) -> list[int]:
    bounds = [part.partition("-") for part in text.split(",")]
    return [core for first, _, last in bounds for core in range(int(first), int(last or first) + 1)]
