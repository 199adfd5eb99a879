"""gABMIL: ABMIL with gated attention and a wider attention MLP."""

from __future__ import annotations

from e2e.heads.abmil import ABMIL
from e2e.heads.base import HEADS


@HEADS.register("gabmil")
class GABMIL(ABMIL):
    """Gated attention pooling with a hidden width of 384: :class:`~e2e.heads.abmil.ABMIL` by its eq. 9.

    Source: Ilse, Tomczak and Welling 2018, eq. 9, arXiv:1802.04712. Name and width are those of
    "gabmil" in the ABMILX project (Tang et al. 2025, arXiv:2506.02408).

    Difference from the published code: there the LayerNorm is lost by mistake, whatever the option
    (``norm=False`` is what it runs). Here it is on by default as in ``abmil``, so that the two names
    differ in their attention only.

    Parameters
    ----------
    in_dim : int
        Width D of the features.
    num_outputs : int
        Number of outputs C, set by the task.
    embed_dim : int
        Width E after the projection.
    attn_dim : int
        Hidden width of the attention MLP.
    dropout : float
        Dropout probability of the projected features.
    act : str
        Activation after the projection: ``gelu``, ``relu``, ``silu``, ``tanh`` or ``none``.
    norm : bool
        Apply a LayerNorm to the features first.
    """

    def __init__(
        self,
        in_dim: int,
        num_outputs: int,
        *,
        embed_dim: int = 512,
        attn_dim: int = 384,
        dropout: float = 0.25,
        act: str = "relu",
        norm: bool = True,
    ) -> None:
        super().__init__(
            in_dim,
            num_outputs,
            embed_dim=embed_dim,
            attn_dim=attn_dim,
            gated=True,
            dropout=dropout,
            act=act,
            norm=norm,
        )
