"""Prepared copies, frame by frame against plain decodes of the source and of the copy."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from torchmetrics.functional.image import structural_similarity_index_measure

from distinit.pipeline.common.errors import StoreMismatchError, UsageError, VideoError
from distinit.pipeline.prepared import frame_map
from distinit.pipeline.prepared.copies import read_copy
from distinit.pipeline.prepared.folders import copy_name, prepared_corpora
from distinit.pipeline.prepared.frame_map import FrameMap, read_map
from distinit.pipeline.prepared.make_copy import make_copy
from distinit.pipeline.prepared.prepare_options import CopyOptions
from distinit.pipeline.prepared.quality import psnr, ssim
from distinit.pipeline.video.container import digest
from distinit.pipeline.video.decoder import VideoReader
from distinit.pipeline.video.encode import transcode, write_video
from distinit.pipeline.video.frames import read_frames
from distinit.pipeline.video.geometry import View

OPTIONS = CopyOptions(short_side=32, gop=5, crf=12)
ODD = CopyOptions(size=(33, 45), gop=5, crf=12)
VIEW = View(resize=(30, 44))


def moving(frames: int, height: int = 48, width: int = 80) -> Iterator[np.ndarray]:
    """Smooth pictures, each unlike its neighbours: the pattern drifts and the brightness jumps."""
    y, x = np.mgrid[0:height, 0:width] / height * 2 * np.pi
    for t in range(frames):
        waves = [np.sin(x + k + 0.5 * t) * np.cos(y * (1 + k / 2) - 0.3 * t) for k in range(3)]
        yield (
            (128 + 60 * np.stack(waves, -1) + 40 * ((t * 7) % 11 / 11 - 0.5))
            .clip(0, 255)
            .astype(np.uint8)
        )


def plain(path: Path | str, view: View | None) -> dict[int, tuple[int, np.ndarray]]:
    """Return index → (pts, picture) from one linear decode."""
    with VideoReader(str(path)) as reader:
        renderer = reader.info.renderer()
        display = (reader.info.height, reader.info.width)
        return {
            i: (p, renderer.render(f, view, display=display)) for i, p, f in reader.decode_plain()
        }


def copied(source: Path, folder: Path, options: CopyOptions = OPTIONS) -> tuple[str, FrameMap]:
    target = os.fspath(folder / "copies" / "deep" / "copy.mp4")
    made_map = make_copy(os.fspath(source), os.fspath(folder / "part"), target, options)
    assert not (folder / "part").exists()
    return target, made_map


UNEVEN = {"vf": "setpts='PTS+floor(N/7)*0.2/TB+mod(N,3)*0.01/TB'", "fps_mode": "passthrough"}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "B-frames, one group": ("a.mkv", {"gop": 250, "bframes": 3}),
    "open groups": (
        "a.mp4",
        {"gop": 10, "bframes": 3, "extra": {"x264-params": "open-gop=1:b-adapt=0"}},
    ),
    "uneven times": ("a.mkv", {"gop": 12, "bframes": 2, "extra": UNEVEN}),
    "transport stream": ("a.ts", {"gop": 12, "bframes": 2}),
    "no pts": ("a.avi", {"codec": "mpeg4", "bframes": 2, "gop": 12}),
    "wide pixels": ("a.mp4", {"gop": 12, "extra": {"vf": "setsar=3/2"}}),
    "rotated": ("a.mp4", {"gop": 12}),
    "edit list": ("a.mp4", {"gop": 30, "bframes": 2}),
    "cut off": ("a.mkv", {"gop": 12, "bframes": 2}),
    "damaged": ("a.mp4", {"gop": 20, "bframes": 0}),
}


def make_source(case: str, folder: Path) -> Path:
    name, options = CASES[case]
    path = folder / name
    write_video(
        path, moving(50), **{"crf": 10, **options} if options.get("codec") is None else options
    )
    changed = folder / f"changed{path.suffix}"
    if case == "rotated":
        transcode(path, changed, codec="copy", input_options={"display_rotation": 90})
        return changed
    if case == "edit list":
        transcode(
            path, changed, codec="copy", input_options={"ss": 1.5}, extra={"fps_mode": "auto"}
        )
        return changed
    if case == "cut off":
        os.truncate(path, path.stat().st_size * 2 // 3)
    if case == "damaged":
        with av.open(str(path)) as container:
            packet = [p for p in container.demux(video=0) if p.size][25]
            position, size = packet.pos, packet.size
        with path.open("r+b") as file:
            file.seek(position)
            file.write(b"\xff" * size)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_copy_frame_k_shows_source_frame_k(case: str, tmp_path: Path) -> None:
    source = make_source(case, tmp_path)
    path, _ = copied(source, tmp_path)
    with VideoReader(str(source)) as reader:
        line, info = reader.timeline(), reader.info
    size = View(resize=OPTIONS.picture(info.height, info.width))
    truth, copies = plain(source, size), plain(path, size)

    # The map records the frames that the reader gave …
    copy_map = read_map(path)
    assert copy_map.index.tolist() == list(truth)
    assert copy_map.pts.tolist() == [pts for pts, _ in truth.values()]
    assert (copy_map.source.frames, copy_map.source.clock) == (len(line), line.clock)
    assert copy_map.source.time_base == line.time_base
    assert copy_map.source.digest == digest(str(source))
    assert (copy_map.source.note is not None) == (case == "damaged")
    if case == "rotated":
        assert copy_map.height > copy_map.width
    # … the copy has as many frames, and each is nearest to its own source frame, by far …
    assert list(copies) == list(range(len(truth)))
    pictures = np.stack([picture for _, picture in truth.values()]).astype(np.float64)
    for k, (_, picture) in copies.items():
        distance = np.abs(pictures - picture).mean((1, 2, 3))
        assert distance.argmin() == k, (case, k)
        assert distance[k] < 6 < np.delete(distance, k).min(), (case, k)
    # … and the way a loader reads it gives the container's frames, bit for bit.
    rank = {index: k for k, index in enumerate(truth)}
    copy_frames = plain(path, VIEW)
    random = np.random.default_rng(0)
    whole = np.array(sorted(truth))
    for wanted in (whole, whole[::-3], random.choice(whole, 9), whole[-4:]):
        clip = read_copy(
            path, wanted, VIEW, expect=(wanted[:1], np.array([truth[int(wanted[0])][0]]))
        )
        expected = [copy_frames[rank[i]][1] for i in wanted.tolist()]
        np.testing.assert_array_equal(clip.images, expected)
        assert clip.pts.tolist() == [truth[i][0] for i in wanted.tolist()]
        assert (clip.total, clip.repeated) == (len(line), 0)


@pytest.mark.parametrize("case", ["uneven times", "rotated", "wide pixels"])
def test_copies_of_the_clips_own_size_need_no_resize_and_no_even_sides(
    case: str, tmp_path: Path
) -> None:
    source = make_source(case, tmp_path)
    path, made_map = copied(source, tmp_path, ODD)
    assert (made_map.height, made_map.width) == ODD.size == (33, 45)
    with av.open(
        path
    ) as container:  # without a resize: these are the colours of the stored pictures
        stream = container.streams.video[0]
        stored = [f.to_ndarray(format="rgb24") for f in container.decode(stream)]
        shape = stored[0].shape[1] * stream.sample_aspect_ratio / stored[0].shape[0]
    assert stored[0].shape == (34, 46, 3)
    assert float(shape) == pytest.approx(
        46 / 45 * 33 / 34 * made_map.source.width / made_map.source.height, rel=0.01
    )
    everything = np.arange(len(made_map))
    exact = View(resize=ODD.size)
    images = read_copy(path, everything, exact).images
    np.testing.assert_array_equal(images, [picture[:33, :45] for picture in stored])
    for view, limit in ((exact, 5), (VIEW, 7), (View(resize=40), 9)):
        truth = plain(source, view)
        for k, picture in enumerate(read_copy(path, everything, view).images):
            assert picture.shape == truth[k][1].shape
            assert np.abs(picture.astype(int) - truth[k][1]).mean() < limit, (view, k)
    cropped = read_copy(path, everything[:5], View(resize=ODD.size, crop=31)).images
    np.testing.assert_array_equal(cropped, images[:5, 1:32, 7:38])


def test_a_frame_damaged_in_the_source_is_shown_as_the_original_shows_it(tmp_path: Path) -> None:
    source = make_source("damaged", tmp_path)
    path, made_map = copied(source, tmp_path)
    lost = sorted(set(range(made_map.source.frames)) - set(made_map.index.tolist()))
    assert lost
    clip = np.arange(lost[0] - 4, lost[0] + 4)
    original, copy = read_frames(str(source), clip, VIEW), read_copy(path, clip, VIEW)
    assert original.repeated == copy.repeated > 0
    assert original.pts.tolist() == copy.pts.tolist()
    assert np.abs(original.images.astype(int) - copy.images).mean() < 6
    with VideoReader(str(source)) as reader:
        pts = reader.timeline().pts[lost[:1]]
    for read, where in ((read_frames, str(source)), (read_copy, path)):
        with pytest.raises(VideoError, match=f"frame {lost[0]} cannot be decoded"):
            read(where, clip, VIEW, expect=(clip[4:5], pts))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A source and its copy, made with three frames to compare."""
    folder = tmp_path_factory.mktemp("pair")
    write_video(folder / "a.mp4", moving(40), gop=12)
    path, _ = copied(folder / "a.mp4", folder, OPTIONS.model_copy(update={"quality_frames": 3}))
    return os.fspath(folder / "a.mp4"), path


def test_the_copy_of_another_file_is_refused_by_both_names(pair: tuple[str, str]) -> None:
    source, path = pair
    clip = np.arange(8)
    read_copy(path, clip, VIEW, digest=digest(source))
    with pytest.raises(
        StoreMismatchError, match=f"{digest(source)}.* the teachers saw one with digest 00ff"
    ):
        read_copy(path, clip, VIEW, digest="00ff")
    pts = int(read_map(path).pts[3])
    with pytest.raises(
        StoreMismatchError, match=f"frame 3 has pts {pts + 1} in the store, .* it has {pts}"
    ):
        read_copy(path, clip, VIEW, expect=(np.array([3]), np.array([pts + 1])))
    with pytest.raises(StoreMismatchError, match="frame 40 is in the store"):
        read_copy(path, clip, VIEW, expect=(np.array([40]), np.array([0])))
    with pytest.raises(VideoError, match="the video has 40"):
        read_copy(path, np.array([40]), VIEW)
    with pytest.raises(VideoError, match=r"no copy \(no such file\)"):
        read_copy(path + "x", clip, VIEW)


def test_damage_anywhere_is_noticed(pair: tuple[str, str], tmp_path: Path) -> None:
    _, path = pair
    whole, copy_map = Path(path).read_bytes(), read_map(path)
    damaged = tmp_path / "damaged.mp4"
    map_start = len(whole) - len(copy_map.pack())

    def read(data: bytes) -> None:
        damaged.write_bytes(data)
        read_copy(str(damaged), np.arange(40), VIEW)

    read(whole)
    for position, message in (
        (int(copy_map.offset[17]) + 9, "damaged at its frame 17: the checksum is wrong"),
        (map_start + 40, "map is damaged: its checksum is wrong"),
        (len(whole) - 3, "no map at the end"),
    ):
        with pytest.raises(VideoError, match=message):
            read(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
    for data in (whole[:-1], whole[:map_start], whole[-len(copy_map.pack()) :], b"", whole[:100]):
        with pytest.raises(VideoError, match=r"no map at the end|points beyond"):
            read(data)


def test_packing_keeps_a_map_with_any_times(
    pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_map = read_map(pair[1])
    n = 100_000  # longer than the first read, and more frames than are cached
    random = np.random.default_rng(0)
    long = FrameMap(
        **{
            **copy_map.__dict__,
            "index": np.sort(random.choice(10 * n, n, replace=False)),
            "pts": np.sort(random.integers(-(2**62), 2**62, n)),
            "offset": np.cumsum(random.integers(0, 2**31, n + 1)),
            "key": np.arange(n) % 12 == 0,
            "crc": random.integers(0, 2**32, n).astype(np.uint32),
        }
    )
    box = long.pack()
    unpacked = FrameMap.unpack(box[24:-16])
    for name in ("index", "pts", "offset", "key", "crc"):
        np.testing.assert_array_equal(getattr(unpacked, name), getattr(long, name), err_msg=name)
    assert (unpacked.source, unpacked.extradata, unpacked.quality) == (
        long.source,
        long.extradata,
        long.quality,
    )
    monkeypatch.setattr(frame_map, "_TAIL", 64)
    monkeypatch.setattr(frame_map, "_maps", frame_map.LruCache())
    assert read_map(pair[1]).index.tolist() == copy_map.index.tolist()


def test_quality_is_psnr_and_ssim_of_the_frames_of_a_loader(pair: tuple[str, str]) -> None:
    source, path = pair
    copy_map = read_map(path)
    size = View(resize=(copy_map.height, copy_map.width))
    a = [picture for _, picture in plain(source, size).values()]
    b = [picture for _, picture in plain(path, size).values()]
    for x, y in ((a[3], b[3]), (a[3], a[9]), (a[0], a[0])):
        luma = [
            torch.from_numpy(z.astype(np.float64) @ [0.299, 0.587, 0.114])[None, None]
            for z in (x, y)
        ]
        _, reference = structural_similarity_index_measure(
            *luma, sigma=1.5, data_range=255.0, return_full_image=True
        )
        assert ssim(x, y) == pytest.approx(float(reference[..., 5:-5, 5:-5].mean()), abs=1e-6)
    error = np.square(a[3].astype(float) - b[3]).mean()
    assert psnr(a[3], b[3]) == pytest.approx(10 * np.log10(255**2 / error))
    assert psnr(a[0], a[0]) == 100
    every = [psnr(x, y) for x, y in zip(a, b, strict=True)]
    assert min(every) - 1e-3 <= copy_map.quality["psnr"] <= max(every) + 1e-3
    assert 0.9 < copy_map.quality["ssim"] <= 1
    assert 1 <= copy_map.quality["frames"] <= 3


@pytest.mark.slow
def test_copies_are_small_plain_videos_with_even_sides(tmp_path: Path) -> None:
    for number, ((height, width), size) in enumerate(
        {(256, 340): (128, 170), (97, 33): (96, 32), (300, 4): (300, 4), (2, 2): (2, 2)}.items()
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        write_video(folder / "a.mkv", moving(14, height, width), codec="ffv1", pix_fmt="bgr0")
        path, made_map = copied(folder / "a.mkv", folder, CopyOptions(short_side=128, gop=4))
        assert (made_map.height, made_map.width) == size
        with av.open(path) as container:
            kinds = [s.type for s in container.streams]
            packets = [p for p in container.demux(video=0) if p.size]
        assert kinds == ["video"]
        assert [p.is_keyframe for p in packets] == made_map.key.tolist()
        assert np.diff(np.flatnonzero(made_map.key)).max() <= 4


def test_a_failure_keeps_the_existing_copy(tmp_path: Path) -> None:
    target = tmp_path / "copy.mp4"
    target.write_bytes(b"before")
    (tmp_path / "a.mp4").write_bytes(b"not a video at all")
    with pytest.raises(VideoError, match="not a video container"):
        make_copy(str(tmp_path / "a.mp4"), str(tmp_path / "part"), str(target), OPTIONS)
    assert target.read_bytes() == b"before"
    assert not (tmp_path / "part").exists()


def test_folders_of_copies_are_recognised_by_their_marker(tmp_path: Path) -> None:
    assert copy_name("a/b.avi") == "a/b.avi.mp4"
    assert copy_name("../x/./a") == "%2E%2E/x/a.mp4"
    marker = '{"format": "distinit prepared copies", "version": 1, "options": {}, "corpora": {"k": {}, "m": {}}}'
    (tmp_path / "prepared.json").write_text(marker)
    (tmp_path / "k").mkdir()
    corpora = prepared_corpora({"k": str(tmp_path), "other": str(tmp_path / "k"), "plain": "/"})
    assert {name: corpus.root for name, corpus in corpora.items()} == dict.fromkeys(
        ("k", "other"), str(tmp_path / "k")
    )
    with pytest.raises(UsageError, match=r"--videos z=.*: the folder holds copies of k, m"):
        prepared_corpora({"z": str(tmp_path)})
    (tmp_path / "prepared.json").write_text(marker.replace('"version": 1', '"version": 2'))
    with pytest.raises(UsageError, match="version 1"):
        prepared_corpora({"k": str(tmp_path)})
