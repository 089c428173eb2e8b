"""A calculator as a tool, for a policy that writes numbers and cannot reckon with them."""

import ast
import operator
from typing import Any

_LONGEST = 64
_OPERATORS: dict[type, Any] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


class Calculator:
    """Offers one tool, `calculate`; rewards judge the answer that the policy gives in the end.

    Example:
        >>> Calculator().calculate("37*48"), Calculator().calculate("(1 + 2) / 4")
        ('1776', '0.75')
    """

    def reset(self, **row: Any) -> None:
        """Begins an episode; there is nothing to prepare."""

    def calculate(self, expression: str) -> str:
        """Works out an arithmetic expression.

        Args:
            expression: Numbers with +, -, *, / and brackets, such as 37*48.

        Returns:
            The value.

        Raises:
            ValueError: the expression is too long, or holds something else.
            ZeroDivisionError: it divides by zero.
        """
        if len(expression) > _LONGEST:
            raise ValueError(f"the expression has {len(expression)} characters; at most {_LONGEST} are read")
        try:
            tree = ast.parse(expression.strip(), mode="eval")
        except SyntaxError:
            raise ValueError(f"{expression!r} is no arithmetic") from None
        value = _value(tree.body)
        return str(value) if isinstance(value, int) else f"{value:.10g}"


def _value(node: ast.AST) -> int | float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value  # type: ignore[return-value]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError("only numbers, +, -, *, / and brackets are worked out")
