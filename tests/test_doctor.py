"""The doctor on runs and bundles of every kind: what it reads of them, and the page that it writes."""

import io
import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from twofold import runtime
from twofold.cli import main
from twofold.data.cache import decoded
from twofold.data.samples import motion
from twofold.data.sources import open_source
from twofold.errors import UsageError
from twofold.measure import findings
from twofold.measure.collapse import health
from twofold.measure.copies import loss_allowed, picture_groups, small
from twofold.measure.hubness import gap
from twofold.measure.metrics import Interval
from twofold.measure.negatives import NEAR, of_pairs, of_views
from twofold.models.bundle import Bundle
from twofold.models.ema import Ema
from twofold.models.tokens import patches
from twofold.objectives import masked_pixels, nt_xent
from twofold.train import trackers
from twofold.train.doctor import doctor
from twofold.train.doctor_page import page
from twofold.train.masked import by_distance, predicted
from twofold.train.restored import leak, restored
from twofold.train.trackers import tracked
from twofold.views.masks import random, taken

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SMALL = ["--encoder", "timm:resnet18/8", "--size", "32", "--small-stem", "--head.hidden", "32", "--head.dim", "16"]
TINY = ["--encoder", "timm:vit_tiny_patch16_224/8x32x2", "--size", "32"]
FEW = ["--batch", "16", "--epochs", "3", "--limit", "64", "--save-every", "4"]


def cloud(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of MoCo, which has a queue, and one of MAE, which hides patches; both reported when they ended."""
    folder = tmp_path_factory.mktemp("runs")
    queue = ["--queue", "64", "--log-to", f"tensorboard:{folder / 'board'}"]
    assert main(["train", "moco", "openmoji", "--out", str(folder / "moco"), *SMALL, *FEW, *queue]) == 0
    painter = ["--decoder.depth", "1", "--decoder.width", "32", "--decoder.heads", "2"]
    assert main(["train", "mae", "openmoji", "--out", str(folder / "mae"), *TINY, *FEW, *painter, "--no-report"]) == 0
    return folder


# -- What the figures are ---------------------------------------------------------------------------------------------


def test_copies_are_found_by_what_they_look_like():
    pictures = torch.rand(6, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    pictures = nn.functional.interpolate(pictures[..., :4, :4], size=40, mode="bicubic").clamp(0, 1)
    pictures[3] = pictures[1]
    file = io.BytesIO()  # the same again, smaller and through JPEG
    levels = (255 * pictures[2].permute(1, 2, 0)).byte().numpy()
    Image.fromarray(levels).resize((32, 32)).save(file, "JPEG", quality=90)
    again = np.array(Image.open(file).resize((40, 40))) / 255
    pictures[5] = torch.tensor(again).permute(2, 0, 1).float()
    groups = picture_groups(small(pictures))
    assert groups[1] == groups[3] and groups[2] == groups[5] and len(set(groups.tolist())) == 4
    pictures[3] = pictures[1].flip(0)  # of other colours: no print sees that
    assert len(set(picture_groups(small(pictures)).tolist())) == 5


def test_the_loss_that_copies_allow_is_what_copies_that_are_one_cost():
    groups = np.repeat(np.arange(4), 300)
    directions = torch.eye(4)[torch.as_tensor(groups)]
    draw = np.random.default_rng(1)
    losses = []
    for _ in range(300):
        # Batches drawn as a training does; partners and copies at cosine 1, all else at 0.
        z = directions[draw.permutation(1200)[:6]]
        losses.append(nt_xent(z, z, temperature=0.02).item())
    assert loss_allowed(groups, 6) == pytest.approx(np.mean(losses), rel=0.05)
    assert loss_allowed(np.arange(9), 6) == 0


def test_errors_go_by_the_distance_from_what_was_seen():
    error = cloud(2, 1, 3).abs()
    keep, hidden = torch.tensor([[0], [5]]), torch.tensor([[[1, 2, 5]], [[4, 8, 0]]])
    grid = (3, 3)
    expected: dict[float, list[float]] = {}
    for row in range(2):
        for place, cell in enumerate(hidden[row, 0].tolist()):
            away = min(math.hypot(cell // 3 - k // 3, cell % 3 - k % 3) for k in keep[row].tolist())
            expected.setdefault(round(2 * away) / 2, []).append(error[row, 0, place].item())
    found = by_distance(error, keep, hidden, grid)
    assert [away for away, _, _ in found] == sorted(expected)
    for away, mean, count in found:
        assert (mean, count) == (pytest.approx(np.mean(expected[away])), len(expected[away]))


def test_the_gap_of_a_slow_copy():
    layer = nn.Linear(3, 2, bias=False)
    copy = Ema(layer)
    assert copy.gap() == 0
    before = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight.add_(1)
    copy.update(layer, 0.75)
    expected = 0.75 * (layer.weight - before).norm() / layer.weight.norm()
    assert copy.gap() == pytest.approx(expected.item(), abs=1e-6)


class Normed(nn.Module):
    """A network whose outputs are told apart by their batch, or are not."""

    def __init__(self, leaks: bool):
        super().__init__()
        self.encoder, self.head, self.norm = nn.Identity(), nn.Identity(), nn.BatchNorm1d(8)
        if leaks:
            self.head = self.norm


def test_a_batch_that_gives_partners_away_is_found_out():
    # Directions of a batch after its norm depend on the others in it; the views themselves are the same.
    first = second = cloud(64, 8) * torch.tensor([30.0, 1, 1, 1, 1, 1, 1, 1]) + 5
    assert leak(Normed(True), (first, second), batch=64) is None, "one batch cannot be mixed"
    together, gain = leak(Normed(True), (first, second), batch=8)
    assert together.value > 0.9 and gain.low > 0.1
    assert leak(Normed(False), (first, second), batch=8)[1].value == 0
    assert findings.of_leak(together, gain)[0].name == "the batch gives partners away"
    assert findings.of_leak(Interval(0.9, 0.8, 1), Interval(0.0, -0.01, 0.01)) == []


def test_findings_say_what_was_made_ill_and_nothing_of_what_was_not():
    z = cloud(64, 32)
    near, apart = (
        of_views(z, z + 0.001 * cloud(64, 32, seed=1), temperature=0.1),
        of_views(z, z + z.roll(1, 0), temperature=0.1),
    )
    assert [v.name for v in findings.of_positives(near, health(z))] == ["positives at 1"]
    assert findings.of_positives(apart, health(z)) == []
    one = of_views(torch.ones(64, 4), torch.ones(64, 4), temperature=0.1)
    assert findings.of_positives(one, health(z)) == [], "where strangers agree as well, it is a collapse"
    log = [{"step": k, "loss": 0.5} for k in range(5)]
    assert [v.name for v in findings.of_allowed(log, 2.0)] == ["below what copies allow"]
    assert findings.of_allowed(log, 0.52) == [] and findings.of_allowed([], 2.0) == []
    assert [v.name for v in findings.of_copies(np.repeat(np.arange(8), 8), 0.0, 64)] == ["duplicate data"]
    assert [v.name for v in findings.of_copies(np.arange(64), 0.5, 64)] == ["copies"]
    assert findings.of_copies(np.arange(64), 0.0, 64) == []
    color, crop = Interval(0.6, 0.5, 0.7), Interval(0.1, 0.0, 0.2)
    assert "jitter" in findings.of_shortcuts({"colour histogram": color, "thumbnail": crop}, 64)[0].advice
    assert findings.of_shortcuts({"colour histogram": crop}, 64) == [] == findings.of_shortcuts({}, 64)
    side = cloud(64, 16)
    cones = side + 20 * torch.eye(16)[0], 4 * cloud(64, 16, seed=3) - 20 * torch.eye(16)[0]
    found = findings.of_sides(gap(*cones), of_pairs(*cones, temperature=0.1), ("image", "text"))
    assert [v.name for v in found] == ["sides apart"]
    assert findings.of_sides(gap(side, side), of_pairs(side, side, temperature=0.1), ("image", "text")) == []
    assert findings.of_predictions([(1.0, 0.99, 10)], 1.0)[0].name == "predicts the mean"
    assert findings.of_predictions([(1.0, 0.4, 10), (2.0, 0.8, 10)], 1.0) == []


# -- Runs -------------------------------------------------------------------------------------------------------------


def test_negatives_as_near_as_the_positive_are_suspects_only_where_they_are_few():
    z = cloud(40, 8)
    seen = of_views(z, z + 0.1 * cloud(40, 8, seed=1), temperature=0.5)

    def named(**kinds):
        return [v.name for v in findings.of_negatives(seen._replace(kinds=kinds))]

    assert named(**{NEAR: (0.05, 0.4)}) == ["false negatives"]
    assert named(**{NEAR: (0.18, 0.56)}) == [], "so many are near a positive that does not stand out yet"
    assert named(copies=(0.18, 0.56)) == ["false negatives"], "what is known is no suspicion"
    assert named(copies=(0.18, 0.3)) == []


def test_a_method_comes_back_from_its_checkpoint(runs):
    record = json.loads((runs / "moco" / "run.json").read_text())
    method = restored(runs / "moco", record)
    weights = Bundle.load(runs / "moco").towers["image"].encoder.state_dict()
    own = method.encoder.state_dict()
    assert all(torch.equal(own[name], weight) for name, weight in weights.items())
    assert method.queue.keys.shape == (64, 16)
    assert restored(runs / "nowhere", record) is None


def test_the_log_has_what_the_doctor_wants(runs):
    log = [json.loads(line) for line in (runs / "moco" / "log.jsonl").read_text().splitlines()]
    assert all(0 <= line["ema_gap"] < 1 for line in log)
    looked = [line for line in log if "positive" in line]
    assert [line["step"] for line in looked] == [4, 8, 12]
    assert all(-1 <= line["hardest"] <= 1 and 0 < line["sharing"] <= 1 for line in looked)


def test_a_training_ends_with_its_report(runs):
    page = (runs / "moco" / "doctor.html").read_text()
    for heading in ("Verdict", "The training", "Map", "Structure", "the queue", "Views", "As it was asked for"):
        assert heading in page
    assert "OpenMoji" in page.rsplit("<footer>", 1)[1], "the licence asks for it"
    assert page.count("<polyline") > 8 and "https://" not in page.rsplit("<footer>", 1)[0]
    assert not (runs / "mae" / "doctor.html").exists()


def test_tensorboard_reads_back_what_the_log_says(runs):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(runs / "board" / "moco"))
    board.Reload()
    log = [json.loads(line) for line in (runs / "moco" / "log.jsonl").read_text().splitlines()]
    events = board.Scalars("loss")
    assert [event.step for event in events] == [line["step"] for line in log]
    assert [event.value for event in events] == pytest.approx([line["loss"] for line in log])
    assert {"rank", "ema_gap", "positive"} <= set(board.Tags()["scalars"])


def test_what_nothing_can_be_sent_to_is_refused():
    with pytest.raises(UsageError, match="tensorboard"), tracked("tensorbord:x", "a", {}):
        pass
    with pytest.raises(UsageError, match="PROJECT"), tracked("wandb", "a", {}):
        pass


def test_a_tracker_that_fails_costs_no_training(monkeypatch, capsys):
    told: list[int] = []

    def opened(place, name, config):
        def tell(line):
            if line["step"] == 2:
                raise ConnectionError("the server went away\nwith a long story")
            told.append(line["step"])

        return tell, lambda: None

    monkeypatch.setattr(trackers, "_mlflow", opened)
    with tracked("mlflow:http://board", "a", {}) as tell:
        for step in (1, 2, 3):
            tell({"step": step, "loss": 1.0})
    assert told == [1]
    said = " ".join(capsys.readouterr().err.split())
    assert "told nothing more (from step 2 on): ConnectionError: the server went away" in said and "story" not in said

    def refused(place, name, config):
        raise OSError("nobody listens")

    monkeypatch.setattr(trackers, "_mlflow", refused)
    with (
        pytest.raises(UsageError, match="http://board could not be opened: OSError: nobody"),
        tracked("mlflow:http://board", "a", {}),
    ):
        pass


def test_hidden_patches_are_looked_at(runs, capsys):
    data = open_source("openmoji").take(range(40))
    done = doctor(runs / "mae", data, quiet=True)
    found = done.predicted
    assert found.painted.shape == (6, 3, 32, 32, 3) and found.constant == pytest.approx(191 / 192)
    method = restored(runs / "mae", done.record)
    x = torch.tensor(decoded(data, 32).pixels)[:16].float() / 255
    again = predicted(method, x, seed=3)
    # The mean over all distances is the method's own loss on the same masks.
    keep, hidden = random(len(x), method.tokens.cells, share=method.share, draw=runtime.generator(3, "masks"))
    with torch.no_grad():
        painted = method.decoder(method.tokens(x, keep), keep, hidden)
        loss = masked_pixels(painted, taken(patches(method.tokens.standard(x), method.tokens.patch), hidden)).mean()
    count = sum(n for _, _, n in again.by_distance)
    assert sum(e * n for _, e, n in again.by_distance) / count == pytest.approx(loss.item(), rel=1e-4)
    # What was seen is left as it is, and what was hidden is gray in the middle picture alone.
    whole, seen, filled = (again.painted[0][k].astype(int) for k in range(3))
    shown = (seen == whole).all(-1)
    assert (filled[shown] == whole[shown]).all() and 0.2 < shown.mean() < 0.6


def test_hidden_tubes_of_clips_are_looked_at(tmp_path):
    run = tmp_path / "clips"
    few = ["--limit", "16", "--epochs", "1", "--batch", "8", "--frames", "4", "--stride", "1", "--size", "32"]
    narrow = ["--predictor.depth", "1", "--predictor.width", "24", "--predictor.heads", "2"]
    encoder = ["--encoder", "timm:vit_tiny_patch16_224/8x16x1"]
    assert main(["train", "vjepa", "motion", "--out", str(run), *encoder, *few, *narrow, "--no-report"]) == 0
    clips = motion(16, 8, frames=4).split("train")
    done = doctor(run, clips, quiet=True)
    found = done.predicted
    assert found.painted.shape == (6, 2, 32, 2 * 32, 3)  # a frame of each of two tubelets, whole and as it was seen
    whole, seen = (found.painted[:, k].astype(int) for k in range(2))
    grey = (seen == 128).all(-1) & (whole != seen).any(-1)
    np.testing.assert_array_equal(grey[:, :, :32], grey[:, :, 32:])  # a tube hides a place at all times
    assert (seen[~grey] == whole[~grey]).all() and 0 < grey.mean() < 1
    assert sum(n for _, _, n in found.by_distance) % 2 == 0 and found.constant > 0
    assert done.shown.thumbnails.shape == (16, 48, 48, 3)
    assert "what was seen of it" in page(done) and done.figures["predicted"].painted is None


def test_a_bundle_is_looked_at_without_its_run_and_beside_another(runs, tmp_path, capsys):
    out = tmp_path / "page.html"
    asked = ["doctor", str(runs / "moco" / "bundle"), "--data", "openmoji", "--limit", "60", "--out", str(out)]
    assert main([*asked, "--against", str(runs / "mae"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["record"] == {} and found["against"]["name"] == "mae"
    assert 0 <= found["against"]["spaces"]["overlap"]["value"] <= 1
    assert "Beside mae" in out.read_text() and "The training" not in out.read_text()
    assert main(["doctor", str(runs / "moco" / "bundle")]) == 2
    assert "--data" in capsys.readouterr().err
    assert main([*asked[:-1], str(tmp_path / "a.md"), "--against", str(runs / "mae")]) == 0
    text = (tmp_path / "a.md").read_text()
    assert "| effective rank |" in text and "neighbours lie across" in text and "CKA" in text


@pytest.mark.skipif(CHROMIUM is None, reason="needs a browser")
def test_the_page_zooms_and_shows_what_a_point_is(runs):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 390, "height": 800})
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto((runs / "moco" / "doctor.html").as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, "nothing is wider than a phone"
        plot = page.locator("svg[data-x]").first
        plot.scroll_into_view_if_needed()
        box = plot.bounding_box()
        whole = plot.locator("polyline").get_attribute("points")
        page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 40)
        page.mouse.down()
        page.mouse.move(box["x"] + 0.9 * box["width"], box["y"] + 40, steps=4)
        page.mouse.up()
        left = int(plot.locator(".left").text_content())
        assert left > 1 and plot.locator("polyline").get_attribute("points") != whole
        assert int(page.locator("svg[data-x]").nth(1).locator(".left").text_content()) == left, "all curves follow"
        page.keyboard.press("Escape")
        assert plot.locator(".left").text_content() == "1"
        point = page.locator(".map circle").first
        point.scroll_into_view_if_needed()
        point.dispatch_event("click")
        assert page.locator(".held .p").evaluate("each => getComputedStyle(each).backgroundImage").startswith("url(")
        assert errors == []
        browser.close()
