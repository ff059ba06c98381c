"""`dqrm serve`: artifacts behind an HTTP endpoint, by the Open Inference Protocol v2 and as raw rows of a log."""
