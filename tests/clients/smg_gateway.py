"""SMG, as it is, in front of a running cluster: its HTTP API is asked, it asks the coordinator's gRPC port.

usage: smg_gateway.py GATEWAY_URL COORDINATOR_URL    (needs openai; the coordinator's is that of its HTTP API)
"""

import sys
import threading
import time
import urllib.request

import openai
from openai import OpenAI

gateway_url, coordinator_url = sys.argv[1:]
gateway = OpenAI(base_url=f"{gateway_url}/v1", api_key="unused", max_retries=0)
coordinator = OpenAI(base_url=f"{coordinator_url}/v1", api_key="unused", max_retries=0)
MODEL = "demo"
FACTS = (
    "You answer questions about this register of depots. The code of Otter is 4711. "
    "The city of Otter is Oslo. The code of Raven is 9302. The city of Raven is Lima."
)
ASK = [
    {"role": "system", "content": FACTS},
    {"role": "user", "content": "What is the code of Raven?"},
]


def active():
    """Requests that the coordinator computes now."""
    with urllib.request.urlopen(f"{coordinator_url}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    (line,) = [line for line in lines if line.startswith("vllm:num_requests_running")]
    return float(line.split()[-1])


def until(condition, what):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def models():
    assert MODEL in [model.id for model in gateway.models.list().data]


def chat():
    """The same words as without the gateway: it renders, tokenizes and detokenizes itself."""
    direct = coordinator.chat.completions.create(model=MODEL, messages=ASK, temperature=0)
    through = gateway.chat.completions.create(model=MODEL, messages=ASK, temperature=0)
    assert through.choices[0].message.content == direct.choices[0].message.content, through
    assert "9302" in through.choices[0].message.content
    assert through.choices[0].finish_reason == "stop"
    assert through.usage.prompt_tokens == direct.usage.prompt_tokens
    assert through.usage.completion_tokens == direct.usage.completion_tokens
    assert through.usage.prompt_tokens_details.cached_tokens > 0, through.usage


def stream():
    whole = gateway.chat.completions.create(model=MODEL, messages=ASK, temperature=0)
    chunks = list(
        gateway.chat.completions.create(
            model=MODEL, messages=ASK, temperature=0, stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert len([c for c in chunks if c.choices and c.choices[0].delta.content]) > 1
    (usage,) = [c.usage for c in chunks if c.usage]
    assert usage.completion_tokens == whole.usage.completion_tokens, usage


def logprobs():
    ask = {"messages": ASK, "temperature": 0, "max_tokens": 4, "logprobs": True, "top_logprobs": 2}
    through = gateway.chat.completions.create(model=MODEL, **ask).choices[0].logprobs.content
    direct = coordinator.chat.completions.create(model=MODEL, **ask).choices[0].logprobs.content
    assert len(through) == len(direct) == 4
    for one, other in zip(through, direct):
        assert abs(one.logprob - other.logprob) < 1e-5 and len(one.top_logprobs) == 2, (one, other)


def stops():
    answer = gateway.chat.completions.create(
        model=MODEL, messages=ASK, temperature=0, stop=["02"], max_tokens=50
    )
    assert "02" not in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    cut = gateway.chat.completions.create(model=MODEL, messages=ASK, temperature=0, max_tokens=2)
    assert cut.choices[0].finish_reason == "length" and cut.usage.completion_tokens == 2


def schema():
    import json

    wanted = {"type": "object", "properties": {"code": {"type": "integer"}}, "required": ["code"],
              "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": wanted, "strict": True}}
    answer = gateway.chat.completions.create(
        model=MODEL, messages=ASK, temperature=0, response_format=form, max_tokens=200
    )
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(answer.choices[0].message.content)["code"], int)


def cancel():
    """A stream that its client closes is cancelled at the coordinator, through the gateway."""
    stream = gateway.chat.completions.create(
        model=MODEL, messages=ASK, stream=True, max_tokens=3000, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    until(lambda: active() == 1, "it does not run")
    stream.close()
    until(lambda: active() == 0, "it is not cancelled")


def at_once():
    """Many at a time, each with its own answer."""
    wrong = []

    def ask():
        answer = gateway.chat.completions.create(model=MODEL, messages=ASK, temperature=0)
        if "9302" not in answer.choices[0].message.content:
            wrong.append(answer)

    threads = [threading.Thread(target=ask) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[0]


def errors():
    try:
        gateway.chat.completions.create(model=MODEL, messages=ASK, temperature=0, n=99)
    except openai.APIStatusError as error:
        assert 400 <= error.status_code < 500, error
    else:
        raise AssertionError("n = 99 was served")


for check in [models, chat, stream, logprobs, stops, schema, cancel, at_once, errors]:
    check()
    print(f"smg: {check.__name__} ok", flush=True)
sys.exit(0)
