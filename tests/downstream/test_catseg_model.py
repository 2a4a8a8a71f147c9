"""CAT-Seg's model against slow direct computations, what trains inside CLIP, files."""

import pytest
import reference_catseg as reference
import torch
from tiny import write_siglip
from torch import nn

from downstream.catseg import model
from downstream.catseg.model import CATSeg, Design, linear_attention, open_catseg
from eval_region import open_model
from model import DeCLIP
from util.weights import read_record, write_checkpoint

NAMES = ["cat", "dog", "tall grass", "sea", "old wooden chair"]


def make(name: str = "tiny-eva", **given) -> CATSeg:
    """A segmenter of random weights, none of them 0, that sees 8 x 8 patches in windows of 4."""
    torch.manual_seed(0)
    segmenter = CATSeg(DeCLIP(name), Design(**{"image_size": 64, "width": 32, "max_classes": 8}
                                            | given))
    for parameter in segmenter.aggregator.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, std=0.5)
    segmenter.set_classes(NAMES)
    return segmenter.eval()


@pytest.fixture(scope="module")
def segmenter() -> CATSeg:
    return make()


def close(found, expected) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------- the parts, slowly

@pytest.mark.parametrize("name, given", [
    ("tiny-eva", {}), ("tiny-vit", {"attention": "catseg", "normalize": False})])
@pytest.mark.parametrize("training, classes", [(False, 5), (True, 5), (True, 8), (False, 11)],
                         ids=["padded", "in training", "just fit", "some left out"])
def test_logits_are_those_of_the_plain_form(name, given, training, classes):
    """The whole model; of 11 classes each image keeps its own 8."""
    segmenter = make(name, **given).train(training)
    segmenter.set_classes([f"thing {number}" for number in range(classes)])
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        text = segmenter.encode_classes()
        found = segmenter.logits(images, text)
        close(found, reference.logits(segmenter, images, text))
    assert found.shape == (2, classes, 32, 32)
    left_out = (found == -100).all(dim=(2, 3))
    assert (left_out.sum(dim=1) == max(0, classes - 8)).all()
    assert classes < 11 or not torch.equal(*left_out)


@pytest.mark.parametrize("normalize", [True, False])
def test_content_guides_normalised_or_as_it_is(normalize, monkeypatch):
    segmenter, seen = make(normalize=normalize), []
    monkeypatch.setattr(segmenter.aggregator, "forward", lambda *inputs: seen.extend(inputs))
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        segmenter.logits(images, segmenter.encode_classes())
        content, _ = segmenter.clip.encode_dense(images)
    cosine = nn.functional.normalize(content, dim=1)
    close(seen[0], torch.einsum("bchw,tc->bthw", cosine, segmenter.encode_classes()))
    torch.testing.assert_close(seen[1], cosine if normalize else content)


@pytest.mark.parametrize("shift", [0, 2])
def test_window_attention(shift):
    block = model.SwinBlock(32, 4, 4, shift)
    x, guidance = torch.randn(2, 3, 8, 12, 32), torch.randn(2, 1, 8, 12, 32)
    with torch.no_grad():
        for image in range(2):
            expected = reference.spatial(block, x[image], guidance[image].expand(3, -1, -1, -1))
            close(block(x, guidance)[image], expected)


def test_places_of_other_windows_have_no_influence():
    """Without a shift rows 0-3 are one window; with a shift of 2, rows 2-5 are, and 0-1 another."""
    for shift, first, last in ((0, 0, 4), (2, 2, 6)):
        block, x = model.SwinBlock(16, 2, 4, shift), torch.randn(1, 1, 8, 8, 16)
        x.requires_grad_()
        block(x, torch.randn(1, 1, 8, 8, 16))[0, 0, 3, 3].sum().backward()
        assert x.grad[0, 0].abs().sum(dim=(1, 2)).nonzero().flatten().tolist() == [
            *range(first, last)]


@pytest.mark.parametrize("training", [False, True])
def test_class_attention_with_padding(training):
    """One token that counts n times against n tokens; in training at half the resolution."""
    block = model.ClassBlock(Design(0, width=32, max_classes=9)).train(training)
    for padding in (block.padding, block.padding_guidance):
        nn.init.normal_(padding)
    x, guidance = torch.randn(2, 4, 4, 6, 32), torch.randn(2, 4, 1, 1, 32)
    with torch.no_grad():
        found = block(x, guidance)
        for image in range(2):
            expected = reference.classes(block, x[image].movedim(-1, 1), guidance[image, :, 0, 0])
            close(found[image].movedim(-1, 1), expected)


def test_linear_attention_is_a_weighted_mean():
    q, k = torch.rand(1, 3, 1, 1, 2, 4), torch.rand(1, 3, 1, 1, 2, 4)
    v = torch.randn(1, 3, 1, 1, 2, 4)
    found = linear_attention(q, k, v, (torch.ones(2, 4), torch.zeros(2, 4), 0))[0, :, 0, 0]
    for head in range(2):
        weights = q[0, :, 0, 0, head] @ k[0, :, 0, 0, head].T
        close(found[:, head], weights / weights.sum(1, keepdim=True) @ v[0, :, 0, 0, head])


def test_loss_counts_pixels_without_a_class_as_negatives(segmenter):
    labels = torch.randint(-1, len(NAMES), (2, 64, 64))
    images = torch.randn(2, 3, 64, 64)
    close(segmenter(images, labels), reference.loss(segmenter, images, labels))
    logits = torch.randn(1, 3, 4, 4)
    ignored = model.segmentation_loss(logits, torch.full((1, 4, 4), -1))
    close(ignored, nn.functional.binary_cross_entropy_with_logits(logits, torch.zeros_like(logits)))


def test_gradients_are_those_of_the_plain_form():
    segmenter = make().train()
    segmenter.freeze()
    images, labels = torch.randn(2, 3, 64, 64), torch.randint(-1, len(NAMES), (2, 64, 64))
    weights = [weight for weight in segmenter.parameters() if weight.requires_grad]
    found, expected = (torch.autograd.grad(loss, weights) for loss in (
        segmenter(images, labels), reference.loss(segmenter, images, labels)))
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["tiny-eva", "tiny-vit"])
def test_sentences_are_encoded_without_their_padding(name):
    """As with all 77 tokens, as DeCLIP's own encode_text, and with gradients."""
    segmenter = make(name)
    assert segmenter.tokens.shape[1] < 20
    found = segmenter.encode_classes()
    close(found, reference.encode_classes(segmenter))
    close(found, segmenter.clip.encode_text(NAMES, ["A photo of a {} in the scene"]))
    assert found.requires_grad


def test_a_name_of_two_classes_is_encoded_once():
    segmenter = make()
    segmenter.set_classes(["screen", "dog", "screen"])
    assert len(segmenter.tokens) == 2
    first, _, third = segmenter.encode_classes()
    assert torch.equal(first, third)


@pytest.mark.parametrize("depth, taps", [(12, (3, 7)), (24, (7, 15)), (5, (0, 2))])
def test_taps_are_a_third_and_two_thirds_of_the_depth(depth, taps, segmenter, monkeypatch):
    monkeypatch.setattr(segmenter.clip.visual, "num_layers", depth)
    assert CATSeg(segmenter.clip, segmenter.design).taps == taps


# ------------------------------------------------------------------------- what trains inside CLIP

@pytest.mark.parametrize("name, given, last", [
    ("tiny-eva", {}, "qv"), ("tiny-vit", {}, "qv"), ("tiny-vit", {"attention": "catseg"}, "v"),
    ("tiny-eva", {"attention": "clip"}, "qv"), ("tiny-pool", {"attention": "clip"}, "qv"),
    ("tiny-pool", {"attention": "k"}, "v"), ("tiny-pe", {}, "qv")])
def test_only_q_and_v_weights_train_inside_clip(name, given, last, tmp_path):
    """One step: they change, and nothing else does; q of a last block that has no use for it
    does not. A pooling head is a block, too, whose probe is no weight of q."""
    is_pooled = name in ("tiny-pool", "tiny-pe")
    own_text = name == "tiny-pool"
    segmenter = make(write_siglip(tmp_path, name, context_length=64) if own_text else name,
                     **given).train()
    before = {name: weight.clone() for name, weight in segmenter.clip.named_parameters()}
    segmenter.freeze()
    optimizer = torch.optim.SGD([p for p in segmenter.parameters() if p.requires_grad], lr=100)
    segmenter(torch.randn(2, 3, 64, 64), torch.randint(0, 5, (2, 64, 64))).backward()
    assert all(p.grad is not None for p in segmenter.parameters() if p.requires_grad)
    optimizer.step()
    changed = {name for name, weight in segmenter.clip.named_parameters()
               if not torch.equal(weight, before[name])}
    form = "{}_proj.weight" if name == "tiny-eva" else "qkv.{}.weight"
    expected = {f"visual.trunk.blocks.{block}.attn.{form.format(letter)}"
                for block in range(3 - is_pooled) for letter in (last if block == 2 else "qv")}
    if is_pooled:
        expected |= {f"visual.trunk.attn_pool.{dict(q='q', v='kv.v')[letter]}.weight"
                     for letter in last}
    text = "text.text.transformer.resblocks.0.attn."
    expected |= ({text + "in_proj_weight"} if name == "tiny-eva"
                 else {text + "q_proj_weight", text + "v_proj_weight"})
    assert changed == expected


def test_split_projections_compute_the_same():
    """An OpenAI-style CLIP before and after its fused weights are split."""
    clip = DeCLIP("tiny-vit")
    images = torch.randn(1, 3, 32, 32)
    before = clip.encode_dense(images)[0], clip.encode_text(NAMES)
    CATSeg(clip, Design(32, width=32))
    close((clip.encode_dense(images)[0], clip.encode_text(NAMES)), before)


def test_padding_that_is_never_seen_does_not_train():
    """With as many classes as are kept there is none, and DDP would wait for its gradient."""
    segmenter = make()
    segmenter.set_classes([f"thing {number}" for number in range(8)])
    segmenter.freeze()
    segmenter(torch.randn(1, 3, 64, 64), torch.randint(0, 8, (1, 64, 64))).backward()
    assert all(weight.grad is not None for weight in segmenter.parameters() if weight.requires_grad)


# ---------------------------------------------------------------------------------------- files

@pytest.mark.parametrize("name, given", [
    ("tiny-eva", {}), ("tiny-vit", {"attention": "catseg", "normalize": False})])
def test_a_file_describes_itself(name, given, tmp_path):
    segmenter = make(name, **given)
    segmenter.save(tmp_path / "catseg.safetensors", {"LR": 1})
    again = open_catseg(tmp_path / "catseg.safetensors")
    again.set_classes(NAMES)
    images = torch.randn(1, 3, 64, 64)
    close(again.logits(images, again.encode_classes()),
          segmenter.logits(images, segmenter.encode_classes()))
    assert again.design == segmenter.design and again.clip.mean == segmenter.clip.mean
    assert read_record(tmp_path / "catseg.safetensors")["settings"] == {"LR": 1}


def test_files_of_before(tmp_path):
    """They name a field otherwise, and images were resized as eval_seg.py does."""
    segmenter = make()
    segmenter.save(tmp_path / "catseg.safetensors")
    record = read_record(tmp_path / "catseg.safetensors")
    record["catseg"]["most_classes"] = record["catseg"].pop("max_classes")
    write_checkpoint(tmp_path / "old.safetensors", segmenter.state_dict(), record)
    assert open_catseg(tmp_path / "old.safetensors").design == segmenter.design
    del record["catseg"]["resize"]
    write_checkpoint(tmp_path / "older.safetensors", segmenter.state_dict(), record)
    older = open_catseg(tmp_path / "older.safetensors").design
    assert older == segmenter.design._replace(resize="bicubic")


def test_a_segmenter_is_no_clip_and_a_clip_no_segmenter(tmp_path):
    segmenter = make()
    segmenter.save(tmp_path / "catseg.safetensors")
    cfg = dict.fromkeys(("ATTENTION", "MODEL", "CONTEXT", "SCALE", "PRETRAINED"))
    cfg = type("Settings", (), cfg | {"CKPT": str(tmp_path / "catseg.safetensors")})
    with pytest.raises(ValueError, match="use it by python -m downstream.catseg.eval"):
        open_model(cfg)
    segmenter.clip.save(tmp_path / "declip.safetensors")
    with pytest.raises(ValueError, match="is no segmenter; give the catseg.safetensors"):
        open_catseg(tmp_path / "declip.safetensors")
    with pytest.raises(ValueError, match="There is no weights file"):
        open_catseg(tmp_path / "nothing.safetensors")


def test_a_file_of_another_model_is_refused(tmp_path):
    segmenter = make()
    segmenter.save(tmp_path / "catseg.safetensors")
    record = read_record(tmp_path / "catseg.safetensors")
    state = segmenter.state_dict()
    del state["aggregator.embed.bias"]
    write_checkpoint(tmp_path / "other.safetensors", state, record)
    with pytest.raises(ValueError, match="1 weights are missing.*aggregator.embed.bias"):
        open_catseg(tmp_path / "other.safetensors")


@pytest.mark.parametrize("given, sentence", [
    ({"image_size": 72}, "an even number of tiny-eva's patches of 8 px; set it to 64"),
    ({"attention": "sum"}, "attention is 'sum'; it must be one of"),
    ({"width": 40}, "The width is 40"), ({"heads": 3}, "the heads are 3"),
    ({"template": "a photo"}, "The template is 'a photo'; it must have one {}"),
    ({"template": "{{}}{0:>3000000000}"}, "it must have one {}"), ({"template": "{:>9}"}, "one {}"),
    ({"layers": 10**6}, "the layers 1000000"), ({"image_size": 2**20}, "set it to 8192"),
    ({"max_classes": 0}, "the most classes 0"), ({"heads": 0}, "the heads are 0")])
def test_designs_that_cannot_be(given, sentence):
    with pytest.raises(ValueError) as error:
        make(**given)
    assert sentence in str(error.value)
