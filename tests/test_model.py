"""model.py: agreement with the published implementation, the rows of the attention table, losses,
checkpoints."""

import json
import math
import pickle
import zlib
from functools import partial
from pathlib import Path

import open_clip
import pytest
import tiny
import torch
import torch.nn.functional as F
from safetensors import safe_open
from timm.models.eva import Eva, EvaBlockPostNorm
from timm.models.vision_transformer import VisionTransformer

import model
from model import (
    ATTENTIONS,
    DeCLIP,
    VisionTower,
    content_loss,
    context_loss,
    load_vfm,
    mask_features,
    region_features,
)
from util.backbones import reason_against
from util.towers import timm_trunk
from util.weights import open_clip_layout, read_record, write_checkpoint

TOWERS = ("tiny-eva", "tiny-vit", "tiny-vit-quickgelu")


def images(height: int, width: int, count: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def randomize(clip: DeCLIP, seed: int = 0) -> DeCLIP:
    """All vision weights drawn anew, biases and norms too, so that none of them can be forgotten
    unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in clip.visual.trunk.parameters():
        parameter.data = torch.randn(parameter.shape,
                                     generator=generator) * (0.2 if parameter.ndim > 1 else 0.5)
    return clip


@pytest.fixture(params=TOWERS)
def clip(request) -> DeCLIP:
    return randomize(DeCLIP(request.param))


# ------------------------------------------------------ agreement with the published implementation

@pytest.fixture(scope="module")
def golden() -> dict:
    return torch.load(Path(__file__).parent / "golden_b16.pt", weights_only=True)


def seeded_weights(golden: dict) -> dict[str, torch.Tensor]:
    """The recipe's weights under the names of its `shapes`."""
    out = {}
    for name, shape in golden["shapes"].items():
        generator = torch.Generator().manual_seed((zlib.crc32(name.encode())
                                                   + golden["seed"]) % 2**31)
        draw = torch.randn(shape, generator=generator)
        is_norm = name.endswith("norm.weight") or any(part in name
                                                      for part in ("norm1.weight", "norm2.weight",
                                                                   "ln.weight"))
        out[name] = 1 + 0.1 * draw if is_norm else draw * (0.1 if draw.ndim <= 1 else 0.05)
    return out


@pytest.fixture(scope="module")
def published(golden, tmp_path_factory) -> DeCLIP:
    path = tmp_path_factory.mktemp("published") / "declip.pt"
    torch.save({"epoch": 6, "state_dict": {f"module.{name}": value for name,
                                           value in seeded_weights(golden).items()}}, path)
    with tiny.undrawn():
        return DeCLIP("EVA02-B-16", pretrained=str(path))


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def share_first_blocks(visual, monkeypatch) -> None:
    """All attentions differ in the last block alone; the blocks before it run once."""
    run_blocks, found = visual._run, {}

    def run_once(blocks, x, extra):
        if len(blocks) not in found:
            found[len(blocks)] = x, run_blocks(blocks, x, extra)
        assert torch.equal(found[len(blocks)][0], x)
        return found[len(blocks)][1]

    monkeypatch.setattr(visual, "_run", run_once)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("case", [pytest.param(0, id="224px"),
                                  pytest.param(1, id="336px", marks=pytest.mark.slow)])
def test_published_implementation(golden, published, case, monkeypatch):
    """Every figure that the published code returns for the same weights and inputs, within 1e-4."""
    share_first_blocks(published.visual, monkeypatch)
    case = golden["cases"][case]
    size = case["size"]
    x = images(size, size, seed=1000 + size)
    near = {"rtol": 0, "atol": 1e-4}
    rows = {"vanilla": ("clip", None), "maskclip": ("maskclip", None), "qq": ("q", 1.0),
            "kk": ("k", 1.0),
            "csa": ("qk", 1.0), "qq/sqrt_d": ("q", None), "kk/sqrt_d": ("k", None),
            "csa/sqrt_d": ("qk", None)}
    crops = F.normalize(torch.randn(6, 512, generator=torch.Generator().manual_seed(78 + size)),
                        dim=-1)
    vfm_tokens = torch.randn(2, (size // 16) ** 2, 32,
                             generator=torch.Generator().manual_seed(77 + size))
    with torch.inference_mode():
        torch.testing.assert_close(published.encode_image(x), case["cls"], **near)
        for name, (attention, published.visual.scale) in rows.items():
            content, context = published.encode_dense(x, attention)
            expected = case["modes"][name]
            regions = region_features(content, case["boxes"])
            tokens = content.flatten(2).transpose(1, 2)[:, case["positions"]]
            torch.testing.assert_close(tokens, expected["tokens"], **near)
            torch.testing.assert_close(regions, expected["roi"], **near)
            torch.testing.assert_close(mask_features(content, case["masks"]), expected["mask"],
                                       **near)
            torch.testing.assert_close(context[:, case["positions"]], case["context_q"], **near)
            torch.testing.assert_close(context_loss(context, vfm_tokens), case["loss_context"],
                                       **near)
            if f"loss_content/{name}" in case:
                torch.testing.assert_close(content_loss(regions, crops, [6]),
                                           case[f"loss_content/{name}"], **near)


# ---------------------------------------------------------------------------------------- the model

def tokens_before_blocks(clip: DeCLIP, x: torch.Tensor) -> list[torch.Tensor]:
    x, extra, _ = clip.visual.embed(x)
    inputs = [x]
    for block in clip.visual.trunk.blocks[:-1]:
        inputs.append(block(inputs[-1], **extra))
    return inputs


def direct_values(attn: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What a block's attention returns before its norm if each token sees itself alone."""
    found = []
    handle = attn.norm.register_forward_pre_hook(lambda _, given: found.append(given[0]))
    attn(x.flatten(0, 1)[:, None])
    handle.remove()
    return found[0].view_as(x)


def direct_last_block(clip: DeCLIP, inputs: list[torch.Tensor], attention: str) -> torch.Tensor:
    """The table of the last block, written out with full matrices, one head at a time. inputs: the
    tokens before each block."""
    blocks = clip.visual.trunk.blocks
    if attention == "values":
        return sum(block.attn.proj(block.attn.norm(direct_values(block.attn, block.norm1(x))))
                   for block, x in zip(blocks, inputs))
    block, x = blocks[-1], inputs[-1]
    attn, normed = block.attn, block.norm1(x)
    d = normed.shape[-1] // attn.num_heads
    is_decoupled = attention in model.DECOUPLED
    q, k, v = (clip.visual.family.projection(name)(normed).split(d, dim=-1) for name in "qkv")
    scale = clip.scale if clip.scale is not None and is_decoupled else 1 / math.sqrt(d)
    pairs = {"maskclip": [], "catseg": [], "sclip": [q, k], "clearclip": [q], "q": [q], "k": [k],
             "qk": [q, k]}[attention]
    heads = []
    for head in range(attn.num_heads):
        weights = sum((a[head] @ a[head].mT * scale).softmax(-1) for a in pairs) if pairs else None
        heads.append(v[head] if weights is None else weights @ v[head])
    y = attn.proj(attn.norm(torch.cat(heads, dim=-1)))
    if attention in ("maskclip", "catseg", "sclip"):
        y = (x[:, :1] if attention == "catseg" else x) + y
        y = y + block.mlp(block.norm2(y))
    return y


@pytest.mark.parametrize("attention", [name for name in ATTENTIONS if name != "clip"])
@pytest.mark.parametrize("size", [(32, 32), (48, 80)], ids=["native", "larger, not square"])
@pytest.mark.parametrize("scale", [None, 1.0])
def test_attention_rows(clip, attention, size, scale):
    clip.visual.scale = scale
    with torch.inference_mode():
        inputs = tokens_before_blocks(clip, images(*size))
        expected = clip.visual.project(direct_last_block(clip, inputs, attention))[:, 1:]
        content, _ = clip.encode_dense(images(*size), attention)
    assert content.shape == (2, 32, size[0] // 8, size[1] // 8)
    torch.testing.assert_close(content.flatten(2).transpose(1, 2), expected, rtol=1e-4, atol=1e-4)


def test_values_have_the_gradient_of_the_plain_form(clip):
    """V of every one of the three blocks learns from the content, and from the context, which is
    the same stream."""
    clip.visual.context = "values"

    def gradients(content: torch.Tensor, context: torch.Tensor) -> list[torch.Tensor]:
        loss = content.flatten(2).square().sum() + context[:, :5].sin().sum()
        return torch.autograd.grad(loss, list(clip.visual.trunk.blocks.parameters()),
                                   allow_unused=True)

    found = gradients(*clip.encode_dense(images(32, 48)))
    inputs = tokens_before_blocks(clip, images(32, 48))
    tokens = clip.visual.project(direct_last_block(clip, inputs, "values"))[:, 1:]
    expected = gradients(tokens.mT, tokens)
    for own, plain in zip(found, expected):
        if plain is not None:       # that of Q and K is zero, for one token's softmax is 1
            own = torch.zeros_like(plain) if own is None else own
            torch.testing.assert_close(own, plain, rtol=1e-3, atol=1e-4)


def open_clip_tower(name: str) -> torch.nn.Module:
    """open_clip's own random OpenAI-style tower."""
    own = open_clip.create_model(name, force_custom_text=True).eval().visual
    for parameter in own.parameters():
        torch.nn.init.normal_(parameter, std=0.2 if parameter.ndim > 1 else 0.5)
    own.output_tokens = True
    return own


def resample_positions(own: torch.nn.Module, size: tuple[int, int]) -> None:
    """Bicubic without antialiasing, as the published code does it."""
    cls, patches = own.positional_embedding.data.split([1, 16])
    grid = patches.T.reshape(1, -1, 4, 4)
    grid = F.interpolate(grid, (size[0] // 8, size[1] // 8), mode="bicubic", antialias=False)
    own.positional_embedding = torch.nn.Parameter(torch.cat([cls, grid[0].flatten(1).T]))


def open_clip_rows(own: torch.nn.Module, x: torch.Tensor, attention: str, scale: float
                   | None) -> torch.Tensor:
    """Patch features of a row of the table, written out from the weights of open_clip's own
    tower."""
    x = own.conv1(x).flatten(2).mT
    x = own.ln_pre(torch.cat([own.class_embedding.expand(len(x), 1, -1), x], dim=1)
                   + own.positional_embedding)
    *before, last = own.transformer.resblocks
    of_blocks = []
    for block in before:
        v = F.linear(block.ln_1(x), block.attn.in_proj_weight, block.attn.in_proj_bias).chunk(3, -1)
        of_blocks.append(block.attn.out_proj(v[2]))
        x = block(x)
    d = x.shape[-1] // last.attn.num_heads
    q, k, v = F.linear(last.ln_1(x), last.attn.in_proj_weight, last.attn.in_proj_bias).chunk(3,
                                                                                             dim=-1)
    q, k, v = (part.unflatten(-1, (-1, d)).transpose(1, 2) for part in (q, k, v))
    factor = scale if scale is not None and attention in model.DECOUPLED else d**-0.5
    pairs = {"clip": [(q, k)], "maskclip": [], "catseg": [], "sclip": [(q, q), (k, k)],
             "clearclip": [(q, q)], "q": [(q, q)], "k": [(k, k)],
             "qk": [(q, q), (k, k)], "values": []}[attention]
    y = sum((a @ b.mT * factor).softmax(-1) @ v for a, b in pairs) if pairs else v
    y = last.attn.out_proj(y.transpose(1, 2).flatten(2))
    y = y + sum(of_blocks) if attention == "values" else y
    if attention in ("clip", "maskclip", "catseg", "sclip"):
        y = (x[:, :1] if attention == "catseg" else x) + y
        y = y + last.mlp(last.ln_2(y))
    return own.ln_post(y)[:, 1:] @ own.proj


@pytest.mark.parametrize("name", ["tiny-vit", "tiny-vit-quickgelu"])
@pytest.mark.parametrize("size", [(32, 32), (48, 80)], ids=["native", "larger, not square"])
def test_openai_style_towers_are_open_clips_own(name, size):
    """As a timm trunk: [CLS] of open_clip's forward, and every row of the table computed from
    open_clip's weights."""
    own = open_clip_tower(name)
    clip = DeCLIP(name, scale=1.0)
    clip.visual = VisionTower(timm_trunk(own), "q", 1.0, clip.mean, clip.std, name)
    resample_positions(own, size)
    with torch.inference_mode():
        cls, tokens = own(images(*size))
        torch.testing.assert_close(clip.encode_image(images(*size)), cls, rtol=0, atol=1e-4)
        torch.testing.assert_close(tokens @ own.proj, open_clip_rows(own, images(*size), "clip",
                                                                     None), rtol=0, atol=1e-4)
        for attention in ATTENTIONS:
            content, _ = clip.encode_dense(images(*size), attention)
            expected = open_clip_rows(own, images(*size), attention, 1.0)
            torch.testing.assert_close(content.flatten(2).mT, expected, rtol=0, atol=1e-4)


def test_context_does_not_depend_on_attention(clip):
    with torch.inference_mode():
        contexts = [clip.encode_dense(images(48, 80), attention)[1] for attention in ATTENTIONS]
    assert contexts[0].shape == (2, 60, 48)
    for context in contexts[1:]:
        torch.testing.assert_close(context, contexts[0])


def test_context_qk_is_the_mean_of_two_similarities(clip):
    def similarity(context: str) -> torch.Tensor:
        clip.visual.context = context
        tokens = F.normalize(clip.encode_dense(images(32, 48))[1], dim=-1)
        return tokens @ tokens.mT
    with torch.inference_mode():
        torch.testing.assert_close(similarity("qk"), (similarity("q") + similarity("k")) / 2,
                                   rtol=0, atol=1e-6)


def test_tokens_are_row_major():
    """A change in one patch, at row 1 and column 3 of 4 x 6, shows most at that place of the
    feature map."""
    clip = DeCLIP("tiny-eva")
    before, after = images(32, 48, 1), images(32, 48, 1)
    after[:, :, 8:16, 24:32] += 3
    with torch.inference_mode():
        change = (clip.encode_dense(after)[0] - clip.encode_dense(before)[0]).norm(dim=1)[0]
        contexts = [clip.encode_dense(x)[1] for x in (after, before)]
    change_of_context = (contexts[0] - contexts[1]).norm(dim=2)[0]
    assert change.shape == (4, 6)
    assert change_of_context.argmax() == 1 * 6 + 3


@pytest.mark.parametrize("attention", [None, *ATTENTIONS])
@torch.inference_mode()
def test_layers_are_the_outputs_of_blocks(clip, attention):
    """Blocks' outputs without [CLS]; the last one, normed and projected, is the content."""
    outputs, x = [], images(48, 80)
    handles = [block.register_forward_hook(lambda _, given, out: outputs.append(out))
               for block in clip.visual.trunk.blocks]
    clip.encode_image(x)
    for handle in handles:
        handle.remove()
    last, first = clip.encode_layers(x, [2, 0], attention)
    assert first.shape == last.shape == (2, 48, 6, 10)
    torch.testing.assert_close(first.flatten(2).mT, outputs[0][:, 1:])
    content = clip.visual.project(last.flatten(2).mT).mT.unflatten(2, (6, 10))
    torch.testing.assert_close(content, clip.encode_dense(x, attention)[0])
    with pytest.raises(ValueError, match="There is no layer 3 in tiny-.*; choose from 0 to 2"):
        clip.encode_layers(x, [3])


@pytest.mark.parametrize("context", model.UNDECOUPLED)
def test_without_decoupling_one_output_is_content_and_context(clip, context):
    """X_dense of Table 1's first rows is the block's ordinary output, whatever baseline's content
    is asked for."""
    clip.visual.context = context
    with torch.inference_mode():
        ordinary, _ = clip.encode_dense(images(32, 48), context)
        for attention in (None, context, "clearclip"):
            content, tokens = clip.encode_dense(images(32, 48), attention)
            torch.testing.assert_close(tokens, ordinary.flatten(2).mT)
            assert torch.equal(content, ordinary) == (attention != "clearclip")


# of Q and K of the last block
USED = {"q": "q", "k": "k", "qk": "qk", "clip": "qk", "maskclip": "", "values": ""}


@pytest.mark.parametrize("context", model.CONTEXTS)
def test_freeze(clip, context):
    """Trained: attention blocks, less what the last one leaves out; and every one of them gets a
    gradient."""
    clip.visual.context = context
    clip.visual.freeze(2)
    trained = {name for name, parameter in clip.visual.named_parameters()
               if parameter.requires_grad}
    assert all(name.startswith(("trunk.blocks.1.", "trunk.blocks.2."))
               for name in trained)
    for part in (".blocks.2.norm2.", ".blocks.2.mlp."):
        keeps_residual = ATTENTIONS[context].residual != "none"
        assert any(part in name for name in trained) == keeps_residual
    assert any(".blocks.1.mlp." in name for name in trained)
    for name in "qk":
        last = [key for key in trained if ".blocks.2." in key
                and (f"{name}_proj" in key or f"qkv.{name}." in key)]
        assert bool(last) == (name in USED[context])
    regions, tokens = clip.visual(images(32, 48), [torch.tensor([[0.0, 0.0, 0.5, 1.0]])] * 2)
    (regions.sum() + tokens.square().sum()).backward()
    assert {name for name, parameter in clip.visual.named_parameters()
            if parameter.grad is not None} == trained


# ------------------------------------------------------------------------------- regions and losses

def test_region_features_of_whole_patches_are_their_mean():
    content = images(4, 6, count=1)
    whole, part = region_features(content,
                                  [torch.tensor([[0, 0, 1, 1], [1 / 3, 1 / 4, 2 / 3, 3 / 4]])])
    torch.testing.assert_close(whole, content[0].mean(dim=(1, 2)))
    torch.testing.assert_close(part, content[0, :, 1:3, 2:4].mean(dim=(1, 2)))


def test_mask_features_are_weighted_means():
    content = images(2, 2, count=2)
    masks = [torch.tensor([[[1.0, 3], [0, 0]], [[0, 0], [0, 0]]]), torch.zeros(0, 2, 2)]
    weighted, empty = mask_features(content, masks)
    torch.testing.assert_close(weighted, (content[0, :, 0, 0] + 3 * content[0, :, 0, 1]) / 4)
    assert empty.eq(0).all()


def test_content_loss_is_equation_7():
    f_s, f_t = torch.randn(5, 8), torch.randn(5, 8)
    distances = [1 - f_t[i] @ f_s[i] / (f_t[i].norm() * f_s[i].norm()) for i in range(5)]
    torch.testing.assert_close(content_loss(f_s, f_t, [5]), sum(distances) / 5)
    # k is 4 for the first image, 1 for the second
    per_image = (sum(distances[:4]) / 4 + distances[4]) / 2
    torch.testing.assert_close(content_loss(f_s, f_t, [4, 1]), per_image)


def direct_context_loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Equations 8 and 9, token by token."""
    total = 0
    for a, b in zip(x, y):
        for i in range(len(a)):
            r_clip = torch.stack([a[i] @ a[j] / (a[i].norm() * a[j].norm()) for j in range(len(a))])
            r_vfm = torch.stack([b[i] @ b[j] / (b[i].norm() * b[j].norm()) for j in range(len(b))])
            total = total + (r_vfm - r_clip).norm() / len(a)
    return total / len(x)


@pytest.mark.parametrize("form", ["chosen", "direct", "gram"])
def test_context_loss_is_equations_8_and_9(form):
    """Values and gradients of both forms, the one through N x N matrices and the one without."""
    x, y = torch.randn(2, 20, 6, requires_grad=True), torch.randn(2, 20, 4)
    expected = direct_context_loss(x, y)
    gradient, = torch.autograd.grad(expected, x)
    rows = {"direct": model.row_distances_direct, "gram": model.row_distances_gram}
    loss = (context_loss(x, y) if form == "chosen" else
            rows[form](F.normalize(x, dim=-1), F.normalize(y, dim=-1)).mean())
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], gradient)


@pytest.mark.parametrize("width", [6, 40])
def test_tokens_that_do_not_count_change_nothing(width):
    """As if there were none: the loss and its gradient are those of the rest, image by image."""
    x, y = torch.randn(2, 20, width, requires_grad=True), torch.randn(2, 20, 4)
    kept = torch.arange(20)[None] < torch.tensor([[7], [16]])
    expected = sum(direct_context_loss(x[i:i + 1, :n], y[i:i + 1, :n])
                   for i, n in enumerate((7, 16))) / 2
    loss = context_loss(x, y, kept)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0],
                               torch.autograd.grad(expected, x)[0])
    assert not torch.isclose(loss, context_loss(x, y), rtol=1e-3)


def test_losses_are_float32_under_autocast():
    x, y = torch.randn(1, 20, 64), torch.randn(1, 20, 32)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(context_loss(x, y), context_loss(x.double().float(), y))
        assert context_loss(x.bfloat16(), y).dtype == torch.float32
        assert content_loss(x[0].bfloat16(), x[0], [20]).dtype == torch.float32
        rounded = (F.normalize(x, dim=-1) @ F.normalize(x, dim=-1).mT)
    assert rounded.dtype == torch.bfloat16      # autocast would have taken the products down
    torch.testing.assert_close(context_loss(x, y), direct_context_loss(x, y))


def test_equal_correlations_have_no_loss_and_no_nan():
    x = torch.randn(1, 9, 8, requires_grad=True)
    loss = context_loss(x, 3 * x.detach())
    loss.backward()
    assert loss < 1e-5 and x.grad.isfinite().all()


# ------------------------------------------------------------------------------------------ the VFM

def test_vfm_gives_patch_tokens_row_major():
    vfm = load_vfm("tiny_vfm", pretrained=False)
    assert (vfm.patch_size, vfm.mean, vfm.std) == (7, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    before = images(28, 42, 1)
    after = before.clone()
    after[:, :, 7:14, 21:28] += 5
    tokens = vfm(before)
    assert tokens.shape == (1, 4 * 6, 40)
    assert (vfm(after) - tokens).norm(dim=2).argmax() == 1 * 6 + 3
    assert not any(parameter.requires_grad for parameter in vfm.parameters())


# -------------------------------------------------------------------------------------- checkpoints

def test_checkpoint_describes_itself(tmp_path):
    path = tmp_path / "declip.safetensors"
    clip = randomize(DeCLIP("tiny-vit", context="qk", scale=0.7))
    clip.save(path, {"LR": 1e-5})
    loaded = DeCLIP(pretrained=str(path))
    assert loaded.model_name == "tiny-vit"
    assert (loaded.context, loaded.scale, loaded.mean, loaded.std) == ("qk", 0.7, clip.mean,
                                                                       clip.std)
    assert read_record(path)["settings"] == {"LR": 1e-5}
    for own, other in zip(clip.state().values(), loaded.state().values()):
        assert torch.equal(own, other)
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["declip"])["model"] == "tiny-vit"


@pytest.mark.parametrize("given, named", [({"context": "q"}, "context"), ({"scale": 1.0}, "scale"),
                                          ({"model_name": "tiny-eva"}, "model")])
def test_checkpoint_refuses_what_it_was_not_trained_with(tmp_path, given, named):
    DeCLIP("tiny-vit", context="qk", scale=0.7).save(tmp_path / "declip.safetensors")
    with pytest.raises(ValueError, match=f"trained with {named}"):
        DeCLIP(**{"model_name": "tiny-vit", "pretrained": str(tmp_path / "declip.safetensors")}
               | given)


def test_ensemble_is_saved_not_kept(tmp_path):
    original, student = randomize(DeCLIP("tiny-eva"), 0), randomize(DeCLIP("tiny-eva"), 1)
    before = student.visual.trunk.norm.weight.clone()
    student.save(tmp_path / "declip.safetensors", original=original.visual, share=0.7)
    saved = DeCLIP("tiny-eva", str(tmp_path / "declip.safetensors")).visual.trunk.norm.weight
    torch.testing.assert_close(saved, 0.7 * before + 0.3 * original.visual.trunk.norm.weight)
    assert torch.equal(student.visual.trunk.norm.weight, before)


def eva_layout(clip: DeCLIP) -> dict[str, torch.Tensor]:
    """A tiny-eva's weights under EVA-CLIP's names."""
    swaps = [("mlp.fc1_g", "mlp.w1"), ("mlp.fc1_x", "mlp.w2"), ("mlp.fc2", "mlp.w3"),
             ("mlp.norm", "mlp.ffn_ln"),
             ("attn.norm", "attn.inner_attn_ln"), ("q_proj.bias", "q_bias"),
             ("v_proj.bias", "v_bias")]
    out = {}
    for key, value in clip.state().items():
        for ours, theirs in swaps if key.startswith("visual.") else ():
            key = key.replace(ours, theirs)
        out[key] = value
    return out | {"visual.rope.freqs_cos": torch.zeros(16, 16)}


@pytest.mark.parametrize("wrap",
                         [lambda s: s, lambda s: {"state_dict": {f"module.{k}": v for k,
                                                                 v in s.items()}, "epoch": 1}],
                         ids=["plain", "wrapped"])
def test_eva_clip_layout(tmp_path, wrap):
    clip = randomize(DeCLIP("tiny-eva"))
    torch.save(wrap(eva_layout(clip)), tmp_path / "eva.pt")
    loaded = DeCLIP("tiny-eva", str(tmp_path / "eva.pt"), scale=1.0)
    assert loaded.scale == 1.0
    for own, other in zip(clip.state().values(), loaded.state().values()):
        assert torch.equal(own, other)


def test_file_without_text_tower_cannot_name_classes(tmp_path):
    vision = {key: value for key, value in eva_layout(DeCLIP("tiny-eva")).items()
              if key.startswith("visual.")}
    torch.save(vision, tmp_path / "eva.pt")
    with pytest.raises(ValueError, match="no text tower"):
        DeCLIP("tiny-eva", str(tmp_path / "eva.pt")).encode_text(["cat"])
    clip = DeCLIP("tiny-eva")                   # over a model that has one, it is kept
    clip.load_weights(tmp_path / "eva.pt")
    assert clip.encode_text(["cat"]).shape == (1, 32)


def test_a_bias_of_the_logits_as_siglips(tmp_path):
    """It is kept with the other weights, in both layouts, and may be missing."""
    name, path = tiny.write_siglip(tmp_path / "clip"), str(tmp_path / "declip.safetensors")
    clip = DeCLIP(name)
    assert clip.state()["logit_bias"] == -10
    torch.nn.init.constant_(clip.text.logit_bias, -3)
    clip.save(path)
    assert DeCLIP(pretrained=path).text.logit_bias == -3
    published = eva_layout(clip) | {"logit_bias": torch.tensor([-4.0])}
    torch.save(published, tmp_path / "published.pt")
    assert DeCLIP(name, str(tmp_path / "published.pt")).text.logit_bias == -4
    assert "logit_bias" in open_clip_layout(clip.state(), is_timm=True)
    for parts in (("visual.", "text.", "logit_scale"), "visual."):
        torch.save({key: value for key, value in published.items() if key.startswith(parts)},
                   tmp_path / "without.pt")
        clip.load_weights(tmp_path / "without.pt")
        assert clip.text.logit_bias == -3
    with pytest.raises(ValueError, match="does not fit tiny-eva: .* the first being"):
        DeCLIP("tiny-eva", str(tmp_path / "published.pt"))


@pytest.mark.parametrize("name", TOWERS)
def test_open_clip_layout(tmp_path, name):
    own = open_clip.create_model(name).eval()
    torch.save(own.state_dict(), tmp_path / "open_clip.pt")
    clip = DeCLIP(name, str(tmp_path / "open_clip.pt"))
    with torch.inference_mode():
        torch.testing.assert_close(clip.encode_image(images(32, 32)),
                                   own.encode_image(images(32, 32)), rtol=0, atol=1e-5)
        tokens = open_clip.get_tokenizer(name)(["cat"])
        torch.testing.assert_close(clip.encode_text(["cat"]),
                                   own.encode_text(tokens, normalize=True))


def test_a_checkpoint_over_another_attention_is_refused(tmp_path):
    DeCLIP("tiny-eva", context="qk", scale=1.0).save(tmp_path / "declip.safetensors")
    with pytest.raises(ValueError, match="trained with context qk, but context q was asked for"):
        DeCLIP("tiny-eva").load_weights(tmp_path / "declip.safetensors")


@pytest.mark.parametrize("name", ["hf-hub:somebody/model", "nllb-clip-base-siglip",
                                  "xlm-roberta-base-ViT-B-32"])
def test_what_a_file_says_of_itself_leads_to_no_download(tmp_path, name):
    """Models that open_clip asks a hub for must be named by the user."""
    record = {"model": name, "context": "q", "scale": None}
    write_checkpoint(tmp_path / "x.safetensors", {"visual.w": torch.zeros(1)}, record)
    words = "for which open_clip asks a hub or runs code; if you trust it, say"
    with pytest.raises(ValueError, match=words):
        DeCLIP(pretrained=str(tmp_path / "x.safetensors"))


def test_weights_of_another_model_are_refused(tmp_path):
    torch.save(eva_layout(DeCLIP("tiny-eva")), tmp_path / "eva.pt")
    with pytest.raises(ValueError, match="does not fit tiny-vit"):
        DeCLIP("tiny-vit", str(tmp_path / "eva.pt"))


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def test_pickles_are_not_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bomb.pt").write_bytes(pickle.dumps({"visual.norm.weight": Bomb()}, protocol=2))
    torch.save({"visual.norm.weight": Bomb()}, tmp_path / "zipped.pt")
    for name in ("bomb.pt", "zipped.pt"):
        with pytest.raises(ValueError, match="not a plain file of tensors"):
            DeCLIP("tiny-eva", name)
    assert not Path("executed").exists()


SHAPE = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3,
         "num_classes": 32, "global_pool": "token", "dynamic_img_size": True}


def test_towers_with_other_blocks_are_refused():
    """A fused qkv without key bias (EVA01), blocks with norms after them (EVA02-E), patches of
    another kind (MobileCLIP), and others that timm can build."""
    normed_after = Eva(**SHAPE, qkv_fused=False)
    normed_after.blocks[-1] = EvaBlockPostNorm(48, 3, qkv_fused=False)
    alien = [Eva(**SHAPE), normed_after, Eva(**SHAPE, qkv_fused=False, init_values=0.1),
             *(VisionTransformer(**SHAPE | other) for other in (
                 {"reg_tokens": 2}, {"init_values": 0.1}, {"qk_norm": True}, {"num_classes": 0},
                 {"attn_layer": "diff"}, {"global_pool": "map"}, {"no_embed_class": True}))]
    assert all(map(reason_against, alien))


@pytest.mark.parametrize("make", [
    partial(Eva, qkv_fused=False), VisionTransformer, partial(VisionTransformer, fc_norm=True),
    partial(VisionTransformer, embed_norm_layer=torch.nn.LayerNorm),
    partial(VisionTransformer, global_pool="map", pool_include_prefix=True),
    partial(VisionTransformer, global_pool="map", class_token=False, fc_norm=True),
    partial(Eva, global_pool="map", use_fc_norm=True)])
@torch.inference_mode()
def test_towers_that_are_not_refused_are_timms_own(make):
    trunk = make(**SHAPE | make.keywords if isinstance(make, partial) else SHAPE).eval()
    for parameter in trunk.parameters():
        torch.nn.init.normal_(parameter, std=0.2 if parameter.ndim > 1 else 0.5)
    expected = trunk(images(32, 32))
    tower = VisionTower(trunk, "q", None, (0,) * 3, (1,) * 3, "of timm")
    torch.testing.assert_close(tower.encode_image(images(32, 32)), expected, rtol=1e-4, atol=1e-4)


# ----------------------------------------------------------------------------------------- refusals

@pytest.mark.parametrize("make, sentence", [
    (lambda: DeCLIP("EVA03-B-16"), "open_clip has no model named 'EVA03-B-16'"),
    (lambda: DeCLIP("tiny-eva", "merged2b"),
     "'merged2b' is neither a file nor one of open_clip's weights for tiny-eva"),
    (lambda: DeCLIP("EVA02-B-16", "merged2b_s8b_b131k"),
     "The weights merged2b_s8b_b131k of EVA02-B-16 could not be downloaded; check the network"),
    (lambda: DeCLIP("ViT-B-16", "openai"), "use the model ViT-B-16-quickgelu"),
    (lambda: DeCLIP("RN50"), "tower of RN50 is no plain ViT but a ModifiedResNet, so the method"),
    (lambda: DeCLIP("tiny-pool").encode_dense(images(32, 32), "values"),
     "There is no values in tiny-pool, whose last block is no block of the residual stream"),
    (lambda: DeCLIP("tiny-pe", context="values"), "choose one of clip, maskclip, sclip, clearclip"),
    (lambda: load_vfm("tiny_vfm", pretrained=False)(torch.zeros(1, 3, 30, 42)),
     "is 30x42, but its patch size is 7; the nearest size that works is 28x42"),
    (lambda: DeCLIP("tiny-eva", "absent.pt"), "There is no weights file absent.pt"),
    (lambda: DeCLIP("tiny-eva", "README.md"), "README.md is not a plain file of tensors"),
    (lambda: load_vfm("resnet18", pretrained=False), "resnet18 is no plain ViT"),
    (lambda: load_vfm("swin_tiny_patch4_window7_224", pretrained=False),
     "swin_tiny_patch4_window7_224 is no plain ViT"),
    (lambda: DeCLIP("tiny-eva").encode_text("cat"), "give a list of names"),
    (lambda: DeCLIP("tiny-eva").encode_text(["cat", "so " * 75 + "a"]), "a' is longer than the"),
    (lambda: DeCLIP("tiny-eva").encode_text(["cat"], ["a photo"]), "and templates with {}"),
    (lambda: DeCLIP("tiny-eva", context="v"), "context is 'v'; it must be one of q, k, qk"),
    (lambda: DeCLIP("tiny-eva").visual.freeze(4),
     "4 blocks were to be unlocked, but tiny-eva has 3"),
    (lambda: DeCLIP("tiny-eva").encode_dense(images(30, 32)),
     "image is 30x32, but tiny-eva needs sides divisible"),
    (lambda: DeCLIP("tiny-eva").encode_dense(images(32, 32), "csa"),
     "attention is 'csa'; it must be one of clip"),
    (lambda: context_loss(torch.randn(1, 4, 8), torch.randn(1, 9, 8)), "the student's token grid"),
    (lambda: load_vfm("dinov5"), "timm has no model named 'dinov5'"),
])
def test_refusals_say_what_to_do(make, sentence):
    with pytest.raises(ValueError) as error, tiny.undrawn():
        make()
    assert sentence in str(error.value) and "\n" not in str(error.value)
