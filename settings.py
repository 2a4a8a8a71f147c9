"""The upper-case constants at the top of a script become its command-line options.

    LR = 1e-5  # peak learning rate

gives `--lr 2e-5`; the type is that of the default (or of an annotation such as `float | None`), the comment is its
help. `@presets/published.txt` reads options from a file: any number a line, `#` starts a comment. Later options win.
"""

import argparse
import ast
import difflib
import io
import re
import shlex
import sys
import tokenize
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple


class UserError(ValueError):
    """What a user can mend, in one sentence: what was found, what was expected, what to do. Scripts end with it."""


BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
KINDS = {"bool": lambda text: BOOLEANS[text.lower()], "int": int, "float": float, "str": str}


class Constant(NamedTuple):
    """A setting as its script writes it."""
    default: object
    kind: str           # bool, int, float or str; of the elements, for a tuple
    many: bool          # a tuple
    optional: bool      # may be None
    comment: str


def constants(module: ModuleType) -> dict[str, Constant]:
    """The upper-case constants above a module's first function or class; tables and other objects are no settings."""
    source = Path(module.__file__).read_text(encoding="utf-8")
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            break
        if not isinstance(node, ast.Assign | ast.AnnAssign):
            continue
        name = ast.unparse(node.target if isinstance(node, ast.AnnAssign) else node.targets[0])
        if not re.fullmatch("[A-Z][A-Z0-9_]*", name):
            continue
        default = getattr(module, name)
        sample = default[0] if isinstance(default, tuple) else default
        annotation = ast.unparse(node.annotation) if isinstance(node, ast.AnnAssign) else type(sample).__name__
        kind = annotation.split(" |")[0]
        if kind in KINDS:
            found[name] = Constant(default, kind, isinstance(default, tuple), "None" in annotation,
                                   comments.get(node.end_lineno, ""))
    return found


def converter(kind: str, optional: bool):
    """A function from an option's text to its value; argparse names `kind` when the text does not fit."""
    def convert(text: str):
        if optional and text.lower() == "none":
            return None
        return KINDS[kind](text)

    def checked(text: str):
        try:
            return convert(text)
        except (ValueError, KeyError):
            raise argparse.ArgumentTypeError(f"{text!r} is not {'None or ' if optional else ''}of type {kind}") from None
    return checked


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, `--image-size` for `--image_size`, and argument files of any layout."""

    def convert_arg_line_to_args(self, line: str) -> list[str]:
        try:
            return shlex.split(line, comments=True)
        except ValueError as error:
            self.error(f"an argument file has a line that can't be split ({error}): {line}")

    def error(self, message: str):
        unknown = re.search(r"unrecognized arguments: (--[^\s=]+)", message)
        if unknown:
            near = difflib.get_close_matches(unknown[1], self._option_string_actions, n=1)
            message = f"no option {unknown[1]}" + (f"; did you mean {near[0]}?" if near else "; --help lists them all")
        self.exit(2, f"{self.prog}: {message}\n")


def parse(argv: list[str] | None, script: ModuleType, *shared: ModuleType, positional: str | None = None) -> SimpleNamespace:
    """The constants of `script` (a module) and of `shared` ones, changed by `argv` (None: the command line), by NAME.

    positional: a name for what stands in the command line without an option, one word or several; it becomes a tuple.
    Exits with status 2 and one line on an unknown option, a value of the wrong type or a missing argument file.
    """
    parser = Parser(prog=Path(script.__file__).name, description=script.__doc__, fromfile_prefix_chars="@",
                    allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    found = {}
    for module in (script, *shared):
        found |= constants(module)
    for name, setting in found.items():
        spellings = dict.fromkeys([f"--{name.lower()}", f"--{name.lower().replace('_', '-')}"])
        shown = " ".join(map(str, setting.default)) if setting.many else setting.default
        extra = {"nargs": "+"} if setting.many else {"nargs": "?", "const": True} if setting.kind == "bool" else {}
        parser.add_argument(*spellings, dest=name, default=setting.default, metavar=setting.kind.upper(),
                            type=converter(setting.kind, setting.optional),
                            help=f"{setting.comment} [{shown}]".replace("%", "%%").strip(), **extra)
    if positional:
        parser.add_argument(positional, nargs="+", metavar=positional.lower())
    argv = sys.argv[1:] if argv is None else argv
    given = parser.parse_intermixed_args(argv) if positional else parser.parse_args(argv)
    return SimpleNamespace(**{name: tuple(value) if isinstance(value, list) else value for name, value in vars(given).items()})


def show(settings: SimpleNamespace) -> str:
    """The settings as a block of `NAME = value` lines, printed when a script starts."""
    width = max(map(len, vars(settings)))
    return "\n".join(f"{name:{width}} = {value!r}" for name, value in vars(settings).items())


def check_least(cfg: SimpleNamespace, **least: float) -> None:
    """Raises UserError on a setting below its least value."""
    for name, limit in least.items():
        value = getattr(cfg, name)
        if value is not None and not value >= limit:
            raise UserError(f"{name} is {value}; it must be at least {limit}.")
