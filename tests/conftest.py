"""What several tests share: tiny models, and data sets of drawn scenes in their original
layouts."""

import gc
import json
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

# Torch is imported by fixtures: the process that only hands out tests does without.
os.environ["HF_HUB_OFFLINE"] = "1"      # a test that would download fails instead
# Tests compare to the bit, and two ranks with one process: on the CPU, where there is a GPU, too.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ["OMP_NUM_THREADS"] = "1"     # threads cost tiny models more than they give
sys.path.insert(0, str(Path(__file__).parent))
SIZES = [(64, 64), (48, 80), (80, 40), (64, 96), (33, 65)]      # height, width


def draw_scene(seed: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """An image (height, width, 3) and the class of its pixels: 0 a noisy ground, 1 a disc, 2 a
    box."""
    rng = np.random.default_rng(seed)
    image = rng.normal(90, 12, (height, width, 3)) + rng.normal(0, 30, 3)
    label = np.zeros((height, width), np.uint8)
    y, x = np.mgrid[:height, :width]
    disc = (y - height * .3) ** 2 + (x - width * .3) ** 2 < (min(height, width) * .22) ** 2
    box = (abs(y - height * .7) < height * .18) & (abs(x - width * .65) < width * .2)
    for value, where in ((1, disc), (2, box)):
        label[where] = value
        image[where] = rng.uniform(0, 255, 3) + rng.normal(0, 8, (where.sum(), 3))
    return image.clip(0, 255).astype(np.uint8), label


def pytest_addoption(parser) -> None:
    parser.addoption("--kills", type=int, default=2,
                     help="how often the training of util/test_run.py is killed")
    parser.addoption("--ranks", type=int, default=1, help="the processes of that training")


def pytest_collection_finish() -> None:
    """What is imported by now stays: the garbage collector need not go through it again, and the
    processes of warm.py share it."""
    gc.freeze()
    if warm := sys.modules.get("warm"):
        warm.server()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Random models are the same at every run."""
    import tiny  # noqa: F401
    import torch
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def uncached(monkeypatch) -> None:
    """Text embeddings are computed anew in every test that does not ask for a cache."""
    monkeypatch.setattr("eval_region.CACHE", None)


@pytest.fixture(scope="session")
def scenes() -> list[tuple[np.ndarray, np.ndarray]]:
    """Drawn images and their pixels' classes, of several shapes."""
    return [draw_scene(seed, *size) for seed, size in enumerate(SIZES)]


@pytest.fixture(scope="session")
def images(tmp_path_factory, scenes) -> Path:
    """A folder of the scenes as PNGs, one of them in a folder below."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "more").mkdir()
    for index, (image, _) in enumerate(scenes):
        Image.fromarray(image).save(folder / ("more" if index == 0 else "") / f"{index}.png")
    return folder


@pytest.fixture(scope="session")
def shards(tmp_path_factory, images) -> str:
    """The same images with captions in two tar shards, and one file that is no image; a
    pattern."""
    folder = tmp_path_factory.mktemp("shards")
    (folder / "bad.png").write_bytes(b"no image")
    (folder / "caption.txt").write_text("a drawn scene")
    paths = [*sorted(images.rglob("*.png")), folder / "bad.png"]
    for number in range(2):
        with tarfile.open(folder / f"{number:05}.tar", "w") as tar:
            for path in paths[number::2]:
                tar.add(path, path.name)
                tar.add(folder / "caption.txt", f"{path.stem}.txt")
    return f"{folder}/{{00000..00001}}.tar"


@pytest.fixture(scope="session")
def panoptic(tmp_path_factory, scenes) -> dict[str, str]:
    """The scenes as COCO panoptic: options of eval_region.py. Ids use all three colour channels."""
    folder = tmp_path_factory.mktemp("panoptic")
    annotations = []
    for index, (image, label) in enumerate(scenes):
        Image.fromarray(image).save(folder / f"{index}.jpg", quality=95)
        ids = np.array([70000, 300, 5 + index])[label]
        rgb = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1)
        Image.fromarray(rgb.astype(np.uint8)).save(folder / f"{index}.png")
        regions = []
        for value, category in enumerate((200, 7, 9)):
            ys, xs = np.nonzero(label == value)
            bbox = [int(xs.min()), int(ys.min()), int(np.ptp(xs)) + 1, int(np.ptp(ys)) + 1]
            regions.append({"id": int(ids[ys[0], xs[0]]), "category_id": category, "bbox": bbox,
                            "iscrowd": 0, "area": len(ys)})
        annotations.append({"image_id": index, "file_name": f"{index}.png",
                            "segments_info": regions})
    categories = [{"id": 7, "name": "disc", "isthing": 1}, {"id": 9, "name": "box", "isthing": 1},
                  {"id": 100, "name": "sea", "isthing": 0},
                  {"id": 200, "name": "ground-other", "isthing": 0}]
    listed = [{"id": index, "file_name": f"{index}.jpg"} for index in range(len(scenes))]
    content = {"images": listed, "annotations": annotations, "categories": categories}
    (folder / "panoptic.json").write_text(json.dumps(content))
    return {"annotations": str(folder / "panoptic.json"), "pngs": str(folder),
            "images": str(folder)}


@pytest.fixture(scope="session")
def voc(tmp_path_factory, scenes) -> Path:
    """The scenes as Pascal VOC 2012: ground is background, discs are birds (3), boxes buses (6), a
    border is void."""
    folder = tmp_path_factory.mktemp("data")
    root = folder / "VOCdevkit" / "VOC2012"
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / name).mkdir(parents=True)
    for index, (image, label) in enumerate(scenes):
        Image.fromarray(image).save(root / "JPEGImages" / f"s_{index}.jpg", quality=95)
        values = np.array([0, 3, 6], np.uint8)[label]
        values[0] = 255
        png = Image.fromarray(values).convert("P")
        png.putdata(values.flatten().tolist())
        png.save(root / "SegmentationClass" / f"s_{index}.png")
    (root / "ImageSets/Segmentation/val.txt").write_text(
        "".join(f"s_{index}\n" for index in range(len(scenes)))
    )
    return folder


@pytest.fixture
def toy_home(tmp_path, monkeypatch) -> Path:
    """The present folder of a test that draws toy scenes of its own: toy/ is there, but no data/.

    The descriptions of scenes are copies, because paths in them are relative to them.
    """
    (tmp_path / "toy").mkdir()
    toy = Path(__file__).parent.parent / "toy"
    for path in toy.glob("*.json"):
        shutil.copy(path, tmp_path / "toy")
    for model in ("clip", "vfm"):
        (tmp_path / "toy" / model).symlink_to(toy / model)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def options(**given) -> list[str]:
    """{name: value} as command-line options."""
    out = []
    for name, value in given.items():
        out += [f"--{name}", *map(str, value if isinstance(value, (list, tuple)) else [value])]
    return out


def preset(folder: Path, **given) -> str:
    """The same as an argument file, whose options are only noted where they have no effect."""
    (folder / "preset.txt").write_text(shlex.join(options(**given)))
    return f"@{folder / 'preset.txt'}"


def succeeds(done: subprocess.CompletedProcess) -> str:
    """What a finished process printed, if it ended well."""
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
