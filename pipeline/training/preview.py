"""Render a batch as a picture: the frames of each clip and its targets.

Shapes: B clips, C channels, T frames, H W pixels, K classes.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

MOST_CLIPS, MOST_FRAMES = 24, 8
SIDE, GAP, LINE = 112, 4, 17  # pixels
TEXT = 420
PAPER, INK, FAINT, BLANK = (255, 255, 255), (20, 20, 20), (150, 150, 150), (225, 225, 225)


def render_batch(
    batch: Mapping[str, Any], classes: Mapping[str, Sequence[str]], *, tau: float = 1.0
) -> Image.Image:
    """Render a row per clip: up to 8 of its frames, evenly spread, and its targets.

    Next to the frames are the video and the first frame, and per teacher the entropy (of the mean
    logits at τ = 1, which the filter uses) and the three likeliest classes. Clips that do not count
    for a teacher are marked; those that count for none were not decoded and are grey.

    Args:
        batch: A collated batch of `StudentClips`.
        classes: Per teacher the names of its classes [K].
        tau: Temperature of the target's softmax.
    """
    clips = batch["clip"][:MOST_CLIPS]
    decoded = [
        any(bool(weight[n] != 0) for weight in batch["weight"].values()) for n in range(len(clips))
    ]
    lines = [_lines(batch, number, classes, tau) for number in range(len(clips))]
    return _render(clips, decoded, lines, 1 + 2 * len(classes))


def render_labels(batch: Mapping[str, Any], classes: Sequence[str]) -> Image.Image:
    """Render a row per clip: its frames, the video, the first frame, and the label.

    Args:
        batch: A collated batch of `LabelledClips`.
        classes: The names of the classes [K].
    """
    clips = batch["clip"][:MOST_CLIPS]
    lines = [
        [_clip_line(batch, n), (f"label: {_short(classes[int(batch['label'][n])], 40)}", True)]
        for n in range(len(clips))
    ]
    return _render(clips, [True] * len(clips), lines, 2)


def _render(
    clips: Tensor, decoded: Sequence[bool], lines: Sequence[Sequence[tuple[str, bool]]], height: int
) -> Image.Image:
    """Render clips [B, C, T, H, W] and the lines next to each, `height` of them at most."""
    chosen = np.unique(
        np.linspace(0, clips.shape[2] - 1, min(MOST_FRAMES, clips.shape[2])).round().astype(int)
    )
    row = max(SIDE, LINE * height) + GAP
    picture = Image.new("RGB", (len(chosen) * (SIDE + GAP) + TEXT, len(clips) * row + GAP), PAPER)
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(size=13)
    for number in range(len(clips)):
        top = GAP + number * row
        for column, frame in enumerate(chosen):
            place = (GAP + column * (SIDE + GAP), top)
            if not decoded[number]:
                picture.paste(BLANK, (*place, place[0] + SIDE, place[1] + SIDE))
                continue
            image = Image.fromarray(_pixels(clips[number, :, frame])).resize(
                (SIDE, SIDE), Image.Resampling.BICUBIC
            )
            picture.paste(image, place)
        left = len(chosen) * (SIDE + GAP) + 2 * GAP
        for line, (text, strong) in enumerate(lines[number]):
            pen.text((left, top + line * LINE), text, fill=INK if strong else FAINT, font=font)
    return picture


def _lines(
    batch: Mapping[str, Any], number: int, classes: Mapping[str, Sequence[str]], tau: float
) -> list[tuple[str, bool]]:
    """Return the lines next to one clip, and whether each is printed strongly."""
    lines = [_clip_line(batch, number)]
    for teacher, names in classes.items():
        logits = batch["targets"][teacher][number].float()
        counts = bool(batch["weight"][teacher][number] != 0)
        nats = float(torch.distributions.Categorical(logits=logits).entropy())
        lines.append(
            (f"{teacher}: {nats:.2f} nats" + ("" if counts else ", does not count"), counts)
        )
        likely = torch.softmax(logits / tau, 0).topk(min(3, len(names)))
        shares = zip(likely.indices.tolist(), likely.values.tolist(), strict=True)
        lines.append(
            (
                "   " + ", ".join(f"{_short(names[k], 20)} {share:.0%}" for k, share in shares),
                counts,
            )
        )
    return lines


def _clip_line(batch: Mapping[str, Any], number: int) -> tuple[str, bool]:
    """Return the line with the video and the first frame of a clip."""
    name = Path(str(batch["name"][number])).name
    return f"{_short(name, 40)}  from frame {int(batch['start'][number])}", True


def _pixels(frame: Tensor) -> np.ndarray:
    """Return a frame [C, H, W] as uint8 [H, W, 3].

    Optical flow is shown as colour around grey: x in red, y in green, at most 8 pixels.
    """
    if frame.shape[0] == 3:
        return np.ascontiguousarray(frame.permute(1, 2, 0).numpy())
    flow = (128 + frame.float().numpy() * 16).clip(0, 255)
    return np.stack([flow[0], flow[1], np.full_like(flow[0], 128)], axis=-1).astype(np.uint8)


def _short(text: str, most: int) -> str:
    # Pillow's own font has hardly more than ASCII.
    letters = (c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    text = "".join(c if c.isascii() and c.isprintable() else "?" for c in letters)
    return text if len(text) <= most else text[: most - 3] + "..."
