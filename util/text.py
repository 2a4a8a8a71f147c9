"""Class names as sentences, and a cache of what a text tower makes of them."""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from util import UserError
from util.files import atomic_write
from util.weights import read_weights, state_checksum

Template = str | Callable[[str], str]       # a text with {}, or a function of the name

# What the setting TEMPLATES may name.
TEMPLATES = {"imagenet": open_clip.OPENAI_IMAGENET_TEMPLATES,
             "simple": open_clip.SIMPLE_IMAGENET_TEMPLATES}


def is_template(text: str) -> bool:
    """Whether a text of a usual length has one plain {}: other fields would compute, or be long."""
    return len(text) <= 1000 and re.fullmatch(r"[^{}]*\{\}[^{}]*", text) is not None


def find_templates(setting: str) -> Sequence[Template]:
    """What the setting TEMPLATES names: a key of TEMPLATES, or one template. UserError otherwise.
    """
    if setting not in TEMPLATES and not is_template(setting):
        raise UserError(f"TEMPLATES is {setting!r}; it must be {', '.join(TEMPLATES)} or a "
                        "template with {}.")
    return TEMPLATES.get(setting, (setting,))


def fill_template(template: Template, name: str) -> str:
    """A template's text with a name in it."""
    return template.format(name) if isinstance(template, str) else template(name)


def check_names(names: Sequence[str], templates: Sequence[Template]) -> None:
    """Raises UserError unless names are a list, and templates have a place for one."""
    texts = [template for template in templates if isinstance(template, str)]
    if isinstance(names, str) or not all(map(is_template, texts)):
        raise UserError(f"names are {names!r} and templates {templates!r}; give a list of names, "
                        "and templates with {}.")


def check_lengths(tokenizer: Callable, names: Sequence[str], templates: Sequence[Template],
                  model_name: str) -> None:
    """Raises UserError on a name of which the tokenizer cuts something off in the longest template.
    """
    longest = max(templates, key=lambda template: len(fill_template(template, "")))
    most = tokenizer.context_length
    texts = ["", *(fill_template(longest, name) for name in names)]
    tokens = tokenizer(texts, 2 * most)
    padding = tokens[0, most]       # on either side; some end a text by a token like it
    is_cut = ((tokens != padding).sum(dim=1) > (tokenizer(texts) != padding).sum(dim=1))[1:]
    if is_cut.any():
        cut = names[is_cut.tolist().index(True)]
        raise UserError(f"The class name {cut!r} is longer than the {most} tokens that "
                        f"{model_name} reads; shorten it.")


def cached_embeddings(folder: str | Path, text: nn.Module, key: Sequence,
                      compute: Callable[[], Tensor]) -> Tensor:
    """What `compute` returns or, if it was computed before, what `folder` keeps of it.

    The file's name is a checksum of the text tower's weights and of `key`, which names all else
    that the embeddings depend on.
    """
    digest = hashlib.sha256(json.dumps(key, default=str).encode())
    for name, value in sorted(text.state_dict().items()):
        values = value.cpu().contiguous().view(-1).view(torch.uint8)
        digest.update(name.encode() + values.numpy().tobytes())
    path = Path(folder) / f"text-{digest.hexdigest()[:24]}.safetensors"
    with suppress(UserError):       # a damaged file is made anew
        if path.is_file():
            return read_weights(path)[0]["text"].to(next(text.parameters()).device)
    embeddings = compute()
    state = {"text": embeddings.cpu().contiguous()}
    checked = {"checksum": state_checksum(state, "{}")}
    atomic_write(path, lambda file: save_file(state, file, checked))
    return embeddings


def best_text(scores: Iterable[Tensor], scale: float | None = None
              ) -> tuple[Tensor, Tensor, Tensor | None]:
    """Scores of texts, (p, H, W) for some after the others -> each pixel's best, (H, W), the number
    of its text, and the logarithm of the sum of exp(scale * score), unless scale is None."""
    best, count = None, 0
    for some in scores:
        score, text = some.max(dim=0)
        # By rows: a copy of all scores may not fit into memory.
        total = None if scale is None else torch.cat([
            torch.logsumexp(scale * rows, dim=0) for rows in some.split(64, dim=1)])
        count, before = count + len(some), count
        del some        # or it would be there together with the next
        if best is None:
            best, winner, sums = score, text, total
        else:
            winner = torch.where(score > best, text + before, winner)
            best = torch.maximum(score, best)
            sums = None if scale is None else torch.logaddexp(sums, total)
    return best, winner, sums
