"""The artifact, a trained model packed in one file: its format, and how it is read. What writes it is in `export`."""
