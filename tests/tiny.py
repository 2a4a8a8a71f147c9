"""Tiny random models under names that open_clip and timm know, for tests that need no download and
take no time.

Importing this registers them. As a script it runs one of the repository's scripts with them:
`python tests/tiny.py train --model tiny-eva --pretrained none ...`, under torchrun too.
"""

import contextlib
import importlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import open_clip
import pytest
import torch
from timm.models import register_model
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

ROOT = Path(__file__).parent.parent


@register_model
def tiny_eva02_clip(pretrained: bool = False, **options) -> Eva:
    """EVA02-CLIP's block (unfused qkv, SwiGLU, inner norms, rotary embedding) at width 48."""
    shape = dict(img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, mlp_ratio=2,
                 ref_feat_shape=(4, 4))
    block = dict(qkv_fused=False, swiglu_mlp=True, scale_mlp=True, scale_attn_inner=True,
                 use_rot_pos_emb=True)
    return named(Eva(**shape | block | {"global_pool": "token"} | known(options)),
                 "tiny_eva02_clip")


@register_model
def tiny_vfm(pretrained: bool = False, **options) -> VisionTransformer:
    """A plain ViT whose patch, 7, is not the student's, with registers."""
    shape = dict(img_size=28, patch_size=7, embed_dim=40, depth=2, num_heads=2, reg_tokens=2)
    return named(VisionTransformer(**shape | known(options)), "tiny_vfm")


@register_model
def tiny_siglip(pretrained: bool = False, **options) -> VisionTransformer:
    """SigLIP's tower: no [CLS], a pooling head without a projection."""
    shape = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, mlp_ratio=2,
                 class_token=False, global_pool="map")
    return named(VisionTransformer(**shape | known(options)), "tiny_siglip")


@register_model
def tiny_pe(pretrained: bool = False, **options) -> Eva:
    """Perception Encoder's tower: [CLS] is one token of those that the head pools and projects."""
    shape = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, mlp_ratio=2,
                 global_pool="map", attn_type="rope", use_pre_transformer_norm=True,
                 use_rot_pos_emb=True, ref_feat_shape=(4, 4), rope_grid_offset=1.0,
                 rope_grid_indexing="xy", attn_pool_num_heads=4, attn_pool_mlp_ratio=2.0)
    return named(Eva(**shape | known(options)), "tiny_pe")


@contextlib.contextmanager
def undrawn() -> Iterator[None]:
    """Within it, models of full size are built without drawing their weights, which takes seconds;
    they are what the memory held."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("normal_", "uniform_", "erfinv_"):
            patch.setattr(torch.Tensor, name, lambda tensor, *_, **__: tensor)
        yield


def known(options: dict) -> dict:
    """What timm passes on to a model besides its own bookkeeping."""
    own = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
    return {key: value for key, value in options.items() if key not in own}


def named(model, architecture: str):
    statistics = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3)}
    model.pretrained_cfg = model.default_cfg = {"architecture": architecture,
                                                "input_size": (3, 28, 28)} | statistics
    return model


def siglip_config(model: str = "tiny-eva", **text) -> dict:
    """open_clip's configuration of a tiny model whose text tower is like SigLIP's.

    model: whose vision tower it has. text: fields of text_cfg to change.
    """
    config = open_clip.get_model_config(model)
    of_text = dict(context_length=12, vocab_size=120, width=32, heads=2, layers=1, pool_type="last",
                   no_causal_mask=True, proj_bias=True, hf_tokenizer_name="somebody/tokenizer",
                   tokenizer_kwargs={"clean": "canonicalize"})
    return config | {"init_logit_bias": -10, "custom_text": True, "text_cfg": of_text | text}


def write_siglip(folder: Path, model: str = "tiny-eva", padding: str = "</s>",
                 words: str = "a photo of a cat and a dog", **text) -> str:
    """Writes such a model with a tokenizer into a folder -> its name.

    model, text: as siglip_config. padding: what texts are filled up with, SigLIP's `</s>`, which
        also ends them, or SigLIP 2's `<pad>`. words: what the tokenizer learns from.
    """
    PreTrainedTokenizerFast = pytest.importorskip("transformers").PreTrainedTokenizerFast
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    folder.mkdir(parents=True, exist_ok=True)
    config = siglip_config(model, **text)
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3}
    (folder / "open_clip_config.json").write_text(json.dumps(
        {"model_cfg": config, "preprocess_cfg": preprocess}))
    pieces = Tokenizer(models.BPE(unk_token="<unk>"))
    pieces.pre_tokenizer = pre_tokenizers.Metaspace()
    pieces.train_from_iterator([words], trainers.BpeTrainer(
        vocab_size=100, special_tokens=["<pad>", "</s>", "<unk>", "<s>"], show_progress=False))
    pieces.post_processor = processors.TemplateProcessing(single="$A </s>",
                                                          special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=pieces, pad_token=padding, eos_token="</s>",
                            unk_token="<unk>", bos_token="<s>", cls_token="<s>"
                            ).save_pretrained(folder)
    return f"local-dir:{folder}"


open_clip.add_model_config(ROOT / "tests" / "models")

if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.argv = [sys.argv[1], *sys.argv[2:]]
    importlib.import_module("util.distributed").PIECE = 1000    # so that files have many
    # RANK in an option stands for the rank, for what each machine has for itself.
    importlib.import_module(sys.argv[0]).main([word.replace("RANK", os.environ.get("RANK", "0"))
                                               for word in sys.argv[1:]])
