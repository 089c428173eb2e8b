"""Any rows and any file give sound prompts, or an error that names what is wrong."""

import json
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prompt_rows import CHATTY, load, write_content, write_rows

from agro_lightning.data.buffer.schema import BadFileError, BadRowError

# ---------------------------------------------------------------- fuzz

TEXTS = ["", " ", "####", "#### 1,0", r"\boxed{", r"\boxed{\frac{1}{2}}", "\ud800", "</s>", "{prompt}"]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(TEXTS),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["role", "content", "ground_truth", "x", ""]), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
NAMES = st.sampled_from(
    ["prompt", "question", "problem", "answer", "solution", "reward_model", "prompt_id", "hint", ""]
)
SHAPES = st.fixed_dictionaries(
    {
        "format": st.sampled_from(["plain", "gsm8k", "math", "dapo"]),
        "chat": st.booleans(),
        "template": st.sampled_from(["{prompt}", "{hint} {prompt}", "{reward_model.x}"]),
        "max_prompt_tokens": st.sampled_from([None, 1, 8]),
        "answer_column": st.sampled_from([None, "hint", "reward_model.ground_truth"]),
        "id_column": st.sampled_from([None, "hint"]),
    }
)
KINDS = ["a.jsonl", "a.json", "a.parquet"]
NAMED = (BadRowError, BadFileError, ValueError)
QUIET = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def check_any(content, name, shape):
    """Loads whatever `content` is, strictly and dropping: either prompts that are sound, or a named error."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_content(Path(folder, name), content)
        outcomes = {}
        for mode in ("error", "drop"):
            try:
                outcomes[mode] = load(path, CHATTY, on_bad_row=mode, **shape)
            except NAMED as error:
                assert type(error) in NAMED, f"{type(error)} came from deep inside: {error}"
                assert str(path) in str(error), error
                outcomes[mode] = None
        for data in filter(None, outcomes.values()):
            for prompt in data:
                assert prompt.prompt_ids and prompt.prompt.strip() and prompt.answer != ""
        strict, dropping = outcomes["error"], outcomes["drop"]
        if strict is not None:
            assert dropping is not None and set(strict.dropped) <= {"duplicate"}
            assert strict.fingerprint == dropping.fingerprint
        elif dropping is not None:
            assert set(dropping.dropped) - {"duplicate"}


@given(rows=st.lists(st.dictionaries(NAMES, VALUES, max_size=5), max_size=4), shape=SHAPES)
@QUIET
def test_any_json_rows_give_sound_prompts_or_a_named_error(rows, shape):
    check_any("\n".join(map(json.dumps, rows)).encode(), "rows.jsonl", shape)


@given(content=st.binary(max_size=200) | st.text(max_size=200).map(str.encode), name=st.sampled_from(KINDS))
@QUIET
def test_any_file_gives_sound_prompts_or_a_named_error(content, name):
    check_any(content, name, {})


PARQUET = write_rows(Path(tempfile.mkdtemp()) / "rows.parquet").read_bytes()


@given(
    place=st.integers(0, len(PARQUET) - 1),
    byte=st.integers(0, 255),
    cut=st.none() | st.integers(0, len(PARQUET)),
)
@QUIET
def test_a_damaged_parquet_file_gives_sound_prompts_or_a_named_error(place, byte, cut):
    damaged = bytearray(PARQUET)
    damaged[place] = byte
    check_any(bytes(damaged[:cut]), "rows.parquet", {})
