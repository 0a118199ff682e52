"""Encoders: networks from the observed values of a row to features of that row.

    source       what the observed site looks like             network
    vector       one vector a row                              perceptron
    image        (C, H, W) or (H, W), H and W at least 8       convolutions
    set          a plate of alike elements in every row        a network per element, pooled

Every network maps the flat, standardized inputs of a batch to features, ``(B, F) -> (B, H)``;
:class:`guides.schemes.encoder.Encoder` reads the inputs and puts a linear head on the features.
"""

from __future__ import annotations

from guides.encoders.body import body
from guides.encoders.inputs import Input, read_inputs
from guides.encoders.source import KINDS, Source, describe

__all__ = ["KINDS", "Input", "Source", "body", "describe", "read_inputs"]
