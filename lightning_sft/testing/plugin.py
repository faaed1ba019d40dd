"""What plug-ins of every kind have to do."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from lightning_sft import plugins
from lightning_sft.errors import SFTError
from lightning_sft.plugin_kinds import KINDS

if TYPE_CHECKING:
    from lightning_sft.command_line import CommandParser


class MissingSample(AssertionError):
    """The kit needs something that only the plug-in's author knows, such as rows of its format."""


class PluginTests:
    """The tests of every kind.

    Attributes:
        kind: One of `lightning_sft.plugins.KINDS`; the mixin of each kind sets it.
        plugin: The class to test.
        options: What to make it with, in JSON types, as in YAML.
    """

    kind: ClassVar[str]
    plugin: ClassVar[type]
    options: ClassVar[Mapping[str, object]] = {}

    def make(self) -> Any:
        """A new instance, made with `options`.

        Raises:
            MissingSample: It needs options that aren't given, or refuses those that are.
        """
        needed = [
            name
            for name, parameter in inspect.signature(self.plugin).parameters.items()
            if parameter.default is parameter.empty
            and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
            and name not in self.options
        ]
        if needed:
            raise MissingSample(
                f"{self.plugin.__name__} needs the options {', '.join(needed)}: set `options` in its test class"
            )
        printed = _config(self.plugin, self.kind, _path(self.plugin), self.options)
        try:
            return made(printed, self.kind)
        except SFTError as error:
            raise MissingSample(
                f"{self.plugin.__name__} refuses the options {dict(self.options)}: {error}; set `options`"
            ) from error

    def test_it_is_a_complete_class_of_its_kind(self) -> None:
        """It subclasses the kind's base, and leaves nothing abstract."""
        check_base(self.plugin, self.kind)

    def test_it_is_found_by_its_short_name(self) -> None:
        """An installed distribution lists it in its entry points, under the class's name."""
        check_entry_point(self.plugin, self.kind)

    def test_its_options_are_typed_and_documented(self) -> None:
        """The class and each parameter have a docstring, each parameter a type."""
        check_options(self.plugin)

    def test_its_printed_config_reads_back(self) -> None:
        """What `--print_config` prints of it is read as the same configuration, and makes it."""
        self.make()  # says what options are missing
        check_config(self.plugin, self.kind, self.options)


def check_base(plugin: type, kind: str) -> None:
    """The class subclasses the kind's base, and leaves nothing abstract."""
    base = KINDS[kind].load_base()
    assert base is not None, f"{kind} have no base class yet"
    assert inspect.isclass(plugin), f"{plugin!r} is no class"
    assert issubclass(plugin, base), f"{plugin.__name__} does not subclass {base.__module__}.{base.__name__}"
    abstract = sorted(getattr(plugin, "__abstractmethods__", ()))
    assert not abstract, f"{plugin.__name__} does not define {', '.join(abstract)}"


def check_entry_point(plugin: type, kind: str) -> None:
    """An installed distribution lists the class under its name, and its metadata leads to this very class."""
    group = KINDS[kind].group
    found = [each for each in plugins.discover(kind) if each.name == plugin.__name__]
    assert found, (
        f"no installed distribution lists {plugin.__name__} in the entry points [{group}]: write "
        f'{plugin.__name__} = "{plugin.__module__}:{plugin.__qualname__}" there, and install it again'
    )
    loaded: list[object] = []
    for each in found:
        try:
            loaded.append(each.load())
        except SFTError as error:
            loaded.append(error)
    assert plugin in loaded, (
        f"the entry point {plugin.__name__} of [{group}] leads to {loaded[0]!r}, not to {plugin!r}"
    )


def check_options(plugin: type) -> None:
    """The class has a description, and each parameter of its constructor a type and one, too."""
    import docstring_parser

    from lightning_sft.command_line import CommandParser

    name = plugin.__name__
    description = docstring_parser.parse(vars(plugin).get("__doc__") or "").short_description
    assert description, f"{name} has no docstring: its first line is what `lightning-sft plugins` shows"
    parser = CommandParser()
    try:
        parser.add_class_arguments(plugin, fail_untyped="all")
    except ValueError as error:
        raise AssertionError(f"an option of {name} has no type: {error}") from error
    bare = [
        action.dest for action in parser._actions if action.option_strings and not (action.help or "").strip()
    ]
    assert not bare, (
        f"{name} does not document {', '.join(bare)}: describe them under `Args:` in its docstring"
    )


def check_config(plugin: type, kind: str, options: Mapping[str, object]) -> None:
    """A configuration that names the class, by short name or class path, prints one that is read as the same."""
    names = [_path(plugin)]
    if len([each for each in plugins.discover(kind) if each.name == plugin.__name__]) == 1:
        names.append(plugin.__name__)
    for name in names:
        printed = _config(plugin, kind, name, options)
        parser = _parser(kind)
        again = parser.dump(parser.parse_string(printed), skip_none=False)
        assert again == printed, f"the printed configuration of {name} is read as another one:\n{printed}"
        thing = made(printed, kind)
        assert type(thing) is plugin, f"{name} in a configuration makes a {type(thing).__name__}"


def made(printed: str, kind: str) -> Any:
    """The plug-in of a printed configuration."""
    parser = _parser(kind)
    return parser.instantiate(parser.parse_string(printed)).plugin


def _config(plugin: type, kind: str, name: str, options: Mapping[str, object]) -> str:
    """The configuration with this plug-in, printed."""
    plugins.load_named([str(dict(options))])
    parser = _parser(kind)
    try:
        config = parser.parse_object({"plugin": {"class_path": name, "init_args": dict(options)}})
    except SFTError as error:
        raise AssertionError(
            f"{plugin.__name__}, named {name}, refuses the options {dict(options)}: {error}"
        ) from error
    return str(parser.dump(config, skip_none=False))


def _parser(kind: str) -> CommandParser:
    from lightning_sft.command_line import CommandParser

    parser = CommandParser()
    parser.add_argument("--plugin", type=KINDS[kind].load_base())
    return parser


def _path(plugin: type) -> str:
    return f"{plugin.__module__}.{plugin.__qualname__}"
