"""From nothing to an installed plug-in: what `lightning-sft plugins new` writes works as it is."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lightning_sft import __version__
from lightning_sft.__main__ import main
from lightning_sft.plugin_kinds import KINDS
from lightning_sft.plugin_project import WITH_TEMPLATES, version_range, write

ROOT = Path(__file__).parents[1]


def test_every_kind_with_tests_in_the_kit_has_templates() -> None:
    assert [kind.name for kind in KINDS.values() if kind.tests] == WITH_TEMPLATES


@pytest.mark.parametrize("kind", WITH_TEMPLATES)
def test_a_new_project_is_complete_and_formatted_as_this_one(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plugins", "new", "my-plugin", "--kind", kind, "--folder", str(tmp_path)]) == 0
    folder = tmp_path / "my-plugin"
    assert f"cd {folder}" in capsys.readouterr().out
    one = KINDS[kind].one
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == {
        "pyproject.toml", "README.md", ".gitignore", ".github/workflows/tests.yml", "my_plugin/__init__.py",
        f"my_plugin/{one}.py", f"tests/test_{one}.py",
    }  # fmt: skip
    assert "{{" not in "".join(path.read_text() for path in folder.rglob("*") if path.is_file())
    ruff = Path(sys.executable).parent / "ruff"
    if ruff.exists():
        for check in (["check", "--select", "E,F,W,I,UP,B"], ["format", "--check"]):
            command = [ruff, *check, "--isolated", "--line-length", "110", "my_plugin", "tests"]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (["my plugin"], "'my plugin' is no name of a distribution"),
        (["json"], "json is the name of another module"),
        (["lightning-sft"], "lightning_sft is the name of another module"),
        (["mine", "--class", "class"], "'class' is no name of a class"),
        (["mine", "--class", "Alpaca"], "there is a format Alpaca (lightning-sft"),
        (["there"], "it exists already"),
    ],
)
def test_names_that_cannot_be_used_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str], problem: str
) -> None:
    (tmp_path / "there").mkdir()
    assert main(["plugins", "new", *argv, "--kind", "formats", "--folder", str(tmp_path)]) == 2
    assert problem in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


@pytest.mark.parametrize(
    ("version", "range"),
    [("0.1.0", ">=0.1,<0.3"), ("0.9.2", ">=0.9,<0.11"), ("1.0.0", ">=1.0,<2"), ("2.4.1.dev3", ">=2.4,<3")],
)
def test_the_range_of_versions_is_that_of_the_deprecation_policy(version: str, range: str) -> None:
    assert version_range(version) == range


# ------------------------------------------------------------------------------------------- installed


def run(*command: object, cwd: Path) -> str:
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [*map(str, command)],
        cwd=cwd,
        env=clean | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a project of each kind, and `venv`, in which their wheels and that of lightning-sft are.

    The libraries that they need are those of the environment that the tests run in; lightning-sft itself isn't.
    """
    folder = tmp_path_factory.mktemp("projects")
    for kind in WITH_TEMPLATES:
        write(folder / f"my-{kind}", f"my-{kind}", KINDS[kind])
    projects = [folder / f"my-{kind}" for kind in WITH_TEMPLATES]
    source = folder / "source"  # building leaves metadata in the source tree, which would grow old there
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "tests", "runs", "build", "*.egg-info"))
    pip = [sys.executable, "-m", "pip"]
    run(
        *pip,
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        "wheels",
        source,
        *projects,
        cwd=folder,
    )
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    site = Path(
        run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    )
    run(
        *pip, "--python", python, "install", "-q", "--no-deps", *(folder / "wheels").glob("*.whl"), cwd=folder
    )
    libraries = [path for path in sys.path if path.endswith("site-packages")]
    (site / "libraries.pth").write_text("\n".join(libraries))
    return folder


@pytest.mark.slow
def test_the_wheels_are_what_is_imported(installed: Path) -> None:
    code = "import lightning_sft, my_formats; print(lightning_sft.__file__, my_formats.__file__)"
    for path in run(installed / "venv" / "bin" / "python", "-c", code, cwd=installed).split():
        assert Path(path).is_relative_to(installed / "venv")


@pytest.mark.slow
def test_every_new_project_passes_its_own_tests(installed: Path) -> None:
    tests = [f"my-{kind}/tests/test_{KINDS[kind].one}.py" for kind in WITH_TEMPLATES]
    python = installed / "venv" / "bin" / "python"
    out = run(python, "-m", "pytest", "-v", "-p", "no:cacheprovider", *tests, cwd=installed)
    for kind in WITH_TEMPLATES:
        assert f"::TestMy{kind.capitalize()}::" in out
    assert " skipped" not in out


@pytest.mark.slow
def test_every_new_plugin_is_checked_and_listed(installed: Path) -> None:
    command = installed / "venv" / "bin" / "lightning-sft"
    names = [f"My{kind.capitalize()}" for kind in WITH_TEMPLATES]
    reports = json.loads(run(command, "plugins", *names, "--check", "--json", cwd=installed))
    assert [(report["plugin"]["name"], report["broken"]) for report in reports] == [
        (name, []) for name in names
    ]
    listed = {entry["name"]: entry for entry in json.loads(run(command, "plugins", "--json", cwd=installed))}
    for name in names:
        assert listed[name]["state"] == "ok"
        assert ",".join(sorted(listed[name]["requires"].split(","))) == ",".join(
            sorted(version_range(__version__).split(","))
        )
        assert listed[name]["description"]


@pytest.mark.slow
@pytest.mark.parametrize("named", ["short name", "class path"])
def test_a_run_with_all_of_them(installed: Path, named: str) -> None:
    name = {
        kind: f"My{kind.capitalize()}"
        if named == "short name"
        else f"my_{kind}.{KINDS[kind].one}.My{kind.capitalize()}"
        for kind in WITH_TEMPLATES
    }
    rows = [{"question": f"What is {n}?", "answer": f"It is {n}."} for n in range(6)]
    rows.append({"question": "Say so.", "answer": "Say so."})
    (installed / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "model": {
            "base": "tiny",
            "adapter": {"class_path": name["adapters"], "init_args": {"layers": 2}},
            "loss": name["losses"],
        },
        "data": {
            "train": [{"path": "rows.jsonl", "format": name["formats"]}],
            "filters": [name["filters"]],
            "batch_size": 3,
        },
        "trainer": {"max_steps": 2, "accelerator": "cpu", "callbacks": [{"class_path": name["callbacks"]}]},
        "evaluators": [{"class_path": name["evaluators"], "init_args": {"largest": 1}}],
    }
    (installed / "run.yaml").write_text(yaml.safe_dump(config))
    command = installed / "venv" / "bin" / "lightning-sft"
    if named == "short name":
        shown = json.loads(run(command, "preview", "--config", "run.yaml", "--json", cwd=installed))
        assert [example["row"] for example in shown] == [1, 2, 3]
        assert "error" not in shown[0]
    out = run(command, "fit", "--config", "run.yaml", cwd=installed)
    assert "format MyFormats (my-formats 0.1.0)" in out
    assert "filtered 1 conversations (MyFilters): the answer repeats the question" in out
    assert "lowest training loss: " in out
    run(command, "evaluate", "--config", "run.yaml", "--output", f"scores {named}", cwd=installed)
    told = json.loads((installed / f"scores {named}" / "results.json").read_text())["evaluators"]
    (score, _) = told["MyEvaluators"]["scores"]
    assert (score["name"], score["metric"], score["items"]) == ("MyEvaluators", "exact_match", 4)


@pytest.mark.slow
def test_an_editable_install_of_a_project_works(installed: Path, tmp_path: Path) -> None:
    """As the guide says: `pip install -e .`, and a change of the class is there without another install."""
    folder = write(tmp_path / "mine", "mine", KINDS["losses"])
    python = installed / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python]
    run(*pip, "install", "-q", "--no-deps", "--no-build-isolation", "-e", folder, cwd=tmp_path)
    module = folder / "mine" / "loss.py"
    module.write_text(module.read_text().replace("gamma: float = 2.0", "gamma: float = 3.5"))
    assert "default: 3.5" in run(
        installed / "venv" / "bin" / "lightning-sft", "plugins", "Mine", cwd=tmp_path
    )
