"""`jaxalign COMMAND ...`: every command in one place. `jaxalign train` is `python -m jaxalign.train`, and so on.

A command's module is imported when the command was chosen.
"""

import argparse
import ast
import os
import runpy
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxalign.messages import did_you_mean

COMMANDS = {
    "train": "train a model; the same command continues a run that was cut off",
    "generate": "complete prompts, or chat",
    "evaluate": "reward accuracy, margin, perplexity or attribute errors of any model, with intervals",
    "score": "score rows of prompts and responses by a reward model",
    "export": "write a run's checkpoint as a Hugging Face folder",
    "preview": "show a config's rows as tokens, with the mask, counts and dropped rows",
    "preflight": "compile a config for a TPU topology or this machine, without running it: memory, fit, collectives",
    "configs": "list the configs that ship with jaxalign; --copy NAME brings one here",
    "doctor": "versions, devices, memory, and what to install",
}

SHIPPED = Path(__file__).parent / "configs"
"""The configs that ship with jaxalign: the checkout's configs/, of which a wheel has its own copy here."""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command; `argv` is the program's name and its arguments, sys.argv when None."""
    program, *arguments = sys.argv if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return
    command, *rest = arguments
    if command in ("-V", "--version"):
        from jaxalign import __version__

        print(f"jaxalign {__version__}")
    elif command == "configs":
        configs(rest)
    elif command in COMMANDS:
        sys.argv = [program, *rest]
        runpy.run_module(f"jaxalign.{command}", run_name="__main__", alter_sys=True)
    else:
        hint = did_you_mean(command, COMMANDS)
        print(f"jaxalign: no command {command!r}{hint} (jaxalign --help lists all)", file=sys.stderr)
        raise SystemExit(2)


def usage() -> str:
    """What `jaxalign --help` prints."""
    lines = [f"  {name:10} {what}" for name, what in COMMANDS.items()]
    return "\n".join(["usage: jaxalign COMMAND ...", "", *lines, "", "jaxalign COMMAND --help tells its flags."])


def configs(arguments: Sequence[str]) -> None:
    """Lists the shipped configs with the first line of each docstring, or copies one to the current folder."""
    parser = argparse.ArgumentParser(prog="jaxalign configs", description=COMMANDS["configs"])
    parser.add_argument("--copy", metavar="NAME", help="write NAME.py to the current folder, to be edited")
    name = parser.parse_args(arguments).copy
    files = {file.stem: file for file in sorted(SHIPPED.glob("*.py"))}
    if name is None:
        for stem, file in files.items():
            print(f"{stem:16} {_first_line(file)}")
        return
    target = Path(f"{name}.py")
    if name not in files:
        parser.error(f"no config {name!r}{did_you_mean(name, files)}; there are {', '.join(files)}")
    if os.path.lexists(target):
        parser.error(f"{target} is here already; it was left as it is")
    shutil.copyfile(files[name], target)
    print(f"{target}: jaxalign train --config={target}")


def _first_line(file: Path) -> str:
    """The first line of a module's docstring, without running it."""
    return (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").partition("\n")[0]


if __name__ == "__main__":
    main()
