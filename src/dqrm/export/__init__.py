"""A trained model as a file: the packed artifact, ONNX, torch.export, ExecuTorch; and scoring raw logs with it."""
