"""Raw click logs -> dataset folder -> batches. Knows files and columns, knows no model.

`config.PrepareConfig` says how a log is read, `prepare.prepare` writes the folder, `dataset.Dataset` reads it.
Nothing is imported here: the command line needs the configuration without torch and polars.
"""
