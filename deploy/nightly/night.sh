#!/bin/sh
# Score what is new since the last night. See docs/nightly.md.
#
#   NIGHTS/20260105/         SCORES of one night; no folder if nothing was new
#
# The environment has MODEL, IMAGES and NIGHTS, and optionally OPTIONS, further words for `ray-cxr score`. In IMAGES,
# %DATE% stands for the date of the night and %SINCE% for three days before: images that arrive late are found too.
#
# Exit codes, those of `ray-cxr score`:
#   0  done, or nothing was new
#   3  done, and more images failed than max_error_rate allows: look at the errors; do not run it again
#   2  the arguments, the model or an earlier folder is wrong: correct it; running it again changes nothing
#   1  anything else, such as a full disk or a stopped machine: run it again, it continues
set -u
: "${MODEL:?}" "${IMAGES:?}" "${NIGHTS:?}"
mkdir -p "$NIGHTS" || exit 1
exec 9>"$NIGHTS/.night.lock" || exit 1
if ! flock -n 9; then
    echo "night.sh: another run is in progress in $NIGHTS" >&2
    exit 1
fi

score_night() {
    since=$(date -d "$1 - 3 days" +%Y%m%d) || return 1
    images=$(printf '%s' "$IMAGES" | sed "s/%DATE%/$1/g; s/%SINCE%/$since/g")
    out=$NIGHTS/$1
    set -- # the finished nights, which this one leaves out
    for scores in "$NIGHTS"/*/; do
        scores=${scores%/}
        if [ -e "$scores/_SUCCESS" ] && [ "$scores" != "$out" ]; then
            set -- "$@" "$scores"
        fi
    done
    if [ $# -gt 0 ]; then
        set -- --skip-scored "$@"
    fi
    # Without the lock, which processes that outlive a kill would keep.
    # shellcheck disable=SC2086 -- OPTIONS are several words
    ${RAY_CXR:-ray-cxr} score --model "$MODEL" --images "$images" --out "$out" ${OPTIONS:-} "$@" 9>&-
}

# A night that a reboot or a kill ended continues with the images that it started with, before a new one starts.
errors=0
for night in "$NIGHTS"/*/; do
    night=${night%/}
    if [ -e "$night/settings.json" ] && [ ! -e "$night/_SUCCESS" ]; then
        echo "night.sh: continuing $night"
        score_night "${night##*/}"
        code=$?
        case $code in
        0) ;;
        3) errors=3 ;;
        *) exit $code ;;
        esac
    fi
done
score_night "${NIGHT:-$(date +%Y%m%d)}" || exit $?
exit $errors
