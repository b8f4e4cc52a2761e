#!/bin/sh
# The published image's conventions, as far as services/ leans on them: the data in /data, owned by the user `seaweed`, whom
# root becomes; and its options of `server`, before those that are given.
set -eu
if [ "$(id -u)" = 0 ]; then
    chown -R seaweed:seaweed /data
    exec setpriv --reuid=seaweed --regid=seaweed --clear-groups "$0" "$@"
fi
case "$1" in
    server)
        shift
        set -- server -dir=/data -volume.max=0 -master.volumePreallocate -master.volumeSizeLimitMB=1024 "$@"
        ;;
esac
exec /usr/bin/weed -logtostderr=true "$@"
