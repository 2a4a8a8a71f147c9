"""util/hub.py: checkpoints by name, from a hub on this machine."""

import json
import zlib
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import huggingface_hub
import pytest
import tiny  # noqa: F401
import torch
from conftest import options

import eval_seg
from downstream.catseg.model import CATSeg, Design
from downstream.detector import open_backbone
from downstream.fvit.model import Design as FViTDesign
from downstream.fvit.model import FViT
from model import DeCLIP
from tools import detect, export, segment
from util import UserError, hub
from util.results import read_results, result_path

COMMIT = "a" * 40


class Hub(SimpleHTTPRequestHandler):
    """Answers as the hub does: owner/name/resolve/REVISION/FILE of a folder that has owner/name."""
    asked: list[str] = []

    def send(self, with_body: bool) -> None:
        *repo, _, revision, file = self.path.lstrip("/").split("/", 4)
        self.asked.append(self.path)
        path = Path(self.directory, *repo, file)
        error = ("RepoNotFound" if not path.parent.is_dir() else "RevisionNotFound"
                 if revision not in ("main", COMMIT) else "" if path.is_file() else "EntryNotFound")
        self.send_response(404 if error else 200)
        body = b"" if error else path.read_bytes()
        for name, value in {"X-Error-Code": error, "X-Repo-Commit": COMMIT,
                            "ETag": f'"{zlib.crc32(body):x}"',
                            "Content-Length": str(len(body))}.items():
            self.send_header(name, value) if value else None
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.send(False)

    def do_GET(self) -> None:
        self.send(True)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def online(tmp_path, monkeypatch):
    """A folder that is the hub, and an empty cache."""
    (tmp_path / "hub").mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, directory=tmp_path / "hub"))
    Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
    constants = huggingface_hub.constants
    address, template = f"http://127.0.0.1:{server.server_port}", "HUGGINGFACE_CO_URL_TEMPLATE"
    monkeypatch.setattr(constants, template,
                        getattr(constants, template).replace(constants.ENDPOINT, address))
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    hub.fetch.cache_clear()
    Hub.asked.clear()
    yield tmp_path / "hub"
    server.shutdown()
    server.server_close()
    hub.fetch.cache_clear()


def put(folder: Path, name: str = "some/body", file: str = "declip.safetensors",
        **settings: str) -> DeCLIP:
    """Puts a tiny checkpoint on the hub."""
    clip = DeCLIP("tiny-eva", context="qk")
    clip.save(folder / name / file, settings)
    return clip


@pytest.mark.parametrize("name", ["hf-hub:some/body", "hf-hub:some/body@main",
                                  f"hf-hub:some/body@{COMMIT}",
                                  "hf-hub:some/body/declip.safetensors@main"])
def test_a_model_by_name(online, name):
    """Model, context and weights are the file's; it says itself what it is."""
    clip = put(online)
    for found in (DeCLIP(name), DeCLIP(pretrained=name)):
        assert (found.model_name, found.context) == ("tiny-eva", "qk")
        assert all(torch.equal(value, clip.state()[key]) for key, value in found.state().items())
    assert not [path for path in Hub.asked if "catseg" in path]


def test_a_tag_changes_nothing(online):
    """`--model hf-hub:some/body` with the default weights would else forget the attention."""
    put(online)
    assert DeCLIP("hf-hub:some/body", "merged2b_s8b_b131k").context == "qk"


def test_it_is_downloaded_once_and_used_without_a_network(online, monkeypatch):
    put(online)
    DeCLIP("hf-hub:some/body")
    count = len(Hub.asked)
    DeCLIP("hf-hub:some/body")
    assert len(Hub.asked) == count
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub.fetch.cache_clear()
    assert DeCLIP("hf-hub:some/body").context == "qk"
    with pytest.raises(UserError, match="hf-hub:some/other is not in the cache, and the Hugging F"):
        DeCLIP("hf-hub:some/other")


@pytest.mark.parametrize("name, words", [
    ("hf-hub:some/other", "there is no such model, or it is private"),
    ("hf-hub:some/body@old", "it has no such revision"),
    ("hf-hub:some/body/fvit.safetensors", "has no fvit.safetensors; name the file that you mean"),
    ("hf-hub:body", "hf-hub:body is no name of a checkpoint"),
    ("hf-hub:some/body/../../etc@x", "hf-hub:|no such|can't be had"),
    ("hf-hub:--/--", "can't be had"),
    ("hf-hub:some/body@", "is no name of a checkpoint")])
def test_what_is_not_there_is_one_sentence(online, name, words):
    put(online)
    with pytest.raises(UserError, match=words) as error:
        DeCLIP(pretrained=name)
    assert "\n" not in str(error.value)


def test_commands_take_a_name(online, voc, tmp_path, monkeypatch):
    """Figures go to out/, not into the cache; the photograph's figure stands beside it."""
    monkeypatch.chdir(tmp_path)
    put(online)
    given = {"ckpt": "hf-hub:some/body@main", "templates": "a {}.", "short_side": 48, "window": 32}
    eval_seg.main(options(**given, data=voc, benchmarks="voc20", num_workers=0))
    result, = read_results("out/seg.json")
    assert result["of"]["ckpt"] == given["ckpt"] and result["of"]["context"] == "qk"
    photo = voc / "VOCdevkit/VOC2012/JPEGImages/s_0.jpg"
    segment.main([str(photo), *options(**given, classes="bird, bus", out="figures")])
    assert Path("figures/s_0.segmentation.png").is_file()
    assert open_backbone({"BACKBONE": given["ckpt"]}).context == "qk"
    for layout in ("eva", "hub"):
        export.main(options(ckpt=given["ckpt"], layout=layout))
    assert Path("out/declip_eva.pt").is_file() and Path("out/hub/declip.safetensors").is_file()


def test_detectors_and_segmenters_by_name(online, tmp_path, photo):
    """Their tools find the file that they need, also where others are beside it; the detector's
    backbone may be on the hub, too."""
    clip = put(online)
    small = FViTDesign(image_size=64, channels=16, candidates=100, proposals=20, templates="{}")
    FViT(clip, ["disc"], [True], small).save(online / "some/body/fvit.safetensors")
    CATSeg(DeCLIP("tiny-eva"), Design(32, width=16)).save(online / "some/cat/catseg.safetensors")
    detect.main([photo, *options(ckpt="hf-hub:some/body/fvit.safetensors", cache="none",
                                 backbone="hf-hub:some/body", out=tmp_path)])
    assert (tmp_path / "0.detection.png").is_file()
    segment.main([photo, *options(ckpt="hf-hub:some/cat", classes="disc, box", out=tmp_path)])
    assert (tmp_path / "0.segmentation.png").is_file()


@pytest.fixture
def photo(images) -> str:
    return str(images / "more/0.png")


def test_a_repository_of_another_kind_is_looked_through(online):
    """Without a file in the name, the first of this project's that is there."""
    put(online, "some/thing", "fvit.safetensors")
    assert hub.local("hf-hub:some/thing").endswith("fvit.safetensors")
    put(online, "some/thing", "notes.safetensors")
    assert hub.local("hf-hub:some/thing/notes.safetensors").endswith("notes.safetensors")


def test_no_file_decides_about_a_download(online, tmp_path):
    """What a record names is not fetched, neither weights nor a backbone; once a command has named
    it, it is there."""
    put(online)
    put(tmp_path, "a", PRETRAINED="hf-hub:some/body", BACKBONE="hf-hub:some/body")
    asked = len(Hub.asked)
    cfg = SimpleNamespace(CKPT=str(tmp_path / "a/declip.safetensors"), PRETRAINED=None)
    with pytest.raises(UserError, match="A file says that it needs hf-hub:some/body"):
        segment.open_original(cfg, DeCLIP(pretrained=cfg.CKPT))
    record = hub.Recorded("hf-hub:some/body")
    with pytest.raises(UserError, match="a file downloads nothing"):
        open_backbone({"BACKBONE": record})
    assert len(Hub.asked) == asked
    DeCLIP("hf-hub:some/body")
    asked = len(Hub.asked)
    hub.fetch.cache_clear()
    assert open_backbone({"BACKBONE": record}).context == "qk"
    assert segment.open_original(cfg, DeCLIP(pretrained=cfg.CKPT)).context == "qk"
    assert len(Hub.asked) == asked


def test_results_of_a_model_of_the_hub_go_to_out():
    cfg = SimpleNamespace(OUT=None, CKPT="hf-hub:some/body")
    assert result_path(cfg, "seg") == Path("out/seg.json")
    assert json.loads(json.dumps(hub.Recorded("x"))) == "x"
