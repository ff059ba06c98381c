"""The file formats that `dqrm export` writes."""
