"""Plug-ins are found in metadata, loaded only when named, and blamed by distribution and version."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from stranger import install, install_broken, install_format

from lightning_sft import Adapter, DataFormat, Loss, SFTError
from lightning_sft.plugins import KINDS, Plugin, default, describe, discover, find, load_named, named_in


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on `sys.path`, as site-packages is; what is imported from it is forgotten afterwards."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(folder)):
            del sys.modules[name]


def test_a_strangers_format_is_found_by_its_short_name_and_loaded(site: Path) -> None:
    install_format(site, "stranger-formats", "Odd", "odd_formats")
    plugin = find("formats", "Odd")
    assert plugin == Plugin("formats", "Odd", "odd_formats:Odd", "stranger-formats", "2.5")
    assert str(plugin) == "format Odd (stranger-formats 2.5)"
    assert issubclass(plugin.load(), DataFormat)
    assert plugin.load() is plugin.load()


def test_a_plugin_is_found_by_its_full_class_path(site: Path) -> None:
    install_format(site, "stranger-formats", "Odd", "odd_formats")
    assert find("formats", "odd_formats.Odd").name == "Odd"


def test_discovery_imports_nothing_and_lists_a_broken_plugin_beside_the_others(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("odd_formats", "shattered_mod"):  # another test may have imported one of that name
        monkeypatch.delitem(sys.modules, module, raising=False)
    install_format(site, "stranger-formats", "Odd", "odd_formats")
    install_broken(site)
    assert {"Odd", "Shattered"} <= {plugin.name for plugin in discover("formats")}
    assert not {"odd_formats", "shattered_mod"} & set(sys.modules)


def test_discovery_is_sorted_by_kind_and_name(site: Path) -> None:
    install(
        site,
        "zoo",
        {"lightning_sft.evaluators": {"A": "z:A"}, "lightning_sft.formats": {"Zed": "z:Zed", "Aaa": "z:A"}},
        {},
    )
    plugins = discover()
    assert [plugin.kind for plugin in plugins] == sorted((p.kind for p in plugins), key=KINDS.index)
    formats = [plugin.name for plugin in discover("formats")]
    assert formats == sorted(formats)
    assert formats[0] == "Aaa"
    assert formats[-1] == "Zed"


def test_a_distribution_found_twice_on_the_path_is_listed_once_as_the_first(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_format(site, "stranger-formats", "Odd", "odd_formats", version="1.0")
    monkeypatch.syspath_prepend(
        install_format(tmp_path / "newer", "stranger-formats", "Odd", "odd_formats", version="1.1")
    )
    assert [plugin.version for plugin in discover("formats") if plugin.name == "Odd"] == ["1.1"]


def test_metadata_that_cannot_be_read_costs_only_its_own_plugins(site: Path) -> None:
    install_format(site, "stranger-formats", "Odd", "odd_formats")
    install(site, "garbled", {}, {})
    (site / "garbled-2.5.dist-info" / "entry_points.txt").write_text(
        "[lightning_sft.formats]\nno equals sign\n"
    )
    with pytest.warns(UserWarning, match="plug-ins of garbled are left out"):
        assert "Odd" in {plugin.name for plugin in discover("formats")}


def test_a_plugin_that_fails_on_import_is_blamed_with_distribution_version_and_cause(site: Path) -> None:
    install_broken(site)
    with pytest.raises(SFTError) as caught:
        find("formats", "Shattered").load()
    message = str(caught.value)
    assert "format Shattered (broken-formats 2.5)" in message
    assert "RuntimeError: the stranger's fault" in message
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_a_plugin_that_exits_on_import_is_an_error_not_the_end(site: Path) -> None:
    install(
        site,
        "quitter",
        {"lightning_sft.formats": {"Quit": "quit_mod:Quit"}},
        {"quit_mod": "raise SystemExit(0)\n"},
    )
    with pytest.raises(SFTError, match=r"quitter 2\.5.*SystemExit"):
        find("formats", "Quit").load()


@pytest.mark.parametrize(
    ("kind", "source", "problem"),
    [
        ("formats", "class Bad: pass", "does not subclass lightning_sft.bases.DataFormat"),
        ("adapters", "class Bad: pass", "does not subclass lightning_sft.bases.Adapter"),
        ("losses", "class Bad: pass", "does not subclass lightning_sft.bases.Loss"),
        ("callbacks", "class Bad: pass", "does not subclass lightning.pytorch.callbacks.callback.Callback"),
        ("formats", "def Bad(): pass", "is no class but function"),
        ("formats", "class Good: pass\nBad = Good", "is a class named Good, not Bad"),
        (
            "formats",
            "from lightning_sft import DataFormat\nclass Bad(DataFormat):\n    def matches(self, c): ...",
            "does not define convert",
        ),
    ],
)
def test_what_is_no_complete_class_of_its_kind_is_refused(
    site: Path, kind: str, source: str, problem: str
) -> None:
    install(site, "bad", {f"lightning_sft.{kind}": {"Bad": "bad_mod:Bad"}}, {"bad_mod": source})
    with pytest.raises(SFTError) as caught:
        find(kind, "Bad").load()
    assert problem in str(caught.value)
    assert "(bad 2.5)" in str(caught.value)


def test_an_unknown_name_suggests_the_nearest_and_lists_the_known_ones(site: Path) -> None:
    install_format(site, "stranger-formats", "Oddish", "odd_formats")
    with pytest.raises(SFTError) as caught:
        find("formats", "oddisch")
    assert "no format is named 'oddisch'" in str(caught.value)
    assert "did you mean Oddish?" in str(caught.value)
    assert all(plugin.name in str(caught.value) for plugin in discover("formats"))


def test_the_wrong_case_is_a_near_miss() -> None:
    with pytest.raises(SFTError, match=r"did you mean LoRA\?"):
        find("adapters", "lora")


def test_two_distributions_with_one_name_are_both_named_and_either_class_path_works(site: Path) -> None:
    install_format(site, "stranger-one", "Twin", "twin_one")
    install_format(site, "stranger-two", "Twin", "twin_two")
    with pytest.raises(SFTError) as caught:
        find("formats", "Twin")
    message = str(caught.value)
    assert "stranger-one 2.5" in message
    assert "stranger-two 2.5" in message
    assert "twin_one.Twin or twin_two.Twin" in message
    assert find("formats", "twin_two.Twin").distribution == "stranger-two"


def test_every_kind_that_a_run_cannot_do_without_has_a_default() -> None:
    assert issubclass(default("adapters"), Adapter)
    assert issubclass(default("losses"), Loss)


def test_a_missing_default_says_that_the_first_party_plugins_are_missing() -> None:
    with pytest.raises(SFTError, match=r"no default evaluator.*not to be installed[\s\S]*pip install -e \."):
        default("evaluators")


def test_two_defaults_are_both_named(site: Path) -> None:
    install(site, "usurper", {"lightning_sft.defaults": {"losses": "mine:Mine"}}, {})
    with pytest.raises(SFTError, match=r"more than one default loss.*usurper 2\.5"):
        default("losses")


def test_describe_names_the_distribution_of_a_plugins_class_and_instance(site: Path) -> None:
    install_format(site, "stranger-formats", "Odd", "odd_formats")
    odd = find("formats", "Odd").load()
    assert describe(odd) == describe(odd()) == "format Odd (stranger-formats 2.5)"


def test_describe_gives_the_path_of_what_is_no_plugin(site: Path) -> None:
    install_format(site, "stranger-formats", "Path", "odd_formats")
    assert describe(Path) == "pathlib.Path"
    assert describe(SFTError("no")) == "lightning_sft.errors.SFTError"


@pytest.mark.parametrize(
    "text",
    [
        "Odd",
        "--model.x=Odd",
        "--model.x.help=odd_formats.Odd",
        "odd_formats.Odd",
        "x: Odd",
        "x: Odd  # why",
        "x: &anchor Odd",
        "x: 'Odd'",
        "- Odd",
        "a:\n  - class_path: Odd\n    init_args: {}",
        "{class_path: Odd, init_args: {}}",
        '{"class_path": "Odd"}',
        "[First, Odd]",
    ],
)
def test_a_plugin_is_loaded_where_its_name_stands_as_a_value(site: Path, text: str) -> None:
    install_format(site, "stranger-formats", "Odd", "odd_formats")
    assert "Odd" in [plugin.name for plugin in load_named(["fit", text])]
    assert "odd_formats" in sys.modules


@pytest.mark.parametrize(
    "text",
    [
        "data/Shattered/rows.json",
        "x: runs/Shattered",
        "x: Shattered.json",
        "x: Shattered-2",
        "name: my Shattered run",
        "name: Shattered run",
        "x: 1  # not Shattered",
        "x: other.Shattered",
        "Shattered: 1",
        "x: NotShattered",
    ],
)
def test_a_broken_plugin_whose_name_is_only_part_of_something_breaks_nothing(site: Path, text: str) -> None:
    install_broken(site)
    assert load_named(["fit", text]) == []


def test_a_broken_plugin_that_is_named_is_blamed(site: Path) -> None:
    install_broken(site)
    with pytest.raises(SFTError, match=r"Shattered \(broken-formats 2\.5\)"):
        load_named(["format: Shattered"])


def test_of_two_plugins_with_one_name_the_class_path_loads_only_its_own(site: Path) -> None:
    install_format(site, "stranger-one", "Shattered", "whole_mod")
    install_broken(site)
    assert [plugin.distribution for plugin in load_named(["x: whole_mod.Shattered"])] == ["stranger-one"]


@pytest.mark.parametrize(
    "flags", [["--config", "{}"], ["--config={}"], ["-c", "{}"], ["--model.adapter", "{}"], ["--model={}"]]
)
def test_names_are_looked_for_in_config_files(tmp_path: Path, flags: list[str]) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("adapter: Odd\n")
    texts = named_in(["fit", *(flag.format(config) for flag in flags)])
    assert "adapter: Odd\n" in texts
    assert "fit" in texts


def test_names_are_looked_for_in_the_yaml_files_that_a_config_names(tmp_path: Path) -> None:
    (tmp_path / "run.cfg").write_text("model: parts/model.yaml\n")
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "model.yaml").write_text("adapter: Odd\nself: model.yaml\n")
    assert named_in(["--config", str(tmp_path / "run.cfg")])[2:] == [
        "model: parts/model.yaml\n",
        "adapter: Odd\nself: model.yaml\n",
    ]


def test_data_and_missing_files_are_not_taken_for_configs(tmp_path: Path) -> None:
    rows = tmp_path / "rows.json"
    rows.write_text('["Odd"]' + " " * (1 << 20))
    (tmp_path / "latin.yaml").write_bytes(b"\xff\xfe\xff")
    argv = [
        "--data.train",
        str(rows),
        "--config",
        str(tmp_path / "no.yaml"),
        f"--config={tmp_path / 'latin.yaml'}",
        "-c",
    ]
    assert named_in(argv) == argv


def run_python(code: str, *path: Path) -> str:
    """What the code prints in a fresh interpreter with these folders on its path."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    return subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    ).stdout


def test_importing_the_package_and_discovering_imports_no_framework(tmp_path: Path) -> None:
    install_broken(tmp_path)
    heavy = "{'torch', 'lightning', 'transformers', 'peft', 'datasets', 'jsonargparse', 'numpy'}"
    code = f"""if True:
        import sys, lightning_sft
        from lightning_sft.plugins import discover, named_in, load_named, find
        from lightning_sft.plugins_command import listings
        discover(), listings(), load_named(named_in(['fit', 'x: Odd'])), find('formats', 'Alpaca').load()
        print({heavy} & set(sys.modules))
    """
    assert run_python(code, tmp_path).strip() == "set()"


def test_two_hundred_more_plugins_add_little_to_the_listing(site: Path) -> None:
    from lightning_sft.plugins_command import listings

    def seconds() -> float:
        began = time.process_time()
        listings()
        return time.process_time() - began

    listings()
    before = min(seconds() for _ in range(3))
    for n in range(200):
        install_format(site, f"stranger-{n}", f"Stranger{n}", f"stranger_{n}", requires="lightning-sft>=0.1")
    importlib.invalidate_caches()
    assert len([line for line in listings() if line.distribution.startswith("stranger-")]) == 200
    assert min(seconds() for _ in range(3)) - before < 0.2
