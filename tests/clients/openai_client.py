"""The openai package, as it is, against a running cluster: OPENAI_BASE_URL says where."""

import json
import sys
import time
import urllib.request

import openai
from openai import OpenAI

client = OpenAI(api_key="unused", max_retries=0)
FACTS = (
    "You answer questions about this register of depots. The code of Otter is 4711. "
    "The city of Otter is Oslo. The code of Raven is 9302. The city of Raven is Lima."
)
ASK = [
    {"role": "system", "content": FACTS},
    {"role": "user", "content": [{"type": "text", "text": "What is the code of Raven?"}]},
]


def models():
    (model,) = client.models.list().data  # the bundled model is the only one
    assert client.models.retrieve(model.id).max_model_len > 0


def chat():
    answer = client.chat.completions.create(model="", messages=ASK, temperature=0)
    choice = answer.choices[0]
    assert "9302" in choice.message.content, choice
    assert choice.finish_reason == "stop"
    usage = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    again = client.chat.completions.create(model="", messages=ASK, temperature=0)
    assert again.usage.prompt_tokens_details.cached_tokens > 0
    assert again.choices[0].message.content == choice.message.content


def stream():
    whole = client.chat.completions.create(model="", messages=ASK, temperature=0)
    chunks = list(
        client.chat.completions.create(
            model="", messages=ASK, temperature=0, stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens > 0


def logprobs():
    answer = client.chat.completions.create(
        model="", messages=ASK, max_completion_tokens=4, logprobs=True, top_logprobs=3, n=2,
        temperature=1, seed=7,
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    for choice in answer.choices:
        content = choice.logprobs.content
        assert len(content) == answer.usage.completion_tokens // 2
        assert all(len(token.top_logprobs) == 3 and token.logprob <= 0 for token in content)
        text = b"".join(bytes(token.bytes) for token in content)
        assert choice.message.content.encode() in text


def text():
    answer = client.completions.create(
        model="", prompt=["The code of", "The city of"], max_tokens=3, echo=True, logprobs=2,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    for choice, prompt in zip(answer.choices, ["The code of", "The city of"]):
        assert choice.text.startswith(prompt)
        assert choice.logprobs.token_logprobs[0] is None
        assert len(choice.logprobs.tokens) == len(choice.prompt_token_ids) + 3
        ids = choice.prompt_token_ids
        again = client.completions.create(model="", prompt=ids, max_tokens=3, temperature=0)
        assert again.usage.prompt_tokens == len(ids)


def metric(name):
    """What the coordinator shows for a series; 0 if it is not there yet."""
    url = str(client.base_url).removesuffix("/v1/") + "/metrics"
    with urllib.request.urlopen(url) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name + " "))


def until(condition, what):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.05)


def cancel():
    """A stream that is closed stops the work: the coordinator cancels all of them, and none runs on."""
    cancelled = 'baton_requests_total{outcome="cancelled"}'
    before = metric(cancelled)
    for _ in range(20):
        stream = client.completions.create(
            model="", prompt="The code of", max_tokens=2000, stream=True,
            extra_body={"ignore_eos": True},
        )
        next(iter(stream))
        stream.close()
    until(lambda: metric(cancelled) == before + 20, lambda: f"{metric(cancelled) - before} of 20 cancelled")
    until(lambda: metric("baton_requests_active") == 0, lambda: "requests run without clients")


def errors():
    def refused(kind, code, **more):
        try:
            client.chat.completions.create(**{"model": "", "messages": ASK, **more})
        except kind as error:
            assert error.code == code, error
            assert error.request_id, error
            return error
        raise AssertionError(f"{more} was not refused")

    error = refused(openai.BadRequestError, "invalid_value", temperature=3)
    assert error.param == "temperature"
    refused(openai.BadRequestError, "unsupported_parameter", extra_body={"frobnicate": 1})
    refused(openai.NotFoundError, "model_not_found", model="gpt-17")
    long = [{"role": "user", "content": "word " * 20000}]
    refused(openai.BadRequestError, "context_length_exceeded", messages=long)
    try:
        client.with_options(timeout=0.001).chat.completions.create(model="", messages=ASK)
    except openai.APITimeoutError:
        pass


def responses():
    ask = {"model": "", "instructions": FACTS, "input": "What is the code of Raven?", "temperature": 0}
    whole = client.responses.create(**ask, store=False)
    assert "9302" in whole.output_text and whole.status == "completed", whole
    with client.responses.stream(**ask) as stream:
        kinds = [event.type for event in stream]
        last = stream.get_final_response()
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed", kinds
    assert last.output_text == whole.output_text
    assert last.usage.output_tokens == whole.usage.output_tokens
    follow_up = [{"role": "user", "content": ask["input"]}, *whole.output]
    follow_up.append({"role": "user", "content": "And its city?"})
    again = client.responses.create(**{**ask, "input": follow_up})
    assert again.usage.input_tokens > whole.usage.input_tokens
    try:
        client.responses.create(**ask, previous_response_id=whole.id)
    except openai.BadRequestError as error:
        assert error.param == "previous_response_id"


DEPOT = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Oslo", "Lima"]},
        "code": {"type": "integer", "minimum": 0, "maximum": 9999},
        "tags": {"type": "array", "items": {"enum": ["old", "new"]}, "maxItems": 2},
    },
    "required": ["city", "code", "tags"],
    "additionalProperties": False,
}


def is_depot(depot):
    assert set(depot) == {"city", "code", "tags"}, depot
    assert depot["city"] in ["Oslo", "Lima"], depot
    assert type(depot["code"]) is int and 0 <= depot["code"] <= 9999, depot
    assert len(depot["tags"]) <= 2 and set(depot["tags"]) <= {"old", "new"}, depot


def json_schema():
    form = {"type": "json_schema", "json_schema": {"name": "depot", "schema": DEPOT, "strict": True}}
    for seed in range(5):
        ask = {"model": "", "messages": ASK, "response_format": form, "temperature": 1, "seed": seed}
        choice = client.chat.completions.create(**ask, max_tokens=2000).choices[0]
        assert choice.finish_reason == "stop", choice
        is_depot(json.loads(choice.message.content))
        chunks = client.chat.completions.create(**ask, max_tokens=2000, stream=True)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert text == choice.message.content, text
    cut = client.chat.completions.create(**ask, max_tokens=3).choices[0]
    assert cut.finish_reason == "length", cut
    bad = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}
    try:
        client.chat.completions.create(**{**ask, "response_format": bad})
    except openai.BadRequestError as error:
        assert error.param == "response_format", error
    else:
        raise AssertionError("a schema that is none was followed")


def tools():
    tool = {"name": "find_depot", "description": "Finds a depot", "parameters": DEPOT, "strict": True}
    other = {"name": "give_up", "parameters": {"type": "object", "properties": {}}}
    listed = [{"type": "function", "function": function} for function in [tool, other]]
    ask = {"model": "", "messages": ASK, "tools": listed, "temperature": 1, "max_tokens": 2000}
    named = {"type": "function", "function": {"name": "find_depot"}}
    for seed, choice in enumerate([named, named, named, "required"]):
        asked = {**ask, "tool_choice": choice, "seed": seed}
        answer = client.chat.completions.create(**asked).choices[0]
        assert answer.finish_reason == "tool_calls" and answer.message.content is None, answer
        (call,) = answer.message.tool_calls
        if choice == named or call.function.name == "find_depot":
            assert call.function.name == "find_depot", call
            is_depot(json.loads(call.function.arguments))
        streamed(asked, call)
    # The bundled model's template teaches no way to call tools, so it cannot choose to.
    try:
        client.chat.completions.create(**{**ask, "tools": listed[1:]})
    except openai.BadRequestError as error:
        assert error.param == "tools" and "tool_choice" in error.message, error
    else:
        raise AssertionError("tool_choice auto was served without a format for calls")
    answer = client.chat.completions.create(**{**ask, "tool_choice": "none", "temperature": 0})
    assert "9302" in answer.choices[0].message.content, answer
    result = [
        *ASK,
        {"role": "assistant", "tool_calls": [call.to_dict()]},
        {"role": "tool", "tool_call_id": call.id, "content": "none"},
    ]
    after = client.chat.completions.create(model="", messages=result, max_tokens=2)
    assert after.choices[0].finish_reason in ("length", "stop")


def streamed(asked, whole):
    """The same call in parts: its name first, then its arguments."""
    deltas = [chunk.choices[0] for chunk in client.chat.completions.create(**asked, stream=True)]
    calls = [call for delta in deltas for call in delta.delta.tool_calls or []]
    assert calls[0].id and calls[0].function.name == whole.function.name, calls
    assert {call.index for call in calls} == {0} and not any(delta.delta.content for delta in deltas)
    text = "".join(call.function.arguments or "" for call in calls)
    assert json.loads(text) == json.loads(whole.function.arguments), text
    assert deltas[-1].finish_reason == "tool_calls", deltas[-1]


def continued():
    """vLLM's way to let the answer go on where the last message ends."""
    begun = [*ASK, {"role": "assistant", "content": "The code of Raven is"}]
    more = {"add_generation_prompt": False, "continue_final_message": True}
    answer = client.chat.completions.create(model="", messages=begun, temperature=0, extra_body=more)
    assert "9302" in answer.choices[0].message.content, answer


def twice():
    """A request that is sent again under its name while it runs is refused, and served later."""
    name = {"idempotency-key": "client-17", "x-request-id": "trace-1"}
    ask = {"model": "", "prompt": "The code of", "max_tokens": 2000, "extra_body": {"ignore_eos": True}}
    first = client.completions.create(**ask, stream=True, extra_headers=name)
    next(iter(first))
    try:
        client.completions.create(**ask, stream=True, extra_headers=name)
    except openai.ConflictError as error:
        assert error.code == "duplicate_request" and error.request_id == "trace-1", error
        assert error.response.headers["x-should-retry"] == "true"
    else:
        raise AssertionError("it was computed twice at a time")
    first.close()
    patient = client.with_options(max_retries=5)
    again = patient.completions.create(**ask, stream=True, extra_headers=name)
    next(iter(again))
    again.close()


def embeddings():
    texts = ["The code of Otter is 4711.", "The code of Raven is 9302."]
    both = client.embeddings.create(model="", input=texts)  # the package asks for base64
    assert [item.index for item in both.data] == [0, 1]
    first, second = (item.embedding for item in both.data)
    assert len(first) == len(second) and first != second
    assert abs(sum(x * x for x in first) - 1) < 1e-4
    floats = client.embeddings.create(model="", input=texts[0], encoding_format="float")
    assert max(abs(x - y) for x, y in zip(first, floats.data[0].embedding)) < 1e-6
    assert both.usage.total_tokens == both.usage.prompt_tokens > floats.usage.prompt_tokens > 0
    mean = client.embeddings.create(model="", input=texts[0], extra_body={"pooling": "mean"})
    assert mean.data[0].embedding != first
    by_ids = client.embeddings.create(model="", input=[[5, 6, 7], [8]])
    assert by_ids.usage.prompt_tokens == 4
    try:
        client.embeddings.create(model="", input=texts, dimensions=8)
    except openai.BadRequestError as error:
        assert error.param == "dimensions", error
    else:
        raise AssertionError("dimensions were not refused")


CHECKS = [
    models, chat, stream, logprobs, text, embeddings, cancel, errors, responses, json_schema, tools, continued, twice,
]
for check in CHECKS:
    check()
    print(f"openai {openai.__version__}: {check.__name__} ok", flush=True)
sys.exit(0)
