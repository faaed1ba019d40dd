"""Paths in a run's record lead to the same files from anywhere; nothing else is changed."""

from __future__ import annotations

from jsonargparse import Namespace

from lightning_sft.recorded_paths import absolute


def test_what_is_here_becomes_absolute_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("base", "tiny", "plain", "q_proj", "org", "runs"):
        (tmp_path / name).mkdir()
    (tmp_path / "org" / "model").mkdir()
    for name in ("a.jsonl", "my.jinja"):
        (tmp_path / name).touch()
    adapter = {
        "class_path": "LoRA",
        "init_args": {"target_modules": ["q_proj"], "beside": {"facts": "org/model"}},
    }
    given = Namespace(
        model=Namespace(base="base", chat_template="plain", tokenizer=None, adapter=adapter),
        data=Namespace(
            train=["a.jsonl", Namespace(path="plain", weight=2.0)], val="tiny:held_out", test="none.jsonl"
        ),
        trainer=Namespace(callbacks=[{"init_args": {"questions": "./a.jsonl", "delimiter": "."}}]),
    )
    found, here = absolute(given), str(tmp_path)
    assert found.model.base == f"{here}/base"
    assert found.model.chat_template == "plain"
    assert found.model.adapter["init_args"] == {
        "target_modules": ["q_proj"],
        "beside": {"facts": f"{here}/org/model"},
    }
    assert found.data == Namespace(
        train=[f"{here}/a.jsonl", Namespace(path=f"{here}/plain", weight=2.0)],
        val="tiny:held_out",
        test="none.jsonl",
    )
    assert found.trainer.callbacks == [{"init_args": {"questions": f"{here}/a.jsonl", "delimiter": "."}}]
    assert given.model.base == "base"
    assert absolute({"model": {"base": "tiny", "chat_template": "my.jinja"}}) == {
        "model": {"base": "tiny", "chat_template": f"{here}/my.jinja"}
    }
    assert absolute(found) == found
