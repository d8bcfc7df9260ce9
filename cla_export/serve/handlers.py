"""What the endpoints that generate do: a body becomes requests, their outputs an answer."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from cla_export.errors import BadInput
from cla_export.serve.answers import (
    Answer,
    CompletionChoice,
    Json,
    Usage,
    chat_logprobs,
    ending,
    join,
)
from cla_export.serve.bodies import ChatBody, CompletionBody, Generation, Prompt
from cla_export.serve.chat import TemplateRefused
from cla_export.serve.engine import NotReady, QueueFull
from cla_export.serve.errors import ApiError, from_failure, from_refusal
from cla_export.serve.events import DONE, event, watch
from cla_export.serve.gate import Receive
from cla_export.serve.intake import check_length, encode, make_request
from cla_export.serve.model import ServedModel
from cla_export.serve.requests import Output, Request
from cla_export.serve.streams import Group, Streams

_INLINE = 4000  # characters that are tokenized in the event loop; more go to a thread
Shape = Callable[[int, Output], Json]  # what an output of a choice looks like


@dataclass(frozen=True, slots=True)
class Service:
    """What handlers work with. `seconds` is the time that a request has in all."""

    model: ServedModel
    streams: Streams
    seconds: float

    def deadline(self) -> float:
        """When a request that comes now must have ended, by the engine's clock."""
        return self.streams.engine.clock() + self.seconds


@dataclass(frozen=True, slots=True)
class Job:
    """A body's sequences, running, and how their outputs are told."""

    group: Group
    requests: list[Request]
    answer: Answer
    usage: Usage
    choices: int  # of each prompt
    body: Generation
    shape: Shape  # of a chunk
    whole: Shape  # of a choice that is told at once
    first: list[Json]  # choices told before anything is generated


async def start_completion(service: Service, body: CompletionBody, tenant: str) -> Job:
    """Queue what a body asks for. ApiError if it cannot be."""
    model = service.model
    prompts = [await _encode(model, prompt, body.add_special_tokens) for prompt in body.prompt]
    told = body.logprobs is not None and body.echo
    deadline = service.deadline()
    requests = [
        make_request(
            model,
            body,
            prompt,
            body.max_tokens,
            deadline,
            choice=choice,
            tenant=tenant,
            logprobs=body.logprobs,
            prompt_logprobs=body.logprobs if told else None,
        )
        for prompt in prompts
        for choice in range(body.n)
    ]
    shapes = [
        CompletionChoice(
            model,
            request,
            index,
            model.decode(request.prompt, skip_special_tokens=False) if body.echo else None,
        )
        for index, request in enumerate(requests)
    ]

    def shape(index: int, output: Output) -> Json:
        return shapes[index].to_json(output, ids=body.return_token_ids)

    group = _submit(service, requests, "prompt")
    answer = Answer(model, "text_completion", "cmpl")
    usage = Usage(sum(map(len, prompts)))
    return Job(group, requests, answer, usage, body.n, body, shape, shape, [])


async def start_chat(service: Service, body: ChatBody, tenant: str) -> Job:
    """Queue what a body asks for. ApiError if it cannot be."""
    model = service.model
    if model.template is None:
        raise ApiError(
            400,
            "this model has no chat template; use /v1/completions, or start the server with "
            "--chat-template FILE",
            code="no_chat_template",
        )
    messages = [{"role": m.role, "content": m.text} for m in body.messages]
    try:
        text = model.template.render(messages)
    except TemplateRefused as error:
        raise ApiError(400, str(error), param="messages", code="invalid_messages") from error
    prompt = await _encode(model, text, False)
    most = body.max_completion_tokens or body.max_tokens
    room = model.capacity - len(prompt)
    deadline = service.deadline()
    requests = [
        make_request(
            model,
            body,
            prompt,
            most or max(room, 1),
            deadline,
            choice=choice,
            tenant=tenant,
            logprobs=body.top_logprobs if body.logprobs else None,
        )
        for choice in range(body.n)
    ]

    def told(output: Output, content: Json, key: str, index: int) -> Json:
        choice: Json = {"index": index, key: content, "logprobs": None}
        if body.logprobs:
            choice["logprobs"] = chat_logprobs(model, output.logprobs)
        if body.return_token_ids:
            choice["token_ids"] = list(output.tokens)
        return choice | ending(output.finish)

    def chunk(index: int, output: Output) -> Json:
        return told(output, {"content": output.text} if output.text else {}, "delta", index)

    def whole(index: int, output: Output) -> Json:
        content = {"role": "assistant", "content": output.text, "refusal": None}
        return told(output, content, "message", index)

    first: list[Json] = [
        {
            "index": index,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
        for index in range(body.n)
    ]
    group = _submit(service, requests, "messages")
    kind = "chat.completion.chunk" if body.stream else "chat.completion"
    answer = Answer(model, kind, "chatcmpl")
    return Job(group, requests, answer, Usage(len(prompt)), body.n, body, chunk, whole, first)


async def complete(job: Job, receive: Receive) -> Json:
    """The whole answer. A client that leaves meanwhile is noticed: nobody then reads an error."""
    watching = asyncio.create_task(watch(receive, job.group.cancel))
    outputs: list[list[Output]] = [[] for _ in job.requests]
    try:
        async for index, output in job.group:
            if output.failure is not None:
                raise from_failure(output.failure)
            outputs[index].append(output)
            job.usage.add(output, index % job.choices)
    finally:
        watching.cancel()
        job.group.cancel()
    choices = [job.whole(index, join(found)) for index, found in enumerate(outputs)]
    return job.answer.to_json(choices) | {"usage": job.usage.to_json()}


async def stream(job: Job, receive: Receive) -> AsyncIterator[bytes]:
    """The answer as events. ApiError if it fails before the first; after that, an event says so."""
    options = job.body.stream_options
    watching = asyncio.create_task(watch(receive, job.group.cancel))
    try:
        found = await job.group.read()
    finally:
        watching.cancel()
    failures = [output.failure for _, output in found if output.failure is not None]
    if failures:
        job.group.cancel()
        raise from_failure(failures[0])

    def chunk(choices: list[Json], usage: Json | None = None) -> bytes:
        content = job.answer.to_json(choices)
        if usage is not None or options.include_usage:
            content["usage"] = usage
        return event(content)

    async def events() -> AsyncIterator[bytes]:
        nonlocal found
        for choice in job.first:
            yield chunk([choice])
        while found:
            pieces: list[bytes] = []
            for index, output in found:
                if output.failure is not None:
                    yield b"".join(pieces) + event(from_failure(output.failure).body) + DONE
                    return
                job.usage.add(output, index % job.choices)
                so_far = job.usage.to_json() if options.continuous_usage_stats else None
                pieces.append(chunk([job.shape(index, output)], so_far))
            yield b"".join(pieces)
            found = await job.group.read()
        yield (chunk([], job.usage.to_json()) if options.include_usage else b"") + DONE

    return events()


async def _encode(model: ServedModel, prompt: Prompt, add_special_tokens: bool) -> list[int]:
    if isinstance(prompt, str) and len(prompt) >= _INLINE:
        return await asyncio.to_thread(encode, model, prompt, add_special_tokens)
    return encode(model, prompt, add_special_tokens)


def _submit(service: Service, requests: list[Request], param: str) -> Group:
    for request in requests:
        check_length(service.model, request, param)
    try:
        return service.streams.submit(requests)
    except (QueueFull, NotReady) as error:
        raise from_refusal(error) from error
    except BadInput as error:
        raise ApiError(400, str(error), param=param) from error
