"""Guides of sequences: q of a step given draws and data of the steps around it."""
