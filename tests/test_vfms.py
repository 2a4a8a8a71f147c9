"""docs/backbones.md's teachers: what its table says of each, and that each gives a grid's tokens.

Towers have few blocks and random weights, or no weights at all, so that each takes a moment.
"""

import itertools
import re
from functools import partial

import pytest
import timm
import torch
from packaging.version import Version
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import Tensor

from model import VFM, load_vfm
from util import UserError
from util.files import ROOT

OF_TABLE = "1.0.31"     # older releases lack some of the names, or record other licences
pytestmark = pytest.mark.skipif(Version(timm.__version__) < Version(OF_TABLE),
                                reason=f"the table is of timm {OF_TABLE}")
H, W = 2, 3         # a grid whose tokens have another order if its sides are exchanged
# The smallest of each family; where sizes differ in more than size, two.
SMALLEST = ["vit_small_patch16_224.dino", "vit_small_patch14_dinov2.lvd142m",
            "vit_small_patch14_reg4_dinov2.lvd142m", "vit_small_patch16_dinov3.lvd1689m",
            "samvit_base_patch16.sa1b", "vit_base_patch16_radio_v3.c_radio",
            "vit_so400m_patch16_radio_v4.c_radio", "vit_pe_spatial_tiny_patch16_512.fb",
            "vit_pe_spatial_gigantic_patch14_448.fb", "vit_base_patch14_reg1_tipsv2.webli",
            "vit_tiny_patch16_dinov3_qkvb.eupe_lvd1689m", "vit_base_patch16_siglip_512.v2_webli",
            "aimv2_large_patch14_448.apple_pt"]
ROTARY = [name for name in SMALLEST if "dinov3" in name or "pe_spatial" in name]


def names_of(pattern: str) -> list[str]:
    """vit_{small,base}_patch16 -> vit_small_patch16, vit_base_patch16."""
    parts = [part.split(",") for part in re.split(r"[{}]", pattern)]
    return ["".join(choice) for choice in itertools.product(*parts)]


def rows() -> dict[str, tuple[str, int, int, str, list[int]]]:
    """The table: a line's names as it has them -> VFM, patch, prefix tokens, licence, widths."""
    text = (ROOT / "docs/backbones.md").read_text().partition("## Teachers of context")[2]
    table = re.search(r"\n\n(\|.*?)\n\n", text, re.S)[1].splitlines()[2:]
    lines, vfm = {}, ""
    for line in table:
        family, names, patch, prefix, licence, widths = map(str.strip, line.split("|")[1:7])
        vfm = family or vfm         # a line without is of the one above
        lines[names.strip("`")] = (vfm, int(patch), int(prefix), licence,
                                   [int(width) for width in widths.split(",")])
    return lines


def build(name: str, depth: int) -> VFM:
    """The VFM with the first `depth` of its blocks, its weights random."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm, "create_model", partial(timm.create_model, depth=depth))
        return load_vfm(name, pretrained=False)


def image(vfm: VFM) -> Tensor:
    return torch.randn(1, 3, H * vfm.patch_size, W * vfm.patch_size)


@pytest.mark.parametrize("pattern", rows())
def test_the_table_is_true(pattern):
    _, patch, prefix, licence, widths = rows()[pattern]
    for name, width in zip(names_of(pattern), widths, strict=True):
        config = timm.get_pretrained_cfg(name)
        with torch.device("meta"):
            vfm = build(name, depth=1)
            tokens = vfm(image(vfm))
        assert name in timm.list_models(pretrained=True)
        assert (vfm.patch_size, vfm.num_prefix_tokens, config.license) == (patch, prefix, licence)
        assert tokens.shape == (1, H * W, width)
        assert (vfm.mean, vfm.std) == (config.mean, config.std)
        assert config.hf_hub_id == f"timm/{name}"


def test_the_text_names_the_release_of_its_table():
    assert f"timm {OF_TABLE}" in (ROOT / "docs/backbones.md").read_text()


def test_every_vfm_of_the_table_is_tested():
    table = rows()
    tested = {vfm for names, (vfm, *_) in table.items() if {*names_of(names)} & {*SMALLEST}}
    assert tested == {vfm for vfm, *_ in table.values()}
    assert {*SMALLEST} <= {name for names in table for name in names_of(names)}


@pytest.mark.parametrize("name", SMALLEST)
def test_tokens_are_those_of_the_patches_row_by_row(name):
    """A patch that changes moves its own token most; [CLS] and registers are not among them; they
    are normed if the tower does."""
    vfm = build(name, depth=3 if "sam" in name else 1)      # SAM's third block attends globally
    x = image(vfm).repeat(H * W, 1, 1, 1)
    if "sam" in name:       # its neck also mixes a patch with its neighbours
        mixing = vfm.trunk.neck[2].weight
        mixing *= torch.eye(3)[1].outer(torch.eye(3)[1])
    before = vfm(x[:1])
    for i, (row, column) in enumerate(itertools.product(range(H), range(W))):
        patch = x.unflatten(2, (H, -1)).unflatten(4, (W, -1))[i, :, row, :, column]
        patch += torch.randn_like(patch)
    after = vfm(x)
    assert after.shape[1] == H * W
    assert (after - before).norm(dim=2).argmax(dim=1).tolist() == list(range(H * W))
    features = vfm.trunk.forward_features(x)
    assert torch.equal(after, features.flatten(2).mT if "sam" in name else features[:, -H * W:])


@pytest.mark.parametrize("name", ROTARY)
def test_rotary_embeddings_are_of_the_images_own_grid(name):
    """Each channel of the embedding that blocks get turns with the row or with the column."""
    vfm, seen = build(name, depth=1), []
    vfm.trunk.blocks[0].register_forward_pre_hook(
        lambda block, args, kwargs: seen.append(kwargs["rope"]), with_kwargs=True)
    vfm(image(vfm))
    grid = seen[0].unflatten(0, (H, W))
    differs_by_row = (grid != grid[:1]).any(dim=1).any(dim=0)
    differs_by_column = (grid != grid[:, :1]).any(dim=1).any(dim=0)
    assert differs_by_row.any() and differs_by_column.any()
    assert not (differs_by_row & differs_by_column).any()


@pytest.mark.parametrize("name, reason", [
    ("naflexvit_base_patch16_radio_v3.c_radio", "does not take dynamic_img_size"),
    ("naflexvit_base_patch16_siglip.v2_webli", "does not take dynamic_img_size"),
    ("hiera_tiny_224.mae", "does not take dynamic_img_size"),
    ("sam2_hiera_tiny.fb_r896", "does not take dynamic_img_size"),
    ("convnext_tiny.dinov3_lvd1689m", "does not take dynamic_img_size"),
    ("convnext_tiny.eupe_lvd1689m", "does not take dynamic_img_size"),
    ("beit_base_patch16_224.in22k_ft_in22k", "does not take dynamic_img_size"),
    ("beitv2_base_patch16_224.in1k_ft_in22k", "does not take dynamic_img_size"),
    ("swin_tiny_patch4_window7_224.ms_in1k", "SwinTransformer"),
    ("valeoai/Franca", "timm has no model named"),
    ("torch.hub:facebookresearch/dinov2", "timm has no model named")])
def test_what_is_no_plain_vit_of_timms_is_refused(name, reason):
    with torch.device("meta"), pytest.raises(UserError, match=reason):
        load_vfm(name, pretrained=False)


@pytest.mark.parametrize("is_dinov2s", [False, True])
def test_a_folder_holds_weights_under_timms_or_dinov2s_names(tmp_path, is_dinov2s):
    vfm = build("vit_small_patch14_reg4_dinov2.lvd142m", depth=1)
    save_for_hf(vfm.trunk, tmp_path, safe_serialization=True)
    if is_dinov2s:      # [CLS] has a position, and the mask token is kept
        state = vfm.trunk.state_dict()
        state["register_tokens"] = state.pop("reg_token")
        state["mask_token"] = torch.zeros(1, vfm.trunk.embed_dim)
        position = torch.randn(1, 1, vfm.trunk.embed_dim)
        state["pos_embed"] = torch.cat([position, state["pos_embed"]], dim=1)
        state["cls_token"] = state["cls_token"] - position
        save_file(state, tmp_path / "model.safetensors")
    loaded, x = load_vfm(f"local-dir:{tmp_path}"), image(vfm)
    torch.testing.assert_close(loaded(x), vfm(x))
    assert (tuple(loaded.mean), tuple(loaded.std)) == (vfm.mean, vfm.std)
