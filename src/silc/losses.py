"""Every objective of silc as a pure function of tensors; nothing here knows of modules, processes or schedules.

Gives: sigmoid_contrastive, softmax_contrastive, teacher_probs, distill, masked_patches, entropy.
Used by: train/pretrain.py; several processes only change the arguments (gathered rows and an offset), never the code.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

# Shapes: B local batch, M global batch (M = B in one process), D shared space, K prototypes,
# S/T student/teacher views, N patches.


def sigmoid_contrastive(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, offset: int = 0) -> Tensor:
    """SigLIP's loss (arXiv 2303.15343, eq. 1): every pair is its own yes/no question.

    image [B, D] and text [M, D] are L2-normalised; image i belongs to text offset + i. The mean over processes of the
    result, each with its own rows and all texts, is the loss of the whole batch. In plain words:

        for i in range(B):
            for j in range(M):
                sign = +1 if j == offset + i else -1
                loss += -log(sigmoid(sign * (scale * image[i] @ text[j] + bias))) / B
    """
    logits = image.float() @ text.float().T * scale + bias
    # -log sigmoid(z) = softplus(z) - z, so the positives only subtract their logit from a sum over all pairs
    return (F.softplus(logits).sum() - logits.diagonal(offset).sum()) / len(image)


def softmax_contrastive(
    image: Tensor, text: Tensor, all_image: Tensor, all_text: Tensor, scale: Tensor, offset: int = 0
) -> Tensor:
    """CLIP's loss (SILC section 3.1): choose the right text for an image and the right image for a text.

    image, text [B, D] are this process's rows, all_image, all_text [M, D] everybody's, all L2-normalised. In words:

        for i in range(B):
            loss += cross_entropy(scale * image[i] @ all_text.T, offset + i) / (2 * B)
            loss += cross_entropy(scale * text[i] @ all_image.T, offset + i) / (2 * B)
    """
    target = torch.arange(len(image), device=image.device) + offset
    to_text = F.cross_entropy(image.float() @ all_text.float().T * scale, target)
    to_image = F.cross_entropy(text.float() @ all_image.float().T * scale, target)
    return (to_text + to_image) / 2


def teacher_probs(logits: Tensor, centre: Tensor, temp: float) -> Tensor:
    """Centred and sharpened targets: softmax((logits - centre) / temp) over K, fp32, no gradient (DINO, eq. 1)."""
    return ((logits.detach().float() - centre) / temp).softmax(-1)


def distill(student: Tensor, teacher: Tensor, temp: float, same_view: int = 0) -> Tensor:
    """Prototype cross-entropy of every student view against every teacher view (SILC section 3.2).

    student [S, B, K] logits, teacher [T, B, K] probabilities. The first `same_view` student views are the teacher's own
    and are not compared with themselves. ValueError when that leaves nothing to compare. In plain words:

        for s in range(S):
            for t in range(T):
                if not (s == t and s < same_view):
                    loss += mean over B of -(teacher[t] * log_softmax(student[s] / temp)).sum(-1), averaged over pairs
    """
    log_probs = (student.float() / temp).log_softmax(-1)
    pairs = -torch.einsum("sbk,tbk->st", log_probs, teacher) / student.shape[1]
    skipped = min(same_view, len(student), len(teacher))
    count = pairs.numel() - skipped
    if count == 0:
        raise ValueError("distillation has no pair of different views: ask for a local view or a second global one.")
    return (pairs.sum() - pairs.diagonal()[:skipped].sum()) / count


def masked_patches(
    student: Tensor, teacher: Tensor, mask: Tensor, temp: float, form: Literal["masked", "all"] = "masked"
) -> Tensor:
    """Predict the teacher's patch prototypes where the student's input was hidden.

    student [B, N, K] logits, teacher [B, N, K] probabilities, mask [B, N] (True: hidden from the student).
    `masked`: hidden patches only (iBOT); `all`: every patch, hidden or not (iBOT++ of TIPSv2). Each picture weighs the
    same, whatever its number of hidden patches.
    """
    ce = -(teacher * (student.float() / temp).log_softmax(-1)).sum(-1)
    weight = mask.float() if form == "masked" else torch.ones_like(ce)
    return ((ce * weight).sum(1) / weight.sum(1).clamp(min=1)).mean()


def entropy(probs: Tensor) -> Tensor:
    """Mean entropy over the last axis, in nats: ln K is uniform, near 0 is a collapse to single prototypes."""
    return torch.special.entr(probs).sum(-1).mean()
