"""Chat templates against transformers, and against templates that mean harm."""

import json

import pytest
from transformers import AutoTokenizer

from foveal.core.errors import LoadError, RequestError
from foveal.text.bytes import write_byte_tokenizer
from foveal.text.chat import ChatTemplate, load_chat_template

LLAMA3 = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = '' %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{%- if tools is not none %}
    {{- 'Environment: ipython\\n' }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
    {%- endfor %}
{%- endif %}
{{- system + '<|eot_id|>' }}
{%- for message in messages %}
    {%- if 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}
            {{- raise_exception('one tool call at a time') }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '{"name": "' + call.name + '", "parameters": ' + call.arguments | tojson + '}' }}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
CHATML = """{% for message in messages %}
{% if loop.first and message['role'] != 'system' %}
{{ '<|im_start|>system\\nBe kind.<|im_end|>' }}
{% endif %}
    {% if message.role == 'assistant' %}
<|im_start|>assistant
{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}

    {% else %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
    {% endif %}
{% endfor %}
{% if documents %}{{ documents | tojson }}{% endif %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
MISTRAL = """{{ bos_token }}{% for message in messages %}
{%- if message['role'] == 'system' -%}{%- continue -%}{%- endif -%}
{%- if message['role'] == 'user' %}{{ ' [INST] ' + message['content'] + ' [/INST]' }}
{%- elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}
{%- else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}
{%- endfor %}"""
GEMMA = """{{ bos_token }}{% set ns = namespace(turns=0) %}{% for message in messages %}
{% if message['role'] == 'system' %}{% continue %}{% endif %}
{% set ns.turns = ns.turns + 1 %}
{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{% if ns.turns > 8 %}{% break %}{% endif %}
{% endfor %}{{ strftime_now('%Y') }}{{ enable_thinking | default('unset') }}
{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""

TEMPLATES = {"llama-3": LLAMA3, "chatml": CHATML, "mistral": MISTRAL, "gemma": GEMMA}
CHATS = [
    [{"role": "user", "content": "  Hello <b>&</b> 'naïve' 東京 "}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Sum 1 and 2."},
        {"role": "assistant", "content": "3", "tool_calls": None},
        {"role": "user", "content": "And 3?"},
    ],
]
TOOLS = [{"type": "function", "function": {"name": "größe", "parameters": {"<x>": 1}}}]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("chat")
    write_byte_tokenizer(directory)
    return AutoTokenizer.from_pretrained(directory)


@pytest.fixture
def ours(theirs):
    named = {"bos_token": theirs.bos_token, "eos_token": theirs.eos_token}
    return lambda source: ChatTemplate({"default": source}, named)


@pytest.mark.parametrize("chat", CHATS, ids=["one", "many"])
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompt", [True, False])
def test_agrees_with_transformers(ours, theirs, name, chat, prompt):
    for more in ({}, {"tools": TOOLS}, {"documents": [{"text": "<é>"}]}):
        expected = theirs.apply_chat_template(
            chat,
            chat_template=TEMPLATES[name],
            tokenize=False,
            add_generation_prompt=prompt,
            enable_thinking=False,
            **more,
        )
        made = ours(TEMPLATES[name]).render(
            chat, add_generation_prompt=prompt, variables={"enable_thinking": False}, **more
        )
        assert made == expected


def test_tool_calls(ours, theirs):
    call = {"function": {"name": "add", "arguments": {"a": 1, "b": "ü"}}}
    chat = [*CHATS[0], {"role": "assistant", "tool_calls": [call]}]
    expected = theirs.apply_chat_template(chat, chat_template=LLAMA3, tokenize=False)
    assert ours(LLAMA3).render(chat, add_generation_prompt=False) == expected
    with pytest.raises(RequestError, match="one tool call at a time"):
        ours(LLAMA3).render([*CHATS[0], {"role": "assistant", "tool_calls": [call, call]}])


ESCAPES = [
    "{{ messages.__class__.__mro__ }}",
    "{{ ''.__class__.__base__.__subclasses__() }}",
    "{{ raise_exception.__globals__['json'] }}",
    "{{ lipsum.__globals__['os'].system('true') }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(strftime_now) }}",
    "{% set f = '{0.__class__.__mro__[1]}'['format'] %}{{ f(1) }}",
    "{{ messages.append(1) }}",
    "{{ ('{0.__class__.__mro__[1]}'|attr('for' + 'mat'))(1) }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.getcwd() }}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_no_way_out_of_the_sandbox(ours, source):
    with pytest.raises(RequestError, match="chat template"):
        ours(source).render(CHATS[0])


def test_sandbox_is_named(ours):
    with pytest.raises(RequestError, match="not safe"):
        ours(ESCAPES[1]).render(CHATS[0])


@pytest.mark.parametrize(
    ("source", "words"),
    [("{% if %}", "not valid Jinja"), ("{{ 1 / 0 }}", "failed: division by zero")],
)
def test_a_broken_template_is_named(ours, source, words):
    with pytest.raises(RequestError, match=words):
        ours(source).render(CHATS[0])


def test_no_messages(ours):
    with pytest.raises(RequestError, match="messages: got none"):
        ours(CHATML).render([])


def write_config(directory, **entries):
    (directory / "tokenizer_config.json").write_text(json.dumps(entries))


def test_where_templates_come_from(tmp_path):
    assert not load_chat_template(tmp_path)
    with pytest.raises(RequestError, match=r"no chat template.*chat_template\.jinja"):
        load_chat_template(tmp_path).render(CHATS[0])
    write_config(tmp_path, chat_template="{{ bos_token }}text", bos_token={"content": "<b>"})
    assert load_chat_template(tmp_path).render(CHATS[0]) == "<b>text"
    named = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    write_config(tmp_path, chat_template=named)
    assert load_chat_template(tmp_path).render(CHATS[0]) == "d"
    assert load_chat_template(tmp_path).render(CHATS[0], tools=TOOLS) == "t"
    write_config(tmp_path, chat_template=named[1:])
    with pytest.raises(RequestError, match="only: tool_use"):
        load_chat_template(tmp_path).render(CHATS[0])
    write_config(tmp_path, chat_template=7)
    with pytest.raises(LoadError, match="chat_template is a int"):
        load_chat_template(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("file")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    assert load_chat_template(tmp_path).render(CHATS[0]) == "file"
    assert load_chat_template(tmp_path).render(CHATS[0], tools=TOOLS) == "tools"
