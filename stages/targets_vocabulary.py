"""Make a head for features from class names (`distinit targets vocabulary`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..pipeline.common.console import Console
from ..pipeline.common.documents import read_text
from ..pipeline.common.errors import UsageError
from ..pipeline.store.store_options import VocabularyConfig
from ..pipeline.targets.class_head import ClassHead, class_names
from ..pipeline.teachers.open_clip_models import text_embeddings
from ..pipeline.teachers.teacher_options import TeacherSpec


def targets_vocabulary(options: VocabularyConfig, console: Console) -> dict[str, Any]:
    """Embed classes with the text tower of a teacher, and write them as a head for its features.

    Raises:
        UsageError: There are fewer than two classes, or the teacher has no text tower.
        TeacherError: open_clip is not installed or has no such model.
        WeightsError: The weights cannot be loaded.
    """
    try:
        classes = class_names(read_text(options.classes).split("\n"))
    except OSError as error:
        raise UsageError(f"{options.classes}: cannot be read ({error.strerror})") from None
    if len(classes) < 2:
        raise UsageError(f"{options.classes}: {len(classes)} classes, a head requires at least 2")
    spec = TeacherSpec(name=options.teacher, weights=options.weights, outputs=("features",))
    prompts = [[text.replace("{}", name) for text in options.prompts] for name in classes]
    embeddings = text_embeddings(spec, prompts)
    bias = None
    if embeddings.logit_bias is not None:
        bias = np.full(len(classes), embeddings.logit_bias, np.float32)
    head = ClassHead(embeddings.weight, bias, classes, embeddings.logit_scale, normalize=True)
    head.write(Path(options.out))
    console.info(
        f"{options.out}: {len(classes)} classes of {embeddings.weight.shape[1]} features, logit scale "
        f"{embeddings.logit_scale:.1f}; train-student --head NAME={options.out} uses it"
    )
    return {
        "head": options.out,
        "classes": list(classes),
        "features": embeddings.weight.shape[1],
        "logit_scale": embeddings.logit_scale,
    }
