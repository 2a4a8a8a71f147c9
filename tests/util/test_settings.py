"""util/settings.py: constants of a script as its options."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from tiny import ROOT

from model import DeCLIP
from util import settings

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


def load(path: Path, text: str) -> ModuleType:
    """A module of that text, which need not be where imports are looked for."""
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def script(tmp_path) -> ModuleType:
    return load(tmp_path / "script.py", SCRIPT)


def test_defaults_are_the_constants(script):
    assert vars(settings.parse([], script)) == {"LR": 1e-5, "STEPS": None, "NAME": "a b",
                                                "FAST": False, "GRID": (1, 6),
                                                "BATCH_SIZE": 16}


def test_options_have_the_types_of_the_defaults(script):
    given = "--lr 2e-4 --steps 7 --name x --fast --grid 2 3 --batch-size 4".split()
    assert vars(settings.parse(given, script)) == {"LR": 2e-4, "STEPS": 7, "NAME": "x",
                                                   "FAST": True, "GRID": (2, 3),
                                                   "BATCH_SIZE": 4}
    assert settings.parse(["--steps", "none", "--fast", "false", "--batch_size", "5"],
                          script).STEPS is None


def test_later_options_win_over_an_argument_file(script, tmp_path):
    (tmp_path / "bad.txt").write_text("--name don't")
    with pytest.raises(SystemExit):
        settings.parse([f"@{tmp_path / 'bad.txt'}"], script)
    (tmp_path / "x.txt").write_text('# a preset\n--lr 1  --grid 2 4   # two options\n\n--name "c '
                                    'd"\n')
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
    ("--lr inf", "script.py: argument --lr: 'inf' is not of type float"),
    ("--lr nan", "script.py: argument --lr: 'nan' is not of type float"),
    ("@absent.txt", "script.py: [Errno 2] No such file or directory: 'absent.txt'"),
])
def test_errors_are_one_line(script, capsys, given, sentence):
    with pytest.raises(SystemExit) as error:
        settings.parse(given.split(), script)
    assert error.value.code == 2 and capsys.readouterr().err == sentence + "\n"


@pytest.mark.parametrize("content, sentence", [
    (b"@again.txt", "script.py: an argument file includes itself"),
    (b"\xff\xfe\x00--lr", "script.py: an argument file is not text in UTF-8")])
def test_argument_files_that_cannot_be_read(script, tmp_path, monkeypatch, capsys, content,
                                            sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "again.txt").write_bytes(content)
    with pytest.raises(SystemExit) as error:
        settings.parse(["@again.txt"], script)
    printed = capsys.readouterr().err
    assert error.value.code == 2 and printed.startswith(sentence) and printed.count("\n") == 1


HOME = '''"""Has settings that another script has, too."""
# The model, and what it is used with
NAME: str | None = None     # of the model
SIZES = (1, 2)              # of its images
# The machinery
# that a comment explains
WORKERS = 4                 # processes
OUT = "out"                 # folder
# The rest (of this script alone)
SECRET = 1                  # for nobody else
'''
OTHER = '''"""Has settings of the first script."""
# What is written
OUT = "out/other"           # of its own
# Settings of two blocks come from elsewhere
SHARED = {"home": ["The model", "The machinery"]}
LAST = 0.5                  # comes after them
'''


@pytest.fixture
def other(tmp_path, monkeypatch) -> ModuleType:
    """A script that has two of the three blocks of another, which tests know as `home`."""
    monkeypatch.setitem(sys.modules, "home", load(tmp_path / "home.py", HOME))
    return load(tmp_path / "other.py", OTHER)


def test_blocks_of_another_script_are_options_of_both(other):
    """With its defaults, types and comments; a constant of the script's own comes before."""
    assert vars(settings.parse([], other)) == {"OUT": "out/other", "LAST": 0.5, "NAME": None,
                                               "SIZES": (1, 2), "WORKERS": 4}
    words = "--name x --sizes 3 --workers 0 --out here --last 1".split()
    assert vars(settings.parse(words, other)) == {"OUT": "here", "LAST": 1.0, "NAME": "x",
                                                  "SIZES": (3,), "WORKERS": 0}
    assert settings.parse(["--name", "none"], other).NAME is None
    found, at_home = settings.constants(other), settings.constants(sys.modules["home"])
    assert all(found[name] == at_home[name] for name in ("NAME", "SIZES", "WORKERS"))
    assert (found["OUT"].comment, at_home["OUT"].comment) == ("of its own", "folder")


def test_a_changed_constant_changes_the_option_of_both(other, monkeypatch):
    monkeypatch.setattr(sys.modules["home"], "WORKERS", 7)
    assert settings.parse([], other).WORKERS == 7


def test_help_shows_blocks_by_their_headings(other, capsys):
    with pytest.raises(SystemExit):
        settings.parse(["--help"], other)
    shown = capsys.readouterr().out
    headings = [line for line in shown.splitlines() if re.fullmatch(r"\S.*:", line)]
    assert headings[-4:] == ["What is written:", "Settings of two blocks come from elsewhere:",
                             "The model:", "The machinery:"]
    assert "of the model [None]" in " ".join(shown.split()) and "for nobody else" not in shown


@pytest.mark.parametrize("word", ["--secret", "--shared"])
def test_other_blocks_stay_at_home(other, capsys, word):
    with pytest.raises(SystemExit):
        settings.parse([word, "2"], other)
    assert f"no option {word}" in capsys.readouterr().err


def test_a_block_that_is_nowhere_is_an_error(tmp_path, other):
    """Of whoever writes the script: its settings would be missing where they are read."""
    wrong = load(tmp_path / "wrong.py", OTHER.replace("The machinery", "The engine"))
    with pytest.raises(ValueError, match="home has no block 'The engine'; it has The model, The "):
        settings.parse([], wrong)


@pytest.mark.parametrize("name", ["train", "eval_seg", "downstream.fvit.train",
                                  "downstream.fvit.eval", "downstream.ov_dquo.train",
                                  "downstream.ov_dquo.eval", "downstream.ov_dquo.unknown",
                                  "downstream.catseg.train", "downstream.catseg.eval",
                                  "tools.segment", "tools.visualize", "tools.detect"])
def test_shared_blocks_of_the_repository_exist(name):
    """And bring at least one setting each that the script does not say itself."""
    script = importlib.import_module(name)
    found = settings.constants(script)
    for source, blocks in script.SHARED.items():
        at_home = settings.own_constants(importlib.import_module(source))
        for block in blocks:
            names = [name for name, setting in at_home.items() if setting.block == block]
            assert any(found[name] == at_home[name] for name in names), (source, block)


def test_an_option_without_effect_is_refused(script, tmp_path, capsys):
    """If the command line itself has it; `none` asks for nothing, and of an argument file a line is
    printed. Defaults, and settings that were never parsed, are nobody's mistake."""
    (tmp_path / "x.txt").write_text("--lr 2")
    preset, why = f"@{tmp_path / 'x.txt'}", {"LR": "is for trainings", "STEPS": "is too"}
    for words in (["--lr", "1"], ["--lr=1e-5"], [preset, "--lr", "1"]):
        with pytest.raises(ValueError, match="^LR is for trainings, so it has no effect; leave "):
            settings.refuse_unused(settings.parse(words, script), **why)
    for words in ([], ["--steps", "none"], ["--fast"]):
        settings.refuse_unused(settings.parse(words, script), **why)
    settings.refuse_unused(SimpleNamespace(LR=1, STEPS=2), **why)
    settings.refuse_unused(settings.parse(["--lr", "1"], script), LR=None)
    assert not capsys.readouterr().out
    settings.refuse_unused(settings.parse([preset], script), **why)
    assert capsys.readouterr().out == (
        "of an argument file: LR is for trainings, so it has no effect\n")
    assert "given" not in vars(settings.parse(["--lr", "1"], script))


@pytest.mark.parametrize("command, words", [
    ("eval_region --attention clip --scale 1", "SCALE is of decoupled blocks, but clip always has"),
    ("eval_region --attention k --context q", "CONTEXT is for a model without ATTENTION"),
    ("eval_region --context maskclip --scale 1", "SCALE is of decoupled blocks, but maskclip"),
    ("eval_seg --attention sclip --scale 1", "SCALE is of decoupled blocks, but sclip"),
    ("eval_seg --ckpt CKPT --pretrained openai", "PRETRAINED is for files that"),
    ("downstream.catseg.train --attention catseg --scale 1", "SCALE is of decoupled blocks"),
    ("docs.linear_probe --attention clip --context q", "CONTEXT is for a model without ATTENTION"),
    ("tools.segment --classes x --ckpt CKPT --pretrained openai", "PRETRAINED is for files"),
    ("tools.segment --classes x --context clip --scale 1", "SCALE is of decoupled blocks")])
def test_settings_of_a_model_in_vain_are_refused_by_every_script(tmp_path, monkeypatch, command,
                                                                 words):
    """Before it is loaded."""
    monkeypatch.setattr("eval_region.DeCLIP", None)
    name, *options = command.split()
    if "CKPT" in options:
        DeCLIP("tiny-vit").save(tmp_path / "declip.safetensors")
        options[options.index("CKPT")] = str(tmp_path / "declip.safetensors")
    script = importlib.import_module(name)
    cfg = settings.parse(options, script)
    with pytest.raises(ValueError, match=words):
        (script.open_shown if name == "tools.segment" else script.open_model)(cfg)


@pytest.mark.parametrize("command, words", [
    ("train --lambda 0 --vfm_model x", "VFM_MODEL is of the context loss, which LAMBDA 0"),
    ("train --lambda 0 --padding false", "PADDING is of the context loss"),
    ("train --context clip --scale 1", "SCALE is of decoupled blocks, but clip"),
    ("train --image_root x", "IMAGE_ROOT is for a json, but IMAGES is none"),
    ("train --images x/{0..9}.tar --outside_root", "OUTSIDE_ROOT is for a json"),
    ("downstream.fvit.train --dataset my.json --data x", "DATA holds the known data sets"),
    ("downstream.fvit.eval --dataset my.json --data x", "DATA holds the known data sets"),
    ("downstream.catseg.train --images my.json --data x", "DATA holds the known data sets"),
    ("eval_seg --benchmarks toy --data x", "DATA holds the known data sets"),
    ("eval_seg --benchmarks toy --threshold 0.5", "THRESHOLD is for background, which gets"),
    ("tools.reproduce --list --gpus 2", "GPUS is for runs, but --list makes none, so it has no"),
    ("tools.reproduce --render --seeds 0", "SEEDS is for runs, but --render takes all that there")])
def test_an_option_that_a_script_does_not_use_is_refused(monkeypatch, command, words):
    monkeypatch.chdir(ROOT)
    name, *options = command.split()
    with pytest.raises(SystemExit, match=words):
        importlib.import_module(name).main(options)


def test_values_out_of_range_are_one_sentence():
    cfg = SimpleNamespace(STEPS=0, SIZE=None, GRID=(3, 2))
    settings.check_min(cfg, SIZE=1)     # None is no number
    with pytest.raises(ValueError, match="STEPS is 0; it must be at least 1."):
        settings.check_min(cfg, SIZE=1, STEPS=1)
    settings.check(cfg, STEPS=(True, "anything"))
    with pytest.raises(ValueError, match=r"GRID is \(3, 2\); it must be two numbers that grow."):
        settings.check(cfg, STEPS=(True, "anything"), GRID=(False, "two numbers that grow"))


SCRIPTS = ["train", "eval_region", "eval_seg", "tools.segment", "tools.visualize", "tools.export",
           "tools.bench", "tools.detect", "tools.reproduce", "downstream.fvit.train",
           "downstream.fvit.eval",
           "downstream.ov_dquo.train", "downstream.ov_dquo.eval", "downstream.ov_dquo.unknown",
           "downstream.catseg.train", "downstream.catseg.eval", "toy.world", "toy.pretrain",
           "toy.demo"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_setting_of_the_repository_is_explained(name):
    found = settings.constants(importlib.import_module(name))
    assert found
    for constant, setting in found.items():
        assert len(setting.comment) > 5, constant


def test_both_evaluations_ask_for_the_model_in_the_same_words():
    region, seg = (settings.constants(importlib.import_module(name))
                   for name in ("eval_region", "eval_seg"))
    shared = ["CKPT", "MODEL", "PRETRAINED", "CONTEXT", "SCALE", "ATTENTION", "TEMPLATES",
              "PRECISION", "NUM_WORKERS", "CACHE", "OUT"]
    assert [region[name] for name in shared] == [seg[name] for name in shared]


@pytest.mark.parametrize("preset", sorted((ROOT / "presets").glob("*.txt")), ids=lambda p: p.stem)
def test_presets_name_options_that_exist(preset):
    """Their first line shows the command that they are for."""
    first = preset.read_text().partition("\n")[0]
    script = re.search(rf"([\w.]+) (?:@\S+ )?@presets/{preset.name}", first)[1]
    settings.parse([f"@{preset}"], importlib.import_module(script.removesuffix(".py")))


def test_argument_files_of_any_folder_and_a_number_sign_in_a_word(script, tmp_path, monkeypatch):
    """A file may name others of the repository, from any folder; # begins a comment only where a
    word begins; a word that is a file is no argument file."""
    monkeypatch.chdir(tmp_path)
    chosen = settings.parse(["@presets/fvit_train_ovlvis_l14.txt"],
                            importlib.import_module("downstream.fvit.train"))
    assert (chosen.IMAGE_SIZE, chosen.EPOCHS, chosen.DATASET) == (896, 48, "ovlvis")
    (tmp_path / "x.txt").write_text("--name my#photos   # a comment\n--lr 2 #another\n")
    assert settings.parse(["@x.txt"], script).NAME == "my#photos"
    (tmp_path / "y.txt").write_text("--name 'a # b'\n")
    assert settings.parse(["@y.txt"], script).NAME == "a # b"
    (tmp_path / "@x.png").touch()
    (tmp_path / "x.png").write_text("--lr 5")
    assert settings.parse(["@x.png"], script, positional="PHOTOS").PHOTOS == ("@x.png",)
