"""vLLM behind the `Engine` port: token ids in, one callback per engine step out.

AsyncLLM is built for what it owns (configuration, input processing, the engine core's processes). Outputs are
read from its engine-core client a step at a time instead of through its per-request generators, because a
request object, a queue and a task wake-up per token and request cost more than the rest of this path.
"""

import asyncio
import contextlib
import dataclasses
import itertools
import json
import logging
import os
import shutil
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omni_common.errors import FailedPrecondition, Internal, InvalidRequest, Unavailable
from omni_engine.adapters import AdapterSlots, AdapterTurns
from omni_engine.ports import (
    DecodeJob,
    EngineInfo,
    EngineStats,
    EventBatch,
    ExpertLayout,
    ExpertLoad,
    ExpertMove,
    KernelCalls,
    KvHandle,
    PrefillJob,
    PrefillResult,
    SamplingParams,
    StepSink,
)
from omni_engine.vllm_args import Role, cores_by_rank, plan_launch
from omni_engine.vllm_event_stream import EventStream
from omni_engine.vllm_events import EventReader, KvGroups
from omni_engine.vllm_experts import AGREE_EVERY_STEPS, NUDGE, Experts
from omni_engine.vllm_kernels import read_kernel_calls
from omni_engine.vllm_launch import build, describe, lora_requests
from omni_engine.vllm_leases import CLOCKS_DIFFER_S, LEASE_BEGAN, LEASE_ENDS, Leases, numbered
from omni_engine.vllm_outputs import (
    PendingPrefill,
    RunningSequence,
    Tracker,
    finish_reason_of,
    logprobs_of,
    prefill_timings,
)
from omni_engine.vllm_pattern import KEY as PATTERN_KEY
from omni_engine.vllm_pattern import groups_of_prefix
from omni_engine.vllm_sampling import sampling_params
from omni_engine.vllm_settings import VllmSettings
from omni_engine.vllm_side_channel import side_channel
from omni_engine.vllm_speculation import check_sampling
from omni_engine.weights import weights_digest

log = logging.getLogger(__name__)

_RPC_TIMEOUT_S = 10.0
_WEIGHTS_KEY = "omni_weights"
# What a prefill request asks of the KV connector: keep the blocks for another engine.
_KEEP_FOR_PULL = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


class VllmEngine:
    """One vLLM engine in this process; its core and workers are child processes."""

    def __init__(
        self,
        settings: VllmSettings,
        model_dir: Path,
        model: str,
        role: Role,
        adapters: Mapping[str, Path] | None = None,
    ) -> None:
        self._settings = settings
        self._plan = plan_launch(settings, model_dir, model, role, adapters)
        self._model_dir, self._model = model_dir, model
        self._tracker = Tracker(AdapterSlots(self._plan.adapter_slots), AdapterTurns(self._plan.adapter_slots))
        self._adapters: dict[str, Any] = {}
        self._numbers = itertools.count()
        self._dead: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._llm: Any = None
        self._info: EngineInfo | None = None
        self._events: EventStream | None = None
        self._event_reader: EventReader | None = None
        self._leases: Leases | None = None
        self._experts: Experts | None = None
        self._reader: asyncio.Task[None] | None = None

    @property
    def info(self) -> EngineInfo:
        if self._info is None:
            raise FailedPrecondition("the engine has not started", reason="not_started")
        return self._info

    async def start(self) -> None:
        os.environ.update(self._plan.environment)
        if self._plan.events_dir:
            self._plan.events_dir.mkdir(mode=0o700)
            self._events = EventStream(self._plan.events_endpoint, self._plan.replay_endpoint)
        weights = await asyncio.to_thread(self._read_weights)
        # Where the port of its side channel is taken, vLLM waits for its listener for ever.
        with side_channel(self._settings):
            await self._build()
        groups = await self._kv_groups()
        self._event_reader = EventReader(groups)
        self._info = describe(self._llm.vllm_config, self._plan, self._model, self._settings, groups, weights)
        if self._plan.speculative:
            log.info("speculative decoding", extra={"drafter": self._plan.speculative})
        self._leases = Leases(self._llm.engine_core, enabled=bool(self._settings.kv_connector))
        self._reader = asyncio.create_task(self._read_outputs(), name="vllm-outputs")
        if self._settings.cores and self._settings.on_cpu:
            await self._llm.engine_core.collective_rpc_async(
                "omni_pin", _RPC_TIMEOUT_S, (cores_by_rank(self._settings.cores),)
            )
        await self._warm_up()
        if self._plan.adapters:
            await self._take_adapters()
        if self._settings.expert_parallel:
            self._experts = await self._take_experts()
        if await asyncio.to_thread(self._read_weights) != weights:
            raise Internal("the files of the model or of an adapter were changed while they were loaded")

    async def _build(self) -> None:
        try:
            async with asyncio.timeout(self._settings.start_timeout_s):
                self._llm = await asyncio.to_thread(build, self._plan, self._settings)
        except TimeoutError:
            raise Internal(f"vLLM did not start within {self._settings.start_timeout_s:.0f} s") from None
        except Exception as error:
            raise Internal(f"vLLM did not start: {type(error).__name__}: {error}") from error

    def _read_weights(self) -> dict[str, str]:
        """What `EngineInfo.weights` tells."""
        folders = {adapter.name: adapter.path for adapter in self._plan.adapters}
        named = {"": self._settings.weights} if self._settings.weights else {}
        if not named:
            folders[""] = self._model_dir
        try:
            return {name: weights_digest(folder) for name, folder in folders.items()} | named
        except (OSError, ValueError) as error:
            raise InvalidRequest(f"weights cannot be read: {error}", field="model_dir") from None

    async def prefill(self, job: PrefillJob) -> PrefillResult:
        leases = self._require_leases()
        wants_handle = bool(self._settings.kv_connector)
        core_id = self._core_id(job.request_id)
        params = self._sampling(job.sampling, dict(_KEEP_FOR_PULL) if wants_handle else None, max_tokens=1)
        done: asyncio.Future[tuple[Any, float]] = asyncio.get_running_loop().create_future()
        pending = PendingPrefill(core_id, job.request_id, job.believed_tokens, time.monotonic(), done, job.adapter)
        await self._add(job, params, pending)
        try:
            output, timestamp_s = await done
        except asyncio.CancelledError:
            await self._abandon(core_id)
            if done.done() and not done.cancelled() and done.exception() is None:
                self._disown(done.result()[0])
            if self._dead.done():
                raise Unavailable(self._dead.result(), reason="engine_dead") from None
            raise
        handle = _handle(output, job, self.info, self._settings.lease_s)
        if handle is not None:
            leases.grant(handle.lease_id, handle.lease_s)
        stats = output.prefill_stats
        return PrefillResult(
            first_token_id=output.new_token_ids[0],
            finish_reason=None if handle is not None else finish_reason_of(output),
            kv_handle=handle,
            cached_tokens=stats.num_cached_tokens if stats else 0,
            timings=prefill_timings(output, pending.submitted_s, timestamp_s),
            logprobs=logprobs_of(output.new_logprobs) if output.new_logprobs is not None else None,
        )

    async def release(self, lease_id: str) -> bool:
        return await self._require_leases().release(lease_id)

    async def submit(self, job: DecodeJob, sink: StepSink) -> None:
        self._require_leases()
        transfer = self._transfer_of(job)
        params = self._sampling(job.sampling, transfer)
        core_id = self._core_id(job.request_id)
        sequence = RunningSequence(
            core_id,
            job.request_id,
            len(job.token_ids),
            job.believed_tokens,
            time.monotonic(),
            sink,
            expects_pull=transfer is not None,
            adapter=job.adapter,
        )
        await self._add(job, params, sequence)

    async def abort(self, request_ids: Sequence[str]) -> None:
        core_ids = self._tracker.core_ids(request_ids)
        for core_id in core_ids:
            work = self._tracker.drop(core_id)
            if isinstance(work, PendingPrefill):
                work.done.cancel()
        if core_ids and not self._dead.done():
            await asyncio.shield(self._taken_back(core_ids))

    def stats(self) -> EngineStats:
        return self._tracker.stats(self._leases.held if self._leases else 0)

    async def events(self) -> AsyncIterator[EventBatch]:
        if self._events is None or self._event_reader is None:
            return
        async for raw in self._events:
            yield self._event_reader.read(raw.sequence, raw.payload, raw.is_replayed)

    async def expert_load(self) -> ExpertLoad | None:
        return await self._experts.take_load() if self._experts is not None else None

    def expert_layout(self) -> ExpertLayout | None:
        return self._experts.layout if self._experts is not None else None

    async def move_experts(self, moves: Sequence[ExpertMove], layout: ExpertLayout) -> None:
        await self._require_experts().move(moves, layout)

    async def drop_ranks(self, ranks: Sequence[int]) -> None:
        await self._require_experts().drop(ranks)

    async def expert_digests(self) -> list[list[list[str]]]:
        """SHA-256 of the weights in every slot: ranks, layers, slots."""
        return await self._require_experts().digests()

    async def kernel_calls(self) -> KernelCalls | None:
        if self._settings.kernels == "vllm" or self._llm is None:
            return None
        return await read_kernel_calls(self._llm.engine_core)

    async def wait_dead(self) -> str:
        return await asyncio.shield(self._dead)

    async def close(self) -> None:
        for owned in (self._reader, self._leases.task if self._leases else None):
            if owned is not None:
                owned.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await owned
        if self._events is not None:
            self._events.close()
        if self._plan.events_dir:
            shutil.rmtree(self._plan.events_dir, ignore_errors=True)
        if self._llm is not None:
            await asyncio.to_thread(self._llm.shutdown)

    async def _kv_groups(self) -> KvGroups:
        try:
            async with asyncio.timeout(_RPC_TIMEOUT_S):
                groups = await self._llm.engine_core.call_utility_async("get_kv_cache_group_metadata")
        except TimeoutError:
            raise Internal(f"vLLM did not tell its KV cache groups within {_RPC_TIMEOUT_S:.0f} s") from None
        return KvGroups(groups_of_prefix(groups) if self._plan.pattern else groups)

    async def _read_outputs(self) -> None:
        """The one reader of the engine core's outputs; ends when the engine dies."""
        core = self._llm.engine_core
        try:
            while True:
                for orphan in self._tracker.step(await core.get_output_async()):
                    self._disown(orphan)
                await self._admit()
        except asyncio.CancelledError:
            raise
        except Exception as error:
            reason = f"vLLM engine died: {type(error).__name__}"
            log.error("engine died", extra={"error": str(error)})
            if not self._dead.done():
                self._dead.set_result(reason)
            self._tracker.fail_all(reason)

    def _disown(self, output: Any) -> None:
        """A prefill whose caller left just as it finished: nobody will pull its blocks."""
        if output.kv_transfer_params and self._leases is not None:
            self._leases.release_later(output.request_id)

    async def _add(self, job: PrefillJob | DecodeJob, params: Any, work: PendingPrefill | RunningSequence) -> None:
        core_id = work.core_id
        request = self._core_request(core_id, job, params)
        if not self._tracker.add(work, request):
            return
        try:
            await self._llm.engine_core.add_request_async(request)
        except asyncio.CancelledError:
            await self._abandon(core_id)  # it may have got there
            raise
        except Exception:
            self._tracker.drop(core_id)
            raise

    async def _admit(self) -> None:
        """Give vLLM the requests whose adapter's turn has come."""
        for request in self._tracker.admitted(time.monotonic()):
            await self._llm.engine_core.add_request_async(request)

    def _core_request(self, core_id: str, job: PrefillJob | DecodeJob, params: Any) -> Any:
        prompt: dict[str, Any] = {"type": "token", "prompt_token_ids": list(job.token_ids)}
        if job.cache_salt:
            prompt["cache_salt"] = job.cache_salt
        adapter = self._adapters[job.adapter] if job.adapter else None
        try:
            return self._llm.input_processor.process_inputs(
                core_id, prompt, params, ("generate",), lora_request=adapter
            )
        except Exception as error:  # input processing does nothing but check and copy
            raise InvalidRequest(_one_line(error), field=getattr(error, "parameter", None)) from None

    def _sampling(self, params: SamplingParams, transfer: dict[str, Any] | None, max_tokens: int | None = None) -> Any:
        if self._plan.speculative:
            check_sampling(params)
        try:
            return sampling_params(params, transfer, max_tokens)
        except Exception as error:
            raise InvalidRequest(_one_line(error), field=getattr(error, "parameter", None)) from None

    def _transfer_of(self, job: DecodeJob) -> dict[str, Any] | None:
        """The connector's parameters of a handle.

        Raises FailedPrecondition for a handle this engine cannot pull; vLLM's connector would assert and die.
        """
        handle = job.kv_handle
        if handle is None:
            return None
        size = self.info.block_size
        if not self._settings.kv_connector or handle.block_size != size:
            raise FailedPrecondition(
                f"blocks of {handle.block_size} tokens cannot be pulled here (block size {size})", reason="kv_mismatch"
            )
        if -(-len(job.token_ids) // size) > handle.num_blocks:
            raise FailedPrecondition(
                f"{len(job.token_ids)} tokens do not fit {handle.num_blocks} pulled blocks of {size}",
                reason="handle_too_short",
            )
        transfer: dict[str, Any] = json.loads(handle.opaque)
        weights = self.info.weights_of(job.adapter)
        if transfer.pop(_WEIGHTS_KEY, weights) != weights:
            raise FailedPrecondition(
                "the blocks were computed with other weights than this engine's", reason="kv_mismatch"
            )
        if transfer.get(PATTERN_KEY) != self._plan.pattern:
            raise FailedPrecondition(
                "the blocks were computed under another attention pattern than this engine's", reason="kv_mismatch"
            )
        if handle.lease_ends_unix_ms:
            transfer[LEASE_ENDS] = _trusted_end_s(handle)
        return transfer

    def _core_id(self, request_id: str) -> str:
        """vLLM refuses a name it has seen and not yet forgotten; a resubmitted request keeps its own name."""
        return numbered(request_id, next(self._numbers))

    async def _abandon(self, core_id: str) -> None:
        if self._tracker.drop(core_id) is not None and not self._dead.done():
            await asyncio.shield(self._taken_back([core_id]))

    async def _taken_back(self, core_ids: Sequence[str]) -> None:
        await self._llm.engine_core.abort_requests_async(core_ids)
        await self._admit()

    def _require_leases(self) -> Leases:
        if self._dead.done():
            raise Unavailable(self._dead.result(), reason="engine_dead")
        if self._leases is None:
            raise FailedPrecondition("the engine has not started", reason="not_started")
        return self._leases

    def _require_experts(self) -> Experts:
        if self._experts is None:
            raise FailedPrecondition("the engine runs without expert parallelism", reason="no_expert_parallelism")
        return self._experts

    async def _take_experts(self) -> Experts:
        experts = Experts(
            self._llm.engine_core,
            self.info.num_experts,
            data_parallel=self._settings.data_parallel_size > 1,
            nudge=self._nudge,
            dead=self._dead,
        )
        await experts.read_layout()
        await experts.take_load()
        self._info = dataclasses.replace(
            self.info,
            num_moe_layers=len(experts.layout.physical),
            ranks_per_host=experts.ranks_per_host,
            expert_bytes=experts.expert_bytes,
        )
        return experts

    async def _take_adapters(self) -> None:
        """Load every adapter, so that a broken one is known now.

        Then, where there are more than slots, bring each into a slot again: only that is left to do later.
        """
        requests = lora_requests(self._plan.adapters)
        elapsed_ms = [await self._load(request) for request in requests]
        if self._plan.adapter_slots < len(requests):
            elapsed_ms = [await self._load(request) for request in requests]
        self._adapters = {request.lora_name: request for request in requests}
        load_ms = sum(elapsed_ms) / len(elapsed_ms)
        self._info = dataclasses.replace(self.info, adapters=tuple(self._adapters), adapter_load_ms=load_ms)

    async def _load(self, request: Any) -> float:
        """Bring an adapter into a slot; returns the milliseconds it took."""
        started_s = time.monotonic()
        try:
            async with asyncio.timeout(self._settings.start_timeout_s):
                await self._llm.engine_core.add_lora_async(request)
        except TimeoutError:
            limit_s = self._settings.start_timeout_s
            raise Internal(f"adapters: {request.lora_name!r} was not loaded within {limit_s:.0f} s") from None
        except Exception as error:
            raise Internal(f"adapters: {request.lora_name!r} cannot be loaded: {_one_line(error)}") from error
        self._tracker.slots.touch(request.lora_name)
        return (time.monotonic() - started_s) * 1e3

    async def _nudge(self) -> None:
        """Make an idle engine take a few steps; a busy one takes them anyway."""
        if not self._tracker.has_work:
            params = SamplingParams(max_tokens=AGREE_EVERY_STEPS + 1, temperature=0.0, ignore_eos=True)
            await self.submit(DecodeJob(NUDGE, [3], params), lambda outputs: None)

    async def _warm_up(self) -> None:
        """One local prefill and a few steps.

        A CPU worker whose first forward is a long-context decode dies with an illegal instruction in the AMX
        attention kernel, because tiles are only enabled by a prefill.
        """
        length = min(self._settings.warmup_tokens, self.info.max_model_len - 8)
        if length < 1:
            return
        finished = asyncio.get_running_loop().create_future()

        def sink(outputs: list[Any]) -> None:
            if outputs[-1].finish_reason is not None and not finished.done():
                finished.set_result(outputs[-1].finish_reason)

        params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
        await self.submit(DecodeJob("warm-up", [3 + i % 7 for i in range(length)], params), sink)
        async with asyncio.timeout(self._settings.start_timeout_s):
            await asyncio.wait({finished, self._dead}, return_when=asyncio.FIRST_COMPLETED)
            if self._dead.done():
                raise Internal(self._dead.result())
            await self._llm.engine_core.reset_prefix_cache_async()


def _handle(output: Any, job: PrefillJob, info: EngineInfo, lease_s: float) -> KvHandle | None:
    transfer = output.kv_transfer_params
    if not transfer or not transfer.get("remote_block_ids") or str(output.finish_reason) != "length":
        return None
    groups = [list(group) for group in transfer["remote_block_ids"]]
    ends_s = transfer.pop(LEASE_BEGAN) + lease_s
    return KvHandle(
        opaque=json.dumps(transfer | {"remote_block_ids": groups, _WEIGHTS_KEY: info.weights_of(job.adapter)}).encode(),
        engine_id=info.engine_id,
        lease_id=output.request_id,
        num_tokens=len(job.token_ids),
        num_blocks=max(map(len, groups)),
        block_size=info.block_size,
        lease_s=lease_s,
        lease_ends_unix_ms=int(ends_s * 1000),
    )


def _trusted_end_s(handle: KvHandle) -> float:
    """Unix time until when its blocks may be used; 0 where the clocks differ, as a grant in the future shows."""
    ends_s = handle.lease_ends_unix_ms / 1000
    return ends_s if ends_s - handle.lease_s < time.time() + CLOCKS_DIFFER_S else 0.0


def _one_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
