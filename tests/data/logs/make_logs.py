"""Made the logs beside it, each by the library whose form it is.

`python make_logs.py verifiers|openenv|inspect|lm-eval`, run in environments with verifiers 0.4.0, openenv
0.10.0, inspect-ai 0.3.285 and lm-eval 0.4.13; nothing is downloaded. `python make_logs.py policy` made
policy/: a tokenizer of the 256 bytes with ChatML's turns, and the config of a small model.
"""

import itertools
import json
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).parent
CHATML = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SUMS = {"11+21=": ("32", "33"), "40+2=": ("42", "24")}
"""Question -> the right answer and a wrong one."""
TOOL = {
    "name": "add",
    "description": "Adds two numbers.",
    "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
}


def policy() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    vocab = {text: i for i, text in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    fast.chat_template = CHATML
    fast.save_pretrained(HERE / "policy")
    LlamaConfig(
        vocab_size=258, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=1024, eos_token_id=257, bos_token_id=None,
        architectures=["LlamaForCausalLM"], tie_word_embeddings=True,
    ).save_pretrained(HERE / "policy")  # fmt: skip


def encoder():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(HERE / "policy")
    return lambda text: tokenizer(text, add_special_tokens=False).input_ids


def header(role: str) -> str:
    return f"<|im_start|>{role}\n"


def verifiers() -> None:
    """Two rollouts of each question in two turns (asked once more), and one that failed."""
    from verifiers.v1.agent import AgentConfig
    from verifiers.v1.episode import EnvInfo, Episode
    from verifiers.v1.graph import MessageNode
    from verifiers.v1.task import WireTaskData
    from verifiers.v1.trace import AgentInfo, ModelCall, Trace, TraceTask
    from verifiers.v1.types import AssistantMessage, Sampling, UserMessage
    from verifiers.v1.utils.trace_store import TRACES_FILE, write_episode

    encode = encoder()
    (HERE / TRACES_FILE).unlink(missing_ok=True)
    for question, answers in SUMS.items():
        for place, answer in enumerate(answers):
            asked = encode(header("user") + question + "<|im_end|>\n")
            opened = encode(header("assistant"))
            said, again = encode(f"{answer}<|im_end|>"), encode("\n" + header("user") + "Sure?<|im_end|>\n")
            agreed = encode("yes<|im_end|>")
            nodes = [
                MessageNode(message=UserMessage(content=question), token_ids=asked, mask=[False] * len(asked)),  # noqa: E501
                MessageNode(
                    parent=0, sampled=True, message=AssistantMessage(content=answer), token_ids=opened + said,
                    mask=[False] * len(opened) + [True] * len(said), logprobs=[-0.5] * len(said),
                ),
                MessageNode(
                    parent=1, message=UserMessage(content="Sure?"), token_ids=again, mask=[False] * len(again)
                ),
                MessageNode(
                    parent=2, sampled=True, message=AssistantMessage(content="yes"), token_ids=opened + agreed,  # noqa: E501
                    mask=[False] * len(opened) + [True] * len(agreed), logprobs=[-0.25] * len(agreed),
                ),
            ]  # fmt: skip
            data = WireTaskData.model_validate({"prompt": question, "answer": answers[0]})
            trace = Trace(
                task=TraceTask(type="Sum", data=data, key=f"sum {question}"),
                agent=AgentInfo(config=AgentConfig(model="peer-1b")),
                nodes=nodes,
                calls=[
                    ModelCall(
                        node=n, model="peer-1b", finish_reason="stop", sampling=Sampling(temperature=0.8)
                    )
                    for n in (1, 3)
                ],
                is_completed=True,
                ok=True,
            )
            trace.record_reward("right", 1.0 - place)
            trace.record_reward("polite", 1.0, weight=0.5)
            trace.record_metric("turns", 2.0)
            if place:
                failed = trace.model_copy(deep=True)
                failed.record_error(RuntimeError("the sandbox went away"))
            for each in [trace, failed] if place and question.startswith("4") else [trace]:
                write_episode(
                    HERE, Episode(env=EnvInfo(id="sums"), task=each.task, traces=[each], ok=each.ok)
                )


def openenv() -> None:
    """Training traces of two calls each, with the reward of `verify` beside them."""
    from openenv.core.harness.training import TrainingTrace, TrainingTurn

    encode, lines = encoder(), []
    for question, answers in SUMS.items():
        for place, answer in enumerate(answers):
            prompt = encode(header("user") + question + "<|im_end|>\n" + header("assistant"))
            said, agreed = encode(f"{answer}<|im_end|>"), encode("yes<|im_end|>")
            after = [
                *prompt,
                *said,
                *encode("\n" + header("user") + "Sure?<|im_end|>\n" + header("assistant")),
            ]
            turns = [
                TrainingTurn(
                    node_id=f"n{turn}", prompt_token_ids=before, completion_token_ids=ids,
                    per_token_logps=[-0.5] * len(ids), loss_mask=[0] * len(before) + [1] * len(ids),
                    metadata={"sampling_params": {"temperature": 0.8}},
                )
                for turn, (before, ids) in enumerate([(prompt, said), (after, agreed)])
            ]  # fmt: skip
            trace = TrainingTrace(turns=turns)
            row = {
                "task_id": f"sum {question}",
                "reward": 1.0 - place,
                "trace": trace.model_dump(mode="json"),
            }
            lines.append(json.dumps(row))
    (HERE / "openenv.jsonl").write_text("\n".join(lines) + "\n")


def inspect() -> None:
    """Two epochs of a mock model: a tool call, and an answer that is right in the first."""
    from inspect_ai import Task
    from inspect_ai import eval as evaluate
    from inspect_ai.dataset import Sample
    from inspect_ai.model import ModelOutput, ModelUsage, get_model
    from inspect_ai.scorer import match
    from inspect_ai.solver import generate, use_tools
    from inspect_ai.tool import tool

    @tool
    def add():
        async def execute(a: int, b: int) -> str:
            """Adds two numbers.

            Args:
                a: the first.
                b: the second.
            """
            return str(a + b)

        return execute

    outputs = []
    for epoch, answers in itertools.product((0, 1), SUMS.values()):
        outputs.append(ModelOutput.for_tool_call("mockllm/model", "add", {"a": 1, "b": 2}))
        outputs.append(ModelOutput.from_content("mockllm/model", answers[epoch]))
    for output in outputs:  # else it counts tokens with an encoding that it downloads
        output.usage = ModelUsage(input_tokens=1, output_tokens=1, total_tokens=2)
    dataset = [Sample(input=question, target=answers[0], id=question) for question, answers in SUMS.items()]
    (log,) = evaluate(
        Task(dataset=dataset, solver=[use_tools(add()), generate()], scorer=match(), epochs=2),
        model=get_model("mockllm/model", custom_outputs=outputs),
        log_dir=str(HERE / "inspect"), log_format="eval", display="none", max_samples=1, max_connections=1,
    )  # fmt: skip
    Path(log.location.removeprefix("file://")).rename(HERE / "inspect.eval")
    (HERE / "inspect").rmdir()


def lm_eval() -> None:
    """A generation task with two filters, answered by a model of two fixed answers."""
    from lm_eval import simple_evaluate
    from lm_eval.api.model import LM
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.loggers import EvaluationTracker

    class Fixed(LM):
        def generate_until(self, requests, disable_tqdm=False):
            answers = {q: a for q, (right, wrong) in SUMS.items() for a in [right if q[0] == "1" else wrong]}
            return [answers[request.args[0].split()[-1]] for request in requests]

        def loglikelihood(self, requests, disable_tqdm=False):
            raise NotImplementedError

        loglikelihood_rolling = loglikelihood

    (HERE / "docs.jsonl").write_text(
        "".join(json.dumps({"q": q, "a": answers[0]}) + "\n" for q, answers in SUMS.items())
    )
    task = ConfigurableTask(
        config={
            "task": "sums",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(HERE / "docs.jsonl")}},
            "test_split": "test",
            "output_type": "generate_until",
            "doc_to_text": "Compute {{q}}",
            "doc_to_target": "{{a}}",
            "generation_kwargs": {"until": ["\n"], "do_sample": False, "temperature": 0.0},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
            "filter_list": [
                {"name": "whole", "filter": [{"function": "take_first"}]},
                {
                    "name": "digits",
                    "filter": [{"function": "regex", "regex_pattern": "(\\d)"}, {"function": "take_first"}],
                },
            ],
        }
    )
    tracker = EvaluationTracker(output_path=str(HERE / "out"))
    results = simple_evaluate(
        Fixed(), tasks=[task], evaluation_tracker=tracker, log_samples=True, bootstrap_iters=0
    )
    tracker.general_config_tracker.model_name_sanitized, tracker.date_id = "fixed", "now"
    tracker.save_results_samples("sums", results["samples"]["sums"])
    (made,) = (HERE / "out").rglob("samples_*.jsonl")
    made.rename(HERE / "samples_sums.jsonl")
    shutil.rmtree(HERE / "out")
    (HERE / "docs.jsonl").unlink()


if __name__ == "__main__":
    globals()[sys.argv[1].replace("-", "_")]()
