"""Speed, measured: our variants and other people's code alternate in one process (`dqrm bench`)."""
