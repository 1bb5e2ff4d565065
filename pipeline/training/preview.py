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

MAX_CLIPS, MAX_FRAMES = 24, 8
# Sizes in pixels: a frame, the gap between two, and the lines of text.
SIDE, GAP, LINE_HEIGHT, TEXT_WIDTH = 112, 4, 17, 420
PAPER, INK, FAINT, BLANK = (255, 255, 255), (20, 20, 20), (150, 150, 150), (225, 225, 225)


def render_batch(
    batch: Mapping[str, Any], classes: Mapping[str, Sequence[str]], *, tau: float = 1.0
) -> Image.Image:
    """Render one row per clip: up to 8 of its frames, evenly spread, and its targets.

    The text of a row names the video, the first frame, and for each teacher the entropy (of the
    mean logits at τ = 1, which the filter uses) and the three likeliest classes. Clips that do not
    count for a teacher are marked. Clips that count for no teacher were not decoded and are grey.

    Args:
        batch: A collated batch of `StudentClips`.
        classes: Teacher → names of its classes [K].
        tau: Temperature of the softmax of the targets.
    """
    clips = batch["clip"][:MAX_CLIPS]
    decoded = [
        any(bool(weight[n] != 0) for weight in batch["weight"].values()) for n in range(len(clips))
    ]
    lines = [_lines(batch, number, classes, tau) for number in range(len(clips))]
    return _render(clips, decoded, lines, 1 + 2 * len(classes))


def render_labels(batch: Mapping[str, Any], classes: Sequence[str]) -> Image.Image:
    """Render one row per clip: its frames, the video, the first frame, and the label.

    Args:
        batch: A collated batch of `LabelledClips`.
        classes: The names of the classes [K].
    """
    clips = batch["clip"][:MAX_CLIPS]
    lines = [
        [_clip_line(batch, n), (f"label: {_short(classes[int(batch['label'][n])], 40)}", True)]
        for n in range(len(clips))
    ]
    return _render(clips, [True] * len(clips), lines, 2)


def _render(
    clips: Tensor,
    decoded: Sequence[bool],
    lines: Sequence[Sequence[tuple[str, bool]]],
    max_lines: int,
) -> Image.Image:
    """Render clips [B, C, T, H, W], with at most `max_lines` lines of text next to each."""
    shown_frames = np.unique(
        np.linspace(0, clips.shape[2] - 1, min(MAX_FRAMES, clips.shape[2])).round().astype(int)
    )
    row_height = max(SIDE, LINE_HEIGHT * max_lines) + GAP
    width = len(shown_frames) * (SIDE + GAP) + TEXT_WIDTH
    picture = Image.new("RGB", (width, len(clips) * row_height + GAP), PAPER)
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(size=13)
    for number in range(len(clips)):
        top = GAP + number * row_height
        for column, frame in enumerate(shown_frames):
            corner = (GAP + column * (SIDE + GAP), top)
            if not decoded[number]:
                picture.paste(BLANK, (*corner, corner[0] + SIDE, corner[1] + SIDE))
                continue
            image = Image.fromarray(_pixels(clips[number, :, frame])).resize(
                (SIDE, SIDE), Image.Resampling.BICUBIC
            )
            picture.paste(image, corner)
        left = len(shown_frames) * (SIDE + GAP) + 2 * GAP
        for line, (text, strong) in enumerate(lines[number]):
            pen.text(
                (left, top + line * LINE_HEIGHT), text, fill=INK if strong else FAINT, font=font
            )
    return picture


def _lines(
    batch: Mapping[str, Any], number: int, classes: Mapping[str, Sequence[str]], tau: float
) -> list[tuple[str, bool]]:
    """Return the lines next to one clip, each with whether it is printed in black."""
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

    Optical flow of up to 8 pixels is shown around grey, x in red and y in green.
    """
    if frame.shape[0] == 3:
        return np.ascontiguousarray(frame.permute(1, 2, 0).numpy())
    flow = (128 + frame.float().numpy() * 16).clip(0, 255)
    return np.stack([flow[0], flow[1], np.full_like(flow[0], 128)], axis=-1).astype(np.uint8)


def _short(text: str, max_length: int) -> str:
    # Pillow's default font has few characters beyond ASCII.
    letters = (c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    text = "".join(c if c.isascii() and c.isprintable() else "?" for c in letters)
    return text if len(text) <= max_length else text[: max_length - 3] + "..."
