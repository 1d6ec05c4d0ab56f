"""A hundred chat templates that mean harm: each would hang, exhaust or crash the process that renders it."""

_N = "{% for i in range(99999) %}{% for j in range(99999) %}"
_END = "{% endfor %}{% endfor %}"


def _grow(start: str, step: str, show: str = "ns.x|length", times: int = 99) -> str:
    """`step` again and again, from `start`."""
    return (
        f"{{% set ns = namespace(x={start}) %}}{{% for i in range({times}) %}}{{% set ns.x = {step} %}}{{% endfor %}}"
        f"{{{{ {show} }}}}"
    )


def _deep(before: str, middle: str, after: str, times: int) -> str:
    return before * times + middle + after * times


def _again(given: str, work: str, times: int = 99999) -> str:
    """`work`, again and again, on `s`."""
    return f"{{% set s = {given} %}}{{% for i in range({times}) %}}{{% set t = {work} %}}{{% endfor %}}"


_TEXT = "'ab' * 9999999"
_LIST = "range(99999)|list"

CRASH = "call: a deep tuple is hashed"  # which overflows the interpreter's stack

BOMBS = {
    # formats and widths
    "format: named width": "{{ '%(a)99999999999d' % {'a': 1} }}",
    "format: named width, many": "{{ ('%(a)9999999d' * 99) % {'a': 1} }}",
    "format: precision of a float": "{{ '%.999999999f' % 1.5 }}",
    "format: computed width": "{{ '%*d' % (2000000000, 1) }}",
    "format: method": "{{ '{:>99999999999}'.format('x') }}",
    "format: method, computed": "{{ '{:{w}}'.format('x', w=2000000000) }}",
    "format: method, fill": "{{ '{a:é^1999999999}'.format(a=1) }}",
    "format: format_map": "{{ '{a:1999999999}'.format_map({'a': 1}) }}",
    "format: float of a million digits": "{{ '{:.1000000000f}'.format(0.1) }}",
    "format: long date": "{{ strftime_now('%c' * 99999999) }}",
    "width: center": "{{ 'x'|center(9999999999) }}",
    "width: ljust": "{{ 'x'.ljust(9999999999) }}",
    "width: zfill": "{{ '7'.zfill(9999999999) }}",
    "width: tabs": "{{ ('\\t' * 9999).expandtabs(999999) }}",
    "width: indent": "{{ ('a\\n' * 9999)|indent(999999) }}",
    "width: json": "{{ [[[1]]]|tojson(indent=999999999) }}",
    "width: pprint": "{{ (range(99999)|list * 99)|pprint }}",
    # strings
    "string: repeated": "{{ ('x' * 10 ** 10)|length }}",
    "string: repeated twice": "{{ ('xy' * 9999999 * 9999)|length }}",
    "string: doubled by +": _grow("'a'", "ns.x + ns.x"),
    "string: doubled by ~": _grow("'é'", "ns.x ~ ns.x"),
    "string: doubled by replace": _grow("'a'", "ns.x.replace('a', 'aa')"),
    "string: squared by join": _grow("'ab'", "ns.x|join(ns.x)"),
    "string: every gap filled": "{{ ('a' * 99999).replace('', 'b' * 99999)|length }}",
    "string: wrapped": "{{ ('a ' * 999999)|wordwrap(1, wrapstring='b' * 9999) }}",
    "string: translated": "{{ ('a' * 999999).translate({97: 'b' * 999999}) }}",
    "string: quoted again and again": _grow("'\"'", "ns.x|tojson"),
    "string: split into letters": "{{ ('x y ' * 99999999).split()|length }}",
    "string: encoded": "{{ ('é' * 99999999).encode('utf-32')|length }}",
    "search: rfind": _again(_TEXT, "s.rfind('ba' * 999999)"),
    "search: find": _again(_TEXT, "s.find('aa')"),
    "search: count": _again(_TEXT, "s.count('aa')"),
    "search: rsplit": _again(_TEXT, "s.rsplit('b')"),
    "search: partition": _again(_TEXT, "s.rpartition('aa')"),
    "search: strip": _again("' ' * 9999999", "s.strip()"),
    "search: strip of many letters": "{{ ('a' * 9999999).strip('b' * 999999 + 'a')|length }}",
    "search: startswith": _again(_TEXT, "s.startswith(s)"),
    "search: equal": _again(_TEXT, "(s ~ 'x') == (s ~ 'y')"),
    "search: upper": _again(_TEXT, "s.upper()"),
    "search: tags": "{{ ('<' * 999999)|striptags }}" * 99,
    "search: addresses": "{{ ('www.a.b/((' * 99999)|urlize }}" * 99,
    "search: words": _again(_TEXT, "s|wordcount"),
    "search: title": _again("'a-b ' * 999999", "s|title"),
    # numbers
    "number: power": "{{ 10 ** (10 ** 10) > 1 }}",
    "number: squares": _grow("3", "ns.x * ns.x", "ns.x > 1"),
    "number: division": "{{ (7 ** 4999999) // (3 ** 999999) > 1 }}",
    "number: remainder": "{{ (7 ** 9999999) % (3 ** 3999999) > 1 }}",
    "number: bytes": "{{ (1).to_bytes(9999999999, 'big')|length }}",
    "number: precision": "{{ 1.5|round(999999999, 'floor') }}",
    "number: file size": "{{ (10 ** 300 * 10 ** 9999999)|filesizeformat }}",
    # lists and dicts
    "list: repeated": "{{ ([1] * 99999999999)|length }}",
    "list: doubled": _grow("[1]", "ns.x + ns.x"),
    "list: nested, printed": _grow("[1]", "[ns.x, ns.x]", "ns.x"),
    "list: nested, as JSON": _grow("[1]", "[ns.x, ns.x]", "ns.x|tojson"),
    "list: nested, compared": "{% set ns = namespace(x=[1], y=[1]) %}{% for i in range(99) %}"
    "{% set ns.x = [ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y] %}{% endfor %}{{ ns.x == ns.y }}",
    "list: nested, hashed": _grow("(1,)", "(ns.x, ns.x)", "{ns.x: 1}"),
    "list: nested, raised": _grow("[1]", "[ns.x, ns.x]", "raise_exception(ns.x)"),
    "list: nested, as a key": _grow("(1,)", "(ns.x, ns.x)", "{}[ns.x]"),
    "list: nested dicts": _grow("{}", "{'a': ns.x, 'b': ns.x}", "ns.x|string"),
    "list: slice": "{{ [1]|slice(999999999)|list|length }}",
    "list: batch": "{{ [1]|batch(999999999, 0)|list|length }}",
    "list: sum of lists": "{{ ([range(999)|list] * 99999)|sum(start=[])|length }}",
    "list: sums": _again(_LIST, "s|sum"),
    "list: sorted": _again(_LIST, "s|sort(reverse=true)"),
    "list: sorted by key": _again("[{'a': 'x' * 99999}, {'a': 'x' * 99999}] * 9999", "s|sort(attribute='a')"),
    "list: grouped": _again(_LIST, "s|groupby('real')|list"),
    "list: unique": _again(_LIST, "s|map('string')|unique|list"),
    "list: searched": _again(_LIST, "0.5 in s"),
    "list: reversed": _again(_LIST, "s|reverse|list"),
    "list: dictsort": _again("dict.fromkeys(range(99999))", "s|dictsort"),
    "list: attributes": _again(_LIST, "s|map(attribute='real.real.real.real.real')|list"),
    "list: random": _again(_LIST, "[s|random, s|random] + s"),
    "list: xmlattr": _grow("dict.fromkeys(range(99999))", "ns.x", "ns.x|xmlattr")
    + _N
    + "{{ {'a': 1}|xmlattr }}"
    + _END,
    # loops, calls and recursion
    "loop: busy": _N + _END,
    "loop: busy in a condition": "{% for i in range(99999) if range(99999)|list|sum < 0 %}{% endfor %}",
    "loop: product of ranges": "{{ (range(99999)|list * 99999)|length }}",
    "loop: captured": "{% set t %}" + _N + "text{{ i }}" + _END + "{% endset %}",
    "loop: output": "{% set s = 'x' * 999999 %}" + _N + "{{ s }}" + _END,
    "loop: recursive": "{% for x in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}" * 9999,
    "loop: generators in generators": _grow(_LIST, "ns.x|map('string')", "ns.x|list|length", 9999),
    "loop: cycler": "{% set c = cycler(*range(99999)) %}" + _N + "{{ c.next() }}" + _END,
    "loop: joiner": "{% set c = joiner('x' * 99999) %}" + _N + "{{ c() }}" + _END,
    "call: many arguments": "{% macro f() %}{{ varargs|length }}{% endmacro %}" + _N + "{{ f(*range(99999)) }}" + _END,
    "call: branching": "{% macro f(n) %}{% if n %}{{ f(n - 1) ~ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}",
    "call: caller": "{% macro f(n) %}{% if n %}{% call f(n - 1) %}x{% endcall %}{% call f(n - 1) %}x{% endcall %}"
    "{% endif %}{{ caller() }}{% endmacro %}{% call f(99) %}x{% endcall %}",
    "call: lipsum": "{{ lipsum(n=99999999) }}",
    CRASH: _grow("1", _deep("(", "ns.x", ",)", 40), "{ns.x: 1}|length", 9999),
    # sources
    "source: parentheses": "{{ " + _deep("(", "1", ")", 99999) + " }}",
    "source: brackets": "{{ " + _deep("[", "1", "]", 150) + " }}",
    "source: blocks": _deep("{% if true %}", "x", "{% endif %}", 30000),
    "source: a sum of thousands": "{{ x" + " + x" * 99999 + " }}",
    "source: a chain of filters": "{{ x" + "|e" * 9999 + " }}",
    "source: a chain of attributes": "{{ messages" + ".a" * 99999 + " }}",
    "source: many values": "{{ x }}" * 140000,
    "source: a huge number": "{{ " + "9" * 999999 + " }}",
    # what comes back
    "answer: a long message": "{{ raise_exception('x' * 99999999) }}",
    "answer: a long name": "{{ messages['x' * 9999999].y.z }}",
    "answer: surrogates": "{{ '\\ud800' * 99999999 }}",
    "answer: NUL": "{{ '\\0' * 99999999 }}" + "\0",
    "answer: four bytes a letter": "{% for i in range(99) %}{{ '\U0001f642' * 999999 }}{% endfor %}",
}
