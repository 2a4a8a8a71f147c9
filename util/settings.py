"""The upper-case constants at the top of a script become its command-line options.

    # The optimisation
    LR = 1e-5                           # peak learning rate

gives `--lr 2e-5`. The type is that of the default (or of an annotation such as `float | None`), the
comment is its help, the heading its block. A script that has blocks of other scripts says so:

    SHARED = {"eval_region": ["The model"], "util.run": ["The machinery"]}

Their settings, with defaults, types and help, are options of both; a constant of the script's own
comes before a shared one of its name. `@presets/published.txt` reads options from a file, in the
present folder or the repository: any number a line, `#` starts a comment. Of two values for an
option the later wins. An option that has no effect is refused (`refuse_unused`).
"""

import argparse
import ast
import difflib
import importlib
import io
import math
import re
import shlex
import sys
import tokenize
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

from util import UserError, distributed
from util.files import find

BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def finite(text: str) -> float:
    """A text as a number; ValueError for infinity and nan."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError
    return number


KINDS = {"bool": lambda text: BOOLEANS[text.lower()], "int": int, "float": finite, "str": str}


class Settings(SimpleNamespace):
    """Settings by NAME. Beside them `given`, which is none of vars(): the options that were given,
    and whether on the command line itself or in an argument file alone."""
    __slots__ = ("given",)


class Constant(NamedTuple):
    """A setting as its script writes it."""
    default: object
    kind: str           # bool, int, float or str; of the elements, for a tuple
    many: bool          # a tuple
    optional: bool      # may be None
    comment: str
    block: str          # the heading above it


def constants(module: ModuleType) -> dict[str, Constant]:
    """The settings of a script: its own, and those of the blocks that SHARED names.

    A setting is an upper-case constant above the script's first function or class; tables and
    other objects are none. Raises ValueError for a block that is not there.
    """
    found = own_constants(module)
    for source, blocks in getattr(module, "SHARED", {}).items():
        theirs = own_constants(importlib.import_module(source))
        there = dict.fromkeys(setting.block for setting in theirs.values())
        missing = [block for block in blocks if block not in there]
        if missing:
            raise ValueError(f"{source} has no block {missing[0]!r}; it has {', '.join(there)}.")
        found |= {name: setting for name, setting in theirs.items()
                  if setting.block in blocks and name not in found}
    return found


def own_constants(module: ModuleType) -> dict[str, Constant]:
    """The settings that stand in a script itself."""
    # What stands below the first function need not be parsed.
    source, _, _ = Path(module.__file__).read_text(encoding="utf-8").partition("\n\n\ndef ")
    comments = {token.start: token.string.lstrip("# ")
                for token in tokenize.generate_tokens(io.StringIO(source).readline)
                if token.type == tokenize.COMMENT}
    headings = {line: text for (line, column), text in comments.items()
                if column == 0 and (line - 1, 0) not in comments}
    comments = {line: text for (line, _), text in comments.items()}
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            break
        if not isinstance(node, ast.Assign | ast.AnnAssign):
            continue
        name = ast.unparse(node.target if isinstance(node, ast.AnnAssign) else node.targets[0])
        if re.fullmatch("[A-Z][A-Z0-9_]*", name):
            above = [line for line in headings if line < node.lineno]
            block = re.split("[,:;(]", headings[max(above)])[0].strip() if above else ""
            found[name] = constant(getattr(module, name), node, comments.get(node.end_lineno, ""),
                                   block)
    return {name: setting for name, setting in found.items() if setting}


def constant(default: object, node: ast.stmt, comment: str, block: str) -> Constant | None:
    """The setting of one assignment; None if its type is none that an option can have."""
    sample = default[0] if isinstance(default, tuple) and default else default
    is_annotated = isinstance(node, ast.AnnAssign)
    annotation = ast.unparse(node.annotation) if is_annotated else type(sample).__name__
    kind = re.sub(r"tuple\[(\w+), \.\.\.\]", r"\1", annotation).split(" |")[0]
    if kind not in KINDS:
        return None
    return Constant(default, kind, isinstance(default, tuple), "None" in annotation, comment, block)


def converter(kind: str, optional: bool) -> Callable[[str], object]:
    """A function from an option's text to its value; argparse reports a text that does not fit."""
    def convert(text: str) -> object:
        try:
            return None if optional and text.lower() == "none" else KINDS[kind](text)
        except (ValueError, KeyError):
            expected = f"{'None or ' if optional else ''}of type {kind}"
            raise argparse.ArgumentTypeError(f"{text!r} is not {expected}") from None
    return convert


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors and argument files of any layout."""

    def expand(self, words: Sequence[str]) -> list[str]:
        """Words with those of the argument files that they name, which may name others.

        A word such as `@x.png` is no argument file where there is a file of that name.
        """
        out = []
        for word in words:
            if not word.startswith("@") or Path(word).is_file():
                out.append(word)
                continue
            try:
                for line in find(word[1:]).read_text(encoding="utf-8").splitlines():
                    out += self.expand(shlex.split(without_comment(line)))
            except RecursionError:
                self.error("an argument file includes itself; remove that line")
            except UnicodeDecodeError as error:
                self.error(f"an argument file is not text in UTF-8 ({error.reason}); write one "
                           "option a line")
            except ValueError as error:
                self.error(f"an argument file has a line that can't be split ({error}): {line}")
            except OSError as error:
                self.error(str(error))
        return out

    def error(self, message: str) -> None:
        unknown = re.search(r"unrecognized arguments: (--[^\s=]+)", message)
        if unknown:
            near = difflib.get_close_matches(unknown[1], self._option_string_actions, n=1)
            advice = f"; did you mean {near[0]}?" if near else "; --help lists them all"
            message = f"no option {unknown[1]}{advice}"
        elif message.endswith(".tar"):
            message += "; put a pattern such as {00..99}.tar in quotes"
        self.exit(2, f"{self.prog}: {message}\n")


def parse(argv: list[str] | None, script: ModuleType, positional: str | None = None) -> Settings:
    """The settings of `script`, changed by `argv` (None: the command line), by NAME.

    positional: a name for the words of the command line that follow no option; a tuple of them.
    Exits with status 2 and one line on an unknown option, a value of the wrong type or a missing
    argument file.
    """
    parser = Parser(prog=Path(script.__file__).name, description=script.__doc__,
                    allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    groups = {}
    for name, setting in constants(script).items():
        if setting.block not in groups:
            groups[setting.block] = parser.add_argument_group(setting.block)
        add_option(groups[setting.block], name, setting)
    if positional:
        parser.add_argument(positional, nargs="+", metavar=positional.lower())
    typed = sys.argv[1:] if argv is None else argv
    argv = parser.expand(typed)
    chosen = parser.parse_intermixed_args(argv) if positional else parser.parse_args(argv)
    found = Settings(**{name: tuple(value) if isinstance(value, list) else value
                        for name, value in vars(chosen).items()})
    found.given = {action.dest: is_typed for is_typed, words in ((False, argv), (True, typed))
                   for word in words
                   if (action := parser._option_string_actions.get(word.partition("=")[0]))}
    return found


def without_comment(line: str) -> str:
    """A line up to a # that begins a word."""
    quote, before = "", " "
    for place, letter in enumerate(line):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter == "#" and before.isspace():
            return line[:place]
        before = letter
    return line


def add_option(group: argparse._ArgumentGroup, name: str, setting: Constant) -> None:
    """`--image_size`, also spelled `--image-size`, for IMAGE_SIZE."""
    spellings = dict.fromkeys([f"--{name.lower()}", f"--{name.lower().replace('_', '-')}"])
    shown = " ".join(map(str, setting.default)) if setting.many else setting.default
    extra = {}
    if setting.many:
        extra = {"nargs": "+"}
    elif setting.kind == "bool":
        extra = {"nargs": "?", "const": True}
    group.add_argument(*spellings, dest=name, default=setting.default,
                       metavar=setting.kind.upper(),
                       type=converter(setting.kind, setting.optional),
                       help=f"{setting.comment} [{shown}]".replace("%", "%%").strip(), **extra)


def show(settings: SimpleNamespace) -> str:
    """The settings as a block of `NAME = value` lines, printed when a script starts."""
    width = max(map(len, vars(settings)))
    return "\n".join(f"{name:{width}} = {value!r}" for name, value in vars(settings).items())


def check_min(cfg: SimpleNamespace, **least: float) -> None:
    """Raises UserError on a setting below its least value."""
    for name, limit in least.items():
        value = getattr(cfg, name)
        if value is not None and not value >= limit:
            raise UserError(f"{name} is {value}; it must be at least {limit}.")


def check(cfg: SimpleNamespace, **expected: tuple[bool, str]) -> None:
    """Raises UserError on the first setting that does not fit; beside it, what it must be."""
    for name, (fits, what) in expected.items():
        if not fits:
            raise UserError(f"{name} is {getattr(cfg, name)!r}; it must be {what}.")


def refuse_unread(cfg: SimpleNamespace, script: ModuleType, modes: Sequence[str],
                  read_by: dict[str, str]) -> None:
    """As refuse_unused, of the settings of a script that none of the `modes` of this run reads.

    read_by: of a setting or a block of them, the modes that read it, with spaces between.
    """
    refuse_unused(cfg, **{
        name: f"is for {readers.replace(' ', ', ') or 'other scripts'}"
        for name, setting in constants(script).items()
        if (readers := read_by.get(name, read_by.get(setting.block))) is not None
        and {*readers.split()}.isdisjoint(modes)})


def refuse_unused(cfg: SimpleNamespace, **why: str | bool | None) -> None:
    """Raises UserError on an option that was given and has no effect. `why` says it of each, with
    the option as the subject; nothing of one that has.

    `none` asks for nothing. Of an option that an argument file brings along, a line is printed
    instead: presets serve several commands.
    """
    for name, reason in why.items():
        is_typed = getattr(cfg, "given", {}).get(name)
        if not reason or is_typed is None or getattr(cfg, name) is None:
            continue
        if is_typed:
            raise UserError(f"{name} {reason}, so it has no effect; leave --{name.lower()} out.")
        if distributed.is_main():
            print(f"of an argument file: {name} {reason}, so it has no effect")
