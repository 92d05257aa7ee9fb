"""A calculator for models: exact arithmetic over an explicit grammar, in bounded time and memory.

    calculate("2 * (3 + 4) ^ 2")  ->  "98"
    calculate("9**9**9")          ->  CalculationError: the result is too large

Nothing is ever evaluated as Python. Whole numbers and fractions are exact; a function such as `sqrt` answers with a
float of 53 bits. The grammar is LALR and values are made while it is read, so that neither depth nor length recurses.
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
LARGEST_BITS = 4096  # of a numerator or denominator: 1,233 digits
SHOWN_DIGITS = 12  # of a number that does not end

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
    """Fault of an expression, in a few words that the model can read."""


def calculate(expression: str) -> str:
    """The value of an expression, as it would be written down.

    Raises CalculationError for what cannot be read, has no value, or is too large.

    >>> calculate("0.1 + 0.2"), calculate("7 / 2"), calculate("1/3"), calculate("max(2, sqrt(16)) = ")
    ('0.3', '3.5', '0.333333333333', '4')
    """
    if len(expression) > LONGEST_EXPRESSION:
        raise CalculationError(f"the expression is longer than {LONGEST_EXPRESSION} characters")
    from lark.exceptions import UnexpectedCharacters, UnexpectedEOF, UnexpectedInput, UnexpectedToken, VisitError

    try:
        value = _parser().parse(_without_thousands(expression.lower()))
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


def _without_thousands(expression: str) -> str:
    """1,234,567 as one number, where no function's parentheses make the comma a separator."""
    return expression if re.search(r"[a-z]\s*\(", expression) else re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", expression)


def _written(value: Number) -> str:
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 2**53 else f"{value:.{SHOWN_DIGITS}g}"
    if value.denominator == 1:
        return str(value.numerator)
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    digits = value.denominator.bit_length()  # at least as many as the decimals of a number that ends
    if rest == 1 and digits <= 64:
        whole = abs(value.numerator) * 10**digits // value.denominator
        text = str(whole).rjust(digits + 1, "0")
        return ("-" if value < 0 else "") + f"{text[:-digits]}.{text[-digits:]}".rstrip("0")
    with localcontext(Context(prec=SHOWN_DIGITS)):
        return f"{Decimal(value.numerator) / Decimal(value.denominator):.{SHOWN_DIGITS}g}"


# ---- values


def _float(value: Number) -> float:
    try:
        return float(value)
    except OverflowError:
        raise CalculationError("the result is too large") from None


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
    if isinstance(exponent, Fraction) and exponent.denominator == 1 and isinstance(base, Fraction):
        if base == 0 and exponent < 0:
            raise CalculationError("division by zero")
        size = max(base.numerator.bit_length(), base.denominator.bit_length())
        if abs(base) not in (0, 1) and abs(exponent) * (size - 1) > LARGEST_BITS:
            raise CalculationError("the result is too large")
        # bounded above; 0, 1 and -1 are decided by the exponent's parity alone
        times = int(exponent) if abs(base) not in (0, 1) else int(exponent != 0) * (2 - int(exponent) % 2)
        return base**times
    if base < 0:
        raise CalculationError("a negative number has no such power")
    if base == 0 and exponent < 0:
        raise CalculationError("division by zero")
    return _of_floats(math.pow, base, exponent)


def _of_floats(function: Callable[..., float], *values: Number) -> float:
    try:
        return function(*map(_float, values))
    except (ValueError, ZeroDivisionError):
        raise CalculationError("no value there") from None
    except OverflowError:
        raise CalculationError("the result is too large") from None


def _divided(left: Number, right: Number, floor: bool = False) -> Number:
    if right == 0:
        raise CalculationError("division by zero")
    if isinstance(left, float) or isinstance(right, float):
        left, right = _float(left), _float(right)
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
    return _of_floats(math.sqrt, value)


def _rounded(value: Number, digits: Number = Fraction(0)) -> Number:
    """Half away from zero, as people round."""
    places = _whole(digits)
    if abs(places) > 100:
        raise CalculationError("round: expected at most 100 digits")
    scaled = Fraction(value) * Fraction(10) ** places
    nearest = math.floor(abs(scaled) + Fraction(1, 2))
    return Fraction(nearest if scaled >= 0 else -nearest) / Fraction(10) ** places


def _float_function(function: Callable[..., float]) -> Callable[..., Number]:
    return lambda *values: _of_floats(function, *values)


# name: (function, fewest and most arguments)
FUNCTIONS: dict[str, tuple[Callable[..., Any], int, int]] = {
    "sqrt": (_square_root, 1, 1),
    "abs": (abs, 1, 1),
    "min": (lambda *values: min(values), 1, 100),  # Python's takes one value for a list
    "max": (lambda *values: max(values), 1, 100),
    "sum": (lambda *values: sum(values, Fraction(0)), 1, 100),
    "round": (_rounded, 1, 2),
    "floor": (lambda value: Fraction(math.floor(value)), 1, 1),
    "ceil": (lambda value: Fraction(math.ceil(value)), 1, 1),
    "factorial": (_factorial, 1, 1),
    "gcd": (lambda *values: Fraction(math.gcd(*map(_whole, values))), 1, 100),
    "lcm": (lambda *values: Fraction(math.lcm(*map(_whole, values))), 1, 8),
    **{name: (_float_function(getattr(math, name)), 1, 1) for name in ("exp", "sin", "cos", "tan", "log10", "log2")},
    **{name: (_float_function(getattr(math, name)), 1, 1) for name in ("asin", "acos", "atan", "radians", "degrees")},
    "ln": (_float_function(math.log), 1, 1),
    "log": (_float_function(math.log), 1, 2),
}
CONSTANTS = {"pi": math.pi, "e": math.e}


def _call(name: str, *values: Number) -> Number:
    if name not in FUNCTIONS:
        raise CalculationError(f"no function {name!r}; there are {', '.join(sorted(FUNCTIONS))}")
    function, fewest, most = FUNCTIONS[name]
    if not fewest <= len(values) <= most:
        raise CalculationError(f"{name}: expected {fewest} to {most} values, found {len(values)}")
    return function(*values)


def _constant(name: str) -> Number:
    if name not in CONSTANTS:
        raise CalculationError(f"no constant {name!r}; there are pi and e")
    return CONSTANTS[name]


def _step(step: Callable[..., Number], children: list[Any]) -> Number:
    """One rule of the grammar; exact values beyond a float's range meet floats in any of them."""
    try:
        return _bounded(step(*children))
    except OverflowError:
        raise CalculationError("the result is too large") from None


@lru_cache(1)
def _parser() -> Any:
    import lark

    steps: dict[str, Callable[..., Number]] = {
        "number": lambda token: _number(str(token)),
        "constant": lambda token: _constant(str(token)),
        "call": lambda token, *values: _call(str(token), *values),
        "add": lambda left, right: left + right,
        "subtract": lambda left, right: left - right,
        "multiply": lambda left, right: left * right,
        "divide": _divided,
        "floor_divide": lambda left, right: _divided(left, right, floor=True),
        "modulo": lambda left, right: left - right * _divided(left, right, floor=True),
        "negate": lambda value: -value,
        "power": _power,
    }

    class Values(lark.Transformer):
        """Numbers in place of every rule, while the grammar is read."""

        def __getattr__(self, name: str) -> Any:
            if name not in steps:
                raise AttributeError(name)
            return lambda children: _step(steps[name], children)

    return lark.Lark(GRAMMAR, parser="lalr", transformer=Values())
