# The environment of every script here; source it, then say which extras are needed:
#     use_environment train,test
# Works in the active virtual environment, or in .venv, which it makes. Packages are installed only
# when pyproject.toml or constraints.txt has changed since the last time.

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# One thread a process: the scripts run several processes side by side.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Bytecode is written on first import, not at installation: most of it is never imported.
unset PYTHONDONTWRITEBYTECODE

use_environment() {
    local extras=$1
    if [ -z "${VIRTUAL_ENV:-}" ]; then
        # `activate` is the last file that venv writes: without it, a .venv is a broken-off one, or
        # of another making, such as conda's.
        if [ ! -e "$REPO/.venv/bin/activate" ]; then
            if [ ! -e "$REPO/.venv/pyvenv.cfg" ] && [ -n "$(ls -A "$REPO/.venv" 2>/dev/null)" ]; then
                echo "error: $REPO/.venv is no virtual environment: activate the one to use, or move it" >&2
                return 1
            fi
            "${PYTHON:-python3}" -m venv --clear "$REPO/.venv"
        fi
        source "$REPO/.venv/bin/activate"
    fi
    # DeepSpeed compiles its Adam for the CPU at its first use. Kept with the environment that it
    # belongs to; a lock that a killed compilation left behind would be waited for without end.
    export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$VIRTUAL_ENV/torch_extensions}
    [ ! -d "$TORCH_EXTENSIONS_DIR" ] || find "$TORCH_EXTENSIONS_DIR" -name lock -mmin +10 -delete
    # A stamp for each extra, so that what one script has installed serves another that asks for less.
    local wanted extra missing=""
    wanted=$(cd "$REPO" && echo "$REPO" | sha256sum - pyproject.toml constraints.txt)
    for extra in ${extras//,/ }; do
        [ "$(cat "$VIRTUAL_ENV/.sqllava-$extra" 2>/dev/null)" = "$wanted" ] || missing=$extra
    done
    [ -n "$missing" ] || return 0
    install_packages "$extras"
    for extra in ${extras//,/ }; do echo "$wanted" >"$VIRTUAL_ENV/.sqllava-$extra"; done
}

install_packages() {
    echo "installing sqllava[$1] into $VIRTUAL_ENV (takes a few minutes the first time)" >&2
    # The constraints keep torch at the tested version. It comes first: the rest builds on it.
    local pip=(python -m pip install --quiet --no-compile --disable-pip-version-check
        --constraint "$REPO/constraints.txt")
    "${pip[@]}" torch
    "${pip[@]}" --editable "$REPO[$1]"
}
