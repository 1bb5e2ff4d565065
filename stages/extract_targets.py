"""Stage one: run frozen image teachers once over sampled frames of every video."""

from __future__ import annotations

from typing import Any

from ..pipeline.common.console import Console
from ..pipeline.common.errors import UsageError
from ..pipeline.common.processes import cores
from ..pipeline.common.urls import check_local
from ..pipeline.corpus.sources import Part, VideoList, list_videos
from ..pipeline.extraction.extract_options import PROBED_AT_ONCE, ExtractConfig
from ..pipeline.video.pool.decode_pool import DecodePool


def extract_targets(config: ExtractConfig, console: Console) -> dict[str, Any]:
    """Extract targets of all listed videos into the store, and return a summary.

    Another run with the same sources continues an interrupted one, and does nothing if all videos
    are done.

    Raises:
        SourceError: A source cannot be read, or has no videos.
        TeacherError: A teacher cannot be loaded or run.
        WeightsError: The weights of a teacher cannot be loaded.
        StoreError: The store cannot be opened or written.
        StoreMismatchError: The store holds other videos, teachers or sampling.
        DeviceError: The device is missing.
    """
    check_local(config.out)
    videos = _list(config, console)
    with DecodePool(
        processes=config.decoders or cores(),
        memory_gb=config.memory_gb,
        timeout_s=config.timeout_s,
    ) as pool:
        if videos is not None and not config.dry_run and not config.out.exists():
            share = videos if config.part is None else Part.parse(config.part).share(videos)
            pool.begin_probing([share.absolute(i) for i in range(min(len(share), PROBED_AT_ONCE))])
        # This import loads torch, which takes seconds. Meanwhile the decoding processes read files.
        from ..pipeline.extraction.extraction import extract

        return extract(config, videos, pool, console)


def _list(config: ExtractConfig, console: Console) -> VideoList | None:
    """List the sources; return None, which means all videos of the store, without any source."""
    if not config.sources:
        if not config.out.exists():
            raise UsageError(f"no SOURCE given, and {config.out} does not exist yet")
        return None
    videos = list_videos(config.sources)
    console.info(videos.describe())
    return videos
