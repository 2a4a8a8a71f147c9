"""util/backbones.py: each family's tower is open_clip's own, its last block the method's."""

import zlib
from functools import partial
from pathlib import Path

import open_clip
import pytest
import timm
import tiny
import torch
import torch.nn.functional as F
from test_model import images, randomize
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
from util.towers import create_open_clip, timm_trunk
from util.weights import split_fused

POOLED = ("tiny-siglip", "tiny-pe")


# ------------------------------------------------------ agreement with the published implementation

@pytest.fixture(scope="module")
def golden() -> dict:
    return torch.load(Path(__file__).parent.parent / "golden_siglip.pt", weights_only=True)


@pytest.fixture(scope="module")
def published(golden) -> VisionTower:
    """SigLIP's B/16 of full size, with the recipe's seeded weights."""
    with tiny.undrawn():
        trunk = timm.create_model("vit_base_patch16_siglip_256", num_classes=0,
                                  dynamic_img_size=True)
    tower = VisionTower(trunk.eval(), "q", None, (0.5,) * 3, (0.5,) * 3, "SigLIP")
    weights = {}
    for name, shape in golden["shapes"].items():
        seed = (zlib.crc32(name.encode()) + golden["seed"]) % 2**31
        draw = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        is_norm = name.endswith(("norm.weight", "norm1.weight", "norm2.weight"))
        weights[name.removeprefix("visual.trunk.")] = (
            1 + 0.1 * draw if is_norm else draw * (0.1 if draw.ndim <= 1 else 0.05))
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


# ---------------------------------------------------------------------------------- what is refused

@pytest.mark.parametrize("name, sentence", [
    ("ViT-M-16-alt", "scales what its blocks add (LayerScale)"),
    ("ViT-L-14-CLIPA", "has no projected [CLS] token (its tokens' pooling is avg)"),
    ("coca_ViT-B-32", "has no projected [CLS] token (its tokens' pooling is CoCa's attention)"),
    ("RN50", "is no ViT but a ModifiedResNet"), ("convnext_base", "is no ViT but a ConvNeXt"),
    ("vit_medium_patch16_gap_256", "nor a head that pools by attention (its tokens' pooling is"),
    ("MobileCLIP-B", "makes its patches by several layers (HybridEmbed)")])
def test_a_tower_is_refused_for_what_it_is(name, sentence, monkeypatch):
    """Built without weights: nothing is computed."""
    create = open_clip.create_model
    monkeypatch.setattr(open_clip, "create_model", lambda *given, **options:
                        create(*given, device="meta", **options))
    with torch.device("meta"):
        assert sentence in reason_against(timm_trunk(create_open_clip(name, None).visual))
