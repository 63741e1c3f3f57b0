"""The openai package, as it is, against a running cluster: OPENAI_BASE_URL says where."""

import sys

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


def cancel():
    """A stream that is closed stops the work: the coordinator counts no running request."""
    for _ in range(20):
        stream = client.completions.create(
            model="", prompt="The code of", max_tokens=2000, stream=True,
            extra_body={"ignore_eos": True},
        )
        next(iter(stream))
        stream.close()
    answer = client.completions.create(model="", prompt="The code of", max_tokens=2)
    assert answer.choices[0].finish_reason in ("length", "stop")


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


for check in [models, chat, stream, logprobs, text, cancel, errors, responses]:
    check()
    print(f"openai {openai.__version__}: {check.__name__} ok", flush=True)
sys.exit(0)
