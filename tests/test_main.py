"""The command answers at once where it needs no torch, and tells mistakes in one message."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from stranger import install, install_broken, install_format

from lightning_sft import SFTError
from lightning_sft.__main__ import COMMANDS, main


def answer(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """What the command prints, given that it succeeds."""
    assert main(argv) == 0
    return capsys.readouterr().out


def mistake(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """What the command says about the user's mistake."""
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    return err


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str, Callable[[list[str]], None]], None]:
    """Puts a function in the place of one that a command is handed on to."""

    def put(module: str, name: str, function: Callable[[list[str]], None]) -> None:
        stub = ModuleType(module)
        setattr(stub, name, function)
        monkeypatch.setitem(sys.modules, module, stub)

    return put


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert answer(capsys, "--version") == "lightning-sft 0.1.0\n"


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_the_overview_has_a_line_for_every_command(
    capsys: pytest.CaptureFixture[str], argv: list[str]
) -> None:
    text = answer(capsys, *argv)
    assert {line.split()[0] for line in text.splitlines() if line.startswith("  ")} == {
        *COMMANDS,
        "lightning-sft",
    }
    assert "lightning-sft fit --help" in text


def test_an_unknown_command_suggests_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    text = mistake(capsys, "exprot")
    assert text.startswith("error: no command is named 'exprot'")
    assert "did you mean export?" in text


def test_options_before_the_command_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--config comes before any command" in mistake(capsys, "--config", "x.yaml", "fit")


@pytest.mark.parametrize("command", ["fit", "validate", "test"])
def test_the_trainers_commands_get_the_whole_command_line(
    stand_in: Callable[..., None], command: str
) -> None:
    got: list[list[str]] = []
    stand_in("lightning_sft.cli", "run", got.append)
    assert main([command, "--config", "x.yaml"]) == 0
    assert got == [[command, "--config", "x.yaml"]]


@pytest.mark.parametrize("command", ["generate", "export"])
def test_the_folders_commands_get_what_comes_after_their_name(
    stand_in: Callable[..., None], command: str
) -> None:
    got: list[list[str]] = []
    stand_in(f"lightning_sft.{command}", "command", got.append)
    assert main([command, "runs/x"]) == 0
    assert got == [["runs/x"]]


def test_a_users_mistake_is_one_message_and_status_2(
    stand_in: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    def run(argv: list[str]) -> None:
        raise SFTError("no such file", where="x.yaml", fix="write one")

    stand_in("lightning_sft.cli", "run", run)
    assert mistake(capsys, "fit") == "error: x.yaml: no such file\n  → write one\n"


def test_an_interruption_is_status_130(
    stand_in: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    def run(argv: list[str]) -> None:
        raise KeyboardInterrupt

    stand_in("lightning_sft.cli", "run", run)
    assert main(["fit"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_programming_error_keeps_its_traceback(stand_in: Callable[..., None]) -> None:
    def run(argv: list[str]) -> None:
        raise ZeroDivisionError

    stand_in("lightning_sft.cli", "run", run)
    with pytest.raises(ZeroDivisionError):
        main(["fit"])


@pytest.mark.parametrize("argv", [["--version"], ["--help"], ["plugins"], ["plugins", "--json"]])
def test_what_is_answered_at_once_imports_no_framework(tmp_path: Path, argv: list[str]) -> None:
    install_format(tmp_path, "stranger-formats", "Odd", "odd_formats")
    code = f"""if True:
        import sys
        from lightning_sft.__main__ import main
        assert main({argv}) == 0
        heavy = {{'torch', 'lightning', 'transformers', 'peft', 'datasets', 'jsonargparse', 'odd_formats'}}
        assert not heavy & set(sys.modules), heavy & set(sys.modules)
    """
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=env, check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("argv", [["--help"], ["plugins"], ["plugins", "--json"]])
def test_a_reader_that_goes_away_is_no_traceback(argv: list[str], unbuffered: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "lightning_sft", *argv]
    env = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    with os.fdopen(writer, "w") as stdout:
        done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, env=env, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_pipe_that_breaks_elsewhere_is_not_hidden() -> None:
    code = """if True:
        import sys, types
        stub = sys.modules['lightning_sft.cli'] = types.ModuleType('lightning_sft.cli')
        def run(argv): raise BrokenPipeError("a data worker's")
        stub.run = run
        from lightning_sft.__main__ import main
        main(['fit'])
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "a data worker's" in done.stderr


def plugins_as_json(capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, str]]:
    """The entries of `plugins --json` by distribution and name."""
    entries = json.loads(answer(capsys, "plugins", "--json"))
    return {f"{entry['distribution']} {entry['name']}": entry for entry in entries}


def test_plugins_lists_a_strangers_plugin_with_the_first_paragraph_of_its_docstring(
    site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install_format(site, "stranger-formats", "Odd", "odd_formats")
    assert plugins_as_json(capsys)["stranger-formats Odd"] == {
        "kind": "formats",
        "name": "Odd",
        "target": "odd_formats:Odd",
        "distribution": "stranger-formats",
        "version": "2.5",
        "requires": "",
        "description": "Rows with a text, the stranger's way.",
        "state": "ok",
    }


def test_plugins_shows_every_name_in_full_however_narrow_the_screen(
    site: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "AFormatWithANameThatIsRatherLong"
    install_format(site, "a-distribution-with-a-long-name", name, "odd_formats")
    monkeypatch.setenv("COLUMNS", "60")
    text = answer(capsys, "plugins")
    assert name in text
    assert "a-distribution-with-a-long-name" in text
    assert "…" not in next(line for line in text.splitlines() if name in line)


def test_plugins_ends_with_how_to_write_one(capsys: pytest.CaptureFixture[str]) -> None:
    end = answer(capsys, "plugins").splitlines()[-1]
    assert "lightning_sft.formats" in end
    assert "lightning_sft.evaluators" in end


@pytest.mark.parametrize(
    ("target", "source", "state"),
    [
        ("absent_mod:Bad", None, "broken: no module absent_mod"),
        ("bad_mod.deep:Bad", "", "broken: no module bad_mod.deep"),
        ("bad_mod:Bad", "class Other: ...", "broken: no class Bad in module bad_mod"),
        (
            "bad_mod:Bad",
            "import no_such_thing\nclass Bad: ...",
            "broken: no module no_such_thing, which bad_mod imports",
        ),
        (
            "bad_mod:Bad",
            "from no_such.thing import x\nclass Bad: ...",
            "broken: no module no_such, which bad_mod",
        ),
        ("bad_mod:Bad", "class Bad(", "broken: SyntaxError"),
        ("bad_mod:Other", "class Other: ...", "broken: the entry point Bad is of Other"),
        ("bad_mod", "class Bad: ...", "broken: the entry point Bad is of no class"),
        ("bad_mod:Bad", "try:\n    import no_such_thing\nexcept ImportError: ...\nclass Bad: ...", "ok"),
        ("bad_mod:Bad", "def make(): ...\nBad = make()", "ok"),
        ("bad_mod:Bad", "from stranger import install as Bad", "broken: no class install in module stranger"),
    ],
)
def test_plugins_tells_what_is_broken_without_importing_it(
    site: Path, capsys: pytest.CaptureFixture[str], target: str, source: str | None, state: str
) -> None:
    install(
        site, "bad", {"lightning_sft.losses": {"Bad": target}}, {} if source is None else {"bad_mod": source}
    )
    install_format(site, "stranger-formats", "Odd", "odd_formats")
    entries = plugins_as_json(capsys)
    assert entries["bad Bad"]["state"].startswith(state)
    assert entries["stranger-formats Odd"]["state"] == "ok"
    assert "bad_mod" not in sys.modules


def test_plugins_finds_the_docstring_where_a_package_only_passes_the_class_on(
    site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install_format(site, "stranger-formats", "Odd", "odd_formats")
    (site / "outer" / "inner").mkdir(parents=True)
    (site / "outer" / "__init__.py").write_text("from .middle import Deep as Shown\n")
    (site / "outer" / "middle.py").write_text("from .inner.deep import Deep\n")
    (site / "outer" / "inner" / "deep.py").write_text('class Deep:\n    """Deep down."""\n')
    install(site, "passes-on", {"lightning_sft.losses": {"Shown": "outer:Shown"}}, {})
    assert plugins_as_json(capsys)["passes-on Shown"]["description"] == "Deep down."


def test_plugins_tells_of_a_clash(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install_format(site, "stranger-one", "Twin", "twin_one")
    install_format(site, "stranger-two", "Twin", "twin_two")
    assert plugins_as_json(capsys)["stranger-two Twin"]["state"] == "clash: name it as twin_two.Twin"


def test_plugins_does_not_run_a_module_that_would_fail(
    site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install_broken(site)
    assert "Shattered" in answer(capsys, "plugins")


def test_every_first_party_plugin_is_whole_and_says_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    ours = [entry for key, entry in plugins_as_json(capsys).items() if key.startswith("lightning-sft ")]
    assert ours
    assert [entry["name"] for entry in ours if entry["state"] != "ok" or not entry["description"]] == []
