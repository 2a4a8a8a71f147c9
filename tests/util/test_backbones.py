"""util/backbones.py: each family's tower is open_clip's own, its last block the method's."""

import re
from functools import partial

import open_clip
import pytest
import timm
import tiny
import torch
import torch.nn.functional as F
from open_clip.model import _build_vision_tower
from test_model import images, randomize, seeded_weights
from timm.layers import resample_abs_pos_embed

from model import (
    ATTENTIONS,
    DECOUPLED,
    DeCLIP,
    VisionTower,
    content_loss,
    context_loss,
    mask_features,
    region_features,
)
from util.backbones import AttentionPool, reason_against
from util.files import ROOT
from util.towers import create_open_clip, timm_trunk, with_dynamic_size
from util.weights import split_fused

POOLED = ("tiny-pool", "tiny-pe")


# ------------------------------------------------------ agreement with the published implementation

@pytest.fixture(scope="module")
def golden() -> dict:
    return torch.load(ROOT / "tests/golden_siglip.pt", weights_only=True)


@pytest.fixture(scope="module")
def published(golden) -> VisionTower:
    """SigLIP's B/16 of full size, with the recipe's seeded weights."""
    with tiny.undrawn():
        trunk = timm.create_model("vit_base_patch16_siglip_256", num_classes=0,
                                  dynamic_img_size=True)
    tower = VisionTower(trunk.eval(), "q", None, (0.5,) * 3, (0.5,) * 3, "SigLIP")
    weights = {name.removeprefix("visual.trunk."): value
               for name, value in seeded_weights(golden).items()}
    trunk.load_state_dict(split_fused(weights, trunk))
    return tower


@pytest.mark.parametrize("case", [0, 1], ids=["256px", "320px"])
def test_published_implementation(golden, published, case):
    """Every figure that the published code returns for SigLIP's weights, within 1e-4."""
    case = golden["cases"][case]
    size = case["size"]
    x, near = images(size, size, seed=1000 + size), {"rtol": 0, "atol": 1e-4}
    crops = F.normalize(torch.randn(6, 768, generator=torch.Generator().manual_seed(78 + size)),
                        dim=-1)
    vfm_tokens = torch.randn(2, (size // 16) ** 2, 32,
                             generator=torch.Generator().manual_seed(77 + size))
    expected = case["modes"]["q"]
    with torch.inference_mode():
        if "pooled" in case:
            torch.testing.assert_close(published.encode_image(x), case["pooled"], **near)
        content, context = published.encode_dense(x)
        regions = region_features(content, case["boxes"])
        for found, wanted in [
                (content.flatten(2).mT[:, case["positions"]], expected["tokens"]),
                (regions, expected["roi"]),
                (mask_features(content, case["masks"]), expected["mask"]),
                (context[:, case["positions"]], case["context_q"]),
                (context_loss(context, vfm_tokens), case["loss_context"]),
                (content_loss(regions, crops, [6]), case["loss_content/q"])]:
            torch.testing.assert_close(found, wanted, **near)


# ------------------------------------------------------------------- agreement with open_clip's own

@pytest.mark.parametrize("name", ["EVA02-B-16", "ViT-B-16-quickgelu", "ViT-B-16-SigLIP2-256",
                                  "PE-Core-B-16", "PE-Core-L-14-336"])
@torch.inference_mode()
def test_an_images_embedding_is_open_clips_own(name, monkeypatch):
    """A model of each family at its full width and size, of two blocks, with random weights."""
    config = open_clip.get_model_config(name)
    config["text_cfg"] |= {"layers": 1, "vocab_size": 8}
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *given, **options: create(
        *given, **{"depth": 2} | options))
    if "timm_model_name" not in config["vision_cfg"]:
        config["vision_cfg"]["layers"] = 2
    monkeypatch.setattr("open_clip.factory.get_model_config", lambda _: config)
    own = create_open_clip(name, None).eval()
    for parameter in own.visual.parameters():       # probes, biases and norms too
        parameter.copy_(torch.randn_like(parameter) * (0.02 if parameter.ndim > 1 else 0.5))
    x = images(own.visual.image_size[0], own.visual.image_size[1], 1)
    expected = own.encode_image(x)
    tower = VisionTower(timm_trunk(own.visual), "q", None, (0,) * 3, (1,) * 3, name)
    found = tower.eval().encode_image(x)
    assert found.shape == expected.shape == (1, tower.embed_dim) and expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_a_folders_activation_is_not_lost_where_a_tower_is_built_anew():
    """As it would be if a model that takes images of one size were built by its name alone."""
    own = timm.create_model("tiny_siglip", act_layer="gelu_tanh", global_pool="map")
    assert "one size" in reason_against(with_dynamic_size(own))
    assert not reason_against(with_dynamic_size(timm.create_model("tiny_siglip")))


@pytest.mark.parametrize("name", POOLED)
@torch.inference_mode()
def test_an_image_of_another_size_is_timms_own(name, monkeypatch):
    """But for its positions' antialiasing."""
    for module in ("eva", "vision_transformer"):
        monkeypatch.setattr(f"timm.models.{module}.resample_abs_pos_embed",
                            partial(resample_abs_pos_embed, antialias=False))
    clip = randomize(DeCLIP(name))
    x = images(48, 80)
    torch.testing.assert_close(clip.encode_image(x), clip.visual.trunk(x), rtol=1e-4, atol=1e-4)


# -------------------------------------------------------------------------------- the pooling head

@pytest.fixture(params=POOLED)
def clip(request) -> DeCLIP:
    return randomize(DeCLIP(request.param))


def tokens_of_head(clip: DeCLIP, x: torch.Tensor) -> torch.Tensor:
    """The trunk's tokens after its final norm."""
    x, extra, _ = clip.visual.embed(x)
    for block in clip.visual.trunk.blocks:
        x = block(x, **extra)
    return clip.visual.trunk.norm(x)


def direct_head(clip: DeCLIP, tokens: torch.Tensor, attention: str) -> torch.Tensor:
    """A row of the table in the head, written out with full matrices, one head at a time."""
    head = clip.visual.trunk.attn_pool
    d = tokens.shape[-1] // head.num_heads
    q = head.q(tokens).split(d, dim=-1)
    k, v = (part.split(d, dim=-1) for part in head.kv(tokens).chunk(2, dim=-1))
    pairs = {"clip": [(q, k)], "maskclip": [], "sclip": [(q, q), (k, k)], "clearclip": [(q, q)],
             "q": [(q, q)], "k": [(k, k)], "qk": [(q, q), (k, k)]}[attention]
    scale = clip.scale if clip.scale and attention in DECOUPLED else d**-0.5
    y = torch.cat([sum((a[h] @ b[h].mT * scale).softmax(-1) @ v[h] for a, b in pairs)
                   if pairs else v[h] for h in range(head.num_heads)], dim=-1)
    y = head.proj(y)
    z = head.norm(y)
    return clip.visual.trunk.head((y if ATTENTIONS[attention].residual == "own" else z)
                                  + head.mlp(z))


@pytest.mark.parametrize("attention", [row for row in ATTENTIONS if row not in
                                       AttentionPool.REFUSED])
@pytest.mark.parametrize("scale", [None, 1.0])
@torch.inference_mode()
def test_attention_rows(clip, attention, scale):
    clip.visual.scale, x = scale, images(48, 80)
    content, context = clip.encode_dense(x, attention)
    tokens = tokens_of_head(clip, x)
    assert content.shape == (2, clip.visual.embed_dim, 6, 10) and context.shape == (2, 60, 48)
    expected = direct_head(clip, tokens, attention)[:, clip.visual.num_prefix_tokens:]
    torch.testing.assert_close(content.flatten(2).mT, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(context, clip.visual.trunk.attn_pool.q(
        tokens[:, clip.visual.num_prefix_tokens:]), rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_in_the_row_clip_a_token_takes_the_probes_place(clip):
    x, place = images(32, 48), (1, 2)
    content, _ = clip.encode_dense(x[:1], "clip")
    token = tokens_of_head(clip, x[:1])[:, clip.visual.num_prefix_tokens + 6 + 2]
    clip.visual.trunk.attn_pool.latent.copy_(token[None])
    torch.testing.assert_close(clip.encode_image(x[:1]), content[:, :, place[0], place[1]],
                               rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("context", [row for row in ("q", "k", "qk", "clip", "maskclip")])
def test_freeze(clip, context):
    """The head is the last block. Trained: it, without probe and what the context leaves out, and
    the blocks before it; and all of that gets a gradient."""
    clip.visual.context = context
    clip.visual.freeze(2)
    trained = {name for name, parameter in clip.visual.named_parameters()
               if parameter.requires_grad}
    head = {name for name in trained if ".attn_pool." in name}
    assert trained - head == {f"trunk.blocks.1.{name}" for name, _ in
                              clip.visual.trunk.blocks[1].named_parameters()}
    used = {"clip": "qk", "maskclip": ""}.get(context, context)
    parts = {"attn_pool.proj", "attn_pool.norm", "attn_pool.mlp", "attn_pool.kv.v"}
    parts |= {{"q": "attn_pool.q", "k": "attn_pool.kv.k"}[name] for name in used}
    assert {part for part in parts if any(part + "." in name for name in head)} == parts
    assert all(any(part + "." in name for part in parts) for name in head)
    regions, tokens = clip.visual(images(32, 48), [torch.tensor([[0.0, 0.0, 0.5, 1.0]])] * 2)
    (regions.sum() + tokens.square().sum()).backward()
    assert {name for name, parameter in clip.visual.named_parameters()
            if parameter.grad is not None} == trained


@torch.inference_mode()
def test_the_heads_output_is_the_last_layer(clip):
    x = images(32, 48)
    *blocks, last = clip.encode_layers(x, range(clip.visual.num_layers))
    assert [tuple(one.shape) for one in blocks] == [(2, 48, 4, 6)] * 2
    content = clip.visual.project(last.flatten(2).mT).mT.unflatten(2, (4, 6))
    torch.testing.assert_close(content, clip.encode_dense(x)[0])


# ------------------------------------------------------------ docs/backbones.md's table of students

OF_TABLE = "3.3.0"      # other releases of open_clip have other names
LAST_BLOCKS = {"token": "block with [CLS]", "map": "pooling head"}
FEW_BLOCKS = {"convnext": {"depths": (1,) * 4}, "swin": {"depths": (1,) * 4},
              "fastvit": {"layers": (1,) * 4}}      # of all others: depth
BUILT_IN = [name for name in open_clip.list_models() if not name.startswith("tiny-")]


def students() -> list[tuple[list[str], list[str]]]:
    """The table's rows: the names of models; last block, patch, text, whether they work."""
    text = (ROOT / "docs/backbones.md").read_text().partition("## Students")[2]
    table = re.search(r"\n\n(\| model .*?)\n\n", text, re.S)[1].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    return [(names.replace("`", "").split(", "), rest) for names, *rest in rows]


def vision_tower(config: dict) -> torch.nn.Module:
    """open_clip's vision tower of few blocks without weights, as a timm trunk where it can be."""
    create, vision = timm.create_model, config["vision_cfg"]
    vision["layers"] = [1] * 4 if isinstance(vision.get("layers"), list) else 1
    with pytest.MonkeyPatch.context() as patch, torch.device("meta"):
        patch.setattr(timm, "create_model", lambda name, **options: create(
            name, **FEW_BLOCKS.get(name.split("_")[0], {"depth": 1}) | options))
        return timm_trunk(_build_vision_tower(config["embed_dim"], vision,
                                              config.get("quick_gelu", False)))


def text_of(config: dict) -> str:
    """What a model's text needs: transformers or nothing."""
    text = config["text_cfg"]
    if "hf_model_name" in text:
        return "transformers' text tower"
    return "transformers' tokenizer" if "hf_tokenizer_name" in text else "own"


@pytest.mark.parametrize("names, row", [pytest.param(*one, id=one[0][0]) for one in students()])
def test_the_table_of_students_is_true(names, row, monkeypatch):
    """Of each model: its family, patch and text, why it is refused; and what it gives for an image
    that is not square."""
    monkeypatch.setattr("util.backbones.resample_abs_pos_embed",    # bicubically it takes seconds
                        partial(resample_abs_pos_embed, interpolation="nearest"))
    for name in {*names} & {*BUILT_IN}:
        config = open_clip.get_model_config(name)
        trunk = vision_tower(config)
        reason = reason_against(trunk)
        if reason:
            assert row == ["", "", text_of(config), f"refused: {reason}"], name
            continue
        p = trunk.patch_embed.patch_size[0]
        assert row == [LAST_BLOCKS[trunk.global_pool], str(p), text_of(config), "works"], name
        with torch.device("meta"):
            tower = VisionTower(trunk, "q", None, (0,) * 3, (1,) * 3, name)
            x = torch.empty(1, 3, 2 * p, 3 * p)
        content, context = tower.encode_dense(x)
        assert tower.image_size % p == 0
        assert content.shape == (1, config["embed_dim"], 2, 3) and context.shape[:2] == (1, 6)
        assert tower.encode_image(x).shape == (1, config["embed_dim"])


def test_every_model_is_in_one_row():
    listed = [name for names, _ in students() for name in names]
    assert f"open_clip {OF_TABLE}" in (ROOT / "docs/backbones.md").read_text()
    assert len(listed) == len({*listed})
    if open_clip.__version__ == OF_TABLE:
        assert {*listed} == {*BUILT_IN}
