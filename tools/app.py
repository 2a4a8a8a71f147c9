"""A page in the browser: drop a photograph, type words, see what is where; click to see attention.

    python -m tools.app --ckpt out/declip/declip.safetensors        # then open 127.0.0.1:7860
    python -m tools.app --ckpt ... --detector out/fvit/fvit.safetensors     # its boxes, too
    python -m tools.app --ckpt ... --examples my/photos --classes "cat, wooden chair, grass"
    python -m tools.app @presets/toy_app.txt --ckpt out/toy/declip/declip.safetensors

Needs the package gradio, and no network. Requests are answered one after the other; whoever
reaches HOST may ask. What they drop lies in a temporary folder until the program ends.
"""

import os
import sys
import traceback
from collections.abc import Callable
from functools import partial, wraps
from tempfile import TemporaryDirectory
from types import ModuleType, SimpleNamespace

import torch
from PIL import Image

from eval_seg import Protocol
from tools import figures
from tools.answers import DRAWN, Answers, Scene, as_typed, draw_attention, read_photo, shrunk
from util import UserError, distributed, printable, settings
from util.images import list_images, read_image

SHARED = {"eval_region": ["The model", "Names and numbers"], "eval_seg": ["The windows"],
          "tools.segment": ["What is named"]}

# What is shown
EXAMPLES: str | None = None         # folder of photographs to choose from, the first 8; None: none
DETECTOR: str | None = None         # a detector's checkpoint, whose boxes are shown; None: none
LEAST = 0.3                         # score from which a box is shown

# The page
HOST = "127.0.0.1"                  # address to listen on; 0.0.0.0 lets the whole network ask
PORT = 7860                         # port to listen on
MAX_FILE_MB = 20                    # of a photograph; larger files are refused
MAX_PIXELS = 4_000_000              # of a photograph; larger ones are reduced
MAX_NAMES = 200                     # names and synonyms of one request


def main(argv: list[str] | None = None) -> None:
    """Serves the page that the command line (or `argv`) asks for until it is interrupted."""
    cfg = settings.parse(argv, sys.modules[__name__])
    with distributed.session(__file__) as ranks, TemporaryDirectory() as folder:
        page = start(cfg, ranks.device, folder)
        print(f"the page is at {page.local_url}; Ctrl-C ends it", flush=True)
        page.block_thread()


def start(cfg: SimpleNamespace, device: torch.device, folder: str) -> object:
    """Opens the models and serves the page in a thread -> gradio's Blocks, with a `local_url`.

    folder: a temporary one, for what is dropped and drawn. Raises UserError for a missing gradio,
    for settings and files that don't fit, and for a port that is taken.
    """
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": folder}
    try:
        import gradio as gr
    except ImportError:
        raise UserError("tools.app needs the package gradio, which is missing; install it by "
                        "pip install gradio.") from None
    check(cfg)
    examples = list_images(cfg.EXAMPLES)[0][:8] if cfg.EXAMPLES else []
    page = build(gr, Answers(cfg, device), examples)
    page.queue(max_size=20)
    theme = gr.themes.Default(primary_hue="blue", font="system-ui", font_mono="monospace")
    try:
        page.launch(server_name=cfg.HOST, server_port=cfg.PORT, prevent_thread_lock=True,
                    quiet=True, max_file_size=cfg.MAX_FILE_MB * 2**20, state_session_capacity=100,
                    ssr_mode=False, footer_links=[], run_history=False, enable_monitoring=False,
                    css=CSS, theme=theme)
    except OSError as error:
        raise UserError(f"The page can't be served at {cfg.HOST}, port {cfg.PORT} ({error}); "
                        "choose another PORT or HOST.") from None
    return page


def check(cfg: SimpleNamespace) -> None:
    """Raises UserError for settings out of their range or in vain."""
    Protocol.of(cfg)
    settings.check_min(cfg, MAX_FILE_MB=1, MAX_PIXELS=10_000, MAX_NAMES=1)
    settings.check(cfg, PORT=(0 < cfg.PORT < 2**16, "from 1 to 65535"))
    settings.refuse_unused(
        cfg, ATTENTION="is of one evaluation, and the page has CLIP's beside the model's",
        LEAST=not cfg.DETECTOR and "is of a DETECTOR, and none is given",
        THRESHOLD=not cfg.BACKGROUND and "is for --background, which was not given",
        LOGIT_SCALE=cfg.THRESHOLD is None and "is for a THRESHOLD, and none is given")


# ---------------------------------------------------------------------------------- the page

ABOUT = """# DeCLIP
Drop a photograph and type words: each pixel gets the word that fits it best. Click a place in the
photograph to see what its patch attends to in the last block, in CLIP and in the model."""
INFO = ("Classes with commas between, synonyms with |. In several lines (Shift+Enter): a class a "
        "line, its synonyms after commas.")
CSS = """
.gradio-container { max-width: 1700px !important; padding: 8px 20px !important }
#head h1 { font-size: 30px; margin: 0 } #head p { font-size: 16px; margin: 0 }
#words textarea { font-size: 17px } #words label > div { color: #555 } #colours { display: none }
#legend .wrap { gap: 6px } #legend label { font-size: 16px; padding: 3px 9px }
#examples .grid-container { grid-template-columns: repeat(4, minmax(0, 1fr)); padding-top: 24px;
    grid-template-rows: none; grid-auto-rows: auto }
#examples button { height: auto; min-height: 0; aspect-ratio: 1 }
"""


def build(gr: ModuleType, answers: Answers, examples: list[str]) -> object:
    """The page, gradio's Blocks: words, legend and examples beside two rows of pictures."""
    parts = SimpleNamespace()
    panel = partial(gr.Image, interactive=False, height="41vh", format="png",
                    buttons=["download", "fullscreen"])
    with gr.Blocks(title="DeCLIP", analytics_enabled=False, fill_width=True,
                   delete_cache=(600, 3600)) as page:
        parts.scene = gr.State()
        gr.Markdown(ABOUT, elem_id="head")
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                parts.words = gr.Textbox(as_typed(answers.cfg.CLASSES), label="Words", info=INFO,
                                         max_lines=12, elem_id="words")
                parts.button = gr.Button("Segment", variant="primary", elem_id="segment")
                parts.legend = gr.CheckboxGroup(label="Classes and their shares",
                                                visible=False, elem_id="legend")
                parts.colours = gr.HTML(elem_id="colours")
                parts.examples = gr.Gallery(
                    [shrunk(read_image(path, True, 10**6), 160) for path in examples],
                    label="Examples", allow_preview=False, height="auto", buttons=[],
                    visible=bool(examples), elem_id="examples")
            with gr.Column(scale=3):
                with gr.Row():
                    parts.photo = gr.Image(
                        label="Photograph", type="filepath", image_mode=None, sources=["upload"],
                        height="41vh", format="png", buttons=["fullscreen"], elem_id="photo")
                    parts.regions = panel(label=f"What {answers.rows[1].title} finds where",
                                          elem_id="regions")
                with gr.Row():
                    parts.attention = [
                        panel(label=f"What the marked patch attends to in {row.title}",
                              elem_id=f"attention-{place}")
                        for place, row in enumerate(answers.rows)]
                parts.boxes = panel(label="What the detector finds", elem_id="boxes",
                                    visible=bool(answers.detector))
        connect(gr, answers, examples, parts)
    return page


def connect(gr: ModuleType, answers: Answers, examples: list[str], parts: SimpleNamespace) -> None:
    """What the page does when it is used."""
    results = [parts.regions, parts.legend, parts.colours, parts.boxes]
    asked, found = [parts.scene, parts.words], [parts.scene, *results]
    marked = [parts.scene, parts.photo, *parts.attention]
    fresh = [*marked, *results]

    def take(path: str | None) -> tuple:
        empty = None, None, None, gr.update(visible=False), "", None
        if path is None:
            return None, None, *empty
        photo, note = read_photo(path, answers.cfg.MAX_PIXELS)
        if note:
            gr.Info(note, title="Reduced")
        return Scene(photo), shrunk(photo, DRAWN), *empty

    def drop(dropped: dict) -> tuple:
        return take(dropped["path"])

    def choose(event: gr.SelectData) -> tuple:
        return take(examples[event.index])

    def look(scene: Scene | None, words: str) -> tuple:
        if scene is None:
            raise UserError("There is no photograph; drop one first.")
        scene = answers.segment(scene, words)
        return (scene, *legend_of(gr, scene), answers.boxes(scene))

    def look_if_named(scene: Scene | None, words: str) -> tuple:
        if scene is None or not words.strip(" ,|\n"):       # are asked for by the button
            return tuple(gr.skip() for _ in found)
        return look(scene, words)

    def attend(scene: Scene | None, event: gr.SelectData) -> tuple:
        if scene is None:
            raise UserError("The photograph is gone; drop it again.")
        scene = scene if scene.attention else answers.attend(scene)
        return scene, *draw_attention(scene, event.index)

    def redraw(scene: Scene, shown: list[str]) -> Image.Image:
        return figures.regions(scene.photo, scene.found, scene.classes, shown, DRAWN)

    def on(listen: Callable, function: Callable, inputs: list, outputs: list, **how: object
           ) -> object:
        # One request at a time: models and matplotlib are not made for several.
        return listen(in_sentences(gr, function, len(outputs), how.pop("failed", None)), inputs,
                      outputs, concurrency_id="model", concurrency_limit=1,
                      api_visibility="private", **how)

    # Not preprocessed: gradio would open the file before read_photo, and with any of its decoders.
    for event in (on(parts.photo.upload, drop, [parts.photo], fresh, preprocess=False,
                     failed=take(None)),
                  on(parts.examples.select, choose, [], fresh, failed=take(None))):
        on(event.success, look_if_named, asked, found)
    on(parts.photo.clear, partial(take, None), [], fresh)
    on(parts.button.click, look, asked, found)
    on(parts.words.submit, look, asked, found)
    on(parts.legend.input, redraw, [parts.scene, parts.legend], [parts.regions])
    on(parts.photo.select, attend, [parts.scene], marked)


def legend_of(gr: ModuleType, scene: Scene) -> tuple:
    """A scene's picture with all classes, its legend, and the legend's colours."""
    colour_of = figures.colours({"": scene.found}, scene.classes)
    shares = figures.shares(scene.found, scene.classes)
    seen = figures.seen_classes([scene.found], scene.classes)
    choices = [(f"{name}  {100 * shares[name]:.1f} %", name) for name in seen]
    rules = [f"#legend label:nth-of-type({place}) input {{ background-color: {colour_of[name]} "
             f"!important; border-color: {colour_of[name]} !important }}"
             for place, name in enumerate(seen, 1)]
    picture = figures.regions(scene.photo, scene.found, scene.classes, seen, DRAWN)
    legend = gr.update(visible=True, value=seen, choices=choices)
    return picture, legend, f"<style>{' '.join(rules)}</style>"


def in_sentences(gr: ModuleType, function: Callable, count: int, failed: tuple | None) -> Callable:
    """A function of `count` outputs, whose errors are sentences in the page.

    failed: the outputs after an error; None: those that were there.
    """
    @wraps(function)
    def guarded(*given: object) -> object:
        try:
            return function(*given)
        except UserError as error:
            sentence = printable(str(error))
        except Exception as error:
            traceback.print_exc()
            sentence = f"The program failed ({type(error).__name__}); its terminal says more."
        gr.Warning(sentence, duration=None, title="This did not work")
        left = tuple(gr.skip() for _ in range(count))
        return failed or (left if count > 1 else left[0])
    return guarded


if __name__ == "__main__":
    main()
