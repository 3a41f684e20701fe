#!/bin/sh
# Install kvd as a service of this machine, or remove it: `make install-systemd`, `make uninstall-systemd`.
#
#   PREFIX   where the program goes, a Python environment of its own (default: /opt/kvd)
#   PYTHON   the Python to make it with (default: python3)
#   DESTDIR  for packagers: put the files below this directory, and do nothing else. The program, which a
#            Python environment cannot be moved with, is then theirs to put at PREFIX.
#
# Again over an installation it is an upgrade. /etc/kvd is never changed but by the first installation.
set -eu
umask 022 # the service reads what root installs

here=$(cd "$(dirname "$0")" && pwd)
prefix=${PREFIX:-/opt/kvd}
python=${PYTHON:-python3}
root=${DESTDIR:-}
lib=$root/usr/local/lib # of the administrator: /etc stays free for what overrides it
doc=$root$prefix/share/doc/kvd

fail() {
    echo "install: $*" >&2
    exit 1
}

check() {
    case $prefix in
    /home/* | /root/* | /run/user/*) fail "$prefix: the service sees no home directories" ;;
    /*) ;;
    *) fail "PREFIX is an absolute path, not $prefix" ;;
    esac
    case $prefix in *[!A-Za-z0-9/._-]*) fail "$prefix: only letters, digits, / . _ -" ;; esac
    [ -n "$root" ] || [ "$(id -u)" = 0 ] || fail "only root can install a service (or: DESTDIR=...)"
}

install_program() {
    # The service has neither our home nor our rights.
    home=$("$python" -c 'import os, sys; print(os.path.realpath(sys.base_prefix))')
    case $home in
    /home/* | /root/* | /run/user/*)
        fail "$python lives in $home, which the service cannot see: PYTHON=/usr/bin/python3, say"
        ;;
    esac
    "$python" -m venv "$prefix"
    "$prefix/bin/python" -m pip install --quiet --upgrade "$here/..[metrics]"
    if [ ! -e /usr/local/bin/kvctl ] && [ ! -L /usr/local/bin/kvctl ]; then
        ln -s "$prefix/bin/kvctl" /usr/local/bin/kvctl
    elif [ "$(readlink /usr/local/bin/kvctl)" != "$prefix/bin/kvctl" ]; then
        echo "install: /usr/local/bin/kvctl is another program (kvcached has one); ours: $prefix/bin/kvctl"
    fi
}

install_files() {
    install -d "$lib/systemd/system" "$lib/sysusers.d" "$lib/tmpfiles.d" "$doc"
    mkdir -p "$root/etc/kvd"
    for unit in kvd.service kvd@.service kvd.slice kvd-metrics.socket; do
        sed "s|/opt/kvd|$prefix|g" "$here/$unit" >"$lib/systemd/system/$unit"
        chmod 644 "$lib/systemd/system/$unit"
    done
    install -m 644 "$here/kvd.sysusers" "$lib/sysusers.d/kvd.conf"
    install -m 644 "$here/kvd.tmpfiles" "$lib/tmpfiles.d/kvd.conf"
    install -m 644 "$here/README.md" "$here/kvd.toml" "$doc"
    [ -e "$root/etc/kvd/kvd.toml" ] || install -m 644 "$here/kvd.toml" "$root/etc/kvd/kvd.toml"
}

remove_program() {
    if [ -d /run/systemd/system ]; then
        systemctl stop kvd-metrics.socket kvd.service 'kvd@*.service' || :
        # and all that is made of the last
        systemctl disable --quiet kvd-metrics.socket kvd.service kvd@.service || :
    fi
    if [ "$(readlink /usr/local/bin/kvctl)" = "$prefix/bin/kvctl" ]; then
        rm /usr/local/bin/kvctl
    fi
    if [ -x "$prefix/bin/kvd" ] && [ -e "$prefix/pyvenv.cfg" ]; then
        rm -r "$prefix"
    fi
    find /dev/shm -maxdepth 1 -user kvd -name 'kvd-*' -delete 2>/dev/null || :
}

remove_files() {
    rm -f "$lib/systemd/system/kvd.service" "$lib/systemd/system/kvd@.service" \
        "$lib/systemd/system/kvd.slice" "$lib/systemd/system/kvd-metrics.socket" \
        "$lib/sysusers.d/kvd.conf" "$lib/tmpfiles.d/kvd.conf"
    rm -rf "$doc"
}

tell_systemd() {
    if [ -d /run/systemd/system ]; then
        systemctl daemon-reload
        systemctl reset-failed 'kvd*' 2>/dev/null || :
    fi
}

check
case ${1:-} in
install)
    [ -n "$root" ] || install_program
    install_files
    if [ -z "$root" ]; then
        systemd-sysusers "$lib/sysusers.d/kvd.conf"
        systemd-tmpfiles --create "$lib/tmpfiles.d/kvd.conf"
        tell_systemd
        echo "installed. Look at /etc/kvd/kvd.toml, and then: systemctl enable --now kvd"
        echo "after an upgrade: systemctl restart kvd"
    fi
    ;;
uninstall)
    [ -n "$root" ] || remove_program
    remove_files
    if [ -z "$root" ]; then
        tell_systemd
        echo "removed. Left alone: /etc/kvd, and the user and group kvd"
    fi
    ;;
*) fail "usage: install.sh install|uninstall" ;;
esac
