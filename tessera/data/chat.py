"""Chat templates: Jinja programs from model files, rendered without trusting them.

In: a template's source (GGUF metadata, tokenizer_config.json, chat_template.jinja) and the messages. Out: the
prompt's text, equal to what transformers renders. Called by data.tokenizer.

A template is a program that came with the weights. Jinja's sandbox keeps it from Python's internals; this
module also bounds its time and memory. Every operation spends from a budget that grows with the
messages: a fixed cost, and the size of what it reads and makes, before it is made where it can be larger
than what it reads. Filters, tests, methods and operators that no chat template needs and that could blow
up (center, format, **, ...) are not there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from datetime import datetime
from functools import wraps
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace, pass_context

from tessera.errors import FileFormatError, InputError

MAX_TEMPLATE_CHARS = 256 << 10  # the longest published ones have about 30,000
BASE_BUDGET = 8 << 20
BUDGET_PER_CHAR = 64  # of the messages: templates read each of them a few times
_OPERATION_COST = 16
_MAX_DEPTH = 64
_MAX_INT_BITS = 128

_FILTERS = (
    "abs capitalize count d default dictsort e escape first float int items join last length list lower map max min "
    "reject rejectattr replace reverse safe select selectattr sort string title trim unique upper").split()
_METHODS: dict[type, frozenset[str]] = {
    str: frozenset(
        "capitalize count endswith find index isalnum isalpha isascii isdecimal isdigit islower isnumeric isspace "
        "istitle isupper join lower lstrip partition removeprefix removesuffix replace rfind rindex rpartition rsplit "
        "rstrip split splitlines startswith strip swapcase title upper".split()),
    dict: frozenset(("get", "items", "keys", "values", "copy")),
    list: frozenset(("count", "index", "copy")),
    tuple: frozenset(("count", "index")),
}


class _Budget:
    """What a rendering may still spend; one unit is about one character copied or compared."""

    def __init__(self, units: int) -> None:
        self.units = units

    def spend(self, units: int) -> None:
        self.units -= units
        if self.units < 0:
            raise SecurityError("it takes too much time or memory")

    def read(self, value: Any, depth: int = 0) -> None:
        """Spend the size of `value`: characters of strings, items of containers."""
        if isinstance(value, str):
            self.spend(1 + len(value))
        elif isinstance(value, (list, tuple, dict)):
            if depth == _MAX_DEPTH:
                raise SecurityError(f"a value is nested deeper than {_MAX_DEPTH}")
            self.spend(4)
            if isinstance(value, dict):
                self.read(list(value), depth)
                value = value.values()
            for item in value:
                self.read(item, depth + 1)
        elif isinstance(value, int) and value.bit_length() > _MAX_INT_BITS:
            raise SecurityError(f"an integer has more than {_MAX_INT_BITS} bits")
        else:
            self.spend(4)


_budget: ContextVar[_Budget] = ContextVar("budget")


def _metered(function: Any) -> Callable[..., Any]:
    """A filter or test that spends what it reads, and what it makes where that is a value already."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        budget = _budget.get()
        budget.spend(_OPERATION_COST)
        for value in (*args, *kwargs.values()):
            budget.read(value)
        result = function(*args, **kwargs)
        budget.read(result)
        return result

    return run


@pass_context  # keeps the compiler from folding the filter's input when the template is compiled
def _read(context: Context, value: Any) -> Any:
    """Put around values that the compiled template copies or compares by itself."""
    _budget.get().read(value)
    return value


@pass_context
def _each(context: Context, values: Iterable[Any]) -> Iterator[Any]:
    """Put around what a `for` statement goes through."""
    if isinstance(values, Undefined):
        yield from values
        return
    budget = _budget.get()
    for value in values:
        budget.spend(_OPERATION_COST)
        yield value


def _replace(text: Any, old: str, new: str, count: int = -1) -> str:
    text, old, new = str(text), str(old), str(new)
    _budget.get().spend(text.count(old) * len(new))
    return text.replace(old, new, -1 if count is None else count)


def _joined(separator: str, values: Iterable[Any]) -> str:
    budget, parts = _budget.get(), []
    for value in values:
        budget.read(value)
        budget.spend(len(separator))
        parts.append(str(value))
    return separator.join(parts)


@jinja2.pass_environment
def _join(environment: jinja2.Environment, values: Iterable[Any], d: str = "", attribute: str | None = None) -> str:
    get = (lambda item: item) if attribute is None else jinja2.filters.make_attrgetter(environment, attribute)
    return _joined(str(d), (get(value) for value in values))


def _indent(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    pad = width if isinstance(width, str) else " " * min(width, 64)
    lines = str(text).split("\n")
    _budget.get().spend(len(lines) * len(pad))
    out = [pad + line if line or blank else line for line in lines[1:]]
    return "\n".join([pad + lines[0] if first else lines[0], *out])


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None,
    separators: tuple[str, str] | None = None, sort_keys: bool = False,
) -> str:
    """JSON as transformers writes it (Jinja's own filter escapes HTML)."""
    if indent is not None and not 0 <= indent <= 16:
        raise SecurityError(f"tojson(indent={indent})")
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    budget, parts = _budget.get(), []
    for part in encoder.iterencode(value):
        budget.spend(1 + len(part))
        parts.append(part)
    return "".join(parts)


def _range(*args: int) -> range:
    values = range(*args)
    _budget.get().spend(len(values))
    return values


class _TemplateNamespace(Namespace):
    """Jinja's namespace without underscore names."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"namespace attribute {name!r}")
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"  # not its values, of which it may hold any number


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    if re.search(r"%[^A-Za-z%-]", pattern) or len(pattern) > 256:  # "%99999999d" would be padded to that width
        raise SecurityError(f"strftime_now({pattern[:40]!r})")
    return datetime.now().strftime(pattern)


class _Generation(Extension):
    """{% generation %}...{% endgeneration %} marks what training learns from; here it is plain content."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's declaration)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def call_binop(self, context: Context, operator_: str, left: Any, right: Any) -> Any:
        budget = _budget.get()
        budget.spend(_OPERATION_COST)
        numbers = all(isinstance(value, (int, float)) for value in (left, right))
        if operator_ == "**" or (operator_ in "*%" and not numbers and not _is_repeat(left, right, operator_)):
            raise SecurityError(f"{type(left).__name__} {operator_} {type(right).__name__}")
        if operator_ == "*" and not numbers:
            count, value = (left, right) if isinstance(left, int) else (right, left)
            budget.spend(max(count, 0) * len(value))
        budget.read(left)
        budget.read(right)
        result = self.binop_table[operator_](left, right)
        budget.read(result)
        return result

    def wrap_str_format(self, value: Any) -> None:
        """The sandbox's own way to allow str.format, which bounds no widths."""
        if getattr(value, "__name__", "") in ("format", "format_map") and isinstance(
                getattr(value, "__self__", None), str):
            raise SecurityError("str.format is not available")

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        budget = _budget.get()
        budget.spend(_OPERATION_COST)
        owner = getattr(__obj, "__self__", None)
        for kind, allowed in _METHODS.items():
            if isinstance(owner, kind) and __obj.__name__ not in allowed:
                raise SecurityError(f"{kind.__name__}.{__obj.__name__} is not available")
        if isinstance(owner, (int, float, bytes, complex)):
            raise SecurityError(f"methods of {type(owner).__name__} are not available")
        for value in (owner, *args, *kwargs.values()):
            budget.read(value)
        if isinstance(owner, str) and __obj.__name__ == "replace":
            return _replace(owner, *args, **kwargs)
        if isinstance(owner, str) and __obj.__name__ == "join":
            return _joined(owner, *args, **kwargs)
        result = super().call(__context, __obj, *args, **kwargs)
        if not isinstance(result, type({}.items())):
            budget.read(result)
        return result


def _is_repeat(left: Any, right: Any, operator_: str) -> bool:
    return operator_ == "*" and {type(left), type(right)} in ({str, int}, {list, int})


def _environment() -> _Environment:
    # Not optimized: the optimizer would evaluate constant expressions before anything is bounded.
    env = _Environment(trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[loopcontrols, _Generation])
    env.filters = {name: _metered(env.filters[name]) for name in _FILTERS}
    env.filters |= {
        "replace": _metered(_replace), "join": _metered(_join), "indent": _metered(_indent),
        "tojson": _metered(_tojson), "_read": _read, "_each": _each}
    env.tests = {name: _metered(test) for name, test in env.tests.items()}
    env.globals = {
        "range": _range, "dict": dict, "namespace": _TemplateNamespace, "raise_exception": _raise_exception,
        "strftime_now": _strftime_now}
    return env


_ENVIRONMENT = _environment()


def _meter(tree: nodes.Template) -> nodes.Template:
    """Have the parts of a template that run without a filter, call or operator spend their cost too."""

    def wrap(node: Any, name: str = "_read") -> nodes.Filter:
        return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)

    slices = [node for node in tree.find_all(nodes.Getitem) if isinstance(node.arg, nodes.Slice)]
    for loop in tree.find_all(nodes.For):
        if loop.recursive:
            raise jinja2.TemplateSyntaxError("recursive loops are not available", loop.lineno)
        loop.iter = wrap(loop.iter, "_each")
    for output in tree.find_all(nodes.Output):
        output.nodes = [wrap(node) for node in output.nodes]
    for concat in tree.find_all(nodes.Concat):
        concat.nodes = [wrap(node) for node in concat.nodes]
    for compare in tree.find_all(nodes.Compare):
        compare.expr = wrap(compare.expr)
        for operand in compare.ops:
            operand.expr = wrap(operand.expr)
    for node in slices:  # the slice copies: what is sliced bounds it
        node.node = wrap(node.node)
    return tree


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: Jinja source, as transformers reads it.

    Raises:
        FileFormatError: too long, or not a template that can be compiled.
    """

    def __init__(self, source: str) -> None:
        if len(source) > MAX_TEMPLATE_CHARS:
            raise FileFormatError(f"chat_template: {len(source)} characters; at most {MAX_TEMPLATE_CHARS} are allowed")
        try:
            self._template = _ENVIRONMENT.from_string(_meter(_ENVIRONMENT.parse(source)))
        except (jinja2.TemplateError, RecursionError, ValueError, SyntaxError, MemoryError, TypeError) as error:
            raise FileFormatError(f"chat_template: does not compile: {error}") from error

    def render(self, variables: Mapping[str, Any]) -> str:
        """The template's text with these variables (plain JSON values).

        Raises:
            InputError: the template refuses the variables (raise_exception), fails on them, tries what the
                sandbox forbids, or spends more than its budget.
        """
        plain = _plain(dict(variables))
        budget = _Budget(BASE_BUDGET + BUDGET_PER_CHAR * _count_chars(plain))
        token = _budget.set(budget)
        try:
            return self._template.render(plain)
        except SecurityError as error:
            raise InputError(f"chat_template: not allowed: {error}") from error
        except jinja2.TemplateError as error:
            raise InputError(f"chat_template: {error}") from error
        except RecursionError as error:
            raise InputError("chat_template: not allowed: it recurses too deep") from error
        except Exception as error:  # whatever a faulty template does with the values, it is the template's error
            raise InputError(f"chat_template: fails with {type(error).__name__}: {error}") from error
        finally:
            _budget.reset(token)


def _plain(value: Any, depth: int = 0) -> Any:
    """`value` rebuilt of JSON types, so that the template meets no methods but theirs."""
    if depth > _MAX_DEPTH:
        raise InputError(f"messages: nested deeper than {_MAX_DEPTH}")
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, depth + 1) for item in value]
    raise InputError(f"messages: a value of type {type(value).__name__}; expected what JSON holds")


def _count_chars(value: Any) -> int:
    if isinstance(value, dict):
        return sum(8 + len(key) + _count_chars(item) for key, item in value.items())
    if isinstance(value, list):
        return sum(8 + _count_chars(item) for item in value)
    return len(value) if isinstance(value, str) else 8
