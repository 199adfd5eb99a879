"""DSMIL: the most suspicious patch of each output, and attention to what is like it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from e2e.errors import UserError, format_list
from e2e.heads.base import HEADS, BagLoss, Head, HeadOutput, clear_padding, mask_logits
from e2e.heads.layers import attention_pool, projection, xavier_init

PUBLISHED = {
    "i_classifier.fc.0": "instance",
    "b_classifier.q": "query.0",  # nonlinear=False
    "b_classifier.q.0": "query.0",
    "b_classifier.q.2": "query.2",
    "b_classifier.v.1": "value.1",  # pass_value=True
    "b_classifier.fcc": "classify",
}
"""Layers of the authors' model, and what they are called here."""


def from_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of the authors' code (dsmil-wsi) as one of :class:`DSMIL`.

    The layers are renamed by ``PUBLISHED``; their convolution over the pooled vectors, weight
    (C, C, D), is the Linear ``classify``, weight (C, C * D). The options that such a head needs
    are the defaults, with ``in_dim`` D and ``num_outputs`` C of ``i_classifier.fc.0.weight``
    (C, D), and ``query_dim`` the rows of the query's weight; ``nonlinear=False`` if there is
    ``b_classifier.q.weight``, ``pass_value=True`` if there is ``b_classifier.v.1.weight``.
    ``average=False`` gives the bag stream's score alone, as their test script does by default::

        head = HEADS.build("dsmil", 512, 1, average=False)  # their CAMELYON16 head
        head.load_state_dict(from_published(torch.load(path, "cpu", weights_only=True)))

    Raises:
        UserError: a key is none of theirs.
    """
    layers = {key: key.rpartition(".")[0] for key in state}
    unknown = [key for key, layer in layers.items() if layer not in PUBLISHED]
    if unknown:
        raise UserError(
            "these are no weights of the published DSMIL, whose layers are "
            f"{', '.join(PUBLISHED)}; found\n{format_list(unknown)}"
        )
    return {
        f"{PUBLISHED[layers[key]]}.{key.rpartition('.')[2]}": (
            tensor.flatten(1) if tensor.dim() == 3 else tensor
        )
        for key, tensor in state.items()
    }


@HEADS.register("dsmil")
class DSMIL(Head):
    """Two streams: a patch classifier with its maximum, and attention to the patch that has it::

        c_n     = W_0 h_n + b_0                              instance stream, h_n = x_n by default
        m_k     = argmax_n c_nk                              the critical patch of output k
        q_n     = tanh(W_2 relu(W_1 h_n + b_1) + b_2)        nonlinear=False: W_1 h_n + b_1
        a_kn    = q_n . q_(m_k) / sqrt(Q)
        z_k     = sum_n softmax_n(a_kn) v_n                  v_n = h_n; pass_value: relu(W_v h_n + b_v)
        bag_k   = sum_j w_kj . z_j + b_k                     bag stream
        logits  = (bag + max_n c_n) / 2

    Source: Li, Li and Eliceiri 2021, "Dual-stream Multiple Instance Learning Network for Whole
    Slide Image Classification with Self-supervised Contrastive Learning" (CVPR 2021),
    arXiv:2011.08939: the two streams, the distance U, and the bag score c(B) of its method section.
    The defaults are those of the authors' code, which scales by 1 / sqrt(Q) and takes a
    nonlinear q and v = h, where the paper has linear ones.

    Training. The published loss is L(bag) / 2 + L(max_n c_n) / 2. The bag's loss belongs to the
    task, with weight 1, so in training ``logits`` are bag alone and ``aux_loss`` adds
    ``aux_weight`` times L(max_n c_n): the default 1 is the published halves but for a common factor
    2 in the loss. L is the task's own, whatever the targets are. With ``aux_weight=0``, ``logits``
    are the mean in training, too, and the task's loss trains both streams through it.

    Prediction. In evaluation ``logits`` are the mean of both streams' scores, as in the paper. The
    AEM project means the streams' softmaxes instead (arXiv:2406.15303); the authors' code the
    sigmoids if asked, else it takes the bag stream: ``average=False``.

    Differs from the published code: Xavier-normal weights; the maximum is taken over float32
    scores under autocast, since in bfloat16 patches tie and their order would choose among them.

    Args:
        in_dim: width D of the encoder's features.
        num_outputs: C, given by the task.
        embed_dim: width E of h after a projection, Linear -> act; None: h is x. The ABMILX project
            has ``embed_dim=512, dropout=0.25`` (arXiv:2506.02408).
        query_dim: Q.
        nonlinear: the query MLP instead of a Linear.
        pass_value: v through a Linear and a ReLU.
        dropout: probability, on h, for both streams.
        value_dropout: probability, on what goes into W_v.
        act: activation of the projection (gelu, relu, silu, tanh, none).
        norm: LayerNorm on the features.
        average: predict by both streams.
        aux_weight: weight of the instance stream's loss, the task's being 1; 0: see above.

    Raises:
        UserError: ``act`` is unknown, ``query_dim`` under 1, ``aux_weight`` is negative, or it is 0
            and ``average`` off, where nothing would train the instance stream.
    """

    def __init__(
        self,
        in_dim: int,
        num_outputs: int,
        *,
        embed_dim: int | None = None,
        query_dim: int = 128,
        nonlinear: bool = True,
        pass_value: bool = False,
        dropout: float = 0.0,
        value_dropout: float = 0.0,
        act: str = "relu",
        norm: bool = False,
        average: bool = True,
        aux_weight: float = 1.0,
    ) -> None:
        super().__init__()
        if aux_weight < 0 or (aux_weight == 0 and not average):
            raise UserError(
                f"dsmil's instance stream is trained by nothing with aux_weight={aux_weight:g} and "
                f"average={average}\n  set aux_weight above 0, or to 0 with average=True"
            )
        if query_dim < 1:
            raise UserError(f"dsmil's query_dim must be at least 1, found {query_dim}")
        self.average = average
        self.aux_weight = aux_weight
        width = embed_dim or in_dim
        self.project = projection(in_dim, embed_dim, act=act, dropout=dropout, norm=norm)
        self.instance = nn.Linear(width, num_outputs)
        self.query = nn.Sequential(nn.Linear(width, query_dim))
        if nonlinear:
            self.query.extend([nn.ReLU(), nn.Linear(query_dim, query_dim), nn.Tanh()])
        self.value = nn.Sequential()
        if pass_value:
            self.value.extend([nn.Dropout(value_dropout), nn.Linear(width, width), nn.ReLU()])
        self.classify = nn.Linear(num_outputs * width, num_outputs)
        xavier_init(self)

    def forward(self, features: Tensor, mask: Tensor, coords: Tensor | None = None) -> HeadOutput:
        """Find each output's critical patch, pool by likeness to it, and classify.

        Args:
            features: (B, N, D) floating point.
            mask: (B, N) bool, True where the patch is real.
            coords: unused.

        Returns:
            logits (B, C); one attention map an output, attention_logits (B, C, N);
            instance_logits (B, N, C), the c_n; aux["instance_max"] (B, C), the max_n c_n.
        """
        x_BNE = self.project(clear_padding(features, mask))
        with torch.autocast(x_BNE.device.type, enabled=False):
            instance_BNC = self.instance(x_BNE.to(self.instance.weight.dtype))
        ranked_BCN = mask_logits(instance_BNC.transpose(1, 2), mask)
        max_BC, critical_BC = ranked_BCN.max(dim=-1)

        query_BNQ = self.query(x_BNE)
        width = query_BNQ.shape[-1]
        critical_BCQ = query_BNQ.gather(1, critical_BC.unsqueeze(-1).expand(-1, -1, width))
        score_BCN = critical_BCQ @ query_BNQ.transpose(1, 2) * width**-0.5
        # One axis for all outputs' values: they are the same, and broadcast without a copy.
        pooled_BCE, logits_BCN = attention_pool(score_BCN, mask, self.value(x_BNE).unsqueeze(1))

        logits_BC = self.classify(pooled_BCE.flatten(1))
        if self.average and not (self.training and self.aux_weight):
            logits_BC = (logits_BC + max_BC) / 2
        aux = {"instance_max": max_BC}
        return HeadOutput(logits_BC, logits_BCN, instance_BNC, aux, class_maps=True)

    def aux_loss(self, output: HeadOutput, target: Tensor, loss: BagLoss) -> Tensor | None:
        """``aux_weight`` times the task's loss of the critical patches' logits; None if that is 0."""
        if not self.aux_weight:
            return None
        assert output.aux is not None
        return self.aux_weight * loss(output.aux["instance_max"], target).mean()
