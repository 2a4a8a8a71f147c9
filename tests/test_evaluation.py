"""evaluation.py: embeddings of class names are computed once, and again whenever anything that they depend on changes."""

from types import SimpleNamespace

import pytest
import torch

import evaluation
from data import make_classes
from model import DeCLIP


@pytest.fixture
def encode(tmp_path, monkeypatch):
    """Encodes names with a cache -> (embeddings, whether they were computed)."""
    computed = []
    monkeypatch.setattr(DeCLIP, "encode_text", lambda *given, whole=DeCLIP.encode_text: computed.append(1) or whole(*given))

    def run(clip: DeCLIP, lines: list[str], template: str = "a {}.") -> tuple[torch.Tensor, bool]:
        before = len(computed)
        cfg = SimpleNamespace(TEMPLATE=template, CACHE=str(tmp_path / "cache"))
        return evaluation.encode_classes(cfg, clip, make_classes(lines)), len(computed) > before
    return run


def test_embeddings_are_computed_once(encode):
    clip = DeCLIP("tiny-eva")
    first, was_computed = encode(clip, ["cat", "dog, puppy"])
    again, was_computed_again = encode(clip, ["cat", "dog, puppy"])
    assert was_computed and not was_computed_again
    assert torch.equal(first, again) and torch.equal(first, clip.encode_text(["cat", "dog", "puppy"], ["a {}."]))


def test_whatever_changes_is_computed_anew(encode):
    clip = DeCLIP("tiny-eva")
    first, _ = encode(clip, ["cat", "dog"])
    for changed in (lambda: encode(clip, ["cat", "hound"]), lambda: encode(clip, ["dog", "cat"]),
                    lambda: encode(clip, ["cat", "dog"], "the {}."), lambda: encode(clip, ["cat", "dog"], "simple")):
        text, was_computed = changed()
        assert was_computed and not torch.equal(text, first)
    with torch.no_grad():
        clip.clip.text.positional_embedding[3, 0] += 0.5        # a tower that differs in a single weight
    text, was_computed = encode(clip, ["cat", "dog"])
    assert was_computed and not torch.equal(text, first)


def test_the_activation_is_part_of_the_tower(encode):
    """The same weights under a model name with another activation give other embeddings."""
    exact, quick = DeCLIP("tiny-vit"), DeCLIP("tiny-vit-quickgelu")
    quick.clip.load_state_dict(exact.clip.state_dict())
    text, _ = encode(exact, ["cat"])
    other, was_computed = encode(quick, ["cat"])
    assert was_computed and not torch.equal(text, other)


def test_where_the_name_stands_is_part_of_the_sentence(encode):
    clip = DeCLIP("tiny-eva")
    first, _ = encode(clip, ["cat"], "{}the ")
    other, was_computed = encode(clip, ["cat"], "the {}")
    assert was_computed and not torch.equal(first, other)


def test_two_models_share_what_their_text_towers_share(encode):
    """Training leaves the text tower as it is, so a checkpoint's classes are those of its CLIP."""
    clip = DeCLIP("tiny-eva")
    encode(clip, ["cat"])
    with torch.no_grad():
        clip.visual.blocks[0].attn.q_proj.weight.add_(1)
    assert not encode(clip, ["cat"])[1]


@pytest.mark.parametrize("precision, dtype", [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32),
                                              ("auto", torch.float32)])
def test_precision_is_that_of_the_tower_alone(precision, dtype, monkeypatch):
    """What is compared with text is float32 again; the first line of a table says if it was rounded."""
    seen, clip = [], DeCLIP("tiny-eva")
    monkeypatch.setattr(DeCLIP, "project", lambda self, tokens, own=DeCLIP.project: seen.append(own(self, tokens)) or seen[-1])
    cfg = SimpleNamespace(PRECISION=precision, ATTENTION="sclip", CKPT=None, PRETRAINED=None)
    with torch.inference_mode():
        content = evaluation.encode_dense(cfg, clip, torch.randn(1, 3, 32, 32))
        exact, _ = clip.encode_dense(torch.randn(1, 3, 32, 32), "sclip")
    assert seen[0].dtype == dtype and content.dtype == torch.float32 and content.shape == exact.shape
    assert (precision in evaluation.title(cfg, clip)) == (precision in ("bf16", "fp16"))


def test_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="PRECISION is 'int8'; it must be one of auto, bf16, fp16, fp32"):
        evaluation.check_precision(SimpleNamespace(PRECISION="int8"))
