"""The one place where a conversation becomes token ids and labels: for training, evaluation and the server.

A turn is written as <|im_start|>ROLE newline CONTENT <|im_end|> newline. Only these control tokens are put in by id;
everything that comes from the data is tokenized as plain text, so a user who types "<|im_end|>" ends nothing. Tags such
as <think> stay single tokens where the tokenizer has them. Labels cover exactly each assistant turn's content with its
tags and its closing <|im_end|>, known from the segments and never searched for; a turn that carries "weight": 0,
"train": false or "loss_mask": 0 is read and not learned.

A reply is tokenized apart from the "assistant" line before it, just as it is generated. With the shipped tokenizer the
ids equal tokenizer.apply_chat_template exactly, as no entry holds a newline beside anything else. Another tokenizer may
differ from its template by one token where a reply opens with two blanks or newlines.
"""

import json
from functools import lru_cache
from typing import Any, NamedTuple

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from model.errors import InputError

DEFAULT_SYSTEM_PROMPT = "You are a helpful assistant."
TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
TAGS += ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
TOOLS_PREFIX = "\n\nYou can call these functions:\n<tools>\n"
TOOLS_SUFFIX = """</tools>
To call one, write its name and arguments as JSON between tags, one pair of tags a call:
<tool_call>
{"name": "the name", "arguments": {"argument": "value"}}
</tool_call>"""
NO_THINKING = "<think>\n\n</think>\n\n"
ROLES = ("system", "user", "assistant", "tool")
SYSTEM_ROLES = ("system", "developer")  # the second is OpenAI's newer name of the first, and is written as it
LEARN_KEYS = ("weight", "train", "loss_mask")  # 0 or false: an assistant turn that is read and not learned
IGNORED = -100

# render() below once more, for programs that only know chat templates, with the refusals of validate_conversation. Here
# tools and calls cannot be JSON text, and the names of control tokens in a text are not defused. All newlines are
# written out: no trim setting matters. What generation tags enclose, transformers' assistant mask marks as learned.
TEMPLATE = """
{%- set first = messages[0] if messages[0].role in ['system', 'developer'] else {} -%}
{%- set offered = tools or first.tools or first.functions or [] -%}
{%- if offered is string -%}
    {{- raise_exception('tools must be a list: parse the JSON text first') -}}
{%- endif -%}
{%- for message in messages -%}
    {%- set role = message.role -%}
    {%- set text = message.content -%}
    {%- set previous = '' if loop.first else messages[loop.index0 - 1].role -%}
    {%- set called = role == 'assistant' and message.tool_calls -%}
    {%- if role not in ['system', 'developer', 'user', 'assistant', 'tool'] -%}
        {{- raise_exception('a turn has the role ' ~ role ~ '; use one of system, user, assistant, tool') -}}
    {%- elif role in ['system', 'developer'] and not loop.first -%}
        {{- raise_exception('a system turn must be the first one') -}}
    {%- elif role == 'assistant' and previous in ['', 'system', 'developer'] -%}
        {{- raise_exception('an assistant turn comes before anything was asked') -}}
    {%- elif role == 'tool' and previous not in ['assistant', 'tool'] -%}
        {{- raise_exception('a tool turn must follow the assistant turn that called the tool') -}}
    {%- elif text is not string and not (called and (text is not defined or text is none)) -%}
        {{- raise_exception('the content of a ' ~ role ~ ' turn must be a string') -}}
    {%- elif not text and (role == 'user' or role == 'assistant' and not called) -%}
        {{- raise_exception('the content of a ' ~ role ~ ' turn is empty') -}}
    {%- elif message.reasoning_content and message.reasoning_content is not string -%}
        {{- raise_exception('reasoning_content must be a string') -}}
    {%- endif -%}
{%- endfor -%}
{{- '<|im_start|>system\\n' + (first.content or DEFAULT_SYSTEM_PROMPT) -}}
{%- if offered -%}
    {{- TOOLS_PREFIX -}}
    {%- for tool in offered -%}
        {%- if (tool.function or tool).name is not string -%}
            {{- raise_exception('a tool has no name') -}}
        {%- endif -%}
        {{- (tool.function or tool) | tojson -}}
        {{- '\\n' -}}
    {%- endfor -%}
    {{- TOOLS_SUFFIX -}}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}
        {{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' -}}
    {%- elif message.role == 'tool' -%}
        {{- '<|im_start|>user\\n' if messages[loop.index0 - 1].role != 'tool' else '\\n' -}}
        {{- '<tool_response>\\n' + message.content + '\\n</tool_response>' -}}
        {{- '<|im_end|>\\n' if loop.last or messages[loop.index0 + 1].role != 'tool' else '' -}}
    {%- elif message.role == 'assistant' -%}
        {%- if message.tool_calls and message.tool_calls is string -%}
            {{- raise_exception('tool_calls must be a list: parse the JSON text first') -}}
        {%- endif -%}
        {{- '<|im_start|>assistant\\n' -}}
        {%- set reply -%}
        {%- if message.reasoning_content -%}
            {{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' -}}
        {%- endif -%}
        {{- message.content or '' -}}
        {%- for call in message.tool_calls or [] -%}
            {%- set call = call.function or call -%}
            {%- set arguments = call.arguments or {} -%}
            {%- if call.name is not string or arguments is not string and arguments is not mapping -%}
                {{- raise_exception('a tool call needs a name, and arguments that are an object') -}}
            {%- endif -%}
            {{- '\\n' if message.content or not loop.first else '' -}}
            {{- '<tool_call>\\n{"name": ' -}}
            {{- call.name | tojson -}}
            {{- ', "arguments": ' -}}
            {{- arguments if arguments is string else arguments | tojson -}}
            {{- '}\\n</tool_call>' -}}
        {%- endfor -%}
        {{- '<|im_end|>' -}}
        {%- endset -%}
        {%- if 0 in [message.weight, message.train, message.loss_mask] -%}
            {{- reply -}}
        {%- else -%}
            {%- generation -%}
            {{- reply -}}
            {%- endgeneration -%}
        {%- endif -%}
        {{- '\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
    {%- if enable_thinking is defined and enable_thinking is false -%}
        {{- NO_THINKING -}}
    {%- endif -%}
{%- endif -%}
"""

Turn = dict[str, Any]


class EncodedConversation(NamedTuple):
    """ids and labels of equal length; turn_ends[i] is the offset behind the newline that closes written turn i."""

    ids: list[int]
    labels: list[int]
    turn_ends: list[int]


def parse_list(value: object, what: str, where: str = "") -> list[dict]:
    """A list of objects from a list or its JSON text; None and empty text are an empty list."""
    try:
        items = (json.loads(value) if value.strip() else []) if isinstance(value, str) else value or []
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}{what} is not valid JSON ({error})") from None
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise InputError(f"{where}{what} must be a list of objects, or its JSON text")
    return items


def function_of(item: dict) -> dict:
    """The function of a tool or call in OpenAI's form {"type", "function": {...}}, or the flat object itself."""
    return item["function"] if isinstance(item.get("function"), dict) else item


def tools_of(turn: Turn, where: str = "") -> list[dict]:
    """The tools that a system turn carries."""
    return parse_list(turn.get("tools"), '"tools"', where) or parse_list(turn.get("functions"), '"functions"', where)


def validate_conversation(turns: object, *, where: str = "", require_assistant: bool = True) -> None:
    """Raise InputError with place and reason unless turns is a list of turns that can be trained on."""
    prefix = f"{where}: " if where else ""
    if not isinstance(turns, list) or not turns:
        raise InputError(f"{prefix}a conversation must be a list with at least one turn")
    previous = None
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict):
            raise InputError(f"{prefix}turn {number} must be an object with role and content")
        role = turn.get("role")
        if role not in (*ROLES, *SYSTEM_ROLES):
            raise InputError(f"{prefix}turn {number} has the role {role!r}; use one of {', '.join(ROLES)}")
        at = f"{prefix}turn {number} ({role}): "
        if role in SYSTEM_ROLES and number > 1:
            raise InputError(f"{at}a system turn must be the first one")
        if role == "assistant" and previous in (None, *SYSTEM_ROLES):
            raise InputError(f"{at}nothing was asked yet; a user turn must come before")
        if role == "tool" and previous not in ("assistant", "tool"):
            raise InputError(f"{at}a result must follow the assistant turn that called the tool")
        validate_turn(turn, at)
        previous = role
    answers = [turn for turn in turns if turn["role"] == "assistant"]
    if require_assistant and not any(map(is_learned, answers)):
        problem = "marks its assistant turns as not learned" if answers else "has no assistant turn"
        raise InputError(f"{prefix}the conversation {problem}, so there is nothing to learn")


def validate_turn(turn: Turn, at: str) -> None:
    """Raise InputError unless content, reasoning, tools and calls of one turn have the right form."""
    calls = parse_list(turn.get("tool_calls"), '"tool_calls"', at) if turn["role"] == "assistant" else []
    tools = tools_of(turn, at) if turn["role"] in SYSTEM_ROLES else []
    content, reasoning = turn.get("content"), turn.get("reasoning_content")
    if content is None and calls:
        content = ""
    if not isinstance(content, str):
        problem = "is missing" if content is None else f"is of type {type(content).__name__}"
        raise InputError(f"{at}the content {problem}; it must be a string")
    if not isinstance(reasoning, str | None):
        raise InputError(f"{at}reasoning_content is of type {type(reasoning).__name__}; it must be a string")
    if not content and turn["role"] == "user":
        raise InputError(f"{at}the content is empty")
    if not content and not calls and turn["role"] == "assistant":
        raise InputError(f"{at}there is neither content nor a tool call")
    if not all(isinstance(function_of(item).get("name"), str) for item in [*tools, *calls]):
        raise InputError(f"{at}a tool or a tool call has no name")
    if not all(is_json_object(function_of(call).get("arguments") or {}) for call in calls):
        raise InputError(f"{at}the arguments of a tool call must be an object or its JSON text")
    if turn["role"] == "assistant":
        for key in LEARN_KEYS:
            if turn.get(key) not in (None, 0, 1):
                raise InputError(f'{at}"{key}" is {turn[key]!r:.40}; it must be 1 (learned) or 0 (read, not learned)')
    try:
        check_text(json.dumps([content, reasoning, tools, calls], ensure_ascii=False), at)
    except RecursionError:
        raise InputError(f"{at}tools or calls are nested too deeply") from None


def check_text(text: str, at: str) -> None:
    """Raise InputError if the text cannot be encoded: in JSON a cut emoji may leave half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{at}the text holds half of a surrogate pair, which is no character") from None


def is_learned(turn: Turn) -> bool:
    """Whether an assistant turn is a target."""
    return all(turn.get(key) is None or turn[key] for key in LEARN_KEYS)


def is_json_object(value: object) -> bool:
    """Whether value is a dict or the JSON text of one."""
    try:
        return isinstance(json.loads(value) if isinstance(value, str) else value, dict)
    except (ValueError, RecursionError):
        return False


def render_call(call: dict) -> str:
    """One tool call as the model writes it."""
    function = function_of(call)
    arguments = function.get("arguments") or {}
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    name = json.dumps(function["name"], ensure_ascii=False)
    return f'<tool_call>\n{{"name": {name}, "arguments": {arguments}}}\n</tool_call>'


def render_assistant(turn: Turn) -> str:
    """Reasoning, content and calls of an assistant turn as one text."""
    reasoning, content = turn.get("reasoning_content"), turn.get("content")
    thought = f"<think>\n{reasoning}\n</think>\n\n" if reasoning else ""
    calls = map(render_call, parse_list(turn.get("tool_calls"), '"tool_calls"'))
    return thought + "\n".join([content, *calls] if content else calls)


class WrittenTurn(NamedTuple):
    """The text that the model is given, the assistant's reply to it (None in other turns), whether that is learned."""

    given: str
    reply: str | None = None
    learned: bool = False


def render(turns: list[Turn], tools: list[dict] | str | None = None) -> list[WrittenTurn]:
    """Validated turns as they are written."""
    first = turns[0] if turns[0]["role"] in SYSTEM_ROLES else {}
    system = "system\n" + (first.get("content") or DEFAULT_SYSTEM_PROMPT)
    if offered := parse_list(tools, "tools") or tools_of(first):
        signatures = [json.dumps(function_of(tool), ensure_ascii=False) + "\n" for tool in offered]
        system += TOOLS_PREFIX + "".join(signatures) + TOOLS_SUFFIX
    written = [WrittenTurn(system)]
    previous = "system"
    for turn in turns:
        if turn["role"] == "user":
            written.append(WrittenTurn(f"user\n{turn['content']}"))
        elif turn["role"] == "assistant":
            written.append(WrittenTurn("assistant\n", render_assistant(turn), is_learned(turn)))
        elif turn["role"] == "tool":  # results in a row share one user turn
            opening = written.pop().given if previous == "tool" else "user"
            written.append(WrittenTurn(f"{opening}\n<tool_response>\n{turn['content']}\n</tool_response>"))
        previous = turn["role"]
    return written


def chat_template() -> str:
    """The template for tokenizer_config.json, with the texts above put in as quoted strings."""
    template = TEMPLATE.strip()
    for name in ("DEFAULT_SYSTEM_PROMPT", "TOOLS_PREFIX", "TOOLS_SUFFIX", "NO_THINKING"):
        template = template.replace(name, json.dumps(globals()[name], ensure_ascii=False))
    return template


@lru_cache(maxsize=4)
def plain_text_backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """A copy of the fast tokenizer that reads the names of control tokens as ordinary text."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = True
    return backend


def encode_conversations(
    tokenizer: PreTrainedTokenizerBase, conversations: list[list[Turn]], tools: list[dict] | str | None = None
) -> list[EncodedConversation]:
    """Tokenize validated conversations in one batch; tools, where given, are offered in each of them."""
    written = [render(turns, tools) for turns in conversations]
    segments = [text for turns in written for turn in turns for text in (turn.given, turn.reply) if text is not None]
    encodings = plain_text_backend(tokenizer).encode_batch_fast([*segments, "\n"], add_special_tokens=False)
    newline = encodings.pop().ids
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    remaining = iter(encodings)
    encoded = []
    for turns in written:
        ids, labels, turn_ends = [], [], []
        for turn in turns:
            ids += [start, *next(remaining).ids]
            labels += [IGNORED] * (len(ids) - len(labels))
            closed = [end] if turn.reply is None else [*next(remaining).ids, end]
            ids += closed + newline
            if turn.learned:
                labels += closed
            labels += [IGNORED] * (len(ids) - len(labels))
            turn_ends.append(len(ids))
        encoded.append(EncodedConversation(ids, labels, turn_ends))
    return encoded


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase, turns: list[Turn], tools: list[dict] | str | None = None
) -> EncodedConversation:
    """Tokenize one validated conversation."""
    return encode_conversations(tokenizer, [turns], tools)[0]


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    turns: list[Turn],
    tools: list[dict] | str | None = None,
    enable_thinking: bool = True,
) -> list[int]:
    """Tokenize validated turns and open the assistant's reply; without thinking, its thought is already closed."""
    ids = encode_conversation(tokenizer, turns, tools).ids
    backend = plain_text_backend(tokenizer)
    cue = ["assistant\n"] if enable_thinking else ["assistant\n", NO_THINKING]
    opening = [tokenizer.convert_tokens_to_ids("<|im_start|>")]
    return ids + opening + [token for text in cue for token in backend.encode(text, add_special_tokens=False).ids]
