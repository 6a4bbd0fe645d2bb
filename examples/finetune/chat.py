"""`Chat` renders conversations by a chat template, and says where answers are."""

import datetime
import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from examples.llama.config import UsageError
from examples.llama.run_folder import parse_object, read_text

_LARGEST = 2**24  # bytes of a tokenizer's settings or template

# For a model without a template: ChatML, which needs no tokens of its own.
PLAIN = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

Message = dict[str, str]


class Rendered(NamedTuple):
    """A conversation's text, and the parts of it that a model is to learn."""

    text: str
    answers: list[tuple[int, int]]  # from, up to: characters


class _Generation(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}` marks what an assistant writes.

    Most templates have no such marks, so answers are found in another way and the block
    is its contents.
    """

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _environment() -> jinja2.Environment:
    """As transformers renders templates: sandboxed, with its functions."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, jinja2.ext.loopcontrols],
    )

    def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(
        form
    )
    return environment


class Chat:
    """`render(messages)`, and `prompt(messages)` for an answer to come."""

    def __init__(self, template: str = PLAIN, special: dict[str, str] | None = None):
        self.template, self.special = template, special or {}
        try:
            self._template = _environment().from_string(template)
        except jinja2.TemplateError as error:
            raise UsageError(f"the chat template cannot be read: {error}") from error

    def _text(self, messages: Sequence[Message], prompt: bool) -> str:
        try:
            return self._template.render(
                messages=list(messages),
                add_generation_prompt=prompt,
                **self.special,
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise UsageError(
                f"the chat template refuses a conversation of {roles}: {error}"
            ) from error

    def prompt(self, messages: Sequence[Message]) -> str:
        return self._text(messages, True)

    def render(self, messages: Sequence[Message]) -> Rendered:
        """The whole text; an answer is from behind its header up to its end mark.

        An answer is what rendering it adds to the prompt before it, without the blanks
        that follow its end mark. A turn that a template writes otherwise once others
        follow (Qwen 3 leaves out earlier thoughts) is none that could be marked, and so
        is not learned.
        """
        text = self._text(messages, False)
        answers = []
        for at, message in enumerate(messages):
            if message["role"] != "assistant" or not message["content"].strip():
                continue
            before = self._text(messages[:at], True)
            after = self._text(messages[: at + 1], False)
            if not text.startswith(after) or not after.startswith(before):
                continue
            answer = after[len(before) :]
            # The line end of a template that has no end mark is all that ends a turn.
            marked = not answer.rstrip().endswith(message["content"].strip())
            end = len(answer.rstrip()) if marked else len(answer)
            answers.append((len(before), len(before) + end))
        return Rendered(text, answers)


def load_chat(folder: pathlib.Path) -> Chat:
    """The template that lies beside a tokenizer; else the plain one.

    Raises:
        UsageError: what is there is no template.
    """
    path = folder / "tokenizer_config.json"
    settings: dict[str, Any] = {}
    try:
        if path.exists():
            settings = parse_object(read_text(path, _LARGEST))
        # Newer models keep it here, and it goes before the other.
        own = folder / "chat_template.jinja"
        template = read_text(own, _LARGEST) if own.exists() else None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    if template is None:
        template = settings.get("chat_template") or PLAIN
    if isinstance(template, list):  # several, each with a name
        named = {
            x.get("name"): x.get("template") for x in template if isinstance(x, dict)
        }
        template = named.get("default")
    if not isinstance(template, str):
        raise UsageError(f"{path}: chat_template has no template named default")
    special = {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        token = settings.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        special[name] = token if isinstance(token, str) else ""
    return Chat(template, special)


_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
}
_PAIRS = (
    ("prompt", "response"),
    ("prompt", "completion"),
    ("question", "answer"),
    ("instruction", "output"),
)


def conversation(row: dict[str, Any]) -> list[Message]:
    """The messages of a row in any of the usual spellings.

    Raises:
        ValueError: it is none of them.
    """
    turns = row.get("messages", row.get("conversations"))
    if turns is None:
        for ask, answer in _PAIRS:
            if ask in row and answer in row:
                more = row.get("input") or ""  # Alpaca's
                asked = f"{row[ask]}\n\n{more}" if more else row[ask]
                turns = [("user", asked), ("assistant", row[answer])]
                break
        else:
            raise ValueError(
                "neither messages, conversations, nor a pair of prompt and response"
            )
        if isinstance(row.get("system"), str) and row["system"]:
            turns = [("system", row["system"]), *turns]
        turns = [{"role": role, "content": text} for role, text in turns]
    if not isinstance(turns, list) or not turns:
        raise ValueError("a conversation without messages")
    messages = []
    for turn in turns:
        if not isinstance(turn, dict):
            raise ValueError("a message that is no object")
        role = turn.get("role", turn.get("from"))
        content = turn.get("content", turn.get("value"))
        if not isinstance(role, str) or not isinstance(content, str):
            raise ValueError("a message without role and content of text")
        messages.append({"role": _ROLES.get(role, role), "content": content})
    return messages
