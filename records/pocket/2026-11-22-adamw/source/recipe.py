"""Every hyper-parameter of the trainer, with a preset for each track and optimizer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch


def machine_precision() -> str:
    """`bfloat16` where this machine multiplies it in hardware, else `float32`."""
    if torch.cuda.is_available():
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has = getattr(torch.cpu, "get_capabilities", dict)()
        fast = has.get("avx512_bf16", False) or has.get("amx_bf16", False)
    return "bfloat16" if fast else "float32"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training, completely: model, data order, optimizer, schedule, arithmetic."""

    layers: int
    heads: int
    width: int
    vocab_size: int  # rows of the embedding, at least the tokens of the track
    sequence_length: int  # tokens
    batch_tokens: int  # tokens per optimizer step, over all ranks
    micro_batch: int  # sequences per forward pass of a rank, at most
    steps: int  # optimizer steps
    warmup_steps: int = 0  # learning rate rises linearly
    warmdown_steps: int  # learning rate falls linearly to zero
    optimizer: Literal["muon", "adamw"]  # muon: Muon for the blocks, AdamW for embedding and head
    lr: float  # AdamW's; Muon's is muon_lr_scale times it
    muon_lr_scale: float = 0.1
    muon_momentum: float = 0.95
    muon_ns_steps: int = 5
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.0  # AdamW's
    attention_scale: float = 1.0  # factor on attention's output
    precision: Literal["auto", "bfloat16", "float32"] = "auto"  # auto becomes what this machine does fast
    compile: bool = True  # torch.compile, on GPU only

    def __post_init__(self) -> None:
        if self.precision == "auto":
            object.__setattr__(self, "precision", machine_precision())
        for name in ("layers", "heads", "width", "vocab_size", "sequence_length", "batch_tokens", "micro_batch", "steps", "lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above zero, got {getattr(self, name)}")
        if self.width % (2 * self.heads):
            raise ValueError(f"width {self.width} does not split into {self.heads} heads of even width")
        if min(self.warmup_steps, self.warmdown_steps) < 0:
            raise ValueError(f"warmup_steps {self.warmup_steps} and warmdown_steps {self.warmdown_steps} must not be negative")
        if self.warmup_steps + self.warmdown_steps > self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} + warmdown_steps {self.warmdown_steps} exceed steps {self.steps}")


FINEWEB_MUON = Recipe(  # the 5100-step baseline of October 2024
    layers=12,
    heads=6,
    width=768,
    vocab_size=50304,
    sequence_length=1024,
    batch_tokens=512 * 1024,
    micro_batch=64,
    steps=5100,
    warmdown_steps=1450,
    optimizer="muon",
    lr=0.0036,
)
POCKET_MUON = Recipe(
    layers=4,
    heads=2,
    width=128,
    vocab_size=256,
    sequence_length=256,
    batch_tokens=32 * 256,
    micro_batch=16,
    steps=100,
    warmdown_steps=30,
    optimizer="muon",
    lr=0.0144,
)

RECIPES = {  # track id -> recipe name -> preset; a track's first recipe is its default
    "fineweb": {
        "muon": FINEWEB_MUON,
        "adamw": replace(FINEWEB_MUON, optimizer="adamw", lr=0.0018, weight_decay=0.1, steps=9536, warmup_steps=256, warmdown_steps=2048),
    },
    "fineweb-steps": {"muon": FINEWEB_MUON},
    "pocket": {
        "muon": POCKET_MUON,
        "adamw": replace(POCKET_MUON, optimizer="adamw", lr=0.004, warmup_steps=10),
    },
}
