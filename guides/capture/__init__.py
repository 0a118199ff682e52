"""Capture: Pyro programs as pure graphs of tensor operations, and what runs them."""

from __future__ import annotations

from guides.capture.graph import CaptureError, Draw, Graph, capture_graph
from guides.capture.losses import loss_and_grads
from guides.capture.steps import Steps

__all__ = ["CaptureError", "Draw", "Graph", "Steps", "capture_graph", "loss_and_grads"]
