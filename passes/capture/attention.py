"""Attention with its projections in sight: what `nn.MultiheadAttention` computes, as linears around one function.

torch hands the raw weights of the projections to one function, or in eval mode to a kernel. These forwards have the
same parameters, arguments, outputs and dropout masks, and call each projection where a graph shows it. What depends on
which arguments are given happens in `attend`, which a graph holds as one node.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn


def attention_forward(
    self: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return the attention's output and weights, as `nn.MultiheadAttention.forward` does; nested tensors excepted."""
    E = self.embed_dim
    if self._qkv_same_embed_dim:
        weights: Any = (self.in_proj_weight[:E], self.in_proj_weight[E : 2 * E], self.in_proj_weight[2 * E :])
    else:
        weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
    biases: Any = (None, None, None)
    if self.in_proj_bias is not None:
        biases = (self.in_proj_bias[:E], self.in_proj_bias[E : 2 * E], self.in_proj_bias[2 * E :])
    projected = [F.linear(x, W, b) for x, W, b in zip((query, key, value), weights, biases, strict=True)]
    masks = (key_padding_mask, attn_mask, is_causal)
    settings = (self.num_heads, self.batch_first, self.add_zero_attn, self.dropout if self.training else 0.0)
    extra = (self.bias_k, self.bias_v)
    heads, scores = attend(projected, extra, masks, need_weights, average_attn_weights, settings)
    return in_layout(self.out_proj(heads), self.batch_first), scores


def encoder_layer_forward(
    self: nn.TransformerEncoderLayer,
    src: Tensor,
    src_mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """Return what `nn.TransformerEncoderLayer.forward` does where it calls its children, and not a fused kernel."""
    masks = (src_mask, src_key_padding_mask, is_causal)
    if self.norm_first:
        src = src + self._sa_block(self.norm1(src), *masks)
        return src + self._ff_block(self.norm2(src))
    src = self.norm1(src + self._sa_block(src, *masks))
    out: Tensor = self.norm2(src + self._ff_block(src))
    return out


def encoder_forward(
    self: nn.TransformerEncoder,
    src: Tensor,
    mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None,
    is_causal: bool | None = None,
) -> Tensor:
    """Return what `nn.TransformerEncoder.forward` does without nested tensors: positions of padding are not zeroed."""
    causal = detect_causal(mask, is_causal, src, self.layers[0].self_attn.batch_first)
    for layer in self.layers:
        src = layer(src, src_mask=mask, is_causal=causal, src_key_padding_mask=src_key_padding_mask)
    return src if self.norm is None else self.norm(src)


@fx.wrap
def detect_causal(mask: Tensor | None, is_causal: bool | None, src: Tensor, batch_first: bool) -> bool:
    """Return `is_causal`, or where that is None whether the mask is the causal one."""
    if is_causal is not None or mask is None:
        return bool(is_causal)
    length = src.shape[1 if batch_first and src.dim() == 3 else 0]
    if mask.shape[-2:] != (length, length):
        return False
    causal = nn.Transformer.generate_square_subsequent_mask(length, device=mask.device, dtype=mask.dtype)
    return bool((mask == causal).all())


@fx.wrap
def attend(
    projected: list[Tensor],
    extra: tuple[Tensor | None, Tensor | None],
    masks: tuple[Tensor | None, Tensor | None, bool],
    need_weights: bool,
    average_weights: bool,
    settings: tuple[int, bool, bool, float],
) -> tuple[Tensor, Tensor | None]:
    """Return the heads' outputs side by side, `[L, N, E]` or `[L, E]`, and the attention weights if they are needed.

    Args:
        projected: query `[L, N, E]`, key and value `[S, N, E]` (or batch first, or without N).
        extra: `bias_k` and `bias_v [1, 1, E]`, one more position of key and value.
        masks: `key_padding_mask [N, S]`, `attn_mask [L, S]` or `[N * heads, L, S]`, and `is_causal`.
        need_weights: return them, `[N, L, S]`, or `[N, heads, L, S]` where `average_weights` is False.
        average_weights: see above.
        settings: number of heads, `batch_first`, `add_zero_attn`, and the probability of dropout.
    """
    heads, batch_first, add_zero, dropout = settings
    batched = projected[0].dim() == 3
    q, k, v = (_batch_first(x, batch_first) for x in projected)
    key_padding, mask, causal = masks
    if key_padding is not None and not batched:
        key_padding = key_padding[None]
    _check_shapes(q, k, v, heads, key_padding, mask)
    if causal and mask is None:
        raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
    known = causal and key_padding is None and not need_weights  # by the function: no mask is to be added
    bias = None if known else _merged_mask(q.dtype, heads, key_padding, mask)
    k, v, bias = _lengthened(k, v, bias, extra, add_zero)
    q, k, v = (x.reshape(*x.shape[:-1], heads, -1).transpose(1, 2) for x in (q, k, v))
    if need_weights:
        out, scores = _explicit(q, k, v, bias, dropout)
        scores = scores.mean(dim=1) if average_weights else scores
        scores = scores if batched else scores[0]
    else:
        out, scores = F.scaled_dot_product_attention(q, k, v, bias, dropout, known and bias is None), None
    out = out.permute(2, 0, 1, 3).flatten(2)
    return out if batched else out[:, 0], scores


def _batch_first(x: Tensor, batch_first: bool) -> Tensor:
    if x.dim() == 2:
        return x[None]
    return x if batch_first else x.transpose(0, 1)


@fx.wrap
def in_layout(out: Tensor, batch_first: bool) -> Tensor:
    """Return an output `[L, N, E]` as the view that torch returns: a dropout after it draws in the order of memory."""
    return out.transpose(0, 1) if batch_first and out.dim() == 3 else out


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, heads: int, key_padding: Tensor | None, mask: Tensor | None) -> None:
    """Raise as torch does where shapes would be broadcast that are not meant to be."""
    (N, L), S = q.shape[:2], k.shape[1]
    if k.shape[:2] != v.shape[:2] or len(k) != N:
        raise RuntimeError(
            f"key shape {tuple(k.shape)} does not match query {tuple(q.shape)} or value {tuple(v.shape)}"
        )
    if mask is not None and mask.shape not in ((L, S), (N * heads, L, S)):
        raise RuntimeError(
            f"The shape of the attn_mask is {mask.shape}, but should be {(L, S)} or {(N * heads, L, S)}."
        )
    if key_padding is not None and key_padding.shape != (N, S):
        raise RuntimeError(f"The shape of the key_padding_mask is {key_padding.shape}, but should be {(N, S)}.")


def _merged_mask(dtype: torch.dtype, heads: int, key_padding: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """Return what is added to the scores, `[N or 1, heads or 1, L or 1, S]`; None where nothing is."""
    padding = None if key_padding is None else _additive(key_padding, dtype)[:, None, None]
    if mask is None:
        return padding
    scores = _additive(mask, dtype)
    scores = scores[None, None] if scores.dim() == 2 else scores.reshape(-1, heads, *scores.shape[1:])
    return scores if padding is None else scores + padding


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)


def _lengthened(
    k: Tensor, v: Tensor, bias: Tensor | None, extra: tuple[Tensor | None, Tensor | None], add_zero: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Append the positions that `add_bias_kv` and `add_zero_attn` ask for, which no mask hides."""
    tails = [pair for pair in [extra] if pair[0] is not None and pair[1] is not None]
    tails += [(torch.zeros_like(k[:1, :1]), torch.zeros_like(v[:1, :1]))] if add_zero else []
    for k_tail, v_tail in tails:
        k, v = (torch.cat([x, t.expand(len(x), -1, -1)], 1) for x, t in ((k, k_tail), (v, v_tail)))  # type: ignore[union-attr]
        bias = bias if bias is None else F.pad(bias, (0, 1))
    return k, v, bias


def _explicit(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout: float) -> tuple[Tensor, Tensor]:
    """Attend with the weights in hand, by the operations of torch's own: equal under autocast, and in dropout masks."""
    shape = (*q.shape[:3], k.shape[2])
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    q = q * math.sqrt(1.0 / q.shape[-1])
    scores = torch.bmm(q, k.mT) if bias is None else torch.baddbmm(bias.expand(shape).flatten(0, 1), q, k.mT)
    weights = scores.softmax(dim=-1)
    if dropout > 0.0:
        weights = F.dropout(weights, dropout)
    return torch.bmm(weights, v).reshape(*shape[:3], -1), weights.reshape(shape)
