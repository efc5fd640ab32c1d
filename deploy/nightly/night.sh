#!/bin/sh
# Score what is new since the last night. See docs/nightly.md.
#
#   NIGHTS/20260105/         SCORES of one night; no folder if nothing was new
#
# The environment has MODEL, IMAGES, NIGHTS and START, and optionally OPTIONS, further words for `ray-cxr score`. In
# IMAGES, %DATE% stands for the date of the night, and %SINCE% for three days before the last finished night: images of
# nights without a run, and images that arrive late, are found too. Before the first finished night, %SINCE% is START.
#
# Exit codes, those of `ray-cxr score`:
#   0  done, or nothing was new
#   3  done, and more images failed than max_error_rate allows: look at the errors; do not run it again
#   2  the arguments, the model or an earlier folder is wrong: correct it; running it again changes nothing
#   1  anything else, such as a full disk, or a PACS that does not answer: run it again, it continues
set -u
if [ -z "${MODEL:-}" ] || [ -z "${IMAGES:-}" ] || [ -z "${NIGHTS:-}" ]; then
    echo "night.sh: set MODEL, IMAGES and NIGHTS, such as in night.env" >&2
    exit 2
fi
mkdir -p "$NIGHTS" || exit 1
exec 9>"$NIGHTS/.night.lock" || exit 1
if ! flock -n 9; then
    echo "night.sh: another run is in progress in $NIGHTS" >&2
    exit 1
fi

score_night() {
    # Only nights before this one count, so that a night which continues has the search that it started with.
    last=
    for scores in "$NIGHTS"/[0-9][0-9][0-9][0-9][0-9][0-9][0-9][0-9]/; do
        name=$(basename "$scores")
        if [ -e "$scores/_SUCCESS" ] && [ "$name" -lt "$1" ]; then
            last=$name
        fi
    done
    since=${START:-}
    if [ -n "$last" ]; then
        since=$(date -d "$last - 3 days" +%Y%m%d) || return 1
    fi
    if [ -z "$since" ] && [ "$IMAGES" != "${IMAGES#*%SINCE%}" ]; then
        echo "night.sh: no night is finished yet; set START, the first date to search, such as 20260101" >&2
        return 2
    fi
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
        2)
            echo "night.sh: $night cannot continue. Restore the MODEL, IMAGES, START and OPTIONS that it started" \
                "with, or move the folder away: the next night then searches its days again" >&2
            exit 2
            ;;
        *) exit $code ;;
        esac
    fi
done
score_night "${NIGHT:-$(date +%Y%m%d)}" || exit $?
exit $errors
