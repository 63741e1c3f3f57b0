"""The text fixture: what transformers renders from chat templates and how the demo model's tokenizer cuts text.

The templates are our own, in the manner of the models they are named after: each uses the Jinja features
that the originals use and that a small template engine is likely to get wrong."""
import json
import pathlib

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

HERE = pathlib.Path(__file__).resolve().parent
DEMO = HERE.parents[1] / "models" / "demo"

USER = {"role": "user", "content": "  Where is Kestrel?\n"}
ASSISTANT = {"role": "assistant", "content": "The city of Kestrel is Oslo."}
SYSTEM = {"role": "system", "content": "You answer questions about this register of depots.\nThe city of Kestrel is Oslo."}
FOLLOW_UP = {"role": "user", "content": "And \"quotes\", <tags> & umlauts: äöü 你好 🚚?"}
THOUGHT = {"role": "assistant", "content": "<think>\nThe register says Oslo.\n</think>\n\nOslo."}
CALL = {"role": "assistant", "content": "", "tool_calls": [
    {"type": "function", "function": {"name": "find_depot", "arguments": {"name": "Kestrel", "limit": 3, "exact": True}}}]}
RESULTS = [{"role": "tool", "content": "{\"city\": \"Oslo\"}"}, {"role": "tool", "content": "{\"code\": \"4712\"}"}]
SECOND_CALL = {"type": "function", "function": {"name": "depots_near", "arguments": {"places": ["Zürich", "<Oslo>"], "within": {"km": 2.5}}}}
CALLS = {"role": "assistant", "content": "I look it up.", "tool_calls": [
    {"id": "call_1", **CALL["tool_calls"][0]}, {"id": "call_2", **SECOND_CALL}]}
NAMED_RESULTS = [{"role": "tool", "tool_call_id": "call_1", "name": "find_depot", "content": "{\"city\": \"Oslo\"}"},
                 {"role": "tool", "tool_call_id": "call_2", "name": "depots_near", "content": "'none' & \"no more\"\n"}]
TOOL = {"type": "function", "function": {
    "name": "find_depot", "description": "Finds a depot <by its name> & says 'where' it is.",
    "parameters": {"type": "object", "properties": {"name": {"type": "string"}, "limit": {"type": "integer", "default": 5}}, "required": ["name"]}}}
SECOND_TOOL = {"type": "function", "function": {
    "name": "depots_near", "description": "Depots near \"places\".",
    "parameters": {"type": "object", "required": ["places", "within"], "properties": {
        "places": {"type": "array", "items": {"type": "string"}},
        "within": {"type": "object", "additionalProperties": {"type": ["number", "integer"]}}, "any": {}}}}}
BARE_TOOL = {"type": "function", "function": {"name": "now", "description": "The time.", "parameters": {"type": "object", "properties": {}}}}

CONVERSATIONS = {
    "one question": [USER],
    "system and question": [SYSTEM, USER],
    "follow-up": [SYSTEM, USER, ASSISTANT, FOLLOW_UP],
    "no system, follow-up": [USER, ASSISTANT, FOLLOW_UP],
    "thoughts of an earlier turn": [USER, THOUGHT, FOLLOW_UP],
    "ends with the assistant": [USER, ASSISTANT],
    "two questions in a row": [USER, FOLLOW_UP],
    "tool results": [SYSTEM, USER, CALL, *RESULTS],
    "named tool result": [USER, CALL, NAMED_RESULTS[0]],
    "two calls at once": [USER, CALLS, *NAMED_RESULTS, ASSISTANT, FOLLOW_UP],
}
# What a request can tell a template beside the conversation.
KWARGS = [{"enable_thinking": False}, {"date_string": "01 Jan 2026", "tools_in_user_message": False},
          {"builtin_tools": ["find_depot", "code_interpreter", "search"]}]
TEXTS = [
    "", " ", "The code of Kestrel is 4712.", "Where is it?", "  leading and trailing  ", "tabs\tand\r\nline breaks\n\n\n  end",
    "It's we'll THEY'RE I'd", "a1b22c333 12345 3.14 1,000", "naïve café Zürich", "e\u0301 is not \u00e9 until normalised", "你好，世界", "🚚📦 ok",
    "<|im_start|>user\nWhere is Kestrel?<|im_end|>\n<|im_start|>assistant\n", "<|im_start|> <|im_end|><|endoftext|>x", "<|im_star|>",
    "x" * 40, "?!...---\n\n\"quoted\" (and) [bracketed]", "\u00a0non-breaking\u2003wide", "Balimi Zokuro Fetepa",
]


def render(template, messages, tools, add_generation_prompt, bos, eos, **kwargs):
    """-> the expected rendering, or the message with which the template refuses the conversation."""
    try:
        rendered, _ = render_jinja_template(
            [messages], tools=tools, chat_template=template, add_generation_prompt=add_generation_prompt,
            bos_token=bos, eos_token=eos, **kwargs)
        return {"rendered": rendered[0]}
    except TemplateError as refusal:
        return {"error": str(refusal)}


def template_cases(name, template, bos, eos):
    """Every conversation, with and without what may follow it. The mistral template knows no tools."""
    cases = []
    for title, messages in CONVERSATIONS.items():
        for tools in (None, [TOOL]):
            for add_generation_prompt in (True, False):
                case = {"title": title, "messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt}
                cases.append({**case, **render(template, messages, tools, add_generation_prompt, bos, eos)})
    for title in ("system and question", "named tool result"):
        for kwargs in KWARGS:
            case = {"title": title, "messages": CONVERSATIONS[title], "tools": [TOOL, SECOND_TOOL, BARE_TOOL], "add_generation_prompt": True}
            cases.append({**case, "kwargs": kwargs, **render(template, case["messages"], case["tools"], True, bos, eos, **kwargs)})
    return {"name": name, "template": template, "bos_token": bos, "eos_token": eos, "cases": cases}


def tokenizer_cases(tokenizer):
    cases = []
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        cases.append({"text": text, "ids": ids, "decoded": tokenizer.decode(ids, clean_up_tokenization_spaces=False),
                      "decoded_without_special": tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)})
    return cases


def make(out):
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(DEMO)
    templates = [template_cases("demo", tokenizer.chat_template, None, tokenizer.eos_token)]
    for name, bos, eos in (("llama3", "<|begin_of_text|>", "<|eot_id|>"), ("llama31", "<|begin_of_text|>", "<|eot_id|>"),
                           ("qwen3", None, "<|im_end|>"), ("hermes", "<|begin_of_text|>", "<|im_end|>"), ("mistral", "<s>", "</s>")):
        templates.append(template_cases(name, (HERE / "templates" / f"{name}.jinja").read_text(), bos, eos))
    for name, value in (("templates.json", templates), ("tokenizer.json", tokenizer_cases(tokenizer))):
        (out / name).write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
    print("text:", sum(len(t["cases"]) for t in templates), "renderings,", len(TEXTS), "tokenized texts")
