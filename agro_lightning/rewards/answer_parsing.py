"""Answers in text: where a completion states one, and what number it is. Pure and linear in the text."""

import re
import unicodedata
from fractions import Fraction
from typing import Literal

Extract = Literal["whole", "last_line", "boxed", "marker", "tag"]
"""Which part of a text is the answer.

whole: all of it. last_line: the last line that is not blank. boxed: inside the last complete `\\boxed{}`.
marker: what follows the last marker (such as ####) on its line. tag: inside the last `<answer></answer>`.
"""

MAX_DIGITS = 400
"""Numbers with more digits, or a larger power of ten, are not read as numbers."""

TAIL = 512
"""Characters at the end of a long line that are read first when its last number is wanted."""
_DIGIT = re.compile(r"[\d¼-¾⅐-⅞↉⁰¹²³⁴-⁹]")
_MINUS_SIGNS = str.maketrans(dict.fromkeys("\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d", "-"))
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_THOUSANDS = re.compile(r"[^\w(\[{]{0,3}\d{1,3}(?:,\d{3})+(?:\.\d+)?(?:\s*\\.*|[^\d,)]*)", re.DOTALL)
_BOX = r"\\(?:boxed|fbox)"
_BOXED_TOKENS = re.compile(rf"{_BOX}\s*(?P<open>\{{)|{_BOX} +(?P<bare>[^\s{{}}$\\]+)|\\.|[{{}}]", re.DOTALL)


def extract(text: str, how: Extract, marker: str = "####") -> str | None:
    """The part of `text` that states the answer, without surrounding whitespace; None where there is none.

    Args:
        text: a completion, or a data set's solution.
        how: which part; see `Extract`.
        marker: the marker of "marker", or the tag's name of "tag".

    Raises:
        ValueError: `how` is none of the known ways.
    """
    if how == "whole":
        found = text
    elif how == "last_line":
        found = text.rstrip().rpartition("\n")[2]
    elif how == "boxed":
        found = boxed(text)
    elif how == "marker":
        _, mark, rest = text.rpartition(marker)
        found = rest.strip().partition("\n")[0] if mark else None
    elif how == "tag":
        start, end = f"<{marker}>", f"</{marker}>"
        before, mark, _ = text.rpartition(end)
        _, opened, found = before.rpartition(start)
        found = found if mark and opened else None
    else:
        raise ValueError(f"extract is {how!r}; it must be whole, last_line, boxed, marker or tag")
    return None if found is None else found.strip()


def boxes(text: str) -> list[str]:
    """The contents of the complete `\\boxed{...}` and `\\fbox{...}` (or `\\boxed 5`) of a text, in order.

    Braces may nest; escaped braces do not count. Of a box around a box, the inner one is listed. A box that
    never closes (a truncated completion) is skipped.
    """
    found: list[tuple[int, int]] = []
    stack: list[int | None] = []  # for each open brace: where its box's content starts, None for other braces
    for token in _BOXED_TOKENS.finditer(text):
        if token["open"]:
            stack.append(token.end())
        elif token["bare"]:
            found.append(token.span("bare"))
        elif token[0] == "{":
            stack.append(None)
        elif token[0] == "}" and stack:
            start = stack.pop()
            if start is not None and not (found and found[-1][0] >= start):
                found.append((start, token.start()))
    return [text[start:end].strip() for start, end in found]


def boxed(text: str) -> str | None:
    """What stands in the last of the `boxes` of a text, or None."""
    return next(reversed(boxes(text)), None)


_LATEX_SPACE = re.compile(r"\\(?:[!,;: ]|q?quad(?![a-zA-Z])|displaystyle(?![a-zA-Z]))|~")
_TEXT = r"\\(?:text|textrm|textbf|mathrm|mathbf|mbox)\s*"
_LATEX_TEXT = re.compile(rf"{_TEXT}\{{([^{{}}]*)\}}")
_CLOSING = re.compile(r"(?<=[^\\.,;:\s])[.,;:\s]+(\}*)$")
_MATH_SIGNS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"))


def tidy_latex(text: str) -> str:
    """An answer without what only the typesetting or the sentence around it needs.

    That is: outer dollars, spacing commands, `\\left` and `\\right`, the many kinds of `\\frac` and of degree
    and minus signs, and closing punctuation (`2.`, `7,`, `\\text{D.}`).
    """
    text = re.sub(r"(?<=\d)(?:\{,\}|,\\!|\\[,;:! ]|~)(?=\d{3}(?!\d))", ",", text.translate(_MINUS_SIGNS))
    text = _fractions(f"{{{text}}}" if "\\over" in text else text)
    text = _CLOSING.sub(r"\1", _LATEX_SPACE.sub(" ", text)).strip()
    for _ in range(4):
        text = _CLOSING.sub(r"\1", _unwrapped(text)).strip()
    text = re.sub(r"\\(?:left|right)(?![a-zA-Z])\.?", "", text)
    text = re.sub(r"(?:\^\s*)?°|\\degree(?![a-zA-Z])|\^\s*\{\s*\\circ\s*\}", r"^\\circ", text)
    return _CLOSING.sub(r"\1", text)


_PART = r"(?:\{{(?P<{0}>[^{{}}]*)\}}|(?P<{0}_digit>\d))"
_FRACTION = re.compile(rf"\\[dtc]?frac\s*{_PART.format('top')}\s*{_PART.format('bottom')}")
_OVER = re.compile(r"\{([^{}\\]*)\\over(?![a-zA-Z])([^{}\\]*)\}")


def _fractions(text: str) -> str:
    r"""`text` with the many ways to write a fraction (`\dfrac12`, `\frac {1} 2`, `{1 \over 2}`) as one."""
    text = _OVER.sub(r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\[dtc]frac(?![a-zA-Z])", r"\\frac", text)

    def written(match: re.Match[str]) -> str:
        top, bottom = (match[part] or match[f"{part}_digit"] or "" for part in ("top", "bottom"))
        return f"\\frac{{{top.strip()}}}{{{bottom.strip()}}}"

    return _FRACTION.sub(written, text)


def _unwrapped(text: str) -> str:
    """`text` without math signs, braces, or a `\\text{}` that holds mathematics, around all of it."""
    if text.startswith("{") and text.endswith("}") and _is_closed(text[1:-1]):
        return text[1:-1]
    for start, end in _MATH_SIGNS:
        if text.startswith(start) and text.endswith(end) and len(text) >= len(start + end):
            return text[len(start) : -len(end)]
    opened = re.match(rf"{_TEXT}\{{", text)
    if opened and text.endswith("}") and re.search(r"[\\\d]", inner := text[opened.end() : -1]):
        return inner if _is_closed(inner) else text
    return text


def _is_closed(text: str) -> bool:
    """Whether the braces of a text belong to one another."""
    depth = 0
    for brace in re.findall(r"(?<!\\)[{}]", text):
        depth += 1 if brace == "{" else -1
        if depth < 0:
            return False
    return depth == 0


def are_words(text: str) -> bool:
    """Whether a tidy answer is a word or more in `\\text{}`, and no mathematics."""
    return (inner := _LATEX_TEXT.fullmatch(text)) is not None and "".join(inner[1].split()).isalpha()


def same_text(one: str, other: str) -> bool:
    """Whether two tidy answers are the same but for spaces, `\\text`, degree signs and thousands commas."""
    return _bare(one) == _bare(other)


def _bare(text: str) -> str:
    text = _LATEX_TEXT.sub(r"\1", text).removesuffix(r"^\circ")
    text = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text)  # 1 1/2 is not 11/2
    if _THOUSANDS.fullmatch(text):
        text = text.replace(",", "")
    return text.casefold() if text.isalpha() and len(text) > 2 else text


def members(text: str) -> list[str]:
    """The parts of an answer that lists several, such as `-2, 1` or `\\{1, 2\\}`; of any other, itself."""
    inner = text.strip()
    if inner.startswith("\\{") and inner.endswith("\\}"):
        inner = inner[2:-2]
    if _THOUSANDS.fullmatch(inner):
        return [inner]
    parts, depth, start = [], 0, 0
    for place, char in enumerate(inner):
        depth += (char in "([{") - (char in ")]}")
        if char == "," and depth == 0:
            parts.append(inner[start:place])
            start = place + 1
    return [part.strip() for part in (*parts, inner[start:]) if part.strip()]


def stated_answer(completion: str, expected: str) -> str | None:
    """What the boxes of a completion state, or None where it has none.

    The last box counts: `\\boxed{8}, no, \\boxed{7}` says 7. Only where the expected answer lists n parts,
    and the last box lists none, are the last n boxes read as one list.
    """
    found = boxes(completion)
    if not found:
        return None
    count = len(members(expected))
    if count > 1 and len(found) >= count and len(members(found[-1])) == 1:
        return ", ".join(found[-count:])
    return found[-1]


def tidy(text: str) -> str:
    """`text` in one Unicode form (NFKC), minus signs as "-", whitespace as single spaces, ends stripped."""
    return " ".join(unicodedata.normalize("NFKC", text).translate(_MINUS_SIGNS).split())


_UNSIGNED = r"(?>\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|(?<!\.)\.\d+)"
_CURRENCY = r"[$€£¥₹]"
_TIMES_TEN = r"(?:[eE](?P<e>[-+]?\d+)(?!\w)|\s?(?:\*|×|\\times|\\cdot)\s?10\s?\^\s?\{?(?P<power>[-+]?\d+)\}?)"
_NUMBER = re.compile(
    rf"(?<![\w^_])(?<!\d\.)(?<!\^\{{)(?<!_\{{)(?<!\\sqrt\{{)(?P<sign>(?<![)\]}}%])[-+])?(?:{_CURRENCY}\s?(?P<late_sign>-)?)?(?:"
    rf"(?:(?P<latex_whole>\d+)\s?)?\\frac\{{(?P<latex_top>-?{_UNSIGNED})\}}\{{(?P<latex_bottom>-?{_UNSIGNED})\}}"
    rf"|(?P<whole>\d+)\s(?P<mixed_top>\d+)\s?/\s?(?P<mixed_bottom>\d+)"
    rf"|(?P<top>{_UNSIGNED})\s?/\s?(?P<bottom>{_UNSIGNED})"
    rf"|(?P<plain>{_UNSIGNED})(?:{_TIMES_TEN}|\^(?P<raised>(?:\d{{1,3}}(?!\d)|\{{-?\d{{1,3}}\}})))?"
    r")(?P<percent>\s?(?:%|percent\b|per cent\b|pct\b))?",
    re.IGNORECASE,
)
# What may follow the number in an answer: units (`km/h`, `m^2`, `dollars.`), a degree sign, closing dollars.
_UNITS = re.compile(r"(?:\s|[^\W\d_]|[°$€£¥₹/.^{}\\]|(?<=\^)-?\d|(?<=\^\{)-?\d(?=\})|(?<=\s)\([^()\d]*\))*")


def numbers(text: str, *, percent: bool = False) -> list[Fraction]:
    """The numbers that `text` states, in order and exactly.

    Understands thousands separators (commas, thin spaces, `{,}`), currency signs before and units after,
    Unicode minus signs and digits, percent signs, decimal points, fractions (3/4, `\\frac{3}{4}`, ¾), mixed
    numbers (1 1/2, 1½), powers (`2^{10}`), and powers of ten (1.5e3, `1.5 \\times 10^{3}`). Digits inside
    words, roots and exponents of units are no numbers of their own.

    Args:
        text: any text.
        percent: whether 50% is 1/2; else it is 50.
    """
    if _DIGIT.search(text) is None:
        return []
    found = (_value(match, percent) for match in _NUMBER.finditer(_plain_notation(text)))
    return [value for value in found if value is not None]


def last_number(text: str, *, percent: bool = False) -> Fraction | None:
    """The last of the `numbers` of a text, none of which goes over a line's end; None where it has none.

    Reads only the end of a text, as far as needed: completions are long.
    """
    for line in reversed(text.splitlines()):
        tail = line[-TAIL:].partition(" ")[2]
        found = numbers(tail, percent=percent) if len(line) > 2 * TAIL else []
        if len(found) < 2:  # the cut may have gone through a lone number
            found = numbers(line, percent=percent)
        if found:
            return found[-1]
    return None


def parse_number(text: str, *, percent: bool = False) -> Fraction | None:
    """The number that `text` as a whole is, apart from units, currency signs and a leading `x =`.

    Returns:
        None where the text is no number, more than one (`(1, 2)`, `x + 1`, `\\sqrt{2}`), or too long for one.
    """
    if len(text) > 2 * MAX_DIGITS:
        return None
    text = (
        re.sub(r"^[^=≈]*[=≈]|^[a-zA-Z\s]+:", "", _plain_notation(text), count=1).strip(" $").rstrip(".,;: ")
    )
    text = re.sub(r"^- (?=[\d.$\\])", "-", text)
    if text.startswith("(") and text.endswith(")"):
        text = text[1:-1].strip()
    match = _NUMBER.match(text)
    if match is None or not _UNITS.fullmatch(text, match.end()):
        return None
    return _value(match, percent)


def _plain_notation(text: str) -> str:
    """`text` with the many ways to write a number reduced to those that `_NUMBER` knows."""
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]+", lambda match: f"^{{{match[0].translate(_SUPERSCRIPTS)}}}", text)
    text = re.sub(r"(?<=\d)(?:[\u00a0\u2007\u2009\u202f']|\\[,;:! ]|\{,\}|,\\!)(?=\d{3}(?!\d))", ",", text)
    text = re.sub("[¼-¾⅐-⅞↉]", lambda match: " " + unicodedata.normalize("NFKC", match[0]), text)
    text = unicodedata.normalize("NFKC", text).translate(_MINUS_SIGNS).replace("\u2044", "/")
    text = re.sub(r"\\approx(?![a-zA-Z])", "≈", text)
    text = text.replace("\\%", "%").replace("\\$", "$")
    text = re.sub(r"\\(?:left|right|displaystyle|[!,;: ])", " ", text)
    text = _fractions(text)
    text = re.sub(r"\\(?:text|mathrm|mbox|textbf|mathbf)\s?\{([^{}]*)\}", r" \1 ", text)
    text = re.sub(r"\s+", " ", text)
    return re.sub(r"= - ?(?=[\d.$\\])", "= -", text)


def _value(match: re.Match[str], percent: bool) -> Fraction | None:
    """The value of a match of `_NUMBER`; None where it has none (3/0) or too large a one."""
    part = {name: text for name, text in match.groupdict().items() if text}
    ten, raised = part.get("e") or part.get("power") or "0", int(part.get("raised", "1").strip("{}"))
    digits = sum(map(str.isdigit, match[0]))
    if len(ten) > 5 or abs(int(ten)) > MAX_DIGITS or digits * max(1, abs(raised)) > MAX_DIGITS:
        return None

    def exact(name: str) -> Fraction:
        return Fraction(part[name].replace(",", "")) if name in part else Fraction(0)

    try:
        if "plain" in part:
            value = exact("plain") ** raised * Fraction(10) ** int(ten)
        else:
            kind = "latex_" if "latex_top" in part else "mixed_" if "mixed_top" in part else ""
            value = exact("latex_whole") + exact("whole") + exact(f"{kind}top") / exact(f"{kind}bottom")
    except ZeroDivisionError:
        return None
    if part.get("sign") == "-" or "late_sign" in part:
        value = -value
    return value / 100 if percent and "percent" in part else value
