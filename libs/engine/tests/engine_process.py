"""A VllmEngine in a process of its own, driven through a pipe, so that two can hand blocks to each other."""

import asyncio
import multiprocessing
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from omni_engine.ports import DecodeJob, SequenceOutput
from omni_engine.vllm import VllmEngine
from omni_engine.vllm_settings import VllmSettings

START_TIMEOUT_S = 300.0
CALL_TIMEOUT_S = 60.0
END_TIMEOUT_S = 30.0
# Loaded once for all engines: half of what an engine's own process imports, and nothing that reads its environment.
PRELOADED = ["torch._inductor.standalone_compile", "transformers"]


class EngineProcess:
    """Calls go to the engine in the child by name; errors come back as exceptions."""

    def __init__(
        self, settings: VllmSettings, model_dir: Path, role: str, adapters: Mapping[str, Path] | None = None
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._pipe, child = context.Pipe()
        self._process = context.Process(target=_serve, args=(child, settings, model_dir, role, adapters))
        self._process.start()

    def wait_started(self) -> None:
        self._receive(START_TIMEOUT_S)

    def call(self, name: str, *args: Any) -> Any:
        self._pipe.send((name, args))
        return self._receive(CALL_TIMEOUT_S)

    def generate(self, job: DecodeJob) -> list[SequenceOutput]:
        """All outputs of a sequence, to its end."""
        outputs: list[SequenceOutput] = self.call("generate", job)
        return outputs

    def generate_all(self, jobs: Sequence[DecodeJob]) -> list[list[SequenceOutput]]:
        """All outputs of sequences that run side by side."""
        outputs: list[list[SequenceOutput]] = self.call("generate_all", jobs)
        return outputs

    def run(self, scenario: Callable[..., Coroutine[Any, Any, Any]], *args: Any) -> Any:
        """What `scenario(engine, *args)` returns, run beside the engine; it must be importable by name."""
        return self.call("run", scenario, *args)

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self._process.pid).children(recursive=True)

    def kill(self) -> None:
        self._process.kill()
        self._process.join(10)

    def close(self) -> None:
        """End it. Its children are killed: they hold nothing that anybody wants, and take long to take leave."""
        if self._process.is_alive():
            for child in self.children():
                with suppress(psutil.NoSuchProcess):
                    child.kill()
            with suppress(OSError):
                self._pipe.send(None)
            self._process.join(END_TIMEOUT_S)
        self.kill()

    def _receive(self, timeout_s: float) -> Any:
        assert self._pipe.poll(timeout_s), f"the engine did not answer within {timeout_s} s"
        answer = self._pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer


@contextmanager
def started(*engines: EngineProcess) -> Iterator[None]:
    try:
        for engine in engines:
            engine.wait_started()
        yield
    finally:
        for engine in engines:
            engine.close()


def _serve(
    pipe: Connection, settings: VllmSettings, model_dir: Path, role: Any, adapters: Mapping[str, Path] | None
) -> None:
    asyncio.run(_answer(pipe, settings, model_dir, role, adapters))


async def _answer(
    pipe: Connection, settings: VllmSettings, model_dir: Path, role: Any, adapters: Mapping[str, Path] | None
) -> None:
    engine = VllmEngine(settings, model_dir, model_dir.name, role, adapters)
    batches: list[Any] = []
    try:
        await engine.start()
    except Exception as error:
        pipe.send(error)
        return
    reader = asyncio.create_task(_collect(engine, batches))
    pipe.send("started")
    while (message := await asyncio.to_thread(pipe.recv)) is not None:
        name, args = message
        try:
            pipe.send(await _call(engine, batches, name, args))
        except Exception as error:
            pipe.send(error)
    reader.cancel()
    await engine.close()


async def _collect(engine: VllmEngine, batches: list[Any]) -> None:
    async for batch in engine.events():
        batches.append(batch)


async def _call(engine: VllmEngine, batches: list[Any], name: str, args: tuple[Any, ...]) -> Any:
    match name:
        case "generate":
            return await _generate(engine, *args)
        case "generate_all":
            return await asyncio.gather(*(_generate(engine, job) for job in args[0]))
        case "submit_and_abort":
            await engine.submit(args[0], lambda outputs: None)
            return await engine.abort([args[0].request_id])
        case "stats" | "info":
            return engine.stats() if name == "stats" else engine.info
        case "expert_layout":
            return engine.expert_layout()
        case "run":
            return await args[0](engine, *args[1:])
        case "events":
            return batches[args[0] :] if args else list(batches)
    return await getattr(engine, name)(*args)


async def _generate(engine: VllmEngine, job: DecodeJob) -> list[SequenceOutput]:
    outputs: list[SequenceOutput] = []
    ended = asyncio.Event()

    def sink(batch: list[SequenceOutput]) -> None:
        outputs.extend(batch)
        if batch[-1].finish_reason is not None:
            ended.set()

    await engine.submit(job, sink)
    async with asyncio.timeout(CALL_TIMEOUT_S):
        await ended.wait()
    return outputs
