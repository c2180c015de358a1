"""The REST surface: routes, bodies in, answers out."""

import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import orjson
from fastapi import FastAPI, Request, Response
from opentelemetry.trace import Tracer
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from omni_common.errors import Cancelled, InvalidRequest, NotFound, OmniError
from omni_proxy import __version__
from omni_proxy.admission import Admission
from omni_proxy.answering import Form, GenerationResponse, StreamWriter, WholeWriter, Writer, unexpected
from omni_proxy.bodies import HttpLimits, parsed
from omni_proxy.config_watch import ConfigPage
from omni_proxy.eager_send import EagerSend
from omni_proxy.explain import EXPLAIN_HEADER
from omni_proxy.generation import Generation, token_limits
from omni_proxy.give_way import give_way
from omni_proxy.kv_pages import KvPages
from omni_proxy.lifecycle import check_room
from omni_proxy.openai_answers import (
    ChatEvents,
    CompletionEvents,
    Envelope,
    chat_answer,
    completion_answer,
)
from omni_proxy.openai_errors import error_body, error_headers, status_of
from omni_proxy.openai_logprobs import CompletionRows, chat_logprobs
from omni_proxy.openai_requests import Options, Served, parse_chat, parse_completion
from omni_proxy.output_parser import Reading
from omni_proxy.prompt_requests import parse_detokenize, parse_tokenize
from omni_proxy.scheduling.request import Caller
from omni_proxy.sequence import Scheduler
from omni_proxy.status import StatusPages
from omni_proxy.tenants import Tenants
from omni_proxy.text import ModelText
from omni_proxy.tracing import RequestTrace

log = logging.getLogger(__name__)

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


@dataclass(frozen=True, slots=True)
class Api:
    """The generating routes; one method per route."""

    scheduler: Scheduler
    text: ModelText
    served: Served
    admission: Admission
    limits: HttpLimits
    tracer: Tracer
    tenants: Tenants

    async def chat(self, request: Request) -> ASGIApp:
        chat = await parsed(request, self.limits, partial(parse_chat, served=self.served))
        make_rows = None
        if chat.options.sampling.logprobs is not None:
            make_rows = lambda: partial(chat_logprobs, token_text=self.text.token_text)  # noqa: E731
        reading = Reading(self.text.format, chat.reads_calls, chat.shows_reasoning, chat.max_calls)
        form = Form(ChatEvents, ChatEvents.object_name, chat_answer, make_rows, reading if reading.is_needed else None)

        async def prompts() -> list[Sequence[int]]:
            rendered = await self.text.rendered(chat.messages, tools=chat.tools or None, **chat.template)
            reading.saw_prompt(rendered)
            return [await self.text.encode(rendered, add_special_tokens=chat.add_special_tokens)]

        return await self._generate(request, "chatcmpl", chat.options, 1, prompts, form, "messages")

    async def completions(self, request: Request) -> ASGIApp:
        asked = await parsed(request, self.limits, partial(parse_completion, served=self.served))
        make_rows = None
        if asked.options.sampling.logprobs is not None:
            shown = partial(self.text.detokenizer, skip_special_tokens=asked.options.skip_special_tokens)
            make_rows = lambda: CompletionRows(self.text.token_text, shown())  # noqa: E731
        texts = [self._as_text(p) for p in asked.prompts] if asked.echo else ()
        echoes = [text for text in texts for _ in range(asked.options.n)]
        form = Form(CompletionEvents, CompletionEvents.object_name, completion_answer, make_rows, echoes=echoes)

        async def prompts() -> list[Sequence[int]]:
            special = asked.add_special_tokens
            return [
                await self.text.encode(p, add_special_tokens=special) if isinstance(p, str) else p
                for p in asked.prompts
            ]

        return await self._generate(request, "cmpl", asked.options, len(asked.prompts), prompts, form, "prompt")

    async def tokenize(self, request: Request) -> Response:
        asked = await parsed(request, self.limits, partial(parse_tokenize, served=self.served))
        text = asked.prompt
        if text is None:
            text = await self.text.rendered(asked.messages, tools=asked.tools or None, **asked.template)
        tokens = await self.text.encode(text, add_special_tokens=asked.add_special_tokens)
        return _json({"count": len(tokens), "max_model_len": self.max_model_len, "tokens": tokens})

    async def detokenize(self, request: Request) -> Response:
        tokens = await parsed(request, self.limits, partial(parse_detokenize, served=self.served))
        return _json({"prompt": await self.text.decoded(tokens)})

    async def models(self, request: Request) -> Response:
        names = self._names()
        adapters = sorted(self.scheduler.fleet.adapters.served.difference(names))
        return _json({"object": "list", "data": [*map(self._model, names), *map(self._adapter, adapters)]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["model_id"]
        if name in self._names():
            return _json(self._model(name))
        if name in self.served.adapters:
            return _json(self._adapter(name))
        raise NotFound(f"the model {name!r} does not exist here", field="model", reason="model_not_found")

    @property
    def max_model_len(self) -> int | None:
        return self.scheduler.fleet.max_model_len or self.text.context_length

    async def _generate(
        self,
        request: Request,
        prefix: str,
        options: Options,
        num_prompts: int,
        make_prompts: Callable[[], Awaitable[list[Sequence[int]]]],
        form: Form,
        field: str,
    ) -> ASGIApp:
        leave, visit = self.admission.enter(num_prompts * options.n), None
        try:
            visit = self.tenants.enter(request.state.caller)
            prompts = await make_prompts()
            await give_way()
            max_model_len = self.max_model_len
            for index, tokens in enumerate(prompts):
                name = field if num_prompts == 1 else f"{field}[{index}]"
                if not tokens:
                    raise InvalidRequest(f"{name}: has no tokens", field=name, reason="empty_prompt")
                check_room(len(tokens), max_model_len, name)
            limits = token_limits(options, [len(p) for p in prompts], max_model_len)
            visit.charge(self._expected_tokens(prompts, limits, options.n))
            trace = RequestTrace(self.tracer, request.headers)
            generation = Generation(
                self.scheduler, self.text, options, prompts, limits, request_id_of(request),
                self.limits.request_timeout_s, trace, visit.caller, explains=request.headers.get(EXPLAIN_HEADER) == "1",
                rate_headers=visit.headers, show_marks=form.reading is not None,
            )  # fmt: skip
        except BaseException:
            leave()
            if visit is not None:
                visit.end()
            raise
        envelope = Envelope(f"{prefix}-{generation.request_id}", int(time.time()), options.model, options.include_usage)

        def writer(send: EagerSend) -> Writer:
            if options.stream:
                return StreamWriter(send, generation, envelope, form, options.continuous_usage)
            return WholeWriter(send, generation, envelope, form)

        def release() -> None:
            usage = generation.usage()
            leave()
            visit.end(usage.prompt_tokens + usage.completion_tokens)

        return GenerationResponse(generation, writer, self.served.model, release)

    def _expected_tokens(self, prompts: Sequence[Sequence[int]], limits: Sequence[int], n: int) -> int:
        """Of prompts and answers, as the tenant is charged until the answers have ended."""
        output = sum(self.scheduler.lengths.expect(limit) for limit in limits)
        return sum(map(len, prompts)) + n * output

    def _as_text(self, prompt: str | Sequence[int]) -> str:
        return prompt if isinstance(prompt, str) else self.text.decode(prompt)

    def _names(self) -> tuple[str, ...]:
        return (self.served.model, *self.served.aliases)

    def _adapter(self, name: str) -> dict[str, object]:
        return self._model(name) | {"root": name, "parent": self.served.model}

    def _model(self, name: str) -> dict[str, object]:
        return {
            "id": name,
            "object": "model",
            "created": 0,
            "owned_by": "omni",
            "root": self.served.model,
            "parent": None,
            "max_model_len": self.max_model_len,
        }


def request_id_of(request: Request) -> str:
    """The client's id where it is short printable ASCII, or a new one."""
    given = request.headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(16)


Handler = Callable[[Request], Awaitable[ASGIApp]]


class Front(FastAPI):
    """Hands `posts` over itself: what FastAPI wraps around an answer costs each request and each token.

    FastAPI has the pages, the answers to wrong paths and methods, and the description of everything.
    """

    def __init__(self, posts: Mapping[str, Handler], refusal: Callable[[Request, OmniError], Response]) -> None:
        super().__init__(title="Omni", version=__version__, redirect_slashes=False, docs_url=None, redoc_url=None)
        self._posts = posts
        self._refusal = refusal
        for path, handler in posts.items():
            self.add_api_route(path, handler, methods=["POST"], response_model=None)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        post = self._posts.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if post is None:
            await super().__call__(scope, receive, send)
            return
        request = Request(scope, receive)
        try:
            if (encoding := request.headers.get("content-encoding", "identity")) != "identity":
                raise InvalidRequest(f"content-encoding {encoding!r} is not read", reason="unsupported_encoding")
            answer = await post(request)
        except OmniError as error:
            answer = self._refusal(request, error)
        except ClientDisconnect:
            answer = self._refusal(request, Cancelled("the client left before its body's end", reason="client_gone"))
        except Exception as error:
            log.exception("request failed")
            answer = self._refusal(request, unexpected(error))
        await answer(scope, receive, send)


def create_app(api: Api, pages: StatusPages, kv: KvPages, config: ConfigPage) -> FastAPI:
    """Routes and error answers; everything they need is passed in. What is not open asks who is there first."""

    def refusal(request: Request, error: OmniError) -> Response:
        status = status_of(error)
        api.scheduler.metrics.requests.labels(str(status)).inc()
        headers = {
            **error_headers(error),
            **_rate_headers(api.tenants, request),
            "x-request-id": request_id_of(request),
        }
        return Response(orjson.dumps(error_body(error)), status, headers)

    posts = {
        "/v1/chat/completions": api.chat,
        "/v1/completions": api.completions,
        "/tokenize": api.tokenize,
        "/detokenize": api.detokenize,
        "/kv/prefix": kv.prefix,
    }
    app = Front({path: _guarded(api.tenants, handler) for path, handler in posts.items()}, refusal)
    for path, handler in (
        ("/v1/models", api.models),
        ("/v1/models/{model_id:path}", api.model),
        ("/workers", pages.workers),
        ("/saturation", pages.saturation),
        ("/decisions", pages.decisions),
        ("/decisions/{request_id:path}", pages.decision),
        ("/config", config.config),
        ("/kv", kv.summary),
        ("/kv/hottest", kv.hottest),
    ):
        app.add_api_route(path, _guarded(api.tenants, handler), methods=["GET"], response_model=None)
    for path, handler in (("/health", pages.health), ("/ready", pages.ready), ("/metrics", pages.metrics)):
        app.add_api_route(path, handler, methods=["GET"], response_model=None)

    async def on_omni_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, OmniError)
        return refusal(request, error)

    async def on_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if error.status_code == 405:
            wrong = InvalidRequest(f"{request.method} is not allowed here", reason="method_not_allowed")
            answer = refusal(request, wrong)
            answer.headers.update(error.headers or {})
            return answer
        return refusal(request, NotFound("no such path", reason="path_not_found"))

    async def on_unexpected(request: Request, error: Exception) -> Response:
        return refusal(request, unexpected(error))

    app.add_exception_handler(OmniError, on_omni_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(Exception, on_unexpected)
    return app


def _guarded(tenants: Tenants, handler: Handler) -> Handler:
    """`request.state.caller` is who asks; strangers are refused before anything is read of the body."""

    async def guarded(request: Request) -> ASGIApp:
        request.state.caller = tenants.caller_of(request.headers)
        return await handler(request)

    return guarded


def _rate_headers(tenants: Tenants, request: Request) -> Mapping[str, str]:
    caller: Caller | None = getattr(request.state, "caller", None)
    return {} if caller is None else tenants.rate_headers(caller)


def _json(body: object, status: int = 200) -> Response:
    return Response(orjson.dumps(body), status, media_type="application/json")
