"""Conditions on a trial's settings, such as `samples >= 120 or loss == 'full'`: comparisons and arithmetic, no code."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

from tokenize_data.errors import UserError

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_COMPARED: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda one, other: one in other,
    ast.NotIn: lambda one, other: one not in other,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}
_MOST_CHARACTERS = 500


def holds(text: str, values: Mapping[str, Any], where: str) -> bool:
    """Whether a condition holds for these settings."""
    if len(text) > _MOST_CHARACTERS:
        raise UserError(f"{where}: a condition of {len(text):,} characters: write it as several")
    try:
        return bool(_value(ast.parse(text.strip(), mode="eval").body, values, where))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(
            f"{where}: {text!r} is not a condition ({error}): write it as samples >= 120 or loss == 'full'"
        ) from error
    except (TypeError, ZeroDivisionError, OverflowError) as error:
        raise UserError(
            f"{where}: {text!r} cannot be computed ({error}): compare numbers with numbers, texts with texts"
        ) from error


def _value(node: ast.expr, values: Mapping[str, Any], where: str) -> Any:
    match node:
        case ast.Constant(value=value) if isinstance(value, int | float | str | None):
            return value
        case ast.Name(id=name):
            if name not in values:
                raise UserError(f"{where}: there is no axis or setting '{name}': known are {', '.join(sorted(values))}")
            return values[name]
        case ast.BoolOp(op=op, values=parts):
            check = all if isinstance(op, ast.And) else any
            return check(_value(part, values, where) for part in parts)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return not _value(operand, values, where)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, values, where)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            one, other = _value(left, values, where), _value(right, values, where)
            if not all(isinstance(part, int | float) for part in (one, other)):
                raise TypeError(f"{one!r} and {other!r} are not both numbers")
            return _BINARY[type(op)](one, other)
        case ast.Compare(left=left, ops=ops, comparators=others):
            sides = [_value(side, values, where) for side in (left, *others)]
            return all(_COMPARED[type(op)](one, other) for op, one, other in zip(ops, sides, sides[1:], strict=False))
        case ast.List(elts=parts) | ast.Tuple(elts=parts):
            return [_value(part, values, where) for part in parts]
        case _:
            raise ValueError(f"{ast.unparse(node)[:60]} is not allowed")
