"""Probe a teacher for its fingerprints: images, outputs, and what these reveal.

Shapes: P probe images, h w pixels of a teacher's input, K classes or features.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from ..common.errors import TeacherError, third_party
from ..store.frame_views import OutputView
from .fingerprint import COUNT, Difference, Fingerprint
from .teacher import Teacher

BATCH = (0.05, 0.3)
"""How far the other images of a batch may move a row: int8 with scales of the whole batch stays
below."""


def fingerprints(teacher: Teacher) -> dict[str, Fingerprint]:
    """Return the fingerprint of each of the teacher's outputs on its current device.

    Raises:
        TeacherError: Its forward fails on the probe images.
    """
    return _fingerprints(teacher, probe_images(*teacher.input_shape))


def examine(teacher: Teacher) -> dict[str, Fingerprint]:
    """Return the fingerprints of a teacher after checking that its outputs can be cached.

    Raises:
        TeacherError: The same image gets another output each time, or one that depends on the rest
            of a batch.
    """
    images = probe_images(*teacher.input_shape)
    first, again = (_fingerprints(teacher, images) for _ in range(2))
    halves = slice(0, COUNT // 2), slice(COUNT // 2, COUNT)
    padded = []
    for half in halves:
        batch = np.zeros_like(images)  # padded as the last batch of a shard is
        batch[half] = images[half]
        padded.append(_outputs(teacher, batch))
    for output, found in first.items():
        if how := found.differs(again[output]):
            raise TeacherError(
                f"teacher {teacher.name!r}: computes other {output} of the same images each time ({how}); is dropout "
                f"or another randomness on in its forward?"
            )
        parts = [values[output][half] for values, half in zip(padded, halves, strict=True)]
        apart = Difference.of(found.values, np.concatenate(parts))
        if not apart.within(BATCH):
            raise TeacherError(
                f"teacher {teacher.name!r}: the {output} of an image depend on the others of its batch (off by up to "
                f"{apart.largest:.2g} of their standard deviation); is a normalisation over the batch in its forward?"
            )
    return first


def look_like_probabilities(logits: NDArray[np.float32]) -> bool:
    """Return whether logits [P, K] look like probabilities or shares.

    They do if none is negative, and each is at most 1 or all rows have one sum: softmax would make
    nearly uniform targets of them. Log-probabilities are logits up to a constant.
    """
    if (
        logits.shape[1] < 2
        or not np.isfinite(logits).all()
        or (logits < 0).any()
        or not logits.any()
    ):
        return False
    sums = logits.astype(np.float64).sum(axis=1)
    return bool((logits <= 1).all() or np.allclose(sums, sums[0], rtol=1e-3))


def probe_images(height: int, width: int) -> NDArray[np.uint8]:
    """Return the P images [P, h, w, 3]: ramps, clouds, blocks, rings, noise.

    Integer arithmetic alone makes them, so that every machine has the same.
    """
    y, x = np.arange(height, dtype=np.int64)[:, None], np.arange(width, dtype=np.int64)[None]
    across, down = x * 255 // max(width - 1, 1) + 0 * y, y * 255 // max(height - 1, 1) + 0 * x
    ramps = np.stack([across, down, 255 - (across + down) // 2], axis=-1)
    rings = (2 * y - height) ** 2 + (2 * x - width) ** 2
    blocks = _noise(8, 8, 3)[y * 8 // height, x * 8 // width]
    pictures = [
        ramps,
        _clouds(height, width, ((3, 4), (6, 2), (12, 1), (24, 1)), 1),
        _clouds(height, width, ((5, 1),), 2),
        blocks,
        np.stack([rings // 16 % 256, rings // 40 % 256, rings // 100 % 256], axis=-1),
        _noise(height, width, 4),
    ]
    return np.stack(pictures).astype(np.uint8)


def _clouds(
    height: int, width: int, octaves: tuple[tuple[int, int], ...], seed: int
) -> NDArray[np.int64]:
    """Return smooth colours [h, w, 3]: for each (lattice, weight), values interpolated linearly."""
    total = np.zeros((height, width, 3), np.int64)
    for lattice, weight in octaves:
        points = _noise(lattice + 1, lattice + 1, seed * 100 + lattice)
        rows, columns = (np.arange(n, dtype=np.int64) * lattice * 256 // n for n in (height, width))
        for axis, at in ((0, rows), (1, columns)):
            shape = (-1, 1, 1) if axis == 0 else (1, -1, 1)
            low, part = at // 256, (at % 256).reshape(shape)
            points = (
                points.take(low, axis) * (256 - part) + points.take(low + 1, axis) * part
            ) // 256
        total += weight * points
    return total // sum(weight for _, weight in octaves)


def _noise(height: int, width: int, seed: int) -> NDArray[np.int64]:
    """0 … 255 [h, w, 3] from a counter (splitmix64)."""
    z = np.arange(height * width * 3, dtype=np.uint64) + np.uint64(seed << 32)
    z = (z + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z >> np.uint64(56)).astype(np.int64).reshape(height, width, 3)


def _fingerprints(teacher: Teacher, images: NDArray[np.uint8]) -> dict[str, Fingerprint]:
    device = teacher.device
    if device.type == "cuda":
        processor = f"cuda {torch.cuda.get_device_name(device)}"
    else:
        processor = (
            f"cpu {torch.backends.cpu.get_cpu_capability()}"
            if device.type == "cpu"
            else device.type
        )
    version = torch.__version__.split("+")[0]
    return {
        key: Fingerprint(values, version, processor, output=OutputView.of(key).output)
        for key, values in _outputs(teacher, images).items()
    }


def _outputs(teacher: Teacher, images: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
    """Return the outputs in float32, computed by torch.

    In float32 different code shows at far smaller differences than in half precision.
    """
    precision, engine = teacher.precision, teacher.engine
    try:
        with third_party(f"teacher {teacher.name!r}: fails on {len(images)} images", TeacherError):
            found = teacher.to(teacher.device).compute(images)
            return {key: values.numpy() for key, values in found.items()}
    finally:
        teacher.to(teacher.device, precision).engine = engine
