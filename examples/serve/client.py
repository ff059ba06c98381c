"""Score rows on a running `dqrm serve` with Triton's client: `python examples/serve/client.py --model mine`.

Needs `pip install 'tritonclient[http]'`. Sends random table rows of every column; raw ids go to /score (`requests.sh`).
"""

import argparse

import numpy as np
import tritonclient.http as triton


def infer(url: str, name: str, rows: int = 5) -> np.ndarray:
    """The probabilities of random rows, float32 [rows], by the binary tensor extension."""
    client = triton.InferenceServerClient(url)
    try:
        draw, inputs = np.random.default_rng(0), []
        for port in client.get_model_metadata(name)["inputs"]:
            if len(port["shape"]) != 2:
                raise SystemExit(f"{name} has multi-valued columns, which this example does not send")
            shape = (rows, port["shape"][1])
            # Row 0 of a table is for unknown ids, and every table has it.
            values = draw.random(shape, np.float32) if port["datatype"] == "FP32" else np.zeros(shape, np.int64)
            inputs.append(triton.InferInput(port["name"], shape, port["datatype"]))
            inputs[-1].set_data_from_numpy(values)
        outputs = [triton.InferRequestedOutput("probability")]
        return client.infer(name, inputs, outputs=outputs).as_numpy("probability")
    finally:
        client.close()


def main() -> None:
    """Print the probabilities."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="localhost:8000")
    parser.add_argument("--model", required=True, help="its name on the server")
    options = parser.parse_args()
    print(infer(options.url, options.model))


if __name__ == "__main__":
    main()
