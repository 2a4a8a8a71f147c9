"""settings.py: constants of a script as its options."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

import settings

SCRIPT = '''"""Does something useful."""
LR = 1e-5                   # peak learning rate, 100 % of it
STEPS: int | None = None    # how many
NAME = "a b"                # of the run
FAST = False                # or slow
GRID = (1, 6)               # range
BATCH_SIZE = 2 * 8          # images
TABLE = {"x": 1}            # no setting
_PRIVATE = 3
def main(): pass
LATER = 1
'''


@pytest.fixture
def script(tmp_path) -> ModuleType:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    spec = importlib.util.spec_from_file_location("script", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_defaults_are_the_constants(script):
    assert vars(settings.parse([], script)) == {"LR": 1e-5, "STEPS": None, "NAME": "a b", "FAST": False, "GRID": (1, 6),
                                                "BATCH_SIZE": 16}


def test_options_have_the_types_of_the_defaults(script):
    given = "--lr 2e-4 --steps 7 --name x --fast --grid 2 3 --batch-size 4".split()
    assert vars(settings.parse(given, script)) == {"LR": 2e-4, "STEPS": 7, "NAME": "x", "FAST": True, "GRID": (2, 3),
                                                   "BATCH_SIZE": 4}
    assert settings.parse(["--steps", "none", "--fast", "false", "--batch_size", "5"], script).STEPS is None


def test_later_options_win_over_an_argument_file(script, tmp_path):
    (tmp_path / "bad.txt").write_text("--name don't")
    with pytest.raises(SystemExit):
        settings.parse([f"@{tmp_path / 'bad.txt'}"], script)
    (tmp_path / "x.txt").write_text('# a preset\n--lr 1  --grid 2 4   # two options\n\n--name "c d"\n')
    chosen = settings.parse([f"@{tmp_path / 'x.txt'}", "--lr", "3"], script)
    assert (chosen.LR, chosen.GRID, chosen.NAME) == (3, (2, 4), "c d")


def test_help_shows_comments(script, capsys):
    with pytest.raises(SystemExit):
        settings.parse(["--help"], script)
    shown = " ".join(capsys.readouterr().out.split())
    assert "Does something useful" in shown and "peak learning rate, 100 % of it [1e-05]" in shown


@pytest.mark.parametrize("given, sentence", [
    ("--lrr 3", "script.py: no option --lrr; did you mean --lr?"),
    ("--zzzzz", "script.py: no option --zzzzz; --help lists them all"),
    ("--lr fast", "script.py: argument --lr: 'fast' is not of type float"),
    ("--steps 1.5", "script.py: argument --steps: '1.5' is not None or of type int"),
    ("--fast maybe", "script.py: argument --fast: 'maybe' is not of type bool"),
    ("stray", "script.py: unrecognized arguments: stray"),
    ("@absent.txt", "script.py: [Errno 2] No such file or directory: 'absent.txt'"),
])
def test_errors_are_one_line(script, capsys, given, sentence):
    with pytest.raises(SystemExit) as error:
        settings.parse(given.split(), script)
    assert error.value.code == 2 and capsys.readouterr().err == sentence + "\n"


@pytest.mark.parametrize("name", ["train", "eval_region", "eval_seg", "evaluation", "toy", "demo", "table1", "export",
                                  "segment", "visualize"])
def test_every_setting_of_the_repository_is_explained(name):
    sys.path.insert(0, str(Path(__file__).parent.parent))
    for constant, setting in settings.constants(importlib.import_module(name)).items():
        assert len(setting.comment) > 5, constant


@pytest.mark.parametrize("preset", sorted((Path(__file__).parent.parent / "presets").glob("*.txt")), ids=lambda path: path.stem)
def test_presets_name_options_that_exist(preset):
    import eval_region
    import eval_seg
    import evaluation
    import train
    scripts = {"region": (eval_region, evaluation), "seg": (eval_seg, evaluation)}
    settings.parse([f"@{preset}"], *scripts.get(preset.stem.split("_")[-1], (train,)))
