"""Evaluation side by side: lightning-sft and lm-evaluation-harness on the same items, on one CPU thread.

    pip install lm_eval==0.4.13
    python benchmarks/evaluation_speed.py --mmlu MMLU --bbh BIG-Bench-Hard

Every side is a process of its own, warmed up first, and evaluates a model with random weights in float32; seconds are
CPU seconds of one thread. A side's log-likelihoods and texts are kept: the report says how many verdicts differ, which
must be none, and by how much log-likelihoods do. `--mmlu` and `--bbh` are the folders that the evaluators take; the
tokenizer is made of MMLU's text, and has one token for each letter.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
SUBJECTS = "high_school_macroeconomics,professional_psychology,sociology"
TASKS = "boolean_expressions,date_understanding,navigate"
MODELS = {
    "1M": (2048, {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4}),
    "50M": (32_000, {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12}),
    "50M untied": (
        32_000,
        {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6, "tie_word_embeddings": False},
    ),
}
"""Vocabulary and body of each: 1.05, 54.9 and 52.0 million parameters; embedding and head are tied but in the last."""
JOBS = {
    "MMLU 5-shot, 1M": ("1M", "mmlu", {"shots": 5}),
    "MMLU 0-shot, 1M": ("1M", "mmlu", {"shots": 0}),
    "MMLU 5-shot, 50M": ("50M", "mmlu", {"shots": 5}),
    "MMLU 0-shot, 50M": ("50M", "mmlu", {"shots": 0}),
    "MMLU 5-shot, 50M untied": ("50M untied", "mmlu", {"shots": 5}),
    "MMLU 0-shot, 50M untied": ("50M untied", "mmlu", {"shots": 0}),
    "BBH CoT prefill, 1M": ("1M", "bbh", {"new": 1}),
    "BBH CoT generation, 1M": ("1M", "bbh", {"new": 96}),
    "BBH CoT prefill, 50M": ("50M", "bbh", {"new": 1}),
    "BBH CoT generation, 50M": ("50M", "bbh", {"new": 32}),
    "full MMLU's requests": ("50M", "requests", {"shots": 5}),
}


def main() -> None:
    """Run every job on both sides, print the table and, as the last line, JSON."""
    options = parse()
    if options.side:
        return side(options)
    with tempfile.TemporaryDirectory() as folder:
        options.folder = folder
        report = {}
        for name in [job for job in JOBS if options.only in job]:
            make_model(Path(folder), JOBS[name][0], options.mmlu)
            found = {each: start(each, name, options) for each in ("harness", "lightning_sft")}
            report[name] = compare(found["harness"], found["lightning_sft"])
            print(row(name, report[name]), flush=True)
    told = {
        "jobs": report,
        "machine": platform.processor() or platform.machine(),
        "python": platform.python_version(),
    }
    print(json.dumps(told))
    if options.out:
        Path(options.out).write_text(json.dumps(told, indent=1) + "\n")
    return None


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mmlu", required=True, help="a folder with dev/ and test/")
    parser.add_argument("--bbh", required=True, help="a folder with cot-prompts/ and bbh/ or tasks/")
    parser.add_argument("--items", type=int, default=100, help="questions of each of three subjects")
    parser.add_argument("--bbh-items", type=int, default=20, help="questions of each of three tasks")
    parser.add_argument(
        "--request-items", type=int, help="questions of each of MMLU's subjects; all by default"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="the harness's")
    parser.add_argument("--only", default="", help="only jobs with this in their name")
    parser.add_argument("--out", help="also write the JSON here")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser.parse_args()


def make_model(folder: Path, name: str, mmlu: str) -> None:
    """A Llama with random weights and a byte-level BPE tokenizer of MMLU's text, saved as `folder/name`."""
    if (folder / name).exists():
        return
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    vocabulary, body = MODELS[name]
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["</s>", "<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [path.read_text() for path in sorted(Path(mmlu).rglob("*.csv"))]
    raw.train_from_iterator([*texts, *["Answer: A", "Answer: B", "Answer: C", "Answer: D"] * 1000], trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    assert all(len(tokenizer.encode(f" {letter}")) == 1 for letter in "ABCD")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=4096,
        bos_token_id=1, eos_token_id=0, **{"tie_word_embeddings": True, **body},
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.06)  # apart from chance, so that verdicts mean something
    model.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / name)


def start(which: str, job: str, options: argparse.Namespace) -> dict[str, Any]:
    """One side in a process of its own."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": f"{options.folder}/datasets",
    }  # fmt: skip
    command = [
        sys.executable,
        str(HERE),
        *sys.argv[1:],
        "--side",
        which,
        "--job",
        job,
        "--folder",
        options.folder,
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{which}, {job}:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
    path = Path(options.folder) / "figures.json"
    return json.loads(path.read_text())


def side(options: argparse.Namespace) -> None:
    """What a side's process does: warm up, evaluate, write the figures."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    name, kind, given = JOBS[options.job]
    folder = Path(options.folder) / name
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    run = {"harness": Harness, "lightning_sft": Ours}[options.side](options, model, tokenizer, given)
    work = getattr(run, kind)
    work(2)
    before, begun = resident(), time.process_time()
    limits = {"mmlu": options.items, "bbh": options.bbh_items, "requests": options.request_items}
    answers = work(limits[kind])
    seconds = time.process_time() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    figures = {"seconds": seconds, "peak_mb": peak, "before_mb": before, "answers": answers}
    (Path(options.folder) / "figures.json").write_text(json.dumps(figures))


class Ours:
    """lightning-sft's side."""

    def __init__(
        self, options: argparse.Namespace, model: Any, tokenizer: Any, given: dict[str, int]
    ) -> None:
        from lightning_sft import Scorer

        self.options, self.given = options, given
        self.scorer = Scorer(model, tokenizer)

    def mmlu(self, limit: int) -> list[list[float]]:
        """Log-likelihoods of each question's letters."""
        from lightning_sft_evaluators.mmlu import MMLU

        mmlu = MMLU(self.options.mmlu, self.given["shots"], subjects=SUBJECTS.split(","), limit=limit)
        return [list(record.scores) for record in mmlu.score(self.scorer.answer(mmlu.requests())).records]

    def bbh(self, limit: int) -> list[str]:
        """The texts."""
        from lightning_sft_evaluators.bbh import BBH

        bbh = BBH(self.options.bbh, tasks=TASKS.split(","), limit=limit, max_new_tokens=self.given["new"])
        records = bbh.score(self.scorer.answer(bbh.requests())).records
        return [record.generated or "" for record in records]

    def requests(self, limit: int | None) -> list[int]:
        """How many requests there are, all in token ids."""
        from lightning_sft_evaluators.mmlu import MMLU

        items = MMLU(self.options.mmlu, self.given["shots"], limit=limit).requests()
        asked = [request for item in items for request in item.requests]
        return [len(self.scorer.encoder.log_likelihoods(asked))]


class Harness:
    """lm-evaluation-harness's side: its own MMLU and BBH tasks, with the files as their data."""

    def __init__(
        self, options: argparse.Namespace, model: Any, tokenizer: Any, given: dict[str, int]
    ) -> None:
        import logging

        from lm_eval.models.huggingface import HFLM

        logging.disable(logging.WARNING)
        self.options, self.given = options, given
        self.model = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=options.batch_size)
        self.tasks = Path(options.folder) / "tasks"
        self.tasks.mkdir(exist_ok=True)

    def mmlu(self, limit: int) -> list[list[float]]:
        """Log-likelihoods of each question's letters."""
        names = [self._mmlu_task(subject) for subject in SUBJECTS.split(",")]
        samples = self._evaluate(names, limit, self.given["shots"])
        return [[pair[0] for pair in each["filtered_resps"]] for name in names for each in samples[name]]

    def bbh(self, limit: int) -> list[str]:
        """The texts."""
        names = [self._bbh_task(task) for task in TASKS.split(",")]
        samples = self._evaluate(names, limit, None)
        return [each["resps"][0][0] for name in names for each in samples[name]]

    def requests(self, limit: int | None) -> list[int]:
        """How many requests there are, all in token ids."""
        from lm_eval.tasks import TaskManager

        subjects = sorted(
            path.stem.removesuffix("_test") for path in Path(self.options.mmlu, "test").glob("*.csv")
        )
        names = [self._mmlu_task(subject) for subject in subjects]
        loaded = TaskManager(include_path=str(self.tasks), include_defaults=False).load_task_or_group(names)
        self.model._loglikelihood_tokens = lambda encoded, **_: encoded
        count = 0
        for task in loaded.values():
            task.set_config(key="num_fewshot", value=self.given["shots"])
            task.build_all_requests(limit=limit)
            count += len(self.model.loglikelihood(task.instances, disable_tqdm=True))
        return [count]

    def _evaluate(self, names: list[str], limit: int, shots: int | None) -> dict[str, list[dict[str, Any]]]:
        import lm_eval
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_path=str(self.tasks), include_defaults=False)
        kwargs = {"max_gen_toks": self.given["new"]} if "new" in self.given else None
        found = lm_eval.simple_evaluate(
            model=self.model, tasks=names, task_manager=manager, num_fewshot=shots, limit=limit,
            bootstrap_iters=0, gen_kwargs=kwargs, log_samples=True, verbosity="ERROR",
        )  # fmt: skip
        for samples in found["samples"].values():
            samples.sort(key=lambda sample: sample["doc_id"])
        return found["samples"]

    def _mmlu_task(self, subject: str) -> str:
        """The harness's own task on the files' questions."""
        import csv

        import lm_eval
        import yaml

        name = f"mine_{subject}"
        if not (self.tasks / f"{name}.yaml").exists():
            template = Path(lm_eval.__file__).parent / "tasks/mmlu/default/_default_template_yaml"
            task = yaml.safe_load(template.read_text())
            for split in ("dev", "test"):
                with Path(self.options.mmlu, split, f"{subject}_{split}.csv").open(newline="") as file:
                    cells = list(csv.reader(file))[1:]
                rows = [{"question": c[0], "choices": c[1:5], "answer": int(c[5])} for c in cells]
                (self.tasks / f"{name}_{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
            files = {split: str(self.tasks / f"{name}_{split}.jsonl") for split in ("dev", "test")}
            about = subject.replace("_", " ")
            task |= {
                "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": files},
                "description": f"The following are multiple choice questions (with answers) about {about}.\n\n",
            }  # fmt: skip
            (self.tasks / f"{name}.yaml").write_text(yaml.safe_dump(task))
        return name

    def _bbh_task(self, task: str) -> str:
        import lm_eval
        import yaml

        name = f"mine_{task}"
        if not (self.tasks / f"{name}.yaml").exists():
            base = Path(lm_eval.__file__).parent / "tasks/bbh/cot_fewshot"
            config = yaml.safe_load((base / "_cot_fewshot_template_yaml").read_text())
            config |= yaml.safe_load((base / f"{task}.yaml").read_text())
            config.pop("include")
            folder = Path(self.options.bbh)
            folder = folder / "bbh" if (folder / "bbh").is_dir() else folder / "tasks"
            examples = json.loads((folder / f"{task}.json").read_text())["examples"]
            (self.tasks / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in examples))
            files = {"test": str(self.tasks / f"{name}.jsonl")}
            config |= {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": files}}
            config.pop("dataset_name", None)
            (self.tasks / f"{name}.yaml").write_text(yaml.safe_dump(config))
        return name


def compare(peer: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """The ratio, and how the answers differ."""
    told: dict[str, Any] = {
        "ratio": peer["seconds"] / ours["seconds"],
        "harness_seconds": peer["seconds"],
        "seconds": ours["seconds"],
        "harness_peak_mb": peer["peak_mb"],
        "peak_mb": ours["peak_mb"],
        "answers": len(ours["answers"]),
    }
    if isinstance(ours["answers"][0], list):
        pairs = list(zip(peer["answers"], ours["answers"], strict=True))
        told["flips"] = sum(a.index(max(a)) != b.index(max(b)) for a, b in pairs)
        told["largest_difference"] = max(abs(x - y) for a, b in pairs for x, y in zip(a, b, strict=True))
    else:
        told["flips"] = sum(a != b for a, b in zip(peer["answers"], ours["answers"], strict=True))
    return told


def row(name: str, told: dict[str, Any]) -> str:
    """One line of the table."""
    return (
        f"{name:26} {told['ratio']:5.2f}x  {told['harness_seconds']:7.1f} s → {told['seconds']:6.1f} s  "
        f"peak {told['harness_peak_mb']:5.0f} → {told['peak_mb']:5.0f} MB  "
        f"{told['flips']} of {told['answers']} differ, |Δ| ≤ {told.get('largest_difference', 0.0):.1e}"
    )


def resident() -> float:
    """Resident memory in MB."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    main()
