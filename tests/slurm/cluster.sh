#!/usr/bin/env bash
# A SLURM cluster of this one machine, for the tests: Debian's slurm-wlm and munge, on loopback, with
# all its files in one folder. Nothing of the system's own configuration is touched.
#
#   tests/slurm/cluster.sh install        # as root, if sbatch is not there
#   tests/slurm/cluster.sh start FOLDER   # then: export SLURM_CONF=FOLDER/slurm.conf
#   tests/slurm/cluster.sh stop FOLDER
#
# Each may be said twice. It needs no systemd and no cgroups; start and stop need root.
set -euo pipefail

fail() {
    echo "cluster.sh: $*" >&2
    exit 1
}

install_slurm() {
    command -v sbatch srun slurmctld slurmd munged >/dev/null && return
    [[ $(id -u) == 0 ]] || fail "not root: install slurm-wlm and munge"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update --quiet >/dev/null
    # The daemons are started here, by hand; those of the packages would have no configuration.
    RUNLEVEL=1 apt-get install --yes --quiet --no-install-recommends slurm-wlm munge >/dev/null
}

configure() {
    local folder=$1 host
    host=$(hostname -s)
    mkdir -p "$folder"/{state,spool,log}
    if [[ ! -s $folder/munge/key ]]; then
        install --directory --owner=munge --mode=700 "$folder/munge"
        install --directory --owner=munge --mode=755 "$folder/socket"
        install --owner=munge --mode=600 <(head -c 1024 /dev/urandom) "$folder/munge/key"
    fi
    # Eight processors are promised, however many there are: parts shall run side by side.
    # cred_expire: a job that is put back into the queue waits so long before it starts again.
    cat >"$folder/slurm.conf" <<END
ClusterName=tilenet
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmctldPort=${CTLD_PORT:-26817}
SlurmdPort=${NODE_PORT:-26818}
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/log/slurmctld
SlurmdLogFile=$folder/log/slurmd
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
AuthType=auth/munge
AuthInfo=socket=$folder/socket/munge,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$folder/log/jobs
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,bf_interval=2
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=15
NodeName=$host NodeAddr=127.0.0.1 CPUs=8 RealMemory=4096 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
END
}

alive() { # PIDFILE: whether the process that wrote it runs (and is no zombie that nobody waits for)
    [[ -s $1 ]] && grep --quiet '^State:[[:space:]]*[^Z[:space:]]' "/proc/$(<"$1")/status" 2>/dev/null
}

start() {
    local folder=$1
    export SLURM_CONF=$folder/slurm.conf
    alive "$folder/munge/pid" || setpriv --reuid=munge --regid=munge --clear-groups \
        munged --force --key-file="$folder/munge/key" --socket="$folder/socket/munge" \
        --pid-file="$folder/munge/pid" --log-file="$folder/munge/log" --seed-file="$folder/munge/seed"
    alive "$folder/slurmctld.pid" || slurmctld
    alive "$folder/slurmd.pid" || slurmd
    for _ in $(seq 60); do
        [[ $(sinfo --noheader --format=%T 2>/dev/null) =~ ^(idle|mixed|allocated)$ ]] && return
        sleep 0.5
    done
    fail "the node does not come up: $(tail -n 3 "$folder/log/slurmd" "$folder/log/slurmctld")"
}

stop() {
    local folder=$1 file
    for file in slurmd.pid slurmctld.pid munge/pid; do
        alive "$folder/$file" || continue
        kill "$(<"$folder/$file")"
        for _ in $(seq 50); do
            alive "$folder/$file" || break
            sleep 0.2
        done
    done
}

case ${1:-} in
install) install_slurm ;;
start)
    install_slurm
    folder=$(realpath -m "${2:?FOLDER}")
    configure "$folder"
    start "$folder"
    ;;
stop) stop "$(realpath -m "${2:?FOLDER}")" ;;
*) fail "say install, start FOLDER or stop FOLDER" ;;
esac
