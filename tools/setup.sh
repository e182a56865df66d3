#!/bin/sh
# Builds .venv, or finds that it is right already and returns at once. The Makefile calls it.
#
#   sh tools/setup.sh run    what `onlinespec` needs
#   sh tools/setup.sh dev    that, and what the checks need
#
# PYTHON       the interpreter; without it, the first of python3, python3.13, 3.12, 3.11 that is new enough
# TORCH_INDEX  the package index torch comes from; without it, pip's own, or the one .venv was built with
#
# A stamp is written after the work it stands for, so an interrupted set-up starts that work again.
set -eu
cd "$(dirname "$0")/.."
here=$(pwd -P)
created=.venv/.stamp-created    # where this .venv lives, and its interpreter: a moved one does not work
torch=.venv/.stamp-torch        # the pin and the index it came from
packages=.venv/.stamp-packages  # the set, and a checksum of what it was installed from

say() { printf '%s\n' "$*"; }
fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}
pip() { .venv/bin/python -m pip --disable-pip-version-check --no-input "$@"; }
line() { [ ! -f "$2" ] || sed -n "$1p" "$2"; }

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
identity() { "$1" -c 'import sys; print(sys.version.split()[0], sys.base_prefix)'; }

find_python() {
    if [ -n "${PYTHON-}" ]; then
        "$PYTHON" -c '' 2>/dev/null || fail "PYTHON=$PYTHON does not run; name an interpreter that is 3.11 or newer"
        is_new_enough "$PYTHON" || fail "PYTHON=$PYTHON is $("$PYTHON" -V 2>&1); onlinespec needs Python 3.11 or newer"
        python=$PYTHON
        return
    fi
    for python in python3 python3.13 python3.12 python3.11; do
        if is_new_enough "$python"; then return; fi
    done
    fail "no Python 3.11 or newer found (python3 is $(python3 -V 2>&1 || true)); install one, or say PYTHON=/path/to/python3.12"
}

is_created() {
    [ -x .venv/bin/python ] && [ "$(line 1 $created)" = "$here" ] || return 1
    [ -z "${PYTHON-}" ] || [ "$(line 2 $created)" = "$(identity "$PYTHON")" ]
}

create() {
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$python has no venv module; on Debian and Ubuntu: apt install python3-venv (or python3.x-venv for your x)"
    say "Creating .venv with $("$python" -V 2>&1), because nothing is installed outside this folder."
    "$python" -m venv --clear .venv
    printf '%s\n' "$here" "$(identity "$python")" >$created
}

install_torch() {
    rm -f $torch $packages
    say "Installing $pin${index:+ from $index}: the largest part by far (CPU build about 200 MB, CUDA build several GB), so this takes minutes."
    if [ -t 1 ]; then quiet=; else quiet=--quiet; fi
    if [ -n "$index" ]; then
        # Only torch itself: such an index need not hold the pinned versions of what torch depends on.
        pip install $quiet --force-reinstall --no-deps --index-url "$index" "$pin"
    else
        pip install $quiet -c constraints.txt "$pin"
    fi
    printf '%s\n' "$pin" "$index" >$torch
}

install_packages() {
    rm -f $packages
    say "Installing onlinespec and its libraries in the versions of constraints.txt: some fifty packages, so this takes a minute or two."
    pip install --quiet -c constraints.txt -e "$target"
    printf '%s\n' "$set" "$sum" >$packages
}

set=${1-}
case $set in
run) target='.[server]' ;;
dev) target='.[server,dev]' ;;
*) fail "usage: sh tools/setup.sh run|dev" ;;
esac

[ -z "${PYTHON-}" ] || find_python
if ! is_created; then
    find_python
    create
fi

pin=$(sed -n 's/^\(torch==[^ ;#]*\).*/\1/p' constraints.txt)
index=${TORCH_INDEX:-$(line 2 $torch)}
if [ "$(line 1 $torch)" != "$pin" ] || [ "$(line 2 $torch)" != "$index" ]; then install_torch; fi

sum=$(cat pyproject.toml constraints.txt | cksum)
has_set=$(line 1 $packages)
if [ "$(line 2 $packages)" != "$sum" ] || { [ "$has_set" != "$set" ] && [ "$has_set" != dev ]; }; then install_packages; fi
