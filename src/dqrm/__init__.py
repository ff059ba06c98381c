"""dqrm: train click models in INT4 by quantization-aware training.

The names below are the public API. They are imported on first use, so that `import dqrm` and `dqrm --help` stay quick.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the same names for type checkers and editors
    from dqrm.artifact.file import Artifact as Artifact
    from dqrm.config import Config as Config
    from dqrm.config import ModelConfig as ModelConfig
    from dqrm.config import OptimizerConfig as OptimizerConfig
    from dqrm.config import TrainingConfig as TrainingConfig
    from dqrm.data.batches import Batch as Batch
    from dqrm.data.config import PrepareConfig as PrepareConfig
    from dqrm.data.dataset import Dataset as Dataset
    from dqrm.data.parts import merge_parts as merge_parts
    from dqrm.data.parts import prepare_part as prepare_part
    from dqrm.data.prepare import prepare as prepare
    from dqrm.distributed.config import ExchangeConfig as ExchangeConfig
    from dqrm.errors import UserError as UserError
    from dqrm.export.config import ExportConfig as ExportConfig
    from dqrm.export.config import PTQConfig as PTQConfig
    from dqrm.export.pipeline import export_run as export_run
    from dqrm.models.base import ClickModel as ClickModel
    from dqrm.models.dcn import DCN as DCN
    from dqrm.models.dlrm import DLRM as DLRM
    from dqrm.models.registry import MODELS as MODELS
    from dqrm.quant.config import QATConfig as QATConfig
    from dqrm.quant.convert import convert as convert
    from dqrm.quant.convert import prepare_qat as prepare_qat
    from dqrm.quant.embedding import QuantEmbedding as QuantEmbedding
    from dqrm.quant.embedding import QuantEmbeddingBag as QuantEmbeddingBag
    from dqrm.quant.embedding import QuantEmbeddingBagCollection as QuantEmbeddingBagCollection
    from dqrm.quant.linear import QuantLinear as QuantLinear
    from dqrm.quant.mixed import MixedPackedCollection as MixedPackedCollection
    from dqrm.quant.packed import PackedEmbedding as PackedEmbedding
    from dqrm.quant.packed import PackedEmbeddingBag as PackedEmbeddingBag
    from dqrm.quant.packed import PackedEmbeddingBagCollection as PackedEmbeddingBagCollection
    from dqrm.quant.packed import PackedLinear as PackedLinear
    from dqrm.quant.uniform import dequantize as dequantize
    from dqrm.quant.uniform import fake_quantize as fake_quantize
    from dqrm.quant.uniform import quantize as quantize
    from dqrm.serving.config import PredictConfig as PredictConfig
    from dqrm.serving.evaluation import evaluate as evaluate
    from dqrm.serving.loaded import load as load
    from dqrm.serving.predict import predict as predict
    from dqrm.training.callbacks import Callback as Callback
    from dqrm.training.launch import resume as resume
    from dqrm.training.launch import train as train
    from dqrm.training.metrics import Metric as Metric
    from dqrm.training.optimizers import CounterAdagrad as CounterAdagrad
    from dqrm.training.optimizers import DenseAdam as DenseAdam
    from dqrm.training.optimizers import FrequencyAdagrad as FrequencyAdagrad
    from dqrm.training.optimizers import SparseAdagrad as SparseAdagrad
    from dqrm.training.optimizers import SparseAdam as SparseAdam
    from dqrm.training.optimizers import SparseOptimizer as SparseOptimizer
    from dqrm.training.optimizers import SparseSGD as SparseSGD
    from dqrm.training.run import Run as Run

__version__ = "0.1.0"

_HOMES = {
    "Artifact": "dqrm.artifact.file",
    "Batch": "dqrm.data.batches",
    "ClickModel": "dqrm.models.base",
    "Callback": "dqrm.training.callbacks",
    "Config": "dqrm.config",
    "DCN": "dqrm.models.dcn",
    "DLRM": "dqrm.models.dlrm",
    "Dataset": "dqrm.data.dataset",
    "ExchangeConfig": "dqrm.distributed.config",
    "ExportConfig": "dqrm.export.config",
    "MODELS": "dqrm.models.registry",
    "Metric": "dqrm.training.metrics",
    "MixedPackedCollection": "dqrm.quant.mixed",
    "ModelConfig": "dqrm.config",
    "OptimizerConfig": "dqrm.config",
    "PTQConfig": "dqrm.export.config",
    "PackedEmbedding": "dqrm.quant.packed",
    "PackedEmbeddingBag": "dqrm.quant.packed",
    "PackedEmbeddingBagCollection": "dqrm.quant.packed",
    "PackedLinear": "dqrm.quant.packed",
    "PredictConfig": "dqrm.serving.config",
    "PrepareConfig": "dqrm.data.config",
    "QATConfig": "dqrm.quant.config",
    "QuantEmbedding": "dqrm.quant.embedding",
    "QuantEmbeddingBag": "dqrm.quant.embedding",
    "QuantEmbeddingBagCollection": "dqrm.quant.embedding",
    "QuantLinear": "dqrm.quant.linear",
    "Run": "dqrm.training.run",
    "CounterAdagrad": "dqrm.training.optimizers",
    "DenseAdam": "dqrm.training.optimizers",
    "FrequencyAdagrad": "dqrm.training.optimizers",
    "SparseAdagrad": "dqrm.training.optimizers",
    "SparseAdam": "dqrm.training.optimizers",
    "SparseOptimizer": "dqrm.training.optimizers",
    "SparseSGD": "dqrm.training.optimizers",
    "TrainingConfig": "dqrm.config",
    "UserError": "dqrm.errors",
    "convert": "dqrm.quant.convert",
    "dequantize": "dqrm.quant.uniform",
    "evaluate": "dqrm.serving.evaluation",
    "export_run": "dqrm.export.pipeline",
    "fake_quantize": "dqrm.quant.uniform",
    "load": "dqrm.serving.loaded",
    "merge_parts": "dqrm.data.parts",
    "predict": "dqrm.serving.predict",
    "prepare": "dqrm.data.prepare",
    "prepare_part": "dqrm.data.parts",
    "prepare_qat": "dqrm.quant.convert",
    "quantize": "dqrm.quant.uniform",
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
