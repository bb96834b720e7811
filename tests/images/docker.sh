#!/usr/bin/env bash
# A Docker daemon of the tests' own, and a stand-in for python:3.12-slim where that cannot be pulled.
#
#   tests/images/docker.sh install         # as root, if dockerd is not there: Debian's docker.io
#   tests/images/docker.sh start FOLDER    # then: export DOCKER_HOST=unix://FOLDER/socket
#   tests/images/docker.sh base FOLDER     # Debian by debootstrap, with this machine's Python 3.12
#   tests/images/docker.sh stop FOLDER
#
# Each may be said twice. All files are in FOLDER (20 GB, once the images are built).
set -euo pipefail

fail() {
    echo "docker.sh: $*" >&2
    exit 1
}

install_docker() {
    command -v dockerd debootstrap >/dev/null && [[ -x /usr/bin/docker ]] && return
    [[ $(id -u) == 0 ]] || fail "not root: install docker.io and debootstrap"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update --quiet >/dev/null
    RUNLEVEL=1 apt-get install --yes --quiet --no-install-recommends \
        docker.io iptables debootstrap >/dev/null
}

alive() {
    [[ -s $1/pid ]] &&
        grep --quiet '^State:[[:space:]]*[^Z[:space:]]' "/proc/$(<"$1/pid")/status" 2>/dev/null
}

start() {
    local folder=$1
    mkdir -p "$folder"
    alive "$folder" && return
    iptables-save >"$folder/iptables" # dockerd changes them, and leaves them so
    dockerd --host="unix://$folder/socket" --data-root="$folder/data" --exec-root="$folder/run" \
        --pidfile="$folder/pid" --bip=10.213.7.1/24 >"$folder/log" 2>&1 </dev/null &
    disown
    for _ in $(seq 100); do
        /usr/bin/docker --host "unix://$folder/socket" info >/dev/null 2>&1 && return
        sleep 0.3
    done
    fail "dockerd does not come up: $(tail -n 5 "$folder/log")"
}

base() {
    local folder=$1 root=$1/base python mirror file
    local docker=(/usr/bin/docker --host "unix://$folder/socket")
    "${docker[@]}" image inspect python:3.12-slim >/dev/null 2>&1 && return
    python=${PYTHON:-$(command -v python3.12 || true)}
    [[ -n $python ]] || fail "no Python 3.12 here"
    # Where apt takes its packages from, debootstrap does too.
    # shellcheck disable=SC2016  # apt's own variable
    mirror=$(apt-get indextargets --format '$(REPO_URI)' "Label: Debian" | head -n 1)
    rm -rf "$root"
    debootstrap --variant=minbase \
        --include=ca-certificates,libbz2-1.0,libffi8,liblzma5,libreadline8,libsqlite3-0,libssl3,zlib1g \
        "$(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release)" "$root" "$mirror" >"$folder/debootstrap.log"
    cp -a "$("$python" -c 'import sys; print(sys.base_prefix)')"/{bin,lib} "$root/usr/local/"
    rm -rf "$root"/usr/local/lib/python3.12/site-packages
    ln -sf python3.12 "$root/usr/local/bin/python"
    chroot "$root" ldconfig
    chroot "$root" /usr/local/bin/python -m ensurepip --upgrade >/dev/null
    # What this machine needs to reach its package sources.
    for file in /etc/pip.conf /etc/ssl/certs/ca-certificates.crt; do
        [[ -f $file ]] && install -D -m 644 "$file" "$root$file"
    done
    tar -C "$root" -c . | "${docker[@]}" import \
        --change 'ENV PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin' \
        - python:3.12-slim >/dev/null
    rm -rf "$root"
}

stop() {
    local folder=$1
    alive "$folder" || return 0
    kill "$(<"$folder/pid")"
    for _ in $(seq 100); do
        alive "$folder" || break
        sleep 0.2
    done
    alive "$folder" && fail "dockerd does not stop"
    iptables-restore "$folder/iptables"
    ip link delete docker0 2>/dev/null || true
    umount "$folder"/run/netns/* 2>/dev/null || true
}

[[ $# -eq 2 || ${1:-} == install ]] || fail "say install, start FOLDER, base FOLDER or stop FOLDER"
case $1 in
install) install_docker ;;
start) start "$(realpath -m "$2")" ;;
base) base "$(realpath -m "$2")" ;;
stop) stop "$(realpath -m "$2")" ;;
*) fail "no $1" ;;
esac
