"""Token ops for I-JEPA, each defined in PyTorch and implemented in Triton; needs torch alone, never `fastjepa`."""

from . import dispatch
from .adamw_ema_step import adamw_ema_step_, adamw_ema_step_ref, adamw_ema_table
from .assemble_predictor import assemble_predictor, assemble_predictor_ref, predictor_layout
from .dispatch import plan, use
from .ema_update import ema_table, ema_update_, ema_update_ref
from .gather_tokens import gather_tokens, gather_tokens_ref, gather_tokens_repeated, gather_tokens_repeated_ref, occurrences
from .patchify_tokens import patchify_tokens, patchify_tokens_ref
from .scatter_tokens import scatter_tokens, scatter_tokens_ref
from .short_attention import short_attention, short_attention_ref
from .target_loss import target_loss, target_loss_ref
from .varlen_attention import attention_way, varlen_attention, varlen_attention_ref

__version__ = "0.1.0"
__all__ = [
    "adamw_ema_step_",
    "adamw_ema_step_ref",
    "adamw_ema_table",
    "assemble_predictor",
    "assemble_predictor_ref",
    "attention_way",
    "dispatch",
    "ema_table",
    "ema_update_",
    "ema_update_ref",
    "gather_tokens",
    "gather_tokens_ref",
    "gather_tokens_repeated",
    "gather_tokens_repeated_ref",
    "occurrences",
    "patchify_tokens",
    "patchify_tokens_ref",
    "plan",
    "predictor_layout",
    "scatter_tokens",
    "scatter_tokens_ref",
    "short_attention",
    "short_attention_ref",
    "target_loss",
    "target_loss_ref",
    "use",
    "varlen_attention",
    "varlen_attention_ref",
]
