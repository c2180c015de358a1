"""The `omni` command: arguments in, exit code out."""

import asyncio
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from omni_cli import __version__, doctor, logfiles, report
from omni_cli.chat import Answer, ChatClient
from omni_cli.config_commands import config_app
from omni_cli.errors import CliError, InvalidOptions, NoSuchStack
from omni_cli.explain_commands import EXPLAIN_EPILOG, explain
from omni_cli.extensions import Commands
from omni_cli.facts import probe_facts
from omni_cli.kv_commands import kv_app
from omni_cli.machine import find_root
from omni_cli.options import Home, Name, Port, Url, adapter_folders, chosen, files_of, logged, proxy_url
from omni_cli.plan import StackOptions
from omni_cli.status import Condition, read_all
from omni_cli.up import STOP_TIMEOUT_S, Bringup, bring_down, bring_up
from omni_cli.workers_commands import workers_app
from omni_common.command import examples
from omni_common.errors import InvalidRequest, NotFound, OmniError

EXIT_UNHEALTHY, EXIT_DEGRADED = 3, 5
EXIT_CODES = {InvalidRequest: InvalidOptions.exit_code, NotFound: NoSuchStack.exit_code}
"""Of what extensions raise; anything else is 1."""
FOLLOW_INTERVAL_S = 0.2
DEFAULT_MODEL = Path("models") / "tiny-moe"

app = typer.Typer(
    name="omni",
    cls=Commands,
    help="Run an Omni stack on this machine and look at it.\n\nStart with [bold]omni doctor[/], then [bold]omni up[/].",
    epilog="Exit code: 0 done; 1 it failed, or nobody answers; 2 options or arguments are wrong; 3 the answer is no: "
    "not healthy, not valid, not the same; 4 no such stack or service; 5 a stack is degraded.",
    rich_markup_mode="rich",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

app.add_typer(kv_app, name="kv")
app.add_typer(config_app, name="config")
app.add_typer(workers_app, name="workers")


@app.command(
    epilog=examples(
        "omni up",
        "omni up --engine sim --prefill 2 --decode 4 --port 8100 --detach",
        "omni up --expert-ranks 2 --spare-experts 4",
        "omni up --adapter sql=adapters/sql --adapter poet=adapters/poet",
        "omni up --redis redis://cache:6379 --otlp http://collector:4317 --model ~/models/Qwen3-30B-A3B",
    )
)
def up(
    prefill: Annotated[int, typer.Option(min=0, help="Prefill engines; 0 lets decode engines do both.")] = 1,
    decode: Annotated[int, typer.Option(min=0, help="Decode engines.")] = 1,
    both: Annotated[int, typer.Option(min=0, help="Engines that take both legs.")] = 0,
    engine: Annotated[
        str, typer.Option(help="[bold]vllm[/], or [bold]sim[/]: no model runs, timing is simulated.")
    ] = "vllm",
    model: Annotated[Path | None, typer.Option(help="Model folder.", show_default="models/tiny-moe")] = None,
    host: Annotated[str, typer.Option(help="Address the proxy listens on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the proxy; all others are free ones.")] = 8000,
    name: Annotated[str | None, typer.Option(help="Name of this stack.", show_default="p<port>")] = None,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Return when healthy; stop with omni down.")] = False,
    redis: Annotated[str | None, typer.Option(help="Redis URL.", show_default="an embedded server")] = None,
    otlp: Annotated[str | None, typer.Option(help="OTLP gRPC endpoint for traces.", show_default="no traces")] = None,
    kv_cache_gib: Annotated[
        float | None, typer.Option(min=0.01, help="KV cache of each engine, GiB.", show_default="1")
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option(min=1, help="Longest prompt + answer, tokens.", show_default="the model's")
    ] = None,
    expert_ranks: Annotated[
        int, typer.Option(min=0, help="Spread each engine's experts over so many ranks; placement evens their load.")
    ] = 0,
    spare_experts: Annotated[
        int, typer.Option(min=0, help="Slots per layer for second copies of busy experts, over all ranks.")
    ] = 0,
    kernels: Annotated[
        str, typer.Option(help="Whose ops the engines run on: vllm, omni, or parts as in omni:norms,routing.")
    ] = "vllm",
    speculative: Annotated[
        str | None, typer.Option(help="Draft tokens: mtp:2 (prediction layers), ngram:3, or auto:2 for either.")
    ] = None,
    attention_pattern: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="Layers that decode over few KV blocks: a file of omni attention search."
        ),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FOLDER", help="LoRA adapter that clients ask for by its name; may be repeated."),
    ] = None,
    timeout_s: Annotated[float, typer.Option(min=1, help="How long to wait until all is healthy, seconds.")] = 600,
    ask: Annotated[bool, typer.Option(help="Ask a first question when healthy.")] = True,
    home: Home = None,
) -> None:
    """Start a stack: Redis, kvstore, placement, prefill and decode engines, proxy.

    Shows each service while it comes up, then a first streamed answer, and stays until Ctrl-C. A service that dies
    meanwhile is started again. Several stacks run side by side under different --port. Engines get cores of their
    own where there are enough. Settings of single services come from the environment (OMNI_PROXY_MAX_INFLIGHT=64).
    """
    root, files = find_root(Path.cwd()), files_of(home)
    stack_name = name or f"p{port}"
    options = StackOptions(
        name=stack_name, directory=files.directory(stack_name), model_dir=(model or root / DEFAULT_MODEL).resolve(),
        prefill=prefill, decode=decode, both=both, engine=engine, host=host, port=port, redis_url=redis,
        otlp_endpoint=otlp, kv_cache_gib=kv_cache_gib, max_model_len=max_model_len,
        expert_ranks=expert_ranks, spare_experts=spare_experts, kernels=kernels,
        speculative=speculative,
        attention_pattern=attention_pattern.resolve() if attention_pattern else None,
        adapters=adapter_folders(adapter or ()),
        https=any(os.environ.get(f"{prefix}TLS__CERT_FILE") for prefix in ("OMNI_", "OMNI_PROXY_")),
    )  # fmt: skip
    bringup = Bringup(detach=detach, timeout_s=timeout_s, ask=ask)
    asyncio.run(bring_up(options, bringup, files, root, os.environ, Console()))


@app.command(epilog=examples("omni down", "omni down --port 8100", "omni down --all"))
def down(
    name: Name = None,
    port: Port = None,
    every: Annotated[bool, typer.Option("--all", help="Every stack of this home.")] = False,
    timeout_s: Annotated[
        float, typer.Option(min=0, help="Time to finish running requests, seconds; 0 kills at once.")
    ] = STOP_TIMEOUT_S,
    home: Home = None,
) -> None:
    """Stop a stack: running requests finish, what does not stop in time is killed.

    Only processes the stack started are touched: they are known by pid and start time.
    """
    files, console = files_of(home), Console()
    states = list(files.all()) if every else [chosen(files, name, port)]
    if not states:
        console.print("no stack is recorded")
    for state in states:
        killed = asyncio.run(bring_down(state, files, timeout_s))
        console.print(f"{state.name} stopped" + (f"; killed: {', '.join(killed)}" if killed else ""), highlight=False)


@app.command(
    epilog=examples(
        "omni status",
        "omni status --json | jq .stacks",
        exit_codes="0 all healthy, 3 one is not, 4 nothing runs, 5 one is degraded",
    )
)
def status(
    name: Name = None,
    port: Port = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    home: Home = None,
) -> None:
    """Services, their health and ports, and the workers the proxy sees, for every stack or one.

    A stack is [bold]healthy[/] when all its services are and every worker takes work; [bold]degraded[/] when it serves
    without some worker: one that is drained or ejected, or one named in the proxy's settings that does not answer; else
    [bold]not healthy[/].
    """
    files = files_of(home)
    states = [chosen(files, name, port)] if name is not None or port is not None else list(files.all())
    stacks = asyncio.run(read_all(states))
    if as_json:
        print(json.dumps({"stacks": [stack.to_json() for stack in stacks]}, indent=2))
    else:
        report.show_stacks(stacks, Console())
    if not stacks:
        raise typer.Exit(NoSuchStack.exit_code)
    conditions = {stack.condition for stack in stacks}
    if Condition.NOT_HEALTHY in conditions:
        raise typer.Exit(EXIT_UNHEALTHY)
    if Condition.DEGRADED in conditions:
        raise typer.Exit(EXIT_DEGRADED)


@app.command(
    epilog=examples(
        "omni chat",
        "omni chat 'What is a mixture of experts?'",
        "omni chat --system 'Answer in rhymes.'",
        "omni chat --model poet 'What is a mixture of experts?'",
    )
)
def chat(
    prompt: Annotated[str | None, typer.Argument(help="One question; left out: a conversation.")] = None,
    url: Url = None,
    model: Annotated[
        str | None, typer.Option(help="Model or adapter to talk to.", show_default="the stack's model")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Bound of one answer, tokens.")] = 512,
    temperature: Annotated[
        float | None, typer.Option(min=0, max=2, help="0: always the likeliest token.", show_default="the model's")
    ] = None,
    name: Name = None,
    port: Port = None,
    home: Home = None,
) -> None:
    """Talk to a stack; answers stream. Ctrl-D or an empty line ends a conversation."""
    client = ChatClient(proxy_url(url, home, name, port))
    messages = [{"role": "system", "content": system}] if system else []
    try:
        chosen_model = model or client.model()
        while question := prompt if prompt is not None else _read_question():
            messages.append({"role": "user", "content": question})
            answer = Answer()
            for piece in client.stream(chosen_model, messages, answer, max_tokens=max_tokens, temperature=temperature):
                print(piece, end="", flush=True)
            print()
            messages.append({"role": "assistant", "content": answer.text})
            if prompt is not None:
                return
    finally:
        client.close()


def _read_question() -> str:
    try:
        return input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return ""


@app.command(
    "doctor",
    epilog=examples("omni doctor", "omni doctor --redis redis://cache:6379 --json", exit_codes="1 if a check fails"),
)
def doctor_command(
    model: Annotated[Path | None, typer.Option(help="Model folder.", show_default="models/tiny-moe")] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port a proxy would take.")] = 8000,
    redis: Annotated[str | None, typer.Option(help="Redis URL to try.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Check this machine and environment, and say how to mend what is wrong."""
    root = find_root(Path.cwd())
    checks = doctor.examine(probe_facts(root, (model or root / DEFAULT_MODEL).resolve(), port, redis))
    if as_json:
        print(json.dumps({name: asdict(check) for name, check in checks.items()}, indent=2))
    else:
        report.show_checks(checks, Console())
    raise typer.Exit(1 if doctor.has_failed(checks) else 0)


@app.command(epilog=examples("omni logs", "omni logs decode-0 -f", "omni logs proxy --lines 200"))
def logs(
    service: Annotated[str | None, typer.Argument(help="proxy, prefill-0, ...; left out: all of them.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until Ctrl-C.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="How many to begin with.")] = 40,
    name: Name = None,
    port: Port = None,
    home: Home = None,
) -> None:
    """Show the logs of a stack's services, made readable. They stay after the stack has stopped (--name)."""
    files = files_of(home)
    stack = logged(files, name, port)
    paths = {path.stem: path for path in sorted(files.logs(stack).glob("*.log"))}
    if service is not None and service not in paths:
        raise InvalidOptions(f"no log of {service!r} in stack {stack!r} (there are: {', '.join(paths) or 'none'})")
    shown = {service: paths[service]} if service is not None else paths
    followers = {key: logfiles.Follower(path) for key, path in shown.items()}
    for key, path in shown.items():
        for line in logfiles.tail(path, lines):
            print(f"{key:<12} {line}")
    while follow:
        for key, follower in followers.items():
            for line in follower.new_lines():
                print(f"{key:<12} {line}", flush=True)
        time.sleep(FOLLOW_INTERVAL_S)


app.command(epilog=EXPLAIN_EPILOG)(explain)


@app.command()
def version() -> None:
    """Print the version of this command."""
    print(__version__)


def main() -> None:
    """Entry point: errors of this package become one line and an exit code."""
    code = _run()
    sys.stdout.flush()
    sys.stderr.flush()
    # gRPC's threads have been seen to hold up an interpreter's exit for minutes after a channel to a dead process.
    os._exit(code)


def _run() -> int:
    try:
        app()
    except CliError as error:
        _say(str(error))
        return error.exit_code
    except OmniError as error:
        option = error.field or ""
        _say(f"{option}: {error.message}" if option.startswith("-") and option not in error.message else error.message)
        return next((code for kind, code in EXIT_CODES.items() if isinstance(error, kind)), 1)
    except KeyboardInterrupt:
        return 130
    except SystemExit as left:
        return left.code if isinstance(left.code, int) else int(left.code is not None)
    return 0


def _say(message: str) -> None:
    Console(stderr=True).print(f"[bold red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
