"""dqrm: train click models in INT4 by quantization-aware training.

The names below are the public API. They are imported on first use, so that `import dqrm` and `dqrm --help` stay quick.
"""

from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "Artifact": "dqrm.export.artifact",
    "Config": "dqrm.config",
    "ExportConfig": "dqrm.export.config",
    "ExchangeConfig": "dqrm.config",
    "ModelConfig": "dqrm.config",
    "OptimizerConfig": "dqrm.config",
    "TrainingConfig": "dqrm.config",
    "PTQConfig": "dqrm.export.config",
    "QATConfig": "dqrm.quant.config",
    "PredictConfig": "dqrm.export.config",
    "PrepareConfig": "dqrm.data.config",
    "Dataset": "dqrm.data.dataset",
    "DLRM": "dqrm.models.dlrm",
    "QuantEmbedding": "dqrm.quant.embedding",
    "QuantEmbeddingBag": "dqrm.quant.embedding",
    "QuantEmbeddingBagCollection": "dqrm.quant.embedding",
    "QuantLinear": "dqrm.quant.linear",
    "Run": "dqrm.training.run",
    "UserError": "dqrm.errors",
    "convert": "dqrm.quant.convert",
    "evaluate": "dqrm.training.evaluation",
    "export_run": "dqrm.export.pipeline",
    "load": "dqrm.export.artifact",
    "predict": "dqrm.export.scoring",
    "prepare": "dqrm.data.prepare",
    "prepare_qat": "dqrm.quant.convert",
    "resume": "dqrm.training.launch",
    "train": "dqrm.training.launch",
}

__all__ = ["__version__", *sorted(_HOMES)]  # noqa: PLE0604 (all of them are names)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dqrm' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
