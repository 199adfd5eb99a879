"""DSMIL: the critical patch of each output, and attention to the patches similar to it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from e2e.errors import UserError, format_list
from e2e.heads.base import (
    HEADS,
    BagLoss,
    Head,
    HeadOutput,
    clear_padding,
    mask_logits,
    resolve_mask,
)
from e2e.heads.layers import attention_pool, projection, xavier_init

PUBLISHED = {
    "i_classifier.fc.0": "instance",
    "b_classifier.q": "query.0",  # nonlinear=False
    "b_classifier.q.0": "query.0",
    "b_classifier.q.2": "query.2",
    "b_classifier.v.1": "value.1",  # pass_value=True
    "b_classifier.fcc": "classify",
}
"""Layer of the authors' model -> layer of :class:`DSMIL`."""


def from_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert a state dict of the authors' code (dsmil-wsi) to one of :class:`DSMIL`.

    The layers are renamed by ``PUBLISHED``. Their convolution over the pooled vectors, weight (C, C, D), is
    the Linear ``classify``, weight (C, C * D). Such a head has the default options, with ``in_dim`` D and
    ``num_outputs`` C of ``i_classifier.fc.0.weight`` (C, D), and ``query_dim`` the rows of the query's
    weight; ``nonlinear=False`` if there is ``b_classifier.q.weight``, ``pass_value=True`` if there is
    ``b_classifier.v.1.weight``. ``average=False`` gives the score of the bag stream only, as their test
    script does by default::

        head = HEADS.build("dsmil", 512, 1, average=False)  # their CAMELYON16 head
        head.load_state_dict(from_published(torch.load(path, "cpu", weights_only=True)))

    Parameters
    ----------
    state : Mapping of str to Tensor
        The published weights.

    Raises
    ------
    UserError
        A key does not belong to the published model.
    """
    layers = {key: key.rpartition(".")[0] for key in state}
    unknown = [key for key, layer in layers.items() if layer not in PUBLISHED]
    if unknown:
        raise UserError(
            "these are not weights of the published DSMIL, whose layers are "
            f"{', '.join(PUBLISHED)}; unknown keys:\n{format_list(unknown)}"
        )
    return {
        f"{PUBLISHED[layers[key]]}.{key.rpartition('.')[2]}": (
            tensor.flatten(1) if tensor.dim() == 3 else tensor
        )
        for key, tensor in state.items()
    }


@HEADS.register("dsmil")
class DSMIL(Head):
    """Two streams: a patch classifier with its maximum, and attention to the patch that has the maximum::

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
    The defaults are those of the authors' code, which scales by 1 / sqrt(Q) and has a nonlinear q and
    v = h, where the paper has linear ones.

    Training. The published loss is L(bag) / 2 + L(max_n c_n) / 2. The loss of the bag is the task's, with
    weight 1, so in training ``logits`` are those of the bag stream only and ``aux_loss`` adds
    ``aux_weight`` times L(max_n c_n). The default 1 gives the published halves up to a common factor of 2.
    L is the task's loss, whatever the targets. With ``aux_weight=0`` ``logits`` are the mean in training,
    too, and the task's loss trains both streams through it.

    Prediction. In evaluation ``logits`` are the mean of both streams' scores, as in the paper. The AEM
    project averages the softmaxes of the streams instead (arXiv:2406.15303); the authors' code averages
    sigmoids as an option, and otherwise uses the bag stream: ``average=False``.

    Differences from the published code: Xavier-normal weights; the maximum is taken over float32 scores under
    autocast, since in bfloat16 patches tie and their order would decide.

    Parameters
    ----------
    in_dim : int
        Width D of the features.
    num_outputs : int
        Number of outputs C, set by the task.
    embed_dim : int | None
        Width E of h after a projection (Linear, activation); None: h is x. The ABMILX project uses
        ``embed_dim=512, dropout=0.25`` (arXiv:2506.02408).
    query_dim : int
        Width Q of the queries.
    nonlinear : bool
        Compute the queries with an MLP instead of a Linear.
    pass_value : bool
        Compute the values with a Linear and a ReLU.
    dropout : float
        Dropout probability of h, for both streams.
    value_dropout : float
        Dropout probability of the input of W_v.
    act : str
        Activation after the projection: ``gelu``, ``relu``, ``silu``, ``tanh`` or ``none``.
    norm : bool
        Apply a LayerNorm to the features first.
    average : bool
        Predict the mean of both streams instead of the bag stream.
    aux_weight : float
        Weight of the loss of the instance stream, where the task's loss has 1; for 0 see above.

    Raises
    ------
    UserError
        ``act`` is unknown, ``query_dim`` below 1, ``aux_weight`` negative, or it is 0 and ``average`` is
        False, so that nothing would train the instance stream.
    """

    aux_loss_needs = "task loss"

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
                f"dsmil: nothing trains the instance stream with head.aux_weight={aux_weight:g} and "
                f"head.average={average}\n"
                "  set head.aux_weight above 0, or head.aux_weight=0 with head.average=true"
            )
        if query_dim < 1:
            raise UserError(f"dsmil: head.query_dim={query_dim} must be 1 or more")
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

    def forward(
        self, features: Tensor, mask: Tensor | None = None, coords: Tensor | None = None
    ) -> HeadOutput:
        """Find the critical patch of each output, pool by similarity to it, and classify.

        Parameters
        ----------
        features : Tensor of shape (B, N, D)
            Floating point.
        mask : Tensor of shape (B, N), optional
            bool, True for real patches; None: all are real.
        coords : Tensor of shape (B, N, 2), optional
            Unused.

        Returns
        -------
        HeadOutput
            logits (B, C); one attention map an output, attention_logits (B, C, N);
            instance_logits (B, N, C), the c_n; aux["instance_max"] (B, C), the max_n c_n.
        """
        mask = resolve_mask(features, mask)
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
        """Return ``aux_weight`` times the task's loss of the critical patches; None if the weight is 0."""
        if not self.aux_weight:
            return None
        assert output.aux is not None
        return self.aux_weight * loss(output.aux["instance_max"], target).mean()
