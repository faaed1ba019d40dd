"""Slow tokenizers, which tell no offsets, give the fast ones' masks, or are refused with the row."""

import json

import pytest
import transformers
from chat_families import CHATML, IM, META, build_tokenizer, conversation, law, trained_turns
from hypothesis import example, given, settings
from hypothesis import strategies as st
from lightning.pytorch import Trainer

from lightning_sft import Conversation, Message, Renderer, Segments, SFTDataModule, SFTError, SFTModule
from lightning_sft.rendering.slow_offsets import slow_offsets
from lightning_sft_adapters.lora import LoRA


class Slow(transformers.PythonBackend):
    """A fast tokenizer's tokens without its offsets."""

    def __init__(self, fast, **options) -> None:
        self.fast = fast
        added = fast.added_tokens_decoder
        super().__init__(
            eos_token=fast.eos_token, pad_token=fast.pad_token, added_tokens_decoder=added, **options
        )
        self.chat_template = fast.chat_template

    @property
    def vocab_size(self) -> int:
        return self.fast.vocab_size

    def get_vocab(self) -> dict[str, int]:
        return self.fast.get_vocab()

    def _tokenize(self, text: str, **options) -> list[str]:
        return self.fast.tokenize(text)

    def _convert_token_to_id(self, token: str) -> int:
        return self.fast.convert_tokens_to_ids(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self.fast.convert_ids_to_tokens(index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return self.fast.decode(self.fast.convert_tokens_to_ids(tokens))


def fast(kind: str):
    tokenizer = build_tokenizer(kind, IM)
    tokenizer.chat_template = CHATML
    return tokenizer


TEXT = st.text("ab <>|\n ä€😀\ufffd1é", max_size=12)


@settings(max_examples=150, deadline=None)
@given(texts=st.lists(st.tuples(TEXT, st.sampled_from([0.0, 0.5, 1.0])), min_size=2, max_size=4))
@example(texts=[("ä€", 0.0), ("😀", 1.0)])
def test_the_mask_is_the_fast_tokenizers(texts):
    """Whatever is where in the text: the weights of a byte-level tokenizer with whole offsets."""
    tokenizer = fast("bytes")
    slow = Slow(tokenizer)
    text = "".join(text for text, _ in texts)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    theirs = Renderer(tokenizer)._encoder._tokens.whole(
        text, add_special_tokens=False, return_offsets_mapping=True
    )["offset_mapping"]
    assert slow_offsets(slow, ids, text) == theirs
    segments = Segments((*texts, ("x", 1.0)), META)
    one, other = Renderer(tokenizer).render(segments), Renderer(slow).render(segments)
    assert one.input_ids.tolist() == other.input_ids.tolist()
    assert one.weights.tolist() == other.weights.tolist()


TALK = conversation(
    ("system", "Sei nett – ä."),
    ("user", "hi  there\n"),
    ("assistant", " one "),
    ("user", "and?"),
    ("assistant", "zwö 😀"),
)


@pytest.mark.parametrize("kind", ["bytes", "trimmed"])
def test_conversations_have_the_fast_tokenizers_mask(kind):
    tokenizer = fast(kind)
    one, other = Renderer(tokenizer).render(TALK), Renderer(Slow(tokenizer)).render(TALK)
    assert one.input_ids.tolist() == other.input_ids.tolist()
    assert one.weights.tolist() == other.weights.tolist()


def byt5() -> transformers.ByT5Tokenizer:
    """A slow tokenizer that transformers ships: bytes."""
    tokenizer = transformers.ByT5Tokenizer(extra_ids=0)
    tokenizer.add_tokens(list(IM), special_tokens=True)
    tokenizer.chat_template = CHATML
    return tokenizer


def test_a_slow_tokenizer_of_transformers_follows_the_law():
    tokenizer = byt5()
    assert not tokenizer.is_fast
    made = Renderer(tokenizer)
    assert trained_turns(tokenizer, made.render(TALK)) == list(law(tokenizer, TALK, CHATML, "<|im_end|>"))


def test_a_run_with_a_slow_tokenizer(tmp_path):
    byt5().save_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert not tokenizer.is_fast
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    rows = [{"instruction": f"sag {n}", "output": f"{n} Öre"} for n in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    module = SFTModule(base=str(tmp_path), adapter=LoRA(r=2))
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False,
                      enable_model_summary=False, max_steps=1)  # fmt: skip
    trainer.fit(module, SFTDataModule(train=str(tmp_path / "rows.jsonl"), batch_size=4))
    module.export(tmp_path / "model")
    assert trainer.global_step == 1
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "model").chat_template == CHATML


class Lowering(Slow):
    """One that changes its texts."""

    def _tokenize(self, text: str, **options) -> list[str]:
        return super()._tokenize(text.lower())


class Gluing(Slow):
    """One that loses newlines."""

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return super().convert_tokens_to_string(tokens).replace("\n", " ")


class Dropping(Slow):
    """One that leaves out the last word."""

    def _tokenize(self, text: str, **options) -> list[str]:
        return super()._tokenize(text)[:-1] if "bye" in text else super()._tokenize(text)


@pytest.mark.parametrize("kind", [Lowering, Gluing, Dropping])
def test_a_text_that_does_not_decode_to_itself_is_refused(kind):
    talk = Conversation((Message("user", "Hi"), Message("assistant", "so\nbye")), (), META)
    with pytest.raises(SFTError) as error:
        Renderer(kind(fast("bytes"))).render(talk)
    assert str(error.value).startswith(f"rows.json, row 7: {kind.__name__} is a slow tokenizer")
    assert "tokenizer.json" in str(error.value)
