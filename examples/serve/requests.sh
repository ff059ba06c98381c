#!/bin/sh
# The same with curl: `sh examples/serve/requests.sh http://localhost:8000 mine` asks `dqrm serve mine.dqrm`.
set -eu
url=${1:-http://localhost:8000}
model=${2:-mine}

# Is it up, should requests go there, and what does the model take?
curl --silent --show-error --fail "$url/v2/health/live"; echo
curl --silent --show-error --fail "$url/v2/health/ready"; echo
curl --silent --show-error --fail "$url/v2/models/$model"; echo

# Raw values by the names of the log's columns: one object, or a list of them. A missing value is null.
row=${ROW:-'{"user": "7", "ad": "3", "site": null, "price": 12, "age": 30}'}
curl --silent --show-error --fail "$url/score/$model" --data "$row"; echo
