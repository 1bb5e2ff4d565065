"""The hashes of cached frames against SciPy's DCT, and the test vectors of the format's page."""

from __future__ import annotations

import re
from pathlib import Path

import av
import numpy as np
import pytest
from scipy.fft import dctn

from distinit.pipeline.video.decoder import VideoReader
from distinit.pipeline.video.encode import write_video
from distinit.pipeline.video.perceptual_hash import HASH_VIEW, grey, hash_p, hash_r
from distinit.pipeline.video.sampling import Sampling
from distinit.tests.conftest import moving_blobs

PAGE = Path(__file__).parents[3] / "docs" / "store-format.md"


def coefficients(picture: np.ndarray) -> np.ndarray:
    transform = dctn(picture.astype(np.float64), type=2, norm="ortho")
    low = transform[:8, :8].copy()
    low[0, 0] = transform[8, 0]
    return low.round(6)


def number(bits: np.ndarray) -> int:
    return int("".join("1" if bit else "0" for bit in bits.ravel()), 2)


def expected(pictures: np.ndarray) -> tuple[list[int], list[int], np.ndarray]:
    mean = pictures.astype(np.float64).mean(0)
    p = [number(coefficients(g) > np.median(coefficients(g))) for g in pictures]
    r = [number(coefficients(g - mean) > 0) for g in pictures]
    return p, r, np.sqrt(((pictures - mean) ** 2).mean((1, 2))).astype(np.float16)


def test_hashes_are_signs_of_a_dct() -> None:
    random = np.random.default_rng(0)
    pictures = random.integers(0, 256, (40, 32, 32)).astype(np.uint8)
    p, r, rms = expected(pictures)
    assert hash_p(pictures).tolist() == p
    assert hash_r(pictures)[0].tolist() == r
    np.testing.assert_array_equal(hash_r(pictures)[1], rms)
    assert hash_p(pictures[:1]).tolist() == p[:1]  # a single picture
    flat = np.full((2, 32, 32), 77, np.uint8)
    assert [*hash_p(flat), *hash_r(flat)[0], *hash_r(flat)[1]] == [0] * 6


def test_grey_is_bt601_in_whole_numbers() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3)).astype(np.uint8)
    rgb[0] = 255
    r, g, b = (rgb[..., c].astype(np.int64) for c in range(3))
    np.testing.assert_array_equal(grey(rgb), (19595 * r + 38470 * g + 7471 * b + 32768) >> 16)


def test_vectors_of_the_page() -> None:
    y, x = np.mgrid[0:32, 0:32]
    pictures = np.stack([(7 * x + 13 * y + (k + 1) * x * y + 40 * k) % 256 for k in range(3)])
    rows = re.findall(
        r"\| (\d) \| `([0-9a-f]{16})` \| `([0-9a-f]{16})` \| ([0-9.]+) \|", PAGE.read_text()
    )
    assert [int(k) for k, *_ in rows] == [0, 1, 2]
    p, r, rms = expected(pictures)
    assert [int(row[1], 16) for row in rows] == p == hash_p(pictures.astype(np.uint8)).tolist()
    assert [int(row[2], 16) for row in rows] == r == hash_r(pictures.astype(np.uint8))[0].tolist()
    assert [np.float16(row[3]) for row in rows] == rms.tolist()


@pytest.mark.parametrize("turned", [False, True])
def test_a_decoded_frame_is_averaged_over_areas(tmp_path: Path, turned: bool) -> None:
    """Against an average over blocks of the decoder's own picture."""
    blobs = moving_blobs(3, 9)
    write_video(tmp_path / "v.mp4", blobs.transpose(0, 2, 1, 3) if turned else blobs, fps=25, gop=4)
    with VideoReader(str(tmp_path / "v.mp4")) as reader:
        views = [
            reader.info.renderer().render(frame, HASH_VIEW).copy()
            for _, _, frame in reader.sample(Sampling(every=4))
        ]
    with av.open(str(tmp_path / "v.mp4")) as container:
        whole = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)][::4]
    for view, image in zip(views, whole, strict=True):
        h, w = image.shape[:2]
        blocks = image.reshape(32, h // 32, 32, w // 32, 3).astype(np.float64).mean((1, 3))
        # In grey: swscale averages colours in YUV, and these at half the size.
        pair = grey(view[None]), grey(blocks.round().astype(np.uint8)[None])
        assert np.abs(pair[0].astype(int) - pair[1]).max() <= 3
        assert (int(hash_p(pair[0])[0]) ^ int(hash_p(pair[1])[0])).bit_count() <= 6
