#!/usr/bin/env bash
# cron, or any shell: predict, and again while a rerun resumes.
#
#   workflows/cron/nightly.sh /srv/slides --out /srv/masks
#
# All arguments are those of `tilenet predict`. What is finished is not done again, so every night
# takes what is new (--skip-finished does not even look at the rest). TRIES (5) runs at most, WAIT (300) seconds apart; SUMMARY names the JSON file
# that says what became of each input. The exit code is tilenet's, and 0 where only single inputs failed (7).
set -uo pipefail

summary=${SUMMARY:-tilenet-summary.json}
for ((try = 1; ; try++)); do
    tilenet predict "$@" --summary "$summary"
    code=$?
    case $code in
    6 | 9 | 130 | 143) # memory, disk or cluster gone, or stopped: a rerun resumes
        ((try < ${TRIES:-5})) || break
        echo "nightly: exit code $code, try $try; again in ${WAIT:-300} s" >&2
        sleep "${WAIT:-300}"
        ;;
    7)
        echo "nightly: warning: some inputs failed, in whole or in part; see $summary" >&2
        exit 0
        ;;
    *) break ;;
    esac
done
exit "$code"
