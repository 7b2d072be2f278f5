# Commands that end as a whole; source it, then call `as_one COMMAND...`.

# as_one COMMAND...: runs it in a process group of its own, and returns when all of that has ended. One
# signal to this shell (TERM, HUP, Ctrl-C) asks the whole group to end, a second one kills it.
as_one() {
    local group asked="" status
    set -m
    "$@" &
    group=$!
    set +m
    trap 'end_group 15' TERM
    trap 'end_group 1' HUP
    trap 'end_group 2' INT
    while :; do
        status=0
        wait "$group" 2>/dev/null || status=$?
        # A signal interrupts the waiting as well.
        ((status > 128)) && kill -0 "$group" 2>/dev/null || break
    done
    while group_lives; do sleep 0.2; done
    trap - TERM HUP INT
    return $((asked ? 128 + asked : status))
}

end_group() {
    if [ -z "$asked" ]; then
        asked=$1
        echo "ending (a second signal kills)" >&2
        kill -TERM -- "-$group" 2>/dev/null || true
    else
        kill -KILL -- "-$group" 2>/dev/null || true
    fi
}

# Whether any process of the group still runs; one that nobody reaps does not count.
group_lives() {
    [ -d /proc/self ] || { kill -0 -- "-$group" 2>/dev/null; return; }
    local file line words
    for file in /proc/[0-9]*/stat; do
        # "pid (name) state parent group ...", and the name may hold anything
        { read -r line <"$file"; } 2>/dev/null || continue
        words=(${line##*) })
        [ "${words[2]}" != "$group" ] || [ "${words[0]}" = Z ] || return 0
    done
    return 1
}
