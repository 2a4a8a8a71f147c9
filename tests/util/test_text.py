"""util/text.py: what templates make of names, and embeddings that are computed once."""

import open_clip
import pytest
import torch
import torch.nn.functional as F
from tiny import write_siglip

from model import DeCLIP
from util import UserError
from util.text import TEMPLATES, check_lengths, find_templates
from util.towers import tokenizer_of


@pytest.fixture
def encode(tmp_path, monkeypatch):
    """Encodes names with a cache -> (embeddings, whether they were computed)."""
    computed, compute = [], open_clip.build_zero_shot_classifier
    monkeypatch.setattr(open_clip, "build_zero_shot_classifier", lambda *asked, **how:
                        computed.append(asked) or compute(*asked, **how))

    def run(clip: DeCLIP, names: list[str], template: str = "a {}.") -> tuple[torch.Tensor, bool]:
        before = len(computed)
        text = clip.encode_text(names, find_templates(template), tmp_path / "cache")
        return text, len(computed) > before
    return run


def test_templates_by_name_or_one_of_ones_own():
    assert find_templates("imagenet") is TEMPLATES["imagenet"] and len(TEMPLATES["imagenet"]) == 80
    assert find_templates("a {}.") == ("a {}.",)
    for wrong in ("a photo", "{} {}", "{0}"):
        with pytest.raises(ValueError, match="it must be imagenet, simple or a template with {}"):
            find_templates(wrong)


def test_text_embeddings_are_means_over_templates():
    clip = DeCLIP("tiny-eva")
    both = clip.encode_text(["cat", "dog"], ["a {}.", "the {}."])
    parts = [clip.encode_text(["cat", "dog"], [template]) for template in ("a {}.", "the {}.")]
    assert both.shape == (2, 32)
    torch.testing.assert_close(both, F.normalize(sum(parts), dim=-1))


def test_embeddings_are_computed_once(encode):
    clip = DeCLIP("tiny-eva")
    first, was_computed = encode(clip, ["cat", "dog", "puppy"])
    again, was_computed_again = encode(clip, ["cat", "dog", "puppy"])
    assert was_computed and not was_computed_again
    assert torch.equal(first, again)
    assert torch.equal(first, clip.encode_text(["cat", "dog", "puppy"], ["a {}."]))


def test_whatever_changes_is_computed_anew(encode):
    clip = DeCLIP("tiny-eva")
    first, _ = encode(clip, ["cat", "dog"])
    for changed in (lambda: encode(clip, ["cat", "hound"]), lambda: encode(clip, ["dog", "cat"]),
                    lambda: encode(clip, ["cat", "dog"], "the {}."),
                    lambda: encode(clip, ["cat", "dog"], "simple")):
        text, was_computed = changed()
        assert was_computed and not torch.equal(text, first)
    with torch.no_grad():
        # a tower that differs in a single weight
        clip.text.text.positional_embedding[3, 0] += 0.5
    text, was_computed = encode(clip, ["cat", "dog"])
    assert was_computed and not torch.equal(text, first)


def test_the_activation_is_part_of_the_tower(encode):
    """The same weights under a model name with another activation give other embeddings."""
    exact, quick = DeCLIP("tiny-vit"), DeCLIP("tiny-vit-quickgelu")
    quick.visual.load_state_dict(exact.visual.state_dict())
    quick.text.load_state_dict(exact.text.state_dict())
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
        clip.visual.trunk.blocks[0].attn.q_proj.weight.add_(1)
    assert not encode(clip, ["cat"])[1]


def test_a_damaged_cache_is_made_anew(encode, tmp_path):
    clip = DeCLIP("tiny-eva")
    first, _ = encode(clip, ["cat", "dog"])
    file, = (tmp_path / "cache").iterdir()
    content = bytearray(file.read_bytes())
    content[-3] ^= 64
    file.write_bytes(content)
    text, was_computed = encode(clip, ["cat", "dog"])
    assert was_computed and torch.equal(text, first)
    assert not encode(clip, ["cat", "dog"])[1]


# ---------------------------------------------------------------- with transformers' tokenizers

PADDINGS = ["</s>", "<pad>"]        # SigLIP's and SigLIP 2's


@pytest.mark.parametrize("padding", PADDINGS)
def test_a_text_tower_like_siglips_is_open_clips(tmp_path, padding):
    name = write_siglip(tmp_path, padding=padding)
    clip, own = DeCLIP(name), open_clip.create_model(name, load_weights=False).eval()
    own.text.load_state_dict(clip.text.text.state_dict())
    tokens = open_clip.get_tokenizer(name)(["a photo of a cat", "a photo of a dog"])
    assert (tokens[0] != tokens[1]).any() and tokens[0, -1] == PADDINGS[::-1].index(padding)
    found = clip.encode_text(["Cat!", "dog"], ["a photo of a {}."])     # it cleans texts, too
    with torch.no_grad():
        torch.testing.assert_close(found, own.encode_text(tokens, normalize=True))


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("text", [{"padding": padding} for padding in PADDINGS]
                         + [{"padding": "<pad>", "tokenizer_mode": "clips"}], ids=str)
def test_a_name_of_one_token_too_many(tmp_path, text, side):
    """Of 12 tokens one ends the text; in the third case two more begin and close it."""
    name = write_siglip(tmp_path, **text)
    tokenizer, fits = tokenizer_of(name), 9 if "tokenizer_mode" in text else 11
    tokenizer.tokenizer.padding_side = side         # left in Gemma's
    check_lengths(tokenizer, ["cat", " ".join(["a"] * fits)], ["{}"], name)
    for count in (fits + 1, fits + 2, 40):
        with pytest.raises(UserError, match=f"a' is longer than the 12 tokens that {name} reads"):
            check_lengths(tokenizer, ["cat", " ".join(["a"] * count)], ["{}"], name)


def test_the_tokenizer_is_part_of_the_tower(encode, tmp_path):
    """Two folders of the same configuration and weights, whose tokenizers learned other words."""
    clip = DeCLIP(write_siglip(tmp_path / "one"))
    other = DeCLIP(write_siglip(tmp_path / "other", words="sea and land, a photo of them"))
    same = DeCLIP(write_siglip(tmp_path / "same"))
    for model in (other, same):
        model.text.load_state_dict(clip.text.state_dict())
    text, _ = encode(clip, ["cat"])
    of_other, was_computed = encode(other, ["cat"])
    assert was_computed and not torch.equal(of_other, text)
    assert not encode(same, ["cat"])[1]     # wherever the folder is
