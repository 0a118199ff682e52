"""Schemes: how the parameters of q are found. One a file: a call to parameters (B, P)."""

from __future__ import annotations

SCHEMES = {
    "local": "guides.schemes.local:Local",
    "amortized": "guides.schemes.encoder:Encoder",
}
