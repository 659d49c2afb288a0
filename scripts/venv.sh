# Sourced by the scripts beside it: one virtualenv, .venv in the checkout, brought up to date when pyproject.toml changes.
# shellcheck shell=bash
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$root/.venv"
constraints="$root/scripts/constraints-cpu.txt"

die() {
    printf 'mla-tune: %s\n' "$*" >&2
    exit 1
}

say() { printf 'mla-tune: %s\n' "$*" >&2; }

has_nvidia_gpu() { nvidia-smi -L >/dev/null 2>&1 || [[ -e /dev/nvidiactl ]]; }

# Prints the first Python that is new enough and can make a virtualenv. 3.12 comes first: the kernel libraries and
# their prebuilt needs are published for it before any newer one.
find_python() {
    local candidate old="" bare=""
    local candidates=(python3.12 python3.13 python3.11 python3)
    [[ -z "${PYTHON:-}" ]] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        # The call itself is the test: a version manager's shim exists for versions that are switched off.
        "$candidate" -c '' >/dev/null 2>&1 || continue
        if ! "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            old="$candidate is $("$candidate" -V 2>&1)"
        elif ! "$candidate" -c 'import ensurepip, venv' >/dev/null 2>&1; then
            bare="$("$candidate" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')"
        else
            printf '%s\n' "$candidate"
            return
        fi
    done
    [[ -z "$bare" ]] || die "$bare cannot make virtualenvs: install its venv package (Debian, Ubuntu: apt install $bare-venv)"
    [[ -z "$old" ]] || die "needs Python 3.11 or newer: $old; install python3.12, or name one: PYTHON=/path/to/python3.12 $0"
    die "needs Python 3.11 or newer: ${candidates[*]} did not run; install python3.12, or name one: PYTHON=/path/to/python3.12 $0"
}

# Everything that an installation depends on. Without extras' names, so that `run` accepts what `check` installed.
installation_stamp() {
    printf '%s\n' "$root" "$1" "$("$venv/bin/python" -V 2>&1)"
    cat "$root/pyproject.toml" "$constraints"
}

# prepare_venv run|check: makes .venv serve that script; returns at once where it already does.
prepare_venv() {
    local purpose="$1" extras="tune" pins=(-c "$constraints") size="about 0.6 GB" python
    if has_nvidia_gpu; then extras="tune,gpu" pins=() size="several GB"; fi
    local stamp="$venv/.installed-for-$purpose"
    if [[ -f "$stamp" && "$(installation_stamp "$extras" 2>/dev/null)" == "$(<"$stamp")" ]]; then return; fi

    if ! "$venv/bin/python" -c '' 2>/dev/null; then
        python="$(find_python)"
        say "creating $venv with $("$python" -V 2>&1)"
        "$python" -m venv --clear "$venv" || die "could not create $venv: see the message above"
    fi
    "$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$venv/bin/python" -m ensurepip >/dev/null 2>&1 ||
        die "$venv has no pip: remove that folder and run this again"
    rm -f "$venv"/.installed-for-*
    local wanted="$extras"
    [[ "$purpose" == run ]] || wanted="$extras,dev"
    say "installing mla-tune[$wanted] (the first time downloads $size)"
    [[ ${#pins[@]} -eq 0 || "$(uname)" != Linux ]] || install_cpu_torch || pins=()
    pip_install ${pins[@]+"${pins[@]}"} -e "$root[$wanted]" ||
        die "pip could not install mla-tune: its errors are above, all of its output is in $venv/install.log"
    # What `check` installed serves `run` as well.
    installation_stamp "$extras" | tee "$venv/.installed-for-run" >"$stamp.new"
    mv "$stamp.new" "$stamp"
}

# The CPU build has a version of its own, 2.13.0+cpu. False where none of pip's indexes has it: then the plain version is
# there, which brings CUDA and its own Triton along; everything works, at the price of a large download.
install_cpu_torch() {
    local torch
    torch="$(grep '^torch==' "$constraints")"
    pip_install --no-deps "$torch+cpu" 2>/dev/null && return
    say "no CPU build of $torch on pip's indexes: taking the default one, which may bring gigabytes of CUDA packages"
    say "(to avoid that, stop here and set PIP_EXTRA_INDEX_URL to an index of PyTorch's CPU builds)"
    pip_install "$torch" || die "pip could not install $torch: its errors are above, all of its output is in $venv/install.log"
    return 1
}

# pip's own output goes to a log; only its errors are shown. Nothing is compiled to bytecode ahead of its first import,
# which would take half of the time of an installation for modules that nobody imports.
pip_install() {
    local log="$venv/install.log"
    "$venv/bin/python" -m pip install --disable-pip-version-check --no-input --no-compile "$@" >"$log" 2>&1 && return
    grep '^ERROR' "$log" >&2 || tail -n 5 "$log" >&2
    return 1
}
