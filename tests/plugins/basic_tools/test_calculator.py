"""The calculator: right, bounded, and clear about what it does not understand."""

from __future__ import annotations

import pytest
from plugins.basic_tools.calculator import CALCULATOR, calculate

from broker.errors import InvalidInput
from broker.runs.tools import ToolContext


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("1231 * 2331", "2869461"),
        ("1 + 2 * 3", "7"),
        ("(1 + 2) * 3", "9"),
        ("-2 ** 2", "-4"),
        ("2 ** -1", "0.5"),
        ("7 // 2", "3"),
        ("-7 // 2", "-4"),
        ("-7 % 3", "2"),
        ("7 / 2", "3.5"),
        ("6 / 2", "3"),
        ("0.1 + 0.2", "0.3"),
        ("1e20 * 10", "1e+21"),
        ("2 ** 200", str(2**200)),
        ("1 ** 10 ** 30", "1"),
        ("(-1) ** (10 ** 30 + 1)", "-1"),
        ("0 ** 0", "1"),
        ("1_000 + 1", "1001"),
        ("3 × 4 ÷ 2 − 1", "5"),
        ("  1 +\t1 ", "2"),
        ("sqrt(2)", "1.4142135623731"),
        ("sqrt(10 ** 100)", str(10**50)),
        ("round(pi, 4)", "3.1416"),
        ("round(2.5)", "2"),
        ("round(1234, -2)", "1200"),
        ("abs(-3) + min(4, 5) + max(1, 2, 3)", "10"),
        ("sum(1, 2, 3) / 3", "2"),
        ("mean(1, 2)", "1.5"),
        ("floor(-1.5) + ceil(1.2) + trunc(9.9)", "9"),
        ("log(8, 2)", "3"),
        ("log10(1000) + log2(8) + log(e)", "7"),
        ("sin(0) + cos(0) + tan(0)", "1"),
        ("degrees(atan2(1, 1))", "45"),
        ("hypot(3, 4)", "5"),
        ("gcd(12, 18)", "6"),
        ("factorial(20)", "2432902008176640000"),
        ("+5", "5"),
    ],
)
def test_results(expression: str, result: str) -> None:
    assert calculate(expression) == result


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("", "not an arithmetic expression"),
        ("1 +", "not an arithmetic expression"),
        ("1; 2", "not an arithmetic expression"),
        ("a = 1", "not an arithmetic expression"),
        ("1\0", "not an arithmetic expression"),
        ("2(3)", "not arithmetic"),
        ("1 / 0", "divides by zero"),
        ("1 % 0", "divides by zero"),
        ("0 ** -1", "divides by zero"),
        ("2 ^ 3", "write ** instead"),
        ("1 << 5", "LShift is not supported"),
        ("1 if 1 else 2", "not arithmetic"),
        ("1 < 2", "not arithmetic"),
        ("'a' * 3", "not arithmetic"),
        ("True + 1", "not arithmetic"),
        ("1j", "not arithmetic"),
        ("[1, 2]", "not arithmetic"),
        ("not 1", "not arithmetic"),
        ("x + 1", "unknown name 'x'"),
        ("__import__('os')", "not arithmetic"),
        ("open(1)", "unknown function 'open'"),
        ("(1).real", "not arithmetic"),
        ("abs(x=1)", "not arithmetic"),
        ("max(*[1])", "not arithmetic"),
        ("(lambda: 1)()", "not arithmetic"),
        ("sqrt(-1)", "sqrt(-1) is not defined"),
        ("log(0)", "log(0) is not defined"),
        ("(-8) ** 0.5", "not a real number"),
        ("sqrt()", "sqrt takes 1 arguments, not 0"),
        ("round(1, 2, 3)", "round takes 1 to 2 arguments, not 3"),
        ("max()", "max takes 1 or more arguments, not 0"),
        ("gcd(1.5, 2)", "gcd(1.5, 2) is not defined"),
        ("1e308 * 10", "no finite value"),
        ("1e999", "no finite value"),
        ("1e999 - 1e999", "no finite value"),
    ],
)
def test_what_is_refused(expression: str, words: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        calculate(expression)
    assert words in caught.value.message


@pytest.mark.parametrize(
    "expression",
    [
        "9 ** 9 ** 9",
        "2 ** 5000",
        "(2 ** 4000) * (2 ** 4000)",
        "10.0 ** 400",
        "exp(1000)",
        "factorial(501)",
        "factorial(-1)",
        "factorial(2.5)",
        "round(1, -1000000000)",
        "round(1.5, 1000000000)",
        "sqrt(2 ** 4000 + 1) ** 2",
        "9" * 1001,
        "9" * 1000 + "0" * 400,
        "-" * 999 + "1",
        "(" * 400 + "1" + ")" * 400,
        "*".join(["2**1000"] * 100),
        "2 ** 4000 / 3",
    ],
)
def test_nothing_large_is_computed(expression: str) -> None:
    """Each of these ends at once with a reason, not with a full memory or a busy thread."""
    with pytest.raises(InvalidInput):
        calculate(expression)


def test_the_tool_calls_it() -> None:
    context = ToolContext("c1", "r1", "call_1")
    assert CALCULATOR.call({"expression": "1 + 1"}, context) == "2"
    assert "sqrt" in CALCULATOR.description
