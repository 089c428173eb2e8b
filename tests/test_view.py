"""The command `view`: what is in the page, that no text can become script, and the page in a real browser."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from browser import Browser
from rollout_files import group
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from agro_lightning.checkpoints.trained import load_trained
from agro_lightning.commands.main import main
from agro_lightning.commands.view.command import POINTS, as_script_data, curves
from agro_lightning.data.buffer.schema import tokenizer_id
from agro_lightning.data.buffer.writer import append_rollouts
from agro_lightning.models.pretrained import load_tokenizer
from agro_lightning.types import Completion, Prompt, PromptGroup

HOSTILE = [
    "</script><script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "<!--<script>",
    "]]>&lt;b&gt;\u2028\u2029'\"`${1}\\",
    "<svg/onload=alert(1)>",
    "\ud7ff\x00\x1b[31m\U0001f600",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("view") / "run"
    options = ["--trainer.max_steps", "4", "--trainer.val_check_interval", "2", "--data.batch_size", "4"]
    table = "{class_path: agro_lightning.training.callbacks.samples.SampleTable, init_args: {every: 2}}"
    sources = (
        "[{weight: 2, name: live}, {weight: 1, paths: [quickstart], repeat: true, name: offline}, "
        "{weight: 1, capacity: 48, max_staleness: 6, name: replay}]"
    )
    options += ["--trainer.callbacks", f"[{table}]", "--data.sources", sources]
    options += ["--data.validation.limit", "6", "--model.optimizer.learning_rate", "0.003"]
    options += ["--trainer.enable_progress_bar", "false"]
    main(["fit", "--run_dir", str(folder), *options])
    return folder


class Scripts(HTMLParser):
    """The page's elements, and what stands in those of script."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags, self.scripts, self.policy, self.inside = [], [], "", False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")
        self.inside = tag == "script"
        if dict(attrs).get("http-equiv") == "Content-Security-Policy":
            self.policy = dict(attrs)["content"]

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, text):
        if self.inside:
            self.scripts[-1] += text


def view(source, out, *args):
    main(["view", str(source), "--out", str(out), *map(str, args)])
    html = out.read_text()
    return html, json.loads(Scripts(html).scripts[0])


def test_a_runs_page_has_what_the_run_wrote(run, tmp_path, capsys):
    html, data = view(run, tmp_path / "v.html")
    assert "(reward" not in capsys.readouterr().err
    assert data["name"] == "run" and "max_steps: 4" in data["settings"]
    steps, rewards = data["curves"]["train/reward"]
    assert steps == [1, 2, 3, 4] and len(rewards) == 4 and "val/greedy_accuracy" in data["curves"]
    written = sum(pq.read_metadata(path).num_rows for path in run.glob("*/*.parquet"))
    rows = [row for group in data["groups"] for row in group["rows"]]
    assert data["found"] == len(rows) == written > 60
    assert {"live", "offline", "greedy", "sampled"} <= {row["source"] for row in rows}
    at = [group["step"] for group in data["groups"]]
    assert at == sorted(at) and {0, 2, 4} <= set(at)
    assert data["checkpoint"] == 4 and all(row["policy"] is not None for row in rows)
    assert len(re.findall("https?://", html)) == html.count("http://www.w3.org/2000/svg") == 1


def test_logprobs_are_those_of_the_sampler_else_of_the_checkpoint(run, tmp_path):
    _, data = view(run, tmp_path / "v.html")
    trained = load_trained(str(run), device=torch.device("cpu"))
    reference = trained.reference().policy
    files = {file.name: pq.read_table(file).to_pylist() for file in run.glob("*/*.parquet")}
    checked = set()
    for group_ in data["groups"]:
        stored = [row for row in files[group_["file"]] if row["prompt_id"] == group_["id"]]
        for row in group_["rows"]:
            text = "".join(data["vocabulary"][token] for token in row["tokens"])
            match = next(r for r in stored if _text(r["completion_ids"]) == text)
            if row["by"] == "sampler":
                known = [r["behavior_logprobs"] for r in stored if _text(r["completion_ids"]) == text]
                wanted = [pytest.approx(values, abs=6e-4) for values in known]
                assert [p / 1000 for p in row["policy"]] in wanted
            elif (row["source"], len(row["tokens"])) not in checked:
                for policy, values in ((trained.policy, row["policy"]), (reference, row["reference"])):
                    wanted = _logprobs(policy, match["prompt_ids"], match["completion_ids"])
                    assert [v / 1000 for v in values] == pytest.approx(wanted, abs=1e-3)
                checked.add((row["source"], len(row["tokens"])))
    assert {source for source, _ in checked} >= {"offline", "greedy"}


def _logprobs(policy, prompt, completion):
    with policy.generating() as lm:
        logits = lm(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return logits.gather(1, torch.tensor(completion)[:, None])[:, 0].tolist()


def _text(ids):
    tokenizer = load_tokenizer("quickstart")
    return "".join(tokenizer.decode([token], skip_special_tokens=False) for token in ids)


def test_rows_are_whole_groups_over_the_whole_run(run, tmp_path):
    _, data = view(run, tmp_path / "v.html", "--rows", 40, "--compute", "false")
    assert sum(len(group["rows"]) for group in data["groups"]) <= 40 < data["found"]
    assert len({group["step"] for group in data["groups"]}) >= 3 and data["checkpoint"] is None
    rows = [row for group in data["groups"] for row in group["rows"]]
    assert all(row["policy"] is None for row in rows if row["source"] == "offline")


def test_a_buffer_alone(tmp_path):
    stored = (-1.0, -0.25)
    groups = [group(i, each=3, ref_logprobs=stored, reference_id="r") for i in range(5)]
    append_rollouts(tmp_path, groups, name="mine", tokenizer_id=tokenizer_id(load_tokenizer("quickstart")))
    _, data = view(tmp_path / "mine.parquet", tmp_path / "v.html")
    assert data["found"] == 15 and "curves" not in data
    row = data["groups"][0]["rows"][1]
    assert row["policy"] == [-125, -500] and row["reference"] == [-1000, -250] and row["by"] == "sampler"
    assert row["parts"] == {"exact": 0.5, "format": 1.0}


def test_tokens_that_the_policy_did_not_choose_have_no_logprobs(tmp_path):
    logprobs = dict(
        behavior_logprobs=(-0.5, -0.25, -0.125), ref_logprobs=(-1.0, -0.25, -2.0), reference_id="r"
    )
    given = dict(completion_ids=(5, 6, 7, 2), policy_mask=(True, False, True, True), **logprobs)
    name = tokenizer_id(load_tokenizer("quickstart"))
    append_rollouts(tmp_path, [group(1, each=2, **given)], name="mine", tokenizer_id=name)
    _, data = view(tmp_path / "mine.parquet", tmp_path / "v.html")
    row = data["groups"][0]["rows"][0]
    assert row["chosen"] == [1, 0, 1, 1] and len(row["tokens"]) == 4
    assert row["policy"] == [-500, None, -250, -125] and row["reference"] == [-1000, None, -250, -2000]


def hostile_buffer(folder: Path) -> tuple[Path, Path]:
    """Texts that would be script in a careless page, in every field that a text can come from."""
    words = ["<pad>", "</s>", *HOSTILE]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")
    fast.save_pretrained(folder / "tokenizer")
    (folder / "tokenizer" / "config.json").write_text('{"model_type": "llama"}')
    groups = []
    for bad in HOSTILE:
        completions = [
            Completion(
                completion=" ".join(HOSTILE),
                completion_ids=(*range(2, len(words)), 1),
                reward=float(i),
                reward_parts={bad: 1.0},
                source=bad,
                finish_reason="length" if i else "stop",
            )
            for i in range(2)
        ]
        prompt = Prompt(prompt_id=bad, prompt=bad, prompt_ids=(2, 3), answer=bad)
        groups.append(PromptGroup(prompt=prompt, completions=tuple(completions)))
    append_rollouts(folder / "rows", groups, name="a'\"&<b>", tokenizer_id=tokenizer_id(fast))
    return folder / "rows", folder / "tokenizer"


def test_no_text_can_become_markup(tmp_path):
    rows, tokenizer = hostile_buffer(tmp_path)
    html, data = view(rows, tmp_path / "v.html", "--tokenizer", tokenizer)
    parsed = Scripts(html)
    assert [g["prompt"] for g in data["groups"]] == [g["id"] for g in data["groups"]] == HOSTILE
    assert [data["vocabulary"][t] for t in data["groups"][0]["rows"][0]["tokens"]] == [*HOSTILE, "</s>"]
    assert [dict(a).get("type") for tag, a in parsed.tags if tag == "script"] == ["application/json", None]
    names = {name for _, attributes in parsed.tags for name in attributes}
    assert names == {"lang", "charset", "http-equiv", "content", "name", "id", "hidden", "type"}
    known = "html head meta title style body header h1 p nav main section form div script"
    assert {tag for tag, _ in parsed.tags} == set(known.split())
    text = re.search('id="data">(.*?)</script>', html)[1]
    assert not set(text) & set("<>&\u2028\u2029") and text.isascii()
    digest = base64.b64encode(hashlib.sha256(parsed.scripts[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in parsed.policy and "default-src 'none'" in parsed.policy
    assert "unsafe" not in parsed.policy
    script = parsed.scripts[1]
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|Function\(", script)


def test_json_of_any_text_comes_back():
    assert json.loads(as_script_data(HOSTILE)) == HOSTILE


def test_long_curves_are_thinned(tmp_path):
    lines = [f"{step},{step % 2},{'nan' if step else 3}\n" for step in range(1000)]
    (tmp_path / "metrics.csv").write_text("step,train/reward,val/x\n" + "".join(lines))
    found = curves(tmp_path / "metrics.csv")
    steps, values = found["train/reward"]
    assert len(steps) == 334 <= POINTS and steps[0] == 2 and values[0] == pytest.approx(1 / 3, abs=1e-4)
    assert found["val/x"] == [[1], [3]]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nowhere"], "nowhere does not exist; give a run's folder"),
        (["quickstart", "--rows", "0"], "rows is 0; it must be at least 1"),
        (["quickstart", "--out", "."], ". is a folder; name the file to write"),
    ],
)
def test_what_cannot_be_viewed_is_one_line(args, message, tmp_path, capsys):
    out = [] if "--out" in args else ["--out", str(tmp_path / "v.html")]
    with pytest.raises(SystemExit):
        main(["view", *args, *out])
    err = capsys.readouterr().err
    assert message in err and len(err.splitlines()) == 1


# ---------------------------------------------------------------- in a real browser


@pytest.fixture
def browser(tmp_path):
    browser = Browser(tmp_path / "profile")
    yield browser
    browser.close()


def shown(browser):
    return browser.value("document.getElementById('shown').textContent")


def choose(browser, name, value):
    browser.value(
        f"(() => {{ const e = document.getElementById('filter-{name}'); e.value = {json.dumps(value)}; "
        "e.dispatchEvent(new Event('input')); })()"
    )


@pytest.mark.slow
def test_the_page_works_in_a_browser(run, browser, tmp_path):
    _, data = view(run, tmp_path / "v.html")
    browser.open(tmp_path / "v.html")
    rows = [(g, row) for g in data["groups"] for row in g["rows"]]
    assert shown(browser).startswith(f"{len(rows)} completions")
    choose(browser, "reward-from", "1")
    choose(browser, "source", '"live"')
    kept = sum(row["reward"] >= 1 and row["source"] == "live" for _, row in rows)
    assert 0 < kept < len(rows) and shown(browser).startswith(f"{kept} completions")
    choose(browser, "reward-from", "")
    choose(browser, "source", "")
    choose(browser, "truncated", "yes")
    kept = sum(row["finish"] == "length" for _, row in rows)
    assert shown(browser).startswith(f"{kept} completions")
    choose(browser, "truncated", "")
    s = [sum(row["policy"]) / 1000 - sum(row["reference"]) / 1000 for _, row in rows]
    choose(browser, "s-from", "0.01")
    assert shown(browser).startswith(f"{sum(value >= 0.01 for value in s)} completions")
    choose(browser, "s-from", "")
    choose(browser, "step", "4")
    browser.point("details:not([open]) summary")
    coloured = "[...document.querySelectorAll('.tokens span')].filter(e => e.style.backgroundColor).length"
    assert browser.value(coloured) == browser.value("document.querySelectorAll('.tokens span').length") > 8
    browser.point(".tokens span", "move")
    assert "log π_ref" in browser.value("document.getElementById('tip').textContent")
    browser.screenshot(tmp_path / "completions.png")
    tabs = (("curves", "#curves svg", 20), ("gap", "#gap svg", 3), ("settings", "#settings pre", 2))
    for tab, selector, least in tabs:
        browser.point(f"#tab-{tab}")
        assert browser.value(f"document.querySelectorAll('{selector}').length") >= least
        assert browser.value("document.getElementById('completions').hidden")
        browser.screenshot(tmp_path / f"{tab}.png")
    assert browser.errors == [] and [r for r in browser.requests if not r.startswith("file:")] == []


@pytest.mark.slow
def test_hostile_texts_do_nothing_in_a_browser(browser, tmp_path):
    rows, tokenizer = hostile_buffer(tmp_path)
    view(rows, tmp_path / "v.html", "--tokenizer", tokenizer)
    browser.open(tmp_path / "v.html")
    browser.value("document.querySelectorAll('details').forEach(e => { e.open = true; })")
    assert browser.value("document.querySelectorAll('.row').length") == 2 * len(HOSTILE)
    assert HOSTILE[0] in browser.value("document.querySelector('.tokens').textContent")
    assert browser.value("document.querySelectorAll('img, iframe, .tokens *:not(span)').length") == 0
    assert browser.value("document.scripts.length") == 2
    assert browser.value("document.title").endswith("agro-lightning")
    # the policy holds even where markup would get in
    browser.value("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"document.title=1\">')")
    browser.value("new Promise(done => setTimeout(() => done(1), 200))")
    assert browser.value("document.title") != "1" and browser.dialogs == 0


@pytest.mark.slow
def test_many_completions_open_quickly(browser, tmp_path):
    """5,000 completions of 128 tokens; only those in sight are drawn."""
    tokens = tuple([4 + i % 10 for i in range(127)] + [2])
    many = dict(completion_ids=tokens, behavior_logprobs=tuple([-0.5] * 128), reference_id="r")
    groups = [group(i, ref_logprobs=tuple([-1.0] * 128), **many) for i in range(1250)]
    append_rollouts(tmp_path, groups, name="many", tokenizer_id=tokenizer_id(load_tokenizer("quickstart")))
    _, data = view(tmp_path / "many.parquet", tmp_path / "v.html")
    assert sum(len(g["rows"]) for g in data["groups"]) == 5000
    seconds = browser.open(tmp_path / "v.html")
    print(f"{(tmp_path / 'v.html').stat().st_size / 1e6:.1f} MB opened in {seconds:.2f} s")
    drawn = browser.value("document.querySelectorAll('details').length")
    assert 0 < drawn < 200  # the rest comes with scrolling
    browser.value("window.scrollTo(0, document.body.scrollHeight)")
    browser.value("new Promise(done => setTimeout(() => done(1), 500))")
    assert browser.value("document.querySelectorAll('details').length") > drawn
