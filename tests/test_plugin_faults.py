"""A plug-in that fails is named, with its distribution and version, wherever it fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from stranger import install, install_broken, install_class, install_format

from lightning_sft.__main__ import main

CALLBACK = """
from lightning.pytorch import Callback


class Odd(Callback):
    def __init__(self, limit: int = 1) -> None:
        if limit < 1:
            raise {error}("limit is below 1")

    def on_train_batch_end(self, trainer, *args):
        deeper(trainer)


def deeper(trainer):
    raise RuntimeError("in the middle")
"""

LOSS = """
from lightning_sft import Loss


class Odd(Loss):
    def per_token(self, batch):
        return batch.logits.no_such_thing
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder with `rows.jsonl` and `my.yaml`, and a folder for strangers on `sys.path`."""
    rows = [{"instruction": f"say {n}", "output": f"hello {n}"} for n in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "model": {"base": "tiny", "preflight": False},
        "data": {"train": "rows.jsonl", "batch_size": 2},
        "trainer": {"max_steps": 1, "accelerator": "cpu"},
    }
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(config))
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(folder)
    yield folder
    for name in [
        name for name, module in sys.modules.items() if str(folder) in str(getattr(module, "__file__", ""))
    ]:
        del sys.modules[name]


def fit(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    """The status, and what is on stderr from `error:` on."""
    status = main(["fit", "--config", "my.yaml", *argv])
    return status, capsys.readouterr().err.partition("error: ")[2]


def test_one_that_fails_in_a_run_is_named_in_one_line_above_its_own_traceback(
    site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install_class(site, "callbacks", CALLBACK.format(error="ValueError"))
    status, err = fit(capsys, "--trainer.callbacks=Odd")
    assert status == 1
    told = err.splitlines()
    assert told[0] == "RuntimeError in the callback Odd (odd-plugins 2.5): in the middle"
    assert told[1].startswith("Traceback")
    files = [line for line in told if line.startswith("  File ")]
    assert len(files) == 2
    assert all("odd_mod.py" in line for line in files)
    assert told[-1] == "RuntimeError: in the middle"


def test_a_loss_that_fails_inside_autograd_is_named(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install_class(site, "losses", LOSS)
    status, err = fit(capsys, "--model.loss=Odd")
    assert status == 1
    assert "AttributeError in the loss Odd (odd-plugins 2.5): 'Tensor' object has no attribute" in err


def test_a_value_that_its_constructor_refuses_is_the_users_mistake(
    site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install_class(site, "callbacks", CALLBACK.format(error="ValueError"))
    callback = "--trainer.callbacks=[{class_path: Odd, init_args: {limit: 0}}]"
    status, err = fit(capsys, callback)
    assert status == 2
    assert "Traceback" not in err
    assert err.startswith("ValueError in the callback Odd (odd-plugins 2.5): limit is below 1\n")
    assert "trainer:" not in err


def test_what_a_constructor_says_itself_stays_its_own_message(
    site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("fit", "preview"):
        argv = ["--model.loss", "CrossEntropy", "--model.loss.z_loss", "-1"]
        assert main([command, "--config", "my.yaml", *argv]) == 2
        err = capsys.readouterr().err
        assert err.endswith(
            "error: model.loss (CrossEntropy): z_loss is -1.0\n  → give a number of 0 or more\n"
        )


def test_one_that_fails_while_it_is_made_has_its_traceback(
    site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install_class(site, "callbacks", CALLBACK.format(error="ZeroDivisionError"))
    status, err = fit(capsys, "--trainer.callbacks=[{class_path: Odd, init_args: {limit: 0}}]")
    assert status == 1
    assert err.startswith(
        "ZeroDivisionError in the callback Odd (odd-plugins 2.5): limit is below 1\nTraceback"
    )


def test_a_value_that_the_trainer_refuses_is_still_the_trainers(
    site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, err = fit(capsys, "--trainer.val_check_interval=-1.5")
    assert status == 2
    assert err.startswith("trainer: ")


@pytest.mark.parametrize(
    ("requires", "problem"),
    [
        ("lightning-sft>=9,<10", "needs lightning-sft <10,>=9, and this is 0.1.0"),
        ("Lightning_SFT (>=9)", "needs lightning-sft >=9"),
        ("lightning-sft>=0.1", None),
        ("lightning-sft-more>=9", None),
        ('lightning-sft>=9; extra == "new"', None),
        ("lightning-sft[test]>=9", "needs lightning-sft >=9"),
        ("lightning-sft>=", None),
    ],
)
def test_one_that_needs_a_newer_core_says_so(
    site: Path, capsys: pytest.CaptureFixture[str], requires: str, problem: str | None
) -> None:
    install_class(site, "losses", LOSS, requires=requires)
    status = main(["plugins", "Odd"])
    err = capsys.readouterr().err
    assert status == (2 if problem else 0)
    assert problem is None or problem in err
    main(["plugins", "--json"])
    (entry,) = [each for each in json.loads(capsys.readouterr().out) if each["name"] == "Odd"]
    assert entry["state"].startswith(f"broken: {problem}" if problem else "ok")


def test_one_made_for_pytorch_lightning_says_that(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = "class Callback: ...\nCallback.__module__ = 'pytorch_lightning.callbacks.callback'\n"
    install_class(site, "callbacks", f'{other}class Odd(Callback):\n    """Old."""\n')
    status, err = fit(capsys, "--trainer.callbacks=Odd")
    assert status == 2
    assert "the callback Odd (odd-plugins 2.5) is not usable" in err
    assert (
        "subclasses Callback of pytorch_lightning, which is another class than that of lightning.pytorch"
        in err
    )


@pytest.mark.parametrize("disabled", ["Odd", "odd-plugins", "odd_mod.Odd", "Other, Odd ,"])
def test_a_disabled_one_is_listed_as_such_and_refused_where_it_is_named(
    site: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, disabled: str
) -> None:
    install_class(site, "losses", LOSS)
    monkeypatch.setenv("LIGHTNING_SFT_DISABLE_PLUGINS", disabled)
    main(["plugins", "--json"])
    states = {each["name"]: each["state"] for each in json.loads(capsys.readouterr().out)}
    assert (states["Odd"], states["CrossEntropy"]) == ("disabled", "ok")
    for named in ("Odd", "odd_mod.Odd"):
        status, err = fit(capsys, f"--model.loss={named}")
        assert status == 2
        assert "the loss Odd (odd-plugins 2.5) is disabled" in err
    assert "odd_mod" not in sys.modules


def test_disabling_one_of_two_of_a_name_leaves_the_name_to_the_other(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_format(site, "stranger-one", "Twin", "twin_one")
    install_format(site, "stranger-two", "Twin", "twin_two")
    monkeypatch.setenv("LIGHTNING_SFT_DISABLE_PLUGINS", "stranger-one")
    assert main(["preview", "--config", "my.yaml", "--data.train=[{path: rows.jsonl, format: Twin}]"]) == 0
    assert "twin_two" in sys.modules
    assert "twin_one" not in sys.modules


def test_a_disabled_default_is_refused_only_where_none_is_named(
    site: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIGHTNING_SFT_DISABLE_PLUGINS", "CrossEntropy")
    status, err = fit(capsys)
    assert status == 2
    assert "the loss CrossEntropy (lightning-sft 0.1.0) is disabled" in err


def test_with_an_empty_table_the_core_imports_and_says_what_is_missing(tmp_path: Path) -> None:
    info = tmp_path / "lightning_sft-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lightning-sft\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text("")
    code = """if True:
        import sys
        import lightning_sft.cli, lightning_sft.preview, lightning_sft.generate, lightning_sft.data_command
        from lightning_sft.__main__ import main
        assert main(["plugins"]) == 0
        sys.exit(main(["fit", "--model.base", "tiny", "--data.train", "no.jsonl"]))
    """
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "No plug-in is installed." in done.stdout
    assert (
        "no default adapter: the first-party plug-ins of lightning-sft seem not to be installed"
        in done.stderr
    )


# -------------------------------------------------------------------------------------- plugins --check


@pytest.mark.slow
def test_check_reports_what_is_broken_and_leaves_the_rest_alone(
    site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install_format(site, "stranger-formats", "Fine", "fine_mod")
    install_broken(site)
    install_format(site, "stranger-one", "Twin", "twin_one")
    install_format(site, "stranger-two", "Twin", "twin_two")
    fine = (site / "fine_mod.py").read_text()
    more = {
        "Exits": "raise SystemExit(3)\n",
        "Dies": "import os\nos._exit(7)\n",
        "Heavy": "import peft\nimport torch\n",
        "Slow": "import time\ntime.sleep(0.7)\n",
        "Prints": "print('a stranger speaks')\n",
    }
    for name, start in more.items():
        source = start + fine.replace("Fine", name)
        install(
            site, f"dist-{name.lower()}", {"lightning_sft.formats": {name: f"{name.lower()}_m:{name}"}},
            {f"{name.lower()}_m": source},
        )  # fmt: skip
    install(site, "wrong", {"lightning_sft.losses": {"Fine": "fine_mod:Fine"}}, {})
    install(site, "new", {"lightning_sft.losses": {"New": "fine_mod:New"}}, {}, requires="lightning-sft>=9")
    install(site, "meddler", {"lightning.pytorch.callbacks_factory": {"all": "fine_mod:Fine"}}, {})
    names = ["Fine", "Shattered", "twin_one.Twin", *more, "New"]
    assert main(["plugins", *names, "--check", "--json"]) == 2
    out, err = capsys.readouterr()
    reports = {(each["plugin"]["kind"], each["plugin"]["name"]): each for each in json.loads(out)}
    found = {key: " | ".join(report["broken"]) for key, report in reports.items()}
    row = "fails with KeyError: 'text' on the row {}"
    assert row in found["formats", "Fine"]
    assert "RuntimeError: the stranger's fault" in found["formats", "Shattered"]
    assert "only the class path twin_one.Twin names it" in found["formats", "Twin"]
    assert "SystemExit: 3" in found["formats", "Exits"]
    assert found["formats", "Dies"] == "its process ended with status 7"
    heavy = found["formats", "Heavy"].partition("its module imports ")[2].partition(" when it is imported")[0]
    assert {"peft", "torch"} <= {*heavy.split(", ")}
    assert "its import takes 0." in found["formats", "Slow"]
    assert found["formats", "Prints"] == found["formats", "Fine"].replace("Fine", "Prints")
    assert "does not subclass lightning_sft.bases.Loss" in found["losses", "Fine"]
    assert found["losses", "New"] == "needs lightning-sft >=9, and this is 0.1.0"
    assert reports["formats", "Fine"]["passed"] >= 4
    assert "a stranger speaks" not in out + err
    assert "warning: meddler 2.5 adds callbacks to every Trainer" in err
    assert f"{len(reports)} of {len(reports)} plug-ins are broken" in err


@pytest.mark.slow
def test_check_passes_every_first_party_plugin(capsys: pytest.CaptureFixture[str]) -> None:
    from lightning_sft.plugins import discover

    names = [plugin.class_path for plugin in discover() if plugin.distribution == "lightning-sft"]
    assert main(["plugins", *names, "--check"]) == 0
    out = capsys.readouterr().out
    assert out.count("ok      ") == len(names)


# ------------------------------------------------------------------------------ processes, data workers

FORMAT_AND_CALLBACK = """
import os

from lightning.pytorch import Callback

from lightning_sft import Conversation, DataFormat, Message


class OddFormat(DataFormat):
    def matches(self, columns):
        return False

    def convert(self, row):
        return [Conversation((Message("user", row["instruction"]), Message("assistant", row["output"])))]


class OddCallback(Callback):
    def __init__(self, fails_on: int = -1) -> None:
        self.fails_on = fails_on

    def on_train_end(self, trainer, pl_module):
        print(f"rank {trainer.global_rank} of {trainer.world_size} has ended", flush=True)
        if trainer.global_rank == self.fails_on:
            raise RuntimeError("on one rank")
"""


@pytest.mark.slow
@pytest.mark.parametrize("fails_on", [-1, 0])
def test_plugins_work_under_ddp_and_beside_data_workers(site: Path, fails_on: int) -> None:
    install(
        site, "odd-plugins",
        {
            "lightning_sft.formats": {"OddFormat": "odd_both:OddFormat"},
            "lightning_sft.callbacks": {"OddCallback": "odd_both:OddCallback"},
        },
        {"odd_both": FORMAT_AND_CALLBACK},
    )  # fmt: skip
    argv = [
        "--data.train=[{path: rows.jsonl, format: OddFormat}]",
        "--data.num_workers=1",
        "--data.batch_size=1",
    ]
    argv += ["--trainer.strategy=ddp", "--trainer.devices=2", "--trainer.max_steps=2"]
    argv += [f"--trainer.callbacks=[{{class_path: OddCallback, init_args: {{fails_on: {fails_on}}}}}]"]
    done = subprocess.run(
        [sys.executable, "-m", "lightning_sft", "fit", "--config", "my.yaml", *argv],
        env=os.environ | {"PYTHONPATH": str(site)}, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert "rank 0 of 2 has ended" in done.stdout
    if fails_on == -1:
        assert done.returncode == 0, done.stderr
        assert "rank 1 of 2 has ended" in done.stdout
        assert "rows.jsonl: 4 rows as format OddFormat (odd-plugins 2.5)" in done.stdout
    else:
        assert done.returncode == 1
        assert (
            "error: RuntimeError in the callback OddCallback (odd-plugins 2.5): on one rank\n" in done.stderr
        )
