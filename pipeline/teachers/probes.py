"""Compute the fingerprints of a teacher on probe images, and check its outputs.

Shapes: P probe images, h w pixels of a teacher's input, K classes or features.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from ..common.errors import TeacherError, third_party
from ..store.frame_views import OutputView
from .fingerprint import NUM_PROBES, Difference, Fingerprint
from .teacher import Teacher

BATCH_TOLERANCE = (0.05, 0.3)
"""Allowed difference of a row by the other images of its batch; int8 with scales for a whole batch
stays below it."""


def fingerprints(teacher: Teacher) -> dict[str, Fingerprint]:
    """Return the fingerprint of each output of the teacher, on its current device.

    Raises:
        TeacherError: The forward pass fails on the probe images.
    """
    return _fingerprints(teacher, probe_images(*teacher.input_shape))


def examine(teacher: Teacher) -> dict[str, Fingerprint]:
    """Return the fingerprints of a teacher after checking that its outputs can be cached.

    Raises:
        TeacherError: The output of an image is not the same in each call, or depends on the other
            images of the batch.
    """
    images = probe_images(*teacher.input_shape)
    first, second = (_fingerprints(teacher, images) for _ in range(2))
    halves = slice(0, NUM_PROBES // 2), slice(NUM_PROBES // 2, NUM_PROBES)
    padded = []
    for half in halves:
        # The other images are zeros, as in the last batch of a shard.
        batch = np.zeros_like(images)
        batch[half] = images[half]
        padded.append(_outputs(teacher, batch))
    for output, fingerprint in first.items():
        if change := fingerprint.differs(second[output]):
            raise TeacherError(
                f"teacher {teacher.name!r}: computes other {output} of the same images each time ({change}); is "
                f"dropout or another randomness on in its forward?"
            )
        parts = [values[output][half] for values, half in zip(padded, halves, strict=True)]
        difference = Difference.of(fingerprint.values, np.concatenate(parts))
        if not difference.within(BATCH_TOLERANCE):
            raise TeacherError(
                f"teacher {teacher.name!r}: the {output} of an image depend on the others of its batch (off by "
                f"up to {difference.largest:.2g} of their standard deviation); is a "
                f"normalisation over the batch in its forward?"
            )
    return first


def look_like_probabilities(logits: NDArray[np.float32]) -> bool:
    """Return whether logits [P, K] look like probabilities, whose softmax is nearly uniform.

    They do if none is negative, and either none is above 1 or all rows have the same sum.
    Log-probabilities do not: they are logits up to a constant.
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
    """Return the probe images [P, h, w, 3]: ramps, clouds, blocks, rings and noise.

    They are drawn by integer arithmetic alone, and so are the same on every machine.
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
    """Return smooth colours [h, w, 3]: a weighted sum of noise on lattices, interpolated linearly.

    Args:
        height: Height in pixels.
        width: Width in pixels.
        octaves: The (size, weight) of each lattice.
        seed: Seed of the noise.
    """
    total = np.zeros((height, width, 3), np.int64)
    for lattice, weight in octaves:
        points = _noise(lattice + 1, lattice + 1, seed * 100 + lattice)
        rows, columns = (np.arange(n, dtype=np.int64) * lattice * 256 // n for n in (height, width))
        for axis, positions in ((0, rows), (1, columns)):
            shape = (-1, 1, 1) if axis == 0 else (1, -1, 1)
            low, fraction = positions // 256, (positions % 256).reshape(shape)
            points = (
                points.take(low, axis) * (256 - fraction) + points.take(low + 1, axis) * fraction
            ) // 256
        total += weight * points
    return total // sum(weight for _, weight in octaves)


def _noise(height: int, width: int, seed: int) -> NDArray[np.int64]:
    """Return numbers from 0 to 255 [h, w, 3], drawn by a counter-based generator (splitmix64)."""
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
    """Return the outputs, computed by torch in float32.

    In float32 a change of the code shows in far smaller differences than in half precision.
    """
    precision, engine = teacher.precision, teacher.engine
    try:
        with third_party(f"teacher {teacher.name!r}: fails on {len(images)} images", TeacherError):
            outputs = teacher.to(teacher.device).compute(images)
            return {key: values.numpy() for key, values in outputs.items()}
    finally:
        teacher.to(teacher.device, precision).engine = engine
