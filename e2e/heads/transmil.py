"""TransMIL: two layers of Nystrom attention around a convolutional position encoding."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from e2e.errors import UserError
from e2e.heads.base import HEADS, Head, HeadOutput, clear_padding
from e2e.heads.layers import projection


def pseudo_inverse(kernel: Tensor, iterations: int) -> Tensor:
    """Z near the Moore-Penrose inverse of A, for A >= 0 whose rows sum to 1, or are 0::

        Z_0 = A^T / (|A|_1 |A|_inf)
        Z  <- Z (13 I - A Z (15 I - A Z (7 I - A Z))) / 4

    |A|_inf, the largest row sum, is 1 here. Where A has rows and columns of zeros, Z has columns
    and rows of zeros, and the rest of it is what it would be without them: so matrices of
    different sizes share a batch. The scale is each matrix's own.

    Source: Xiong et al. 2021, arXiv:2102.03902, the iterative Moore-Penrose approximation.

    Args:
        kernel: (..., M, M), at least float32.
        iterations: how often Z is improved.

    Returns:
        (..., M, M).
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
    """Softmax attention by landmarks, in memory linear in L::

        softmax(Q K~^T / sqrt(d))  softmax(Q~ K~^T / sqrt(d))^+  softmax(Q~ K^T / sqrt(d)) V

    Q~ and K~ are the means of min(``landmarks``, length) runs of neighbouring tokens; the lengths
    of the runs differ by one at most. A sequence no longer than ``landmarks`` has each token as
    its own landmark: then this is softmax attention itself, as far as the inverse has converged.

    Source: Xiong et al. 2021, "Nystromformer", arXiv:2102.03902.

    Args:
        query: (B, H, L, d), at least float32: the inverse multiplies rounding errors.
        key: (B, H, L, d).
        value: (B, H, L, d).
        length: (B, 1), how many tokens of each row are real; those come first.
        landmarks: most landmarks.
        iterations: of :func:`pseudo_inverse`.

    Returns:
        (B, H, L, d); without meaning behind ``length``.
    """
    tokens, dim = query.shape[-2:]
    most = min(landmarks, tokens)
    place_L = torch.arange(tokens, device=query.device)
    mark_M = torch.arange(most, device=query.device)
    marks_B1 = length.clamp(max=landmarks)
    run_BL = place_L * marks_B1 // length
    real_BL, real_BM = place_L < length, mark_M < marks_B1

    member_BML = (run_BL.unsqueeze(1) == mark_M.unsqueeze(1)) & real_BL.unsqueeze(1)
    # A product with a matrix of weights: on CUDA a scattered sum would differ from run to run.
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
    """x + Dropout(W_o [Nystrom(Q, K, V) + conv(V)]), with [Q | K | V] = W LN(x), head by head.

    The convolution runs along the sequence, one kernel a head.

    Args:
        dim: width of x.
        heads: how many heads share it.
        landmarks: most landmarks.
        iterations: of the pseudo-inverse.
        dropout: probability, on what is added to x.
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
        """(B, L, dim) -> (B, L, dim); ``length`` (B, 1): how many tokens of each row are real."""
        three = self.query_key_value(self.norm(x_BLE)).unflatten(-1, (3, self.heads, -1))
        with torch.autocast(x_BLE.device.type, enabled=False):
            exact = three.to(torch.promote_types(three.dtype, torch.float32))
            query, key, value = exact.permute(2, 0, 3, 1, 4)
            real_BL = torch.arange(x_BLE.shape[1], device=x_BLE.device) < length
            value = value.masked_fill(~real_BL[:, None, :, None], 0.0)  # as the sequence's end
            mixed_BHLd = nystrom_attention(
                query, key, value, length, landmarks=self.landmarks, iterations=self.iterations
            ) + self.near(value)
        return x_BLE + self.dropout(self.merge(mixed_BHLd.transpose(1, 2).flatten(2)))


class PositionEncoding(nn.Module):
    """PPEG: x + conv7(x) + conv5(x) + conv3(x), channel by channel, on tokens laid out in a square."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv7, self.conv5, self.conv3 = (
            nn.Conv2d(dim, dim, side, padding=side // 2, groups=dim) for side in (7, 5, 3)
        )

    def forward(self, x_BTE: Tensor, side: Tensor) -> Tensor:
        """(B, T, dim) -> (B, T, dim), T a square number; the first side^2 tokens of a row are real.

        ``side`` (B, 1). Squares of different sides share one canvas: what lies outside a square is
        zero, as is what a convolution sees beyond an edge.
        """
        width = math.isqrt(x_BTE.shape[1])
        cell = torch.arange(x_BTE.shape[1], device=x_BTE.device)
        row, column = cell // width, cell % width
        inside = (row < side) & (column < side)
        canvas_BTE = clear_padding(take(x_BTE, (row * side + column) * inside), inside)
        canvas = canvas_BTE.transpose(1, 2).unflatten(2, (width, width))
        canvas = canvas + self.conv7(canvas) + self.conv5(canvas) + self.conv3(canvas)
        place = (cell // side * width + cell % side).clamp(max=len(cell) - 1)
        return take(canvas.flatten(2).transpose(1, 2), place)


def take(x_BNE: Tensor, index_BT: Tensor) -> Tensor:
    """Row ``index_BT[b, t]`` of bag b: (B, N, E) and (B, T) -> (B, T, E)."""
    return x_BNE.gather(1, index_BT.unsqueeze(-1).expand(-1, -1, x_BNE.shape[-1]))


@HEADS.register("transmil")
class TransMIL(Head):
    """A class token that attends to the patches, laid out in a square in their order::

        H = [c; h_1 .. h_N, h_1 .. h_M],   h_n = act(W x_n),   N + M = ceil(sqrt(N))^2
        H = Layer_1(H);   H = [H_0; PPEG(H_1 ..)];   H = Layer_2(H);   logits = W_c LN(H_0)

    Sources: Shao et al. 2021, "TransMIL: Transformer based Correlated Multiple Instance Learning
    for Whole Slide Image Classification", arXiv:2106.00908 (TPT module, PPEG); the layers' attention
    from Xiong et al. 2021, "Nystromformer", arXiv:2102.03902. Weights start as PyTorch's layers
    do and the class token from N(0, 1), as in the published code.

    Each bag of a batch has its own square, repeated patches, landmarks and lengths, so that a batch
    equals its bags one by one. No matrix of N x N, nor of N x landmarks for each head, is held
    where PyTorch has a fused kernel. The attention runs in float32 under autocast.

    There is no attention map. The class token's row of the approximated matrix is no distribution:
    the inverse is not exact, so the row has negative entries and need not sum to 1; and what it
    weighs are tokens that already mix the bag, besides the convolution along the sequence.

    The order of patches matters: it decides their places in the square and in the sequence, the
    runs that landmarks are the means of, and which patches are repeated.

    Differs from the published code: the sequence is not filled up in front with zero tokens to a
    multiple of the landmarks (there they take part as keys, and as 254 of 256 landmarks for a bag of
    one patch), but cut in runs of nearly equal length, and a short bag has as many landmarks
    as tokens; the inverse is scaled matrix by matrix as in its paper (there by one number
    for all heads and bags of a batch). With a length that the landmarks divide, one head and one
    bag, both are the same.

    ``torch.export`` works for a fixed N: the side of the square is a number of the graph.

    Args:
        in_dim: width D of the encoder's features.
        num_outputs: C, given by the task.
        embed_dim: width E of the tokens.
        heads: attention heads, which divide E.
        landmarks: most landmarks; None: E / 2.
        pinv_iterations: steps towards the inverse.
        dropout: probability, on what each layer adds.
        act: activation of the projection (gelu, relu, silu, tanh, none).
        norm: LayerNorm on the features.

    Raises:
        UserError: ``heads`` does not divide ``embed_dim``, ``landmarks`` or ``pinv_iterations`` is
            below 1, or ``act`` is unknown.
    """

    order_free = False

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
        if heads < 1 or embed_dim % heads:
            raise UserError(
                f"transmil cannot split embed_dim={embed_dim} into heads={heads}\n"
                f"  choose heads among {[h for h in range(1, 65) if embed_dim % h == 0]}"
            )
        landmarks = max(1, embed_dim // 2) if landmarks is None else landmarks
        if landmarks < 1 or pinv_iterations < 1:
            raise UserError(
                "transmil needs landmarks and pinv_iterations of 1 or more, "
                f"found landmarks={landmarks} and pinv_iterations={pinv_iterations}"
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

    def forward(self, features: Tensor, mask: Tensor, coords: Tensor | None = None) -> HeadOutput:
        """Classify each bag's class token.

        Args:
            features: (B, N, D) floating point.
            mask: (B, N) bool, True where the patch is real.
            coords: unused: the square is filled in the order of the patches, as published.

        Returns:
            logits (B, C); no attention map.
        """
        bags, patches = mask.shape
        count_B1 = mask.sum(dim=1, keepdim=True)
        # float64: near 4,000^2 a float32 square root no longer tells N from N + 1.
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
