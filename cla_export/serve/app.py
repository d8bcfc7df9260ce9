"""The HTTP application: routes, and how errors are told."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException

import cla_export
from cla_export.errors import BadInput
from cla_export.serve import handlers, schema
from cla_export.serve.answers import model_card
from cla_export.serve.bodies import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from cla_export.serve.engine import State
from cla_export.serve.errors import ApiError
from cla_export.serve.events import EventStream
from cla_export.serve.handlers import Job, Service
from cla_export.serve.intake import from_fault
from cla_export.serve.metrics import Metrics
from cla_export.serve.requests import DEAD
from cla_export.serve.streams import Streams
from cla_export.serve.watchdog import keep_watch


@dataclass(frozen=True, slots=True)
class Served:
    """What an application serves."""

    service: Service
    metrics: Metrics


def create_app(served: Served) -> FastAPI:
    """The application. Its engine runs already, and delivers to its streams."""
    service, metrics = served.service, served.metrics
    model, streams = service.model, service.streams

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        streams.listen()
        async with keep_watch(streams):
            yield

    app = FastAPI(
        title="cla-export",
        version=cla_export.__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    generic = app.openapi
    app.openapi = lambda: schema.document(generic(), model.name)  # type: ignore[method-assign]
    app.state.metrics, app.state.streams = metrics, streams
    _tell_errors(app, metrics)

    @app.post("/v1/completions", responses=schema.answered(schema.CompletionAnswer, stream=True))
    async def completions(body: CompletionBody, request: Request) -> Response:
        _check_model(body.model)
        return await _answer(
            await handlers.start_completion(service, body, _tenant(request)), request
        )

    @app.post("/v1/chat/completions", responses=schema.answered(schema.ChatAnswer, stream=True))
    async def chat(body: ChatBody, request: Request) -> Response:
        _check_model(body.model)
        return await _answer(await handlers.start_chat(service, body, _tenant(request)), request)

    @app.get("/v1/models", response_model=schema.ModelList, responses=schema.errors())
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model_card(model)]}

    @app.get(
        "/v1/models/{name:path}", response_model=schema.ModelCard, responses=schema.errors(404)
    )
    async def one_model(name: str) -> dict[str, Any]:
        _check_model(name)
        return dict(model_card(model))

    @app.post("/tokenize", response_model=schema.TokenizeAnswer, responses=schema.errors(400, 404))
    async def tokenize(body: TokenizeBody) -> dict[str, Any]:
        _check_model(body.model)
        _check_tokenizer()
        tokens = model.encode(body.prompt, add_special_tokens=body.add_special_tokens)
        return {"count": len(tokens), "max_model_len": model.capacity, "tokens": tokens}

    @app.post(
        "/detokenize", response_model=schema.DetokenizeAnswer, responses=schema.errors(400, 404)
    )
    async def detokenize(body: DetokenizeBody) -> dict[str, Any]:
        _check_model(body.model)
        _check_tokenizer()
        wrong = [token for token in body.tokens if not 0 <= token < model.vocab_size]
        if wrong:
            message = f"token id {wrong[0]}; expected 0 to {model.vocab_size - 1}"
            raise ApiError(400, message, param="tokens")
        return {"prompt": model.decode(body.tokens, skip_special_tokens=False)}

    _add_probes(app, streams)

    @app.get("/version", response_model=schema.VersionAnswer, responses=schema.errors())
    async def version() -> dict[str, str]:
        return {"version": cla_export.__version__}

    @app.get(
        "/metrics",
        response_class=PlainTextResponse,
        responses={200: schema.METRICS, **schema.errors()},
    )
    async def scrape() -> Response:
        return PlainTextResponse(metrics.text(streams.engine), media_type=metrics.content_type)

    def _check_model(name: str | None) -> None:
        if name not in (None, model.name):
            raise ApiError(
                404,
                f"there is no model {name!r}; this server has {model.name!r}",
                param="model",
                code="model_not_found",
            )

    def _check_tokenizer() -> None:
        if model.tokenizer is None:
            raise ApiError(400, "this model has no tokenizer", code="no_tokenizer")

    return app


def _add_probes(app: FastAPI, streams: Streams) -> None:
    @app.get("/health", response_model=schema.StatusAnswer, responses=schema.errors())
    async def health() -> dict[str, str]:
        """Whether the process is worth keeping."""
        engine = streams.engine
        if engine.state == State.dead:
            raise ApiError(503, engine.dead, code=DEAD)
        if engine.stalled:
            raise ApiError(503, "no step of the engine has ended for too long", code="stalled")
        return {"status": "ok"}

    @app.get("/ready", response_model=schema.StatusAnswer, responses=schema.errors())
    async def ready() -> dict[str, str]:
        """Whether new requests are taken."""
        await health()
        state = streams.engine.state
        if state != State.ready:
            raise ApiError(503, f"the engine is {state.value}", code="not_ready")
        return {"status": state.value}


def _tenant(request: Request) -> str:
    return str(getattr(request.state, "tenant", ""))


async def _answer(job: Job, request: Request) -> Response:
    if job.body.stream:
        return EventStream(await handlers.stream(job, request.receive), job.group.cancel)
    return JSONResponse(await handlers.complete(job, request.receive))


def _tell_errors(app: FastAPI, metrics: Metrics) -> None:
    """Every error has OpenAI's shape, and is counted."""

    def tell(error: ApiError) -> Response:
        metrics.refused(error.status, error.body["error"]["code"])
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(ApiError)
    async def ours(_request: Request, error: ApiError) -> Response:
        return tell(error)

    @app.exception_handler(BadInput)
    async def bad_input(_request: Request, error: BadInput) -> Response:
        return tell(ApiError(400, str(error)))

    @app.exception_handler(Exception)
    async def unforeseen(_request: Request, _error: Exception) -> Response:
        return tell(ApiError(500, "the server failed; its log says how"))

    @app.exception_handler(HTTPException)
    async def framework(_request: Request, error: HTTPException) -> Response:
        return tell(ApiError(error.status_code, str(error.detail), headers=error.headers))

    @app.exception_handler(RequestValidationError)
    async def invalid(_request: Request, error: RequestValidationError) -> Response:
        return tell(from_fault(error.errors()[0]))  # the first
