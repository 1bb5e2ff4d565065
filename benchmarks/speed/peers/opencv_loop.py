"""OpenCV, one video after another."""

from __future__ import annotations

import cv2
import numpy as np
import torch
from teacher import Teacher, arguments, save


def frames_of(path: str, every: int) -> np.ndarray | None:
    """Return every Nth frame, uint8 [n, H, W, 3], or None if no frame can be read."""
    capture, frames, index = cv2.VideoCapture(path), [], 0
    while capture.grab():
        if index % every == 0:
            done, picture = capture.retrieve()
            if done:
                frames.append(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB))
        index += 1
    capture.release()
    return np.stack(frames) if frames else None


def main() -> None:
    args = arguments()
    teacher = Teacher(args.teacher, args.weights)
    for index, path in enumerate(args.paths):
        frames = frames_of(path, args.every)
        if frames is not None:
            save(args, index, teacher.in_batches(torch.from_numpy(frames).permute(0, 3, 1, 2)))


if __name__ == "__main__":
    main()
