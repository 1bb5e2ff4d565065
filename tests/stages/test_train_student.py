"""Stage two as a whole on a tiny real store: learns, exports, resumes, refuses."""

from __future__ import annotations

import io
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.nn.functional import log_softmax, softmax

from distinit.pipeline.clips.transforms import normalize_clip
from distinit.pipeline.common.console import Console
from distinit.pipeline.common.errors import CheckpointError, TrainingInterrupted, UsageError
from distinit.pipeline.store.reader import TargetStore
from distinit.pipeline.students.student_files import load_student
from distinit.pipeline.training.distillation_options import TrainConfig
from distinit.stages.train_student import _assemble, train_student
from distinit.tests import warm

pytestmark = pytest.mark.slow

QUIET = Console(quiet=True)


def config(store: Any, out: Path, **changes: Any) -> TrainConfig:
    loop = {
        "batch_size": 4, "epochs": 2, "epoch_clips": 12, "lr": 0.02, "workers": 0, "threads": 1,
        "device": "cpu", "checkpoint_every": 2, "log_every": 2, **changes.pop("loop", {}),
    }  # fmt: skip
    base = {
        "store": str(store.path), "out": str(out), "student": {"width": 0.125}, "loop": loop,
        "clips": {"clip_frames": 8, "size": 32, "resize": [40, 60]},
    }  # fmt: skip
    return TrainConfig.model_validate(base | changes)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_student(run).state_dict()


def test_a_run_trains_exports_and_says_what_it_did(tiny_store, tmp_path):
    changes = {
        "held_out": 0.3,
        "targets": {"picks": "random:2", "max_entropy_quantile": 0.6, "quantile_draws": 300},
    }
    result = train_student(config(tiny_store, tmp_path / "run", **changes), QUIET)
    assert (result["epochs"], result["steps"]) == (2, 6)
    assert result["videos"] + result["held_out_videos"] == 12
    assert 0.5 < result["kept_share"] < 1  # two heads, each keeps 0.6
    assert result["best"] <= result["held_out"]["loss"]
    shares = result["kept_share_by_teacher"]
    assert shares == {name: pytest.approx(0.6, abs=0.1) for name in ("sure", "unsure")}
    constant, perfect = result["baseline_loss"], result["loss_lower_bound"]
    assert result["explained_fraction"] == pytest.approx(
        (constant - result["held_out"]["loss"]) / (constant - perfect)
    )
    assert result["explained_by"] == "held-out"
    heads = sum(result["held_out"][f"loss/{name}"] for name in ("sure", "unsure"))
    assert result["held_out"]["loss"] == pytest.approx(heads)
    assert 0 <= result["held_out"]["agreement/sure"] <= 1
    written = {key: value for key, value in result.items() if key != "next"}
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == json.loads(
        json.dumps(written)
    )
    used = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["train-student"]
    assert used["loop"]["lr"] == 0.02
    assert used["targets"]["picks"] == "random:2"
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "last.pt", weights_only=True)
    assert json.loads(checkpoint["identity"])["filter"]["nats"] == result["max_entropy"]
    student = load_student(tmp_path / "run")
    assert student.classes == {"sure": 7, "unsure": 5}
    assert student.meta.clip_size == 32
    # The loss of the sum over teachers is what the log says.
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    for line in lines:
        if line["kind"] == "train":
            assert line["loss"] == pytest.approx(line["loss/sure"] + line["loss/unsure"], rel=1e-5)
    again = train_student(config(tiny_store, tmp_path / "run", resume=True, **changes), QUIET)
    assert again["already_finished"]


def test_a_finished_run_exports_the_best_weights_when_asked_later(tiny_store, tmp_path):
    """And the last ones after that again."""
    run = tmp_path / "run"
    train_student(config(tiny_store, run), QUIET)
    last = weights(run)
    checkpoint = torch.load(run / "checkpoints" / "best.pt", weights_only=True)
    for tensor in checkpoint["model"].values():
        tensor.mul_(2)  # whichever epoch was the best
    torch.save(checkpoint, run / "checkpoints" / "best.pt")
    for export, wanted in (("best", checkpoint["model"]), ("last", last)):
        again = train_student(config(tiny_store, run, resume=True, export=export), QUIET)
        assert again["already_finished"]
        assert again["exported"] == export
        resumed = weights(run)
        assert all(torch.equal(resumed[name], wanted[name]) for name in resumed)


def test_the_average_of_the_weights_is_validated_and_exported_on_request(tiny_store, tmp_path):
    run, loop = tmp_path / "run", {"ema": 0.9, "optimizer": "adamw", "schedule": "cosine"}
    changes = {"held_out": 0.3, "student_head": {"sure": "mlp"}}
    plain = train_student(config(tiny_store, run, loop=loop, **changes), QUIET)
    saved = torch.load(run / "checkpoints" / "last.pt", weights_only=True)
    assert all(torch.equal(value, saved["model"][name]) for name, value in weights(run).items())
    assert plain["weights"] == "trained"
    assert load_student(run).head_kinds == {"sure": "mlp", "unsure": "linear"}
    with pytest.raises(UsageError, match="student_head names 'nobody'; the heads are: sure"):
        train_student(config(tiny_store, run, student_head={"nobody": "mlp"}), QUIET)
    with pytest.raises(CheckpointError, match=r"student_head.* = .*mlp"):
        train_student(config(tiny_store, run, loop=loop, held_out=0.3, resume=True), QUIET)
    again = config(tiny_store, run, loop={**loop, "weights": "ema"}, resume=True, **changes)
    assert train_student(again, QUIET)["already_finished"]
    assert all(torch.equal(value, saved["ema"][name]) for name, value in weights(run).items())
    # The same training, validated with the average: other held-out losses, the same weights.
    other = config(tiny_store, tmp_path / "b", loop={**loop, "weights": "ema"}, **changes)
    assert train_student(other, QUIET)["held_out"]["loss"] != plain["held_out"]["loss"]
    checkpoint = torch.load(tmp_path / "b" / "checkpoints" / "last.pt", weights_only=True)
    for part in ("model", "ema"):
        assert all(
            torch.equal(value, saved[part][name]) for name, value in checkpoint[part].items()
        )


def test_held_out_clips_are_those_that_the_filter_keeps(tiny_store, tmp_path, capfd):
    """An epoch with no held-out clip that counts still ends, for any choice of held-out videos."""
    store = TargetStore.open(str(tiny_store.path))
    targets = {"teachers": ["unsure"], "max_entropy_quantile": 0.3, "quantile_draws": 300}
    held = []
    for seed in range(6):
        settings = config(
            tiny_store, tmp_path / "run", targets=targets, held_out=0.2, loop={"seed": seed}
        )
        parts = _assemble(settings, store, ("unsure",), None, QUIET)
        held.append(0 if parts.held_out is None else len(parts.held_out.sampler.videos))
        for k in range(held[-1]):
            assert parts.held_out.sampler.draw(0, k).counts
    assert 0 in held, "of some seeds no held-out clip counts"
    assert max(held) > 0
    seed = held.index(0)
    settings = config(
        tiny_store,
        tmp_path / "run",
        targets=targets,
        held_out=0.2,
        loop={"seed": seed, "epochs": 1},
    )
    with Console() as console:
        assert train_student(settings, console)["held_out"] == {}
    assert "training loss" in capfd.readouterr().err


def test_the_order_in_which_teachers_are_named_changes_nothing(tiny_store, tmp_path, whole):
    for run, names in (("one", ["sure", "unsure"]), ("other", ["unsure", "sure"])):
        train_student(config(tiny_store, tmp_path / run, targets={"teachers": names}), QUIET)
        reordered = weights(tmp_path / run)
        assert all(torch.equal(whole[name], reordered[name]) for name in whole)


def test_a_narrow_student_overfits_the_teachers_on_a_few_clips(tiny_store, tmp_path):
    """Towards the entropy of the targets, below which no cross-entropy falls."""
    train = config(
        tiny_store, tmp_path / "run", targets={"teachers": ["sure"], "picks": "uniform:2"},
        loop={"epochs": 16, "epoch_clips": 12, "lr": 0.05, "step_epochs": 12, "clip_norm": 5},
    )  # fmt: skip
    result = train_student(train, QUIET)
    epochs = [
        line["loss"]
        for line in map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
        if line["kind"] == "epoch"
    ]
    assert result["loss"] < 0.7 * epochs[0]
    assert result["loss_lower_bound"] < result["loss"] < result["baseline_loss"] < epochs[0]
    constant = result["baseline_loss"]
    assert result["explained_fraction"] == pytest.approx(
        (constant - result["loss"]) / (constant - result["loss_lower_bound"])
    )


def test_a_student_that_learned_nothing_is_told_of(tiny_store, tmp_path, capfd):
    with Console() as console:
        result = train_student(config(tiny_store, tmp_path / "run", loop={"lr": 1e-9}), console)
    logged = capfd.readouterr().err
    assert f"{result['baseline_loss']:.3f}" in logged
    assert f"{result['loss_lower_bound']:.3f}" in logged
    assert "warning:" in logged
    assert "loop.lr" in logged


@pytest.mark.parametrize("loss", ["cross-entropy", "squared-error"])
def test_the_first_loss_is_the_equation_computed_by_hand(tiny_store, tmp_path, loss):
    targets = {
        "loss": loss,
        "tau": 2.0,
        "max_entropy": {"unsure": 1.2},
        "filter_mode": "zero-weight",
    }
    train = config(
        tiny_store,
        tmp_path / "run",
        targets=targets,
        loop={"epoch_clips": 4, "epochs": 1, "lr": 1e-9},
    )
    result = train_student(train, QUIET)

    from distinit.pipeline.students.student import build_student
    from distinit.pipeline.targets.dataset import StudentClips
    from distinit.pipeline.targets.picks import PickRule
    from distinit.pipeline.targets.sampler import TargetSampler

    store = TargetStore.open(tiny_store.path)
    sampler = TargetSampler(
        store, teachers=("sure", "unsure"), picks=PickRule.parse("random"), clip_frames=8, videos=store.usable(),
        seed=0, epoch_clips=4, max_entropy={"unsure": 1.2}, filter_mode="zero-weight",
    )  # fmt: skip
    clips = StudentClips(sampler, train.clips)
    batch = [clips[0, sample] for sample in range(4)]
    torch.manual_seed(0)
    student = build_student(train.student, {"sure": 7, "unsure": 5}).train()
    outputs = student(
        normalize_clip(torch.stack([example["clip"] for example in batch]), torch.float32)
    )
    total = 0.0
    for name in ("sure", "unsure"):
        losses = []
        for i, example in enumerate(batch):
            if example["weight"][name] == 0:
                continue
            mean, own = example["targets"][name], outputs[name][i]
            if loss == "cross-entropy":
                losses.append(-(softmax(mean / 2.0, 0) * log_softmax(own, 0)).sum())
            else:
                losses.append(((own - mean) ** 2).sum())
        total += sum(loss.item() for loss in losses) / max(1, len(losses))
    assert result["loss"] == pytest.approx(total, rel=1e-4)


def test_a_dry_run_writes_the_first_batch_as_a_picture_and_nothing_else(tiny_store, tmp_path):
    result = train_student(config(tiny_store, tmp_path / "run", dry_run=True), QUIET)
    assert result["picture"] == str(tmp_path / "run" / "first-batch.png")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["first-batch.png"]
    assert result["head_parameters"] == {"sure": (64 + 1) * 7, "unsure": (64 + 1) * 5}
    assert result["memory_bytes"] > 4 * 3 * result["backbone_parameters"]
    assert result["flops_per_clip"] > 0
    train_student(config(tiny_store, tmp_path / "run", loop={"epochs": 1, "epoch_clips": 4}), QUIET)


def test_weights_of_losses_filters_of_teachers_and_corpora_are_options_of_one_store(
    tiny_store, tmp_path
):
    targets = {
        "loss_weights": {"sure": 3.0}, "corpora": {"videos": 1.0}, "filter_mode": "zero-weight",
        "max_entropy_quantile": {"unsure": 0.5}, "quantile_draws": 400,
    }  # fmt: skip
    train = config(tiny_store, tmp_path / "run", targets=targets, held_out=0.3, loop={"epochs": 1})
    result = train_student(train, QUIET)
    assert list(result["max_entropy"]) == ["unsure"]
    assert result["kept_share"] == 1  # the head without a filter keeps every clip
    assert result["kept_share_by_teacher"] == {"unsure": pytest.approx(0.5, abs=0.1)}
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert lines[0]["loss"] == pytest.approx(
        3 * lines[0]["loss/sure"] + lines[0]["loss/unsure"], rel=1e-5
    )
    held = result["held_out"]
    assert held["loss"] == pytest.approx(3 * held["loss/sure"] + held.get("loss/unsure", 0.0))
    with pytest.raises(UsageError, match=r"targets\.corpora.*'x'.*videos"):
        train_student(config(tiny_store, tmp_path / "new", targets={"corpora": {"x": 1}}), QUIET)
    with pytest.raises(UsageError, match=r"targets\.loss_weights.*'x'.*sure, unsure"):
        train_student(
            config(tiny_store, tmp_path / "new", targets={"loss_weights": {"x": 1}}), QUIET
        )
    changed = {**targets, "loss_weights": {"sure": 2.0}}
    again = config(
        tiny_store, tmp_path / "run", targets=changed, held_out=0.3, loop={"epochs": 1}, resume=True
    )
    with pytest.raises(CheckpointError, match=r"targets\.loss_weights\.sure.*3\.0.*2\.0"):
        train_student(again, QUIET)


@pytest.fixture(scope="module")
def whole(tiny_store, tmp_path_factory) -> dict[str, torch.Tensor]:
    """Weights of a run that was never stopped."""
    run = tmp_path_factory.mktemp("whole")
    train_student(config(tiny_store, run), QUIET)
    return weights(run)


def test_a_resumed_run_has_the_weights_of_an_uninterrupted_one(tiny_store, tmp_path, whole):
    class Stopping(Console):
        """SIGTERM when the first log line is shown, after step 2."""

        def info(self, text: str) -> None:
            if "step 2/" in text:
                os.kill(os.getpid(), signal.SIGTERM)

    with (
        pytest.raises(TrainingInterrupted, match=r"step [23] of 6"),
        Stopping(quiet=True) as console,
    ):
        train_student(config(tiny_store, tmp_path / "cut"), console)
    assert not (tmp_path / "cut" / "student.safetensors").exists()
    result = train_student(
        config(tiny_store, tmp_path / "cut", resume=True, loop={"workers": 2}), QUIET
    )
    assert result["resumed_from_step"] in (2, 3)
    cut = weights(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_a_job_that_is_killed_with_all_its_processes_goes_on_where_it_was(
    tiny_store, tmp_path, whole, sent
):
    used = config(tiny_store, tmp_path / "cut", loop={"workers": 2}).model_dump(mode="json") | {
        "resume": "auto"
    }
    program = (
        "import json, sys\n"
        "from distinit.pipeline.common.errors import TrainingInterrupted\n"
        "from distinit.pipeline.common.console import Console\n"
        "from distinit.pipeline.training.distillation_options import TrainConfig\n"
        "from distinit.stages.train_student import train_student\n"
        "try:\n"
        "    train_student(TrainConfig.model_validate(json.loads(sys.argv[1])), Console(quiet=True))\n"
        "except TrainingInterrupted as error:\n"
        "    print(error)\n"
        "    sys.exit(error.exit_code)\n"
    )
    process = warm.Process(json.dumps(used), code=program)
    last = tmp_path / "cut" / "checkpoints" / "last.pt"
    while process.poll() is None and not last.exists():
        time.sleep(0.01)
    if process.poll() is None:
        os.killpg(process.pid, sent)
    code = process.wait()
    if sent == signal.SIGTERM and code:  # 0: the run was faster than the signal
        assert code == 75
        assert b"the checkpoint is written" in process.stdout
    train_student(TrainConfig.model_validate(used), QUIET)
    cut = weights(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_videos_left_out_are_never_drawn(tiny_store, tmp_path):
    store = TargetStore.open(str(tiny_store.path))
    listed = tmp_path / "tests.txt"
    listed.write_text(
        "# of the labelled set\n\n"
        + "".join(f"{'/'.join(store.place(v))}\n" for v in range(0, 12, 2))
    )
    chosen = config(
        tiny_store, tmp_path / "run", exclude=str(listed), loop={"epoch_clips": None, "epochs": 1}
    )
    dataset = _assemble(chosen, store, ("sure",), None, QUIET).train
    assert {dataset.sampler.draw(0, sample).video for sample in range(48)} == set(range(1, 12, 2))
    assert train_student(chosen, QUIET)["videos"] == 6
    listed.write_text("/".join(store.place(1)) + "\n")
    with pytest.raises(CheckpointError, match="exclude"):
        train_student(chosen.model_copy(update={"resume": True}), QUIET)
    listed.write_text("elsewhere/a.mp4\n")
    with pytest.raises(UsageError, match=r"exclude.*tests.txt.*'elsewhere/a.mp4'"):
        train_student(chosen.model_copy(update={"out": str(tmp_path / "other")}), QUIET)


def test_refusals_are_one_line_that_names_the_option(tiny_store, tmp_path):
    settings = config(tiny_store, tmp_path / "run", loop={"epochs": 1})
    train_student(settings, QUIET)
    used = (tmp_path / "run" / "config.yaml").read_text()

    def refused(error: type[Exception], run: str = "run", **changes: Any) -> str:
        with pytest.raises(error) as caught:
            train_student(config(tiny_store, tmp_path / run, **changes), QUIET)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    one = {"epochs": 1}
    assert "already holds a run" in refused(UsageError, loop=one)
    vmz = {"width": 0.125, "variant": "vmz"}
    assert 'student.variant = "torchvision", now it is "vmz"' in refused(
        CheckpointError, loop=one, resume=True, student=vmz
    )
    assert "targets.picks" in refused(
        CheckpointError, loop=one, resume=True, targets={"picks": "center"}
    )
    assert (
        tmp_path / "run" / "config.yaml"
    ).read_text() == used  # a refused command changes nothing
    assert "'nobody' is not in" in refused(UsageError, "new", targets={"teachers": ["nobody"]})
    assert "asked for 3 picks" in refused(UsageError, "new", targets={"picks": "random:3"})
    assert "keeps none" in refused(
        UsageError, "new", targets={"teachers": ["unsure"], "max_entropy": 1e-6}
    )
    assert "names 'x'" in refused(UsageError, "new", targets={"max_entropy": {"x": 1.0}})
    assert "--videos nowhere=" in refused(UsageError, "new", video_roots={"nowhere": str(tmp_path)})
    (tmp_path / "empty").mkdir()
    assert "none of the first 12 videos of corpus 'videos' " in refused(
        UsageError, "new", video_roots={"videos": str(tmp_path / "empty")}
    )
    with pytest.raises(UsageError, match=r"targets\.zarr.*--out"):
        train_student(config(tiny_store, tiny_store.path), QUIET)


def test_videos_that_are_gone_are_told_of_before_and_after(tiny_store, own_store, tmp_path, capfd):
    for path in sorted(own_store.videos.iterdir())[:5]:
        path.unlink()
    video_roots = {"videos": str(own_store.videos)}
    with Console() as console:
        result = train_student(
            config(tiny_store, tmp_path / "run", video_roots=video_roots), console
        )
    stderr = capfd.readouterr().err
    assert "5 of the first 12 videos of corpus 'videos' " in stderr
    assert f"{len(result['unreadable'])} unreadable videos, replaced by other draws: " in stderr
    assert 0 < len(result["unreadable"]) <= 5


def test_held_out_results_and_each_head_s_share_are_on_the_screen(tiny_store, tmp_path):
    err = io.StringIO()
    targets = {"max_entropy_quantile": {"unsure": 0.25}, "quantile_draws": 400}
    settings = config(
        tiny_store, tmp_path / "run", targets=targets, held_out=0.3, loop={"epochs": 2}
    )
    settings = settings.model_copy(
        update={"clips": settings.clips.model_copy(update={"clip_frames": 60})}
    )
    with Console(stderr=err) as console:
        result = train_student(settings, console)
    lines = err.getvalue().splitlines()
    (shares,) = [line for line in lines if "entropy filter" in line]
    assert result["kept_share_by_teacher"]["unsure"] < result["kept_share"] == 1
    assert f"{result['kept_share_by_teacher']['unsure']:.0%}" in shares
    assert "100%" in shares
    assert sum("held out: loss" in line for line in lines) == 2
    assert sum(line.startswith("    sure: ") and "agreement " in line for line in lines) == 2
    # The losses of two heads have a line of their own, below that of a step.
    steps = [at for at, line in enumerate(lines) if "clips/s" in line]
    assert steps
    assert all(lines[at + 1].startswith("    sure ") for at in steps)
    assert not [line for line in lines if "\\n" in line]
    assert sum("--frames 60" in line for line in lines) == 1
