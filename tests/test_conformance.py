"""Every first-party plug-in passes the conformance kit, as a stranger's has to."""

from __future__ import annotations

import json

import pytest
from stub_endpoint import StubEndpoint

from lightning_sft import Conversation, Message
from lightning_sft.plugin_kinds import KINDS
from lightning_sft.plugins import discover
from lightning_sft.testing import (
    AdapterTests,
    CallbackTests,
    EvaluatorTests,
    FilterTests,
    FormatTests,
    LossTests,
)
from lightning_sft_adapters.any_peft import Peft
from lightning_sft_adapters.freeze import Freeze
from lightning_sft_adapters.full import Full
from lightning_sft_adapters.lora import LoRA
from lightning_sft_adapters.qlora import QLoRA
from lightning_sft_callbacks.before_after import BeforeAfter
from lightning_sft_callbacks.behaviour import BiasProbe, FormatProbe, RefusalProbe
from lightning_sft_callbacks.drift import DriftProbe
from lightning_sft_callbacks.evaluating import EvaluateDuringFit
from lightning_sft_callbacks.forgetting import ForgettingProbe
from lightning_sft_callbacks.generations import SampleGenerations
from lightning_sft_callbacks.memorization import MemorizationProbe
from lightning_sft_callbacks.retention_stopping import RetentionStopping
from lightning_sft_evaluators.bbh import BBH
from lightning_sft_evaluators.generation_task import GenerationTask
from lightning_sft_evaluators.harness import LMEvalHarness
from lightning_sft_evaluators.hf_evaluate import HFEvaluate
from lightning_sft_evaluators.ifeval import IFEval
from lightning_sft_evaluators.judge import Judge
from lightning_sft_evaluators.mmlu import MMLU
from lightning_sft_evaluators.multiple_choice import MultipleChoice
from lightning_sft_evaluators.perplexity import Perplexity
from lightning_sft_evaluators.reference_metrics import ReferenceMetrics
from lightning_sft_filters.duplicates import Duplicates
from lightning_sft_filters.length import Length
from lightning_sft_filters.near_duplicates import NearDuplicates
from lightning_sft_filters.overlap import Overlap
from lightning_sft_filters.pattern import Pattern
from lightning_sft_filters.refusals import Refusals
from lightning_sft_filters.repetition import Repetition
from lightning_sft_formats.alpaca import Alpaca
from lightning_sft_formats.columns import Columns
from lightning_sft_formats.dolly import Dolly
from lightning_sft_formats.flan import Flan
from lightning_sft_formats.lima import Lima
from lightning_sft_formats.messages import Messages
from lightning_sft_formats.oasst import OASST
from lightning_sft_formats.prompt_completion import PromptCompletion
from lightning_sft_formats.raw_text import RawText
from lightning_sft_formats.segments import Segments
from lightning_sft_formats.self_instruct import SelfInstruct
from lightning_sft_formats.sharegpt import ShareGPT
from lightning_sft_losses.cross_entropy import CrossEntropy

WEATHER = {"function": {"name": "weather", "arguments": '{"city": "Bath"}'}, "id": "1", "type": "function"}


class TestAlpaca(FormatTests):
    plugin = Alpaca
    rows = (
        {"instruction": "Say hello.", "input": "", "output": "Hello."},
        {
            "instruction": "Add.",
            "input": "1 2",
            "output": "3",
            "system": "Be short.",
            "history": [["Hi", "Ho"]],
        },
    )
    bad_rows = (
        {"instruction": "Say hello.", "output": ""},
        {"instruction": "Say", "output": 3},
        {"output": "x"},
    )


class TestColumns(FormatTests):
    plugin = Columns
    options = {"assistant": "{{ answer }}", "user": "{{ question }}?", "task": "{{ task }}"}
    rows = ({"question": "Why", "answer": "So.", "task": "qa"},)
    bad_rows = ({"question": "Why", "answer": "", "task": "qa"}, {"answer": "So.", "task": "qa"})


class TestDolly(FormatTests):
    plugin = Dolly
    rows = ({"instruction": "When?", "context": "It was 1984.", "response": "In 1984.", "category": "qa"},)
    bad_rows = ({"instruction": "When?", "context": "", "response": ""},)


class TestFlan(FormatTests):
    plugin = Flan
    options = {"templates": {"nli": [{"inputs": "{{ premise }}?", "targets": "{{ label }}"}]}}
    rows = (
        {"premise": "It rains", "label": "yes", "task_name": "nli"},
        {"inputs": "1 + 1", "targets": "2", "task_name": "sums"},
    )
    bad_rows = ({"inputs": "1 + 1", "targets": ""}, {"label": "yes", "task_name": "nli"})


class TestLima(FormatTests):
    plugin = Lima
    rows = ({"conversations": ["Hi", "Ho", "Why?", "So."], "source": "forum"},)
    bad_rows = ({"conversations": []}, {"conversations": "Hi"})


class TestMessages(FormatTests):
    plugin = Messages
    rows = (
        {
            "messages": [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Ho", "weight": 0.5},
            ]
        },
        {
            "messages": [
                {"role": "user", "content": "Rain?"},
                {"role": "assistant", "content": None, "tool_calls": [WEATHER]},
                {"role": "tool", "content": "wet", "tool_call_id": "1"},
                {"role": "assistant", "content": "Yes.", "reasoning_content": "It says wet."},
            ],
            "tools": [{"type": "function", "function": {"name": "weather"}}],
        },
    )
    bad_rows = ({"messages": [{"role": "wizard", "content": "Hi"}]}, {"messages": []})


class TestOASST(FormatTests):
    plugin = OASST
    rows = (
        {"message_id": "p", "parent_id": None, "text": "Why?", "role": "prompter"},
        {"message_id": "a", "parent_id": "p", "text": "So.", "role": "assistant"},
    )
    bad_rows = (rows[1], rows[0] | {"message_id": None})


class TestPromptCompletion(FormatTests):
    plugin = PromptCompletion
    rows = (
        {"prompt": "1 + 1 =", "completion": " 2"},
        {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
    )
    bad_rows = ({"prompt": "1 + 1 =", "completion": ""}, {"prompt": 1, "completion": "2"})


class TestRawText(FormatTests):
    plugin = RawText
    rows = ({"text": "Once upon a time"},)
    bad_rows = ({"text": 3}, {"text": None})


class TestSegments(FormatTests):
    plugin = Segments
    rows = ({"segments": [{"text": "Q: why? ", "label": False}, {"text": "A: so.", "label": True}]},)
    bad_rows = ({"segments": "Q"}, {"segments": [{"label": True}]})


class TestSelfInstruct(FormatTests):
    plugin = SelfInstruct
    rows = ({"instruction": "Add.", "instances": [{"input": "1 2", "output": "3"}], "name": "sums"},)
    bad_rows = (
        {"instruction": "Add.", "instances": []},
        {"instruction": "Add.", "instances": [{"input": "1"}]},
    )


class TestShareGPT(FormatTests):
    plugin = ShareGPT
    rows = ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},)
    bad_rows = ({"conversations": [{"from": "wizard", "value": "Hi"}]}, {"conversations": []})


def talk(asked: str, answered: str) -> Conversation:
    return Conversation((Message("user", asked), Message("assistant", answered)))


SENTENCE = "the quick brown fox jumps over the lazy dog near the quiet river"


class TestDuplicates(FilterTests):
    plugin = Duplicates
    kept = (talk("Why?", "So."), talk("Why?", "So so."))
    dropped = (talk("why? ", "SO."),)


class TestDuplicatePrompts(FilterTests):
    plugin = Duplicates
    options = {"part": "prompt", "normalize": False}
    kept = (talk("Why?", "So."), talk("why?", "So."))
    dropped = (talk("Why?", "Because."),)


class TestLength(FilterTests):
    plugin = Length
    options = {"least": 2, "most": 3}
    kept = (talk("Why?", "So so."), talk("Why?", "a b c"))
    dropped = (talk("Why?", "So."), talk("Why?", "a b c d"))


class TestNearDuplicates(FilterTests):
    plugin = NearDuplicates
    options = {"threshold": 0.6}
    kept = (talk("Say it.", SENTENCE), talk("Say it.", "something else entirely, if you please"))
    dropped = (talk("Say it.", f"{SENTENCE} bank"),)


class TestOverlap(FilterTests):
    plugin = Overlap
    kept = (talk("Say it.", "the quick brown fox"),)
    dropped = (talk("Say it.", f"Well: {SENTENCE.upper()}!"),)

    @pytest.fixture(autouse=True)
    def write_held_out(self, tmp_path):
        (tmp_path / "held_out.txt").write_text(SENTENCE)
        self.options = {"held_out": [str(tmp_path / "held_out.txt")]}


class TestOverlapWithEvaluators(FilterTests):
    plugin = Overlap
    facts = {"path": "tiny:facts", "prompt": "Question: {{ question }} Answer:", "answer": "answer"}
    options = {
        "evaluators": [
            {"class_path": "MultipleChoice", "init_args": {**facts, "compared": "{{ question }}"}},
            {"class_path": "Perplexity", "init_args": {"path": "tiny:general"}},
        ],
        "least_words": 4,
    }
    kept = (talk("Where do you live?", "In Question: Answer:"),)
    dropped = (talk("Say: where does Anna live?", "Elmton."),)


class TestPattern(FilterTests):
    plugin = Pattern
    options = {"drop": ["TODO"], "require": ["[.!]$"], "roles": ["assistant"]}
    kept = (talk("TODO", "So."),)
    dropped = (talk("Why?", "TODO."), talk("Why?", "So"))


class TestRefusals(FilterTests):
    plugin = Refusals
    kept = (talk("As an AI language model?", "No, as an aim."),)
    dropped = (talk("Why?", "Well, as an AI\nlanguage model I must decline."),)


class TestRepetition(FilterTests):
    plugin = Repetition
    options = {"min_words": 10, "top_ngrams": {2: 0.3}}
    kept = (talk("Say it.", SENTENCE), talk("Count.", "one one one one"))
    dropped = (talk("Say it.", f"{SENTENCE}\n" * 3), talk("Count.", "one " * 10))


class TestFull(AdapterTests):
    plugin = Full


class TestLoRA(AdapterTests):
    plugin = LoRA


class TestLoRAOfEverything(AdapterTests):
    plugin = LoRA
    options = {
        "r": 2,
        "rslora": True,
        "dora": True,
        "modules_to_save": ["lm_head"],
        "target_modules": ["q_proj"],
    }


class TestCrossEntropy(LossTests):
    plugin = CrossEntropy


class TestCrossEntropySmoothedWithZLoss(LossTests):
    plugin = CrossEntropy
    options = {"label_smoothing": 0.1, "z_loss": 0.01}


class TestCrossEntropySmoothed(LossTests):
    plugin = CrossEntropy
    options = {"label_smoothing": 0.1}


class TestFreeze(AdapterTests):
    plugin = Freeze


class TestPeft(AdapterTests):
    plugin = Peft
    options = {"config": {"class_path": "peft.IA3Config"}}


class TestQLoRA(AdapterTests):
    plugin = QLoRA
    options = {"r": 4}


FILES = {
    "instructions": {"instruction": "Say yes.", "output": "yes"},
    "general_text": {"text": "The sky is blue."},
    "questions": {"question": "The sky?", "choices": ["blue", "red"], "answer": 0},
    "pairs": {"first": "He is tall.", "second": "She is tall."},
    "path": {"prompt": "Give JSON.", "format": "json"},
    "harmful": {"prompt": "Harm."},
    "harmless": {"prompt": "Help."},
}
"""A row for the data file of each option that takes one."""


class WithFiles(CallbackTests):
    """Sets the options that are named in `files` to data files."""

    files: tuple[str, ...] = ()

    @pytest.fixture(autouse=True)
    def write_files(self, tmp_path):
        for name in self.files:
            (tmp_path / f"{name}.jsonl").write_text(json.dumps(FILES[name]))
        self.options = {**self.options, **{name: str(tmp_path / f"{name}.jsonl") for name in self.files}}


class TestBeforeAfter(WithFiles):
    plugin = BeforeAfter
    options = {"max_new_tokens": 4}
    files = ("instructions", "general_text", "questions")


class TestBiasProbe(WithFiles):
    plugin = BiasProbe
    files = ("pairs",)


class TestFormatProbe(WithFiles):
    plugin = FormatProbe
    options = {"max_new_tokens": 4}
    files = ("path",)


class TestRefusalProbe(WithFiles):
    plugin = RefusalProbe
    options = {"max_new_tokens": 4}
    files = ("harmful", "harmless")


class TestDriftProbe(CallbackTests):
    plugin = DriftProbe


class TestMemorizationProbe(CallbackTests):
    plugin = MemorizationProbe


class TestSampleGenerations(CallbackTests):
    plugin = SampleGenerations
    options = {"prompts": ["Say yes."], "max_new_tokens": 4}


class TestForgettingProbe(CallbackTests):
    plugin = ForgettingProbe


class TestRetentionStopping(CallbackTests):
    plugin = RetentionStopping

    def beside(self):
        return [ForgettingProbe()]


class TestEvaluateDuringFit(CallbackTests):
    plugin = EvaluateDuringFit
    options = {
        "evaluators": [{"class_path": "Perplexity", "init_args": {"path": "tiny:general"}}],
        "items": 2,
    }


class TestMMLU(EvaluatorTests):
    plugin = MMLU

    @pytest.fixture(autouse=True)
    def write_questions(self, tmp_path):
        rows = [
            {
                "question": f"The {noun}?",
                "choices": ["blue", "red", "green", "no"],
                "answer": n,
                "subject": "hue",
            }
            for n, noun in enumerate(["sky", "rose", "grass"])
        ]
        (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.options = {"path": str(tmp_path / "test.jsonl"), "shots": 0, "style": "continuation"}


class TestBBH(EvaluatorTests):
    plugin = BBH

    @pytest.fixture(autouse=True)
    def write_task(self, tmp_path):
        (tmp_path / "cot-prompts").mkdir()
        (tmp_path / "tasks").mkdir()
        example = "Q: Left?\nA: Let's think step by step. It is. So the answer is Yes."
        (tmp_path / "cot-prompts/navigate.txt").write_text(f"canary\n-----\nFind the way.\n\n{example}")
        rows = [{"input": f"{way}?", "target": "Yes"} for way in ("Right", "Up")]
        (tmp_path / "tasks/navigate.json").write_text(json.dumps({"examples": rows}))
        self.options = {"path": str(tmp_path), "tasks": ["navigate"], "shots": 1, "max_new_tokens": 4}


class TestPerplexity(EvaluatorTests):
    plugin = Perplexity
    options = {"path": "tiny:general", "limit": 3}


METRIC = """
import datasets
import evaluate


class Same(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        return {"same": sum(p == r for p, r in zip(predictions, references)) / len(predictions)}
"""


class TestReferenceMetrics(EvaluatorTests):
    plugin = ReferenceMetrics
    options = {"path": "tiny:held_out", "max_new_tokens": 8, "valid_as": "json", "limit": 20}


class TestLMEvalHarness(EvaluatorTests):
    plugin = LMEvalHarness

    @pytest.fixture(autouse=True)
    def write_task(self, tmp_path):
        pytest.importorskip(
            "lm_eval", reason="lm-evaluation-harness isn't installed (lightning-sft[harness])"
        )
        rows = [{"question": f"say {n}", "answer": n % 2} for n in range(4)]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        task = {
            "task": "said", "dataset_path": "json", "output_type": "multiple_choice", "test_split": "test",
            "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}}, "doc_to_text": "{{question}}",
            "doc_to_choice": ["yes", "no"], "doc_to_target": "answer",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }  # fmt: skip
        (tmp_path / "said.yaml").write_text(json.dumps(task))
        self.options = {"tasks": ["said"], "include_path": str(tmp_path), "builtin": False}


class TestIFEval(EvaluatorTests):
    plugin = IFEval

    @pytest.fixture(autouse=True)
    def write_prompts(self, tmp_path):
        rows = [
            {"prompt": "Say it.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
            {"prompt": "Shout.", "instruction_id_list": ["change_case:english_capital"], "kwargs": [{}]},
        ]
        path = tmp_path / "prompts.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.options = {"path": str(path), "max_new_tokens": 8}


class TestHFEvaluate(EvaluatorTests):
    plugin = HFEvaluate

    @pytest.fixture(autouse=True)
    def write_metric(self, tmp_path, monkeypatch):
        pytest.importorskip("evaluate")
        monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
        (tmp_path / "same.py").write_text(METRIC)
        self.options = {
            "path": "tiny:held_out",
            "metric": str(tmp_path / "same.py"),
            "trust_remote_code": True,
        }
        self.options |= {"max_new_tokens": 8, "limit": 4}


class TestJudge(EvaluatorTests):
    plugin = Judge

    @pytest.fixture(autouse=True)
    def serve_a_judge(self, tmp_path, monkeypatch):
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        path = tmp_path / "questions.jsonl"
        path.write_text("".join(json.dumps({"instruction": f"say {n}"}) + "\n" for n in range(3)))
        with StubEndpoint(lambda prompt: f"Rating: [[{1 + len(prompt) % 10}]]").serving() as stub:
            endpoint = {"base_url": stub.url, "model": "m", "api_key_env": None, "cache": None}
            self.options = {
                "questions": str(path),
                "style": "single",
                "max_new_tokens": 6,
                "endpoint": endpoint,
            }
            yield


class TestMultipleChoice(EvaluatorTests):
    plugin = MultipleChoice
    options = {
        "path": "tiny:facts",
        "prompt": "Question: {{ question }} Answer:",
        "answer": "answer",
        "metrics": ["acc", "acc_norm", "acc_bytes", "mc2"],
        "shots": 2,
        "shots_seed": 3,
    }


class TestMultipleChoiceInTheContext(EvaluatorTests):
    plugin = MultipleChoice
    options = {
        "path": "tiny:facts",
        "prompt": "Is it {{ choice }}?",
        "continuation": "{{ question }}",
        "answer": "answer",
        "chat": True,
        "limit": 3,
    }


class TestGenerationTask(EvaluatorTests):
    plugin = GenerationTask
    options = {
        "path": "tiny:held_out",
        "prompt": "{{ instruction }} {{ input }}",
        "answer": "output",
        "task": "{{ task }}",
        "extract": {"last": {"pattern": "(\\w+)", "place": -1}},
        "ignore": ["[.]"],
        "stop": ["\n"],
        "max_new_tokens": 8,
    }


def test_every_first_party_plugin_is_here() -> None:
    tested = {
        each.plugin for each in globals().values() if isinstance(each, type) and hasattr(each, "plugin")
    }
    ours = [plugin for plugin in discover() if plugin.distribution == "lightning-sft"]
    assert {plugin.load() for plugin in ours if KINDS[plugin.kind].tests} == tested
