"""A calculator for models: arithmetic on the syntax tree, without `eval` and without a way to run long.

Every operation bounds its result before it is computed: whole numbers to 4096 bits (1233 digits), factorials
to 500, digits of `round` to 100, expressions to 1000 characters and 100 levels. The slowest allowed
expression takes milliseconds.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

from broker.errors import InvalidInput, quoted
from broker.runs.tools import Tool, ToolContext

Number = int | float

_MAX_CHARS = 1000
_MAX_DEPTH = 100
_MAX_BITS = 4096
_MAX_FACTORIAL = 500
_MAX_ROUND_DIGITS = 100
_TYPED_SIGNS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-"})


def calculate(expression: str) -> str:
    """Return the value of `expression`: whole numbers in full, others with 15 significant digits.

    Raises InvalidInput that names what is not understood, too large or undefined.
    """
    if len(expression) > _MAX_CHARS:
        raise InvalidInput(f"the expression has {len(expression)} characters; at most {_MAX_CHARS} are allowed")
    try:
        tree = ast.parse(expression.translate(_TYPED_SIGNS).strip(), mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else str(error)
        raise InvalidInput(f"{quoted(expression)} is not an arithmetic expression: {reason}") from error
    try:
        value = _value(tree.body, 0)
    except ZeroDivisionError as error:
        raise InvalidInput(f"{quoted(expression)} divides by zero") from error
    except OverflowError as error:
        raise InvalidInput(f"{quoted(expression)} has a result too large to compute") from error
    except (ValueError, TypeError) as error:
        raise InvalidInput(f"{quoted(expression)} is not defined: {error}") from error
    return _text(value, expression)


def _text(value: Number, expression: str) -> str:
    if isinstance(value, int):
        return str(value)
    if not math.isfinite(value):
        raise InvalidInput(f"{quoted(expression)} has no finite value")
    # 15 digits are what a float holds for certain: 0.1 + 0.2 is 0.3 to whoever asks.
    return f"{value:.15g}"


def _value(node: ast.expr, depth: int) -> Number:
    if depth > _MAX_DEPTH:
        raise InvalidInput(f"the expression is nested more than {_MAX_DEPTH} levels deep")
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return _bounded(value)
        case ast.BinOp(left=left, op=op, right=right):
            return _binary(op, _value(left, depth + 1), _value(right, depth + 1))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, depth + 1)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _value(operand, depth + 1)
        case ast.Name(id=name) if name in _CONSTANTS:
            return _CONSTANTS[name]
        case ast.Name(id=name):
            known = ", ".join(_CONSTANTS)
            raise InvalidInput(
                f"unknown name {quoted(name)}; known are the constants {known} and the functions {_NAMES}"
            )
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]):
            return _call(name, [_value(argument, depth + 1) for argument in args])
    raise InvalidInput(
        f"{quoted(ast.unparse(node))} is not arithmetic; numbers, + - * / // % **, parentheses and the functions "
        f"{_NAMES} are"
    )


def _binary(op: ast.operator, left: Number, right: Number) -> Number:
    if isinstance(op, ast.Pow):
        return _power(left, right)
    if isinstance(op, ast.BitXor):
        raise InvalidInput("^ is not a power here; write ** instead")
    compute = _OPERATORS.get(type(op))
    if compute is None:
        raise InvalidInput(f"the operator {type(op).__name__} is not supported; use + - * / // % **")
    return _bounded(compute(left, right))


def _power(base: Number, exponent: Number) -> Number:
    if isinstance(base, int) and isinstance(exponent, int) and exponent >= 0:
        # 0, 1 and -1 stay small whatever the exponent is.
        if abs(base) > 1 and (abs(base).bit_length() - 1) * exponent > _MAX_BITS:
            raise OverflowError
        return _bounded(base**exponent)
    value = base**exponent
    if isinstance(value, complex):
        raise InvalidInput(f"{base} ** {exponent} is not a real number")
    return _bounded(value)


def _call(name: str, arguments: list[Number]) -> Number:
    if name not in _FUNCTIONS:
        raise InvalidInput(f"unknown function {quoted(name)}; known are {_NAMES}")
    compute, least, most = _FUNCTIONS[name]
    if not least <= len(arguments) <= most:
        takes = str(least) if least == most else f"{least} to {most}" if most < _ANY else f"{least} or more"
        raise InvalidInput(f"{name} takes {takes} arguments, not {len(arguments)}")
    try:
        return _bounded(compute(*arguments))
    except (ValueError, TypeError) as error:
        given = ", ".join(str(argument)[:40] for argument in arguments)
        raise InvalidInput(f"{name}({given}) is not defined: {error}") from error


def _bounded(value: Number) -> Number:
    """Return `value`.

    Whole numbers beyond the bound raise OverflowError, before anything larger is made of them.
    """
    if isinstance(value, int) and value.bit_length() > _MAX_BITS:
        raise OverflowError
    return value


def _round(value: Number, digits: Number = 0) -> Number:
    if not isinstance(digits, int) or abs(digits) > _MAX_ROUND_DIGITS:
        raise InvalidInput(f"round takes a whole number of digits up to {_MAX_ROUND_DIGITS}, not {digits}")
    return round(value, digits) if digits else round(value)


def _factorial(value: Number) -> int:
    if not isinstance(value, int) or not 0 <= value <= _MAX_FACTORIAL:
        raise InvalidInput(f"factorial takes a whole number from 0 to {_MAX_FACTORIAL}, not {value}")
    return math.factorial(value)


def _sqrt(value: Number) -> Number:
    """Return the root; that of a square number is whole, however large."""
    if isinstance(value, int) and value >= 0 and (root := math.isqrt(value)) ** 2 == value:
        return root
    return math.sqrt(value)


_ANY = 1000
_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_CONSTANTS: dict[str, float] = {"pi": math.pi, "e": math.e, "tau": math.tau}
# name: (function, fewest arguments, most arguments)
_FUNCTIONS: dict[str, tuple[Callable[..., Number], int, int]] = {
    "abs": (abs, 1, 1),
    "ceil": (math.ceil, 1, 1),
    "floor": (math.floor, 1, 1),
    "trunc": (math.trunc, 1, 1),
    "round": (_round, 1, 2),
    "sqrt": (_sqrt, 1, 1),
    "exp": (math.exp, 1, 1),
    "log": (math.log, 1, 2),
    "log2": (math.log2, 1, 1),
    "log10": (math.log10, 1, 1),
    "sin": (math.sin, 1, 1),
    "cos": (math.cos, 1, 1),
    "tan": (math.tan, 1, 1),
    "asin": (math.asin, 1, 1),
    "acos": (math.acos, 1, 1),
    "atan": (math.atan, 1, 1),
    "atan2": (math.atan2, 2, 2),
    "degrees": (math.degrees, 1, 1),
    "radians": (math.radians, 1, 1),
    "hypot": (math.hypot, 1, _ANY),
    "min": (lambda *values: min(values), 1, _ANY),
    "max": (lambda *values: max(values), 1, _ANY),
    "sum": (lambda *values: sum(values), 1, _ANY),
    "mean": (lambda *values: sum(values) / len(values), 1, _ANY),
    "gcd": (math.gcd, 1, _ANY),
    "factorial": (_factorial, 1, 1),
}
_NAMES = ", ".join(_FUNCTIONS)


def _run(tool_input: Mapping[str, Any], context: ToolContext) -> str:
    return calculate(tool_input["expression"])


CALCULATOR = Tool(
    name="calculator",
    description=(
        "Compute an arithmetic expression exactly. Operators: + - * / // % ** and parentheses. "
        f"Functions: {_NAMES}. Constants: pi, e, tau. Angles are in radians."
    ),
    parameters={
        "type": "object",
        "properties": {
            "expression": {
                "type": "string",
                "minLength": 1,
                "maxLength": _MAX_CHARS,
                "description": "For example: (1231 * 2331 + 17) / 4, sqrt(2) ** 3, round(pi, 4)",
            }
        },
        "required": ["expression"],
        "additionalProperties": False,
    },
    call=_run,
    timeout_s=5.0,
)
