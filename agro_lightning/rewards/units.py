"""Units of measurement behind numbers: enough to tell that 5 cm is not 5 m."""

import re
from collections import Counter

_NAMES = {
    "mm": "millimeter millimetre",
    "cm": "centimeter centimetre", "m": "meter metre", "km": "kilometer kilometre",
    "in": "inch inche", "ft": "foot feet", "yd": "yard", "mi": "mile", "acre": "acre", "mg": "milligram",
    "g": "gram", "kg": "kilogram", "lb": "pound", "oz": "ounce", "ton": "tonne", "ms": "millisecond",
    "s": "second sec", "min": "minute", "h": "hour hr", "day": "", "week": "", "month": "", "year": "yr",
    "ml": "milliliter millilitre", "l": "liter litre", "gal": "gallon", "quart": "qt", "pint": "pt",
    "cup": "", "degree": "deg", "radian": "rad", "percent": "pct", "dollar": "usd", "cent": "", "euro": "eur",
    "sterling": "gbp", "yen": "jpy", "N": "newton", "J": "joule", "W": "watt", "V": "volt", "Hz": "hertz",
    "K": "kelvin", "C": "celsius", "F": "fahrenheit",
}  # fmt: skip
_BY_NAME = {name: unit for unit, names in _NAMES.items() for name in (unit, *names.split())}
_SIGNS = {"%": "percent", "¤": "dollar", "¢": "cent", "€": "euro", "£": "sterling", "¥": "yen", "°": "degree"}
_SHORT = {"mph": "mi/h", "kph": "km/h", "kmh": "km/h"}
_TEXT = re.compile(r"\\(?:text|mathrm|textrm|mbox|operatorname|rm|textbf|mathbf)\b\s*")
_MACRO = r"\\(?:frac|sqrt|pi|cdot|times|div|approx)(?![a-zA-Z])"
_NUMERIC = rf"(?:[^a-zA-Z\\]|{_MACRO}|(?<=\d )x(?= \d))"
_QUANTITY = re.compile(rf"{_NUMERIC}*?\d{_NUMERIC}*")
_PROSE = re.compile(r"[a-z]{2,}:?\s+([^\s\w]?\d[^a-zA-Z]*[a-zA-Z][\w\s/^*-]*)$")


def differ(one: str, other: str) -> bool:
    """Whether two texts end in known units that are not the same; a text without any differs from none.

    Examples:
        >>> differ(r"5 \\text{ cm}", "5 m"), differ("9 cm^2", "9 square centimeters"), differ("5", "5 m")
        (True, False, False)
    """
    first = unit(one)
    second = unit(other) if first else None
    return bool(first and second) and first != second


def unit(text: str) -> dict[str, int] | None:
    """The known unit behind the number that a text is or ends with, as powers; None where there is none."""
    text = _TEXT.sub(" ", text[-200:]).replace("\\$", "¤")
    text = text.replace("$", " " if text.count("$") % 2 == 0 else "¤")  # a pair of them is math's own
    text = text.replace("\\circ", "°").replace("^°", "°").replace("^{°}", "°")
    text = re.sub(r"\\(?=[^a-zA-Z])", "", text).translate(str.maketrans("{}~", "   "))
    for sign, name in _SIGNS.items():
        text = re.sub(rf"^(\W*){re.escape(sign)}(.*)$", rf"\1\2 {name}", text).replace(sign, f" {name} ")
    text = text.strip(" .,;:!?\n\\")
    if "\\" not in text and (prose := _PROSE.search(text)) is not None:
        text = prose[1]
    match = _QUANTITY.match(text)
    return _powers(text[match.end() :]) if match else None


def _powers(text: str) -> dict[str, int] | None:
    for short, long in _SHORT.items():
        text = re.sub(rf"\b{short}\b", long, text)
    powers: Counter[str] = Counter()
    sign, once, last = 1, 1, ""
    for token in re.findall(r"\^\s*-?[0-9]{1,3}|[²³]|[a-zA-Z]+|/|\S", text):
        if token in ("/", "per", "an") or token == "a":
            sign = -1
        elif token in ("square", "sq", "cubic"):
            once = 3 if token == "cubic" else 2
        elif token in ("squared", "cubed", "²", "³") or token[0] == "^":
            if not last or token == "^":
                return None
            power = {"squared": 2, "cubed": 3, "²": 2, "³": 3}.get(token) or int(token.strip("^ "))
            powers[last] *= power
        elif token in ("*", "-", "\\", "cdot", "degree") and last:
            continue
        else:
            name = token if token in _BY_NAME else token.lower()
            found = _BY_NAME.get(name) or _BY_NAME.get(name.removesuffix("s")) or ""
            if token in ("C", "F", "celsius", "fahrenheit") and last == "degree":
                powers.clear()
            if not found:
                return None
            powers[found] += sign * once
            once, last = 1, found
    return {name: power for name, power in powers.items() if power} or None
