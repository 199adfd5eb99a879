"""TransMIL: two layers of Nystrom attention around a convolutional position encoding."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from e2e.errors import UserError
from e2e.heads.base import HEADS, Head, HeadOutput, clear_padding, resolve_mask
from e2e.heads.layers import check_heads, projection


def pseudo_inverse(kernel: Tensor, iterations: int) -> Tensor:
    """Return Z, an approximate Moore-Penrose inverse of A, for A >= 0 whose rows sum to 1, or are 0::

        Z_0 = A^T / (|A|_1 |A|_inf)
        Z  <- Z (13 I - A Z (15 I - A Z (7 I - A Z))) / 4

    |A|_inf, the largest row sum, is 1 here. Where A has rows and columns of zeros, Z has columns and rows of
    zeros, and the rest of Z is the same as without them, so matrices of different sizes can share a batch.
    The scale is computed for each matrix.

    Source: Xiong et al. 2021, arXiv:2102.03902, the iterative Moore-Penrose approximation.

    Parameters
    ----------
    kernel : Tensor of shape (..., M, M)
        A, in at least float32.
    iterations : int
        How often Z is improved.

    Returns
    -------
    Tensor of shape (..., M, M)
    """
    inverse = kernel.mT / kernel.sum(dim=-2).amax(dim=-1)[..., None, None]
    eye = torch.eye(kernel.shape[-1], dtype=kernel.dtype, device=kernel.device)
    for _ in range(iterations):
        product = kernel @ inverse
        inner = 7 * eye - product
        inner = 15 * eye - product @ inner
        inverse = inverse @ (13 * eye - product @ inner) / 4
    return inverse


def nystrom_attention(
    query: Tensor, key: Tensor, value: Tensor, length: Tensor, *, landmarks: int, iterations: int
) -> Tensor:
    """Return softmax attention approximated with landmarks, in memory linear in L::

        softmax(Q K~^T / sqrt(d))  softmax(Q~ K~^T / sqrt(d))^+  softmax(Q~ K^T / sqrt(d)) V

    Q~ and K~ are the means of min(``landmarks``, length) runs of neighbouring tokens, whose lengths differ by
    one at most. In a sequence no longer than ``landmarks`` each token is its own landmark; then this is
    exact softmax attention, up to the convergence of the inverse.

    Source: Xiong et al. 2021, "Nystromformer", arXiv:2102.03902.

    Parameters
    ----------
    query : Tensor of shape (B, H, L, d)
        In at least float32: the inverse amplifies rounding errors.
    key, value : Tensor of shape (B, H, L, d)
        As ``query``.
    length : Tensor of shape (B, 1)
        How many tokens of each row are real; they come first.
    landmarks : int
        Largest number of landmarks.
    iterations : int
        See :func:`pseudo_inverse`.

    Returns
    -------
    Tensor of shape (B, H, L, d)
        Meaningless behind ``length``.
    """
    tokens, dim = query.shape[-2:]
    num_landmarks = min(landmarks, tokens)
    token_L = torch.arange(tokens, device=query.device)
    landmark_M = torch.arange(num_landmarks, device=query.device)
    landmarks_B1 = length.clamp(max=landmarks)
    run_BL = token_L * landmarks_B1 // length
    real_BL, real_BM = token_L < length, landmark_M < landmarks_B1

    member_BML = (run_BL.unsqueeze(1) == landmark_M.unsqueeze(1)) & real_BL.unsqueeze(1)
    # A product with a matrix of weights, because a scattered sum is not deterministic on CUDA.
    mean_BML = member_BML.to(query.dtype) / member_BML.sum(-1, keepdim=True).clamp_min(1)
    query_BHMd = torch.einsum("bml,bhld->bhmd", mean_BML, query)
    key_BHMd = torch.einsum("bml,bhld->bhmd", mean_BML, key)

    score_BHMM = query_BHMd @ key_BHMd.mT * dim**-0.5
    kernel_BHMM = score_BHMM.masked_fill(~real_BM[:, None, None], float("-inf")).softmax(dim=-1)
    inverse_BHMM = pseudo_inverse(kernel_BHMM * real_BM[:, None, :, None], iterations)
    gathered_BHMd = F.scaled_dot_product_attention(
        query_BHMd, key, value, attn_mask=real_BL[:, None, None]
    )
    return F.scaled_dot_product_attention(
        query, key_BHMd, inverse_BHMM @ gathered_BHMd, attn_mask=real_BM[:, None, None]
    )


class NystromLayer(nn.Module):
    """x + Dropout(W_o [Nystrom(Q, K, V) + conv(V)]), with [Q | K | V] = W LN(x), for each head.

    The convolution runs along the sequence, with one kernel for each head.

    Parameters
    ----------
    dim : int
        Width of x.
    heads : int
        Number of attention heads, a divisor of ``dim``.
    landmarks : int
        Largest number of landmarks.
    iterations : int
        Iterations of the pseudo-inverse.
    dropout : float
        Dropout probability of what is added to x.
    """

    kernel = 33

    def __init__(
        self, dim: int, *, heads: int, landmarks: int, iterations: int, dropout: float
    ) -> None:
        super().__init__()
        self.heads, self.landmarks, self.iterations = heads, landmarks, iterations
        self.norm = nn.LayerNorm(dim)
        self.query_key_value = nn.Linear(dim, 3 * dim, bias=False)
        shape, around = (self.kernel, 1), (self.kernel // 2, 0)
        self.near = nn.Conv2d(heads, heads, shape, padding=around, groups=heads, bias=False)
        self.merge = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BLE: Tensor, length: Tensor) -> Tensor:
        """Return (B, L, dim) for x (B, L, dim); ``length`` (B, 1): the number of real tokens of each row."""
        projected = self.query_key_value(self.norm(x_BLE)).unflatten(-1, (3, self.heads, -1))
        with torch.autocast(x_BLE.device.type, enabled=False):
            exact = projected.to(torch.promote_types(projected.dtype, torch.float32))
            query, key, value = exact.permute(2, 0, 3, 1, 4)
            real_BL = torch.arange(x_BLE.shape[1], device=x_BLE.device) < length
            value = value.masked_fill(~real_BL[:, None, :, None], 0.0)  # as beyond the sequence
            mixed_BHLd = nystrom_attention(
                query, key, value, length, landmarks=self.landmarks, iterations=self.iterations
            ) + self.near(value)
        return x_BLE + self.dropout(self.merge(mixed_BHLd.transpose(1, 2).flatten(2)))


class PositionEncoding(nn.Module):
    """PPEG: x + conv7(x) + conv5(x) + conv3(x), depthwise, on tokens laid out in a square.

    Parameters
    ----------
    dim : int
        Width of x.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv7, self.conv5, self.conv3 = (
            nn.Conv2d(dim, dim, side, padding=side // 2, groups=dim) for side in (7, 5, 3)
        )

    def forward(self, x_BTE: Tensor, side: Tensor) -> Tensor:
        """Return (B, T, dim) for x (B, T, dim), where T is a square number.

        ``side`` (B, 1): the first side^2 tokens of a row are real. Squares of different sides share one
        canvas: it is zero outside of a square, like the padding of a convolution at an edge.
        """
        width = math.isqrt(x_BTE.shape[1])
        cell = torch.arange(x_BTE.shape[1], device=x_BTE.device)
        row, column = cell // width, cell % width
        inside = (row < side) & (column < side)
        canvas_BTE = clear_padding(take(x_BTE, (row * side + column) * inside), inside)
        canvas = canvas_BTE.transpose(1, 2).unflatten(2, (width, width))
        canvas = canvas + self.conv7(canvas) + self.conv5(canvas) + self.conv3(canvas)
        token_cell = (cell // side * width + cell % side).clamp(max=len(cell) - 1)
        return take(canvas.flatten(2).transpose(1, 2), token_cell)


def take(x_BNE: Tensor, index_BT: Tensor) -> Tensor:
    """Return row ``index_BT[b, t]`` of bag b: (B, N, E) and (B, T) -> (B, T, E)."""
    return x_BNE.gather(1, index_BT.unsqueeze(-1).expand(-1, -1, x_BNE.shape[-1]))


@HEADS.register("transmil")
class TransMIL(Head):
    """A class token that attends to the patches, which are laid out in a square in their order::

        H = [c; h_1 .. h_N, h_1 .. h_M],   h_n = act(W x_n),   N + M = ceil(sqrt(N))^2
        H = Layer_1(H);   H = [H_0; PPEG(H_1 ..)];   H = Layer_2(H);   logits = W_c LN(H_0)

    Sources: Shao et al. 2021, "TransMIL: Transformer based Correlated Multiple Instance Learning
    for Whole Slide Image Classification", arXiv:2106.00908 (TPT module, PPEG); the attention of the layers
    from Xiong et al. 2021, "Nystromformer", arXiv:2102.03902. Weights start by the defaults of PyTorch's
    layers and the class token from N(0, 1), as in the published code.

    Each bag of a batch has its own square, repeated patches, landmarks and lengths, so that a batch equals
    its bags one by one. No matrix of N x N, nor of N x landmarks for each head, is materialised where PyTorch
    has a fused kernel. The attention runs in float32 under autocast.

    There is no attention map. The class token's row of the approximated matrix is not a distribution: the
    inverse is not exact, so the row has negative entries and need not sum to 1; and it weights tokens that
    already mix the whole bag, also through the convolution along the sequence.

    The order of patches matters: it determines their positions in the square and in the sequence, the runs
    that landmarks average, and which patches are repeated.

    Differences from the published code: the sequence is not padded in front with zero tokens to a multiple of
    the landmarks (there they take part as keys, and as 254 of 256 landmarks for a bag of one patch), but cut
    into runs of nearly equal length, and a short bag has as many landmarks as tokens; the inverse is scaled
    for each matrix as in its paper (there by one number for all heads and bags of a batch). If the landmarks
    divide the length, with one head and one bag, both are the same.

    ``torch.export`` works for a fixed N: the side of the square is a constant of the graph.

    Parameters
    ----------
    in_dim : int
        Width D of the features.
    num_outputs : int
        Number of outputs C, set by the task.
    embed_dim : int
        Width E of the tokens.
    heads : int
        Number of attention heads, a divisor of E.
    landmarks : int | None
        Largest number of landmarks; None: E / 2.
    pinv_iterations : int
        Iterations of the pseudo-inverse.
    dropout : float
        Dropout probability of what each layer adds.
    act : str
        Activation after the projection: ``gelu``, ``relu``, ``silu``, ``tanh`` or ``none``.
    norm : bool
        Apply a LayerNorm to the features first.

    Raises
    ------
    UserError
        ``heads`` does not divide ``embed_dim``, ``landmarks`` or ``pinv_iterations`` is below 1, or ``act``
        is unknown.
    """

    permutation_invariant = False
    exports_any_size = False

    def __init__(
        self,
        in_dim: int,
        num_outputs: int,
        *,
        embed_dim: int = 512,
        heads: int = 8,
        landmarks: int | None = None,
        pinv_iterations: int = 6,
        dropout: float = 0.1,
        act: str = "relu",
        norm: bool = False,
    ) -> None:
        super().__init__()
        check_heads("transmil", embed_dim, heads)
        landmarks = max(1, embed_dim // 2) if landmarks is None else landmarks
        if landmarks < 1 or pinv_iterations < 1:
            raise UserError(
                f"transmil: head.landmarks={landmarks} and head.pinv_iterations={pinv_iterations} "
                "must be 1 or more"
            )
        self.project = projection(in_dim, embed_dim, act=act, dropout=0.0, norm=norm)
        self.class_token = nn.Parameter(torch.randn(1, 1, embed_dim))
        self.layer1, self.layer2 = (
            NystromLayer(
                embed_dim,
                heads=heads,
                landmarks=landmarks,
                iterations=pinv_iterations,
                dropout=dropout,
            )
            for _ in range(2)
        )
        self.position = PositionEncoding(embed_dim)
        self.norm = nn.LayerNorm(embed_dim)
        self.classify = nn.Linear(embed_dim, num_outputs)

    def forward(
        self, features: Tensor, mask: Tensor | None = None, coords: Tensor | None = None
    ) -> HeadOutput:
        """Classify the class token of each bag.

        Parameters
        ----------
        features : Tensor of shape (B, N, D)
            Floating point.
        mask : Tensor of shape (B, N), optional
            bool, True for real patches; None: all are real.
        coords : Tensor of shape (B, N, 2), optional
            Unused: the square is filled in the order of the patches, as published.

        Returns
        -------
        HeadOutput
            logits (B, C); no attention map.
        """
        mask = resolve_mask(features, mask)
        bags, patches = mask.shape
        count_B1 = mask.sum(dim=1, keepdim=True)
        # float64: near 4,000^2 the float32 square roots of N and N + 1 are equal.
        side_B1 = count_B1.double().sqrt().ceil().long()
        slots_T = torch.arange((math.isqrt(patches - 1) + 1) ** 2, device=mask.device)
        real_first_BN = mask.int().argsort(dim=1, descending=True, stable=True)
        source_BT = real_first_BN.gather(1, slots_T % count_B1)

        x_BTE = take(self.project(clear_padding(features, mask)), source_BT)
        x_BLE = torch.cat([self.class_token.expand(bags, -1, -1), x_BTE], dim=1)
        length_B1 = side_B1 * side_B1 + 1
        x_BLE = self.layer1(x_BLE, length_B1)
        x_BLE = torch.cat([x_BLE[:, :1], self.position(x_BLE[:, 1:], side_B1)], dim=1)
        x_BLE = self.layer2(x_BLE, length_B1)
        return HeadOutput(self.classify(self.norm(x_BLE[:, 0])))
