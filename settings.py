"""The upper-case constants at the top of a script become its command-line options.

    LR = 1e-5  # peak learning rate

gives `--lr 2e-5`; the type is that of the default (or of an annotation such as `float | None`), the comment is its
help. `@presets/x.txt` reads options from a file: any number a line, `#` starts a comment. Later options win.
"""

import argparse
import ast
import difflib
import io
import re
import shlex
import sys
import tokenize
from types import ModuleType, SimpleNamespace


def constants(source: str) -> dict[str, tuple]:
    """{NAME: (default, type, is a list, may be None, comment)} of the constants above the first function or class."""
    comments, found = {}, {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.lstrip("# ")
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            break
        if not isinstance(node, (ast.Assign, ast.AnnAssign)):
            continue
        target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
        if isinstance(target, ast.Name) and re.fullmatch("[A-Z][A-Z0-9_]*", target.id):
            default = ast.literal_eval(node.value)
            sample = default[0] if isinstance(default, tuple) else default
            kind = ast.unparse(node.annotation) if isinstance(node, ast.AnnAssign) else type(sample).__name__
            found[target.id] = (default, kind.split(" |")[0], isinstance(default, tuple), "None" in kind,
                                comments.get(node.end_lineno, ""))
    return found


def converter(kind: str, optional: bool):
    """A function from an option's text to its value; argparse names `kind` when the text does not fit."""
    def convert(text: str):
        if optional and text.lower() == "none":
            return None
        if kind == "bool":
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]
        return {"int": int, "float": float, "str": str}[kind](text)

    def checked(text: str):
        try:
            return convert(text)
        except (ValueError, KeyError):
            raise argparse.ArgumentTypeError(f"{text!r} is not {'None or ' if optional else ''}of type {kind}") from None
    return checked


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, `--image-size` for `--image_size`, and argument files of any layout."""

    def convert_arg_line_to_args(self, line: str) -> list[str]:
        return shlex.split(line, comments=True)

    def error(self, message: str):
        unknown = re.search(r"unrecognized arguments: (--[^\s=]+)", message)
        if unknown:
            near = difflib.get_close_matches(unknown[1], self._option_string_actions, n=1)
            message = f"no option {unknown[1]}" + (f"; did you mean {near[0]}?" if near else "; --help lists them all")
        self.exit(2, f"{self.prog}: {message}\n")


def parse(script: ModuleType, argv: list[str] | None = None) -> SimpleNamespace:
    """The settings of `script` (a module), changed by `argv` (default: the command line), as a namespace of NAMES.

    Exits with status 2 and one line on an unknown option, a value of the wrong type or a missing argument file.
    """
    with open(script.__file__, encoding="utf-8") as file:
        source = file.read()
    name = script.__file__.replace("\\", "/").rsplit("/", 1)[-1]
    parser = Parser(prog=name, description=script.__doc__, fromfile_prefix_chars="@", allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    for constant, (default, kind, many, optional, comment) in constants(source).items():
        spellings = dict.fromkeys([f"--{constant.lower()}", f"--{constant.lower().replace('_', '-')}"])
        shown = " ".join(map(str, default)) if many else default
        extra = {"nargs": "+"} if many else {"nargs": "?", "const": True} if kind == "bool" else {}
        parser.add_argument(*spellings, dest=constant, default=default, type=converter(kind, optional),
                            metavar=kind.upper(), help=f"{comment} [{shown}]".replace("%", "%%").strip(), **extra)
    return parser.parse_args(sys.argv[1:] if argv is None else argv, SimpleNamespace())


def show(settings: SimpleNamespace) -> str:
    """The settings as a block of `NAME = value` lines, printed when a script starts."""
    width = max(map(len, vars(settings)))
    return "\n".join(f"{name:{width}} = {value!r}" for name, value in vars(settings).items())
