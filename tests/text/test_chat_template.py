"""Chat templates render as in Transformers, cannot leave their sandbox, and come to an end."""

import dataclasses
import json
import time
import tracemalloc
from datetime import datetime
from typing import Any

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.exceptions import SecurityError, UndefinedError

from refllm import golden
from refllm.errors import InputError, TokenizerError
from refllm.text import chat_template, template_meter
from refllm.text.chat_template import render
from refllm.text.tokenizer import AutoTokenizer

WITH_TEMPLATE = ["arcee-tiny", "llama-tiny", "stablelm-tiny-parallel"]
USER: dict[str, Any] = {"role": "user", "content": "What is <b>RoPE</b> & why?\n"}
SYSTEM: dict[str, Any] = {"role": "system", "content": "Be short. “Größe” 日本 🙂"}
ASSISTANT: dict[str, Any] = {"role": "assistant", "content": "A rotation."}
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds 'two' numbers",
        "parameters": {"type": "object", "properties": {"a": {"type": "number"}}, "required": ["a"]},
    },
}
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1.5}}}]}
CHATS = {
    "one question": [USER],
    "system and answer": [SYSTEM, USER, ASSISTANT, USER],
    "empty texts": [{"role": "user", "content": ""}],
    "a tool call": [USER, CALL, {"role": "tool", "content": '{"sum": 3}', "name": "add"}],
    "blocks": [{"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "image", "url": "x"}]}],
    "reasoning": [USER, {"role": "assistant", "content": "Yes", "thinking": "Hm", "numbers": [1, 2.5, True, None]}],
    "odd keys": [{"role": "user", "content": "x", "items": "hidden", "extra": {"a": None}, "none": None}],
}

# One construct of published templates each; they are applied to all chats above.
CONSTRUCTS = {
    "plain loop": "{% for m in messages %}{{ m['role'] + ': ' }}{{ m.content }}{% endfor %}",
    "trimming": "{% for m in messages %}\n  {%- if m.role == 'user' %}\n   U\n"
    "  {%- else -%}\n   {{ '  A ' }}\n {% endif %}\n{% endfor %}\n",
    "block lines": "{% for m in messages %}\n    {% if loop.first %}\n    first\n    {% endif %}\n"
    "{# a comment #}\n{% endfor %}\nend\n",
    "namespace": "{% set ns = namespace(n=0, last='') %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% set ns.last = m.role %}"
    "{% endfor %}{{ ns.n }}{{ ns.last }}",
    "loop variables": "{% for m in messages %}{{ loop.index }}{{ loop.index0 }}{{ loop.revindex }}{{ loop.last }}"
    "{{ loop.length }}"
    "{{ loop.previtem.role if loop.previtem is defined }}{{ loop.nextitem.role if not loop.last }}"
    "{{ loop.cycle('a', 'b') }}{{ loop.changed(m.role) }}{% endfor %}",
    "loop over a filter": "{% for m in messages|reverse %}{{ m.role }}{{ loop.last }}{{ loop.length }}"
    "{% else %}none{% endfor %}",
    "loop with a condition": "{% for m in messages if m.role != 'system' %}{{ loop.index }}{{ m.role }}{% endfor %}",
    "break and continue": "{% for m in messages %}{% if loop.index == 2 %}{% continue %}{% endif %}{{ m.role }}"
    "{% if loop.index > 2 %}{% break %}{% endif %}{% endfor %}",
    "slices": "{{ messages[0].role }}{{ messages[-1]['role'] }}{{ messages[1:]|length }}{{ messages[::-1]|length }}"
    "{{ 'abcdef'[1:4] }}",
    "types": "{% for m in messages %}{{ m.content is string }}{{ m.content is mapping }}{{ m.content is iterable }}"
    "{{ m.content is defined }}{{ m.content is none }}{{ m is mapping }}{% endfor %}",
    "content blocks": "{% for m in messages %}{% if m.content is not string and m.content is defined %}"
    "{% for c in m.content %}"
    "{{ c.text if c.type == 'text' else '<' ~ c.type ~ '>' }}{% endfor %}{% endif %}{% endfor %}",
    "select and map": "{{ messages|selectattr('role', 'equalto', 'user')|list|length }}"
    "{{ messages|map(attribute='role')|join(', ') }}"
    "{{ messages|rejectattr('content')|list|length }}{{ messages|map(attribute='role')|unique|list }}"
    "{{ messages|groupby('role')|length }}{{ messages|map(attribute='role')|list|last }}",
    "json": "{{ messages|tojson }}{{ messages|tojson(indent=2) }}{{ tools|tojson }}"
    "{{ messages[0]|tojson(separators=(',', ':')) }}"
    "{{ messages|tojson(sort_keys=true) }}{{ messages|tojson(ensure_ascii=true) }}",
    "defaults": "{{ missing|default('x') }}{{ missing is defined }}{{ missing }}{{ messages[0].nothing|d('y') }}"
    "{{ '' or 'z' }}"
    "{{ tools is none }}{{ documents is none }}{{ custom|default(7) }}{{ add_generation_prompt }}"
    "{{ bos_token }}{{ eos_token }}",
    "strings": "{% for m in messages %}{% if m.content is string %}{{ m.content.split('\\n')[0].strip() }}"
    "{{ m.content.replace('R', 'r') }}"
    "{{ m.content|replace('a', 'bb')|trim|upper }}{{ m.content.startswith('What') }}{{ 'x' * 3 }}{{ m.content|length }}"
    "{{ m.content.rstrip('\\n') ~ 1 ~ none }}{{ m.content|e }}{{ m.content|indent(4) }}{{ 'R' in m.content }}"
    "{{ m.content|title }}{{ ', '.join(m.content.split()) }}{{ m.content.find('o') }}{{ m.content|wordcount }}"
    "{% endif %}{% endfor %}",
    "formats": "{{ '%s-%03d' % ('a', 7) }}{{ '{}:{:>4}'.format('a', 1) }}{{ '%.2f'|format(2.5) }}{{ 7 // 2 }}"
    "{{ 7 % 4 }}{{ 2 ** 10 }}"
    "{{ -3 }}{{ 1.5 + 2 }}{{ 2.567|round(1) }}{{ '3'|int + 4 }}{{ [1, 2] + [3] }}{{ (1, 2) }}{{ {'a': [1]} }}",
    "dicts": "{% for m in messages %}{% for key, value in m.items() %}"
    "{{ key }}={{ value if value is string }};{% endfor %}"
    "{{ m.get('role') }}{{ m.get('nope', 'no') }}{{ m.keys()|list }}{{ 'role' in m }}{{ m|items|list|length }}"
    "{{ m|dictsort|length }}{% endfor %}{{ dict(a=1, b=2) }}{{ dict([['k', 'v']]) }}",
    "macros": "{% macro kind(t, depth=0) %}{{ '  ' * depth }}{{ t.type }}{% if t.properties %}"
    "{% for k, v in t.properties.items() %}"
    "{{ k }}:{{ kind(v, depth + 1) }}{% endfor %}{% endif %}{% endmacro %}{% for t in tools or [] %}"
    "{{ kind(t.function.parameters) }}"
    "{% endfor %}{% macro wrap() %}<{{ caller() }}>{% endmacro %}{% call wrap() %}in{% endcall %}",
    "captured blocks": "{% set text %}{% for m in messages %}{{ m.role }} {% endfor %}{% endset %}{{ text|trim }}"
    "{% filter upper %}shout {{ text }}{% endfilter %}{% with a = 1 %}{{ a }}{% endwith %}",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% generation %}\n{{ m.content }}\n{% endgeneration %}"
    "{% endif %}{% endfor %}{%- generation -%} x {%- endgeneration %}",
    "generation is a scope": "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
    "dates": "{{ strftime_now('%Y-%m') }}{% if strftime_now is defined %}{{ strftime_now('%B') }}{% endif %}",
    "range": "{% for i in range(3) %}{{ i }}{% endfor %}{{ range(5, 1, -2)|list }}{{ range(4)|sum }}"
    "{{ range(messages|length)|max }}",
    "reasoning names": "{% for m in messages %}{{ m.reasoning_content }}{{ m.thinking }}{{ m.reasoning }}{% endfor %}",
    "raising": "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}ok",
    "wrong attribute": "{{ messages[0].content.nothing.more }}",
    "wrong type": "{{ messages[0].role + 1 }}",
    "conditional expression": "{{ 'a' if messages|length > 1 }}{{ 1 < 2 <= 2 }}"
    "{{ not true }}{{ 1 in [1, 2] and 3 not in (4,) }}",
    "joiner and cycler": "{% set j = joiner(',') %}{% set c = cycler('x', 'y') %}{% for m in messages %}{{ j() }}"
    "{{ c.next() }}{% endfor %}",
    "recursive loop": "{% for t in [{'n': 1, 'c': [{'n': 2, 'c': []}]}] recursive %}{{ t.n }}{{ loop(t.c) }}"
    "{{ loop.depth }}{% endfor %}",
    "raw": "{% raw %}{{ not a value }}{% endraw %}\n\n",
    "line ends": "a\r\nb\n{% if true %}\r\nc{% endif %}\n",
}


def theirs(template: str, messages: Any, **options: Any) -> Any:
    witness = transformers.PreTrainedTokenizerFast.from_pretrained(golden.path("helium-tiny"))
    return witness.apply_chat_template(messages, chat_template=template, tokenize=False, **options)


def ours(template: str, messages: Any, **options: Any) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(golden.path("helium-tiny"))
    return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **options)


@pytest.mark.parametrize("template", CONSTRUCTS.values(), ids=CONSTRUCTS)
@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS)
def test_every_construct_renders_as_in_transformers(template: str, chat: list[dict[str, Any]]) -> None:
    options = {
        "tools": [TOOL],
        "documents": [{"title": "t", "text": "x"}],
        "add_generation_prompt": True,
        "custom": "v",
    }
    for given_options in ({}, options):
        try:
            expected = theirs(template, chat, **given_options)
        except Exception:
            with pytest.raises(TokenizerError):
                ours(template, chat, **given_options)
        else:
            assert ours(template, chat, **given_options) == expected


@pytest.mark.parametrize("name", WITH_TEMPLATE)
@settings(max_examples=30)
@given(
    chats=st.lists(
        st.lists(
            st.fixed_dictionaries(
                {
                    "role": st.sampled_from(["system", "user", "assistant", "tool"]),
                    "content": st.one_of(st.text(max_size=20), st.sampled_from(["<|im_end|>", " x ", "{{ 1 }}"])),
                }
            ),
            min_size=1,
            max_size=4,
        ),
        min_size=1,
        max_size=3,
    ),
    prompt=st.booleans(),
    tools=st.sampled_from([None, [TOOL]]),
)
def test_embedded_templates_give_the_text_and_ids_of_transformers(
    name: str, chats: Any, prompt: bool, tools: Any
) -> None:
    mine = AutoTokenizer.from_pretrained(golden.path(name))
    witness = transformers.AutoTokenizer.from_pretrained(golden.path(name))
    for chat in (chats, chats[0]):
        options = {"add_generation_prompt": prompt, "tools": tools}
        try:
            text = witness.apply_chat_template(chat, tokenize=False, **options)
        except Exception:
            with pytest.raises(TokenizerError):
                mine.apply_chat_template(chat, **options)
            continue
        assert mine.apply_chat_template(chat, tokenize=False, **options) == text
        assert dict(mine.apply_chat_template(chat, **options)) == dict(witness.apply_chat_template(chat, **options))
        ids = mine.apply_chat_template(chat, return_dict=False, **options)
        assert ids == witness.apply_chat_template(chat, return_dict=False, **options)


def test_ids_come_as_arrays_and_padded() -> None:
    tokenizer = AutoTokenizer.from_pretrained(golden.path("arcee-tiny"))
    chats = [[USER], [USER, ASSISTANT, USER]]
    out = tokenizer.apply_chat_template(chats, padding=True, return_tensors="np", add_generation_prompt=True)
    assert out.input_ids.shape == out.attention_mask.shape == (2, out.input_ids.shape[1])
    assert out.input_ids[0, 0] == tokenizer.pad_token_id
    assert (out.input_ids[:, -3:] == tokenizer.encode("<|im_start|>assistant\n", add_special_tokens=False)[-3:]).all()


@pytest.mark.parametrize("chat", [[USER, ASSISTANT], [USER, {"role": "assistant", "content": "ends with blanks  "}]])
@pytest.mark.parametrize("name", WITH_TEMPLATE)
def test_the_last_message_is_left_open_as_in_transformers(name: str, chat: Any) -> None:
    mine = AutoTokenizer.from_pretrained(golden.path(name))
    witness = transformers.AutoTokenizer.from_pretrained(golden.path(name))
    options = {"continue_final_message": True, "tokenize": False}
    assert mine.apply_chat_template(chat, **options) == witness.apply_chat_template(chat, **options)


def test_continuing_other_fields_as_in_transformers() -> None:
    template = (
        "{% for m in messages %}[{{ m.reasoning_content|trim }}|"
        "{{ m.content[-1].text if m.content is not string else m.content }}]{% endfor %}"
    )
    blocks = [{"type": "text", "text": "a"}, {"type": "text", "text": "b "}]
    thinking = {"role": "assistant", "content": "", "thinking": "so far "}
    for chat, field in (([{"role": "assistant", "content": blocks}], True), ([thinking], "reasoning_content")):
        expected = theirs(template, chat, continue_final_message=field)
        assert ours(template, chat, continue_final_message=field) == expected


def test_what_cannot_be_continued_is_said() -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(InputError, match="no text under 'content'"):
        ours(template, [{"role": "assistant", "content": None}], continue_final_message=True)
    with pytest.raises(TokenizerError, match="does not show 'content'"):
        ours("fixed", [ASSISTANT], continue_final_message=True)
    with pytest.raises(InputError, match="exclude each other"):
        ours(template, [ASSISTANT], continue_final_message=True, add_generation_prompt=True)


def test_rich_objects_become_plain_data() -> None:
    @dataclasses.dataclass
    class Note:
        role: str
        content: Any

    class Text(str):
        def secret(self) -> str:
            return "leaked"

    template = "{{ messages|tojson }}{{ messages[0].content.secret is defined }}"
    chat = [Note("user", Text("x")), {"role": "user", "content": (1, np.float32(0.5), np.bool_(True))}]
    assert render(template, chat) == (  # type: ignore[arg-type]
        '[{"role": "user", "content": "x"}, {"role": "user", "content": [1, 0.5, true]}]False'
    )


def test_the_messages_are_never_changed() -> None:
    chat = [{"role": "user", "content": [{"type": "text", "text": "a"}], "none": None}]
    before = json.dumps(chat)
    ours("{% for m in messages %}{{ m.content[0].text }}{% endfor %}", chat, continue_final_message=True)
    assert json.dumps(chat) == before


# --- the sandbox ------------------------------------------------------------------------------------------------------


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where no process of its own can be had: the work of a template is counted."""
    monkeypatch.setattr(chat_template._PROCESS, "unavailable", "this test wants none")


ESCAPES = {
    "class": "{{ ''.__class__ }}",
    "class by item": "{{ ''['__class__'] }}",
    "class by filter": "{{ ''|attr('__class__') }}",
    "class by map": "{{ messages|map(attribute='__class__')|list }}",
    "class by selection": "{{ messages|selectattr('__class__')|list }}",
    "class by sum": "{{ messages|sum(attribute='__class__') }}",
    "class by format": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "class by format_map": "{{ '{m.__class__}'.format_map({'m': messages}) }}",
    "format through a filter": "{{ (['{0.__class__}']|map('attr', 'format')|first)(1) }}",
    "subclasses": "{{ ().__class__.__base__.__subclasses__() }}",
    "globals of a function": "{{ raise_exception.__globals__ }}",
    "globals of a macro": "{% macro m() %}{% endmacro %}{{ m.__func__ }}{{ m._func }}",
    "globals of a class": "{{ cycler.__init__.__globals__.os.system('true') }}",
    "globals of joiner": "{{ joiner.__init__.__globals__ }}",
    "namespace type": "{{ namespace.__init__ }}",
    "private name in a namespace": "{% set ns = namespace(__class__=1) %}{{ ns }}",
    "private name by update": "{% set ns = namespace({'__init__': 1}) %}{{ ns }}",
    "mro": "{{ cycler.mro() }}",
    "self": "{{ self.__init__.__globals__ }}",
    "context": "{{ self._TemplateReference__context }}",
    "environment": "{{ loop.__init__ }}{% for m in messages %}{{ loop._iterator }}{% endfor %}",
    "generator frame": "{{ (messages|map(attribute='role')).gi_frame.f_globals }}",
    "append": "{{ messages.append({'role': 'x'}) }}",
    "pop": "{{ messages[0].pop('role') }}",
    "update": "{{ messages[0].update({'role': 'x'}) }}",
    "unbound update": "{{ dict.update(messages[0], {'role': 'x'}) }}",
    "clear": "{{ messages[0].clear() }}",
    "setdefault": "{{ messages[0].setdefault('a', 1) }}",
    "sort": "{{ messages.sort() }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}",
    "from import": "{% from 'os' import system %}",
    "extends": "{% extends 'base' %}",
    "undefined function": "{{ open('x') }}",
    "builtins": "{{ __builtins__.open }}",
    "import function": "{{ __import__('os') }}",
    "do": "{% do messages.append(1) %}",
    "tojson default": "{{ messages|tojson(default='x') }}",
}


@pytest.mark.parametrize("template", ESCAPES.values(), ids=ESCAPES)
def test_no_template_leaves_the_sandbox(template: str) -> None:
    assert_stays_inside(template)


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("template", ESCAPES.values(), ids=ESCAPES)
def test_no_template_leaves_the_sandbox_in_this_process(template: str) -> None:
    assert_stays_inside(template)


def assert_stays_inside(template: str) -> None:
    chat = [dict(USER)]
    with pytest.raises(TokenizerError, match=r"^chat template(, line \d+)?: ") as caught:
        ours(template, chat)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300
    assert chat == [USER]


DOUBLE = (
    "{{% set ns = namespace(x={0}) %}}{{% for i in range(99) %}}{{% set ns.x = {1} %}}{{% endfor %}}"
    "{{{{ ns.x|length }}}}"
)

BOMBS = {
    "loops in loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a huge range": "{{ range(10 ** 30)|list }}",
    "a repeated string": "{{ 'x' * 10 ** 12 }}",
    "a repeated list": "{{ 10 ** 12 * [1] }}",
    "a constant expression": "{% if false %}{{ 'x' * 1000000000000 }}{% endif %}{{ 'x' * 1000000000000 }}",
    "a padding filter": "{{ 'x'|center(1000000000) }}",
    "a padding method": "{{ 'x'.ljust(1000000000) }}",
    "a padding method of marked text": "{{ ('x'|e).center(1000000000) }}",
    "tabs": "{{ '\\t'.expandtabs(1000000000) }}",
    "a wide format": "{{ '%1000000000d' % 1 }}",
    "a computed width": "{{ '%*d' % (1000000000, 1) }}",
    "a wide format filter": "{{ '%1000000000d'|format(1) }}",
    "a wide str.format": "{{ '{:1000000000}'.format(1) }}",
    "a str.format of computed width": "{{ '{:{}}'.format(1, 1000000000) }}",
    "a wide date": "{{ strftime_now('%1000000000d') }}",
    "an indent": "{{ 'a\\nb'|indent(1000000000) }}",
    "an indent in JSON": "{{ [1]|tojson(indent=1000000000) }}",
    "a batch": "{{ [1]|batch(1000000000, 0)|list }}",
    "a slice": "{{ [1]|slice(1000000000)|list }}",
    "a word wrap": "{{ ('a' * 100000)|wordwrap(1, wrapstring='b' * 100000) }}",
    "bytes": "{{ (1).to_bytes(1000000000, 'big') }}",
    "a power": "{{ 10 ** 10 ** 10 }}" + "{{ (7 ** 1000) ** 1000 }}",
    "a product": DOUBLE.format(3, "ns.x * ns.x"),
    "precision": "{{ 1.5|round(1000000000, 'ceil') }}",
    "doubled by ~": DOUBLE.format("'a'", "ns.x ~ ns.x"),
    "doubled by +": DOUBLE.format("'a'", "ns.x + ns.x"),
    "doubled by a method": DOUBLE.format("'a'", "ns.x.replace('a', 'aa')"),
    "doubled by a filter": DOUBLE.format("'a'", "ns.x|replace('a', 'aa')"),
    "doubled by join": DOUBLE.format("'ab'", "ns.x|join(ns.x)"),
    "doubled by str.join": DOUBLE.format("'ab'", "ns.x.join(ns.x|list)"),
    "doubled by format": DOUBLE.format("'a'", "'%s%s' % (ns.x, ns.x)"),
    "doubled lists": DOUBLE.format("[1]", "ns.x + ns.x"),
    "nested lists": DOUBLE.format("[1]", "[ns.x, ns.x]"),
    "nested tuples": DOUBLE.format("(1,)", "(ns.x, ns.x)"),
    "nested dicts": DOUBLE.format("{}", "{'a': ns.x, 'b': ns.x}"),
    "nested by dict()": DOUBLE.format("{}", "dict(a=ns.x, b=ns.x)"),
    "nested by map": DOUBLE.format("[1]", "[ns, ns]|map(attribute='x')|list"),
    "comparisons": "{% set l = range(99999)|list %}{% for i in l %}{% if l == l[0:] %}{% endif %}{% endfor %}",
    "searches": "{% set l = range(99999)|list %}{% for i in l %}{% if 0.5 in l %}{% endif %}{% endfor %}",
    "searches by a test": "{% set l = range(99999)|list %}{% for i in l %}{% if 0.5 is in l %}{% endif %}{% endfor %}",
    "sorts": "{% set l = range(99999)|list %}{% for i in l %}{% set m = l|sort %}{% endfor %}",
    "copies": "{% set s = 'x' * 99999 %}{% set ns = namespace(l=[]) %}{% for i in range(9999) %}"
    "{% set ns.l = ns.l + [s[1:]] %}{% endfor %}",
    "output": "{% set s = 'x' * 99999 %}{% for i in range(99999) %}{{ s }}{% endfor %}",
    "captured output": "{% set s = 'x' * 99999 %}{% set t %}{% for i in range(99999) %}{{ s }}{% endfor %}{% endset %}",
    "constant output": "{% for i in range(9999) %}" + "constant text " * 99 + "{% endfor %}",
    "captured constant output": "{% set t %}{% for i in range(9999) %}"
    + "constant text " * 99
    + "{% endfor %}{% endset %}",
    "printed lists": DOUBLE.format("[1]", "ns.x|string|list"),
    "sums of lists": "{{ ([[1] * 1000] * 1000)|sum(start=[]) }}",
    "joined numbers": "{{ range(99999)|map('string')|join('x' * 99999) }}",
    "random text": "{{ lipsum(n=100000000) }}",
    "endless recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "branching recursion": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}",
    "a recursive loop": "{% for x in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "deep source": "{{ " + "(" * 5000 + ")" * 5000 + " }}",
    "a container as a key": "{{ {(1, 2): 3}[(1, 2)] }}",
}


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("template", BOMBS.values(), ids=BOMBS)
def test_runaway_templates_are_stopped(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_meter, "MAX_WORK", 2_000_000)  # a twentieth: the test takes a twentieth of the time
    start = time.process_time()
    with pytest.raises(TokenizerError, match=r"^chat template(, line \d+)?: ") as caught:
        ours(template, [USER])
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value.__cause__, (SecurityError, RecursionError, UndefinedError))  # not a MemoryError
    assert time.process_time() - start < 10


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("name", [name for name in BOMBS if "wide " in name or "width" in name])
def test_a_wide_format_is_refused_before_it_is_made(name: str) -> None:
    with pytest.raises(TokenizerError, match="a width of five digits or a computed width"):
        ours(BOMBS[name], [USER])


ONE_STEP = [
    *("a repeated string", "a repeated list", "a padding filter", "a padding method", "tabs", "an indent", "a batch"),
    *("a padding method of marked text", "an indent in JSON", "a slice", "a word wrap", "bytes", "joined numbers"),
]


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("name", ONE_STEP)
def test_no_single_step_takes_much_memory(name: str) -> None:
    """The budget is charged before the memory is taken."""
    tracemalloc.start()
    try:
        with pytest.raises(TokenizerError):
            ours(BOMBS[name], [USER])
        assert tracemalloc.get_traced_memory()[1] < 100_000_000
    finally:
        tracemalloc.stop()


def test_a_long_chat_stays_within_all_limits() -> None:
    render_a_long_chat()


@pytest.mark.usefixtures("in_this_process")
def test_a_long_chat_stays_within_the_budget() -> None:
    render_a_long_chat()


def render_a_long_chat() -> None:
    chat = [{"role": "user" if i % 2 == 0 else "assistant", "content": "word " * 200} for i in range(1000)]
    template = (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% if loop.index0 == messages|length - 1 %}last{% endif %}"
        "{% set ns.n = ns.n + m.content|length %}{{ m.role ~ ': ' ~ m.content | trim }}\n{% endfor %}{{ ns.n }}"
    )
    assert len(ours(template, chat)) > 1_000_000
    for name in WITH_TEMPLATE:
        assert len(AutoTokenizer.from_pretrained(golden.path(name)).apply_chat_template(chat, tokenize=False)) > 900_000


@pytest.mark.usefixtures("in_this_process")
def test_one_rendering_does_not_use_up_the_budget_of_the_next() -> None:
    template = "{{ 'x' * 9000000 }}"
    assert [len(ours(template, [USER])) for _ in range(5)] == [9_000_000] * 5


# --- what is wrong is said in one sentence ----------------------------------------------------------------------------


def test_errors_name_the_line_and_the_reason() -> None:
    cases = {
        "a\nb\n{{ raise_exception('roles must\n alternate') }}": "chat template, line 3: roles must alternate",
        "\n{% for m in messages %}\n{% endfor": "chat template, line 3: ",
        "{% frobnicate %}": "chat template, line 1: Encountered unknown tag 'frobnicate'",
        "\n\n{{ messages[0].role + 1 }}": "chat template, line 3: TypeError: ",
        "{{ nothing.at.all }}": "chat template, line 1: 'nothing' is undefined",
        "{{ 1 / 0 }}": "chat template, line 1: ZeroDivisionError: division by zero",
        "x" * 1_000_001: "chat template: it has 1000001 characters",
    }
    for template, expected in cases.items():
        with pytest.raises(TokenizerError) as caught:
            ours(template, [USER])
        assert str(caught.value).startswith(expected)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([], "messages is empty"),
        ("hello", "not str"),
        (USER, "not dict"),
        (None, "not NoneType"),
        (["hello"], r"messages\[0\] must be a dict"),
        ([USER, 5], r"messages\[1\] must be a dict"),
        ([{"role": "user", "content": object()}], r"messages\[0\]\['content'\] is of type object"),
        ([{"role": "user", "content": np.zeros(2)}], "is of type ndarray"),
    ],
)
def test_what_is_no_conversation_is_said(messages: Any, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        ours("{{ messages }}", messages)


def test_no_template_and_unknown_options_are_said() -> None:
    tokenizer = AutoTokenizer.from_pretrained(golden.path("helium-tiny"))
    with pytest.raises(TokenizerError, match="no chat template"):
        tokenizer.apply_chat_template([USER])
    tokenizer.chat_template = {"rag": "x", "tools": "y"}
    with pytest.raises(TokenizerError, match=r"no default chat template: name one of \['rag', 'tools'\]"):
        tokenizer.apply_chat_template([USER])
    assert tokenizer.apply_chat_template([USER], chat_template="rag", tokenize=False) == "x"
    with pytest.raises(InputError, match="sanitize_control_tokens is not supported"):
        tokenizer.apply_chat_template([USER], chat_template="rag", sanitize_control_tokens=True)
    with pytest.raises(InputError, match="tools must be JSON schemas"):
        tokenizer.apply_chat_template([USER], chat_template="rag", tools=[print])


def test_dates_are_of_today() -> None:
    assert ours("{{ strftime_now('%d %B %Y') }}", [USER]) == datetime.now().strftime("%d %B %Y")
