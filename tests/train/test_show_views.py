"""``midge views`` as a user calls it, and its page in a real browser with every request refused."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from midge.__main__ import main
from midge.runtime.errors import UserError
from midge.runtime.images import UnreadableBudget, list_images, load_image
from midge.train.backbones import find_backbone
from midge.train.config import PretrainConfig
from midge.train.contact_sheet import show_images
from midge.train.datasets import ViewDataset
from midge.train.magnification import equal_magnification_px
from midge.train.pretrain import build_dataset
from midge.train.sampling import ViewSampler
from midge.train.show_views import build_sampler
from midge.train.views import AUGMENTATIONS, blur_range_px, view_policy
from midge.train.views_config import ViewsConfig

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.usefixtures("one_thread")

CHROMIUM = Path("/usr/bin/chromium")
HOSTILE = "<img src=x onerror=alert(1)>.png"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Images of several modes and sizes, one of them with a hostile name."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i, (mode, size) in enumerate((("RGB", (90, 60)), ("L", (60, 60)), ("RGBA", (50, 80)), ("P", (64, 48)))):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize(size, Image.Resampling.BICUBIC).convert(mode).save(folder / f"{i}.png")
    Image.new("RGB", (1, 1), "red").save(folder / "pixel.png")
    Image.new("RGB", (40, 30), "blue").save(folder / HOSTILE)
    return folder


def decoded(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB")).astype(int)


def test_json_compares_the_policies(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["views", "--data", str(photos), "--image-px", "64", "--views", "auto", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["schema"], document["images"], document["chosen"], document["html"]) == (1, 6, "auto", None)
    policies = document["policies"]
    assert list(policies) == ["baseline", "lowcompute", "auto"]
    assert [policies[name]["local_px"] for name in ("baseline", "lowcompute")] == [27, 37]
    sizes = np.array([load_image(path).shape[:2] for path in photos.iterdir()])
    assert policies["auto"]["local_px"] == equal_magnification_px(view_policy("auto", "cnn", 64), sizes, 1) != 37
    assert policies["baseline"]["nothing"] > policies["lowcompute"]["nothing"]


def test_what_is_changed_by_flags_stands_beside_the_named_policies(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--image-px", "32", "--local-area", "0.3", "0.8", "--num-local", "4"]
    assert main(["views", "--data", str(photos), *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-4:]] == ["yours", "baseline", "lowcompute", "auto"]
    assert "yours *" in lines[-4] and "4 × 18" in lines[-4] and "30–80" in lines[-4]


def test_a_vit_has_its_own_policies(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--backbone", "vit_tiny_patch16_224", "--image-px", "64", "--views", "auto", "--json"]
    assert main(["views", "--data", str(photos), *flags]) == 0
    policies = json.loads(capsys.readouterr().out)["policies"]
    assert {one["num_local"] for one in policies.values()} == {10}
    assert all(one["local_px"] % 16 == 0 for one in policies.values())


def test_the_jitters_strength_reaches_training_and_what_is_shown(photos: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"method": "swav", "image_px": 32, "jitter_strength": 0.25}
    training = PretrainConfig(photos, tmp_path / "run", batch_size=4, **settings)
    network = find_backbone("resnet18", 32)
    sampler = build_dataset(training, list_images(photos), network).sampler
    shown = build_sampler(ViewsConfig(photos, **settings), view_policy("lowcompute", "cnn", 32))
    for strength in (sampler.strength, shown.strength):
        assert np.array_equal(np.unique(strength.reshape(-1, 4), axis=0), [[0.2, 0.2, 0.2, 0.05]])


def test_the_views_shown_are_those_of_training(photos: Path) -> None:
    images = list_images(photos)
    policy = view_policy("lowcompute", "cnn", 32)
    sampler = ViewSampler(policy, AUGMENTATIONS["dino"], blur_range_px(32), seed=4)
    shown = show_images(images, np.arange(len(images)), 6, policy, sampler, UnreadableBudget(0, len(images)))
    dataset = ViewDataset(images, policy, sampler, batch_size=6, seed=4)
    batch = dataset[0]
    order = dataset._order[1].tolist()
    trained = [views.numpy() for views in (batch.global_views, batch.local_views)]
    assert [image.name for image in shown] == list(images.paths)
    for index, image in enumerate(shown):
        place = order.index(index)
        wanted = [*trained[0][place::6], *trained[1][place::6]]
        for view, pixels in zip(image.views, wanted, strict=True):
            assert np.array_equal(decoded(view.image), pixels)
        assert decoded(image.image).shape == load_image(photos / image.name).shape
    first = shown[images.paths.index("0.png")]
    assert [view.name for view in first.views] == ["G1", "G2", "1", "2", "3", "4", "5", "6"]
    for view in first.views:
        assert view.area == pytest.approx(view.height * view.width / (60 * 90))
        assert view.top + view.height <= 60 and view.left + view.width <= 90


def test_shards_give_the_views_of_their_images(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "pack", str(photos), "--out", str(tmp_path / "shards")]) == 0
    capsys.readouterr()
    page = tmp_path / "page.html"
    flags = ["--image-px", "32", "--views", "auto", "--html", str(page), "--json"]
    assert main(["views", "--data", str(tmp_path / "shards"), *flags]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["images"], document["sizes_read"]) == (6, 6)
    assert page.read_text().count('class="item"') == 6


def test_unreadable_images_are_named_and_passed_over_within_the_allowance(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "broken.png").write_bytes((photos / "0.png").read_bytes()[:300])
    (photos / "text.png").write_text("no image")
    page = tmp_path / "page.html"
    arguments = ["views", "--data", str(photos), "--image-px", "32", "--html", str(page)]
    assert main([*arguments, "--max-unreadable", "0.1"]) == 2
    assert not page.exists()
    capsys.readouterr()
    assert main([*arguments, "--max-unreadable", "0.5", "--images", "8"]) == 0
    said = capsys.readouterr().err
    assert "broken.png" in said and "text.png" in said
    assert page.read_text().count('class="item"') == 6


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--views", "huge"], "Unknown view policy 'huge': choose one of auto, baseline, lowcompute"),
        (["--backbone", "resnet1"], "Unknown backbone 'resnet1'"),
        (["--method", "byol"], "Unknown method 'byol'"),
        (["--images", "0"], "--images is 0: give a value from 1 to 24"),
        (["--local-area", "0.5", "0.2"], "--local-area is"),
        (["--image-px", "64", "--backbone", "efficientformerv2_s0"], "cannot take views of 37 px"),
        (["--image-px", "30", "--backbone", "vit_tiny_patch16_224"], "does not divide into patches of 16 px"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    page = tmp_path / "page.html"
    assert main(["views", "--data", str(photos), "--html", str(page), *flags]) == 2
    assert message in capsys.readouterr().err
    assert not page.exists()


def test_configuration_checks_areas() -> None:
    with pytest.raises(UserError, match="--global-area is"):
        ViewsConfig(Path("d"), global_area=(0.0, 1.0)).check()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not CHROMIUM.exists():
        pytest.skip(f"no browser at {CHROMIUM}")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_the_page_shows_every_view_and_asks_for_nothing(
    browser: Any, photos: Path, tmp_path: Path, width: int, scheme: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "page.html"
    arguments = ["views", "--data", str(photos), "--image-px", "64", "--views", "auto", "--html", str(path), "--json"]
    assert main(arguments) == 0
    policies = json.loads(capsys.readouterr().out)["policies"]
    assert path.stat().st_size < 200_000
    context = browser.new_context(viewport={"width": width, "height": 900}, offline=True, color_scheme=scheme)
    page = context.new_page()
    requests: list[str] = []
    complaints: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(path.as_uri())
    try:
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        pictures = page.query_selector_all("figure.view img")
        assert len(pictures) == 6 * 8
        loaded = [picture.evaluate("i => i.complete && i.naturalWidth") for picture in pictures]
        assert loaded == ([64] * 2 + [policies["auto"]["local_px"]] * 6) * 6
        assert all(picture.get_attribute("alt") for picture in pictures)
        sides = [picture.bounding_box()["width"] for picture in page.query_selector_all("figure.view img")[:8]]
        assert sides[7] / sides[0] == pytest.approx(policies["auto"]["local_px"] / 64, rel=0.02)
        assert len(page.query_selector_all(".source rect.box")) == 6 * 8
        rows = [re.sub(r"\s+", " ", row.inner_text()) for row in page.query_selector_all("#policies tbody tr")]
        for row, (name, one) in zip(rows, policies.items(), strict=True):
            assert row.startswith(name)
            assert f"{one['magnification']:.2f}" in row and f" {100 * one['nothing']:.1f} " in row
        for bar, one in zip(page.query_selector_all("#overlaps .row svg"), policies.values(), strict=True):
            full = bar.bounding_box()["width"]
            nothing = bar.query_selector("rect.nothing").bounding_box()["width"]
            assert nothing / full == pytest.approx(one["nothing"], abs=0.005)
        assert HOSTILE in page.inner_text("main")
        assert page.query_selector_all("script, iframe, link, [onerror]") == []
    finally:
        context.close()
    assert [url for url in requests if not url.startswith("data:")] == [path.as_uri()]
    assert complaints == []
