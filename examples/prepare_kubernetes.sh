#!/bin/bash
# Prepare a log in parts by Kubernetes indexed jobs that share a volume; they need no coordinator.
#
#   IMAGE=registry/dqrm CLAIM=shared bash examples/prepare_kubernetes.sh 24 '/shared/logs/day_*' -o /shared/data --layout criteo-terabyte
#
# The first argument is the number of parts, at most that of the log's files; the rest is what follows `dqrm prepare`.
# The volume claim CLAIM, with access mode ReadWriteMany, is mounted at /shared. A pod that was evicted is started again
# and resumes.
set -euo pipefail

parts=$1
shift
command="dqrm prepare $(printf '%q ' "$@")"

job() { # job NAME COMPLETIONS FLAGS: run it to its end
    kubectl apply -f - <<YAML
apiVersion: batch/v1
kind: Job
metadata:
  name: $1
spec:
  completionMode: Indexed
  completions: $2
  parallelism: $2
  backoffLimit: 20
  template:
    spec:
      restartPolicy: OnFailure
      containers:
        - name: dqrm
          image: ${IMAGE:-dqrm}
          command: [bash, -c, $(printf '%s' "$command $3" | python3 -c 'import json, sys; print(json.dumps(sys.stdin.read()))')]
          resources: {requests: {cpu: "${CPUS:-4}", memory: ${MEM:-8Gi}}}
          volumeMounts: [{name: shared, mountPath: /shared}]
      volumes:
        - name: shared
          persistentVolumeClaim: {claimName: ${CLAIM:-shared}}
YAML
    kubectl wait --for=condition=complete --timeout=-1s "job/$1"
}

name=${NAME:-prepare}
job "$name-read" "$parts" "--part \$((JOB_COMPLETION_INDEX + 1))/$parts"
job "$name-merge" 1 --merge
job "$name-write" "$parts" "--part \$((JOB_COMPLETION_INDEX + 1))/$parts"
