"""Answers in text, and the rewards that compare them."""

import json
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agro_lightning.rewards import ExactMatch, NumericMatch
from agro_lightning.rewards.answer_parsing import (
    boxed,
    boxes,
    extract,
    last_number,
    members,
    numbers,
    parse_number,
    stated_answer,
    tidy_latex,
)
from agro_lightning.rewards.units import unit
from agro_lightning.types import Prompt

SOLUTIONS = Path(__file__).parents[2] / "shared" / "data" / "gsm8k_model_solutions.jsonl"


def prompt(answer, prompt_id="p"):
    return Prompt(prompt_id=prompt_id, prompt="q", prompt_ids=(1,), answer=answer)


def rewards_of(reward, answer, *completions):
    return [score.reward for score in reward([prompt(answer)] * len(completions), completions)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("42", 42),
        ("1,234,567.5", Fraction("1234567.5")),
        ("1\u202f234", 1234),
        ("1{,}234", 1234),
        ("10\\,000", 10000),
        ("\u22125", -5),
        ("-$5.20", Fraction("-5.2")),
        ("$-5", -5),
        ("\\$1,000", 1000),
        ("€3", 3),
        ("½", Fraction(1, 2)),
        ("1½", Fraction(3, 2)),
        ("1 1/2", Fraction(3, 2)),
        ("3/4", Fraction(3, 4)),
        ("-\\dfrac{3}{4}", Fraction(-3, 4)),
        ("\\frac34", Fraction(3, 4)),
        ("2\\frac{1}{2}", Fraction(5, 2)),
        ("5 \\text{ cm}", 5),
        ("5 cm²", 5),
        ("5 m^2", 5),
        ("30 km/h", 30),
        ("72^\\circ", 72),
        ("50\\%", 50),
        ("1.5e3", 1500),
        ("1.5 \\times 10^{3}", 1500),
        ("3×10⁴", 30000),
        ("2^{10}", 1024),
        ("x = -5", -5),
        ("x = - 5", -5),
        ("- 5", -5),
        (r"\approx 7", 7),
        ("Answer: 7", 7),
        ("7 (apples)", 7),
        (r"\frac {2} {3}", Fraction(2, 3)),
        (r"\tfrac{2}3", Fraction(2, 3)),
        (r"\frac2{3}", Fraction(2, 3)),
        (r"{2 \over 3}", Fraction(2, 3)),
        ("(7) (8)", None),
        (".5", Fraction(1, 2)),
        ("12.", 12),
        ("٣", 3),
        ("$7$", 7),
        ("", None),
        ("3/0", None),
        ("Sunday", None),
        ("(1, 2)", None),
        ("x + 1", None),
        ("\\sqrt{2}", None),
        ("3-5", None),
        ("1e999999999", None),
        ("9" * 5000, None),
    ],
)
def test_a_text_that_is_a_number_is_read_exactly(text, expected):
    assert parse_number(text) == expected


def test_percent_signs_can_mean_hundredths():
    assert parse_number("12.5%", percent=True) == Fraction(1, 8)
    assert parse_number("12.5", percent=True) == Fraction(25, 2)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("She pays 3 x 4 = 12 dollars.", [3, 4, 12]),
        ("10 - 5 = 5", [10, 5, 5]),
        ("H2O and x_1 and m^2 are none", []),
        ("it is -3, not 3-4", [-3, 3, 4]),
        ("wait...5", [5]),
        ("between 1,000 and 2,5 or so", [1000, 2, 5]),
    ],
)
def test_the_numbers_of_a_text(text, expected):
    assert numbers(text) == expected


@pytest.mark.parametrize("length", [0, 100, 600, 5000])
@pytest.mark.parametrize(
    "end", [" it is 1 1/2 cups.", " 7", "7", " 3 or -1,234.5 km", "\n\nno digits here\n"]
)
def test_the_last_number_of_a_long_text_is_that_of_all_its_numbers(length, end):
    text = "first 8" + " and more words" * (length // 15) + end
    assert last_number(text) == numbers(text)[-1]
    assert last_number("no digits" * length) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\boxed{5}", "5"),
        (r"first \boxed{1}, then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{\text{set } \{1, 2\}}", r"\text{set } \{1, 2\}"),
        (r"\boxed{x_{1}^{2}} and \boxed{never closed {}", "x_{1}^{2}"),
        (r"\boxed{\boxed{7}}", "7"),
        (r"\fbox{8} ", "8"),
        (r"\boxed 9", "9"),
        (r"\boxed{}", ""),
        (r"boxed{5} }{ }", None),
        ("", None),
    ],
)
def test_the_last_complete_box(text, expected):
    assert boxed(text) == expected


def test_every_way_to_extract_an_answer():
    text = "thinking\n#### 1\n<answer> 2 </answer>\n#### 3 \n\n"
    assert extract(text, "whole") == text.strip()
    assert extract(text, "last_line") == "#### 3"
    assert extract(text, "marker") == "3"
    assert extract(text, "tag", "answer") == "2"
    assert extract(text, "boxed") is None
    assert extract(text, "marker", "Answer:") is None
    assert extract("</answer> 3 <answer>", "tag", "answer") is None
    with pytest.raises(ValueError, match="'middle'.*whole, last_line"):
        extract(text, "middle")


@given(st.text(alphabet="0123456789.,-−/%$\\{}frac boxedeE^×10½ \n", max_size=200))
@settings(max_examples=300, deadline=None)
def test_no_text_makes_the_readers_raise(text):
    assert all(isinstance(value, Fraction) for value in numbers(text))
    value = parse_number(text)
    assert value is None or isinstance(value, Fraction)
    assert boxed(text) is None or len(boxed(text)) <= len(text)
    assert len(members(tidy_latex(text))) <= len(text)
    assert unit(text) is None or all(unit(text).values())
    assert stated_answer(text, "1, 2") is None or boxes(text)


@pytest.mark.parametrize(
    "text",
    ["9", "$", "1,", "{", "(", "\\text{", "\\frac{", ",111", ".", "}", "5 cm ", "^\\circ", " ,", " "],
)
def test_long_answers_are_read_in_linear_time(text):
    for answer in ("a" + text * 50_000 + "b", "1" + text * 50_000, r"\text{" + text * 50_000 + "}"):
        tidied = tidy_latex(answer)
        assert len(tidied) <= len(answer) + 6 and members(tidied) is not None
        assert unit(answer) is None or isinstance(unit(answer), dict)


@given(st.integers(-(10**12), 10**12))
@settings(max_examples=100, deadline=None)
def test_an_integer_is_read_with_and_without_separators(number):
    assert parse_number(f"{number:,}") == parse_number(str(number)) == number
    assert numbers(f"so it is {number:,} in all.") == [number]


def test_exact_match_compares_text_in_one_form():
    assert rewards_of(ExactMatch(), "-5 apples", "\u22125  apples ", "-5 Apples", "5 apples") == [
        1.0,
        0.0,
        0.0,
    ]
    assert rewards_of(ExactMatch(ignore_case=True), "Yes", "YES", "no") == [1.0, 0.0]
    assert rewards_of(ExactMatch(extract="boxed"), "42", r"\boxed{42}", "42") == [1.0, 0.0]


def test_numeric_match_finds_the_answer_where_it_stands():
    auto = NumericMatch()
    right = ["it is 1080.0", r"\boxed{1080}, not 7", "#### 1,080 dollars\n3"]
    assert rewards_of(auto, "1,080", *right, "108") == [1.0, 1.0, 1.0, 0.0]
    assert rewards_of(auto, "3", r"\boxed{3, 4} so 3", "no number at all") == [0.0, 0.0]
    assert rewards_of(NumericMatch(extract="tag", marker="answer"), "3", "<answer>3 km</answer> 4", "3") == [
        1.0,
        0.0,
    ]
    assert rewards_of(NumericMatch(extract="last_number"), "4", r"\boxed{3} or 4") == [1.0]


def test_numeric_match_reads_percent_as_configured():
    for percent, expected in (("number", [1.0, 0.0]), ("fraction", [0.0, 1.0]), ("any", [1.0, 1.0])):
        reward = NumericMatch(percent=percent)
        assert rewards_of(reward, "50", "50%") + rewards_of(reward, "0.5", "50%") == expected


def test_numeric_match_is_exact_unless_a_tolerance_is_set():
    assert rewards_of(NumericMatch(), "1/3", "0.3333333") == [0.0]
    assert rewards_of(NumericMatch(), "100000001", "100000000") == [0.0]
    assert rewards_of(NumericMatch(rel_tol=1e-6), "1/3", "0.3333333", "0.33") == [1.0, 0.0]
    assert rewards_of(NumericMatch(abs_tol=0.5), "10", "10.5", "10.6") == [1.0, 0.0]
    with pytest.raises(ValueError, match="rel_tol is -1"):
        NumericMatch(rel_tol=-1)


@pytest.mark.parametrize(
    ("reward", "answer", "message"),
    [
        (ExactMatch(), None, "prompt 'p' has no answer"),
        (NumericMatch(), None, "prompt 'p' has no answer"),
        (NumericMatch(), "Sunday", "'Sunday', which is no number"),
    ],
)
def test_a_prompt_that_cannot_be_compared_with_is_a_failure_and_not_0(reward, answer, message):
    (score,) = reward([prompt(answer)], ["5"])
    assert score.reward is None and score.failure == "error" and message in score.message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2.", "2"),
        (" 7, ", "7"),
        (r"\text{D.}", r"\text{D}"),
        (r"$\dfrac{1}{2}$.", r"\frac{1}{2}"),
        (r"\left( 3, 4 \right)", "( 3, 4 )"),
        (r"\,90^{\circ}\!", r"90^\circ"),
        ("90°", r"90^\circ"),
        (r"1,\!234{,}567", "1,234,567"),
        (r"\text{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\text{a } + \text{b}", r"\text{a } + \text{b}"),
        ("5!", "5!"),
        ("\u22125", "-5"),
        ("$" * 3, "$"),
        (r"1\,000", "1,000"),
        ("{12}", "12"),
        ("{1}{2}", "{1}{2}"),
        (r"2 \over 3", r"\frac{2}{3}"),
        (r"\dfrac {1} 2", r"\frac{1}{2}"),
    ],
)
def test_tidy_latex(text, expected):
    assert tidy_latex(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("-2, 1", ["-2", "1"]),
        (r"\{1, 2\}", ["1", "2"]),
        ("(1, 2)", ["(1, 2)"]),
        ("(1,2), [3,4]", ["(1,2)", "[3,4]"]),
        ("1,234", ["1,234"]),
        ("7", ["7"]),
    ],
)
def test_the_members_of_an_answer(text, expected):
    assert members(text) == expected


def test_the_last_box_counts_or_as_many_as_the_answer_has_parts():
    text = r"\boxed{3}? No: $\boxed{-2}$ and $\boxed{1}$"
    assert boxes(text) == ["3", "-2", "1"]
    assert stated_answer(text, "1") == "1"
    assert stated_answer(text, "1, -2") == "-2, 1"
    assert stated_answer(r"\boxed{5} so \boxed{-2, 1}", "1, -2") == "-2, 1"
    assert stated_answer(r"\boxed{1}", "1, -2") == "1"
    assert stated_answer("none", "1") is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"5 \text{ cm}", {"cm": 1}),
        (r"9.8 \text{ m}/\text{s}^2", {"m": 1, "s": -2}),
        ("9 square centimeters", {"cm": 2}),
        ("5 cm²", {"cm": 2}),
        ("60 mph", {"mi": 1, "h": -1}),
        (r"5\pi \text{ in}^3", {"in": 3}),
        (r"33.3\%", {"percent": 1}),
        (r"90^{\circ}", {"degree": 1}),
        (r"20^\circ C", {"C": 1}),
        (r"\$5.50", {"dollar": 1}),
        ("so the answer is 5 m.", {"m": 1}),
        ("5 apples", None),
        ("3m + 2s", None),
        ("a + 2m + 3s", None),
        ("7", None),
    ],
)
def test_the_unit_behind_a_number(text, expected):
    assert unit(text) == expected


def test_a_number_with_another_unit_is_another_answer():
    right = ["5 cm", "5", r"\boxed{5\text{ centimeters}}", r"\boxed{5.}", r"\boxed{5,}", r"\boxed{$5$ cm.}"]
    assert rewards_of(NumericMatch(), "5 cm", *right) == [1.0] * 6
    assert rewards_of(NumericMatch(), "5 cm", "5 m", r"\boxed{5 \text{ cm}^2}", "it is 5 m") == [0.0] * 3
    assert rewards_of(NumericMatch(), "33.3", r"\boxed{33.3\%}") == [1.0]


def test_any_of_several_answers_is_right():
    assert rewards_of(ExactMatch(), ("True", "true"), "true", "True", "false") == [1.0, 1.0, 0.0]
    assert rewards_of(NumericMatch(), ("a half", "0.5", "3"), "1/2", "3", "4") == [1.0, 1.0, 0.0]
    (score,) = NumericMatch()([prompt(("a", "b"))], ["1"])
    assert score.failure == "error" and "('a', 'b')" in score.message


@pytest.mark.skipif(not SOLUTIONS.is_file(), reason="needs GSM8K's model solutions in ../shared/data")
def test_numeric_match_agrees_with_the_grades_of_gsm8ks_model_solutions():
    prompts, texts, graded = [], [], []
    for line in SOLUTIONS.read_text().splitlines():
        row = json.loads(line)
        answer = extract(row["ground_truth"], "marker", "A:")
        for solution in (value for value in row.values() if isinstance(value, dict)):
            prompts.append(prompt(answer))
            texts.append(solution["solution"])
            graded.append(float(solution["is_correct"]))
    assert len(texts) == 5276
    assert [score.reward for score in NumericMatch()(prompts, texts)] == graded
