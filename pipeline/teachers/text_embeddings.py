"""Texts as a classifier: the text tower of open_clip, whose image tower is a teacher.

Shapes: K classes, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..common.errors import TeacherError, UsageError, third_party
from .open_clip_models import open_clip_whole
from .teacher_options import TeacherSpec

BATCH = 64  # texts per forward pass


@dataclass(frozen=True)
class TextEmbeddings:
    """Embeddings of classes [K, D], each of length 1, and the scale and bias of their cosines."""

    weight: NDArray[np.float32]
    logit_scale: float
    logit_bias: float | None


def text_embeddings(spec: TeacherSpec, prompts: Sequence[Sequence[str]]) -> TextEmbeddings:
    """Embed classes by their prompts: the mean of the prompts' embeddings, divided by its length.

    Args:
        spec: `open_clip:ARCH@WEIGHTS`, perhaps with a weights file.
        prompts: Of each class at least one text.

    Raises:
        UsageError: Another kind of teacher, or a model without a text tower.
        TeacherError: open_clip is not installed or has no such model.
        WeightsError: The weights are not safetensors, cannot be fetched or do not fit.
    """
    family, _, rest = spec.name.partition(":")
    if family != "open_clip" or not rest:
        raise UsageError(
            f"--teacher {spec.name}: expected open_clip:ARCH@WEIGHTS, whose text tower embeds classes"
        )
    architecture, _, tag = rest.partition("@")
    whole = open_clip_whole(spec, architecture, tag or None).model.eval()
    with third_party(f"teacher {spec.name!r}: its text tower fails", TeacherError):
        import open_clip

        library: Any = open_clip
        tokenize = library.get_tokenizer(architecture)
        texts = [text for each in prompts for text in each]
        with torch.inference_mode():
            parts = [
                whole.encode_text(tokenize(texts[at : at + BATCH]), normalize=True).float()
                for at in range(0, len(texts), BATCH)
            ]
    embeddings = torch.cat(parts).split([len(each) for each in prompts])
    means = torch.stack([each.mean(dim=0) for each in embeddings])
    bias = getattr(whole, "logit_bias", None)
    return TextEmbeddings(
        torch.nn.functional.normalize(means, dim=1).numpy(),
        float(whole.logit_scale.detach().exp()),
        None if bias is None else float(bias.detach()),
    )
