"""A calculator for models: exact arithmetic with an explicit grammar, in bounded time and memory.

    calculate("2 * (3 + 4) ^ 2")  ->  "98"
    calculate("9**9**9")          ->  CalculationError: the result is too large

Nothing is evaluated as Python. Integers and fractions are exact; functions such as `sqrt` return 53-bit floats. The
LALR parser computes values while parsing, so nothing recurses with depth or length.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from decimal import Context, Decimal, localcontext
from fractions import Fraction
from functools import lru_cache
from typing import Any

LONGEST_EXPRESSION = 1000  # characters
LARGEST_BITS = 4096  # of numerator and denominator: 1,233 digits
SHOWN_DIGITS = 12  # of a non-terminating decimal
FLOAT_FUNCTIONS = ("exp", "sin", "cos", "tan", "log10", "log2", "asin", "acos", "atan", "radians", "degrees")
CONSTANTS = {"pi": math.pi, "e": math.e}

GRAMMAR = r"""
?start: sum "="?
?sum: product
    | sum "+" product         -> add
    | sum ("-" | "\u2212") product -> subtract
?product: signed
    | product ("*" | "\u00d7" | "\u00b7") signed -> multiply
    | product ("/" | "\u00f7") signed       -> divide
    | product "//" signed              -> floor_divide
    | product "%" signed               -> modulo
?signed: power
    | "+" signed
    | ("-" | "\u2212") signed -> negate
?power: atom
    | atom ("**" | "^") signed -> power
?atom: NUMBER                      -> number
    | NAME                         -> constant
    | NAME "(" sum ("," sum)* ")"  -> call
    | "(" sum ")"
NUMBER: /(\d{1,3}(_\d{3})+|\d+)(\.\d*)?([eE][+-]?\d+)?|\.\d+([eE][+-]?\d+)?/
NAME: /[a-z][a-z0-9]*/
%ignore /\s+/
"""

Number = Fraction | float


class CalculationError(ValueError):
    """An error in an expression, as a short message to the model."""


def calculate(expression: str) -> str:
    """Return the value of an expression, formatted.

    Raises CalculationError if it cannot be parsed, is undefined, or is too large.

    >>> calculate("0.1 + 0.2"), calculate("7 / 2"), calculate("1/3"), calculate("max(2, sqrt(16)) = ")
    ('0.3', '3.5', '0.333333333333', '4')
    """
    if len(expression) > LONGEST_EXPRESSION:
        raise CalculationError(f"the expression is longer than {LONGEST_EXPRESSION} characters")
    from lark.exceptions import UnexpectedCharacters, UnexpectedEOF, UnexpectedInput, UnexpectedToken, VisitError

    plain = expression.lower()
    if not re.search(r"[a-z]\s*\(", plain):  # no function arguments: 1,234,567 is one number
        plain = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", plain)
    try:
        value = _parser().parse(plain)
    except UnexpectedEOF:
        raise CalculationError("the expression is not finished") from None
    except (UnexpectedToken, UnexpectedCharacters) as error:
        at = error.pos_in_stream or 0
        if at >= len(expression) or getattr(getattr(error, "token", None), "type", "") == "$END":
            raise CalculationError("the expression is not finished") from None
        raise CalculationError(f"cannot read {expression[at : at + 10]!r} at character {at + 1}") from None
    except (UnexpectedInput, VisitError) as error:
        reason = getattr(error, "orig_exc", None)
        raise reason if isinstance(reason, CalculationError) else CalculationError("cannot be read") from None
    return _written(value)  # type: ignore[arg-type]  # the transformer leaves a number, not a tree


def _written(value: Number) -> str:
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 2**53 else f"{value:.{SHOWN_DIGITS}g}"
    if value.denominator == 1:
        return str(value.numerator)
    digits = value.denominator.bit_length()  # at least the number of decimals, if it terminates
    ends = digits <= 64 and 10**digits % value.denominator == 0
    with localcontext(Context(prec=LARGEST_BITS if ends else SHOWN_DIGITS)):
        quotient = Decimal(value.numerator) / Decimal(value.denominator)
        return f"{quotient:f}" if ends else f"{quotient:.{SHOWN_DIGITS}g}"


# ---- values


def _bounded(value: Number) -> Number:
    if isinstance(value, float):
        if not math.isfinite(value):
            raise CalculationError("the result is too large, or no number")
    elif max(value.numerator.bit_length(), value.denominator.bit_length()) > LARGEST_BITS:
        raise CalculationError("the result is too large")
    return value


def _number(text: str) -> Number:
    mantissa, _, exponent = text.replace("_", "").partition("e")
    if exponent and abs(int(exponent)) > LARGEST_BITS // 4:
        raise CalculationError("the number is too large or too small")
    return _bounded(Fraction(mantissa.rstrip(".") or "0") * Fraction(10) ** int(exponent or 0))


def _power(base: Number, exponent: Number) -> Number:
    if base == 0 and exponent < 0:
        raise CalculationError("division by zero")
    if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1:
        if abs(base) in (0, 1):  # only the exponent's parity matters
            return base ** (2 - int(exponent) % 2) if exponent else Fraction(1)
        size = max(base.numerator.bit_length(), base.denominator.bit_length())
        if abs(exponent) * (size - 1) > LARGEST_BITS:
            raise CalculationError("the result is too large")
        return base ** int(exponent)
    if base < 0:
        raise CalculationError("a negative number has no such power")
    return math.pow(base, exponent)


def _divided(left: Number, right: Number, floor: bool = False) -> Number:
    if right == 0:
        raise CalculationError("division by zero")
    if isinstance(left, float) or isinstance(right, float):
        left, right = float(left), float(right)
    return Fraction(math.floor(left / right)) if floor else left / right


def _whole(value: Number) -> int:
    if value != int(value):
        raise CalculationError("expected a whole number")
    return int(value)


def _factorial(value: Number) -> Number:
    if not 0 <= _whole(value) <= 500:
        raise CalculationError("factorial: expected a whole number from 0 to 500")
    return Fraction(math.factorial(int(value)))


def _square_root(value: Number) -> Number:
    if isinstance(value, Fraction) and value >= 0:
        roots = math.isqrt(value.numerator), math.isqrt(value.denominator)
        if roots[0] ** 2 == value.numerator and roots[1] ** 2 == value.denominator:
            return Fraction(*roots)
    return math.sqrt(value)


def _rounded(value: Number, digits: Number = Fraction(0)) -> Number:
    """Round half away from zero, as people do."""
    places = _whole(digits)
    if abs(places) > 100:
        raise CalculationError("round: expected at most 100 digits")
    scaled = Fraction(value) * Fraction(10) ** places
    nearest = math.floor(abs(scaled) + Fraction(1, 2))
    return Fraction(nearest if scaled >= 0 else -nearest) / Fraction(10) ** places


# name: (function, fewest and most arguments)
FUNCTIONS: dict[str, tuple[Callable[..., Any], int, int]] = {
    "sqrt": (_square_root, 1, 1),
    "abs": (abs, 1, 1),
    "min": (lambda *values: min(values), 1, 100),  # Python's min takes a single value for an iterable
    "max": (lambda *values: max(values), 1, 100),
    "sum": (lambda *values: sum(values, Fraction(0)), 1, 100),
    "round": (_rounded, 1, 2),
    "floor": (lambda value: Fraction(math.floor(value)), 1, 1),
    "ceil": (lambda value: Fraction(math.ceil(value)), 1, 1),
    "factorial": (_factorial, 1, 1),
    "gcd": (lambda *values: Fraction(math.gcd(*map(_whole, values))), 1, 100),
    "lcm": (lambda *values: Fraction(math.lcm(*map(_whole, values))), 1, 8),
    "ln": (math.log, 1, 1),
    "log": (math.log, 1, 2),
    **{name: (getattr(math, name), 1, 1) for name in FLOAT_FUNCTIONS},
}


def _call(name: str, *values: Number) -> Number:
    if name not in FUNCTIONS:
        raise CalculationError(f"no function '{name}'; there are {', '.join(sorted(FUNCTIONS))}")
    function, fewest, most = FUNCTIONS[name]
    if not fewest <= len(values) <= most:
        raise CalculationError(f"{name}: expected {fewest} to {most} values, found {len(values)}")
    return function(*values)


def _constant(name: str) -> Number:
    if name not in CONSTANTS:
        raise CalculationError(f"no constant '{name}'; there are pi and e")
    return CONSTANTS[name]


# grammar rules to functions, applied while parsing; lark's tokens are strings
STEPS: dict[str, Callable[..., Number]] = {
    "number": _number,
    "constant": _constant,
    "call": _call,
    "add": lambda left, right: left + right,
    "subtract": lambda left, right: left - right,
    "multiply": lambda left, right: left * right,
    "divide": _divided,
    "floor_divide": lambda left, right: _divided(left, right, floor=True),
    "modulo": lambda left, right: left - right * _divided(left, right, floor=True),
    "negate": lambda value: -value,
    "power": _power,
}


@lru_cache(1)
def _parser() -> Any:
    import lark

    def values_of(step: Callable[..., Number]) -> Callable[[Any, list[Any]], Number]:
        def value(transformer: Any, children: list[Any]) -> Number:
            try:
                return _bounded(step(*children))
            except CalculationError:
                raise
            except OverflowError:  # an exact value beyond the range of floats meets a float
                raise CalculationError("the result is too large") from None
            except (ValueError, ZeroDivisionError):  # from functions of math
                raise CalculationError("no value there") from None

        return value

    values = type("Values", (lark.Transformer,), {name: values_of(step) for name, step in STEPS.items()})
    return lark.Lark(GRAMMAR, parser="lalr", transformer=values())
