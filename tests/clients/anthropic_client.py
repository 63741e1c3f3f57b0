"""The anthropic package, as it is, against a running cluster: ANTHROPIC_BASE_URL says where."""

import anthropic
from anthropic import Anthropic

client = Anthropic(api_key="unused", max_retries=0)
FACTS = (
    "You answer questions about this register of depots. The code of Otter is 4711. "
    "The city of Otter is Oslo. The code of Raven is 9302. The city of Raven is Lima."
)
ASK = {
    "model": "demo", "max_tokens": 64, "system": FACTS, "extra_body": {"temperature": 0},
    "messages": [{"role": "user", "content": "What is the code of Raven?"}],
}


def message():
    answer = client.messages.create(**ASK)
    (block,) = answer.content
    assert block.type == "text" and "9302" in block.text, answer
    assert answer.stop_reason == "end_turn" and answer.stop_sequence is None
    again = client.messages.create(**ASK)
    assert again.usage.cache_read_input_tokens > 0
    tokens = answer.usage.input_tokens + answer.usage.cache_read_input_tokens
    ask = {key: ASK[key] for key in ("model", "system", "messages")}
    assert client.messages.count_tokens(**ask).input_tokens == tokens


def stream():
    whole = client.messages.create(**ASK)
    with client.messages.stream(**ASK) as stream:
        text = "".join(stream.text_stream)
        last = stream.get_final_message()
    assert text == whole.content[0].text == last.content[0].text
    assert last.stop_reason == whole.stop_reason
    assert last.usage.output_tokens == whole.usage.output_tokens


def stops():
    answer = client.messages.create(**ASK, stop_sequences=["93"])
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", "93")
    answer = client.messages.create(**{**ASK, "max_tokens": 1})
    assert answer.stop_reason == "max_tokens"


def errors():
    def refused(kind, said, **more):
        try:
            client.messages.create(**{**ASK, **more})
        except kind as error:
            assert error.body["type"] == "error" and said in error.body["error"]["message"], error
            return
        raise AssertionError(f"{more} was not refused")

    refused(anthropic.BadRequestError, "temperature", extra_body={"temperature": 3})
    refused(anthropic.BadRequestError, "frobnicate", extra_body={"frobnicate": 1})
    refused(anthropic.BadRequestError, "tools", tools=[{"name": "f", "input_schema": {}}])
    refused(anthropic.NotFoundError, "claude-0", model="claude-0")


def continued():
    """An answer goes on where the last message, one of the assistant, ends."""
    begun = [*ASK["messages"], {"role": "assistant", "content": "The code of Raven is"}]
    answer = client.messages.create(**{**ASK, "messages": begun})
    assert "9302" in answer.content[0].text and "code" not in answer.content[0].text, answer


for check in [message, stream, stops, errors, continued]:
    check()
    print(f"anthropic {anthropic.__version__}: {check.__name__} ok", flush=True)
