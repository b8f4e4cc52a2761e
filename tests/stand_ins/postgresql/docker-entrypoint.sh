#!/bin/sh
# The published image's conventions, as far as services/ leans on them: user, password and database by variables, scripts
# once, a server without network while it is prepared, root only to own the data.
set -eu
if [ "$(id -u)" = 0 ]; then
    mkdir -p "$PGDATA"
    chown -R postgres "$PGDATA"
    chmod 700 "$PGDATA"
    exec setpriv --reuid=postgres --regid=postgres --clear-groups "$0" "$@"
fi
mkdir -p -m 700 "$PGDATA"

if [ ! -s "$PGDATA/PG_VERSION" ]; then
    export POSTGRES_USER="${POSTGRES_USER:-postgres}"
    if [ -z "${POSTGRES_PASSWORD:=$(cat "${POSTGRES_PASSWORD_FILE:-/dev/null}")}" ]; then
        echo "Error: Database is uninitialized and superuser password is not specified." >&2
        exit 1
    fi
    umask 077
    printf '%s\n' "$POSTGRES_PASSWORD" > /tmp/password
    initdb --username="$POSTGRES_USER" --pwfile=/tmp/password
    rm /tmp/password
    echo "host all all all scram-sha-256" >> "$PGDATA/pg_hba.conf"
    echo "listen_addresses = '*'" >> "$PGDATA/postgresql.conf"
    pg_ctl --wait --options="-c listen_addresses=''" start
    database=${POSTGRES_DB:-$POSTGRES_USER}
    [ "$database" = postgres ] || createdb --username="$POSTGRES_USER" "$database"
    for script in /docker-entrypoint-initdb.d/*; do
        case "$script" in
            *.sh) . "$script" ;;
            *.sql) psql --set=ON_ERROR_STOP=1 --no-psqlrc --username="$POSTGRES_USER" --dbname="$database" --file="$script" ;;
        esac
    done
    pg_ctl --wait --mode=fast stop
fi
exec "$@"
