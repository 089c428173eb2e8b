"""Prompt rows, files and tokenizers for the tests of prompt data sets."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from agro_lightning.data.prompts.dataset import PromptDataset, PromptSettings

CHAT = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if thinking %}hm {% endif %}{% endif %}"
)


def make_tokenizer(post=None, chat_template=None):
    """A tokenizer of the 256 bytes with <s>, </s>; `post` such as "<s> $A" adds them to every text."""
    vocab = {text: i for i, text in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab={**vocab, "<s>": 256, "</s>": 257}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    if post is not None:
        special = [("<s>", 256), ("</s>", 257)]
        tokenizer.post_processor = processors.TemplateProcessing(single=post, special_tokens=special)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = chat_template
    return fast


TOKENIZER = make_tokenizer()
CHATTY = make_tokenizer(post="<s> $A", chat_template=CHAT)


def load(path, tokenizer=TOKENIZER, on_bad_row="error", vocab_size=None, **options):
    return PromptDataset(
        PromptSettings(path=str(path), **options),
        tokenizer=tokenizer,
        on_bad_row=on_bad_row,
        vocab_size=vocab_size,
    )


def answers(data):
    return [prompt.answer for prompt in data]


ROWS = [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(5)]


def write_rows(path, rows=ROWS):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("\ufeff" + "\n\n".join(json.dumps(row) for row in rows))
    return path


def write_content(path, content):
    path.write_bytes(content)
    return path
