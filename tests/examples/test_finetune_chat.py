"""Conversations to text, and which of its tokens are learned, against what is written
here by hand."""

import json

import numpy as np
import pytest

from examples.finetune.chat import PLAIN, Chat, conversation, load_chat
from examples.finetune.instructions import encode
from examples.llama.config import UsageError
from tests.examples.pretrained import byte_tokenizer

TOKENS = byte_tokenizer("<|im_start|>", "<|im_end|>", "<s>", "</s>")
# Llama 2's and Mistral's: the header opens with the user's turn, the answer ends with
# a token.
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
    "[INST] {{ m.content }} [/INST]{% elif m.role == 'assistant' %}"
    " {{ m.content | trim }}{{ eos_token }}{% else %}"
    "{{ raise_exception('Only user and assistant roles') }}{% endif %}{% endfor %}"
)


def turns(*texts: str) -> list[dict[str, str]]:
    roles = ("user", "assistant") * len(texts)
    return [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]


def learned(chat: Chat, messages: list[dict[str, str]]) -> list[str]:
    """The targets that are learned, as runs of text."""
    example = encode(chat, TOKENS, messages)
    assert example.inputs[1:].tolist() == example.targets[:-1].tolist()
    runs, before = [], -2
    for at in np.flatnonzero(example.mask):
        if at != before + 1:
            runs.append([])
        runs[-1].append(int(example.targets[at]))
        before = at
    return [TOKENS.decode(run, skip_special_tokens=False) for run in runs]


def test_every_token_of_a_conversation():
    """The answer and its end mark are learned: not the header, not the line's end."""
    chat = Chat()
    text = chat.render(turns("Hi", "né")).text
    assert text == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nné<|im_end|>\n"
    )
    example = encode(chat, TOKENS, turns("Hi", "né"))
    found = [
        (TOKENS.id_to_token(int(t)), int(m))
        for t, m in zip(example.targets, example.mask, strict=True)
    ]
    header = [(c, 0) for c in "userĊHi"]  # Ċ is how a line's end is written
    answer = [(c, 0) for c in "assistantĊ"]
    assert found == [
        *header,
        ("<|im_end|>", 0),
        ("Ċ", 0),
        ("<|im_start|>", 0),
        *answer,
        ("n", 1),
        ("Ã", 1),  # both bytes of é
        ("©", 1),
        ("<|im_end|>", 1),
        ("Ċ", 0),
    ]


def test_all_answers_of_many_turns():
    messages = [{"role": "system", "content": "short"}, *turns("a", "b", "c", "d d")]
    assert learned(Chat(), messages) == ["b<|im_end|>", "d d<|im_end|>"]
    chat = Chat(INST, {"bos_token": "<s>", "eos_token": "</s>"})
    assert chat.render(turns("a", " b ", "c", "d")).text == (
        "<s>[INST] a [/INST] b</s>[INST] c [/INST] d</s>"
    )
    assert learned(chat, turns("a", " b ", "c", "d")) == [" b</s>", " d</s>"]
    with pytest.raises(UsageError, match=r"a conversation of system, user.*Only user"):
        chat.render([{"role": "system", "content": ""}, *turns("a", "b")])


def test_an_answer_without_an_end_mark_keeps_its_line_end():
    chat = Chat("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    # Without a header to come, the role is part of what is written.
    assert learned(chat, turns("a", "b")) == ["assistant: b\n"]


def test_turns_that_are_rewritten_later_are_not_learned():
    """As Qwen 3 leaves out the thoughts of all answers but the last."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and not loop.last %}"
        "{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}"
        "<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    messages = turns("a", "<think>x</think>b", "c", "d")
    assert learned(Chat(template), messages) == ["d<|im_end|>"]


def test_blocks_filters_and_functions_of_templates():
    template = (
        "{% for m in messages %}{% if m.role == 'tool' %}{% continue %}{% endif %}"
        "{{ m.role | tojson }} {% generation %}{{ m.content }}{% endgeneration %};"
        "{% endfor %}{{ strftime_now('%Y')[:2] }}"
    )
    assert Chat(template).render(turns("ü")).text == '"user" ü;20'


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for %}", "cannot be read"),
        ("{{ messages.__class__.__mro__ }}", "unsafe|access to attribute"),
        ("{{ messages[0].nothing.more }}", "refuses a conversation of user"),
    ],
)
def test_templates_that_cannot_be_used(template, message):
    with pytest.raises(UsageError, match=message):
        Chat(template).render(turns("a"))


def test_the_template_of_a_folder(tmp_path):
    assert (
        load_chat(tmp_path).render(turns("a")).text
        == Chat(PLAIN).render(turns("a")).text
    )
    both = {
        "chat_template": [
            {"name": "tools", "template": "no"},
            {"name": "default", "template": "{{ bos_token }}{{ messages[0].content }}"},
        ],
        "bos_token": {"content": "<s>"},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(both))
    assert load_chat(tmp_path).render(turns("a")).text == "<s>a"
    (tmp_path / "chat_template.jinja").write_text("own {{ eos_token }}|")
    assert load_chat(tmp_path).render(turns("a")).text == "own |"
    (tmp_path / "chat_template.jinja").unlink()
    for content in ("[]", '{"chat_template": 7}', "{"):
        (tmp_path / "tokenizer_config.json").write_text(content)
        with pytest.raises(UsageError):
            load_chat(tmp_path)


def test_spellings_of_conversations():
    expected = turns("a", "b")
    for row in (
        {"messages": expected},
        {
            "conversations": [
                {"from": "human", "value": "a"},
                {"from": "gpt", "value": "b"},
            ]
        },
        {"prompt": "a", "response": "b"},
        {"instruction": "a", "input": "", "output": "b"},
    ):
        assert conversation(row) == expected
    row = {"instruction": "a", "input": "x", "output": "b", "system": "s"}
    assert conversation(row) == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a\n\nx"},
        {"role": "assistant", "content": "b"},
    ]
    for row in (
        {"text": "a"},
        {"messages": []},
        {"messages": "a"},
        {"messages": ["a"]},
        {"messages": [{"role": "user"}]},
        {"prompt": "a", "response": None},
    ):
        with pytest.raises(ValueError):
            conversation(row)
