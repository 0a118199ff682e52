"""Schemes: how the parameters of q are found. One a file: a call to parameters (B, P)."""

from __future__ import annotations

SCHEMES = {
    "local": "guides.schemes.local:Local",
    "amortized": "guides.schemes.encoder:Encoder",
    "iterative": "guides.schemes.iterative:Iterative",
    "semi_amortized": "guides.schemes.semi_amortized:SemiAmortized",
    "laplace": "guides.schemes.laplace:LaplaceRefinement",
    "bottom_up": "guides.schemes.bottom_up:BottomUp",
    "top_down": "guides.schemes.top_down:TopDown",
    "autoregressive": "guides.schemes.autoregressive:Autoregressive",
}
