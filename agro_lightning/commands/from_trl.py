"""`from-trl`: a GRPOConfig of TRL as a configuration of `fit`."""

import ast
import difflib
import math
from pathlib import Path
from typing import Any

import yaml

from agro_lightning.commands.trl_keys import COMPUTED, DIRECT, REASONS
from agro_lightning.primitives.atomic_files import replace_text

HELP = "FILE is the YAML or JSON of a GRPOConfig, or a Python script with GRPOConfig(...)"
LORA = {"r": "lora_r", "lora_alpha": "lora_alpha", "target_modules": "lora_target_modules"}


def from_trl(
    file: str,
    out: str | None = None,
    processes: int = 1,
    prompts: int | None = None,
    model: str | None = None,
    train: str | None = None,
    validation: str | None = None,
) -> None:
    """Turns TRL's GRPOConfig into a configuration of `fit`, on the screen or in a file.

    Each key is mapped, or stands in a comment with the reason why it has no counterpart. A script is read
    and not run: what it computes is named in a comment.

    Args:
        file: YAML or JSON with GRPOConfig's keys (those of `trl grpo` too), or a Python script with one
            GRPOConfig(...) in it.
        out: the file to write; without it the configuration is printed.
        processes: how many processes trained with it: trainer.devices.
        prompts: how many prompts the data set has, which turns num_train_epochs into steps.
        model: model.policy.path, where the file does not say it.
        train: data.train.path, where the file does not say it.
        validation: data.validation.path; without it there is no validation.

    Raises:
        ValueError: a key that GRPOConfig does not have, a value of another type, or a batch that is no whole
            number of groups on each process.
    """
    path = Path(file)
    given, notes = read_script(path) if path.suffix == ".py" else (read_mapping(path), [])
    if model:
        given["model_name_or_path"] = model
    if train:
        given["dataset_name"] = train
    text = Translation(given, notes, processes, prompts, validation).text(path.name)
    if out is None:
        print(text, end="")
    else:
        replace_text(Path(out), text)
        print(f"{out}: python -m agro_lightning fit --config {out}")


def read_mapping(path: Path) -> dict[str, Any]:
    """The keys of a YAML or JSON file, those that are null left out."""
    try:
        found = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read ({str(error).splitlines()[0]}); {HELP}") from None
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{path} holds no keys; {HELP}")
    return {str(key): value for key, value in found.items() if value is not None}


def read_script(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The literal keywords of a script's GRPOConfig(...), with the model, data and adapter that it names, and
    notes on what it computes. Nothing of the script is run."""
    try:
        tree = ast.parse(path.read_text())
    except (OSError, UnicodeDecodeError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path} is no Python that can be read ({error}); {HELP}") from None
    calls: dict[str, list[ast.Call]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            calls.setdefault(ast.unparse(node.func).rpartition(".")[2], []).append(node)
    configs = calls.get("GRPOConfig", [])
    if len(configs) != 1:
        lines = ", ".join(str(call.lineno) for call in configs) or "none"
        raise ValueError(f"{path} needs one GRPOConfig(...) and has {len(configs)} (lines: {lines}); {HELP}")
    given, notes = _literals(configs[0], {})
    for key in given:
        _check_key(key, path)
    for call in calls.get("LoraConfig", [])[:1]:
        adapter, more = _literals(call, LORA)
        known = {key: value for key, value in adapter.items() if key in LORA.values() or key in REASONS}
        given |= {"use_peft": True} | known
        left = [
            f"LoraConfig's {key} has no counterpart" for key in adapter.keys() - known.keys() - {"task_type"}
        ]
        notes += [*more, *sorted(left)]
    for call in calls.get("GRPOTrainer", [])[:1]:
        words = {word.arg: word.value for word in call.keywords}
        if isinstance(named := words.get("model"), ast.Constant):
            given["model_name_or_path"] = named.value
        if functions := words.get("reward_funcs"):
            listed = functions.elts if isinstance(functions, ast.List | ast.Tuple) else [functions]
            given["reward_funcs"] = [
                item.value if isinstance(item, ast.Constant) else ast.unparse(item) for item in listed
            ]
    for call in calls.get("load_dataset", [])[:1]:
        names = [word.value for word in call.args if isinstance(word, ast.Constant)]
        given |= dict(zip(("dataset_name", "dataset_config"), names, strict=False))
    return {key: value for key, value in given.items() if value is not None}, notes


def _literals(call: ast.Call, names: dict[str, str]) -> tuple[dict[str, Any], list[str]]:
    """Keywords of a call whose values are literals, under their names here, and notes on the others."""
    found, notes = {}, []
    if call.args:
        notes.append(f"line {call.lineno}: arguments without a name were left out")
    for word in call.keywords:
        key = names.get(word.arg or "", word.arg)
        try:
            value = ast.literal_eval(word.value)
            found |= value if key is None else {key: value}
        except (ValueError, TypeError):
            found |= {} if key is None else {key: None}
            notes.append(
                f"line {word.value.lineno}: {word.arg or '**'} = {ast.unparse(word.value)}; set it by hand"
            )
    return found, notes


def _check_key(key: str, path: Path | str) -> None:
    known = {*REASONS, *DIRECT, *COMPUTED}
    if key in known:
        return
    near = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise ValueError(f"{path}: GRPOConfig of TRL 1.16 has no key {key!r}.{hint}")


class Translation:
    """The settings of `fit` that a GRPOConfig's keys stand for, and what remains to be said.

    Args:
        given: TRL's keys and values.
        notes: what the reader of the file has to say.
        processes: TRL's processes.
        prompts: rows of the data set, where known.
        validation: path of the validation prompts.
    """

    def __init__(
        self,
        given: dict[str, Any],
        notes: list[str],
        processes: int,
        prompts: int | None,
        validation: str | None,
    ) -> None:
        if processes < 1:
            raise ValueError(f"processes is {processes}; it must be at least 1")
        self.given, self.notes, self.processes, self.validation = given, list(notes), processes, validation
        self.settings: dict[str, Any] = {}
        for key in given:
            _check_key(key, "the configuration")
        for key, (ours, kind, default) in DIRECT.items():
            value = self.value(key, kind, default)
            if value is not None:
                self.settings[ours] = value
        self._batch()
        self._steps(prompts)
        self._optimizer()
        self._model()
        self._data()
        self._engine()
        self._times()

    def value(self, key: str, kind: type, default: Any) -> Any:
        """A key's value as its type, or TRL's default; a number may be text, as YAML reads 1e-6."""
        value = self.given.get(key, default)
        if kind is dict and isinstance(value, str):
            value = yaml.safe_load(value)
        if value is None or kind in (str, dict) and isinstance(value, kind):
            return value
        if kind is bool and isinstance(value, bool):
            return value
        if kind in (int, float) and isinstance(value, int | float | str) and not isinstance(value, bool):
            try:
                number = float(value)
                if kind is float and math.isfinite(number):
                    return number
                if kind is int and number == int(number):
                    return int(number)
            except (ValueError, OverflowError):
                pass
        words = {
            int: "a whole number",
            float: "a number",
            bool: "true or false",
            str: "text",
            dict: "a mapping",
        }
        raise ValueError(f"{key} is {value!r}; TRL takes {words[kind]} there")

    def _batch(self) -> None:
        """TRL counts completions of a micro-batch, and spreads groups over it; here a group stays whole."""
        completions = self.value("per_device_train_batch_size", int, 8)
        pieces = self.value("gradient_accumulation_steps", int, 1)
        group = self.settings["data.group_size"]
        if min(completions, pieces, group) < 1 or completions * pieces % group:
            raise ValueError(
                f"per_device_train_batch_size {completions} × gradient_accumulation_steps {pieces} is "
                f"{completions * pieces} completions a process and step, no whole number of groups of "
                f"num_generations {group}; here a group stays on one process, so the product must be a "
                f"multiple of {group}"
            )
        groups = completions * pieces // group
        pieces = math.gcd(groups, pieces)
        self.pieces, self.groups_of_step = pieces, groups * self.processes
        self.settings |= {"data.batch_size": groups // pieces, "trainer.accumulate_grad_batches": pieces}
        self.settings["trainer.devices"] = self.processes
        if {"generation_batch_size", "steps_per_generation"} & self.given.keys():
            self.notes.append(
                "generation_batch_size, steps_per_generation: each step generates its own completions, so "
                "none is older than data.updates_per_rollout says"
            )

    def _steps(self, prompts: int | None) -> None:
        steps = self.value("max_steps", int, -1)
        epochs = self.value("num_train_epochs", float, 3.0)
        if steps <= 0 and prompts is not None:
            steps = math.ceil(epochs * prompts / self.groups_of_step)
        if steps <= 0:
            steps = 1000
            self.notes.append(
                f"trainer.max_steps: TRL ends after {epochs:g} epochs, which is {epochs:g} × prompts / "
                f"{self.groups_of_step} steps; --prompts N computes it, 1000 is a guess"
            )
        self.steps = self.settings["trainer.max_steps"] = steps

    def _optimizer(self) -> None:
        betas = [self.value("adam_beta1", float, 0.9), self.value("adam_beta2", float, 0.999)]
        self.settings["model.optimizer.betas"] = betas
        warmup = self.value("warmup_steps", float, 0.0) or self.value("warmup_ratio", float, 0.0)
        warmup = math.ceil(warmup * self.steps) if 0 < warmup < 1 else int(warmup)
        self.settings["model.optimizer.warmup_steps"] = warmup
        name = str(self.value("lr_scheduler_type", str, "linear"))
        extra = self.value("lr_scheduler_kwargs", dict, None) or {}
        constant = name.startswith("constant")
        self.settings["model.optimizer.schedule"] = "constant" if constant else "cosine"
        if not constant:
            rate, least = extra.get("min_lr_rate"), extra.get("min_lr")
            if rate is None:
                rate = 0.0 if least is None else float(least) / self.settings["model.optimizer.learning_rate"]
            self.settings["model.optimizer.final_fraction"] = float(rate)
        if name not in ("constant", "constant_with_warmup", "cosine", "cosine_with_min_lr"):
            self.notes.append(
                f"model.optimizer.schedule: {name} has no counterpart; a cosine falls to 0 as far"
            )
        optim = str(self.value("optim", str, "adamw_torch_fused"))
        if not optim.startswith("adamw_torch"):
            self.notes.append(f"optim {optim}: AdamW is used")

    def _model(self) -> None:
        if "model.policy.path" not in self.settings:
            self.notes.append(
                "model.policy.path: the file names no model, so this is the quick start's; --model"
            )
        if self.given.get("fp16"):
            self.notes.append("fp16: float16 does not train here; compute_dtype is bfloat16")
        mixed = self.value("bf16", bool, True) or self.given.get("fp16")
        self.settings["model.policy.compute_dtype"] = "bfloat16" if mixed else None
        if self.value("activation_checkpointing", bool, None):
            self.settings["model.policy.gradient_checkpointing"] = True
        if self.given.get("use_cpu"):
            self.settings["trainer.accelerator"] = "cpu"
        if self.given.get("use_peft") or self.given.keys() & {"lora_r", "lora_alpha", "lora_target_modules"}:
            targets = self.given.get("lora_target_modules", "all-linear")
            targets = [targets] if isinstance(targets, str) and targets != "all-linear" else targets
            self.settings["model.policy.lora"] = {
                "rank": self.value("lora_r", int, 16),
                "alpha": self.value("lora_alpha", int, 32),
                "target_modules": list(targets) if isinstance(targets, list | tuple | set) else targets,
            }
        beta = self.value("beta", float, 0.0)
        self.settings["model.objective"] = {
            "class_path": "agro_lightning.objectives.Agro",
            "init_args": {"beta": beta},
        }
        if beta == 0:
            self.notes.append(
                "beta 0 is RLOO without a reference; 0.005 to 0.02 holds the policy near its start"
            )
        else:
            self.notes.append(
                "beta: here it is in units of reward a nat; TRL's is beside rewards over their spread"
            )
        if self.given.get("sync_ref_model"):
            self.settings["model.reference_reset_every"] = self.value("ref_model_sync_steps", int, 512)
            if self.value("ref_model_mixup_alpha", float, 0.6) != 1:
                self.notes.append("ref_model_mixup_alpha: the reference becomes the policy whole")

    def _data(self) -> None:
        self.settings["data.seed"] = self.settings["seed_everything"]
        self.settings["data.sources"] = [{"weight": 1.0, "name": "live"}]
        if "data.train.path" not in self.settings:
            self.notes.append(
                "data.train: the file names no prompts, so these are the quick start's; --train"
            )
        if "data.train.chat_template_options" in self.settings:
            self.settings["data.train.chat"] = True
        if named := self.given.get("reward_funcs") or self.given.get("reward_model_name_or_path"):
            weights = self.given.get("reward_weights")
            self.notes.append(
                f"data.rewards: TRL has {named}{f', weights {weights}' if weights else ''}; list them with "
                "class_path agro_lightning.rewards.PythonReward and function: module:name"
            )
        else:
            self.notes.append(
                "data.rewards: TRL's are in code; the default compares with the prompt's answer"
            )

    def _engine(self) -> None:
        kinds = {"use_transformers_continuous_batching", "use_transformers_paged"}
        if any(self.given.get(key) for key in kinds):
            self.settings["data.engine"] = {"class_path": "agro_lightning.rollout.ContinuousBatching"}
        if not self.given.get("use_vllm"):
            return
        if self.value("vllm_mode", str, "colocate") == "server":
            host, port = (
                self.value("vllm_server_host", str, "0.0.0.0"),
                self.value("vllm_server_port", int, 8000),
            )
            host = "localhost" if host == "0.0.0.0" else host
            url = self.value("vllm_server_base_url", str, f"http://{host}:{port}")
            options: dict[str, Any] = {"url": url, "weights_dir": "runs/vllm-weights"}
            self.notes.append(
                "data.engine: the server is started as docs/engines.md says; weights_dir is shared"
            )
        else:
            words = ["--gpu-memory-utilization", str(self.value("vllm_gpu_memory_utilization", float, 0.3))]
            if longest := self.value("vllm_max_model_length", int, None):
                words += ["--max-model-len", str(longest)]
            if (ranks := self.value("vllm_tensor_parallel_size", int, 1)) > 1:
                words += ["--tensor-parallel-size", str(ranks)]
            options = {"options": words}
        self.settings["data.engine"] = {
            "class_path": "agro_lightning.rollout.engines.vllm.VLLMEngine",
            "init_args": options,
        }

    def _times(self) -> None:
        """Validation and checkpoints."""
        evaluates = self.value("eval_strategy", str, "no") != "no"
        if self.validation is None:
            self.settings["data.validation"] = None
            if evaluates or "num_generations_eval" in self.given:
                self.notes.append("data.validation: the file names no validation prompts; --validation PATH")
        else:
            self.settings["data.validation.path"] = self.validation
            if split := self.given.get("dataset_test_split"):
                self.settings["data.validation.split"] = split
            every = int(self.value("eval_steps", float, 0) or 100)
            self.settings["trainer.val_check_interval"] = every * self.pieces
            samples = self.value("num_generations_eval", int, self.settings["data.group_size"])
            self.settings |= {"data.validation_samples": samples, "data.pass_at": [samples]}
        saves = self.value("save_strategy", str, "steps") != "no"
        self.settings["checkpoint_every"] = int(self.value("save_steps", float, 500)) if saves else 0
        if self.given.get("resume_from_checkpoint"):
            self.notes.append(
                "resume_from_checkpoint: --ckpt_path last; a checkpoint of TRL's cannot be gone on with"
            )

    def text(self, name: str) -> str:
        """The YAML, with comments on what was mapped, what to look at, and what has no counterpart."""
        lines = [f"# Made from {name}, a GRPOConfig of TRL: python -m agro_lightning from-trl {name}"]
        mapped = {
            key: DIRECT[key][0] if key in DIRECT else COMPUTED[key]
            for key in self.given
            if key not in REASONS
        }
        left = {key: REASONS[key] for key in self.given if key in REASONS}
        for title, items in (
            ("Mapped:", [f"{key} -> {ours}" for key, ours in mapped.items()]),
            ("To look at:", self.notes),
            ("Without a counterpart:", [f"{key}: {self.given[key]} ({why})" for key, why in left.items()]),
        ):
            if items:
                lines += [f"# {title}", *(f"#   {' '.join(str(item).split())}" for item in items)]
        tree: dict[str, Any] = {}
        for key, value in self.settings.items():
            *parents, last = key.split(".")
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = value
        if self.processes == 1 and "strategy" in tree["trainer"]:
            del tree["trainer"]["strategy"]
        elif "strategy" in tree["trainer"]:
            options = tree["trainer"]["strategy"]
            tree["trainer"]["strategy"] = {
                "class_path": "agro_lightning.training.strategy.Sharded",
                "init_args": options,
            }
        return "\n".join(lines) + "\n" + yaml.safe_dump(tree, sort_keys=False, width=110)
