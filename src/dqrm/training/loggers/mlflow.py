"""MLflow, where MLFLOW_TRACKING_URI says; the experiment is MLFLOW_EXPERIMENT_NAME, by default dqrm."""

import os
import time
from collections.abc import Mapping

from dqrm.training.loggers.base import LoggedRun, Logger

# What MLflow takes in one call, and of one value.
_PARAMETERS, _LENGTH = 100, 500


class MLflow(Logger):
    """A run of MLflow: the configuration as parameters, figures as metrics. A resumed run continues it."""

    module, extra = "mlflow", "mlflow"

    def __init__(self, run: LoggedRun) -> None:
        import mlflow

        known = run.recall("mlflow")
        # Where the run began: resuming from another folder must not look for it elsewhere.
        uri = known["tracking_uri"] if known else mlflow.get_tracking_uri()
        self._client = mlflow.MlflowClient(uri)
        if known:
            self._run = known["run_id"]
            self._client.update_run(self._run, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "dqrm")
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        self._run = self._client.create_run(experiment, run_name=run.name).info.run_id
        run.remember("mlflow", {"tracking_uri": uri, "run_id": self._run})
        parameters = [mlflow.entities.Param(name, str(value)[:_LENGTH]) for name, value in run.parameters().items()]
        for at in range(0, len(parameters), _PARAMETERS):
            self._client.log_batch(self._run, params=parameters[at : at + _PARAMETERS])

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = round(1000 * time.time())
        self._client.log_batch(self._run, [Metric(name, value, now, step) for name, value in metrics.items()])

    def close(self, finished: bool) -> None:
        self._client.set_terminated(self._run, "FINISHED" if finished else "KILLED")
