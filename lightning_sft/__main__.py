"""The `lightning-sft` command: answers what needs no torch itself, and hands the rest on.

`--version`, the overview and `plugins` must answer at once, so every import of weight is inside a branch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from lightning_sft import __version__, allocator, ranks
from lightning_sft.errors import SFTError

COMMANDS = {
    "fit": "train a model, as one YAML file says",
    "validate": "measure the loss on the validation rows of the same YAML",
    "test": "measure the loss on the test rows of the same YAML",
    "evaluate": "score a trained model, or its base, on benchmarks and text",
    "sweep": "search over any options of fit: many runs of one YAML, and the best of them",
    "plan": "tell memory, steps and time of a run on named GPUs before anything runs",
    "preview": "show what is trained of each example, and why, without loading the model",
    "generate": "let the model of a run or model folder answer a prompt",
    "export": "write the trained model of a run folder as one that transformers loads",
    "verify": "prove that an exported model is the one that was trained",
    "interpolate": "score models between base and tuned, and write one",
    "data": "convert data files from one format to another, or write canaries",
    "plugins": "list, explain, check and begin formats, adapters, losses and other plug-ins",
}
"""The commands, with the line on each in the overview."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: that of the process), and return its exit status; see `status_of`."""
    if argv is None and sys.argv[1:2] in (["fit"], ["plan"]):
        allocator.start_again()
    return status_of(lambda: _dispatch(list(sys.argv[1:] if argv is None else argv)))


def status_of(command: Callable[[], None]) -> int:
    """Run a command and tell what goes wrong.

    Returns:
        The exit status: 0; 2 after a mistake of the user's, told on stderr; 130 when interrupted; 1 when the
        reader of the output has gone away, or when a plug-in failed, with a line that names it and its traceback.
    """
    try:
        command()
        print(end="", flush=True)
    except SFTError as error:
        if ranks.failed(2) is None:
            _tell(str(error))
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if (status := ranks.failed(1)) is not None:
            return status  # another process of the run failed first, and has said why
        from lightning_sft.blame import blame

        fault = blame(error)
        if fault is None:
            raise
        _tell(str(fault))
        print(fault.told, end="", file=sys.stderr)
        return 1
    return 0


def overview() -> str:
    """What bare `lightning-sft` prints: the commands, two examples and where to read on."""
    commands = "\n".join(f"  {name:<12}{line}" for name, line in COMMANDS.items())
    return f"""\
lightning-sft {__version__}: supervised fine-tuning of causal language models on PyTorch Lightning

usage: lightning-sft <command> [options]

{commands}

examples:
  lightning-sft fit --config my.yaml --trainer.max_epochs 2
  lightning-sft generate runs/my-run --prompt "What is a loss mask?"

`lightning-sft fit --help` lists every option; `lightning-sft --version` prints the version."""


def _dispatch(argv: list[str]) -> None:
    command = argv[0] if argv else "--help"
    if command in ("--help", "-h"):
        print(overview())
    elif command == "--version":
        print(f"lightning-sft {__version__}")
    elif command == "plugins":
        from lightning_sft.plugins_command import command as plugins

        plugins(argv[1:])
    elif command == "data":
        from lightning_sft.data_command import command as data

        data(argv[1:])
    elif command in ("fit", "validate", "test", "evaluate"):
        from lightning_sft.cli import run

        run(argv)
    elif command == "sweep":
        from lightning_sft.sweeping.command import command as sweep

        sweep(argv[1:])
    elif command == "plan":
        from lightning_sft.planning.command import command as plan

        plan(argv[1:])
    elif command == "preview":
        from lightning_sft.preview import command as preview

        preview(argv[1:])
    elif command == "generate":
        from lightning_sft.generate import command as generate

        generate(argv[1:])
    elif command == "export":
        from lightning_sft.export import command as export

        export(argv[1:])
    elif command == "interpolate":
        from lightning_sft.interpolate import command as interpolate

        interpolate(argv[1:])
    elif command == "verify":
        from lightning_sft.verify import command as verify

        verify(argv[1:])
    else:
        raise _unknown(command)


def _unknown(command: str) -> SFTError:
    if command.startswith("-"):
        return SFTError(f"{command} comes before any command", fix="write lightning-sft <command> [options]")
    from difflib import get_close_matches

    close = get_close_matches(command, COMMANDS, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return SFTError(f"no command is named {command!r}", fix=f"{hint}commands: {', '.join(COMMANDS)}")


def _tell(message: str) -> None:
    red = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    print("\033[1;31merror:\033[0m" if red else "error:", message, file=sys.stderr)


def _reader_is_gone() -> bool:
    """Whether standard output is a pipe that nobody reads: then, and only then, there's no one to tell."""
    import select

    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


if __name__ == "__main__":
    sys.exit(main())
