"""Architectures, their weights, their features, and what the converter must know of timm.

The only folder that imports timm. Nothing is imported here, so that naming one file loads one file.
"""
