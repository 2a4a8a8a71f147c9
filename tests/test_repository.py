"""The house: imports go one way, the texts name what exists, large models build."""

import ast
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import timm
import tiny
import torch
from conftest import options

import eval_region
import train
from model import DeCLIP, load_vfm
from tools import visualize
from util import settings

ROOT = Path(__file__).parent.parent
SOURCES = sorted(path for pattern in ("*.py", "util/*.py", "downstream/**/*.py", "tools/*.py",
                                      "toy/*.py", "docs/*.py") for path in ROOT.glob(pattern))
PROSE = [ROOT / "README.md", *sorted(ROOT.glob("toy/*.sh")), *sorted(ROOT.glob("docs/*.md")),
         *sorted(ROOT.glob("presets/*.txt"))]
TEXTS = PROSE + SOURCES


def named(pattern: str) -> set[str]:
    """All words of the repository's texts that match."""
    return {word for path in TEXTS for word in re.findall(pattern, path.read_text())}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


# Every script with settings.
SCRIPTS = [module_name(path) for path in SOURCES if "settings.parse(" in path.read_text()]
# Rooms from the ground up. Imports go down, or stay in a room that is a folder.
LAYERS = [{"util"}, {"data"}, {"model"}, {"train", "eval_region"}, {"eval_seg"}, {"downstream"},
          {"tools"}, {"toy"}, {"docs"}]


def room_of(module: str) -> str:
    return module.split(".")[0]


def test_imports_go_one_way():
    layer = {room: height for height, rooms in enumerate(LAYERS) for room in rooms}
    arrows = set()
    for path in SOURCES:
        importer = path.relative_to(ROOT).with_suffix("").parts[0]
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            is_shared = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "SHARED"
            names += ast.literal_eval(node.value) if is_shared else []
            arrows |= {(importer, room_of(name)) for name in names if room_of(name) in layer}
    assert {("train", "model"), ("eval_seg", "eval_region"), ("data", "util")} <= arrows
    folders = {"util", "downstream", "tools", "toy"}
    wrong = {(importer, imported) for importer, imported in arrows
             if layer[imported] >= layer[importer]
             and not (importer == imported and importer in folders)}
    assert not wrong


def test_no_function_takes_more_than_six_parameters():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                names = [argument.arg for argument in given if argument.arg not in ("self", "cls")]
                assert len(names) <= 6, (path, node.name)


def test_the_front_is_what_was_asked_for():
    assert {path.stem for path in ROOT.glob("*.py")} == {
        "train", "eval_region", "eval_seg", "model", "data", "hubconf"}
    assert count_lines(ROOT / "README.md") <= 250


def count_lines(*paths: Path) -> int:
    return sum(len(path.read_text().splitlines()) for path in paths)


MAX_LINES = {"train": 265, "model": 530, "data": 280, "eval_region": 360, "eval_seg": 385}
MAX_FRONT, MAX_ALL, MAX_TASK = 1815, 16560, 120


def test_the_front_is_short():
    """What one reads to know the method."""
    lines = {name: count_lines(ROOT / f"{name}.py") for name in MAX_LINES}
    print(f"the front: {lines}, together {sum(lines.values())} lines of {MAX_FRONT}")
    assert not [name for name, count in lines.items() if count > MAX_LINES[name]]
    assert sum(lines.values()) <= MAX_FRONT


def test_the_whole_is_short():
    """All Python but tests and examples."""
    rooms = {}
    for path in SOURCES:
        room = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if room == "docs":
            continue
        rooms[room] = rooms.get(room, 0) + count_lines(path)
    print(f"{rooms}, together {sum(rooms.values())} lines of {MAX_ALL}")
    assert sum(rooms.values()) <= MAX_ALL


def task_lines(path: Path) -> int:
    """Lines of a script after its settings: without docstring, imports and settings."""
    own = settings.own_constants(importlib.import_module(module_name(path)))
    settings_end = max(node.end_lineno for node in ast.parse(path.read_text()).body
                       if isinstance(node, ast.Assign | ast.AnnAssign)
                       and ast.unparse(node).split(" ")[0].rstrip(":") in {"SHARED", *own})
    return len("\n".join(path.read_text().splitlines()[settings_end:]).strip().splitlines())


def test_a_training_of_a_task_is_short():
    """What a task adds to util/run.py."""
    trainings = [*ROOT.glob("downstream/*/train.py"), ROOT / "docs/linear_probe.py"]
    lines = {module_name(path): task_lines(path) for path in trainings}
    print(f"beside docstring, imports and settings: {lines}, of {MAX_TASK}")
    assert {"downstream.catseg.train", "downstream.fvit.train"} < set(lines)
    assert not [name for name, count in lines.items() if count > MAX_TASK]
    assert count_lines(ROOT / "docs/linear_probe.py") <= 150


# ------------------------------------------------------------------------------------- settings

def test_shared_settings_exist():
    """Every block that a SHARED names is there, and none of its settings is another's twice."""
    shared = [name for name in map(module_name, SOURCES)
              if re.search("^SHARED = ", (ROOT / f"{name.replace('.', '/')}.py").read_text(), re.M)]
    assert {"train", "eval_seg"} <= set(shared) <= set(SCRIPTS)
    for name in shared:
        module = importlib.import_module(name)
        own, homes = settings.own_constants(module), {}
        for source, blocks in module.SHARED.items():
            theirs = settings.own_constants(importlib.import_module(source))
            assert set(blocks) <= {setting.block for setting in theirs.values()}, (name, source)
            for key, setting in theirs.items():
                if setting.block in blocks:
                    homes.setdefault(key, []).append(source)
                    kinds = {setting.kind, own.get(key, setting).kind}
                    assert len(kinds) == 1, f"{key} of {name} is of another type than {source}'s"
        twice = {key: sources for key, sources in homes.items()
                 if len(sources) > 1 and key not in own}
        assert not twice, f"{name} has settings of two scripts: {twice}"


def test_every_setting_is_explained():
    for name in SCRIPTS:
        for key, setting in settings.constants(importlib.import_module(name)).items():
            assert setting.comment, (name, key)


# Options of other programs that the texts name.
OF_OTHERS = {"nproc_per_node", "nnodes", "rdzv_backend", "rdzv_endpoint", "max_restarts", "kills",
             "ranks"}


def test_options_that_the_texts_name_exist():
    """Spelled with underscores, as the settings are."""
    options = {key.lower() for name in SCRIPTS
               for key in settings.constants(importlib.import_module(name))}
    docstrings = [ast.get_docstring(ast.parse(path.read_text())) or "" for path in SOURCES
                  if path != ROOT / "util/settings.py"]      # it makes options
    words = {word for text in [*docstrings, *(path.read_text() for path in PROSE)]
             for word in re.findall(r"(?<![\w-])--([a-z][a-z0-9_-]*)", text)}
    assert {"image_size", "ckpt", "micro_batch"} <= words
    unknown = {word for word in words if not word.startswith("no-")} - options - OF_OTHERS
    assert not unknown


def test_names_of_limits_are_min_and_max():
    for path in SOURCES:
        assert not re.findall(r"\b(?:MOST|LEAST)_\w+", path.read_text()), path


def test_nothing_is_imported_only_to_be_a_setting():
    for path in SOURCES:
        assert "noqa: F401" not in path.read_text(), path


def test_only_the_toy_world_knows_toy_data():
    """Scenes are described by files, as a user's data are, and named by presets."""
    for path in SOURCES:
        text, room = path.read_text(), path.relative_to(ROOT).parts[0]
        if room not in ("toy", "docs", "tools"):
            assert not re.findall(r"""["'](?:data/toy|toy[_/]|toy["']:)""", text), path


# ------------------------------------------------------------------------------ what texts name


def test_default_weights_exist():
    assert (train.MODEL, train.PRETRAINED) in open_clip.list_pretrained()
    assert (train.MODEL, eval_region.PRETRAINED) in open_clip.list_pretrained()
    assert train.VFM_MODEL in timm.list_pretrained()


def test_models_that_are_named_exist():
    clips = named(r"\b(?:EVA02|ViT)-[BLH]-\d+(?:-[a-z0-9]+)*\b")
    assert {"EVA02-B-16", "EVA02-L-14-336", "ViT-B-16-quickgelu"} <= clips
    assert clips <= set(open_clip.list_models())
    vfms = named(r"\b(?:sam)?vit_[a-z]+_patch\d+\w*(?:\.\w+)?")
    assert {"vit_base_patch14_dinov2.lvd142m", "vit_large_patch14_dinov2.lvd142m"} <= vfms
    assert vfms <= {*timm.list_models(), *timm.list_pretrained()}


def test_tags_that_are_named_belong_to_their_models():
    pairs = named(r"--model (\S+) --pretrained ([a-z0-9_]+)")
    assert ("EVA02-L-14-336", "merged2b_s6b_b61k") in pairs
    of_hub = {(model, tag) for model, tag in pairs if ":" not in model and tag != "none"}
    assert of_hub <= set(open_clip.list_pretrained())


def test_scripts_that_are_named_exist():
    scripts = named(r"(?:python|torchrun[^`\n]*?) (\w+\.py)")
    modules = named(r"-m ((?:downstream|tools|toy|docs)(?:\.\w+)+)")
    presets = named(r"@(presets/\w+\.txt)")
    assert {"train.py", "eval_seg.py"} <= scripts
    assert {"tools.segment", "tools.bench", "toy.world", "downstream.fvit.train",
            "docs.linear_probe"} <= modules
    assert "presets/published.txt" in presets
    files = {f"{module.replace('.', '/')}.py" for module in modules}
    missing = [name for name in scripts | presets | files if not (ROOT / name).exists()]
    assert not missing


def test_files_that_the_texts_name_exist():
    """Paths such as docs/toy.md and names such as `model.py`."""
    paths = named(r"`((?:docs|toy|util|tools|tests|classes|presets)/[\w./]+\w)`")
    assert "docs/toy.md" in paths
    assert not [path for path in paths if not (ROOT / path).exists()]


def test_names_that_the_readme_gives_are_in_the_code():
    """`sample_grid` beside `data.py`: the map of the paper leads somewhere."""
    rows = re.findall(r"`(\w+\.py)`: (.+) \|", (ROOT / "README.md").read_text())
    assert len(rows) >= 5
    for file, names in rows:
        source = (ROOT / file).read_text()
        for name in re.findall(r"`([\w.]+)`", names):
            assert re.search(rf"(def |class |^){name.split('.')[-1]}\b", source, re.M), name


def test_nothing_is_executed_that_was_only_to_be_read():
    """No eval, exec or shell in any script, and every torch.load takes tensors alone."""
    forbidden = ("eval", "exec", "os.system", "pickle.load", "pickle.loads")
    for path in SOURCES:
        for call in (node for node in ast.walk(ast.parse(path.read_text()))
                     if isinstance(node, ast.Call)):
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            function = ast.unparse(call.func)
            assert function not in forbidden, path
            assert keywords.get("shell") != "True", path
            assert function != "torch.load" or keywords.get("weights_only") == "True", path


def test_a_third_loss_takes_one_function_and_one_line(images, tmp_path, monkeypatch):
    """docs/third_loss.diff, applied to a copy of train.py: the new loss is trained, logged and
    plotted."""
    shutil.copy(ROOT / "train.py", tmp_path)
    diff = (ROOT / "docs/third_loss.diff").read_text()
    assert len([line for line in diff.splitlines() if re.match(r"[+-](?![+-])", line)]) <= 10
    apply = ["git", "apply", str(ROOT / "docs/third_loss.diff")]
    assert subprocess.run(apply, cwd=tmp_path, capture_output=True).returncode == 0
    spec = importlib.util.spec_from_file_location("train", tmp_path / "train.py")
    changed = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "train", changed)
    spec.loader.exec_module(changed)
    changed.main(options(**STEP | {"steps": 2, "batch_size": 2, "log_every": 1,
                                   "model": "tiny-eva", "images": images, "image_size": 64,
                                   "crop_size": 32, "out": tmp_path / "run"}))
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and all(line["distance"] > 0 for line in lines)
    expected = lines[0]["content"] + 0.25 * lines[0]["context"] + 0.1 * lines[0]["distance"]
    assert lines[0]["loss"] == pytest.approx(expected, rel=1e-5)
    figure = visualize.curves(None, [str(tmp_path / "run")], None)
    assert {"loss", "distance", "learning rate"} < {axis.get_title() for axis in figure.axes}


def test_means_are_the_models_own():
    tag = open_clip.get_pretrained_cfg(train.MODEL, train.PRETRAINED)
    with tiny.undrawn():
        clip, vfm = DeCLIP(train.MODEL), load_vfm(train.VFM_MODEL, pretrained=False)
    assert (clip.mean, clip.std, clip.image_size) == (tag["mean"], tag["std"], 224)
    config = timm.get_pretrained_cfg(train.VFM_MODEL)
    assert (vfm.mean, vfm.std, vfm.patch_size) == (config.mean, config.std, 14)


STEP = {"vfm_model": "tiny_vfm", "vfm_pretrained": "false", "pretrained": "none", "batch_size": 1,
        "epochs": 1, "steps": 1,
        "num_workers": 0, "grid": (1, 2)}


def one_step(images, tmp_path, **given) -> dict:
    """Trains one step as the options say; returns the line of log.jsonl."""
    train.main(options(**STEP | {"images": images, "out": tmp_path / "run"} | given))
    return json.loads((tmp_path / "run" / "log.jsonl").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["EVA02-B-16", "EVA02-L-14", "EVA02-L-14-336", "ViT-B-16",
                                  "ViT-B-16-quickgelu", "ViT-B-32-quickgelu", "ViT-L-14",
                                  "ViT-L-14-336"])
def test_backbones_of_full_size(images, tmp_path, name):
    """Built with random weights: content and context of an image that is not square, and one step
    of training."""
    clip = DeCLIP(name)
    p = clip.patch_size
    with torch.inference_mode():
        content, context = clip.encode_dense(torch.randn(1, 3, 4 * p, 6 * p))
    assert content.shape == (1, 768 if "-L-" in name else 512, 4, 6) and context.shape[1] == 24
    line = one_step(images, tmp_path, model=name, image_size=8 * p, crop_size=4 * p)
    print(f"{name}: {line['memory_mb']} MB, {1 / line['images_per_second']:.1f} s a step")
    assert line["content"] > 0 and line["context"] > 0 and line["bad_steps"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", [
    "vit_base_patch8_224.dino", "vit_base_patch16_224.dino", "vit_base_patch14_dinov2.lvd142m",
    "vit_large_patch14_dinov2.lvd142m", "vit_base_patch14_reg4_dinov2.lvd142m",
    "vit_large_patch14_reg4_dinov2.lvd142m",
    "vit_base_patch16_dinov3.lvd1689m", "vit_large_patch16_dinov3.lvd1689m",
    "samvit_base_patch16.sa1b",
    "samvit_large_patch16.sa1b"])
def test_vfms_of_full_size(images, tmp_path, name):
    """Built with random weights: one step of training, in which the VFM has the student's number of
    tokens."""
    line = one_step(images, tmp_path, model="tiny-eva", vfm_model=name, image_size=64, crop_size=32)
    print(f"{name}: {line['memory_mb']} MB, {1 / line['images_per_second']:.1f} s a step")
    assert line["context"] > 0 and line["bad_steps"] == 0
    assert name in timm.list_pretrained()
