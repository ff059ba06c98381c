"""The numerics of INT4 training. Knows tensors only: no model, no data, no trainer.

`uniform` (scale, codes, values) <- `ranges` (when a scale is refreshed) <- `embedding`, `linear` <- `convert`.
"""
