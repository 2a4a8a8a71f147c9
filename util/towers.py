"""open_clip's models by name, and their vision towers as timm trunks: one code path serves all."""

import gzip
import logging
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from hashlib import sha256
from pathlib import Path

import open_clip
import timm
from open_clip.timm_model import TimmModel
from open_clip.transformer import QuickGELU
from open_clip.transformer import VisionTransformer as OpenClipViT
from safetensors import safe_open
from timm.layers import PatchEmbed
from timm.models import vision_transformer, vision_transformer_sam
from torch import Tensor, nn

from util import UserError
from util.backbones import TIMM_VITS
from util.files import ROOT, read_json
from util.hub import Recorded

SAM = vision_transformer_sam.VisionTransformerSAM
# transformers' tokenizers that a tokenizer.json makes whole; others may load or run more.
TOKENIZERS = ("TokenizersBackend", "PreTrainedTokenizer", "T5Tokenizer", "GemmaTokenizer",
              "BertTokenizer", "XLMRobertaTokenizer")


def locate(name: str, near: str | Path | None = None) -> str:
    """A `local-dir:FOLDER` name with the folder's whole path; any other name as it is.

    A relative folder is looked for in the present one, above the file `near` (a checkpoint that
    names it), and in the repository.
    """
    if not name.startswith("local-dir:"):
        return name
    folder = Path(name.removeprefix("local-dir:"))
    above = Path(near).absolute().parents if near else ()
    places = [place / folder for place in (Path.cwd(), *above, ROOT)]
    return f"local-dir:{next(filter(os.path.isdir, places), places[0])}"


@contextmanager
def paths_inside(source: str) -> Iterator[None]:
    """Within it, the relative paths that a local model's configuration names are found.

    open_clip looks for them in the present folder; they are relative to one above the model's own.
    Raises UserError if they are nowhere.
    """
    if not source.startswith("local-dir:"):
        yield
        return
    folder, before = Path(source.removeprefix("local-dir:")), Path.cwd()
    path = folder / "open_clip_config.json"
    config = read_json(path, "model_cfg")["model_cfg"]
    try:
        tower = config["vision_cfg"].get("timm_model_name") or ""
        merges = config["text_cfg"].get("tokenizer_kwargs", {}).get("bpe_path")
        named = [merges, tower.removeprefix("local-dir:") if tower.startswith("local-dir:")
                 else None]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no model of open_clip's ({error}); write it again.") from None
    named = [path for path in named if path]
    for place in (folder, *folder.parents, before):
        if all((place / path).exists() for path in named):
            os.chdir(place)
            break
    else:
        raise UserError(f"{folder} says that it needs {' and '.join(named)}, which is not there; "
                        "put the folder back to where it was written, or write it again.")
    try:
        check_sizes(path, config)
        if tower.startswith("local-dir:"):
            of_tower = Path(tower.removeprefix("local-dir:")) / "config.json"
            check_sizes(of_tower, read_json(of_tower, "architecture"))
        if merges:
            check_merges(merges)
        yield
    finally:
        os.chdir(before)


def check_sizes(path: Path, config: dict) -> None:
    """Raises UserError on a number of a model's configuration that is out of any usual range."""
    parts = [*config.items()]
    for name, value in parts:       # grows, since a configuration may be as deep as it likes
        if isinstance(value, dict | list):
            parts += value.items() if isinstance(value, dict) else [(name, one) for one in value]
        elif isinstance(value, int | float) and not (
                abs(value) <= {"layers": 256, "depth": 256, "vocab_size": 2**20}.get(name, 2**13)):
            raise UserError(f"{path} has {name} {value!r:.40}, which no model has; copy the "
                            "model's folder again.")


def check_merges(path: str) -> None:
    """Raises UserError unless a vocabulary is text, compressed by gzip, of a usual size."""
    try:
        if not os.path.isfile(path):
            raise ValueError
        with gzip.open(path) as file:
            text = file.read(2**24)     # of a few megabytes; a small file may hold many gigabytes
        if len(text) == 2**24 or not text.decode():
            raise ValueError
    except (OSError, EOFError, ValueError, zlib.error):
        raise UserError(f"{path} is no vocabulary of open_clip's, less than 16 MB of text "
                        "compressed by gzip; copy the model's folder again.") from None


@contextmanager
def building(source: str) -> Iterator[None]:
    """Within it, what open_clip raises as it builds a model or its tokenizer is one sentence."""
    logging.disable(logging.WARNING)        # open_clip would warn of missing weights
    try:
        with paths_inside(source):
            yield
    except UserError:
        raise
    except Exception as error:      # a configuration that is wrong may raise anything
        if "transformers" in str(error) and isinstance(error, ImportError | RuntimeError):
            raise UserError(f"{source} needs the package transformers for its texts; install it by "
                            "pip install transformers, or use a model without, such as EVA02-B-16 "
                            "or ViT-B-16.") from None
        if not source.startswith("local-dir:"):
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{source} is no whole model of open_clip's ({reason}); copy or write it "
                        "again.") from None
    finally:
        logging.disable(logging.NOTSET)


@cache
def tokenizer_of(source: str) -> Callable[[list[str]], Tensor]:
    """The tokenizer of a model as open_clip finds it; one of transformers' runs no other code.

    Raises UserError if it is not whole, can't be downloaded, or may not: for a Recorded name.
    """
    is_folder, is_recorded = source.startswith("local-dir:"), isinstance(source, Recorded)
    try:
        with building(source):
            text = (open_clip.get_model_config(source) or {}).get("text_cfg", {})
            if not text.get("hf_tokenizer_name"):
                return open_clip.get_tokenizer(source)
            if is_folder:
                check_tokenizer(source, text)
            tokenizer = open_clip.get_tokenizer(source, trust_remote_code=False,
                                                local_files_only=is_folder or is_recorded)
            tokenizer([""])     # one that can't pad fails here
            return tokenizer
    except UserError:
        raise
    except Exception as error:      # a cache that holds a part of it may raise anything
        reason = (f"is not here, and a file downloads nothing; say --model {source}, once"
                  if is_recorded else "needs the package sentencepiece; pip install it"
                  if "sentencepiece" in str(error).lower() else "can't be had; check the network")
        raise UserError(f"The tokenizer of {source} {reason}.") from None


def check_tokenizer(source: str, text: dict) -> None:
    """Raises UserError unless the tokenizer in a model's folder is data, and all of it is there.

    text: the text_cfg of the model.
    """
    option = unknown_option(text)
    if option:
        raise UserError(f"{source} has {option!r:.80} among its tokenizer_kwargs, by which a "
                        "tokenizer may run code or read other files; leave it out.")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        check_folder(source, file, "open_clip")
    path = Path(source.removeprefix("local-dir:")) / "tokenizer_config.json"
    config = read_json(path)
    wrong = [name for name in ("auto_map", "tokenizer_file", "vocab_file") if config.get(name)]
    if str(config.get("tokenizer_class")).removesuffix("Fast") not in TOKENIZERS:
        wrong = ["tokenizer_class"]
    if wrong:
        raise UserError(f"{path} has {wrong[0]} {config.get(wrong[0])!r:.80}, by which a tokenizer "
                        f"may run code or read other files; save it as {' or '.join(TOKENIZERS)}.")


def text_design(source: str) -> object:
    """What embeddings of texts depend on besides weights: the configuration, with the activation,
    and the tokenizer, by name or by its files in the model's folder."""
    config = open_clip.get_model_config(source) or source
    if not source.startswith("local-dir:"):
        return config
    with paths_inside(source):
        merges = config["text_cfg"].get("tokenizer_kwargs", {}).get("bpe_path")
        files = [*Path(source.removeprefix("local-dir:")).glob("*token*"), *filter(None, [merges])]
        return [config, sorted(sha256(Path(file).read_bytes()).hexdigest() for file in files)]


def create_open_clip(model_name: str, tag: str | None) -> nn.Module:
    """open_clip's model with its text tower as `.text`.

    A model in a folder, `local-dir:FOLDER`, or on the Hugging Face hub brings its own weights; tag
    None leaves them out. Raises UserError for an unknown model or tag, or a failed download.
    """
    schema = model_name.partition(":")[0]
    if schema == "local-dir":
        check_folder(model_name, "open_clip_config.json", "open_clip")
        folder = Path(model_name.removeprefix("local-dir:"))
        if tag and not any(path.suffix in (".safetensors", ".bin", ".pth")
                           for path in folder.iterdir()):
            raise UserError(f"{model_name} has no weights beside its configuration; put "
                            "open_clip_model.safetensors there.")
    elif schema != "hf-hub":
        check_tag(model_name, tag)
    try:
        with building(model_name):
            return open_clip.create_model(model_name, pretrained=tag, load_weights=tag is not None,
                                          force_custom_text=True)
    except (RuntimeError, OSError) as error:
        if "couldn't connect" in str(error):        # transformers' own words
            raise UserError(f"The text tower of {model_name} could not be downloaded; check the "
                            "network, or use a model without, such as EVA02-B-16 or PE-Core-B-16."
                            ) from None
        if "download" not in str(error):
            raise
        raise UserError(f"The weights {tag} of {model_name} could not be downloaded; check the "
                        "network, name a file of weights instead, or try the toy world of "
                        "README.md.") from None


def check_folder(name: str, file: str, library: str) -> None:
    """Raises UserError unless the folder of a `local-dir:` name has the library's `file`."""
    if not os.path.isfile(Path(name.removeprefix("local-dir:")) / file):
        raise UserError(f"{name} has no {file}; name a folder that holds a model in {library}'s "
                        "format, by its whole path if it is elsewhere.")


def check_tag(model_name: str, tag: str | None) -> None:
    """Raises UserError unless open_clip has weights of that tag for this model and activation."""
    if model_name not in open_clip.list_models():
        raise UserError(f"open_clip has no model named {model_name!r}; see "
                        "open_clip.list_models().")
    tags = open_clip.list_pretrained_tags_by_model(model_name)
    if tag and tag not in tags:
        raise UserError(f"{tag!r} is neither a file nor one of open_clip's weights for "
                        f"{model_name}: {', '.join(tags) or 'it has none'}.")
    is_quick = open_clip.get_model_config(model_name).get("quick_gelu", False)
    config = open_clip.get_pretrained_cfg(model_name, tag) if tag else {}
    if tag and config.get("quick_gelu", False) != is_quick:
        other = model_name.removesuffix("-quickgelu") + ("" if is_quick else "-quickgelu")
        raise UserError(f"The weights {tag!r} need the other activation; use the model {other}.")


def timm_trunk(visual: nn.Module) -> nn.Module:
    """open_clip's vision tower as a timm trunk with the same weights, for images of any size.

    One that can't be is returned as it is: backbones.reason_against says why.
    """
    try:
        if isinstance(visual, TimmModel):   # a head behind the trunk's own is not the trunk's
            return visual if len(visual.head) else with_dynamic_size(visual.trunk)
        return convert_vit(visual)
    except (AttributeError, RuntimeError):      # it has parts that timm's does not have
        return getattr(visual, "trunk", visual)


def with_dynamic_size(trunk: nn.Module) -> nn.Module:
    """The same timm model for images of any size; otherwise its rotary embedding fits one size."""
    if not isinstance(trunk, TIMM_VITS) or trunk.dynamic_img_size:
        return trunk
    anew = timm.create_model(trunk.pretrained_cfg["architecture"], dynamic_img_size=True,
                             img_size=trunk.patch_embed.img_size, num_classes=trunk.num_classes,
                             global_pool=trunk.global_pool)
    anew.load_state_dict(trunk.state_dict())
    # A folder's arguments without weights, such as an activation, are lost: it stays of one size.
    return anew if design_of(anew) == design_of(trunk) else trunk


def design_of(trunk: nn.Module) -> list:
    """What a timm model is but for its size: its parts, and its rotary embedding's options."""
    rope = vars(getattr(trunk, "rope", None) or nn.Identity())
    of_size = ("feat_shape", "pos_embed", "bands", "training")
    return [str(trunk), {name: value for name, value in rope.items()
                         if name not in of_size and name[0] != "_"
                         and isinstance(value, int | float | str | tuple | None)}]


def convert_vit(visual: OpenClipViT) -> vision_transformer.VisionTransformer:
    """open_clip's own VisionTransformer as timm's; [CLS] agrees to 3e-7."""
    block = visual.transformer.resblocks[0]
    if visual.attn_pool is not None or visual.pool_type != "tok":
        raise AttributeError("no [CLS] projection")
    width = block.mlp.c_fc.in_features
    trunk = vision_transformer.VisionTransformer(
        img_size=visual.image_size, patch_size=visual.patch_size, embed_dim=width,
        num_heads=block.attn.num_heads, depth=len(visual.transformer.resblocks),
        mlp_ratio=block.mlp.c_fc.out_features / width, num_classes=visual.output_dim,
        global_pool="token", pre_norm=True, dynamic_img_size=True,
        norm_layer=partial(nn.LayerNorm, eps=visual.ln_post.eps),
        act_layer="quick_gelu" if isinstance(block.mlp.gelu, QuickGELU) else "gelu")
    state = {f"visual.{name}": value for name, value in visual.state_dict().items()}
    trunk.load_state_dict(vision_transformer.checkpoint_filter_fn(state, trunk))
    return trunk


def recorded_model(file: str | None, record: dict) -> Recorded:
    """The model that a file says it is, by default EVA02-B-16.

    Raises UserError if building that model would ask a hub: files do not decide about downloads.
    """
    name = record.get("model", "EVA02-B-16")
    config = {} if ":" in name else open_clip.get_model_config(name) or {}
    if name.startswith("local-dir:"):
        folder = Path(locate(name, file).removeprefix("local-dir:"))
        config = read_json(folder / "open_clip_config.json", "model_cfg")["model_cfg"]
    is_remote = ":" in name and not name.startswith("local-dir:")
    if is_remote or not is_plain(config):
        raise UserError(f"{file} says that it is {name}, for which open_clip asks a hub or runs "
                        f"code; if you trust it, say --model {name}.")
    if config and "model" in record and os.path.isfile(file):
        with safe_open(file, "pt") as weights:      # another model may be large: not made in vain
            widths = [weights.get_slice(weight).get_shape()[:1] for weight in weights.keys()
                      if weight.endswith(("visual.head.weight", "visual.trunk.head.weight"))]
        if any(width != [config.get("embed_dim")] for width in widths):
            raise UserError(f"{file} does not fit {name}, which it says it is: its embeddings have "
                            "another width; name the model that the file was made with.")
    return Recorded(name)


def is_plain(config: dict) -> bool:
    """Whether open_clip builds a configuration from itself alone: no hub, no code of others.

    The tokenizer may be of a hub: building does not need it, and tokenizer_of takes care.
    """
    if not isinstance(config, dict):
        return False
    vision, text = (config.get(name, {}) for name in ("vision_cfg", "text_cfg"))
    if not isinstance(vision, dict) or not isinstance(text, dict):
        return False
    tower = str(vision.get("timm_model_name", ""))
    is_local = tower.startswith("local-dir:") or ":" not in tower
    return (is_local and not unknown_option(text) and not vision.get("timm_model_pretrained")
            and not any(name.startswith("hf_") for name in text.keys() - {"hf_tokenizer_name"}))


def unknown_option(text: dict) -> str | None:
    """The first option of a text_cfg's tokenizer that may be more than data, if there is one."""
    options = text.get("tokenizer_kwargs") or {}
    if not isinstance(options, dict):
        return str(options)
    return next((name for name, value in options.items() if not isinstance(value, str | bool)
                 or name not in ("bpe_path", "clean", "strip_sep_token")), None)


def create_vit(name: str, pretrained: bool) -> nn.Module:
    """A timm ViT by name, `hf-hub:` or `local-dir:FOLDER`, for images of any size.

    pretrained: False for random weights.
    Raises UserError if timm has no such model or no weights of it, or if it is no plain ViT.
    """
    source, is_local = locate(name), name.startswith("local-dir:")
    if is_local:
        check_folder(source, "config.json", "timm")
    elif not name.startswith("hf-hub:") and not timm.is_model(name):
        raise UserError(f"timm has no model named {name!r}; see timm.list_models('*dino*').")
    any_size = {} if name.startswith("samvit") else {"dynamic_img_size": True}
    try:
        trunk = timm.create_model(source, pretrained=pretrained, num_classes=0, **any_size)
        kind = type(trunk).__name__
    except TypeError:       # unless its class, or a folder's arguments, have another mistake
        trunk, kind = None, "it does not take dynamic_img_size, timm's option for any size"
    except Exception as error:      # timm raises anything on weights and folders of others
        if isinstance(error, OSError) and not is_local:     # a download that fails
            reason = str(error).split(". ")[0].split("\n")[0]
            raise UserError(f"The weights of {name} can't be had ({reason}); check the network, or "
                            "name a VFM that is here by --vfm_model, such as local-dir:toy/vfm."
                            ) from None
        raise UserError(f"{name} has no weights of a VFM in timm's format; name a model or a "
                        "folder that has them, such as local-dir:toy/vfm.") from None
    if not isinstance(trunk, TIMM_VITS | SAM) or not isinstance(trunk.patch_embed, PatchEmbed):
        kind = type(trunk.patch_embed).__name__ if isinstance(trunk, TIMM_VITS | SAM) else kind
        raise UserError(f"{name} is no plain ViT whose patch tokens can be compared ({kind}); use "
                        "one, such as vit_base_patch14_dinov2.lvd142m.")
    return trunk
