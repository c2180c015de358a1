"""A scripted worker behind the real wire, and a proxy in process on a free port."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import uvicorn
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from omni.decode.v1 import decode_service_pb2 as decode_pb
from omni.decode.v1 import decode_service_pb2_grpc
from omni.engine.v1 import engine_pb2, worker_service_pb2, worker_service_pb2_grpc
from omni.kv.v1 import kv_pb2
from omni.prefill.v1 import prefill_service_pb2 as prefill_pb
from omni.prefill.v1 import prefill_service_pb2_grpc
from omni_common.errors import FailedPrecondition, OmniError, Unavailable
from omni_common.rpc import Server, Servicer
from omni_proxy.app import Proxy, running
from omni_proxy.settings import Settings
from omni_proxy.worker import GROUP_LABEL

MODEL = "tiny"
STORY = "The quick brown fox — naïve 🙂 jumps over 你好 lazy dogs and keeps on running. "
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
END_ID = 0


def train_byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[AddedToken(t, special=True) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([STORY] * 4, trainer)
    return tokenizer


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("models") / MODEL
    folder.mkdir()
    train_byte_level().save(str(folder / "tokenizer.json"))
    config = {"chat_template": TEMPLATE, "eos_token": "<|im_end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 256, "vocab_size": 400}))
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.7, "top_k": 20, "eos_token_id": 0}))
    return folder


@dataclass
class Sequence:
    stream_id: int
    prompt: list[int]
    produced: int
    left: int
    submit: decode_pb.Submit
    session: object
    started: bool = False


@dataclass
class FakeWorker:
    """Output token k of a prompt is fixed by the prompt alone, so that every split gives the same text."""

    worker_id: str
    role: Any
    script: list[int]
    block_size: int = 7
    frame_window: int = 4
    hold_after: int | None = None
    stops_at: int | None = None
    burst: int = 1
    offset: int | None = None
    prefill_error: OmniError | None = None
    reject: tuple[str, str, str] | None = None
    pulls: bool = True
    """False: refuses handles, as an engine does whose blocks are of another kind."""
    groups: Mapping[str, str] = field(default_factory=dict)
    """By worker id."""
    adapters: Mapping[str, Collection[str]] = field(default_factory=dict)
    """Told to be served, by worker id; `lost` ones are refused all the same, `slots` are those it has in one."""
    lost: Mapping[str, Collection[str]] = field(default_factory=dict)
    slots: Mapping[str, Collection[str]] = field(default_factory=dict)
    adapter_load_ms: float = 0.0
    weights: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Digests by worker id."""
    model: str = MODEL
    cached_tokens: int = 3
    prefills: list[prefill_pb.PrefillRequest] = field(default_factory=list)
    submits: list[decode_pb.Submit] = field(default_factory=list)
    released: list[str] = field(default_factory=list)
    metadata: list[dict[str, str]] = field(default_factory=list)
    aborted: asyncio.Queue[str] = field(default_factory=asyncio.Queue)
    live: dict[int, Sequence] = field(default_factory=dict)
    resumed: asyncio.Event = field(default_factory=asyncio.Event)
    held: asyncio.Event = field(default_factory=asyncio.Event)
    prefill_gate: asyncio.Event | None = None
    gate_error: OmniError | None = None
    """Behind the gate."""
    report_s: float | None = None
    life: Mapping[str, float] = field(default_factory=dict)
    """Of its reports: prompts before this proxy's."""
    is_loading: bool = False
    prefill_started: asyncio.Event = field(default_factory=asyncio.Event)
    breaks: asyncio.Event = field(default_factory=asyncio.Event)
    frames: int = 0
    described: int = 0
    address: str = ""
    epoch: int = 1

    @property
    def touched(self) -> bool:
        return bool(self.prefills or self.submits)

    def token(self, prompt: list[int], position: int, adapter: str = "") -> int:
        if self.stops_at is not None and position >= self.stops_at:
            return END_ID
        start = (sum(prompt) if self.offset is None else self.offset) + len(adapter)
        return self.script[(start + position) % len(self.script)]

    def serves(self, adapter: str) -> bool:
        told, lost = (by_id.get(self.worker_id, ()) for by_id in (self.adapters, self.lost))
        return not adapter or (adapter in told and adapter not in lost)

    def info(self) -> engine_pb2.WorkerInfo:
        return engine_pb2.WorkerInfo(
            worker_id=self.worker_id, address=self.address, role=self.role, epoch=self.epoch, model=self.model,
            block_size=self.block_size, num_blocks=100, max_model_len=256, max_num_seqs=64, engine="fake",
            kv_connector="fake", engine_id=self.worker_id, labels={GROUP_LABEL: self.groups.get(self.worker_id, "")},
            adapters=sorted(self.adapters.get(self.worker_id, ())), adapter_load_ms=self.adapter_load_ms,
            weights=self.weights.get(self.worker_id, {}).get("", ""),
            adapter_weights=[
                self.weights.get(self.worker_id, {}).get(name, "")
                for name in sorted(self.adapters.get(self.worker_id, ()))
            ],
        )  # fmt: skip

    async def Describe(self, request: Any, context: Any) -> worker_service_pb2.DescribeResponse:
        self.described += 1
        if self.is_loading:
            raise Unavailable("the engine is not ready", reason="loading")
        return worker_service_pb2.DescribeResponse(info=self.info())

    async def WatchStats(self, request: Any, context: Any) -> AsyncIterator[worker_service_pb2.WatchStatsResponse]:
        yield worker_service_pb2.WatchStatsResponse(
            worker_id=self.worker_id,
            epoch=self.epoch,
            running=len(self.live),
            adapters=self.slots.get(self.worker_id, ()),
            **self.life,
        )
        while self.report_s is not None:
            await asyncio.sleep(self.report_s)
            yield worker_service_pb2.WatchStatsResponse(worker_id=self.worker_id, epoch=self.epoch)
        await asyncio.Event().wait()

    async def ListBlocks(self, request: Any, context: Any) -> AsyncIterator[worker_service_pb2.ListBlocksResponse]:
        yield worker_service_pb2.ListBlocksResponse(epoch=self.epoch)

    async def SetRole(self, request: Any, context: Any) -> worker_service_pb2.SetRoleResponse:
        previous, self.role = self.role, request.role
        return worker_service_pb2.SetRoleResponse(role=self.role, previous=previous)

    async def Drain(self, request: Any, context: Any) -> worker_service_pb2.DrainResponse:
        return worker_service_pb2.DrainResponse(drained=True)

    async def Prefill(self, request: prefill_pb.PrefillRequest, context: Any) -> prefill_pb.PrefillResponse:
        self.prefills.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        self.prefill_started.set()
        if self.prefill_error is not None:
            raise self.prefill_error
        if not self.serves(request.adapter):
            raise FailedPrecondition("no such adapter", reason="no_adapter", field="adapter")
        try:
            if self.prefill_gate is not None:
                await self.prefill_gate.wait()
            if self.gate_error is not None:
                raise self.gate_error
        except asyncio.CancelledError:
            self.aborted.put_nowait(request.request_id)
            raise
        prompt = list(request.token_ids)
        first = self.token(prompt, 0, request.adapter)
        answer = prefill_pb.PrefillResponse(
            first_token_id=first, worker_id=self.worker_id, cached_tokens=self.cached_tokens
        )
        answer.timings.queue_ms = 1.5
        if request.sampling.HasField("logprobs"):
            answer.logprobs.CopyFrom(logprobs(first, request.sampling.logprobs))
        if self.stops_at == 0:
            answer.finish_reason = engine_pb2.FINISH_REASON_STOP
            return answer
        answer.kv_handle.CopyFrom(
            kv_pb2.KvHandle(
                opaque=b"x",
                engine_id=self.worker_id,
                lease_id=request.request_id,
                num_tokens=len(prompt),
                num_blocks=1,
                lease_s=30,
                block_size=self.block_size,
            )
        )
        return answer

    async def ReleaseKv(self, request: prefill_pb.ReleaseKvRequest, context: Any) -> prefill_pb.ReleaseKvResponse:
        self.released.append(request.lease_id)
        return prefill_pb.ReleaseKvResponse(released=True)

    async def Session(self, requests: Any, context: Any) -> AsyncIterator[decode_pb.SessionResponse]:
        hello = await anext(requests)
        assert hello.hello.proxy_id
        yield decode_pb.SessionResponse(
            welcome=decode_pb.Welcome(worker_id=self.worker_id, epoch=self.epoch, frame_window=self.frame_window)
        )
        acked, frame, wake, refused = [0], 0, asyncio.Event(), list[decode_pb.Rejected]()
        mine = refused
        reader = asyncio.create_task(self._read(requests, acked, wake, refused))
        breaker = asyncio.create_task(self.breaks.wait())
        try:
            while not self.breaks.is_set():
                while refused:
                    yield decode_pb.SessionResponse(rejected=refused.pop())
                ready = [s for s in self.live.values() if s.session is mine and not self._is_held(s)]
                if not ready or frame - acked[0] >= self.frame_window:
                    wake.clear()
                    waits = {asyncio.create_task(wake.wait()), asyncio.create_task(self.resumed.wait()), breaker}
                    if self.resumed.is_set():
                        waits = {asyncio.create_task(wake.wait()), breaker}
                    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                    for task in waits - {breaker}:
                        task.cancel()
                    continue
                frame += 1
                self.frames += 1
                yield decode_pb.SessionResponse(step=self._step(frame, ready))
                await asyncio.sleep(0)
        finally:
            reader.cancel()
            breaker.cancel()
            self.live = {key: s for key, s in self.live.items() if s.session is not mine}
        self.breaks.clear()

    async def _read(self, requests: Any, acked: list[int], wake: asyncio.Event, refused: list[Any]) -> None:
        async for message in requests:
            match message.WhichOneof("message"):
                case "submit":
                    self._submit(message.submit, refused)
                case "abort":
                    for stream_id in message.abort.stream_ids:
                        if (gone := self.live.pop(stream_id, None)) is not None:
                            self.aborted.put_nowait(gone.submit.request_id)
                case "ack":
                    acked[0] = message.ack.frame
            wake.set()

    def _submit(self, submit: decode_pb.Submit, refused: list[Any]) -> None:
        self.submits.append(submit)
        reject = self.reject
        if not self.pulls and submit.HasField("kv_handle"):
            reject = ("FAILED_PRECONDITION", "such blocks cannot be pulled here", "")
        if not self.serves(submit.adapter):
            reject = ("FAILED_PRECONDITION", "no such adapter", "adapter")
        if reject is not None:
            code, detail, field = reject
            refused.append(decode_pb.Rejected(stream_id=submit.stream_id, code=code, detail=detail, field=field))
            return
        tokens = list(submit.token_ids)
        prompt = tokens[: len(tokens) - submit.num_output_tokens]
        self.live[submit.stream_id] = Sequence(
            submit.stream_id, prompt, submit.num_output_tokens, submit.sampling.max_tokens, submit, refused
        )

    def _is_held(self, sequence: Sequence) -> bool:
        if self.hold_after is None or sequence.produced < self.hold_after or self.resumed.is_set():
            return False
        self.held.set()
        return True

    def _step(self, number: int, ready: list[Sequence]) -> decode_pb.StepFrame:
        frame = decode_pb.StepFrame(frame=number)
        for sequence in ready:
            count = min(self.burst, sequence.left)
            if self.hold_after is not None and not self.resumed.is_set():
                count = min(count, self.hold_after - sequence.produced)
            tokens: list[int] = []
            for _ in range(count):
                tokens.append(self.token(sequence.prompt, sequence.produced, sequence.submit.adapter))
                sequence.produced += 1
                sequence.left -= 1
                if tokens[-1] == END_ID:
                    break
            frame.stream_ids.append(sequence.stream_id)
            frame.token_ids.extend(tokens)
            if self.burst > 1:
                frame.counts.append(len(tokens))
            if not sequence.started:
                sequence.started = True
                frame.starts.add(stream_id=sequence.stream_id, cached_tokens=2, pulled_tokens=5)
            if sequence.submit.sampling.HasField("logprobs"):
                entry = frame.logprobs.add(stream_id=sequence.stream_id)
                for token in tokens:
                    entry.logprobs.MergeFrom(logprobs(token, sequence.submit.sampling.logprobs))
                entry.logprobs.width = 1 + sequence.submit.sampling.logprobs
            if tokens[-1] == END_ID or sequence.left == 0:
                reason = engine_pb2.FINISH_REASON_STOP if tokens[-1] == END_ID else engine_pb2.FINISH_REASON_LENGTH
                frame.finishes.add(stream_id=sequence.stream_id, reason=reason)
                del self.live[sequence.stream_id]
        return frame


def logprobs(token: int, top: int) -> engine_pb2.Logprobs:
    ids = [token, *range(10, 10 + top)]
    values = [-0.5, *(-1.0 - i for i in range(top))]
    return engine_pb2.Logprobs(width=1 + top, token_ids=ids, logprobs=values, sampled_ranks=[1])


@asynccontextmanager
async def serve_worker(worker: FakeWorker, address: str = "127.0.0.1:0") -> AsyncIterator[Server]:
    servicers = [
        Servicer(worker, worker_service_pb2_grpc.add_WorkerServiceServicer_to_server, "omni.engine.v1.WorkerService")
    ]
    if worker.role != engine_pb2.ROLE_DECODE:
        name = "omni.prefill.v1.PrefillService"
        servicers.append(Servicer(worker, prefill_service_pb2_grpc.add_PrefillServiceServicer_to_server, name))
    if worker.role != engine_pb2.ROLE_PREFILL:
        name = "omni.decode.v1.DecodeService"
        servicers.append(Servicer(worker, decode_service_pb2_grpc.add_DecodeServiceServicer_to_server, name))
    server = Server(servicers)
    port = await server.start(address)
    worker.address = f"127.0.0.1:{port}"
    try:
        yield server
    finally:
        await server.stop(0)


@dataclass
class Stack:
    """A running proxy and its workers."""

    proxy: Proxy
    url: str
    client: httpx.AsyncClient
    workers: dict[str, FakeWorker]
    registry: CollectorRegistry
    spans: InMemorySpanExporter

    def __getitem__(self, worker_id: str) -> FakeWorker:
        return self.workers[worker_id]

    def metric(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, labels) or 0.0

    async def until_settled(self) -> None:
        """Nothing in flight, neither at the admission nor in the ledger."""
        async with asyncio.timeout(5):
            await self.proxy.admission.drained()
        assert self.proxy.fleet.ledger.total_requests == 0

    async def chat(self, **body: Any) -> httpx.Response:
        return await self.client.post("/v1/chat/completions", json=chat_body(**body))


def chat_body(**body: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": "Tell a story"}], "max_tokens": 24} | body


StackFactory = Callable[..., Any]


@pytest.fixture
async def start(model_dir: Path) -> AsyncIterator[StackFactory]:
    """Starts a stack of workers given as `name=role letters`: p prefill, d decode, b both."""
    roles = {"p": engine_pb2.ROLE_PREFILL, "d": engine_pb2.ROLE_DECODE, "b": engine_pb2.ROLE_BOTH}
    script = Tokenizer.from_file(str(model_dir / "tokenizer.json")).encode(STORY).ids
    async with AsyncExitStack() as stack:

        async def begin(fleet: str = "p d", settings: dict[str, Any] | None = None, **worker: Any) -> Stack:
            workers = {}
            for name in fleet.split():
                fake = FakeWorker(name, roles[name[0]], script, **worker)
                await stack.enter_async_context(serve_worker(fake))
                workers[name] = fake
            return await stack.enter_async_context(proxy_of(model_dir, workers, settings or {}))

        yield begin


@asynccontextmanager
async def proxy_of(model_dir: Path, workers: dict[str, FakeWorker], overrides: dict[str, Any]) -> AsyncIterator[Stack]:
    values = {
        "model_dir": model_dir,
        "workers": tuple(w.address for w in workers.values()),
        "resume_timeout_s": 2.0,
        "policy": "least_uncached_tokens",
        # Fake workers send no load reports unless told to, which a busy machine makes look stuck.
        "health": {"stall_min_s": 60.0},
    }
    registry, exporter, provider = CollectorRegistry(), InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    async with running(Settings.model_validate(values | overrides), registry, provider.get_tracer("test")) as proxy:
        config = uvicorn.Config(proxy.app, port=0, lifespan="off", log_config=None, access_log=False, http="httptools")
        server = uvicorn.Server(config)
        sockets = [config.bind_socket()]
        url = f"http://127.0.0.1:{sockets[0].getsockname()[1]}"
        serving = asyncio.create_task(server._serve(sockets))
        async with asyncio.timeout(10), httpx.AsyncClient(base_url=url, timeout=20) as client:
            while sum(m.refusal is None for m in proxy.fleet.members) < len(workers):
                await proxy.fleet.changed()
        async with httpx.AsyncClient(base_url=url, timeout=20) as client:
            yield Stack(proxy, url, client, workers, registry, exporter)
        server.should_exit = True
        await serving


__all__ = ["FakeWorker", "Unavailable", "grpc"]
