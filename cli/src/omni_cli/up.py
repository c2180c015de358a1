"""`omni up` and `omni down`: from options to a healthy stack with a first answer, and back."""

import asyncio
import contextlib
import json
import signal
from collections.abc import Coroutine, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from omni_cli import logfiles, machine, processes
from omni_cli.chat import Answer, ChatClient
from omni_cli.errors import InvalidOptions, NoAnswer, StackExists, StartFailed
from omni_cli.plan import StackOptions, plan_stack
from omni_cli.progress import progress_on
from omni_cli.restarts import RestartPolicy
from omni_cli.stack import Death, Stack
from omni_cli.state import StackState, StateFiles

TAIL_LINES = 25
# Longer than the services' own drain_timeout_s, so that they end by themselves.
STOP_TIMEOUT_S = 40.0
FIRST_QUESTION = "Hello! Who are you?"
FIRST_ANSWER_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Bringup:
    """How a stack is started; what is started is in `StackOptions`."""

    detach: bool = False
    timeout_s: float = 600.0
    ask: bool = True


async def bring_up(
    options: StackOptions, bringup: Bringup, files: StateFiles, root: Path, environ: Mapping[str, str], console: Console
) -> None:
    """Start a stack, wait until it is healthy, ask it one question; stay until a signal unless detached.

    Raises:
        CliError: the options do not fit the machine, the stack runs already, or a service failed; nothing is left
            running then.
    """
    require_model(options)
    await _clear_leftovers(options.name, files)
    machine.require_free(options.host, options.port)
    plan = plan_stack(options, machine.read_machine(), machine.free_ports(files.reserved_ports() | {options.port}))
    for note in plan.notes:
        console.print(f"note: {note}", highlight=False)
    stack = Stack(plan, files, environ, root, supervised=not bringup.detach)
    is_left_running = False
    with _signals() as (interrupted, hurried):
        try:
            is_complete = await _start(stack, bringup, interrupted, console)
            is_left_running = is_complete and bringup.detach
            if is_left_running:
                console.print(f"omni down --name {options.name} stops it.", highlight=False)
            elif is_complete:
                console.print("Ctrl-C stops it.", highlight=False)
                await stack.watch(interrupted, RestartPolicy(), lambda death: show_death(death, console))
        except StartFailed as failure:
            show_tail(stack.log_path(failure.service), console)
            raise
        finally:
            if not is_left_running:
                await _stop(stack, hurried, console)


async def bring_down(state: StackState, files: StateFiles, timeout_s: float) -> list[str]:
    """Stop a stack; its supervisor first, which stops the rest. Returns the names that had to be killed."""
    if state.supervisor is not None and (supervisor := state.supervisor.process()) is not None:
        supervisor.send_signal(signal.SIGTERM)
        await processes.wait_gone(state.supervisor, timeout_s + processes.KILL_GRACE_S)
    # Read again: the supervisor may have restarted a process since.
    leftovers = next((s for s in files.all() if s.name == state.name), state)
    killed = await processes.stop(leftovers.processes, timeout_s)
    files.remove(state.name)
    return killed


def require_model(options: StackOptions) -> None:
    """Raises InvalidOptions unless the folder holds a tokenizer and, for vLLM, a config, in JSON, as do adapters."""
    needed = ["tokenizer.json"] + (["config.json"] if options.engine == "vllm" else [])
    missing = [name for name in needed if not (options.model_dir / name).is_file()]
    if missing:
        raise InvalidOptions(f"{options.model_dir} has no {', '.join(missing)}; pass a model folder with --model")
    if options.engine == "vllm":
        for name, folder in options.adapters.items():
            if not (folder / "adapter_config.json").is_file():
                raise InvalidOptions(f"--adapter {name}: {folder} has no adapter_config.json, as PEFT writes it")
    for path in (options.model_dir / "tokenizer.json", options.model_dir / "config.json"):
        try:
            json.loads(path.read_bytes() if path.is_file() else "{}")
        except ValueError as error:
            raise InvalidOptions(f"{path} is not JSON: {error}") from None


def show_tail(path: Path, console: Console) -> None:
    """The end of a service's log, for the reader of a failure."""
    lines = logfiles.tail(path, TAIL_LINES)
    console.rule(f"{path} (end)", style="red", align="left")
    console.print("\n".join(lines) or "(empty)", markup=False, highlight=False, soft_wrap=True)
    console.rule(style="red")


def show_death(death: Death, console: Console) -> None:
    show_tail(death.log_path, console)
    after = "stays down: it died too often" if death.restart_in_s is None else f"restarts in {death.restart_in_s:.0f} s"
    console.print(f"{death.name} ended with exit code {death.exit_code}; {after}", style="bold red", highlight=False)


async def _start(stack: Stack, bringup: Bringup, interrupted: asyncio.Event, console: Console) -> bool:
    """Bring every process up and ask; False if a signal came first."""
    stack.start()
    with progress_on(console) as progress:
        if not await _finishes(stack.wait_healthy(progress, bringup.timeout_s), interrupted):
            return False
    console.print(f"\n[bold green]{stack.plan.name} is healthy[/]: {stack.url}", highlight=False, soft_wrap=True)
    return not bringup.ask or await _finishes(asyncio.to_thread(show_first_answer, stack.url, console), interrupted)


async def _finishes(work: Coroutine[Any, Any, None], interrupted: asyncio.Event) -> bool:
    """Run `work` to its end and pass on its error; False, with it cancelled, if a signal comes first."""
    working, signalled = asyncio.ensure_future(work), asyncio.ensure_future(interrupted.wait())
    try:
        await asyncio.wait({working, signalled}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            return False
        working.result()
        return True
    finally:
        for task in (working, signalled):
            task.cancel()
        await asyncio.gather(working, signalled, return_exceptions=True)


def show_first_answer(url: str, console: Console) -> None:
    """Ask one question through HTTP and print the answer as it streams. Raises NoAnswer."""
    client, answer = ChatClient(url), Answer()
    try:
        model = client.model()
        console.print(f"{model} > {FIRST_QUESTION}", style="dim", highlight=False, markup=False)
        messages = [{"role": "user", "content": FIRST_QUESTION}]
        for piece in client.stream(model, messages, answer, max_tokens=FIRST_ANSWER_TOKENS, temperature=None):
            console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
    finally:
        client.close()
    if answer.ttft_ms is None:
        raise NoAnswer("the first answer was empty")
    rate = f", {answer.tokens_per_s:.0f} tokens/s after it" if answer.tokens_per_s else ""
    console.print(f"\nfirst token after {answer.ttft_ms:.0f} ms{rate}", style="dim", highlight=False)


async def _clear_leftovers(name: str, files: StateFiles) -> None:
    """Processes of a stack whose `omni up` was killed are stopped; a stack that is watched or detached is not."""
    state = next((s for s in files.all() if s.name == name), None)
    files.directory(name)
    if state is None:
        return
    is_orphaned = state.supervisor is not None and state.supervisor.process() is None
    if state.is_running() and not is_orphaned:
        raise StackExists(f"stack {name!r} is running at {state.url}: omni status, omni down --name {name}")
    await processes.stop(state.processes, STOP_TIMEOUT_S)
    files.remove(name)


async def _stop(stack: Stack, hurried: asyncio.Event, console: Console) -> None:
    console.print(f"stopping {stack.plan.name} ... (Ctrl-C again: at once)", highlight=False)
    if not await _finishes(_stop_gently(stack, console), hurried):
        await stack.stop(0)
    console.print(f"{stack.plan.name} stopped", highlight=False)


async def _stop_gently(stack: Stack, console: Console) -> None:
    for name in await stack.stop(STOP_TIMEOUT_S):
        console.print(f"{name} did not stop in time and was killed", style="yellow", highlight=False)


@contextlib.contextmanager
def _signals() -> Iterator[tuple[asyncio.Event, asyncio.Event]]:
    """Two events: SIGINT, SIGTERM and SIGHUP set the first; any of them again sets the second."""
    interrupted, hurried = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def on_signal() -> None:
        (hurried if interrupted.is_set() else interrupted).set()

    for number in numbers:
        loop.add_signal_handler(number, on_signal)
    try:
        yield interrupted, hurried
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
