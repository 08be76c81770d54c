"""Chat templates: equal to transformers', and bounded when they are hostile."""

from __future__ import annotations

import resource

import pytest

from tessera.data.chat import MAX_TEMPLATE_CHARS, ChatTemplate
from tessera.errors import FileFormatError, InputError

CHATML = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are helpful<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""
# In the manner of Llama 3.1 and Qwen 3: tools, namespaces, macros, slices, loop controls.
TOOLS = """{%- macro head(role) -%}<|{{ role }}|>{%- endmacro %}
{%- set ns = namespace(last=0, seen='') %}
{%- if tools is defined and tools is not none %}
    {{- "# Tools\\n" }}
    {%- for tool in tools %}{{ tool | tojson(indent=4) }}{{ "\\n" if not loop.last else "" }}{% endfor %}
{%- endif %}
{%- for message in messages[::-1] %}
    {%- set ns.last = messages | length - 1 - loop.index0 %}
    {%- if message.role == 'user' and message.content is string %}{% break %}{% endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content.split('</think>')[-1].lstrip('\\n') | trim %}
    {{- head(message.role) ~ loop.index ~ content }}
    {%- if message.tool_calls %}
        {%- for call in message.tool_calls | selectattr('type', 'equalto', 'function') %}
            {{- '<call>' + call.function | tojson + '</call>' }}
        {%- endfor %}
    {%- endif %}
    {%- generation %}{{ '!' * 3 }}{% endgeneration %}
    {%- set ns.seen = ns.seen ~ message.role[0] | upper %}
{%- endfor %}
{{- ns.seen.replace('U', 'u') + ' ' + ([1, 2] | join(', ')) + ' ' + ns.last | string + ' ' + bos_token | default('-') }}
{%- for key, value in dict(a=1, b="é").items() %}{{ key }}{{ value }}{% endfor %}"""
MESSAGES = [
    {"role": "user", "content": "  <b>Hi</b> \n"},
    {"role": "assistant", "content": "<think>hm</think>\n yes", "tool_calls": [
        {"type": "function", "function": {"name": "f", "arguments": {"x": "é<", "y": [1, None, True]}}}]},
    {"role": "user", "content": "🙂"}]
TOOL_LIST = [{"name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "string"}}}}]


@pytest.mark.parametrize("source", [CHATML, TOOLS], ids=["chatml", "tools"])
@pytest.mark.parametrize("variables", [{}, {"tools": TOOL_LIST}, {"bos_token": "<s>"}], ids=["", "tools", "bos"])
def test_equals_transformers(source, variables):
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    values = {"messages": MESSAGES, "add_generation_prompt": True, **variables}
    assert ChatTemplate(source).render(values) == utils._compile_jinja_template(source).render(**values)


BIG = "{% set x = 'a' * 1000000 %}"
HOSTILE = {
    "huge string": "{{ 'a' * 10000000000 }}",
    "power": "{{ 'a' * 10 ** 10 }}",
    "huge product": "{{ 99999999999999999999 * 99999999999999999999 * 99999999999999999999 }}",
    "nested loops": "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
    "huge range": "{{ range(1000000000) | list }}",
    "doubling by ~": "{% set n = namespace(a='aa') %}{% for i in range(60) %}{% set n.a = n.a ~ n.a %}{% endfor %}",
    "doubling by +": "{% set n = namespace(a='aa') %}{% for i in range(60) %}{% set n.a = n.a + n.a %}{% endfor %}",
    "billion laughs": "{% set n = namespace(a=[1]) %}{% for i in range(60) %}{% set n.a = [n.a, n.a] %}{% endfor %}",
    "calls without end": "{% macro m(n) %}{{ m(n - 1) if n }}{{ m(n - 1) if n }}{% endmacro %}{{ m(60) }}",
    "endless recursion": "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "format width": "{{ '{:>1000000000}'.format('a') }}",
    "percent width": "{{ '%1000000000s' % 'a' }}",
    "padding method": "{{ 'a'.ljust(1000000000) }}",
    "bytes method": "{{ 'a'.encode() }}",
    "int method": "{{ (1).to_bytes(1000000000, 'big') }}",
    "date width": "{{ strftime_now('%999999999d') }}",
    "json indent": "{{ [1] | tojson(indent=1000000000) }}",
    "replace": BIG + "{{ x | replace('a', x) }}",
    "replace method": BIG + "{{ x.replace('a', x) }}",
    "join": BIG + "{{ x | join(x) }}",
    "join method": BIG + "{{ x.join(x) }}",
    "filter in map": BIG + "{{ ([x] * 10000) | map('upper') | list | length }}",
    "slices": BIG + "{% set n = namespace(a=[]) %}{% for i in range(9999) %}{% set n.a = n.a + [x[1:]] %}{% endfor %}",
    "capture": "{% set x %}{% for i in range(90000) %}{{ 'a' * 1000 }}{% endfor %}{% endset %}",
    "comparisons": BIG + "{% for i in range(90000) %}{% if x == x ~ '' %}{% endif %}{% endfor %}",
    "membership": "{% set x = range(90000) | list %}{% for i in x %}{% if -1 in x %}{% endif %}{% endfor %}",
    "class": "{{ ''.__class__() }}",
    "subclasses": "{{ messages.__class__.__base__.__subclasses__() }}",
    "globals": "{{ namespace.__init__.__globals__ }}",
    "attribute by item": "{{ ''['__class__']['__mro__'] }}",
    "mutation": "{{ messages.append(1) }}",
    "include": "{% include '/etc/passwd' %}",
    "raise_exception": "{{ raise_exception('roles must alternate') }}",
    "undefined": "{{ nothing.there }}",
}
HOSTILE["billion laughs printed"] = HOSTILE["billion laughs"] + "{{ n.a }}"
HOSTILE["billion laughs as JSON"] = HOSTILE["billion laughs"] + "{{ n.a | tojson }}"
HOSTILE["billion laughs compared"] = HOSTILE["billion laughs"] + "{{ n.a == n.a }}"
del HOSTILE["billion laughs"]  # only references, until something walks through them


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_template_is_refused(name):
    """Refused, and with little memory: these would take gigabytes."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match=r"^chat_template: "):
        ChatTemplate(HOSTILE[name]).render({"messages": [{"role": "user", "content": "hi"}]})
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10  # KiB


@pytest.mark.parametrize("source", [
    "{% if %}", "{{ 'a' | center(9) }}", "{% for a in messages recursive %}{{ loop(a) }}{% endfor %}",
    "(" * 9 + "{{" + "(" * 5000, " " * (MAX_TEMPLATE_CHARS + 1)], ids=["syntax", "filter", "recursive", "deep", "long"])
def test_template_that_does_not_compile(source):
    with pytest.raises(FileFormatError, match=r"^chat_template: "):
        ChatTemplate(source)


def test_long_chats_fit_the_budget():
    messages = [{"role": "user" if i % 2 == 0 else "assistant", "content": "word " * 2000} for i in range(60)]
    text = ChatTemplate(TOOLS).render({"messages": messages, "add_generation_prompt": True})
    assert text.count("word ") == 60 * 1999  # each content is trimmed


@pytest.mark.parametrize("value", [object(), b"bytes", {1, 2}], ids=["object", "bytes", "set"])
def test_only_json_values_reach_a_template(value):
    with pytest.raises(InputError, match="what JSON holds"):
        ChatTemplate("{{ x }}").render({"x": value})
