#!/usr/bin/env bash
# Tell Ray that this spot machine is about to be taken: training saves its state, pools take nothing new.
#
#   watch_spot.sh aws|gcp        in the background of a node's start, see aws.yaml and gcp.yaml
#
# The cloud gives two minutes on AWS and half a minute on Google Cloud. It ends when it has told, or when the
# machine is no spot machine's node. Kubernetes needs none: a pod's preStop hook does the same.
set -u

cloud="${1:-}"
case "$cloud" in
aws) seconds=115 ;;
gcp) seconds=25 ;;
*)
    echo "watch_spot.sh: no cloud named. Use: watch_spot.sh aws|gcp" >&2
    exit 2
    ;;
esac

noticed() {
    if [[ "$cloud" == aws ]]; then
        local token
        token="$(curl --silent --fail --max-time 2 --request PUT --header 'X-aws-ec2-metadata-token-ttl-seconds: 60' \
            http://169.254.169.254/latest/api/token)" || return 1
        curl --silent --fail --max-time 2 --output /dev/null --header "X-aws-ec2-metadata-token: $token" \
            http://169.254.169.254/latest/meta-data/spot/instance-action
    else
        [[ "$(curl --silent --fail --max-time 2 --header 'Metadata-Flavor: Google' \
            http://metadata.google.internal/computeMetadata/v1/instance/preempted)" == TRUE ]]
    fi
}

until noticed; do
    sleep "${UMARVEL_WATCH_EVERY:-2}"
done
exec ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION --reason-message "$cloud takes this spot machine" \
    --deadline-remaining-seconds "$seconds"
