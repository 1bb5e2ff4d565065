"""torchcodec in the workers of a DataLoader, the teacher on batches of 8 across videos."""

from __future__ import annotations

from collections import defaultdict

import torch
from teacher import BATCH, Teacher, arguments, save
from torch.utils.data import DataLoader, Dataset
from torchcodec.decoders import VideoDecoder


class Videos(Dataset):
    """Prepared pictures of every Nth frame; None for a file that fails."""

    def __init__(self, paths: list[str], every: int, teacher: Teacher) -> None:
        self.paths, self.every, self.prepare = paths, every, teacher.prepare

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor | None]:
        try:
            decoder = VideoDecoder(self.paths[index], num_ffmpeg_threads=1)
            wanted = list(range(0, len(decoder), self.every))
            return index, self.prepare(decoder.get_frames_at(wanted).data)
        except (RuntimeError, ValueError) as error:
            print(self.paths[index], str(error).splitlines()[0])
            return index, None


def main() -> None:
    args = arguments()
    teacher = Teacher(args.teacher, args.weights)
    loader = DataLoader(
        Videos(args.paths, args.every, teacher), batch_size=None, num_workers=args.workers
    )
    rows: defaultdict[int, list[torch.Tensor]] = defaultdict(list)
    missing: dict[int, int] = {}
    waiting: list[tuple[int, torch.Tensor]] = []

    def run(count: int) -> None:
        batch, waiting[:count] = waiting[:count], []
        logits = teacher(torch.stack([picture for _, picture in batch]))
        for (index, _), row in zip(batch, logits, strict=True):
            rows[index].append(row)
            missing[index] -= 1
            if not missing[index]:
                save(args, index, torch.stack(rows.pop(index)).numpy())

    for index, pictures in loader:
        if pictures is None:
            continue
        missing[index] = len(pictures)
        waiting += [(index, picture) for picture in pictures]
        while len(waiting) >= BATCH:
            run(BATCH)
    if waiting:
        run(len(waiting))


if __name__ == "__main__":
    main()
