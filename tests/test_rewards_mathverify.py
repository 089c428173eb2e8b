"""MathVerify: comparing mathematics in processes that can be killed."""

import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from agro_lightning.rewards import MathVerify, NumericMatch
from agro_lightning.rewards.answer_parsing import parse_number
from agro_lightning.types import Prompt

MATH500 = Path(__file__).parents[2] / "shared" / "data" / "math500.jsonl"
WRITTEN = {
    "as it is": lambda gold: rf"So it is $\boxed{{{gold}}}$.",
    "a period": lambda gold: rf"\boxed{{{gold}.}}",
    "a comma": lambda gold: rf"\boxed{{{gold},}}",
    "dollars": lambda gold: rf"\boxed{{${gold}$}}",
    "text": lambda gold: rf"\boxed{{\text{{{gold}}}}}",
    "negative space": lambda gold: rf"\boxed{{{gold}\!}}",
    "thin spaces": lambda gold: rf"\boxed{{\,{gold}\,}}",
    "dfrac": lambda gold: rf"\boxed{{{gold}}}".replace(r"\frac", r"\dfrac"),
    "degree sign": lambda gold: rf"\boxed{{{gold}}}".replace(r"^\circ", "°"),
    "no left": lambda gold: rf"\boxed{{{gold}}}".replace(r"\left", "").replace(r"\right", ""),
    "thousands": lambda gold: re.sub(r"(?<=\{)\d+(?=\}$)", lambda m: f"{int(m[0]):,}", rf"\boxed{{{gold}}}"),
    "second thought": lambda gold: rf"\boxed{{123456}}, no: $\boxed{{{gold}}}$",
}


def prompts(*answers):
    return [Prompt(prompt_id=f"p{i}", prompt="q", prompt_ids=(1,), answer=a) for i, a in enumerate(answers)]


@pytest.fixture(scope="module")
def math_verify():
    pytest.importorskip("math_verify")
    reward = MathVerify(timeout_s=3.0, workers=2)
    yield reward
    reward.close()


@pytest.mark.parametrize(
    ("answer", "completion", "expected"),
    [
        (r"\frac{1}{2}", "so it is 0.5", 1.0),
        (r"\frac{1}{2}", r"so \boxed{\dfrac{2}{4}}", 1.0),
        ("1,234", "the answer is 1234", 1.0),
        ("\u22125", r"\boxed{-5}", 1.0),
        ("-5", "the answer is \u22125", 1.0),
        ("x^2+1", "$1+x^2$", 1.0),
        ("(1,2)", r"\boxed{(1, 2)}", 1.0),
        ("5", r"\boxed{5\text{ cm}}", 1.0),
        (r"\text{Sunday}", r"\boxed{\text{Sunday}}", 1.0),
        (r"\{1,2\}", r"\boxed{\{2,1\}}", 1.0),
        (r"\frac{\sqrt{3}}{2}", r"\boxed{\sqrt{\frac{3}{4}}}", 1.0),
        ("7", r"\boxed{7} is right, 8 is not", 1.0),
        ("2", r"\boxed{2.}", 1.0),
        ("7", r"\boxed{7,}", 1.0),
        ("D", r"\boxed{D.}", 1.0),
        (r"\text{D}", r"\boxed{\text{D.}}", 1.0),
        ("7", r"\boxed{8} no wait \boxed{7}", 1.0),
        ("7", r"\boxed{7} no wait \boxed{8}", 0.0),
        ("-2, 1", r"$\boxed{-2}$ and $\boxed{1}$", 1.0),
        ("-2, 1", r"\boxed{3}, no: $\boxed{1}$ and $\boxed{-2}$", 1.0),
        ("-2, 1", r"\boxed{1, -2}", 1.0),
        ("-2, 1", r"\boxed{1}", 0.0),
        ("-2, 1", r"\boxed{-2} or \boxed{2}", 0.0),
        ("33.3", r"\boxed{33.3\%}", 1.0),
        (r"33.3\%", r"\boxed{33.3}", 1.0),
        ("50\\%", r"\boxed{\frac12}", 1.0),
        ("33.3", r"\boxed{33.4\%}", 0.0),
        (r"5 \text{ cm}", r"\boxed{5 \text{ m}}", 0.0),
        ("5 cm", "the answer is 5 m", 0.0),
        (r"5 \text{ cm}", r"\boxed{5}", 1.0),
        (r"5 \text{ cm}^2", r"\boxed{5 \text{ square cm}}", 1.0),
        (r"60 \text{ km/h}", r"\boxed{60 \text{ mph}}", 0.0),
        ("11/2", r"\boxed{1 1/2}", 0.0),
        (r"\text{no}", r"\boxed{\text{on}}", 0.0),
        (r"\text{even}", r"\boxed{Even}", 1.0),
        (("4", "5"), r"\boxed{5}", 1.0),
        (("4", "5"), r"\boxed{\frac{8}{2}}", 1.0),
        (("4", "5"), r"\boxed{6}", 0.0),
        ("7", "6", 0.0),
        ("7", "no idea", 0.0),
        ("7", "", 0.0),
        ("7", r"\boxed{", 0.0),
    ],
)
def test_math_verify_compares_meaning(math_verify, answer, completion, expected):
    (score,) = math_verify(prompts(answer), [completion])
    assert (score.reward, score.failure) == (expected, None), score.message


def test_math_verify_counts_a_hanging_check_apart_and_works_off_the_main_thread(math_verify):
    scores = []
    completions = [r"\boxed{9^{9^{9^{9}}}}", r"\boxed{3}", r"\boxed{4}", r"\boxed{3}"]
    thread = threading.Thread(
        target=lambda: scores.extend(math_verify(prompts("3", "3", "3", None), completions))
    )
    thread.start()
    thread.join()
    assert [score.reward for score in scores] == [None, 1.0, 0.0, None]
    assert [score.failure for score in scores] == ["timeout", None, None, "error"]
    assert "no answer" in scores[3].message


def test_math_verify_scores_equal_pairs_equally_and_in_order(math_verify):
    answers = [str(i % 5) for i in range(60)]
    completions = [rf"\boxed{{{i % 3}}}" for i in range(60)]
    scores = math_verify(prompts(*answers), completions)
    assert [score.reward for score in scores] == [float(i % 5 == i % 3) for i in range(60)]


def test_a_missing_extra_is_named_in_one_line():
    code = """
import sys
sys.modules["math_verify"] = sys.modules["reasoning_gym"] = None
from agro_lightning.rewards import GymReward, MathVerify
for reward in (MathVerify, GymReward):
    try:
        reward()
    except ImportError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == [
        "MathVerify needs the extra `math`: pip install 'agro-lightning[math]'",
        "GymReward needs the extra `gym`: pip install 'agro-lightning[gym]'",
    ], done.stderr


@pytest.mark.skipif(not MATH500.is_file(), reason="needs MATH-500 in ../shared/data")
@pytest.mark.parametrize("written", WRITTEN)
def test_the_answers_of_math500_in_any_form(math_verify, written):
    answers = [json.loads(line)["answer"] for line in MATH500.read_text().splitlines()]
    golds = list(dict.fromkeys(re.sub(r"(?<=\d) (?=\\sqrt)", "", answer) for answer in answers))
    texts = [WRITTEN[written](gold) for gold in golds]
    scores = math_verify(prompts(*golds), texts)
    assert [(gold, score) for gold, score in zip(golds, scores, strict=True) if score.reward != 1.0] == []
    scores = math_verify(prompts(*golds), texts[1:] + texts[:1])
    assert [(gold, score) for gold, score in zip(golds, scores, strict=True) if score.reward != 0.0] == []
    numeric = [
        (gold, text) for gold, text in zip(golds, texts, strict=True) if parse_number(gold) is not None
    ]
    scores = NumericMatch()(prompts(*(gold for gold, _ in numeric)), [text for _, text in numeric])
    assert len(numeric) > 200 and all(score.reward == 1.0 for score in scores)
