"""visualize.py: attention rows sum to one, hot spots are where the maxima are, and every kind of
figure is drawn."""

import json
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import options, preset
from PIL import Image
from test_model import images, randomize
from tiny import ROOT

from model import DeCLIP, load_vfm
from tools import figures, visualize
from tools.visualize import attention_maps
from toy import world
from util import settings
from util.results import write_result
from util.run import LOG_FIELDS

TOY = {"model": f"local-dir:{ROOT / 'toy/clip'}", "vfm_model": f"local-dir:{ROOT / 'toy/vfm'}",
       "size": 128, "scale": 0.7}
GRIDS = [(16, 16), (10, 16), (16, 6)]


@pytest.fixture(autouse=True)
def at_home(monkeypatch):
    """The toy CLIP's tokenizer is named as seen from the repository."""
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    """A scene that is wider than high, as a file and as a tensor."""
    path = tmp_path_factory.mktemp("photo") / "scene.png"
    Image.fromarray(world.draw_scene(1, 160).image[:100]).save(path)
    return path


@pytest.fixture(scope="module")
def shown() -> list[visualize.Shown]:
    clip = DeCLIP(f"local-dir:{ROOT / 'toy/clip'}", "own", scale=0.7)
    return [visualize.Shown("CLIP", clip.visual, "clip"),
            visualize.Shown("DeCLIP", clip.visual, "q"),
            visualize.Shown("VFM", load_vfm(f"local-dir:{ROOT / 'toy/vfm'}"))]


@pytest.mark.parametrize("grid", GRIDS)
@torch.inference_mode()
def test_attention_rows_sum_to_one(shown, photo, grid):
    """Each model's own number of tokens; CLIP and DeCLIP differ in the last block only."""
    image = visualize.read_image(photo)
    for row in shown:
        maps = row.maps(image, grid)
        assert len(maps) == len(row.model.trunk.blocks)
        for weights in maps:
            assert weights.shape == (row.model.num_prefix_tokens + grid[0] * grid[1],) * 2
            torch.testing.assert_close(weights.sum(dim=1), torch.ones(len(weights)))
    clip, declip = (row.maps(image, grid) for row in shown[:2])
    assert all(torch.equal(a, b) for a, b in zip(clip[:-1], declip[:-1]))
    assert not torch.allclose(clip[-1], declip[-1], atol=1e-3)


@pytest.mark.parametrize("name", ["tiny-eva", "tiny-vit"])
@torch.inference_mode()
def test_attention_maps_are_what_the_blocks_compute(name):
    """Where all heads have one V, a map times V is the mean of the fused block's heads."""
    clip, x, seen = DeCLIP(name), images(48, 80), []
    attn = clip.visual.trunk.blocks[-1].attn
    v = clip.visual.family.projection("v")
    v.weight.copy_(v.weight[:16].repeat(3, 1))
    v.bias.copy_(v.bias[:16].repeat(3))
    handles = [module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
               for module in (attn, attn.norm)]
    before = clip.encode_image(x)
    for handle in handles:
        handle.remove()
    normed, heads = seen
    maps = attention_maps(clip.visual, x, "clip")
    assert len(maps) == 3
    for rows in maps:
        assert rows.shape == (2, 61, 61)
        torch.testing.assert_close(rows.sum(dim=2), torch.ones(2, 61))
    torch.testing.assert_close(maps[-1] @ (clip.visual.family.by_heads(
                                   clip.visual.family.projection("v")(normed)))[:, 0],
                               heads.unflatten(2, (3, 16)).mean(dim=2), rtol=1e-4, atol=1e-5)
    # Afterwards the tower is as it was.
    assert torch.equal(clip.encode_image(x), before)
    assert all(block.attn.fused_attn for block in clip.visual.trunk.blocks)


@pytest.mark.parametrize("attention", ["maskclip", "clearclip", "q", "k", "qk"])
@torch.inference_mode()
def test_attention_maps_of_the_last_block_give_the_content(attention):
    """Times V, projected, they are what encode_dense returns (of qk their mean, not the sum)."""
    clip, x = DeCLIP("tiny-vit", scale=0.5), images(48, 80)
    block = clip.visual.trunk.blocks[-1]
    block.attn.num_heads, block.attn.head_dim, block.attn.scale = 1, 48, 48**-0.5
    clip.visual.family.num_heads = 1
    rows = attention_maps(clip.visual, x, attention)[-1]
    y, extra, _ = clip.visual.embed(x)
    for earlier in clip.visual.trunk.blocks[:-1]:
        y = earlier(y)
    value = rows @ clip.visual.family.heads("v", y)["v"][:, 0]
    out = block.attn.proj(2 * value if attention == "qk" else value)
    if attention == "maskclip":
        out = y + out
        out = out + block.mlp(block.norm2(out))
    content = clip.visual.project(out)[:, 1:].mT.unflatten(2, (6, 10))
    torch.testing.assert_close(content, clip.encode_dense(x, attention)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["tiny-pool", "tiny-pe"])
@torch.inference_mode()
def test_of_a_tower_that_pools_the_figure_of_cls_ends_with_the_probe(name, photo, tmp_path,
                                                                     monkeypatch):
    """Where all heads have one V, its map times V is what the head projects. Shown are the last
    layer of a tower without [CLS], all those of one with it."""
    clip, x, seen, drawn = randomize(DeCLIP(name)), images(48, 80), [], []
    head, v = clip.visual.trunk.attn_pool, clip.visual.family.projection("v")
    d = 48 // head.num_heads
    v.weight.copy_(v.weight[:d].repeat(head.num_heads, 1))
    v.bias.copy_(v.bias[:d].repeat(head.num_heads))
    for module in (head, head.proj):
        module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    clip.encode_image(x)
    tokens, heads = seen
    for attention in ("clip", "q"):
        last = attention_maps(clip.visual, x, attention, of_cls=True)[-1]
        torch.testing.assert_close(last @ v(tokens)[..., :d],
                                   heads.unflatten(2, (-1, d)).mean(dim=2), rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(visualize, "panels", lambda subject, rows, *_, **__: drawn.extend(rows)
                        or plt.figure())
    visualize.main(["cls", str(photo), *options(model=name, pretrained="none", vfm_model="none",
                                                figure=tmp_path / "x.png")])
    layers = [2] if name == "tiny-pool" else [0, 1, 2]
    assert [[layer for layer, _ in maps] for _, maps in drawn] == [layers] * 2


@torch.inference_mode()
def test_attention_maps_of_a_vfm_have_its_registers():
    vfm = load_vfm("tiny_vfm", pretrained=False)
    maps = attention_maps(vfm, images(28, 42))
    assert (len(maps), vfm.num_prefix_tokens) == (2, 3)
    for rows in maps:
        assert rows.shape == (2, 3 + 24, 3 + 24)
        torch.testing.assert_close(rows.sum(dim=2), torch.ones(2, 27))


@pytest.mark.parametrize("size", [(100, 160), (128, 128), (150, 60)],
                         ids=["wide", "square", "tall"])
def test_the_hot_spot_is_where_the_maximum_is(size):
    """A map with one peak, drawn and read back: the brightest pixel lies in the peak's token."""
    grid = size[0] // 10, size[1] // 10
    values = torch.zeros(grid)
    values[2, grid[1] - 2] = 1
    subject = visualize.Subject("a.jpg", torch.zeros(3, *size).byte(), None)
    figure = visualize.panels(subject, [("model", [(0, values)])], "title", "unit", vmin=0, vmax=1)
    figure.canvas.draw()
    axis = figure.axes[1]
    box = axis.get_window_extent()
    pixels = torch.from_numpy(np.asarray(figure.canvas.buffer_rgba()).copy())[..., :3].float()
    height = pixels.shape[0]
    inside = pixels[int(height - box.y1):int(height - box.y0), int(box.x0):int(box.x1)]
    away = (inside - torch.tensor(plt.get_cmap("viridis")(1.0)[:3]) * 255).norm(dim=2)
    ys, xs = (away < 3).nonzero().float().mean(dim=0) / torch.tensor(inside.shape[:2])
    assert ys * grid[0] == pytest.approx(2.5, abs=0.3)
    assert xs * grid[1] == pytest.approx(grid[1] - 1.5, abs=0.3)
    plt.close(figure)


def test_the_photograph_is_there_once_and_last_layers_stand_together():
    """Of a model of 3 layers and one of 2, the last columns are the last layers."""
    subject = visualize.Subject("a.jpg", torch.zeros(3, 20, 30).byte(), (3, 4))
    rows = [("CLIP", [(layer, torch.zeros(2, 3)) for layer in range(3)]),
            ("VFM", [(layer, torch.zeros(2, 3)) for layer in range(2)])]
    figure = visualize.panels(subject, rows, "title", "unit", vmin=0, vmax=1)
    figure.canvas.draw()
    titles = [axis.get_title() for axis in figure.axes[:7]]
    assert titles == ["a.jpg", "layer 1", "layer 2", "layer 3", "", "layer 1", "layer 2"]
    last = figure.axes[3].get_position().x0, figure.axes[6].get_position().x0
    assert last[0] == pytest.approx(last[1], abs=1e-3)
    assert figure.axes[4].get_ylabel() == "VFM"
    plt.close(figure)


def test_precision_is_that_of_the_maps(shown, photo):
    """bf16 rounds maps and tokens a little; they come back in float32."""
    image = visualize.read_image(photo)
    clip = shown[1]
    rounded = visualize.Shown("DeCLIP", clip.model, "q", "bf16")
    for one, other in zip((*clip.maps(image, (10, 16)), *clip.tokens(image, (10, 16))),
                          (*rounded.maps(image, (10, 16)), *rounded.tokens(image, (10, 16)))):
        assert other.dtype == torch.float32 and not torch.equal(one, other)
        assert (one - other).norm() < 0.1 * one.norm()


def test_token_of_a_pixel():
    photo = torch.zeros(3, 100, 160)
    assert visualize.token_of((0, 0), photo, (10, 16)) == 0
    assert visualize.token_of((159, 0), photo, (10, 16)) == 15
    assert visualize.token_of((25, 99), photo, (10, 16)) == 9 * 16 + 2


@pytest.mark.parametrize("depth, count, expected", [(12, 5, [1, 4, 6, 9, 11]),
                                                    (12, 12, list(range(12))), (4, 9, [0, 1, 2, 3]),
                                                    (5, 1, [4])])
def test_layers_end_with_the_last(depth, count, expected):
    assert visualize.chosen_layers(depth, count) == expected


@torch.inference_mode()
def test_the_last_tokens_of_a_vfm_are_normed_what_it_returns(shown, photo):
    image, vfm = visualize.read_image(photo), shown[2].model
    first, *_, last = shown[2].tokens(image, (10, 16))
    torch.testing.assert_close(vfm.trunk.norm(last), vfm(shown[2].image(image, (10, 16)))[0])
    assert first.shape == last.shape and not torch.equal(first, last)


@torch.inference_mode()
def test_the_cosine_with_itself_is_one(shown, photo):
    image = visualize.read_image(photo)
    for row in shown:
        tokens = row.tokens(image, (10, 16))
        assert len(tokens) == len(row.model.trunk.blocks)
        assert all(part.shape[0] == 160 for part in tokens)
        cosine = F.normalize(tokens[-1], dim=-1) @ F.normalize(tokens[-1][37], dim=-1)
        assert cosine.argmax() == 37 and cosine[37] == pytest.approx(1, abs=1e-5)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("checkpoint") / "declip.safetensors"
    DeCLIP(f"local-dir:{ROOT / 'toy/clip'}", "own", scale=0.7).save(path)
    return str(path)


@pytest.mark.parametrize("kind, given", [
    ("attention", {"anchor": "30,20"}), ("cls", {}), ("correlation", {"layers": 2}),
    ("segmentation",
     {"classes": "dots, star", "methods": ("clip", "clearclip"), "templates": "a {}."})])
def test_every_kind_is_drawn(photo, checkpoint, tmp_path, kind, given):
    given |= {"ckpt": checkpoint, "figure": tmp_path / "a.png"}
    toy = {key: value for key, value in TOY.items() if key != "scale"}
    visualize.main([kind, str(photo), preset(tmp_path, **toy), *options(**given)])
    with Image.open(tmp_path / "a.png") as figure:
        assert min(figure.size) > 200


@pytest.mark.parametrize("suffix, first", [
    ("pdf", b"%PDF"), ("svg", b"<?xml"), ("png", b"\x89PNG")])
def test_a_figure_has_the_format_that_its_name_says(tmp_path, suffix, first):
    path = tmp_path / f"c.{suffix}"
    figures.save_figure(plt.figure(), path)
    assert path.read_bytes().startswith(first)


def test_all_photographs_are_shown_and_a_broken_one_is_named(photo, checkpoint, tmp_path,
                                                             monkeypatch):
    """More than six in one figure, or a sentence; what can't be read costs no other one its row."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(7):
        (folder / f"{number}.png").write_bytes(photo.read_bytes())
    (folder / "broken.png").write_bytes(b"no image")
    drawn, save = [], figures.save_figure
    monkeypatch.setattr(figures, "save_figure",
                        lambda figure, *more, **how: drawn.append(len(figure.axes)) or save(
                            figure, *more, **how))
    words = ["segmentation", str(folder), *options(
        classes="dots, star", methods="clip", ckpt=checkpoint, templates="a {}.",
        figure=tmp_path / "a.png")]
    with pytest.raises(SystemExit, match="broken.png can't be read as an image"):
        visualize.main(words)
    assert drawn == [7 * 3] and (tmp_path / "a.png").exists()
    monkeypatch.setattr(visualize, "MAX_ROWS", 5)
    with pytest.raises(SystemExit, match="8 photographs were given, but a figure has room for 5"):
        visualize.main(words)


@pytest.mark.parametrize("kind, given, words", [
    ("attention", {"methods": "clip"}, "METHODS is for segmentation"),
    ("cls", {"anchor": "3,4"}, "ANCHOR is for attention, correlation"),
    ("cls", {"window": 32}, "WINDOW is for segmentation"),
    ("curves", {"model": "ViT-B-16"}, "MODEL is for attention, cls, correlation, segmentation"),
    ("segmentation", {"attention": "clip"}, "ATTENTION is for other scripts"),
    ("attention", {"anchor": "3,4", "seed": 3}, "SEED chooses the anchor if ANCHOR does not"),
    ("curves", {"out": "x", "figure": "y.png"}, "OUT is for a figure without a name"),
    ("curves", {"figure": "y.gif"}, "FIGURE is 'y.gif'; it must be a file of a kind"),
    ("curves", {"figure": "y"}, "FIGURE is 'y'; it must be a file of a kind")])
def test_an_option_that_a_figure_does_not_read_is_refused(kind, given, words):
    with pytest.raises(SystemExit, match=words):
        visualize.main([kind, "nothing", *options(**given)])


def test_a_row_is_the_model_that_it_is_called(photo, tmp_path):
    """CLIP is the untrained weights, also beside a published .pt that says nothing of itself."""
    trained = DeCLIP(TOY["model"], "own")
    with torch.no_grad():
        trained.visual.trunk.blocks[0].attn.q_proj.weight.add_(1)
    torch.save({f"visual.trunk.{key}": value
                for key, value in trained.visual.trunk.state_dict().items()}, tmp_path / "some.pt")
    given = options(**TOY | {"ckpt": tmp_path / "some.pt", "context": "q"})
    cfg = settings.parse(["attention", str(photo), *given], visualize, positional="KIND_AND_FILES")
    clip, declip, vfm = visualize.open_models(cfg, torch.device("cpu"))
    assert [row.title.splitlines()[0] for row in (clip, declip, vfm)] == ["CLIP", "DeCLIP", "VFM"]
    weights = [row.model.trunk.blocks[0].attn.q_proj.weight for row in (clip, declip)]
    assert torch.allclose(weights[1] - weights[0], torch.ones(()), atol=1e-5)
    assert (clip.attention, declip.attention) == ("clip", "q")


def test_the_panel_shows_the_anchors_row(photo, monkeypatch):
    """The maps drawn are those of the anchor's token, at the anchor's place, of the layers that the
    titles name."""
    def maps(self, photo, grid, of_cls):
        prefix, N = self.model.num_prefix_tokens, grid[0] * grid[1]
        rows = torch.zeros(5, prefix + N, prefix + N)
        # every patch attends to the patch right of it, with the layer's number
        for layer in range(5):
            rows[layer, prefix:, prefix:] = (layer + 1) * torch.eye(N).roll(1, dims=1) / N
        return list(rows)
    monkeypatch.setattr(visualize.Shown, "maps", maps)
    words = ["attention", str(photo), *options(**TOY | {"anchor": "43,21", "layers": 2})]
    cfg = settings.parse(words, visualize, positional="KIND_AND_FILES")
    figure = visualize.attention(cfg, [str(photo)], torch.device("cpu"))
    drawn = {axis.get_title(): axis.images[0].get_array() for axis in figure.axes
            if axis.get_title().startswith("layer")}
    assert set(drawn) == {"layer 2", "layer 5"}
    # 160 x 100 pixels, 16 x 10 tokens: the anchor lies in column 4, row 2
    for title, values in drawn.items():
        assert values.shape == (10, 16)
        assert values[2, 5] == values.max() == pytest.approx(int(title[-1]))
    plt.close(figure)


def test_curves_of_two_runs(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        lines = [{"step": step, "content": 1 / step, "context": 2 / step, "lr": 0.1}
                 for step in (1, 20, 40)]
        (tmp_path / name / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    visualize.main(["curves", str(tmp_path / "one"), str(tmp_path / "two" / "log.jsonl"),
                    "--figure", str(tmp_path / "c.png")])
    assert (tmp_path / "c.png").stat().st_size > 10_000


def test_curves_of_every_loss(tmp_path):
    """A loss of any name has a panel, also one that only some lines have; bookkeeping has none."""
    lines = [dict.fromkeys(LOG_FIELDS, 1) | {"step": step, "content": 1 / step}
             for step in (1, 20, 40)]
    lines[1]["third"] = 0.5
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "older.jsonl").write_text(json.dumps(lines[0]))
    files = [str(tmp_path), str(tmp_path / "older.jsonl")]      # two logs in one folder
    figure = visualize.curves(SimpleNamespace(), files, torch.device("cpu"))
    assert all(len(axis.lines) == 2 for axis in figure.axes)
    assert [axis.get_title() for axis in figure.axes] == ["content loss (equation 7)", "third",
                                                          "learning rate"]
    plt.close(figure)


@pytest.mark.parametrize("text, problem", [
    ("", "it has no line"), ('{"step": 1, "lr": 0.1}', "it has no loss"),
    ('{"step": 1, "content": 0.1}', "it has no lr"), ('"step lr"', "dictionary update"),
    ("[1]", "dictionary update"), ("3", "not iterable")])
def test_what_is_no_log_is_one_sentence(tmp_path, text, problem):
    (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(SystemExit, match="is no log of train.py") as error:
        visualize.main(["curves", str(tmp_path), "--figure", str(tmp_path / "c.png")])
    assert problem in str(error.value) and "\n" not in str(error.value)


def add_sizes(folder: Path, best: dict[int, float], **of) -> None:
    """A region.json's results at some sizes; no thing was found by its mask."""
    cfg = SimpleNamespace(OUT=str(folder), CKPT=None)
    model = {"model": "EVA02-B-16", "attention": "qk", "ckpt": "out/a.pt"}
    for size, first in best.items():
        means = {f"{way} {kind}": {"top1": first + place} for kind in ("thing", "stuff")
                 for place, way in enumerate(("box", "mask", "crop"))}
        write_result(cfg, "region", model | of | {"size": size}, {
            "title": f"by {(model | of)['attention']}",
            "mAcc": means | {"mask thing": {"top1": None}}})


def test_sizes_are_lines_for_things_and_stuff(tmp_path):
    """Of the newest evaluation in the file, or of the one that is asked for."""
    def sizes(**given) -> plt.Figure:
        words = ["sizes", str(tmp_path / "region.json"), *options(**given)]
        cfg = settings.parse(words, visualize, "KIND_AND_FILES")
        return visualize.sizes(cfg, words[1:2], torch.device("cpu"))

    add_sizes(tmp_path, {224: 1, 560: 2, 784: 3}, attention="clip", ckpt=None)
    add_sizes(tmp_path, {560: 60, 224: 40})
    figure = sizes()
    things, stuff = ({line.get_label(): line.get_xydata().tolist() for line in axis.lines}
                     for axis in figure.axes)
    assert things == {"boxes": [[224, 40], [560, 60]], "[CLS] of crops": [[224, 42], [560, 62]]}
    assert stuff == things | {"masks": [[224, 41], [560, 61]]}
    assert figure.get_suptitle() == "by qk"
    plt.close(figure)
    figure = sizes(attention="clip")
    assert figure.get_suptitle() == "by clip"
    assert figure.axes[0].lines[0].get_xydata().tolist() == [[224, 1], [560, 2], [784, 3]]
    plt.close(figure)
    with pytest.raises(ValueError, match="no result of this CKPT, MODEL and ATTENTION"):
        sizes(attention="sclip")


@pytest.mark.parametrize("words, sentence", [
    (["dance", "a.png"], "'dance' is no kind of figure"),
    (["attention"], "'attention' needs files"),
    (["attention", "nothing.png"], "There is no photograph nothing.png"),
    (["attention", "PHOTO", "--anchor", "160,5"], "pixels of the photograph, which is 160 x 100"),
    (["attention", "PHOTO", "--anchor", "5"], "ANCHOR is '5'; it must be two whole numbers"),
    (["attention", "PHOTO", "--vfm_model", "samvit_base_patch16", "--vfm_pretrained", "false"],
     "attends within windows"),
    (["segmentation", "PHOTO"], "CLASSES names no class"),
    (["sizes", "presets/toy_region.txt"], "presets/toy_region.txt holds no results"),
    (["sizes", "README.md", "README.md"], "2 files were given"),
    (["sizes", "toy/vfm/config.json"], "config.json holds no results as evaluations write them"),
    (["curves", "README.md"], "is no log of train.py"),
    (["curves", "toy/clip/log.jsonl"], "is no log of train.py"),
    (["attention", "PHOTO", "toy"], "but this figure is of one"),
    (["curves", "nothing"], "There is no nothing"),
    (["attention", "PHOTO", "--precision", "fp8"], "PRECISION is 'fp8'"),
    (["attention", "PHOTO", "--layers", "0"], "LAYERS is 0")])
def test_bad_input_is_one_sentence(photo, tmp_path, words, sentence):
    with pytest.raises(SystemExit) as error:
        visualize.main([str(photo) if word == "PHOTO" else word for word in words]
                       + [preset(tmp_path, **{key: value for key, value in TOY.items()
                                              if f"--{key}" not in words})])
    assert sentence in str(error.value) and "\n" not in str(error.value)
