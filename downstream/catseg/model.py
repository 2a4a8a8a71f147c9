"""CAT-Seg: how well each patch fits each class name, aggregated over places and over classes.

    segmenter = CATSeg(clip, Design(image_size=384))
    segmenter.set_classes(["cat", "grass"])
    loss = segmenter(images, labels)                            # images normalised as CLIP's
    logits = segmenter.logits(images, segmenter.encode_classes())       # (B, T, 96, 96)

In this order: the segmenter, the aggregator with its layers, its decoder, the loss, and what is
trained inside CLIP. "CAT-Seg: Cost Aggregation for Open-Vocabulary Semantic Segmentation", CVPR
2024, is the method; the paper puts DeCLIP into it (section 4.2, Tables 4 and 9).

Letters: B images, T classes, h x w patches, C width of the text-image space, D width of the
aggregator. Features of places that are the same for all classes, or of classes that are the same at
all places, are called guidance.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from open_clip.transformer import TextTransformer
from timm.layers import Mlp
from timm.models.swin_transformer import window_partition, window_reverse
from torch import Tensor, nn

from data import RESIZES, constant
from model import ATTENTIONS, DeCLIP
from util import UserError
from util.backbones import Split, is_eva_clip
from util.text import check_lengths, is_template
from util.towers import recorded_model, tokenizer_of
from util.weights import check_fit, read_design, read_record, read_weights, write_checkpoint


class Design(NamedTuple):
    """What a segmenter is besides its CLIP. Defaults are the published ones."""
    image_size: int             # side of the images it sees; published: 24 patches
    attention: str | None = None    # row of model.ATTENTIONS for the content; None: the CLIP's own
    normalize: bool = True      # the content that guides is L2-normalised (published: DeCLIP's)
    width: int = 128            # D
    heads: int = 4
    layers: int = 2
    max_classes: int = 256      # fewer are padded; of more, the most similar ones are kept
    template: str = "A photo of a {} in the scene"
    resize: str = "pil"         # one of data.RESIZES; of files that do not say, bicubic


class CATSeg(nn.Module):
    """A CLIP and an aggregator of its costs. Both towers' attention is fine-tuned with it.

    clip: any DeCLIP or CLIP with a text tower; it becomes part of the segmenter.
    Raises UserError if the CLIP has none, if the attention is unknown, and for an image size that
    is no even number of patches.
    """

    def __init__(self, clip: DeCLIP, design: Design):
        super().__init__()
        check_design(clip, design)
        self.clip, self.design = clip, design
        depth, side = clip.visual.num_layers, design.image_size // clip.patch_size
        self.taps = max(0, depth // 3 - 1), max(0, 2 * depth // 3 - 1)      # 3 and 7 of 12
        wide, width = clip.visual.width, design.width
        self.upsample = nn.ModuleList([nn.ConvTranspose2d(wide, 2 * width, 2, 2),
                                       nn.ConvTranspose2d(wide, width, 4, 4)])
        self.aggregator = Aggregator(design, side, clip.visual.embed_dim)
        split_projections(clip)
        self.names: list[str] = []

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """A training step's loss: normalised (B, 3, S, S), labels (B, H, W) -> scalar.

        A negative label is of no class. DDP averages gradients only if training calls it here.
        """
        return segmentation_loss(self.logits(images, self.encode_classes()), labels)

    def logits(self, images: Tensor, text: Tensor) -> Tensor:
        """Normalised images (B, 3, S, S) and text (T, C) -> (B, T, 4h, 4w)."""
        visual, taps = self.clip.visual, self.taps
        # One pass; its last output is the one before the final norm
        *early, last = visual.encode_layers(images, [*taps, visual.num_layers - 1],
                                            self.design.attention)
        content = visual.project(last.flatten(2).mT).mT.unflatten(2, last.shape[-2:])
        guidance = [up(tokens) for up, tokens in zip(self.upsample, early)]
        with torch.autocast(images.device.type, enabled=False):
            normalized = F.normalize(content.float(), dim=1)
            cost = torch.einsum("bchw,tc->bthw", normalized, text.float())
        if self.design.normalize:
            content = normalized
        return self.aggregator(cost, content, text, guidance)

    def set_classes(self, names: Sequence[str]) -> None:
        """Names, one for each class; a name that two classes share is encoded once.

        Raises UserError for a name that is longer than what the text tower reads.
        """
        self.names, distinct = list(names), list(dict.fromkeys(names))
        device = self.clip.text.logit_scale.device
        tokenizer, template = tokenizer_of(self.clip.source), self.design.template
        check_lengths(tokenizer, distinct, [template], self.clip.model_name)
        tokens = tokenizer([template.format(name) for name in distinct])
        tower = self.clip.text.text
        if tower.attn_mask is not None and tower.pool_type == "argmax" and tower.cls_emb is None:
            # Attention is causal, and the end, the largest token, is read: padding has no influence
            tokens = tokens[:, :tokens.argmax(dim=1).max() + 1]
        self.register_buffer("tokens", tokens.to(device), persistent=False)
        self.register_buffer("prompt_of_class", torch.tensor(
            [distinct.index(name) for name in names], device=device), persistent=False)

    def encode_classes(self) -> Tensor:
        """The classes' embeddings, L2-normalised, float32 (T, C), with gradients."""
        tower = self.clip.text
        with short_context(tower.text, self.tokens.shape[1]):
            text = tower.encode_text(self.tokens)
        return F.normalize(text.float(), dim=-1)[self.prompt_of_class]

    def freeze(self) -> None:
        """Leaves the aggregator trainable, and inside CLIP what the published system trains.

        These are the weights, not the biases, of q and v in every attention block of both towers;
        with EVA-CLIP's, q and v of its own and the text tower's whole input projection. What gets
        no gradient with these classes and this attention is frozen, too.
        """
        for name, weight in self.clip.named_parameters():
            weight.requires_grad_(re.search(TRAINED, name) is not None)
        visual = self.clip.visual
        projections = ATTENTIONS[visual.known(self.design.attention)].projections
        if projections is not None and "q" not in projections:
            visual.family.projection("q").requires_grad_(False)
        if len(self.names) >= self.design.max_classes:
            for layer in self.aggregator.layers:
                layer.classes.padding.requires_grad_(False)
                layer.classes.padding_guidance.requires_grad_(False)

    def save(self, path: str | Path, settings: dict | None = None) -> None:
        """Writes a file that describes itself and needs no other: CLIP, aggregator, design."""
        write_checkpoint(path, self.state_dict(), self.clip.describe() | {
            "mean": self.clip.mean, "std": self.clip.std, "settings": settings or {},
            "catseg": self.design._asdict(),
            "use": "python -m downstream.catseg.eval or tools.segment"})


def is_catseg(path: str | Path | None) -> bool:
    """Whether a file says that it holds a segmenter."""
    return bool(path) and "catseg" in read_record(path)


def open_catseg(path: str | Path) -> CATSeg:
    """The segmenter in a `catseg.safetensors`.

    Raises UserError if there is no such file, or if it holds something else.
    """
    state, record = read_weights(path)
    if "catseg" not in record:
        raise UserError(f"{path} is no segmenter; give the catseg.safetensors that "
                        "downstream.catseg.train writes.")
    design = read_design(path, {"resize": "bicubic"} | {
        RENAMED.get(name, name): value for name, value in record["catseg"].items()}, Design)
    clip = DeCLIP(recorded_model(path, record), None, record["context"], record["scale"])
    clip.visual.mean, clip.visual.std = (
        tuple(record.get(name, getattr(clip, name))) for name in ("mean", "std"))
    check_design(clip, design)
    with torch.device("meta"):      # nothing is made that the file does not hold
        parts = Aggregator(design, design.image_size // clip.patch_size,
                           clip.visual.embed_dim).state_dict(prefix="aggregator.")
    check_fit(path, {name: value for name, value in state.items() if name in parts}, parts,
              "the aggregator that it describes")
    segmenter = CATSeg(clip, design)
    check_fit(path, state, segmenter.state_dict(), clip.model_name)
    segmenter.load_state_dict(state)
    return segmenter.eval()


MAX_SIDE = 2**13        # of the images that a segmenter sees
RENAMED = {"most_classes": "max_classes"}       # fields of Design as older files have them


def check_design(clip: DeCLIP, design: Design) -> None:
    """Raises UserError if the CLIP can't be used so."""
    clip.visual.known(design.attention)
    if clip.text is None:
        raise UserError("The weights hold no text tower, which CAT-Seg trains too; give a file "
                        "that has both, such as a declip.safetensors.")
    twice = 2 * clip.patch_size
    side = max(1, round(min(design.image_size, MAX_SIDE) / twice)) * twice
    if design.image_size != side:
        raise UserError(f"The image size is {design.image_size}, but it must be an even number of "
                        f"{clip.model_name}'s patches of {clip.patch_size} px; set it to "
                        f"{side}.")
    if (design.width % 16 or not 16 <= design.width <= 2**13 or not 1 <= design.layers <= 64
            or design.heads < 1 or design.width % design.heads or design.max_classes < 1):
        raise UserError(f"The width is {design.width}, the heads are {design.heads}, the layers "
                        f"{design.layers}, the most classes {design.max_classes}; the width must "
                        "be a multiple of 16 and of the heads, at most 8192, and there must be 1 "
                        "to 64 layers and a class.")
    if design.resize not in RESIZES:
        raise UserError(f"RESIZE is {design.resize!r}; it must be one of {', '.join(RESIZES)}.")
    if not is_template(design.template):
        raise UserError(f"The template is {design.template[:60]!r}; it must have one {{}}.")


# --------------------------------------------------------------------------------- the aggregator

class Aggregator(nn.Module):
    """Costs -> logits at four times their resolution.

    side: of the grid of patches, h = w; windows have half of it (published: 12 of 24).
    """

    def __init__(self, design: Design, side: int, channels: int):
        super().__init__()
        width, self.max_classes = design.width, design.max_classes
        self.embed = nn.Conv2d(1, width, 7, padding=3)
        self.image_guidance = nn.Sequential(nn.Conv2d(channels, width, 3, padding=1), nn.ReLU())
        self.text_guidance = nn.Sequential(nn.Linear(channels, width), nn.ReLU())
        self.layers = nn.ModuleList(AggregatorLayer(design, side // 2)
                                    for _ in range(design.layers))
        self.decoder = Decoder(width)

    def forward(self, cost: Tensor, content: Tensor, text: Tensor, taps: list[Tensor]) -> Tensor:
        """Cost (B, T, h, w), content (B, C, h, w), text (T, C) and the decoder's guidance
        (B, 2D, 2h, 2w), (B, D, 4h, 4w) -> logits (B, T, 4h, 4w).

        Of more than max_classes, those of the highest largest cosine are kept in each image; the
        others get -100.
        """
        B, T = cost.shape[:2]
        text, kept = text.expand(B, -1, -1), None
        if T > self.max_classes:
            kept = cost.amax(dim=(2, 3)).topk(self.max_classes).indices
            cost = cost.gather(1, kept[..., None, None].expand(-1, -1, *cost.shape[2:]))
            text = text.gather(1, kept[..., None].expand(-1, -1, text.shape[-1]))
        of_image = self.image_guidance(content).permute(0, 2, 3, 1)         # (B, h, w, D)
        of_text = self.text_guidance(text)                                  # (B, T, D)
        x = self.embed(cost.flatten(0, 1)[:, None]).permute(0, 2, 3, 1).unflatten(0, (B, -1))
        for layer in self.layers:
            x = layer(x, of_image, of_text)                                 # (B, T, h, w, D)
        logits = self.decoder(x.permute(0, 1, 4, 2, 3), taps)
        if kept is None:
            return logits
        out = logits.new_full((B, T, *logits.shape[2:]), -100.0)
        return out.scatter(1, kept[..., None, None].expand_as(logits), logits)


class AggregatorLayer(nn.Module):
    """Places attend to places of the same class, then classes to classes at the same place."""

    def __init__(self, design: Design, window: int):
        super().__init__()
        self.norm = nn.LayerNorm(design.width)
        self.spatial = nn.ModuleList(SwinBlock(design.width, design.heads, window, shift)
                                     for shift in (0, window // 2))
        self.classes = ClassBlock(design)

    def forward(self, x: Tensor, of_image: Tensor, of_text: Tensor) -> Tensor:
        """x (B, T, h, w, D), guidance (B, h, w, D) and (B, T, D) -> x."""
        of_image = self.norm(of_image)[:, None]
        for block in self.spatial:
            x = block(x, of_image)
        return self.classes(x, of_text[:, :, None, None])


class SwinBlock(nn.Module):
    """A Swin block without position bias; queries and keys are guided by the image."""

    def __init__(self, width: int, heads: int, window: int, shift: int):
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k = nn.Linear(2 * width, width), nn.Linear(2 * width, width)
        self.v, self.proj = nn.Linear(width, width), nn.Linear(width, width)
        self.mlp = Mlp(width, 4 * width)

    def forward(self, x: Tensor, guidance: Tensor) -> Tensor:
        """x (B, T, h, w, D), guidance (B, 1, h, w, D) -> x."""
        normed = self.norm1(x)
        q, k = (guided(linear, normed, guidance) for linear in (self.q, self.k))
        x = x + self.proj(self.attend(q, k, self.v(normed)))
        return x + self.mlp(self.norm2(x))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Softmax attention within (shifted) windows: (B, T, h, w, D) each -> (B, T, h, w, D)."""
        B, T, h, w, D = q.shape
        side, shift = (self.window, self.window), self.shift
        count = (h // self.window) * (w // self.window)

        def windows(y: Tensor) -> Tensor:       # (B T, windows x heads, places, D / heads)
            y = y.flatten(0, 1)
            y = window_partition(y.roll((-shift, -shift), (1, 2)) if shift else y, side)
            y = y.view(B * T, count, self.window**2, self.heads, -1)
            return y.transpose(2, 3).flatten(1, 2)

        mask = shift_mask(h, w, self.window, shift, q.device) if shift else None
        if mask is not None:        # one for each window, the same for its heads
            mask = mask.repeat_interleave(self.heads, dim=0)
        y = F.scaled_dot_product_attention(windows(q), windows(k), windows(v), mask)
        y = y.unflatten(1, (count, self.heads)).transpose(2, 3)
        y = window_reverse(y.reshape(-1, *side, D), side, h, w)
        y = y.roll((shift, shift), (1, 2)) if shift else y
        return y.unflatten(0, (B, T))


def shift_mask(h: int, w: int, window: int, shift: int, device: torch.device) -> Tensor:
    """Which places of each shifted window were neighbours before the shift wrapped them around:
    bool (windows, places, places)."""
    def parts(length: int) -> Tensor:
        borders = (0,) * (length - window) + (1,) * (window - shift) + (2,) * shift
        return constant(borders, torch.long, device)

    part = 3 * parts(h)[:, None] + parts(w)
    part = window_partition(part[None, ..., None], (window, window)).flatten(1)
    return part[:, :, None] == part[:, None]


class ClassBlock(nn.Module):
    """Linear attention among the classes at each place; queries and keys are guided by the text.

    Classes are padded to max_classes with copies of one learned token. Equal keys and values add
    up, so one of them is computed and counted as often as it would occur.
    """

    def __init__(self, design: Design):
        super().__init__()
        width, self.heads, self.max_classes = design.width, design.heads, design.max_classes
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k = nn.Linear(2 * width, width), nn.Linear(2 * width, width)
        self.v = nn.Linear(width, width)
        self.mlp = Mlp(width, 4 * width, act_layer=nn.ReLU)
        self.padding = nn.Parameter(torch.zeros(width))
        self.padding_guidance = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, guidance: Tensor) -> Tensor:
        """x (B, T, h, w, D), guidance (B, T, 1, 1, D) -> x. In training at half the resolution."""
        pooled = x
        if self.training:       # the means of 2 x 2 places
            pooled = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).mean(dim=(3, 5))
        pooled = pooled + self.attend(self.norm1(pooled), guidance)
        pooled = pooled + self.mlp(self.norm2(pooled))
        if self.training:
            pooled = F.interpolate(pooled.flatten(0, 1).permute(0, 3, 1, 2), x.shape[2:4],
                                   mode="bilinear", align_corners=True)
            pooled = pooled.permute(0, 2, 3, 1).unflatten(0, x.shape[:2])
        return x + pooled

    def attend(self, x: Tensor, guidance: Tensor) -> Tensor:
        """The attention's output for normed x (B, T, h, w, D), float32."""
        q, k = (guided(linear, x, guidance) for linear in (self.q, self.k))
        token, v = self.norm1(self.padding), self.v(x)
        padding_k = guided(self.k, token, self.padding_guidance)
        with torch.autocast(x.device.type, enabled=False):
            q, k, v, padding_k, padding_v = (
                part.float().unflatten(-1, (self.heads, -1))
                for part in (q, k, v, padding_k, self.v(token)))
            padding = F.elu(padding_k) + 1, padding_v, max(0, self.max_classes - x.shape[1])
            return linear_attention(F.elu(q) + 1, F.elu(k) + 1, v, padding).flatten(-2)


def linear_attention(q: Tensor, k: Tensor, v: Tensor, padding: tuple[Tensor, Tensor, int]
                     ) -> Tensor:
    """Σ_s (q_t·k_s) v_s / Σ_s (q_t·k_s) over classes s: positive q, k and v (B, T, h, w, heads, d).

    padding: a key and its value (heads, d), and how many classes have them.
    """
    key, value, count = padding
    products = torch.einsum("bthwnd,bthwne->bhwnde", k, v)
    products = products + count * key[..., None] * value[..., None, :]
    total = torch.einsum("bthwnd,bhwnd->bthwn", q, k.sum(dim=1) + count * key)
    return torch.einsum("bthwnd,bhwnde->bthwne", q, products) / (total[..., None] + 1e-6)


def guided(linear: nn.Linear, x: Tensor, guidance: Tensor) -> Tensor:
    """linear([x, guidance]), for guidance that is the same along some dimensions of x.

    Its part of the sum is computed once instead of for every class or place.
    """
    of_x, of_guidance = linear.weight.tensor_split([x.shape[-1]], dim=1)
    return F.linear(x, of_x) + F.linear(guidance, of_guidance, linear.bias)


# ------------------------------------------------------------------------------------ the decoder

class Decoder(nn.Module):
    """Twice doubles the resolution of each class's features, guided by CLIP's early blocks."""

    def __init__(self, width: int):
        super().__init__()
        guidance = (2 * width, width // 4), (width, width // 8)
        self.guidance = nn.ModuleList(
            nn.Sequential(nn.Conv2d(wide, narrow, 3, padding=1), nn.ReLU())
            for wide, narrow in guidance)
        self.up = nn.ModuleList([Up(width, width // 2, width // 4),
                                 Up(width // 2, width // 4, width // 8)])
        self.head = nn.Conv2d(width // 4, 1, 3, padding=1)

    def forward(self, x: Tensor, taps: list[Tensor]) -> Tensor:
        """x (B, T, D, h, w), taps (B, 2D, 2h, 2w) and (B, D, 4h, 4w) -> (B, T, 4h, 4w)."""
        for up, narrow, tap in zip(self.up, self.guidance, taps):
            x = up(x, narrow(tap))
        return self.head(x.flatten(0, 1)).unflatten(0, x.shape[:2])[:, :, 0]


class Up(nn.Module):
    """Doubles the resolution, joins the guidance, and halves the channels."""

    def __init__(self, channels: int, out: int, guidance: int):
        super().__init__()
        self.up = nn.ConvTranspose2d(channels, channels - guidance, 2, 2)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.norm1, self.norm2 = (nn.GroupNorm(max(1, out // 16), out) for _ in range(2))

    def forward(self, x: Tensor, guidance: Tensor) -> Tensor:
        """x (B, T, channels, h, w), guidance (B, g, 2h, 2w) -> (B, T, out, 2h, 2w)."""
        B, T = x.shape[:2]
        x = self.up(x.flatten(0, 1))
        # As in `guided`: the convolution of both, the guidance's part once for all classes
        of_x, of_guidance = self.conv1.weight.tensor_split([x.shape[1]], dim=1)
        x = F.conv2d(x, of_x, padding=1).unflatten(0, (B, T))
        x = (x + F.conv2d(guidance, of_guidance, padding=1)[:, None]).flatten(0, 1)
        x = F.relu(self.norm1(x))
        return F.relu(self.norm2(self.conv2(x))).unflatten(0, (B, T))


# --------------------------------------------------------------------------------------- the loss

def segmentation_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy of logits (B, T, h, w) and labels (B, H, W), the mean over all pixels
    and classes -> scalar.

    Logits are enlarged to the labels. A pixel with a negative label is of no class, and counts.
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits = F.interpolate(logits.float(), labels.shape[-2:], mode="bilinear")
        # -t log σ(x) - (1 - t) log(1 - σ(x)) = softplus(x) - t x, and t is 0 but for one class
        of_class = logits.gather(1, labels.clamp(min=0)[:, None])[:, 0] * (labels >= 0)
        return (F.softplus(logits).sum() - of_class.sum()) / logits.numel()


# ------------------------------------------------------------------------- what trains inside CLIP

# The weights of both towers that train, after split_projections
TRAINED = r"\.(attn|attn_pool)\.((q?kv\.)?[qv](_proj)?[._]|in_proj_)weight$"


def split_projections(clip: DeCLIP) -> None:
    """Splits fused projections into q, k and v, so that the weights of q and v can train alone.

    An EVA-CLIP trains the whole input projection of its text tower, which stays as it is.
    Raises UserError if the text tower is not open_clip's own.
    """
    trunk, tower = clip.visual.trunk, clip.text.text
    if not isinstance(tower, TextTransformer):
        raise UserError(f"The text tower of {clip.model_name} is not open_clip's own transformer, "
                        "whose attention CAT-Seg trains; use another model.")
    for block in trunk.blocks:
        if isinstance(block.attn.qkv, nn.Linear):
            block.attn.qkv = Split(block.attn.qkv, "qkv")
    for block in [] if is_eva_clip(trunk) else tower.transformer.resblocks:
        attn = block.attn
        parts = attn.in_proj_weight.detach().chunk(3)
        attn.q_proj_weight, attn.k_proj_weight, attn.v_proj_weight = (
            nn.Parameter(part.clone()) for part in parts)
        attn.in_proj_weight, attn._qkv_same_embed_dim = None, False     # torch's own other form


@contextmanager
def short_context(tower: TextTransformer, length: int) -> Iterator[None]:
    """Within it, a text tower takes sentences of so many tokens, without padding to its context."""
    whole = tower.attn_mask
    if length < tower.context_length:
        tower.attn_mask = whole[:length, :length]
    try:
        yield
    finally:
        tower.attn_mask = whole
