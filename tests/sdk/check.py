"""Drives a running Rewake server with the official OpenAI package, the way its users do.

    python check.py http://127.0.0.1:8080
    python check.py http://127.0.0.1:8080 --keys FIRST SECOND

The first form wants a server without keys. The second wants one whose two keys belong to two tenants, with
`engine.seats = 1` and `engine.queue = 1`, so that it is soon full. It starts nothing; the last line says how it went.
"""

import argparse
import asyncio
import sys
import traceback
import uuid

import openai
from openai import AsyncOpenAI, OpenAI

# What is checked of an open server, and of one with keys.
OPEN, KEYED = [], []
# Never ends by itself: end of text is banned, and so is a token limit within reach.
ENDLESS = {"prompt": "Once upon a time", "max_tokens": 1_000_000, "logit_bias": {"0": -100}}
STORY = [{"role": "user", "content": "Tell me a story about a dog."}]


def check(kind):
    return lambda function: kind.append(function) or function


def raises(expected, call, **attributes):
    """Runs `call`, which must raise `expected` with these attributes, and returns the error."""
    try:
        result = call()
    except expected as error:
        for name, value in attributes.items():
            found = getattr(error, name)
            assert found == value, f"{name} is {found!r}, not {value!r}: {error}"
        assert error.body.keys() == {"message", "type", "param", "code"}, error.body
        assert error.message and error.request_id
        return error
    raise AssertionError(f"{expected.__name__} was not raised; the answer was {result!r}")


def state_of(reply):
    """The `state` object of a reply, which the SDK keeps among the fields it does not know."""
    state = reply.model_extra["state"]
    assert state == reply.choices[0].model_extra["state"]
    return state


def name(what):
    """A new name for a session or request, so that a run does not meet an earlier one's."""
    return f"{what}-{uuid.uuid4()}"


def ids_of(client, session):
    """The token ids of every turn of a session."""
    path = f"/sessions/{session}/turns?token_ids=true"
    return [turn["token_ids"] for turn in client.get(path, cast_to=object)["data"]]


# Models


@check(OPEN)
def models_are_listed_and_shown(client, model):
    listed = client.models.list().data
    assert [m.object for m in listed] == ["model"] * len(listed)
    shown = client.models.retrieve(model)
    assert (shown.id, shown.owned_by) == (listed[0].id, listed[0].owned_by) and shown.created > 0
    assert shown.model_extra["rewake"]["vocabulary"] > 256


@check(OPEN)
def an_unknown_model_is_not_found(client, model):
    unknown = {"code": "model_not_found", "param": "model", "status_code": 404}
    raises(openai.NotFoundError, lambda: client.models.retrieve("gpt-17"), code="model_not_found")
    raises(openai.NotFoundError, lambda: client.completions.create(model="gpt-17", prompt="a"), **unknown)
    raises(openai.NotFoundError, lambda: client.chat.completions.create(model="a/b", messages=STORY), **unknown)


# Completions


@check(OPEN)
def a_completion_has_the_shape_of_openai_s(client, model):
    reply = client.completions.create(model=model, prompt="Once upon a time", max_tokens=12, temperature=0)
    assert reply.object == "text_completion" and reply.id.startswith("cmpl-") and reply.model == model
    assert isinstance(reply.created, int) and reply.system_fingerprint.startswith("fp_")
    [choice] = reply.choices
    assert choice.text and (choice.index, choice.finish_reason, choice.logprobs) == (0, "length", None)
    assert reply.usage.completion_tokens == 12 and reply.usage.prompt_tokens > 0
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + 12
    assert reply.usage.prompt_tokens_details.cached_tokens == 0
    # OpenAI's default is 16.
    assert client.completions.create(model=model, prompt="One day").usage.completion_tokens <= 16


@check(OPEN)
def prompts_have_four_forms(client, model):
    def texts(prompt, **more):
        reply = client.completions.create(model=model, prompt=prompt, temperature=0, max_tokens=8, **more)
        assert [choice.index for choice in reply.choices] == list(range(len(reply.choices)))
        return [choice.text for choice in reply.choices]

    session = name("ids")
    [text] = texts("Once upon a time", extra_body={"session_id": session})
    [ids] = ids_of(client, session)
    ids = ids[:-8]
    [other] = texts("The dog")
    assert text != other
    assert texts(ids) == [text]
    assert texts(["Once upon a time", "The dog"]) == [text, other]
    assert texts([ids, ids]) == [text, text]
    # Index = prompt × n + choice.
    assert texts(["Once upon a time", "The dog"], n=2) == [text, text, other, other]
    assert len(texts("")) == 1
    for wrong in ([], ["a", 1], [10**6], {"text": "a"}):
        error = raises(openai.BadRequestError, lambda: client.completions.create(model=model, prompt=wrong))
        assert error.param.startswith("prompt"), error


@check(OPEN)
def n_choices_differ_and_the_first_is_what_it_is_alone(client, model):
    ask = dict(model=model, prompt="Once upon a time", max_tokens=20, temperature=1, seed=5)
    one, three = client.completions.create(**ask), client.completions.create(**ask, n=3)
    texts = [choice.text for choice in three.choices]
    assert texts[0] == one.choices[0].text and len(set(texts)) == 3, texts
    assert three.usage.prompt_tokens == one.usage.prompt_tokens
    assert three.usage.completion_tokens == 60


@check(OPEN)
def a_stop_string_ends_the_text_before_it(client, model):
    ask = dict(model=model, prompt="Once upon a time", max_tokens=30, temperature=0)
    whole = client.completions.create(**ask).choices[0].text
    # Any few characters from the middle, which need not be whole tokens.
    stop = whole[21:25]
    for stops in (stop, [stop, "never said"]):
        choice = client.completions.create(**ask, stop=stops).choices[0]
        assert (choice.text, choice.finish_reason) == (whole[: whole.index(stop)], "stop")
    streamed = [chunk.choices[0].text for chunk in client.completions.create(**ask, stop=stop, stream=True)]
    assert "".join(streamed) == whole[: whole.index(stop)]


@check(OPEN)
def a_streamed_completion_is_the_same_text(client, model):
    ask = dict(model=model, prompt="Once upon a time", max_tokens=20, seed=9, n=2)
    whole = client.completions.create(**ask)
    chunks = list(client.completions.create(**ask, stream=True))
    assert {chunk.object for chunk in chunks} == {"text_completion"} and len({chunk.id for chunk in chunks}) == 1
    for choice in whole.choices:
        pieces = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert "".join(piece.text for piece in pieces) == choice.text
        assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
        assert pieces[-1].finish_reason == choice.finish_reason
    assert not any("usage" in chunk.model_fields_set for chunk in chunks)


@check(OPEN)
def usage_comes_last_in_a_stream_that_asks_for_it(client, model):
    asked = dict(model=model, max_tokens=10, stream=True, stream_options={"include_usage": True})
    for stream in (
        client.completions.create(**asked, prompt="Once upon a time"),
        client.chat.completions.create(**asked, messages=STORY),
    ):
        *chunks, last = list(stream)
        assert chunks and all(chunk.choices for chunk in chunks)
        assert all(chunk.usage is None and "usage" in chunk.model_fields_set for chunk in chunks)
        assert last.choices == [] and 0 < last.usage.completion_tokens <= 10
        assert last.usage.total_tokens == last.usage.prompt_tokens + last.usage.completion_tokens


@check(OPEN)
def a_seed_repeats_its_text(client, model):
    def text(seed):
        ask = dict(model=model, prompt="Once upon a time", max_tokens=30, temperature=1, seed=seed)
        return client.completions.create(**ask).choices[0].text

    assert text(7) == text(7) != text(8)
    assert text(-7) == text(-7)


@check(OPEN)
def logit_bias_forces_and_bans(client, model):
    def ids(bias):
        session = name("bias")
        ask = dict(model=model, prompt="Once", max_tokens=3, temperature=0, logit_bias=bias)
        client.completions.create(**ask, extra_body={"session_id": session})
        return ids_of(client, session)[0][-3:]

    free = ids({})
    assert ids({"300": 100}) == [300, 300, 300]
    banned = ids({str(free[0]): -100})
    assert free[0] not in banned
    refused = lambda: client.completions.create(model=model, prompt="a", logit_bias={"300": 101})
    raises(openai.BadRequestError, refused, param="logit_bias.300")


# Chat


@check(OPEN)
def a_chat_has_the_shape_of_openai_s(client, model):
    reply = client.chat.completions.create(model=model, messages=STORY, max_completion_tokens=400, temperature=0)
    assert reply.object == "chat.completion" and reply.id.startswith("chatcmpl-")
    [choice] = reply.choices
    assert (choice.message.role, choice.message.refusal, choice.logprobs) == ("assistant", None, None)
    assert choice.message.content == choice.message.content.strip() != ""
    assert choice.finish_reason == "stop", "the demonstration model ends its stories"
    assert not choice.message.tool_calls
    parts = [{"role": "user", "content": [{"type": "text", "text": STORY[0]["content"]}]}]
    same = client.chat.completions.create(model=model, messages=parts, max_tokens=400, temperature=0)
    assert same.choices[0].message.content == choice.message.content
    short = client.chat.completions.create(model=model, messages=STORY, max_tokens=3)
    assert (short.choices[0].finish_reason, short.usage.completion_tokens) == ("length", 3)


@check(OPEN)
def a_streamed_chat_begins_with_the_role_and_ends_with_the_reason(client, model):
    ask = dict(model=model, messages=STORY, max_tokens=20, seed=3)
    whole = client.chat.completions.create(**ask).choices[0]
    chunks = list(client.chat.completions.create(**ask, stream=True))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    first, *middle, last = [chunk.choices[0] for chunk in chunks]
    assert (first.delta.role, first.delta.content, first.finish_reason) == ("assistant", "", None)
    assert all(piece.delta.role is None and piece.finish_reason is None for piece in middle)
    assert "".join(piece.delta.content for piece in middle) == whole.message.content
    assert (last.finish_reason, last.delta.content) == (whole.finish_reason, None)


@check(OPEN)
def the_sdk_s_own_stream_reader_understands_it(client, model):
    # It refuses answers that were cut off, so this one must end by itself.
    ask = dict(model=model, messages=STORY, max_tokens=1000, temperature=0)
    with client.chat.completions.stream(**ask) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert final.choices[0].message.content == "".join(d for d in deltas if d)
    assert final.choices[0].message.content == client.chat.completions.create(**ask).choices[0].message.content


# Errors


@check(OPEN)
def wrong_values_are_bad_requests_that_name_them(client, model):
    complete = lambda **more: lambda: client.completions.create(**{"model": model, "prompt": "a", **more})
    chat = lambda **more: lambda: client.chat.completions.create(**{"model": model, "messages": STORY, **more})
    state = "st_" + 44 * "0"
    for call, param in [
        (complete(temperature=2.5), "temperature"),
        (complete(temperature="hot"), "temperature"),
        (complete(top_p=-1), "top_p"),
        (complete(n=0), "n"),
        (complete(presence_penalty=3), "presence_penalty"),
        (complete(stop=""), "stop"),
        (complete(stop=["x"] * 10_000), "stop"),
        (complete(seed=1.5), "seed"),
        (complete(stream_options={"include_usage": True}), "stream_options"),
        (complete(extra_body={"top_k": -2}), "top_k"),
        (complete(extra_body={"state_id": state, "session_id": "a"}), "session_id"),
        (complete(n=2, extra_body={"session_id": "a"}), "session_id"),
        (complete(extra_body={"session_id": "no spaces"}), "session_id"),
        (chat(messages=[]), "messages"),
        (chat(messages=[{"role": "narrator", "content": "a"}]), "messages[0].role"),
        (chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), "messages[0].content[0]"),
        (chat(max_completion_tokens=0), "max_completion_tokens"),
    ]:
        error = raises(openai.BadRequestError, call, status_code=400, type="invalid_request_error")
        assert error.param and error.param.startswith(param), f"{error.param!r} should name {param!r}: {error}"


@check(OPEN)
def what_is_not_supported_is_refused_by_name(client, model):
    complete = lambda **more: lambda: client.completions.create(model=model, prompt="a", **more)
    chat = lambda **more: lambda: client.chat.completions.create(model=model, messages=STORY, **more)
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    for call, param in [
        (complete(logprobs=1), "logprobs"),
        (complete(echo=True), "echo"),
        (complete(suffix="end"), "suffix"),
        (complete(best_of=2), "best_of"),
        (chat(logprobs=True), "logprobs"),
        (chat(tools=[tool]), "tools"),
        (chat(tool_choice="required"), "tool_choice"),
        (chat(response_format={"type": "json_object"}), "response_format"),
        (chat(reasoning_effort="high"), "reasoning_effort"),
    ]:
        raises(openai.BadRequestError, call, param=param, code="unsupported_parameter")


@check(OPEN)
def neutral_values_and_metadata_are_welcome(client, model):
    client.chat.completions.create(
        model=model,
        messages=STORY,
        max_tokens=1,
        logprobs=False,
        tools=[],
        tool_choice="auto",
        response_format={"type": "text"},
        user="somebody",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        safety_identifier="x",
    )


@check(OPEN)
def unknown_routes_and_methods_are_errors_of_the_sdk(client, model):
    raises(openai.NotFoundError, lambda: client.get("/nowhere", cast_to=object), code="unknown_url")
    raises(openai.APIStatusError, lambda: client.put("/models", cast_to=object), status_code=405)
    raises(openai.NotFoundError, lambda: client.embeddings.create(model=model, input="a"))


# Extras


@check(OPEN)
def extra_parameters_are_honoured_and_unknown_ones_are_told(client, model):
    ask = dict(model=model, prompt="Once upon a time", max_tokens=20)
    greedy = client.completions.create(**ask, temperature=0).choices[0].text
    best = client.completions.create(**ask, temperature=1, extra_body={"top_k": 1}).choices[0].text
    assert best == greedy
    sure = client.completions.create(**ask, temperature=1, extra_body={"min_p": 1.0}).choices[0].text
    assert sure == greedy
    penal = client.completions.create(**ask, temperature=0, extra_body={"repetition_penalty": 5.0}).choices[0].text
    assert penal != greedy
    raw = client.completions.with_raw_response.create(**ask, extra_body={"mirostat": 2, "top_k": 1})
    assert raw.headers["x-ignored-params"] == "mirostat"
    assert raw.parse().choices[0].text


@check(OPEN)
def every_reply_has_a_request_id(client, model):
    ask = dict(model=model, prompt="a", max_tokens=1)
    first, second = client.completions.create(**ask), client.completions.create(**ask)
    assert first._request_id and first._request_id != second._request_id
    own = name("request")
    assert client.completions.create(**ask, extra_headers={"X-Request-Id": own})._request_id == own
    wrong = lambda: client.completions.create(**ask, temperature=9, extra_headers={"X-Request-Id": own})
    raises(openai.BadRequestError, wrong, request_id=own)
    with client.completions.with_streaming_response.create(**ask, stream=True) as raw:
        assert raw.headers["x-request-id"] and raw.headers["content-type"].startswith("text/event-stream")


@check(OPEN)
def the_async_client_gets_the_same(client, model):
    ask = dict(model=model, prompt="Once upon a time", max_tokens=20)
    alone = [client.completions.create(**ask, seed=seed).choices[0].text for seed in range(8)]

    async def streamed(other, seed):
        stream = await other.completions.create(**ask, seed=seed, stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def together():
        async with AsyncOpenAI(base_url=client.base_url, api_key="any", timeout=client.timeout) as other:
            return await asyncio.gather(*(streamed(other, seed) for seed in range(8)))

    assert asyncio.run(together()) == alone


# States and sessions


@check(OPEN)
def a_state_goes_on_as_if_nothing_had_happened(client, model):
    ask = dict(model=model, temperature=1, seed=11)
    whole = client.completions.create(**ask, prompt="Once upon a time", max_tokens=24).choices[0].text
    raw = client.completions.with_raw_response.create(
        **ask, prompt="Once upon a time", max_tokens=10, extra_body={"store_state": True}
    )
    begun = raw.parse()
    state = state_of(begun)
    assert raw.headers["x-state-id"] == state["id"] and state["id"].startswith("st_")
    assert state["tokens"] == begun.usage.total_tokens and state["bytes"] > 0
    assert (state["parent"], state["session_id"], state["turn"]) == (None, None, 1)

    on = dict(**ask, prompt="", max_tokens=14, extra_body={"state_id": state["id"]})
    # A state is never used up: the second time is a fork.
    for _ in range(2):
        end = client.completions.create(**on)
        assert begun.choices[0].text + end.choices[0].text == whole
        assert state_of(end)["parent"] == state["id"] and state_of(end)["id"] != state["id"]
        details = end.usage.prompt_tokens_details
        assert 0 < details.cached_tokens <= end.usage.prompt_tokens == state["tokens"]

    chunks = list(client.completions.create(**on, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == end.choices[0].text
    assert [chunk.model_extra.get("state") is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert state_of(chunks[-1])["parent"] == state["id"]


@check(OPEN)
def without_asking_no_state_is_kept(client, model):
    raw = client.completions.with_raw_response.create(model=model, prompt="a", max_tokens=1)
    assert "x-state-id" not in raw.headers and "state" not in raw.parse().model_extra


@check(OPEN)
def states_can_be_looked_at_and_deleted(client, model):
    ask = dict(model=model, prompt="a", max_tokens=1, extra_body={"store_state": True, "state_ttl_s": 3600})
    kept = state_of(client.completions.create(**ask))
    shown = client.get(f"/states/{kept['id']}", cast_to=object)
    assert (shown["id"], shown["model"], shown["expires_at"]) == (kept["id"], model, kept["expires_at"])
    client.delete(f"/states/{kept['id']}", cast_to=object)
    resume = lambda: client.completions.create(model=model, prompt="a", extra_body={"state_id": kept["id"]})
    raises(openai.NotFoundError, resume, code="state_not_found", param="state_id")
    gone = lambda: client.get(f"/states/{kept['id']}", cast_to=object)
    raises(openai.NotFoundError, gone, code="state_not_found")


@check(OPEN)
def a_session_remembers_what_was_said(client, model):
    session = name("chat")
    say = lambda text, **more: client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": text}], max_tokens=200, temperature=0, **more
    )
    first = say("Tell me a story about a dog.", extra_body={"session_id": session})
    second = say("What happened then?", extra_body={"session_id": session})
    head = state_of(second)
    assert (head["session_id"], head["turn"], head["parent"]) == (session, 2, state_of(first)["id"])
    # The same conversation in one request has the same answer: nothing was lost by not sending it again.
    transcript = [
        {"role": "user", "content": "Tell me a story about a dog."},
        {"role": "assistant", "content": first.choices[0].message.content},
        {"role": "user", "content": "What happened then?"},
    ]
    whole = client.chat.completions.create(model=model, messages=transcript, max_tokens=200, temperature=0)
    assert whole.choices[0].message.content == second.choices[0].message.content
    assert whole.usage.prompt_tokens == second.usage.prompt_tokens
    assert second.usage.prompt_tokens_details.cached_tokens > first.usage.prompt_tokens

    shown = client.get(f"/sessions/{session}", cast_to=object)
    assert (shown["head"], shown["turn"]) == (head["id"], 2)
    said = client.get(f"/sessions/{session}/turns", cast_to=object)["data"]
    assert [turn["messages"][-1]["content"] for turn in said] == [
        reply.choices[0].message.content for reply in (first, second)
    ]
    # An older turn is still there to start from.
    again = say("What happened then?", extra_body={"state_id": state_of(first)["id"]})
    assert again.choices[0].message.content == second.choices[0].message.content
    client.delete(f"/sessions/{session}", cast_to=object)
    raises(openai.NotFoundError, lambda: client.get(f"/sessions/{session}", cast_to=object), code="session_not_found")


@check(OPEN)
def a_session_takes_one_turn_at_a_time(client, model):
    session = name("busy")
    with client.completions.create(**ENDLESS, model=model, stream=True, extra_body={"session_id": session}) as stream:
        next(iter(stream))
        second = lambda: client.completions.create(model=model, prompt="a", extra_body={"session_id": session})
        error = raises(openai.ConflictError, second, code="session_busy", param="session_id")
        # Otherwise the SDK would try again by itself.
        assert error.response.headers["x-should-retry"] == "false"


@check(OPEN)
def a_turn_can_insist_on_the_head(client, model):
    turn = dict(model=model, prompt="a", max_tokens=1, extra_body={"session_id": name("head")})
    first, second = state_of(client.completions.create(**turn)), state_of(client.completions.create(**turn))
    on = lambda state: {"If-Match": f'"{state["id"]}"'}
    stale = lambda: client.completions.create(**turn, extra_headers=on(first))
    raises(openai.APIStatusError, stale, status_code=412, code="session_conflict")
    assert state_of(client.completions.create(**turn, extra_headers=on(second)))["turn"] == 3


@check(OPEN)
def a_repeated_idempotency_key_runs_once(client, model):
    turn = dict(model=model, prompt="Once", max_tokens=5, extra_body={"session_id": name("once")})
    key = {"Idempotency-Key": name("key")}
    first, again = [client.completions.create(**turn, extra_headers=key) for _ in range(2)]
    assert (again.id, state_of(again), again.choices[0].text) == (first.id, state_of(first), first.choices[0].text)
    assert state_of(client.completions.create(**turn))["turn"] == 2


# Responses and conversations


def ask(model, text, **more):
    return {"model": model, "input": text, "temperature": 0, "max_output_tokens": 12, **more}


@check(OPEN)
def a_response_has_the_shape_of_openai_s_and_is_kept(client, model):
    response = client.responses.create(**ask(model, "A dog?", metadata={"a": "b"}, instructions="Be brief."))
    assert response.id.startswith("resp_") and response.object == "response" and response.model == model
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert response.output_text and response.output[0].content[0].text == response.output_text
    assert response.usage.output_tokens == 12 and response.usage.total_tokens == response.usage.input_tokens + 12
    assert response.metadata == {"a": "b"} and response.instructions == "Be brief."
    assert client.responses.retrieve(response.id) == response
    [item] = list(client.responses.input_items.list(response.id))
    assert (item.role, item.content[0].text) == ("user", "A dog?")
    client.responses.delete(response.id)
    raises(openai.NotFoundError, lambda: client.responses.retrieve(response.id), code="response_not_found")


@check(OPEN)
def a_response_goes_on_from_the_state_of_another(client, model):
    first = client.responses.create(**ask(model, "A dog?"))
    on = [client.responses.create(**ask(model, "And a cat?", previous_response_id=first.id)) for _ in range(2)]
    assert on[0].output_text == on[1].output_text
    # But for what was sampled last and not yet read.
    assert first.usage.total_tokens - on[0].usage.input_tokens_details.cached_tokens < 12
    gone = lambda: client.responses.create(**ask(model, "And?", previous_response_id="resp_0"))
    raises(openai.NotFoundError, gone, code="response_not_found")


@check(OPEN)
def a_response_is_streamed_and_its_stream_read_again(client, model):
    with client.responses.stream(**ask(model, "A dog?")) as stream:
        events = list(stream)
    # `get_final_response` knows no other end than `response.completed`.
    final = events[-1].response
    assert [event.sequence_number for event in events] == list(range(len(events)))
    said = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert said == final.output_text == client.responses.create(**ask(model, "A dog?")).output_text
    assert [events[0].type, events[-1].type] == ["response.created", "response.incomplete"]
    again = list(client.responses.retrieve(final.id, stream=True, starting_after=6))
    assert [event.sequence_number for event in again] == list(range(7, len(events)))


@check(OPEN)
def a_response_in_the_background_is_polled_and_cancelled(client, model):
    response = client.responses.create(**ask(model, "A dog?", background=True))
    while response.status in ("queued", "in_progress"):
        response = client.responses.retrieve(response.id)
    assert response.output_text == client.responses.create(**ask(model, "A dog?")).output_text
    # Neither the end of text nor the line break, two of which end an answer of the embedded model.
    endless = ask(model, "A dog?", background=True, extra_body={"logit_bias": {"0": -100, "199": -100}})
    running = client.responses.create(**endless | {"max_output_tokens": 900_000})
    assert client.responses.cancel(running.id).status == "cancelled"
    assert client.responses.retrieve(running.id).status == "cancelled"


@check(OPEN)
def a_conversation_keeps_its_items(client, model):
    hello = {"type": "message", "role": "user", "content": "Hello."}
    conversation = client.conversations.create(metadata={"topic": "dogs"}, items=[hello])
    response = client.responses.create(**ask(model, "A dog?", conversation=conversation.id))
    assert response.conversation.id == conversation.id
    items = list(client.conversations.items.list(conversation.id, order="asc"))
    assert [item.content[0].text for item in items] == ["Hello.", "A dog?", response.output_text]
    client.conversations.items.create(conversation.id, items=[hello])
    assert len(list(client.conversations.items.list(conversation.id, limit=2))) == 4
    assert client.conversations.items.retrieve(items[0].id, conversation_id=conversation.id) == items[0]
    client.conversations.items.delete(items[0].id, conversation_id=conversation.id)
    assert client.conversations.update(conversation.id, metadata={"topic": "cats"}).metadata == {"topic": "cats"}
    assert client.conversations.retrieve(conversation.id).metadata == {"topic": "cats"}
    client.conversations.delete(conversation.id)
    raises(openai.NotFoundError, lambda: client.conversations.retrieve(conversation.id), code="conversation_not_found")


@check(OPEN)
def what_responses_cannot_do_is_refused_by_name(client, model):
    for name, value in (("tools", [{"type": "web_search"}]), ("reasoning", {"effort": "high"}), ("top_logprobs", 3)):
        refused = lambda: client.responses.create(**ask(model, "A dog?", **{name: value}))
        raises(openai.BadRequestError, refused, param=name, code="unsupported_parameter")


@check(OPEN)
def a_stream_goes_on_after_its_connection_was_lost(client, model):
    told = dict(model=model, prompt="Once upon a time", max_tokens=40, seed=3)
    whole = client.completions.create(**told).choices[0].text
    with client.completions.create(**told, stream=True) as stream:
        chunk = next(iter(stream))
    text, path = chunk.choices[0].text, f"/streams/{chunk.id}"
    rest = client.get(path, cast_to=openai.types.Completion, stream=True, stream_cls=openai.Stream[openai.types.Completion],
                      options={"headers": {"Last-Event-ID": f"{chunk.id}:0"}})
    assert text + "".join(chunk.choices[0].text for chunk in rest) == whole


# A server with keys


@check(KEYED)
def a_key_is_needed(client, other, model):
    for key in ("sk-wrong", "sk-" + "x" * 1000):
        stranger = client.with_options(api_key=key)
        for call in (
            lambda: stranger.models.list(),
            lambda: stranger.completions.create(model=model, prompt="a"),
            lambda: stranger.get("/states", cast_to=object),
        ):
            raises(openai.AuthenticationError, call, status_code=401, code="invalid_api_key")


@check(KEYED)
def each_key_opens_its_own_tenant_only(client, other, model):
    session = name("mine")
    mine = dict(model=model, prompt="a", max_tokens=1, extra_body={"session_id": session})
    kept = state_of(client.completions.create(**mine))
    resume = dict(model=model, prompt="b", max_tokens=1, extra_body={"state_id": kept["id"]})
    assert state_of(client.completions.create(**resume))["parent"] == kept["id"]
    raises(openai.NotFoundError, lambda: other.completions.create(**resume), code="state_not_found")
    raises(openai.NotFoundError, lambda: other.get(f"/states/{kept['id']}", cast_to=object), code="state_not_found")
    raises(openai.NotFoundError, lambda: other.get(f"/sessions/{session}", cast_to=object), code="session_not_found")
    assert all(seen["id"] != kept["id"] for seen in other.get("/states", cast_to=object)["data"])
    # The name is free in the other tenant, and another session there.
    assert state_of(other.completions.create(**mine))["turn"] == 1


@check(KEYED)
def a_full_server_says_when_to_come_back(client, other, model):
    endless = lambda: client.completions.create(**ENDLESS, model=model, stream=True)
    running, waiting = endless(), endless()
    ask = dict(model=model, prompt="a", max_tokens=1)
    error = raises(
        openai.RateLimitError,
        lambda: client.with_options(max_retries=0).completions.create(**ask),
        code="rate_limit_exceeded",
        type="rate_limit_error",
    )
    assert int(error.response.headers["retry-after"]) >= 1 and int(error.response.headers["retry-after-ms"]) > 0
    # Readers that leave give their places back; the SDK waits as long as it was told.
    running.close(), waiting.close()
    assert client.with_options(max_retries=10).completions.create(**ask).choices


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("url", help="where the server listens, without /v1")
    arguments.add_argument("--keys", nargs=2, metavar="KEY", help="keys of two tenants of a server that needs them")
    given = arguments.parse_args()

    keys = given.keys or ["any"]
    clients = [OpenAI(base_url=f"{given.url}/v1", api_key=key, timeout=60) for key in keys]
    model = clients[0].models.list().data[0].id
    checks = KEYED if given.keys else OPEN
    failed = 0
    for one in checks:
        try:
            one(*clients, model)
            print(f"ok      {one.__name__}")
        except Exception:
            failed += 1
            print(f"FAILED  {one.__name__}\n{traceback.format_exc()}")
    print(f"openai {openai.__version__}: {len(checks) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
