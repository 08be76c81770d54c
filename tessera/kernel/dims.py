"""Symbolic sizes: integer expressions over named dims and run-time scalars.

In: dim text as written in an annotation ("B*S", "D/2", 64) or arithmetic on other sizes. Out: `Dim`,
a polynomial with integer coefficients in a normal form, so that equal sizes compare equal. Atoms are
dim names ("S"), exact fractions of them ("D/2": a promise, checked at launch, that 2 divides D), SSA
scalars of the IR ("%12"), and the non-polynomial terms `Term` (floor division, modulo, minimum, maximum)
of other dims. The frontend checks shapes with it; the backends evaluate it.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Self

from tessera.errors import InputError


class _Expression:
    """What grows with an expression is found once: expressions share their parts, and are keys of many tables."""

    _text: str
    _hash: int

    def __str__(self) -> str:
        return self._text

    __repr__ = __str__

    def __hash__(self) -> int:
        return self._hash

    def __deepcopy__(self, _: object) -> Self:
        return self

    def __getstate__(self) -> dict[str, object]:
        # Without what is cached: texts hash differently in another process.
        return {name: part for name, part in vars(self).items() if name not in ("_text", "_hash", "atoms")}


@dataclass(frozen=True, repr=False)
class Term(_Expression):
    """A non-polynomial atom: `op` is "//", "%", "min" or "max"."""

    op: str
    left: Dim
    right: Dim

    __hash__ = _Expression.__hash__

    def value(self, sizes: Mapping[str, int]) -> int:
        """The number it is at the given sizes."""
        left, right = self.left.value(sizes), self.right.value(sizes)
        if self.op == "//":
            return left // right
        if self.op == "%":
            return left % right
        return min(left, right) if self.op == "min" else max(left, right)

    @cached_property
    def _hash(self) -> int:  # type: ignore[override]
        return hash((self.op, self.left, self.right))

    @cached_property
    def _text(self) -> str:  # type: ignore[override]
        if self.op in ("min", "max"):
            return f"{self.op}({self.left}, {self.right})"
        return f"({self.left}){self.op}({self.right})"


Atom = str | Term
Monomial = tuple[Atom, ...]  # sorted by text, repeated for powers; () is the constant term


@dataclass(frozen=True, repr=False)
class Dim(_Expression):
    """A size: a sum of integer multiples of products of atoms, in normal form. Immutable and hashable."""

    terms: tuple[tuple[Monomial, int], ...]

    __hash__ = _Expression.__hash__

    @staticmethod
    def of(value: Dim | int | str) -> Dim:
        """A Dim from an int, from dim text ("D", "B*S", "D/2", "V+1", "2*D_ff"), or itself.

        Raises:
            InputError: the text is not an expression of names, ints and + - * / // %.
        """
        if isinstance(value, Dim):
            return value
        if isinstance(value, int):
            return _make({(): int(value)})
        return _parse(value)

    @staticmethod
    def atom(name: Atom) -> Dim:
        """The size that one atom stands for."""
        return _make({(name,): 1})

    @property
    def const(self) -> int | None:
        """The value when it is known now, else None."""
        if not self.terms:
            return 0
        if len(self.terms) == 1 and self.terms[0][0] == ():
            return self.terms[0][1]
        return None

    @cached_property
    def atoms(self) -> frozenset[str]:
        """Names and SSA scalars that the value depends on."""
        found: set[str] = set()
        for monomial, _ in self.terms:
            for atom in monomial:
                found |= {atom} if isinstance(atom, str) else atom.left.atoms | atom.right.atoms
        return frozenset(found)

    def __add__(self, other: Dim | int) -> Dim:
        total = dict(self.terms)
        for monomial, factor in Dim.of(other).terms:
            total[monomial] = total.get(monomial, 0) + factor
        return _make(total)

    __radd__ = __add__

    def __neg__(self) -> Dim:
        return self * -1

    def __sub__(self, other: Dim | int) -> Dim:
        return self + -Dim.of(other)

    def __rsub__(self, other: Dim | int) -> Dim:
        return Dim.of(other) - self

    def __mul__(self, other: Dim | int) -> Dim:
        product: dict[Monomial, int] = {}
        for left, a in self.terms:
            for right, b in Dim.of(other).terms:
                monomial = tuple(sorted(left + right, key=str))
                product[monomial] = product.get(monomial, 0) + a * b
        return _make(product)

    __rmul__ = __mul__

    def __floordiv__(self, other: Dim | int) -> Dim:
        divisor = Dim.of(other)
        if self.const is not None and divisor.const:
            return Dim.of(self.const // divisor.const)
        exact = _divide_exactly(self, divisor)
        return exact if exact is not None else Dim.atom(Term("//", self, divisor))

    def __mod__(self, other: Dim | int) -> Dim:
        divisor = Dim.of(other)
        if self.const is not None and divisor.const:
            return Dim.of(self.const % divisor.const)
        if _divide_exactly(self, divisor) is not None:
            return Dim.of(0)
        return Dim.atom(Term("%", self, divisor))

    def minimum(self, other: Dim | int) -> Dim:
        """min(self, other), folded when the difference is known."""
        return self._extreme("min", Dim.of(other))

    def maximum(self, other: Dim | int) -> Dim:
        """max(self, other), folded when the difference is known."""
        return self._extreme("max", Dim.of(other))

    def _extreme(self, op: str, other: Dim) -> Dim:
        gap = (self - other).const
        if gap is None:
            left, right = sorted((self, other), key=str)
            return Dim.atom(Term(op, left, right))
        return self if (gap <= 0) == (op == "min") else other

    def ceildiv(self, other: Dim | int) -> Dim:
        """Blocks of `other` that cover self."""
        return (self + Dim.of(other) - 1) // other

    def substitute(self, replace: Mapping[str, Dim]) -> Dim:
        """The same expression with atoms replaced."""
        if not (self.atoms & replace.keys()):
            return self
        return self.evaluate(lambda name: replace.get(name, Dim.atom(name)))

    def evaluate(self, lookup: Callable[[str], Dim]) -> Dim:
        """Rebuild the expression with every name looked up (as a Dim; `Dim.of(int)` for numbers)."""
        total = Dim.of(0)
        for monomial, factor in self.terms:
            product = Dim.of(factor)
            for atom in monomial:
                product = product * (lookup(atom) if isinstance(atom, str) else _apply(atom, lookup))
            total = total + product
        return total

    def value(self, sizes: Mapping[str, int]) -> int:
        """The number it is at the given sizes.

        Raises:
            KeyError: a name has no size.
        """
        total = 0
        for monomial, product in self.terms:
            for atom in monomial:
                product *= _size(atom, sizes) if isinstance(atom, str) else atom.value(sizes)
            total += product
        return total

    @cached_property
    def _hash(self) -> int:  # type: ignore[override]
        return hash(self.terms)

    @cached_property
    def _text(self) -> str:  # type: ignore[override]
        if not self.terms:
            return "0"
        parts = []
        for monomial, factor in self.terms:
            factor, names = _whole(factor, monomial)
            product = "*".join(names)
            if not monomial:
                parts.append(str(factor))
            else:
                parts.append(product if factor == 1 else f"-{product}" if factor == -1 else f"{factor}*{product}")
        return "+".join(parts).replace("+-", "-")


def split_fraction(atom: str) -> tuple[str, int]:
    """("D", 2) of the atom "D/2"; ("D", 1) of "D"."""
    name, _, divisor = atom.partition("/")
    return name, int(divisor or 1)


def _size(atom: str, sizes: Mapping[str, int]) -> int:
    if atom in sizes:
        return sizes[atom]
    name, divisor = split_fraction(atom)
    return sizes[name] // divisor


def _whole(factor: int, monomial: Monomial) -> tuple[int, list[str]]:
    """For printing: 2*D/2 is D."""
    names = []
    for atom in monomial:
        name, divisor = split_fraction(atom) if isinstance(atom, str) else ("", 1)
        if divisor > 1 and factor % divisor == 0:
            factor //= divisor
            names.append(name)
        else:
            names.append(str(atom))
    return factor, names


def _make(terms: Mapping[Monomial, int]) -> Dim:
    kept = [(monomial, factor) for monomial, factor in terms.items() if factor]
    # Largest monomials first, so that the text of a size reads as people write it: B*S+1.
    kept.sort(key=lambda item: (-len(item[0]), [str(a) for a in item[0]]))
    return Dim(tuple(kept))


def _apply(term: Term, lookup: Callable[[str], Dim]) -> Dim:
    left, right = term.left.evaluate(lookup), term.right.evaluate(lookup)
    if term.op == "//":
        return left // right
    if term.op == "%":
        return left % right
    return left.minimum(right) if term.op == "min" else left.maximum(right)


def _divide_exactly(dividend: Dim, divisor: Dim) -> Dim | None:
    """dividend / divisor where the divisor is one monomial that divides every term; else None."""
    if len(divisor.terms) != 1:
        return None
    (by, factor), = divisor.terms
    quotient: dict[Monomial, int] = {}
    for monomial, coefficient in dividend.terms:
        rest = list(monomial)
        for atom in by:
            if atom not in rest:
                return None
            rest.remove(atom)
        if coefficient % factor:
            return None
        quotient[tuple(rest)] = coefficient // factor
    return _make(quotient)


@lru_cache(maxsize=4096)
def _parse(text: str) -> Dim:
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        return _from_ast(tree)
    except (SyntaxError, ValueError, KeyError, RecursionError):
        raise InputError(
            f"dim: {text!r} is not a size; expected names and ints joined by + - * / // %, e.g. 'B*S' or 'D/2'"
        ) from None


def _from_ast(node: ast.expr) -> Dim:
    if isinstance(node, ast.Name):
        return Dim.atom(node.id)
    if isinstance(node, ast.Constant) and isinstance(node.value, int) and not isinstance(node.value, bool):
        return Dim.of(node.value)
    if isinstance(node, ast.BinOp):
        left, right = _from_ast(node.left), _from_ast(node.right)
        if isinstance(node.op, (ast.Div, ast.FloorDiv, ast.Mod)) and right.const == 0:
            raise ValueError("division by zero")
        if isinstance(node.op, ast.Div) and isinstance(node.left, ast.Name) and (right.const or 0) > 0:
            return Dim.atom(f"{node.left.id}/{right.const}")
        operations: dict[type, Callable[[], Dim]] = {
            ast.Add: lambda: left + right, ast.Sub: lambda: left - right, ast.Mult: lambda: left * right,
            ast.Div: lambda: left // right, ast.FloorDiv: lambda: left // right, ast.Mod: lambda: left % right,
        }
        return operations[type(node.op)]()
    raise ValueError(text_of(node))


def text_of(node: ast.AST) -> str:
    """The source text of a syntax node."""
    return ast.unparse(node)
