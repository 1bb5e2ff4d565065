"""Stage one: frozen image teachers look at the sampled frames of every video, once."""

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
    """Extract targets of all listed videos into the store, and count what was done.

    Running it again on the same sources continues where it was stopped, and does nothing when all
    is done.

    Raises:
        SourceError: Of the sources.
        TeacherError: A teacher cannot be loaded or run; WeightsError for its weights.
        StoreError: The store cannot be opened or written; StoreMismatchError if it holds something
            else.
        DeviceError: This machine has no such device.
    """
    check_local(config.out)
    listed = _list(config, console)
    with DecodePool(
        processes=config.decoders or cores(),
        memory_gb=config.memory_gb,
        timeout_s=config.timeout_s,
    ) as pool:
        if listed is not None and not config.dry_run and not config.out.exists():
            share = listed if config.part is None else Part.parse(config.part).share(listed)
            pool.begin_probing([share.absolute(i) for i in range(min(len(share), PROBED_AT_ONCE))])
        # Loads torch and teachers while the decoding processes read the files: both take seconds.
        from ..pipeline.extraction.extraction import extract

        return extract(config, listed, pool, console)


def _list(config: ExtractConfig, console: Console) -> VideoList | None:
    """Return the listed sources; None (all of the store) without sources on an existing store."""
    if not config.sources:
        if not config.out.exists():
            raise UsageError(f"no SOURCE given, and {config.out} does not exist yet")
        return None
    videos = list_videos(config.sources)
    console.info(videos.describe())
    return videos
