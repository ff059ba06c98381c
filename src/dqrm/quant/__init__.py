"""The numerics of quantized training. Operates on tensors only: no model, no data, no trainer.

`uniform` (scale, codes, values) <- `ranges` (when a scale is refreshed) <- `embedding`, `linear` <- `convert`.
"""
